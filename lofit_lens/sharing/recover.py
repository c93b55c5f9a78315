"""A LoFiT adapter out of a checkpoint that one was folded into (by this package or by hand).

    b' - b = W v                     v by least squares over the heads asked for, a layer at a time
    W'     = W diag(1 + A)           A column by column, where the base is at hand

W is attention's output projection `[d_model, n_heads * d_head]`. v is one solution of many where W has more columns (of those
heads) than its rank; then the shortest is taken, which has the same effect. Without the base, W' stands for W and A is zero.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import AdapterError, ModelError
from lofit_lens.heads import HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import ModelInfo
from lofit_lens.sharing.checkpoints import open_checkpoint
from lofit_lens.sharing.outputs import Outputs, outputs_of

logger = logging.getLogger(__name__)

SUSPICIOUS = 0.05  # relative residual above which a warning is logged; rounding to bfloat16 stays below


class Solved(NamedTuple):
    """A least-squares solution, the share of the right side that it leaves, and whether it is the only one."""

    shift: Float[Tensor, " z"]
    residual: float
    unique: bool


def solve_shift(weight: Float[Tensor, "d_model z"], bias: Float[Tensor, " d_model"]) -> Solved:
    """The shortest c that makes `|W c - b|` smallest, float64 inside; W holds the columns of the heads asked for."""
    W, b = weight.double(), bias.double()
    found = torch.linalg.lstsq(W, b[:, None], driver="gelsy")
    shift = found.solution[:, 0]
    return Solved(shift.float(), _share(W @ shift - b, b), int(found.rank) == W.shape[1] or not bool(b.any()))


def solve_scale(weight: Float[Tensor, "d_model z"], scaled: Float[Tensor, "d_model z"]) -> Float[Tensor, " z"]:
    """The s that makes `|W diag(s) - W'|` smallest; columns of zeros, and those that are equal to the bit, get 1."""
    W, other = weight.double(), scaled.double()
    norms = (W * W).sum(0)
    same = (weight == scaled).all(0) | (norms == 0)
    return torch.where(same, 1.0, (W * other).sum(0) / torch.where(same, 1.0, norms)).float()


def import_folded(
    checkpoint: str | Path,
    *,
    heads: HeadSet | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
) -> Lofit:
    """Read the adapter out of a folded checkpoint.

    Args:
        checkpoint: folder or hub id.
        heads: that were edited; None = all heads of the layers that differ, of which v is then the shortest solution.
        base: the model it was folded into; needed where that has biases of its own, or where scalings were folded.
        revision: hub commit, tag or branch of the checkpoint.
        base_revision: the same of the base.

    Returns:
        The adapter, for the base model. `meta.config["residuals"]`: for each layer that differs, the share of `b' - b` or of
        `W' - W` (the larger) that is not explained; well above the rounding of the weights' type, other heads were edited, or
        more than biases and scalings. `meta.config["unique"]`: whether no other v over these heads does the same.

    Raises:
        InputError: a head outside the model, or no such checkpoint.
        ModelError: an architecture that is not known, two models of different shapes, or biases that may be the model's own.
        AdapterError: nothing was folded into it.
    """
    new = outputs_of(open_checkpoint(checkpoint, revision=revision))
    old = None if base is None else outputs_of(open_checkpoint(base, revision=base_revision))
    if old is None:
        _check_own_biases(new)
    else:
        _check_same_shape(new, old)
    shape = new.shape
    if heads is not None:
        heads.check(shape[:2])
    A, v = torch.zeros(shape), torch.zeros(shape)
    residuals, unique = {}, True
    for layer in range(shape[0]):
        weight, scaled, bias = _differences(new, old, layer)
        if torch.equal(weight, scaled) and not bool(bias.any()):
            continue
        index = list(range(shape[1])) if heads is None else [h.head for h in heads if h.layer == layer]
        A[layer], v[layer], residuals[layer], alone = _explained(weight, scaled, bias, shape[2], index)
        unique = unique and alone
    if not bool(A.any() or v.any()):
        raise AdapterError(f"nothing is folded into {checkpoint}" + ("" if heads is None else " at these heads"))
    _say(residuals, unique)
    config = {
        "made_by": "import_folded", "from": new.checkpoint.name, "revision": new.checkpoint.revision, "unique": unique,
        "residuals": {str(layer): share for layer, share in residuals.items()},
    }  # fmt: skip
    meta = AdapterMeta(None if old is None else _info(old, shape), config=config, versions=io.environment())
    made = Lofit(shape, heads or HeadSet([(layer, n) for layer in residuals for n in range(shape[1])]), meta)
    with torch.no_grad():
        made.A.copy_(A)
        made.v.copy_(v)
    return made


def _explained(
    weight: Float[Tensor, "d_model z"],
    scaled: Float[Tensor, "d_model z"],
    bias: Float[Tensor, " d_model"],
    d_head: int,
    index: list[int],
) -> tuple[Tensor, Tensor, float, bool]:
    """A and v of a layer, `[n_heads, d_head]`, zero outside some heads; the share that they leave; whether v is the only one."""
    A, v = (torch.zeros(weight.shape[1]).unflatten(0, (-1, d_head)) for _ in "Av")
    if not index:
        return A, v, 1.0, True
    columns = torch.arange(weight.shape[1]).unflatten(0, (-1, d_head))[index].flatten()
    solved = solve_shift(weight[:, columns], bias)
    A[index] = solve_scale(weight[:, columns], scaled[:, columns]).unflatten(0, (-1, d_head)) - 1
    v[index] = solved.shift.unflatten(0, (-1, d_head))
    left = _share(weight * (1 + A.flatten()) - scaled, weight - scaled)
    return A, v, max(solved.residual, left), solved.unique


def _differences(new: Outputs, old: Outputs | None, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, W' and b' - b of a layer, float32; a missing bias is zero. What only the new weights' type changed is no difference."""
    scaled, bias = new.weight(layer), new.bias(layer)
    bias = torch.zeros(len(scaled)) if bias is None else bias
    if old is None:
        return scaled, scaled, bias
    kind = new.checkpoint.dtype_of(f"{new.names[layer]}.weight")
    weight, own = old.weight(layer), old.bias(layer)
    own = torch.zeros(len(scaled)) if own is None else own
    weight = torch.where(weight.to(kind) == scaled, scaled, weight)
    return weight, scaled, torch.where(own.to(kind) == bias, 0.0, bias - own)


def _share(left: Tensor, whole: Tensor) -> float:
    size = float(torch.linalg.vector_norm(whole))
    return float(torch.linalg.vector_norm(left)) / size if size else 0.0


def _check_own_biases(new: Outputs) -> None:
    """Without the base, all of the bias is taken for folded: refuse where the model may have had one before."""
    held = [name for layer, name in enumerate(new.names) if new.bias(layer) is not None]
    if not held:
        raise AdapterError(
            f"{new.checkpoint.name} holds no bias of attention's output projection; give the base for scalings"
        )
    beside = {f"{name.rpartition('.')[0]}." for name in held}  # "model.layers.0.self_attn."
    others = [
        name for name in new.checkpoint.where
        if name.endswith(".bias") and name.removesuffix(".bias") not in held and any(name.startswith(b) for b in beside)
    ]  # fmt: skip
    if new.checkpoint.architecture in ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM") or any(
        bool(new.checkpoint.read(name).any()) for name in others
    ):
        raise ModelError(
            f"{new.checkpoint.name} can have had biases of its own, so that what was folded cannot be told from them; give the "
            "model that it was folded into (base=)"
        )


def _check_same_shape(new: Outputs, old: Outputs) -> None:
    ours, theirs = new.shape, old.shape
    if ours != theirs or new.weight(0).shape != old.weight(0).shape:
        raise ModelError(
            f"{new.checkpoint.name} has {ours[0]} layers of {ours[1]} heads of size {ours[2]}, and {old.checkpoint.name} "
            f"{theirs[0]} of {theirs[1]} of size {theirs[2]}; give the model that it was folded into"
        )


def _info(old: Outputs, shape: tuple[int, int, int]) -> ModelInfo:
    checkpoint = old.checkpoint
    return ModelInfo(
        name=checkpoint.name, revision=checkpoint.revision, backend="bridge", processed=False,
        dtype=str(checkpoint.dtype_of(f"{old.names[0]}.weight")).removeprefix("torch."), n_layers=shape[0], n_heads=shape[1],
        d_model=old.weight(0).shape[0], d_vocab=int(checkpoint.config["vocab_size"]),
    )  # fmt: skip


def _say(residuals: dict[int, float], unique: bool) -> None:
    worst = max(residuals, key=lambda layer: residuals[layer])
    logger.info("recovered from layers %s; %.2g is left at most", sorted(residuals), residuals[worst])
    if residuals[worst] > SUSPICIOUS:
        logger.warning(
            "%.2g of what differs in layer %d is not explained by scalings and offsets of these heads: others were edited, "
            "or more than that, or the weights' type is too coarse", residuals[worst], worst,
        )  # fmt: skip
    if not unique:
        logger.warning("v is not unique: the shortest one was taken, which has the same effect on this model")
