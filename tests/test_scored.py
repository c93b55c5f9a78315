"""models/scored.py: logits of chosen places are rows of the full logits, and the unembedding sees no more than these."""

import pytest
import torch
import transformers as tf

from lofit_lens.errors import InputError
from lofit_lens.interventions.steering import at_other_positions
from lofit_lens.models import Borders, fused_attention, hooked, load_model, logits_at, logits_of, read_at, scored
from tests import tiny
from tests.conftest import BACKENDS, PAIRS
from tests.steps import adapter, close, kept_bytes, loaded_from, padded, run


def chosen(mask):
    """Some of the real places of each row, other ones in each."""
    return mask.bool() & ((torch.arange(mask.shape[1]) + torch.arange(len(mask))[:, None]) % 3 == 1)


@pytest.fixture
def widths(monkeypatch):
    """How many places each call of a bound model's unembedding was given."""

    def watch(model):
        given, unembed = [], model.unembed
        own = unembed.forward
        monkeypatch.setitem(
            unembed.__dict__, "forward", lambda x, *a, **k: (given.append(tuple(x.shape)), own(x, *a, **k))[1]
        )
        return given

    return watch


@pytest.fixture(autouse=True)
def _forgotten():
    scored._is_proven.known.clear()
    scored._more_behind.clear()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_rows_and_gradients_are_those_of_the_full_logits(loaded, widths, architecture, on, side):
    """To 1e-6 of the largest number; the unembedding is handed `[1, n, d_model]`."""
    model = loaded(architecture, on)
    tokens, mask = padded(side)
    at = chosen(mask)
    wanted = run(model, tokens, mask, logits=lambda *of: logits_of(*of)[at])
    logits_at(model, tokens, mask, at)
    given = widths(model)
    found = run(model, tokens, mask, logits=lambda *of: logits_at(*of, at))
    assert given == [(1, int(at.sum()), 32)]
    assert found[0].shape == (int(at.sum()), 400)
    assert close(found, wanted, 1e-6)


def capped(on, checkpoint, tmp_path, monkeypatch):
    """A model with a cap of 0.5 behind its unembedding."""
    if on == "bridge":
        config = tf.Gemma2Config(**tiny.WIDE, num_key_value_heads=2, head_dim=12, final_logit_softcapping=0.5)
        return loaded_from(config, tmp_path, monkeypatch, on)
    model = load_model(checkpoint("llama"), backend=on, device="cpu")
    model.cfg.output_logits_soft_cap = 0.5
    return model


def top(logits, part):
    """The highest logit of each place."""
    return logits.max(dim=-1).values


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_numbers_read_in_parts_are_those_of_all_logits(loaded, monkeypatch, architecture, on, side):
    """Log-probs, and gradients of a loss that weighs each otherwise, to 5e-6 of the largest; never more than two rows at once."""
    model, (tokens, mask) = loaded(architecture, on), padded(side)
    monkeypatch.setattr(scored, "ROWS", 2)
    at = chosen(mask)
    n, wanted, parts = int(at.sum()), tokens.roll(-1, 1)[at], []

    def read(logits, part):
        parts.append(len(logits))
        return logits.log_softmax(-1).gather(1, wanted[part][:, None])[:, 0]

    whole = run(model, tokens, mask, fused_attention, logits=lambda *of: read(logits_at(*of, at), slice(None)))
    found = run(model, tokens, mask, fused_attention, logits=lambda *of: read_at(*of, at, read))
    assert parts == [n, *[2] * (n // 2), *[1] * (n % 2)]
    assert close(found, whole, 5e-6)


@pytest.mark.parametrize("on", BACKENDS)
def test_reading_no_place_and_without_gradients(loaded, on):
    """Nothing to read gives nothing; without gradients nothing is kept for them."""
    model, (tokens, mask) = loaded("llama", on), padded("right")
    assert read_at(model, tokens, mask, torch.zeros_like(mask, dtype=torch.bool), top).shape == (0,)
    at = chosen(mask)
    with torch.no_grad():
        found = read_at(model, tokens, mask, at, top)
    assert torch.equal(found, top(logits_at(model, tokens, mask, at), None))
    assert not found.requires_grad


@pytest.mark.parametrize("on", BACKENDS)
def test_a_cap_or_a_hook_behind_the_unembedding_is_read(loaded, tmp_path, monkeypatch, checkpoint, on):
    """Then the numbers come from the model's own logits."""
    model, (tokens, mask) = capped(on, checkpoint, tmp_path, monkeypatch), padded("right")
    at = chosen(mask)
    found = read_at(model, tokens, mask, at, top)
    assert torch.equal(found, top(logits_at(model, tokens, mask, at), None))
    assert found.max() < 0.5
    plain = loaded("llama", on)
    for module in (plain.unembed, plain):
        for change in (lambda module, args, out: out * 0 + 7, lambda module, args, out: out.mul_(0).add_(7)):
            handle = module.register_forward_hook(change)
            try:
                with torch.no_grad():
                    assert bool((read_at(plain, tokens, mask, at, top) == 7).all())
            finally:
                handle.remove()


def test_an_unembedding_that_is_trained_gets_its_gradient(fresh):
    """Its weights are not passed over."""
    tokens, mask = padded("right")
    weight = next(fresh.unembed.parameters()).requires_grad_()
    read_at(fresh, tokens, mask, chosen(mask), top).sum().backward()
    found, weight.grad = weight.grad, None
    top(logits_at(fresh, tokens, mask, chosen(mask)), None).sum().backward()
    assert torch.equal(found, weight.grad)


@pytest.mark.parametrize("on", BACKENDS)
def test_soft_capped_logits(tmp_path, monkeypatch, checkpoint, widths, on):
    """A cap behind the unembedding works on single numbers, so that rows may be chosen in front of it."""
    model, (tokens, mask) = capped(on, checkpoint, tmp_path, monkeypatch), padded("right")
    at = chosen(mask)
    wanted = logits_of(model, tokens, mask)[at]
    logits_at(model, tokens, mask, at)
    given = widths(model)
    assert torch.allclose(logits_at(model, tokens, mask, at), wanted, atol=1e-6)
    assert wanted.abs().max() < 0.5
    assert given == [(1, int(at.sum()), 32)]


def test_no_place_at_all(llama):
    """No rows, still of the vocabulary's width; nothing to learn from, but nothing breaks."""
    tokens, mask = padded("none")
    none = torch.zeros_like(mask, dtype=torch.bool)
    assert logits_at(llama, tokens, mask, none).shape == (0, 400)


def test_places_of_another_shape(llama, unchecked):
    """InputError names both shapes."""
    tokens, mask = padded("none")
    with pytest.raises(InputError, match=r"\[3, 11\].*\[3, 12\]"):
        logits_at(llama, tokens, mask, mask.bool()[:, 1:])


@pytest.mark.parametrize("point", ["hook_in", "hook_out"])
def test_a_hook_on_the_unembedding_sees_everything(llama, point):
    """All places, and what it writes is in the rows that come back."""
    tokens, mask = padded("right")
    at, seen = chosen(mask), []

    def double(x, hook):
        seen.append(x.shape[:2])
        return 2 * x

    plain = logits_of(llama, tokens, mask)[at]
    with hooked(getattr(llama.unembed, point), double):
        assert torch.allclose(logits_at(llama, tokens, mask, at), 2 * plain, atol=1e-5)
    assert seen == [(3, 12)]


def test_a_torch_hook_on_the_unembedding_counts_as_well(llama):
    """As of somebody who knows torch only."""
    tokens, mask = padded("none")
    seen = []
    handle = llama.unembed.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
    try:
        logits_at(llama, tokens, mask, chosen(mask))
    finally:
        handle.remove()
    assert seen == [(3, 12)]


def test_a_model_that_mixes_logits_of_several_places(checkpoint, backend):
    """Seen by the probe: all logits are computed, and their rows taken."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    own = model.forward

    def centered(*args, **named):
        logits = own(*args, **named)
        return logits - logits.mean(dim=1, keepdim=True)

    model.forward = centered
    tokens, mask = padded("none")
    at = chosen(mask)
    assert torch.equal(logits_at(model, tokens, mask, at), logits_of(model, tokens, mask)[at])


def test_an_error_leaves_no_selection_behind(llama):
    """A hook that raises in the middle of a pass: the next full pass has all its logits."""
    tokens, mask = padded("none")

    def fail(x, hook):
        raise ValueError("in a hook")

    logits_at(llama, tokens, mask, chosen(mask))
    with pytest.raises(ValueError, match="in a hook"), hooked(llama.hook_dict["blocks.1.hook_resid_post"], fail):
        logits_at(llama, tokens, mask, chosen(mask))
    assert logits_of(llama, tokens, mask).shape == (3, 12, 400)


@torch.no_grad()
def test_edits_know_the_borders(llama):
    """An edit on answers alone acts as in a full pass."""
    tokens, mask = padded("left")
    borders = Borders(torch.tensor([5, 3, 2]), mask.sum(dim=1))
    with at_other_positions(adapter(llama).requires_grad_(False), "answer").attached(llama):
        wanted = logits_of(llama, tokens, mask, borders)[mask.bool()]
        assert torch.allclose(logits_at(llama, tokens, mask, mask.bool(), borders), wanted, atol=1e-6)
        everywhere = logits_at(llama, tokens, mask, mask.bool())
    assert not torch.allclose(everywhere, wanted, atol=1e-3)


def test_less_is_kept_for_backward(llama):
    """Of 2 x 20 places a loss reads four: 36 x 400 float32 log-probs fewer, but for the places' numbers (four of 8 bytes)."""
    tokens = torch.arange(40).reshape(2, 20) + 3
    ones, at = torch.ones_like(tokens), torch.zeros(2, 20, dtype=torch.bool)
    at[:, :2] = True
    lofit = adapter(llama)
    with lofit.attached(llama):
        logits_at(llama, tokens, ones, at)
        whole = kept_bytes(llama, lambda: logits_of(llama, tokens, ones).float().log_softmax(-1))
        some = kept_bytes(llama, lambda: logits_at(llama, tokens, ones, at).float().log_softmax(-1))
    assert some <= whole - 36 * 400 * 4 + 4 * 8
