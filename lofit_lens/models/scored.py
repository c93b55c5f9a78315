"""Logits only at chosen positions: the unembedding is a large part of a pass, and a loss reads few of its rows.

    logits = softcap(norm(residual)[at] W_U + b_U)

The rows are chosen before the unembedding; the pass is otherwise unchanged. A loss that reads one number per position
(`read_at`) never has all these logits at once: they are computed, read and backpropagated in parts.
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
ROWS = 256  # of logits at once: enough for a fast matrix product, with little memory allocated in each step

# Models that process logits further after the unembedding.
_more_behind: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
Read = Callable[[Tensor, slice], Tensor]  # logits [part, d_vocab] of some positions, and which -> one number for each


def logits_at(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    at: Bool[Tensor, "batch pos"],
    borders: Borders | None = None,
) -> Float[Tensor, "n d_vocab"]:
    """`logits_of(model, tokens, mask, borders)[at]`, with the unembedding applied only at these positions.

    All logits are computed, and rows taken from them, if a model does not treat each row of them separately (found by one
    probe, remembered), or while the unembedding has a hook.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: ids.
        mask: 1 = token, 0 = padding on either side.
        at: the positions, taken row by row; if empty, no row is returned.
        borders: where prompts end, for edits that act only on certain positions.

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
    """`read(logits_at(model, tokens, mask, at, borders), slice(None))` for a `read` that treats each position separately.

    With gradients, each part of the logits is backpropagated to the residual stream when it is made (as if the loss were the
    sum of the numbers), and the loss's gradient then scales that. If something acts after the unembedding (a soft cap, a
    hook), or its weights are trained, the numbers are read from all logits at once.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: ids.
        mask: 1 = token, 0 = padding on either side.
        at: the positions, taken row by row.
        read: logits of some of the positions, and which -> a number for each position.
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
    """A number from the logits of each position, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unembed: nn.Module, read: Read) -> Tensor:
        """Compute the numbers from `x`, `[n, d_model]`, the unembedding's input."""
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
        """Scale each row of the sum's gradient by the gradient of its own number."""
        (back,) = ctx.saved_tensors
        return back * grad[0][:, None].to(back.device, back.dtype), None, None


def _is_watched(model: Any) -> bool:
    unembed = getattr(model, "unembed", None)
    return not isinstance(unembed, nn.Module) or any(has_hooks(m) for m in unembed.modules())


def _selected(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], at: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "n d_vocab"]:
    places = at.flatten().nonzero()[:, 0]  # only once: asking for their number waits for the device
    with _cut(model.unembed, places):
        return model(tokens, attention_mask=mask, **uncached(model))[0]


def _in_front(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], at: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "n d_model"] | None:
    """Return the unembedding's input at these positions, or None if the logits are not its output; it runs on one position."""
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
    # The same memory, not written since: comparing values would wait for the device.
    same = len(seen) == 2 and logits.data_ptr() == seen[1].data_ptr() and _version(logits) == versions[0]
    return seen[0].index_select(0, places.to(seen[0].device)) if same else None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@contextlib.contextmanager
def _cut(unembed: nn.Module, places: Int[Tensor, " n"]) -> Iterator[None]:
    """Pass only these positions, counted row by row, to the unembedding: `[1, n, d_model]`."""

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
    """Return whether chosen rows equal rows of the full logits, with all hooks off."""
    device = device_of(model)
    tokens = torch.arange(10, device=device).reshape(2, 5) % int(model.cfg.d_vocab)
    mask, at = torch.ones_like(tokens), tokens % 3 == 1
    with frozen(model), unhooked(model):
        whole = model(tokens, attention_mask=mask, **uncached(model))
        wanted = whole[at.to(whole.device)].float()
        try:
            found = _selected(model, tokens, mask, at).float()
        except (RuntimeError, TypeError, ValueError, IndexError):  # it does not work with another shape
            return False
    limit = (TOLERANCE if computes_exactly(model) else ROUGH) * whole.float().std()
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= limit)
