"""models/fused.py and models/attending.py: the fused way gives what the class's own way gives, and nobody's hook goes blind."""

import pytest
import torch
import transformers as tf
from torch import nn

from lofit_lens.models import (
    extend,
    fused_attention,
    fused_refusal,
    hook_z,
    hooked,
    load_model,
    logits_of,
    pattern_point,
    prefill,
    projection,
    projection_replaced,
    step,
)
from tests import tiny
from tests.conftest import BACKENDS, PAIRS, needs_hooked
from tests.steps import TOKENS, adapter, close, kept_bytes, loaded_from, padded, run, snapshot

# ----------------------------------------------------------------------------------------------------- equal


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_logits_and_gradients_equal_the_classes_own(loaded, kernels, architecture, on, side):
    """Within 1e-5 of the largest number, with every head's z edited and the kernel run once a layer."""
    model = loaded(architecture, on)
    assert fused_refusal(model) is None
    tokens, mask = padded(side)
    wanted = run(model, tokens, mask)
    kernels.clear()
    found = run(model, tokens, mask, fused_attention)
    assert len(kernels) == 3
    assert close(found, wanted, 1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_finite(llama, side):
    """Queries that may look at nothing give numbers, and gradients through them are numbers."""
    tokens, mask = padded(side)
    lofit = adapter(llama)
    with fused_attention(llama), lofit.attached(llama):
        logits = logits_of(llama, tokens, mask)
        logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert torch.isfinite(lofit.A.grad).all()
    assert torch.isfinite(lofit.v.grad).all()


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
@torch.no_grad()
def test_cached_passes_equal_the_full_pass(loaded, hf, kernels, architecture, on):
    """prefill, extend by ragged answers and step run the kernel and give the logits of one full pass of Hugging Face."""
    model, plain = loaded(architecture, on), hf(architecture)
    tokens, mask = padded("left")
    more = torch.randint(3, 400, (3, 3), generator=torch.Generator().manual_seed(3))
    given = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    last = torch.tensor([5, 6, 7])
    assert fused_refusal(model) is None
    kernels.clear()
    with fused_attention(model):
        state = prefill(model, tokens, mask)[1]
        behind, state = extend(model, state.select(torch.arange(3)), more, given)
        stepped = step(model, state, last)[0]
    assert len(kernels) == 9
    for row, n in enumerate(given.sum(dim=1).tolist()):
        whole = torch.cat([tokens[row][mask[row].bool()], more[row, :n], last[row : row + 1]])[None]
        wanted = plain(whole).logits[0]
        assert torch.allclose(behind[row, :n], wanted[-n - 1 : -1], atol=1e-5)
        assert torch.allclose(stepped[row], wanted[-1], atol=1e-5)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("on", BACKENDS)
def test_a_window_is_kept(tmp_path, monkeypatch, kernels, on, side):
    """Mistral that looks back over four tokens, in rows of up to twelve."""
    config = tf.MistralConfig(**tiny.WIDE, num_key_value_heads=2, head_dim=12, sliding_window=4)
    model = loaded_from(config, tmp_path, monkeypatch, on)
    tokens, mask = padded(side)
    wanted = run(model, tokens, mask)
    kernels.clear()
    found = run(model, tokens, mask, fused_attention)
    assert len(kernels) > 3  # the proof's, then these
    assert close(found, wanted, 1e-5)


def test_scores_divided_by_the_layers_number(tmp_path, monkeypatch, kernels):
    """GPT-2 with `scale_attn_by_inverse_layer_idx`, whose attention is rebuilt on the bridge."""
    config = tf.GPT2Config(
        vocab_size=400,
        n_layer=3,
        n_head=4,
        n_embd=32,
        bos_token_id=1,
        eos_token_id=2,
        scale_attn_by_inverse_layer_idx=True,
    )
    model = loaded_from(config, tmp_path, monkeypatch, "bridge")
    tokens, mask = padded("left")
    assert fused_refusal(model) is None
    assert close(run(model, tokens, mask, fused_attention), run(model, tokens, mask), 1e-5)
    assert kernels


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "pythia"])
def test_exchanged_projections_are_run(loaded, architecture):
    """A module put in the place of q (LoRA's way) acts on the fused way too, also where Hugging Face has one q-k-v matrix."""
    model = loaded(architecture, "bridge")
    tokens, mask = padded("right")

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    plain = run(model, tokens, mask)
    with projection_replaced(model, (1, "q"), Twice(projection(model, (1, "q")))):
        wanted = run(model, tokens, mask)
        found = run(model, tokens, mask, fused_attention)
    assert close(found, wanted, 1e-5)
    assert not close(found, plain, 1e-3)


# ------------------------------------------------------------------------------------------- hooks elsewhere


@pytest.mark.parametrize("architecture", ["llama-gqa", "pythia"])
@pytest.mark.parametrize("name", ["hook_pattern", "hook_attn_scores", "hook_q", "hook_v", "hook_rot_k"])
@torch.no_grad()
def test_hooks_on_other_points_see_what_they_ever_saw(loaded, backend, kernels, architecture, name):
    """The class's own way is taken, bit for bit, and the hook sees the same; without it the kernel runs again."""
    model, point = loaded(architecture, backend), f"blocks.1.attn.{name}"
    tokens, mask = padded("left")
    seen = []
    assert fused_refusal(model) is None
    with hooked(model.hook_dict[point], lambda x, hook: seen.append(x.detach().clone())):
        wanted = logits_of(model, tokens, mask)
        ever = list(seen)  # of Pythia's hook_rot_k nothing, on the bridge
        kernels.clear()
        with fused_attention(model):
            found = logits_of(model, tokens, mask)
        own = len(kernels)
    with fused_attention(model):
        logits_of(model, tokens, mask)
    assert own == 0
    assert len(kernels) == 3
    assert torch.equal(found, wanted)
    assert len(seen) == 2 * len(ever)
    assert all(torch.equal(*pair) for pair in zip(ever, seen[len(ever) :], strict=True))


def test_a_backward_hook_counts_as_well(llama, kernels):
    """Gradients of the pattern reach whoever asked for them."""
    tokens, mask = padded("right")
    point, seen = pattern_point(llama, 1), []
    fused_refusal(llama)
    kernels.clear()
    point.add_hook(lambda grad, hook: seen.append(grad.shape), dir="bwd", is_permanent=True)
    try:
        run(llama, tokens, mask, fused_attention)
    finally:
        point.remove_hooks("bwd", including_permanent=True)
    assert [tuple(s) for s in seen] == [(3, 4, 12, 12)]
    assert kernels == []


@torch.no_grad()
def test_a_flag_switches_to_the_own_way(fresh, kernels):
    """use_attn_result inside the block: hook_result fires. On before the first use: refused for now, not for good."""
    fresh.set_use_attn_result(True)
    assert "use_attn_result" in fused_refusal(fresh)
    fresh.set_use_attn_result(False)
    assert fused_refusal(fresh) is None
    seen, point = [], fresh.hook_dict["blocks.0.attn.hook_result"]
    with fused_attention(fresh):
        fresh.set_use_attn_result(True)
        kernels.clear()
        with hooked(point, lambda x, hook: seen.append(tuple(x.shape))):
            logits_of(fresh, *padded("none"))
        logits_of(fresh, *padded("none"))
        fresh.set_use_attn_result(False)
        assert kernels == []
        logits_of(fresh, *padded("none"))
    assert seen == [(3, 12, 4, 32)]
    assert len(kernels) == 3


@torch.no_grad()
def test_training_mode_takes_the_own_way(llama, kernels):
    """Dropout belongs to the class."""
    fused_refusal(llama)
    kernels.clear()
    llama.train()
    try:
        with fused_attention(llama):
            logits_of(llama, *padded("none"))
    finally:
        llama.eval()
    assert kernels == []


@needs_hooked
@torch.no_grad()
def test_norm_hooks_see_the_three_calls_of_the_class(loaded, kernels):
    """HookedTransformer norms the input of q, k and v each; a hook there sees it, while attention stays fused."""
    model = loaded("llama", "hooked")
    fused_refusal(model)
    kernels.clear()
    for times in (3, 3):
        seen = []
        with fused_attention(model), hooked(model.blocks[0].ln1.hook_scale, lambda x, hook, s=seen: s.append(1)):
            logits_of(model, *padded("none"))
        assert len(seen) == times
    assert len(kernels) == 6


@torch.no_grad()
def test_run_with_cache_of_z(llama, kernels):
    """TransformerLens' own reading of z alone runs fused and gives the class's own z."""
    name = "blocks.1.attn.hook_z"
    wanted = llama.run_with_cache(TOKENS, names_filter=lambda n: n.endswith(("attn.hook_z", "attn.o.hook_in")))[1]
    fused_refusal(llama)
    kernels.clear()
    with fused_attention(llama):
        found = llama.run_with_cache(TOKENS, names_filter=lambda n: n.endswith(("attn.hook_z", "attn.o.hook_in")))[1]
    assert len(kernels) == 3
    assert torch.allclose(found[name], wanted[name], atol=1e-5)


# ------------------------------------------------------------------------------------------------ as it was


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2", "opt"])
def test_everything_is_put_back(checkpoint, backend, architecture):
    """After the block, after an error in it, and after nested blocks, of which the inner one changes nothing."""
    model = load_model(checkpoint(architecture), backend=backend, device="cpu")
    logits_of(model, *padded("none"))  # the bridge puts hooks of its own into a first pass
    before = snapshot(model)
    assert fused_refusal(model) is None
    assert snapshot(model) == before
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with fused_attention(model):
        inside = snapshot(model)
        assert inside["attributes"] != before["attributes"]
        with fused_attention(model):
            assert snapshot(model) == inside
        assert snapshot(model) == inside
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="stop"), fused_attention(model):
        raise RuntimeError("stop")
    assert snapshot(model) == before
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


@torch.no_grad()
def test_an_error_in_a_pass_leaves_the_block_as_it_was(llama, kernels):
    """A hook that raises: the next pass runs fused as before."""
    tokens, mask = padded("none")
    fused_refusal(llama)

    def fail(z, hook):
        raise ValueError("in a hook")

    with fused_attention(llama):
        inside = snapshot(llama)
        with pytest.raises(ValueError, match="in a hook"), hooked(hook_z(llama, 1), fail):
            logits_of(llama, tokens, mask)
        assert snapshot(llama) == inside
        kernels.clear()
        logits_of(llama, tokens, mask)
    assert len(kernels) == 3


def test_a_block_in_inference_mode_spoils_no_weight(fresh):
    """Weights that were laid out anew and back there can be trained through afterwards."""
    tokens, mask = padded("right")
    with torch.inference_mode(), fused_attention(fresh):
        logits_of(fresh, tokens, mask)
    assert not any(p.is_inference() for p in fresh.parameters())
    assert torch.isfinite(run(fresh, tokens, mask)[1]).all()


def test_another_dtype_is_proven_anew(fresh, kernels):
    """What held in float32 on one device is asked again in float64."""
    assert fused_refusal(fresh) is None
    before = len(kernels)
    fresh.double()
    fused_refusal(fresh)
    assert len(kernels) > before


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_less_is_kept_for_backward(loaded, architecture, on):
    """Bytes that a pass over 2 x 96 tokens keeps: fewer than on the class's own way, by nearly the patterns.

    Layers 1 and 2 keep one each, 2 rows x 4 heads x 96 x 96 in float32; nothing in front of z is trained in layer 0.
    """
    model = loaded(architecture, on)
    assert fused_refusal(model) is None
    tokens = torch.arange(192).reshape(2, 96) + 3
    lofit = adapter(model)
    with lofit.attached(model):
        own = kept_bytes(model, lambda: logits_of(model, tokens, torch.ones_like(tokens)))
        with fused_attention(model):
            found = kept_bytes(model, lambda: logits_of(model, tokens, torch.ones_like(tokens)))
    assert found <= own - 0.9 * 2 * (2 * 4 * 96 * 96 * 4)
