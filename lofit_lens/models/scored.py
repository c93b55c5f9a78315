"""Logits at chosen places only: the unembedding is a large part of a pass, and a loss reads few of its rows.

    logits = softcap(norm(residual)[at] W_U + b_U)

The rows are chosen in front of the unembedding, in a pass that is otherwise the whole one. A loss that reads one number a place
(`read_at`) never has all these logits at once: they are made, read and led back in parts.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lofit_lens.errors import InputError
from lofit_lens.models.hooks import frozen, has_hooks, unhooked
from lofit_lens.models.info import computes_exactly, device_of
from lofit_lens.models.positions import Borders, Layout, laid_out
from lofit_lens.models.proofs import proven_once
from lofit_lens.models.running import logits_of, uncached

TOLERANCE, ROUGH = 1e-4, 0.1  # of the logits' standard deviation; ROUGH: half precision, quantized weights
ROWS = 256  # of logits at once: a matrix product wants no more, and little memory is handed out anew in each step

# Models that do more with logits than the unembedding does.
_more_behind: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
Read = Callable[[Tensor, slice], Tensor]  # logits [part, d_vocab] of some of the places, and which: one number for each


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


def read_at(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    at: Bool[Tensor, "batch pos"],
    read: Read,
    borders: Borders | None = None,
) -> Float[Tensor, " n"]:
    """`read(logits_at(model, tokens, mask, at, borders), slice(None))` for a `read` that takes each place by itself.

    With gradients, each part of the logits is led back to the residual stream as it is made (its gradient for a loss that is
    the sum of the numbers), and what comes back from the loss scales that. Where something acts behind the unembedding (a cap,
    a hook of somebody's), or its weights are trained, the numbers are read from all logits at once.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: ids.
        mask: 1 = token, 0 = padding on either side.
        at: the places, taken row by row.
        read: logits of a part of the places, and the part -> a number for each place.
        borders: as in `logits_at`.

    Raises:
        InputError: `at` has another shape than the tokens.
    """
    plain = at.shape == tokens.shape and model not in _more_behind and not _is_watched(model)
    if plain and not any(p.requires_grad for p in model.unembed.parameters()) and _is_proven(model):
        with laid_out(model, Layout.of(tokens, mask, tokens.shape[1], borders)):
            x = _in_front(model, tokens, mask, at)
            if x is not None:
                return _InParts.apply(x, model.unembed, read)
        _more_behind.add(model)
    return read(logits_at(model, tokens, mask, at, borders), slice(None))


class _InParts(torch.autograd.Function):
    """A number from the logits of each place, and what it is led back to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unembed: nn.Module, read: Read) -> Tensor:
        """`x`: `[n, d_model]`, in front of the unembedding."""
        wanted, values, back = x.requires_grad, [], []
        for first in range(0, len(x), ROWS):
            part = slice(first, first + ROWS)
            with torch.set_grad_enabled(wanted):
                rows = x[part].detach().requires_grad_(wanted)
                found = read(unembed(rows[None])[0], part)
            if wanted:
                back += torch.autograd.grad(found, rows, torch.ones_like(found))
            values.append(found.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(back) if back else torch.zeros_like(x))
        return torch.cat(values) if values else x.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        """The sum's gradient, each row as much as its own number counts."""
        (back,) = ctx.saved_tensors
        return back * grad[0][:, None].to(back.device, back.dtype), None, None


def _is_watched(model: Any) -> bool:
    unembed = getattr(model, "unembed", None)
    return not isinstance(unembed, nn.Module) or any(has_hooks(m) for m in unembed.modules())


def _selected(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], at: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "n d_vocab"]:
    places = at.flatten().nonzero()[:, 0]  # once, here: asking for their number waits for the device
    with _cut(model.unembed, places):
        return model(tokens, attention_mask=mask, **uncached(model))[0]


def _in_front(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], at: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "n d_model"] | None:
    """What the unembedding is given at these places, where it alone makes the logits of it; it is run on one place."""
    places = at.flatten().nonzero()[:, 0]
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(rearrange(args[0], "batch pos d -> (batch pos) d"))
        return (args[0][:1, :1].detach(), *args[1:])

    def made(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(out)
        versions.append(_version(out))

    versions: list[int] = []
    handles = model.unembed.register_forward_pre_hook(keep), model.unembed.register_forward_hook(made)
    try:
        logits = model(tokens, attention_mask=mask, **uncached(model))
    finally:
        for handle in handles:
            handle.remove()
    # The same memory, written to no more: looking at values would wait for the device.
    same = len(seen) == 2 and logits.data_ptr() == seen[1].data_ptr() and _version(logits) == versions[0]
    return seen[0].index_select(0, places.to(seen[0].device)) if same else None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@contextlib.contextmanager
def _cut(unembed: nn.Module, places: Int[Tensor, " n"]) -> Iterator[None]:
    """Hand only these places, counted row by row, to the unembedding: `[1, n, d_model]`."""

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (
            rearrange(args[0], "batch pos d -> (batch pos) d").index_select(0, places.to(args[0].device))[None],
            *args[1:],
        )

    handle = unembed.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


@proven_once("logits at chosen places")
@torch.no_grad()
def _is_proven(model: Any) -> bool:
    """Whether chosen rows are rows of the full logits; with everybody's hooks off."""
    device = device_of(model)
    tokens = torch.arange(10, device=device).reshape(2, 5) % int(model.cfg.d_vocab)
    mask, at = torch.ones_like(tokens), tokens % 3 == 1
    with frozen(model), unhooked(model):
        whole = model(tokens, attention_mask=mask, **uncached(model))
        wanted = whole[at.to(whole.device)].float()
        try:
            found = _selected(model, tokens, mask, at).float()
        except (RuntimeError, TypeError, ValueError, IndexError):  # another shape is not what it works with
            return False
    limit = (TOLERANCE if computes_exactly(model) else ROUGH) * whole.float().std()
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= limit)
