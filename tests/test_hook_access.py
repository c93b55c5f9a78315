"""What models.py promises beside loading: padding and keys/values, heads that can be reached, a model left as it was."""

import contextlib
import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lofit_lens import generate, models
from lofit_lens.errors import ModelError
from lofit_lens.evaluation.scoring import score_continuations
from lofit_lens.models import (
    bridge_class,
    check_cache,
    extend,
    frozen,
    head_size,
    hook_z,
    hooked,
    hooked_class,
    is_processed,
    load_model,
    logits_of,
    prefill,
    running,
    step,
    value_biases_folded,
)
from tests.conftest import ALL_PAIRS, ARCHITECTURES, BACKENDS, PAIRS, needs_hooked
from tests.tiny import configs

GENERATOR = torch.Generator().manual_seed(2)
LONG, SHORT = (torch.randint(3, 400, (1, n), generator=GENERATOR) for n in (9, 6))
MORE = torch.randint(3, 400, (3, 4), generator=GENERATOR)


def padded(side):
    """The long and the short row in one batch, padding filled with ordinary tokens so that a lost mask shows."""
    tokens, mask = torch.full((2, 9), 77), torch.zeros((2, 9), dtype=torch.long)
    tokens[0], mask[0] = LONG[0], 1
    at = slice(3, 9) if side == "left" else slice(0, 6)
    tokens[1, at], mask[1, at] = SHORT[0], 1
    return tokens, mask


# ------------------------------------------------------------------------------------ padding, keys and values


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
@torch.no_grad()
def test_padding_does_not_change_logits(loaded, hf, architecture, on, side):
    """Each row of a padded batch has the logits it has alone in plain Hugging Face."""
    tokens, mask = padded(side)
    logits = logits_of(loaded(architecture, on), tokens, mask)
    for row, alone in enumerate((LONG, SHORT)):
        assert torch.allclose(logits[row][mask[row].bool()], hf(architecture)(alone).logits[0], atol=1e-5)


@pytest.mark.parametrize(("architecture", "on"), ALL_PAIRS)
@torch.no_grad()
def test_cached_passes_equal_the_full_pass(loaded, hf, architecture, on):
    """prefill, select, extend (ragged) and step give, at every real token, the logits of one full pass."""
    model, plain = loaded(architecture, on), hf(architecture)
    logits, state = prefill(model, *padded("left"))
    assert torch.allclose(logits[1, 3:], plain(SHORT).logits[0], atol=1e-5)
    rows = torch.tensor([1, 0, 1])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    after, grown = extend(model, state.select(rows), MORE, mask)
    fronts = [SHORT, LONG, SHORT]
    for row, n in enumerate(mask.sum(1).tolist()):
        whole = plain(torch.cat([fronts[row], MORE[row : row + 1, :n]], dim=1)).logits[0]
        assert torch.allclose(after[row, :n], whole[-n:], atol=1e-5)
    last, _ = step(model, grown, torch.tensor([5, 6, 7]))
    for row, n in enumerate(mask.sum(1).tolist()):  # padding behind the earlier tokens stays hidden
        new = torch.tensor([[5 + row]])
        whole = plain(torch.cat([fronts[row], MORE[row : row + 1, :n], new], dim=1)).logits[0]
        assert torch.allclose(last[row], whole[-1], atol=1e-5)


@torch.no_grad()
def test_a_state_survives_what_is_done_with_a_selection(llama):
    """select copies: a state can be extended again and again from the same point, and select repeats and reorders."""
    _, state = prefill(llama, *padded("left"))
    first, _ = extend(llama, state.select(torch.tensor([0, 1])), MORE[:2])
    again, _ = extend(llama, state.select(torch.tensor([1, 0])), MORE[[1, 0]])
    assert torch.equal(first, again[[1, 0]])
    assert state.mask.shape == (2, 9)


# -------------------------------------------------------------------------------------- heads that can be reached


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_d_head_is_read_from_z(loaded, architecture, on):
    """d_head is the checkpoint's own, also where it is not d_model / n_heads."""
    config = configs()[architecture]
    expected = getattr(config, "head_dim", None) or 8  # those without the field have hidden 32 / 4 heads
    assert head_size(loaded(architecture, on)) == expected
    assert set(ARCHITECTURES) >= {"gemma", "qwen3"}  # 16 and 12: not 32 / 4


def test_mamba_is_refused(checkpoint):
    """A model without attention heads: ModelError that says so, not a crash."""
    with pytest.raises(ModelError, match=r"no layer of tiny-\d+ has heads|cannot load"):
        head_size(load_model(checkpoint("mamba"), backend="bridge", device="cpu"))


class _Fake(nn.Module):
    """Two layers whose hook_z fires as often, and with as many heads and numbers, as it is told."""

    def __init__(self, times=(1, 1), heads=(4, 4), sizes=(8, 8), missing=()):
        super().__init__()
        from transformer_lens.hook_points import HookPoint

        self.cfg = SimpleNamespace(n_layers=2, n_heads=4, d_model=32, d_vocab=9, model_name="fake")
        self.weight = nn.Parameter(torch.zeros(1))
        self.points = nn.ModuleList(HookPoint() for _ in range(2))
        self.hook_dict = {f"blocks.{i}.attn.hook_z": p for i, p in enumerate(self.points) if i not in missing}
        self.plan = list(zip(times, heads, sizes, strict=True))

    def forward(self, tokens, attention_mask):
        for point, (times, heads, size) in zip(self.points, self.plan, strict=True):
            for _ in range(times):
                point(torch.zeros(*tokens.shape, heads, size))


@pytest.mark.parametrize(
    ("kind", "message"),
    [({"times": (1, 2)}, "layer 1 fired 2 times"), ({"times": (0, 1)}, "layer 0 fired 0 times"),
     ({"heads": (4, 2)}, r"layer 1 has shape \(1, 2, 2, 8\); expected \[batch, pos, 4 heads"),
     ({"missing": (1,)}, "layer 1 of fake has no blocks.1.attn.hook_z"), ({"sizes": (8, 16)}, r"d_head \(\[8, 16\]\)")],
)  # fmt: skip
def test_heads_that_cannot_be_reached_are_refused(monkeypatch, kind, message):
    """A wanted layer fires never or twice, is split wrongly, has no hook, or differs in d_head: each is named."""
    for module in (models.hooks, models.info):
        monkeypatch.setattr(module, "backend_of", lambda model: "bridge")
    assert head_size(_Fake()) == 8
    fake = _Fake(**kind)
    with pytest.raises(ModelError, match=message):
        head_size(fake, range(2))
    if "missing" in kind:
        assert head_size(fake) == 8  # by default only layers that have heads
    good = [i for i in range(2) if f"layer {i}" in message] or [1]
    assert head_size(fake, [1 - good[0]]) == 8  # layers that are not wanted do not matter


def test_hook_z_of_a_layer_outside_is_refused(llama):
    """The error names layer and model."""
    with pytest.raises(ModelError, match="layer 3 of"):
        hook_z(llama, 3)


@torch.no_grad()
def test_a_held_hook_is_removed_alone(llama):
    """`hooked` fires in its place in the order, survives reset_hooks(), and takes away itself only."""
    point, seen = hook_z(llama, 1), []
    mine = lambda z, hook: seen.append("mine")
    point.add_hook(mine, is_permanent=True)
    try:
        with (
            hooked(point, lambda z, hook: seen.append("behind")),
            hooked(point, lambda z, hook: seen.append("in front"), prepend=True),
        ):
            llama.reset_hooks()
            logits_of(llama, LONG, torch.ones_like(LONG))
        assert seen == ["in front", "mine", "behind"]
        with pytest.raises(RuntimeError, match="inside"), hooked(point, lambda z, hook: None):
            raise RuntimeError("inside")
        logits_of(llama, LONG, torch.ones_like(LONG))
        assert seen[3:] == ["mine"]
        assert len(point.fwd_hooks) == len(point._forward_hooks) == 1
    finally:
        llama.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_puts_everything_back(checkpoint, backend, fails):
    """Inside: eval mode, no gradients. Afterwards, also after an error, every module and weight is as it was."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    parameters, modules = list(model.parameters()), list(model.modules())
    for i, p in enumerate(parameters):
        p.requires_grad_(i % 2 == 0)
    for i, m in enumerate(modules):
        m.training = i % 3 == 0
    try:
        with frozen(model):
            assert not any(p.requires_grad for p in parameters)
            assert not any(m.training for m in modules)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [p.requires_grad for p in parameters] == [i % 2 == 0 for i in range(len(parameters))]
    assert [m.training for m in modules] == [i % 3 == 0 for i in range(len(modules))]


# --------------------------------------------------------------------------------------------- processed weights


def processed_gpt2(loaded, *, fold_ln):
    """A HookedTransformer with value biases folded into b_O, as from_pretrained makes it."""
    like = loaded("gpt2", "hooked")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hooked_class()(copy.deepcopy(like.cfg), like.tokenizer, move_to_device=False)
    weights = {k: w.clone() for k, w in like.state_dict().items()}
    model.load_and_process_state_dict(
        weights, fold_ln=fold_ln, center_writing_weights=fold_ln, center_unembed=fold_ln, fold_value_biases=True
    )
    return model


@needs_hooked
@pytest.mark.parametrize("fold_ln", [True, False])
def test_folded_value_biases_are_detected(loaded, fold_ln):
    """GPT-2 with processed weights is recognized, with layer norms folded or not; unprocessed it is not."""
    model = processed_gpt2(loaded, fold_ln=fold_ln)
    assert is_processed(model)
    assert value_biases_folded(model)
    assert not is_processed(loaded("gpt2", "hooked"))
    assert not value_biases_folded(loaded("gpt2", "hooked"))


def test_a_bridge_in_compatibility_mode_is_detected(checkpoint):
    """enable_compatibility_mode() folds value biases too."""
    model = bridge_class().boot_transformers(str(checkpoint("gpt2")), device="cpu", dtype=torch.float32)
    assert (is_processed(model), value_biases_folded(model)) == (False, False)
    model.enable_compatibility_mode()
    assert (is_processed(model), value_biases_folded(model)) == (True, True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "opt", "pythia"])
@pytest.mark.parametrize("on", BACKENDS)
def test_unprocessed_models_are_not_suspected(loaded, architecture, on):
    """With biases or without, a model loaded as it is raises no suspicion."""
    assert not is_processed(loaded(architecture, on))
    assert not value_biases_folded(loaded(architecture, on))


@pytest.mark.parametrize("attached", [False, True])
def test_a_cache_that_gives_other_logits_is_not_used(checkpoint, backend, monkeypatch, caplog, attached):
    """As MPT's on one TransformerLens version: found before anything is run, with a hook in place too; answers stay right."""
    prompts = ["Q: who?", "Q: Imagine that the capital of France is Rome. What is"]
    choices = [[" A", " A: Rome"], [" the capital", " who"]]
    right = load_model(checkpoint("llama"), backend=backend, device="cpu")
    answers = generate(right, prompts, max_new_tokens=6)
    scores = score_continuations(right, prompts, choices)
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    cached = running._run

    def wrong(model, state, *args, **kwargs):
        found = cached(model, state, *args, **kwargs)
        return found if state is None or state.cache is None else (found[0] * 2 + 1.0, found[1])

    monkeypatch.setattr(running, "_run", wrong)
    with hooked(hook_z(model, 0), lambda z, hook: z) if attached else contextlib.nullcontext():
        assert generate(model, prompts, max_new_tokens=6) == answers
        found = score_continuations(model, prompts, choices)
    assert found == [pytest.approx(s, abs=1e-4) for s in scores]
    assert caplog.text.count("logits from the KV cache are off by") == 1
    assert "every pass runs all tokens again" in caplog.text
    with pytest.raises(ModelError, match=r"from the KV cache are off by .* and this needs them"):
        check_cache(model)
