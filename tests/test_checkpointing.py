"""models/checkpointing.py: blocks are run again in backward, with the same numbers, less memory and nothing left behind."""

import contextlib

import pytest
import torch
from torch import nn

from lofit_lens.interventions.steering import at_other_positions
from lofit_lens.models import (
    Borders,
    checkpointed,
    checkpointing,
    extend,
    fused_attention,
    fused_refusal,
    hook_z,
    hooked,
    logits_at,
    logits_of,
    prefill,
)
from tests.conftest import PAIRS
from tests.steps import TOKENS, adapter, close, kept_bytes, padded, run, snapshot


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_gradients_are_the_plain_ones(loaded, architecture, on, side):
    """To 1e-6 of the largest number, with every head's z edited; every block is run twice."""
    model = loaded(architecture, on)
    tokens, mask = padded(side)
    wanted = run(model, tokens, mask)
    seen = []
    with hooked(hook_z(model, 1), lambda z, hook: seen.append(1)):
        found = run(model, tokens, mask, checkpointed)
    assert close(found, wanted, 1e-6)
    assert len(seen) == 2


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_together_with_fused_attention(loaded, monkeypatch, architecture, on):
    """The kernel runs again in backward, under the same mask."""
    model = loaded(architecture, on)
    assert fused_refusal(model) is None
    calls, inner = [], nn.functional.scaled_dot_product_attention
    tokens, mask = padded("left")
    wanted = run(model, tokens, mask)
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), inner(*a, **k))[1]
    )
    found = run(model, tokens, mask, fused_attention, checkpointed)
    assert close(found, wanted, 1e-5)
    assert len(calls) == 6


def test_together_with_chosen_logits_and_a_watched_pattern(llama):
    """All shortcuts at once, while somebody looks at a pattern: blocks that are run again take the class's own way again."""
    tokens, mask = padded("left")
    at, seen = mask.bool(), []
    wanted = run(llama, tokens, mask)
    with hooked(llama.hook_dict["blocks.1.attn.hook_pattern"], lambda x, hook: seen.append(x.shape)):
        found = run(llama, tokens, mask, fused_attention, checkpointed, logits=lambda *of: logits_at(*of, at))
    assert close(found, wanted, 1e-5)
    assert [tuple(s) for s in seen[-2:]] == [(3, 4, 12, 12)] * 2


def test_two_passes_of_one_shape(llama):
    """Each block that is run again has its own pass's mask, not that of another pass over equally many tokens."""
    tokens, mask = padded("left")
    other = mask.flip(0)
    wanted = [run(llama, tokens, m) for m in (mask, other)]
    with fused_attention(llama), checkpointed(llama):
        found = [run(llama, tokens, m) for m in (mask, other)]
    assert all(close(f, w, 1e-5) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_less_is_kept_for_backward(loaded, architecture, on):
    """Of three layers only what enters them, 2 x 96 x 32 numbers each, and what the norm and unembedding behind them keep."""
    model = loaded(architecture, on)
    tokens = torch.arange(192).reshape(2, 96) + 3
    ones, at = torch.ones_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    at[0, 0] = True
    with adapter(model).attached(model):
        plain = kept_bytes(model, lambda: logits_at(model, tokens, ones, at))
        with checkpointed(model):
            found = kept_bytes(model, lambda: logits_at(model, tokens, ones, at))
    assert found < 0.45 * plain


def test_edits_of_a_part_of_the_positions(llama):
    """A block that is run again knows prompt and answer, though the pass's own layout is gone by then."""
    tokens, mask = padded("left")
    borders = Borders(torch.tensor([5, 3, 2]), mask.sum(dim=1))

    def gradients(around):
        lofit = at_other_positions(adapter(llama), "answer")
        with around, lofit.attached(llama):
            logits_of(llama, tokens, mask, borders)[mask.bool()].square().sum().backward()
        return lofit.A.grad, lofit.v.grad

    assert close(gradients(checkpointed(llama)), gradients(contextlib.nullcontext()), 1e-6)


def test_everything_is_put_back(llama):
    """After the block, an error, and nested blocks, of which the inner one changes nothing; the model's mode never changes."""
    logits_of(llama, *padded("none"))
    before = snapshot(llama)
    with checkpointed(llama):
        inside = snapshot(llama)
        assert inside["hooks"] == before["hooks"]  # training modes among them: no dropout
        with checkpointed(llama):
            assert snapshot(llama) == inside
        assert snapshot(llama) == inside
    with pytest.raises(RuntimeError, match="stop"), checkpointed(llama):
        raise RuntimeError("stop")
    assert snapshot(llama) == before


@torch.no_grad()
def test_nothing_is_run_twice_without_gradients(llama, monkeypatch):
    """Scoring inside the block costs what it ever costs."""

    def never(*args, **named):
        raise AssertionError("checkpointed without need")

    monkeypatch.setattr(checkpointing, "checkpoint", never)
    with checkpointed(llama):
        assert logits_of(llama, *padded("none")).shape == (3, 12, 400)


def test_passes_with_a_cache_are_left_alone(llama):
    """Keys are added to a cache once: gradients through prefill and extend are those without checkpointing."""
    tokens, mask = padded("left")

    def gradients(around):
        lofit = adapter(llama)
        with around, lofit.attached(llama):
            state = prefill(llama, tokens, mask)[1]
            extend(llama, state.select(torch.arange(3)), TOKENS[:, :4])[0].square().sum().backward()
        return lofit.A.grad, lofit.v.grad

    assert close(gradients(checkpointed(llama)), gradients(contextlib.nullcontext()), 1e-6)
