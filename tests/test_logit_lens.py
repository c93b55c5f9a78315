"""Offsets through W_O, the final norm and W_U: equal to what the model itself makes of them, on every architecture."""

import contextlib
import json

import numpy as np
import pandas as pd
import pytest
import torch

from lofit_lens import HeadSet, Lofit, tune_offsets
from lofit_lens.analysis.logit_lens import promoted_by, promoted_tokens, to_stream
from lofit_lens.errors import InputError, ModelError
from lofit_lens.models import ORGANISM, final_norm, head_output_matrix, hook_z, hooked, load_model, logits_of, to_logits
from tests import tiny
from tests.adapters import output_projection, random_adapter
from tests.conftest import PAIRS

LAST = 2
IDS = torch.randint(3, 400, (1, 7), generator=torch.Generator().manual_seed(4))
PROMPTS = ["Q: Who? A:", "In what country? A:"]


def uneven(architecture):
    """A model whose norm weights are not all 1, so that a forgotten weight shows."""
    hf, generator = tiny.hf_model(architecture), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if "norm" in name or "ln_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return hf


@pytest.fixture(scope="module")
def with_weights(tmp_path_factory):
    """(architecture, backend) -> such a model."""
    folders, made = {}, {}

    def model_of(architecture, backend):
        if architecture not in folders:
            folders[architecture] = tmp_path_factory.mktemp("norms")
            uneven(architecture).save_pretrained(folders[architecture])
            tiny.tokenizer().save_pretrained(folders[architecture])
        if (architecture, backend) not in made:
            made[architecture, backend] = load_model(folders[architecture], backend=backend, device="cpu")
        return made[architecture, backend]

    return model_of


def run(model, *edits):
    """Logits `[pos, d_vocab]`, and the stream and the norm's scale before them, after edits of `(hook name, function)`."""
    seen = {}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, edit in edits:
            stack.enter_context(hooked(model.hook_dict[name], edit))
        for name in (f"blocks.{LAST}.hook_resid_post", "ln_final.hook_scale"):
            stack.enter_context(hooked(model.hook_dict[name], lambda x, hook, n=name: seen.__setitem__(n, x.clone())))
        logits = logits_of(model, IDS, torch.ones_like(IDS))[0]
    return logits, seen[f"blocks.{LAST}.hook_resid_post"][0], seen["ln_final.hook_scale"].reshape(-1)


@pytest.mark.parametrize(("architecture", "backend"), PAIRS)
def test_logits_are_linear_in_the_stream_at_a_fixed_scale(with_weights, architecture, backend):
    """With the model's own scale, `to_logits` of the whole stream is the logits but for what biases add, the same everywhere."""
    model = with_weights(architecture, backend)
    logits, stream, scale = run(model)
    norm = final_norm(model)
    torch.testing.assert_close(norm.scale(stream), scale, atol=1e-5, rtol=1e-5)
    ours = torch.cat([to_logits(model, x[None], float(s)) for x, s in zip(stream, scale, strict=True)])
    rest = logits - ours
    assert (rest - rest[0]).abs().max() < 1e-5
    assert norm.centered == (architecture in ("gpt2", "pythia", "opt"))


@pytest.mark.parametrize(("architecture", "backend"), PAIRS)
def test_a_vector_added_to_the_last_stream_adds_what_is_claimed(with_weights, architecture, backend):
    """u added behind the last layer: the new logits at the new scale, minus the old at the old, are u's claim and a rescaling."""
    model = with_weights(architecture, backend)
    u = torch.randn(32, generator=torch.Generator().manual_seed(1))
    logits, stream, scale = run(model)
    more, _, new = run(model, (f"blocks.{LAST}.hook_resid_post", lambda x, hook: x + u))
    for at in (0, 6):
        was = to_logits(model, stream[at][None], float(scale[at]))[0]
        kept = to_logits(model, stream[at][None], float(new[at]))[0]  # the old stream at the new scale
        claim = to_logits(model, u[None], float(new[at]))[0]
        torch.testing.assert_close(more[at] - logits[at], kept + claim - was, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "backend"), PAIRS)
def test_stream_shares_are_what_heads_add(with_weights, architecture, backend):
    """v put in place of a head's z, minus zero in its place, changes the attention's part of the stream by `v W_O[h]`."""
    model = with_weights(architecture, backend)
    d_head = head_output_matrix(model, LAST).shape[1]
    v = torch.randn(2, d_head, generator=torch.Generator().manual_seed(2))
    heads = HeadSet(["L2H3", "L0H1"])
    claimed = to_stream(model, v, heads)
    for head, vector, u in zip(heads, v, claimed, strict=True):
        parts = []
        for value in (torch.zeros(d_head), vector):
            seen = {}

            def put(z, hook, value=value, index=head.head):
                z = z.clone()
                z[:, :, index] = value
                return z

            with torch.no_grad(), contextlib.ExitStack() as stack:
                stack.enter_context(hooked(hook_z(model, head.layer), put))
                for site in ("hook_resid_post", "hook_mlp_out"):
                    point = model.hook_dict[f"blocks.{head.layer}.{site}"]
                    stack.enter_context(hooked(point, lambda x, hook, s=site, k=seen: k.__setitem__(s, x.clone())))
                logits_of(model, IDS, torch.ones_like(IDS))
            parts.append((seen["hook_resid_post"] - seen["hook_mlp_out"])[0])
        torch.testing.assert_close(parts[1] - parts[0], u.expand(7, -1), atol=1e-5, rtol=1e-4)


def planted(model, plain):
    """An adapter of two heads, and the token that its one offset, on L1H2, must promote most.

    M = W_O[h] (centered) W_U, `[d_head, d_vocab]`, from the plain model's weights (whose norm weights are 1). With v = the
    longest column of M, no other token's logit `M[:, t] v` can be larger (Cauchy and Schwarz).
    """
    W_O, W_U = output_projection(plain, 1).weight.detach(), plain.lm_head.weight.detach()
    if type(plain).__name__ == "GPT2LMHeadModel":  # stores W_O the other way round, and its norm takes the mean away
        W_O, W_U = W_O.T, W_U - W_U.mean(dim=1, keepdim=True)
    M = W_O[:, 16:24].T @ W_U.T
    token = int(M.norm(dim=0).argmax())
    lofit = Lofit.for_model(model, ["L1H2", "L2H0"])
    with torch.no_grad():
        lofit.v[1, 2] = M[:, token]
    return lofit, token, float(M[:, token] @ (M[:, token] - M.mean(dim=1)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_offset_along_a_tokens_unembedding_promotes_that_token(loaded, hf, backend, architecture):
    """First of the head and of the total; the other head, whose offset is zero, says nothing."""
    model = loaded(architecture, backend)
    lofit, token, logit = planted(model, hf(architecture))
    found = promoted_tokens(model, lofit, top=3)
    for name in ("L1H2", "total"):
        rows = found.of(name)
        assert rows["token_id"][0] == token
        assert rows["logit"][0] == pytest.approx(logit, rel=1e-4)
        assert rows["kind"].tolist() == ["promoted"] * 3 + ["suppressed"] * 3
        assert rows["logit"][:3].is_monotonic_decreasing
        assert rows["logit"][3:].is_monotonic_increasing
        assert rows["rank"].tolist() == [1, 2, 3] * 2
    assert (found.of("L2H0")["logit"] == 0).all()
    assert found.scale is None
    assert found.unit == "logits at norm scale 1"
    assert promoted_tokens(model, -1.0 * lofit, top=1).of("L1H2").iloc[1]["token_id"] == token


def test_total_is_the_sum_and_the_scale_divides(llama):
    """Logits of the total are the heads' added up; with prompts all are divided by 1 / mean(1 / s), worked out by hand."""
    lofit = random_adapter(llama)
    every = promoted_tokens(llama, lofit, top=200)
    by_head = every.frame.pivot(index="token_id", columns="head", values="logit")
    assert len(by_head) == 400
    torch.testing.assert_close(
        torch.tensor(by_head[[str(h) for h in lofit.heads]].sum(axis=1).to_numpy()),
        torch.tensor(by_head["total"].to_numpy()), atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    assert abs(by_head["total"].mean()) < 1e-5, "centered over the vocabulary"
    scales = []
    for prompt in PROMPTS:
        ids = torch.tensor([[1, *tiny.tokenizer()(prompt, add_special_tokens=False)["input_ids"]]])
        seen = []
        with (
            torch.no_grad(),
            hooked(llama.hook_dict["ln_final.hook_scale"], lambda x, hook, s=seen: s.append(x.clone())),
        ):
            llama(ids)
        scales.append(seen[0].reshape(-1)[-1].item())
    scaled = promoted_tokens(llama, lofit, top=200, prompts=PROMPTS)
    assert scaled.scale == pytest.approx(2 / (1 / scales[0] + 1 / scales[1]), rel=1e-5)
    assert scaled.n_prompts == 2
    assert scaled.unit == "logits"
    again = scaled.frame.pivot(index="token_id", columns="head", values="logit")
    torch.testing.assert_close(
        torch.tensor((again * scaled.scale).to_numpy()), torch.tensor(by_head.to_numpy()), atol=1e-5, rtol=1e-4
    )


def test_chance_by_hand(llama):
    """Random offsets of the head's norm, each with its own list: p counts lists whose mean is as large; `chance` is per rank."""
    lofit = random_adapter(llama)
    head = lofit.heads[0]
    rows = promoted_tokens(llama, lofit, top=4, seed=5).of(head)
    v = lofit.v.detach()[head]
    drawn = np.random.default_rng([5, *head]).normal(size=(199, len(v)))
    drawn = torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).float() * v.norm()
    logits = torch.cat([to_logits(llama, to_stream(llama, d[None], HeadSet([head]))) for d in drawn])
    logits -= logits.mean(dim=1, keepdim=True)
    for kind, sign in (("promoted", 1), ("suppressed", -1)):
        own = rows[rows["kind"] == kind]
        lists = (sign * logits).sort(dim=1, descending=True).values[:, :4]
        n = int((lists.mean(dim=1) > sign * own["logit"].mean()).sum())
        assert own["p"].tolist() == [(n + 1) / 200] * 4
        assert own["chance"].tolist() == pytest.approx((sign * lists.quantile(0.95, dim=0)).tolist(), rel=1e-4)


def test_chance_is_the_heads_own(llama):
    """The same whichever other heads are asked for and whatever the offset's length; another seed gives other draws."""
    lofit = random_adapter(llama)
    head = str(lofit.heads[1])
    both, alone = promoted_tokens(llama, lofit), promoted_tokens(llama, lofit, heads=HeadSet([head]))
    pd.testing.assert_frame_equal(both.of(head), alone.of(head))
    assert promoted_tokens(llama, 3.0 * lofit).of(head)["p"].tolist() == both.of(head)["p"].tolist()
    assert promoted_tokens(llama, lofit, seed=1).of(head)["chance"].tolist() != both.of(head)["chance"].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_offset_along_a_tokens_unembedding_is_beyond_chance(loaded, hf, backend, architecture):
    """The planted token's list is stronger than those of random offsets; the head without an offset has no better than chance."""
    lofit, _, _ = planted(loaded(architecture, backend), hf(architecture))
    found = promoted_tokens(loaded(architecture, backend), lofit, top=1)
    assert found.of("L1H2")["p"][0] == 1 / 200
    assert "promoted" not in found.no_better_than_chance("L1H2")
    assert found.no_better_than_chance("L2H0") == ["promoted", "suppressed"]
    assert set(found.of("L2H0")["p"]) == {1.0}


def rejected(model, n):
    """Share of lists with p <= 0.05 of random offsets of all heads, n times; and the number of lists."""
    heads, hits = HeadSet.all((model.cfg.n_layers, model.cfg.n_heads)), []
    for s in range(n):
        drawn = np.random.default_rng([7, s]).normal(size=(len(heads), model.cfg.d_head))
        frame = promoted_by(model, torch.from_numpy(drawn).float(), heads, seed=s).frame
        hits += (frame.loc[(frame["rank"] == 1) & (frame["head"] != "total"), "p"] <= 0.05).tolist()
    return np.mean(hits), len(hits)


def test_random_offsets_are_no_better_than_chance(bridge_llama):
    """One list in twenty of 2,400 comes out better, by its construction."""
    share, n = rejected(bridge_llama, 100)
    assert (n, 0.04 <= share <= 0.06) == (2400, True), share


@pytest.mark.slow
def test_random_offsets_of_the_embedded_model_are_no_better_than_chance():
    """One list in twenty of 4,608."""
    share, n = rejected(load_model("organism", device="cpu"), 24)
    assert (n, 0.04 <= share <= 0.06) == (4608, True), share


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truth", "kinship", "edits"])
def test_learned_offsets_of_the_planted_heads_are_beyond_chance(name):
    """Of the embedded model's three planted heads: one list at least of each, and both of all together."""
    model = load_model("organism", device="cpu")
    heads = HeadSet(json.loads((ORGANISM / "organism.json").read_text())["planted_heads"][name])
    found = promoted_tokens(model, tune_offsets(model, f"organism/{name}", heads, seed=0, progress=False))
    assert found.no_better_than_chance("total") == []
    assert all(len(found.no_better_than_chance(h)) < 2 for h in heads)


def test_bad_requests_say_what_to_give(llama, hf):
    """No offsets, a head without one, a wrong number of tokens or directions, an empty list of prompts."""
    lofit, _, _ = planted(llama, hf("llama"))
    with pytest.raises(InputError, match="every offset of these heads is zero"):
        promoted_tokens(llama, lofit, heads=HeadSet(["L2H0"]))
    with pytest.raises(InputError, match="L0H0 not in this adapter"):
        promoted_tokens(llama, lofit, heads=HeadSet(["L0H0"]))
    with pytest.raises(InputError, match="no head to read"):
        promoted_tokens(llama, lofit, heads=HeadSet([]))
    for top in (0, 201):
        with pytest.raises(InputError, match="give 1 to 200"):
            promoted_tokens(llama, lofit, top=top)
    with pytest.raises(InputError, match=r"directions of shape \(1, 8\) for 2 heads; give a tensor \[2, 8\]"):
        promoted_by(llama, torch.ones(1, 8), lofit.heads)
    with pytest.raises(InputError, match="prompts is an empty list"):
        promoted_tokens(llama, lofit, prompts=[])
    with pytest.raises(InputError, match="no tokens of L0H0"):
        promoted_tokens(llama, lofit).of("L0H0")


def test_a_norm_behind_attention_is_refused(loaded, backend, monkeypatch):
    """Where the stream does not get z W_O as it is, there is no direct effect to state."""
    model = loaded("qwen2", backend)
    monkeypatch.setattr("lofit_lens.models.unembedding._direct", {})
    name = "blocks.1.hook_attn_out"
    with (
        hooked(model.hook_dict[name], lambda x, hook: 0.5 * x),
        pytest.raises(ModelError, match=r"layer 1 .* does not add z W_O"),
    ):
        head_output_matrix(model, 1)


def test_half_precision_with_a_huge_coordinate_is_no_norm_behind_attention(checkpoint, backend):
    """Llama-2's first token has coordinates beside which bfloat16 cannot show a small change; that is no reason to refuse."""
    model = load_model(checkpoint("llama"), backend=backend, dtype="bfloat16", device="cpu")
    huge = 2000.0 * (torch.arange(32) == 5)
    with hooked(model.hook_dict["blocks.0.hook_resid_pre"], lambda x, hook: x + huge.to(x)):
        W = head_output_matrix(model, 1)
    assert W.shape == (4, 8, 32)
