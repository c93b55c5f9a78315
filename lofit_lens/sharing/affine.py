"""Affine edits of z that are the same at every position, and so can be folded into weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.errors import AdapterError
from lofit_lens.interventions import Adapter, HeadAdapter
from lofit_lens.interventions.base import check_adapter

Grid = Float[Tensor, "n_layers n_heads d_head"]


@torch.no_grad()
def affine(adapter: Adapter) -> tuple[Grid, Grid]:
    """Scale and shift of `z <- scale * z + shift`, float32 on the CPU; 1 and 0 for heads that the adapter does not edit.

    LoFiT: `1 + A` and `v`. ITI at all positions: 1 and `alpha * sigma * d`. Ablation: 0 and the constant.

    Raises:
        AdapterError: a method whose edit is not affine, positions other than all, numbers that are not finite, or an edit that
            changes nothing.
    """
    check_adapter(adapter)
    if not isinstance(adapter, HeadAdapter):
        raise AdapterError(
            f"{adapter.title} does not edit single heads' outputs by a constant scale and shift, which is what fits into "
            "attention's output projection; LoFiT, ITI at all positions and ablations do. Save this one as an adapter, and "
            "attach it"
        )
    if not adapter.positions.everywhere:
        raise AdapterError(
            f"this {adapter.title} adapter acts only at the positions {str(adapter.positions)!r}, but weights act at all. Make "
            'one that acts everywhere (with_positions("all")), measure what that changes, and export that'
        )
    scale, shift = torch.ones(adapter.shape), torch.zeros(adapter.shape)
    for head in adapter.heads:
        scale[head], shift[head] = (part.detach().float().cpu() for part in adapter.affine(head))
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        raise AdapterError("this adapter holds NaN or infinity; train it again, or load its last good state")
    if bool((scale == 1).all() and (shift == 0).all()):
        raise AdapterError("this adapter changes nothing: all its scalings and offsets are zero; train it first")
    return scale, shift
