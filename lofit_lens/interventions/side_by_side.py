"""Several LoFiT adapters on one model at once, each on sequences of its own: `z <- (1 + A_r) * z + v_r` where run r owns the row.

Training many adapters against one frozen model then takes one pass over the model for the rows of all of them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from lofit_lens.errors import InputError
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.models import Layout, before_each_pass, hook_z, hooked, layout_of


def edit_rows(
    z: Float[Tensor, "batch pos n_heads d_head"],
    A: Float[Tensor, "runs n_heads d_head"],
    v: Float[Tensor, "runs n_heads d_head"],
    owner: Int[Tensor, " batch"],
) -> Float[Tensor, "batch pos n_heads d_head"]:
    """Apply the edit of `lofit.edit_z`, with each row's own run; computed in float32 or above, rounded once."""
    # `embedding` gathers rows, and unlike indexing adds up their gradients in one order on any number of threads.
    flat = (rearrange(x, "run head d -> run (head d)") for x in (A, v))
    mine, shift = (rearrange(F.embedding(owner, x), "row (head d) -> row 1 head d", head=A.shape[1]) for x in flat)
    return (z * (1 + mine) + shift).to(z.dtype)


@contextlib.contextmanager
def side_by_side(model: Any, adapters: Sequence[Lofit]) -> Iterator[None]:
    """Attach several adapters within the block; each pass's `Borders.owner` says which adapter edits each sequence.

    Every layer that some adapter edits has one hook, which gathers A and v of each row's owner. An adapter changes and learns
    only its own heads. Values equal those of the adapter attached by itself, up to rounding.

    Raises:
        AdapterError: an adapter that does not fit the model, is attached already, or is given twice.
        InputError: no adapter, or one that acts only at certain positions; and, during a pass, borders that state no owner.
    """
    if not adapters:
        raise InputError("no adapter to attach; give one or more")
    if some := next((one for one in adapters if not one.positions.everywhere), None):
        raise InputError(
            f"adapters side by side act at every position; one acts at {some.positions}: attach it by itself"
        )
    with contextlib.ExitStack() as stack:
        for one in adapters:
            stack.enter_context(one.reserved(model))
        stack.enter_context(before_each_pass(model, lambda layout: _stack(layout, adapters)))
        for layer in sorted({layer for one in adapters for layer in one.heads.layers}):
            stack.enter_context(hooked(hook_z(model, layer), _hook(model, adapters, layer)))
        yield


def _hook(model: Any, adapters: Sequence[Lofit], layer: int) -> Any:
    def edit(z: Tensor, hook: Any) -> Tensor:
        layout = layout_of(model, z.shape[0], z.shape[1], z.device)
        owner = None if layout.borders is None else layout.borders.owner
        if owner is None:
            raise InputError(
                "several adapters are attached side by side, and this pass does not say whose each sequence is (Borders.owner); "
                "attach a single adapter to run the model as usual"
            )
        A, v = (component[layer].to(z.device) for component in layout.found[_key(adapters)])
        return edit_rows(z, A, v, owner.to(z.device))

    return edit


def _stack(layout: Layout, adapters: Sequence[Lofit]) -> None:
    """Stack A and v of all adapters, `[runs, n_heads, d_head]` per layer: once per pass, for all its layers.

    This happens before the pass, so that blocks recomputed in backward (checkpointing) find the stacks.
    """
    keep = torch.stack([one.mask for one in adapters])[..., None]
    both: list[list[Tensor]] = [[one.A for one in adapters], [one.v for one in adapters]]
    layout.found[_key(adapters)] = tuple(torch.where(keep, torch.stack(c), 0.0).unbind(1) for c in both)


def _key(adapters: Sequence[Lofit]) -> tuple[Any, ...]:
    return ("side by side", *map(id, adapters))
