"""Logits at chosen places only: the unembedding is a large part of a pass, and a loss reads few of its rows.

    logits = softcap(norm(residual)[at] W_U + b_U)

The rows are chosen in front of the unembedding, in a pass that is otherwise the whole one.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lofit_lens.errors import InputError
from lofit_lens.models.hooks import frozen, has_hooks, unhooked
from lofit_lens.models.info import device_of
from lofit_lens.models.positions import Borders, Layout, laid_out
from lofit_lens.models.proofs import is_proven, keep_proof
from lofit_lens.models.running import logits_of, uncached

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the logits' standard deviation; half precision: ROUGH
ROUGH = 0.1

_proven: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def logits_at(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    at: Bool[Tensor, "batch pos"],
    borders: Borders | None = None,
) -> Float[Tensor, "n d_vocab"]:
    """`logits_of(model, tokens, mask, borders)[at]`, with the unembedding applied at these places alone.

    All logits are computed, and rows taken from them, where a model does more with them than one row at a time (seen by one
    probe, remembered), or while somebody has a hook on the unembedding.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: ids.
        mask: 1 = token, 0 = padding on either side.
        at: the places, taken row by row; if none, no row comes back.
        borders: where prompts end, for edits that act on certain positions only.

    Raises:
        InputError: `at` has another shape than the tokens.
    """
    if at.shape != tokens.shape:
        raise InputError(
            f"at has shape {list(at.shape)} and the tokens have {list(tokens.shape)}; give True or False for each token"
        )
    if _is_watched(model) or not _is_proven(model):
        return logits_of(model, tokens, mask, borders)[at.to(tokens.device)]
    with laid_out(model, Layout.of(tokens, mask, tokens.shape[1], borders)):
        return _selected(model, tokens, mask, at).to(tokens.device)


def _is_watched(model: Any) -> bool:
    unembed = getattr(model, "unembed", None)
    return not isinstance(unembed, nn.Module) or any(has_hooks(m) for m in unembed.modules())


def _selected(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], at: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "n d_vocab"]:
    places = at.flatten().nonzero()[:, 0]  # once, here: asking for their number waits for the device
    with _cut(model.unembed, places):
        return model(tokens, attention_mask=mask, **uncached(model))[0]


@contextlib.contextmanager
def _cut(unembed: nn.Module, places: Int[Tensor, " n"]) -> Iterator[None]:
    """Hand only these places, counted row by row, to the unembedding: `[1, n, d_model]`."""

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, places.to(args[0].device))[None], *args[1:])

    handle = unembed.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _is_proven(model: Any) -> bool:
    """Whether chosen rows are rows of the full logits; tried once a model on a few tokens, with everybody's hooks off."""
    if model not in _proven and is_proven(model, "logits at chosen places"):
        _proven[model] = True
    if model not in _proven:
        device = device_of(model)
        tokens = torch.arange(10, device=device).reshape(2, 5) % int(model.cfg.d_vocab)
        mask, at = torch.ones_like(tokens), tokens % 3 == 1
        with frozen(model), unhooked(model):
            whole = model(tokens, attention_mask=mask, **uncached(model))
            wanted = whole[at.to(whole.device)].float()
            try:
                found = _selected(model, tokens, mask, at).float()
            except (RuntimeError, TypeError, ValueError, IndexError):  # another shape is not what it works with
                found = wanted[:0]
        limit = TOLERANCE.get(whole.dtype, ROUGH) * whole.float().std()
        _proven[model] = found.shape == wanted.shape and bool((found - wanted).abs().max() <= limit)
        if _proven[model]:
            keep_proof(model, "logits at chosen places")
    return _proven[model]
