"""Recover a LoFiT adapter from a checkpoint that it was folded into (by this package or by hand).

    b' - b = W v                     v by least squares over the given heads, layer by layer
    W'     = W diag(1 + A)           A column by column, if the base is given

W is attention's output projection `[d_model, n_heads * d_head]`. If W has more columns (of those heads) than its rank, v is one
solution of many, and the shortest is taken, which has the same effect. Without the base, W' is used for W and A is zero.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import AdapterError, ModelError
from lofit_lens.heads import HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import ModelInfo
from lofit_lens.sharing.checkpoints import Checkpoint, open_checkpoint
from lofit_lens.sharing.outputs import Outputs, outputs_of

logger = logging.getLogger(__name__)

SUSPICIOUS = 0.05  # relative residual above which a warning is logged; rounding to bfloat16 mostly stays below
REFUSED = 0.5  # relative residual beyond rounding above which the import is refused
EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|embed_in|wte)\.weight")


class Difference(NamedTuple):
    """W, W' and b' - b of a layer, float64, and how far rounding to the weights' dtype may have moved W' and b'."""

    weight: Float[Tensor, "d_model z"]
    scaled: Float[Tensor, "d_model z"]
    bias: Float[Tensor, " d_model"]
    moved_scaled: Float[Tensor, "d_model z"]
    moved_bias: Float[Tensor, " d_model"]


class Explained(NamedTuple):
    """A and v of a layer, `[n_heads, d_head]`; the unexplained share, and its part beyond rounding; whether v is unique."""

    A: Float[Tensor, "n_heads d_head"]
    v: Float[Tensor, "n_heads d_head"]
    residual: float
    beyond: float
    unique: bool


def solve_shift(
    weight: Float[Tensor, "d_model z"], bias: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " z"], bool]:
    """The shortest c that minimizes `|W c - b|`, and whether it is unique; W holds the columns of the given heads."""
    W, b = weight.double(), bias.double()
    found = torch.linalg.lstsq(W, b[:, None], driver="gelsy")
    return found.solution[:, 0].float(), int(found.rank) == W.shape[1] or not bool(b.any())


def solve_scale(weight: Float[Tensor, "d_model z"], scaled: Float[Tensor, "d_model z"]) -> Float[Tensor, " z"]:
    """The s that minimizes `|W diag(s) - W'|`; zero columns, and columns that are bitwise equal, get 1."""
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
        heads: the edited heads; None = all heads of the layers that differ, with the shortest solution for v.
        base: the model it was folded into; needed if that has biases of its own, or if scalings were folded.
        revision: hub commit, tag or branch of the checkpoint.
        base_revision: hub commit, tag or branch of the base.

    Returns:
        The adapter, for the base model. `meta.config["residuals"]`: for each layer that differs, the share of `b' - b` or of
        `W' - W` (the larger) that is not explained; if it is well above the rounding of the weights' dtype, another head was
        edited too, or more than biases and scalings. `meta.config["unique"]`: whether v is the only solution over these heads.

    Raises:
        InputError: a head outside the model, or no such checkpoint.
        ModelError: an architecture that is not known, two models of different shapes, biases that may be the model's own, or
            weights that are not finite.
        AdapterError: nothing was folded into it, or something else: a layer differs that has none of `heads`, or more than half
            of its difference is not explained, rounding aside.
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
    explained: dict[int, Explained] = {}
    for layer in range(shape[0]):
        found = _differences(new, old, layer)
        if torch.equal(found.weight, found.scaled) and not bool(found.bias.any()):
            continue
        index = list(range(shape[1])) if heads is None else [h.head for h in heads if h.layer == layer]
        explained[layer] = one = _explained(found, shape[2], index)
        A[layer], v[layer] = one.A, one.v
    _check_explained(explained, checkpoint, heads)
    residuals = {layer: one.residual for layer, one in explained.items()}
    unique = all(one.unique for one in explained.values())
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


def _explained(found: Difference, d_head: int, index: list[int]) -> Explained:
    """Find the edit of some heads that explains how a layer differs; A and v are zero outside these heads."""
    weight, scaled, bias = found[:3]
    A, v = (rearrange(torch.zeros(weight.shape[1]), "(head d) -> head d", d=d_head) for _ in "Av")
    if not index:
        return Explained(A, v, 1.0, 1.0, True)
    columns = rearrange(torch.arange(weight.shape[1]), "(head d) -> head d", d=d_head)[index]
    columns = rearrange(columns, "head d -> (head d)")
    shift, unique = solve_shift(weight[:, columns], bias)
    A[index] = rearrange(solve_scale(weight[:, columns], scaled[:, columns]), "(head d) -> head d", d=d_head) - 1
    v[index] = rearrange(shift, "(head d) -> head d", d=d_head)
    left = weight * (1 + rearrange(A, "head d -> (head d)")) - scaled
    left_bias = weight @ rearrange(v, "head d -> (head d)").double() - bias
    shares = _share(left_bias, bias), _share(left, weight - scaled)
    beyond = (
        _share((left_bias.abs() - found.moved_bias).clamp(min=0), bias),
        _share((left.abs() - found.moved_scaled).clamp(min=0), weight - scaled),
    )
    return Explained(A, v, _largest(shares), _largest(beyond), unique)


def _differences(new: Outputs, old: Outputs | None, layer: int) -> Difference:
    """How a layer differs; a missing bias is zero. Changes that follow only from the new weights' dtype do not count."""
    scaled, bias = _finite(new, layer)
    kind = new.checkpoint.dtype_of(f"{new.names[layer]}.weight")
    moved_scaled, moved_bias = _rounding(scaled, kind), _rounding(bias, kind)
    if old is None:
        return Difference(scaled, scaled, bias, moved_scaled, moved_bias)
    weight, own = _finite(old, layer)
    weight = torch.where(weight.to(kind) == scaled, scaled, weight)
    return Difference(weight, scaled, torch.where(own.to(kind) == bias, 0.0, bias - own), moved_scaled, moved_bias)


def _finite(outputs: Outputs, layer: int) -> tuple[Tensor, Tensor]:
    """W_O and b_O of a layer, float64; a missing bias is zero."""
    checkpoint, name = outputs.checkpoint, outputs.names[layer]
    weight, bias = outputs.weight(layer).double(), outputs.bias(layer)
    bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
    for part, values in (("weight", weight), ("bias", bias)):
        if not bool(torch.isfinite(values).all()):
            tensor = f"{name}.{part}"
            raise ModelError(
                f"{checkpoint.folder / checkpoint.where[tensor]}: {tensor} (layer {layer}) holds NaN or infinity; fetch or save "
                "the checkpoint again"
            )
    return weight, bias


def _rounding(values: Tensor, kind: torch.dtype) -> Tensor:
    """The most that rounding to a dtype can have moved values."""
    if not kind.is_floating_point:
        raise ModelError(
            f"weights of type {kind} are not plain floating-point numbers; use the model in full precision"
        )
    info = torch.finfo(kind)
    return values.abs().clamp(min=info.tiny) * (info.eps / 2)


def _check_explained(explained: dict[int, Explained], checkpoint: str | Path, heads: HeadSet | None) -> None:
    """Refuse an edit that does not explain most of the difference."""
    wrong = [layer for layer, one in explained.items() if not one.beyond <= REFUSED]  # NaN too
    if not wrong:
        return
    asked = set() if heads is None else set(heads.layers)
    without = [layer for layer in wrong if heads is not None and layer not in asked]
    told = ", ".join(f"{layer} ({one.residual:.2g})" for layer, one in explained.items())
    what = f"no head of layer {without[0]} was given" if without else f"too much is left in layer {wrong[0]}"
    then = (
        "the base is another model, or more was changed than heads' scalings and offsets; give the base that it was folded into"
        if heads is None
        else "give the heads that were edited, or leave heads out"
    )
    raise AdapterError(
        f"{checkpoint} is not explained by scalings and offsets of these heads: {what}. Layers that differ, with the share of "
        f"it that is left: {told}; {then}"
    )


def _largest(shares: tuple[float, ...]) -> float:
    return float(torch.tensor(shares, dtype=torch.float64).max())  # NaN stays


def _share(left: Tensor, whole: Tensor) -> float:
    size = float(torch.linalg.vector_norm(whole))
    return float(torch.linalg.vector_norm(left)) / size if size else 0.0


def _check_own_biases(new: Outputs) -> None:
    """Without the base, the whole bias counts as folded: refuse if the model may have had a bias before."""
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
            f"{new.checkpoint.name} may have had biases of its own, which cannot be told from folded ones; give the "
            "model that it was folded into (base=)"
        )


def _check_same_shape(new: Outputs, old: Outputs) -> None:
    ours, theirs = new.shape, old.shape
    if ours != theirs or new.d_model != old.d_model:
        raise ModelError(
            f"{new.checkpoint.name} has {ours[0]} layers of {ours[1]} heads of size {ours[2]}, but {old.checkpoint.name} "
            f"{theirs[0]} of {theirs[1]} of size {theirs[2]} (d_model {new.d_model} and {old.d_model}); give the "
            "model that it was folded into"
        )


def _info(old: Outputs, shape: tuple[int, int, int]) -> ModelInfo:
    checkpoint = old.checkpoint
    return ModelInfo(
        name=checkpoint.name, revision=checkpoint.revision, backend="bridge", processed=False,
        dtype=str(checkpoint.dtype_of(f"{old.names[0]}.weight")).removeprefix("torch."), n_layers=shape[0], n_heads=shape[1],
        d_model=old.d_model, d_vocab=_d_vocab(checkpoint),
    )  # fmt: skip


def _d_vocab(checkpoint: Checkpoint) -> int:
    """Vocabulary size from the configuration, or else from the embedding's rows."""
    said = checkpoint.config.get("vocab_size")
    if isinstance(said, int):
        return said
    name = next((name for name in checkpoint.where if EMBEDDING.fullmatch(name)), None)
    if name is None:
        raise ModelError(f"{checkpoint.name} has no vocab_size in config.json and no embedding; fetch it again")
    return checkpoint.shape(name)[0]


def _say(residuals: dict[int, float], unique: bool) -> None:
    worst = max(residuals, key=lambda layer: residuals[layer])
    logger.info("recovered from layers %s; at most %.2g is unexplained", sorted(residuals), residuals[worst])
    if residuals[worst] > SUSPICIOUS:
        logger.warning(
            "%.2g of the difference in layer %d is not explained by scalings and offsets of these heads: others were edited, "
            "or something else, or the weights' dtype is too coarse", residuals[worst], worst,
        )  # fmt: skip
    if not unique:
        logger.warning("v is not unique: the shortest one was taken, which has the same effect on this model")
