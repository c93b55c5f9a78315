"""Drift: nothing for a zero adapter, known numbers for a known change, on both classes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lofit_lens import HeadSet, Lofit, RepE
from lofit_lens.analysis.drift import MEASURES, Running, compare, drift
from lofit_lens.errors import DataError, InputError
from lofit_lens.models import hook_z, hooked
from lofit_lens.models.tokens import keep_rules, rules_of
from tests import planted_truth, tiny
from tests.adapters import edited, output_projection, random_adapter
from tests.blocks import streams

TEXTS = ["Q: In what country was the person born? A:", "Ann asked her son", "Rome"]


def ids_of(text):
    return [1, *tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]]


def test_a_zero_adapter_moves_nothing(llama):
    """Cosine 1, change 0, ratio 1 in every layer, head and position."""
    found = drift(llama, Lofit.for_model(llama, ["L1H2"]), TEXTS, progress=False)
    for frame in (found.layers, found.heads, found.positions):
        assert np.allclose(frame[list(MEASURES)], [1, 0, 1], atol=1e-12)
    assert len(found.layers) == 6
    assert found.layers["n"].tolist() == [3] * 6
    assert (found.n_texts, found.cut) == (3, 0)
    assert found.n_tokens == sum(len(ids_of(t)) for t in TEXTS)


def test_a_scaled_head_is_scaled(llama):
    """A = 1 doubles z of one head: cosine 1, change 1, ratio 2; the layer's mean over 4 heads: change 1/4, ratio 5/4."""
    lofit = Lofit.for_model(llama, ["L0H3"])
    with torch.no_grad():
        lofit.A[0, 3] = 1.0
    found = drift(llama, lofit, TEXTS, progress=False)
    head = found.heads.iloc[0]
    assert (head["head"], head["layer"], head["index"]) == ("L0H3", 0, 3)
    assert head[list(MEASURES)].tolist() == pytest.approx([1, 1, 2], abs=1e-6)
    assert head[["change_low", "change_high"]].tolist() == pytest.approx([1, 1], abs=1e-6)
    layers = found.layers.set_index(["where", "layer"])
    assert layers.loc[("z", 0), list(MEASURES)].tolist() == pytest.approx([1, 0.25, 1.25], abs=1e-6)
    assert layers.loc[("z", 1), "change"] > 1e-4, "later layers see another stream"
    assert layers.loc[("resid", 0), "cosine"] < 1


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
def test_streams_are_the_plain_models(loaded, hf, backend, architecture):
    """Each text's positions are averaged, then texts; the interval is Student's over texts; positions by hand."""
    model, plain = loaded(architecture, backend), hf(architecture)
    lofit = random_adapter(model)
    found = drift(model, lofit, TEXTS, ends=3, progress=False)
    by_text = []
    for text in TEXTS:
        before = streams(plain, ids_of(text), [1])[1].double()
        with edited(plain, lofit):
            after = streams(plain, ids_of(text), [1])[1].double()
        by_text.append((after - before).norm(dim=1) / before.norm(dim=1))
    means = np.array([c.mean().item() for c in by_text])
    row = found.layers.set_index(["where", "layer"]).loc[("resid", 1)]
    assert row["change"] == pytest.approx(means.mean(), rel=1e-4)
    reach = 4.302653 * means.std(ddof=1) / 3**0.5  # t(0.975, 2)
    assert row["change_high"] - row["change"] == pytest.approx(reach, rel=1e-3)
    assert row["change"] - row["change_low"] == pytest.approx(reach, rel=1e-3)
    at = found.positions.set_index(["where", "layer", "position"])["change"]
    assert at["resid", 1, 0] == pytest.approx(np.mean([c[0].item() for c in by_text]), rel=1e-4)
    assert at["resid", 1, -1] == pytest.approx(np.mean([c[-1].item() for c in by_text]), rel=1e-4)
    longest = [c for c in by_text if len(c) >= 3]
    assert at["resid", 1, 2] == pytest.approx(np.mean([c[2].item() for c in longest]), rel=1e-4)
    assert at["resid", 1, -3] == pytest.approx(np.mean([c[-3].item() for c in longest]), rel=1e-4)
    counts = found.positions.set_index(["where", "layer", "position"])["n"]
    assert counts["resid", 1, 2] == len(longest)
    assert counts["z", 2, -1] == 3


def test_z_of_a_head_is_the_plain_models(llama, hf):
    """Cosine of an edited head's z behind the edit."""
    lofit, cosines = random_adapter(llama, HeadSet(["L2H1"])), []
    for text in TEXTS:
        seen = []
        hook = lambda module, args, seen=seen: seen.append(args[0][0].unflatten(-1, (4, 8))[:, 1])
        handle = output_projection(hf("llama"), 2).register_forward_pre_hook(hook)
        with torch.no_grad():
            hf("llama")(torch.tensor([ids_of(text)]))
        handle.remove()
        z = seen[0]
        new = z * (1 + lofit.A[2, 1]) + lofit.v[2, 1]
        cosines.append(torch.cosine_similarity(z, new, dim=1).mean().item())
    assert drift(llama, lofit, TEXTS, progress=False).heads["cosine"][0] == pytest.approx(np.mean(cosines), rel=1e-4)


def test_several_adapters_act_in_order_and_any_method_has_a_drift(llama):
    """Two opposite offsets cancel; RepE moves the stream behind its layer and no head before it."""
    lofit = random_adapter(llama, HeadSet(["L0H1"]), A=0.0)
    found = drift(llama, [lofit, -1.0 * lofit], TEXTS[:1], progress=False)
    assert found.layers["change"].max() < 1e-5
    assert found.adapters == ("LoFiT", "LoFiT")
    assert math.isnan(found.layers["change_low"][0]), "one text has no spread"
    repe = RepE(torch.eye(1, 32), (1,), n_layers=3, coefficient=2.0, scale=torch.ones(1))
    moved = drift(llama, repe, TEXTS, progress=False).layers.set_index(["where", "layer"])["change"]
    assert moved["resid", 0] == 0
    assert moved["z", 1] == 0
    assert moved["resid", 1] > 0
    assert moved["z", 2] > 0


def test_a_task_gives_its_prompts(bridge_llama):
    """Prompts of a split, the first ones."""
    found = drift(
        bridge_llama, random_adapter(bridge_llama), planted_truth.task(), split="val", limit=2, progress=False
    )
    assert found.n_texts == 2
    json.dumps(found.to_dict(), allow_nan=False)


def test_too_long_texts_lose_their_end(bridge_llama):
    """They are counted; the model sees no more than its context."""
    found = drift(bridge_llama, random_adapter(bridge_llama), ["x " * 3000], progress=False)
    assert (found.cut, found.n_tokens) == (1, 2048)


def test_compare_by_hand():
    """(3, 4) and (4, 3): cosine 24/25, change sqrt(2)/5, ratio 1; opposite, doubled, and zero vectors."""
    base = torch.tensor([[3, 4], [1, 0], [2, 0], [0, 0]], dtype=torch.float64)
    edited = torch.tensor([[4, 3], [-1, 0], [4, 0], [0, 0]], dtype=torch.float64)
    expected = [[0.96, -1, 1, 1], [2**0.5 / 5, 2, 1, 0], [1, 1, 2, 1]]
    torch.testing.assert_close(compare(base, edited), torch.tensor(expected, dtype=torch.float64))


def test_running_moments_are_those_of_all_numbers():
    """Mean and t interval as scipy's, missing numbers left out."""
    from scipy import stats

    values = np.random.default_rng(0).normal(5, 2, (9, 2))
    values[4:, 1] = np.nan
    sums = Running((2,))
    for row in values:
        sums.add(row)
    for i, kept in enumerate((values[:, 0], values[:4, 1])):
        expected = stats.ttest_1samp(kept, 0).confidence_interval(0.95)
        low, high = sums.interval()
        assert sums.mean[i] == pytest.approx(kept.mean())
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high))


def test_nothing_stays_behind_and_bad_requests_are_refused(llama):
    """The model is as it was; no adapter, no text, a text without tokens, numbers below 1."""
    lofit = random_adapter(llama)
    drift(llama, lofit, TEXTS[:1], progress=False)
    before = []
    with torch.no_grad(), hooked(hook_z(llama, 2), lambda z, hook: before.append(z)):
        llama(torch.tensor([ids_of(TEXTS[0])]))
    assert not any(len(p.fwd_hooks) for p in llama.hook_dict.values())
    with pytest.raises(InputError, match="no adapter"):
        drift(llama, [], TEXTS)
    with pytest.raises(InputError, match="no text"):
        drift(llama, lofit, [], progress=False)
    with pytest.raises(InputError, match="limit is 0"):
        drift(llama, lofit, TEXTS, limit=0)
    with pytest.raises(InputError, match="ends is 0"):
        drift(llama, lofit, TEXTS, ends=0)
    kept = rules_of(llama.tokenizer)
    keep_rules(llama.tokenizer, replace(kept, front=()))
    try:
        with pytest.raises(DataError, match="text 1 has no token"):
            drift(llama, lofit, ["x", ""], progress=False)
    finally:
        keep_rules(llama.tokenizer, kept)
