"""Checkpoints of LoFiT's official code (github.com/fc2869/lo-fit): the whole model, with A and v of every head.

`model.layers.{layer}.self_attn.attn_A.{head}` and `attn_v.{head}`, each `[d_head]`, 0 where a head was not tuned; the edit is
`z * (1 + A) + v` (`LlamaAttention.forward` there). After head selection v is 0 and all A are nonzero; after bias tuning A is 0
and v is nonzero for the chosen heads. `HeadSet.from_npy` reads head files (`top_heads/*.npy`).
"""

import logging
import re
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import DataError, ModelError
from lofit_lens.heads import Head, HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.sharing.checkpoints import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)

_KEY = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.self_attn\.attn_([Av])\.(0|[1-9][0-9]{0,5})")


def import_lofit(checkpoint: str | Path, *, heads: HeadSet | None = None, revision: str | None = None) -> Lofit:
    """Read the adapter from a checkpoint of the official code; its base weights are not read.

    Args:
        checkpoint: the folder that its trainer wrote (one or several safetensors files), or a hub id.
        heads: the heads to take, in this order and with these scores, e.g. `HeadSet.from_npy("top_heads/...npy").top(32)`;
            numbers on other heads are left out with a warning. None = all heads whose A or v is not all 0, by layer.
        revision: hub commit, tag or branch.

    Returns:
        The adapter, float32, with no base model in its record: attach it to the model that the checkpoint was tuned from.

    Raises:
        InputError: no such checkpoint, or `heads` outside its model.
        ModelError: pickled weights (never opened), no such tensors, missing or extra ones, a configuration that does not match
            them, no tuned head, or none of `heads` tuned.
        DataError: a tensor of another length, or with a number that is not finite.
    """
    _refuse_pickles(Path(checkpoint))
    found = open_checkpoint(checkpoint, revision=revision)
    shape = _shape(found)
    A, v = (_grid(found, letter, shape) for letter in "Av")
    used = (A != 0).any(-1) | (v != 0).any(-1)
    if not used.any():
        raise ModelError(f"{found.name}: every attn_A and attn_v is 0, so no head was tuned; use a later checkpoint")
    if heads is None:
        heads = HeadSet([Head(*at) for at in used.nonzero().tolist()], shape=shape[:2], label="tuned")
    meta = AdapterMeta(config={
        "made_by": "lo-fit checkpoint", "checkpoint": found.name, "revision": found.revision,
        "base": found.config.get("_name_or_path"),
    }, versions=io.environment())  # fmt: skip
    made = Lofit(shape, heads, meta)
    if not (used & made.mask).any():
        tuned = [str(Head(*at)) for at in used.nonzero().tolist()]
        more = f" and {len(tuned) - 10} more" if len(tuned) > 10 else ""
        raise ModelError(
            f"{found.name}: none of the given heads was tuned, but {', '.join(tuned[:10])}{more}; give the head file that it "
            "was tuned with, or leave heads out"
        )
    left = [Head(*at) for at in (used & ~made.mask).nonzero().tolist()]
    if left:
        logger.warning("%s: numbers of %d heads outside `heads` are left out, e.g. %s", found.name, len(left), left[0])
    with torch.no_grad():
        made.A.copy_(A * made.mask[..., None])
        made.v.copy_(v * made.mask[..., None])
    return made


def _refuse_pickles(folder: Path) -> None:
    pickled = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    if pickled and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds pickled weights ({pickled[0]}), which may hold code and are never opened here; where you trust "
            "them, load them with the official code and save them with save_pretrained(..., safe_serialization=True)"
        )


def _shape(found: Checkpoint) -> tuple[int, int, int]:
    """`(n_layers, n_heads, d_head)` from the configuration."""
    config = found.config
    n_layers, n_heads, d_model = (config.get(n) for n in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if _count(n_layers) and _count(n_heads) and _count(d_model):
        d_head = config.get("head_dim") or d_model // n_heads
        if _count(d_head):
            return n_layers, n_heads, d_head
    raise ModelError(
        f"{found.folder / 'config.json'} does not give whole numbers for num_hidden_layers, num_attention_heads and "
        "hidden_size, as those of Llama and Gemma do, which the official code tunes; fetch the checkpoint again"
    )


def _count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and value > 0


def _grid(found: Checkpoint, letter: str, shape: tuple[int, int, int]) -> Tensor:
    """attn_A or attn_v of every head, `[n_layers, n_heads, d_head]` float32."""
    n_layers, n_heads, d_head = shape
    keys = {
        (int(hit[1]), int(hit[3])): name for name in found.where if (hit := _KEY.fullmatch(name)) and hit[2] == letter
    }
    if not keys:
        raise ModelError(
            f"{found.name} holds no tensor model.layers.<layer>.self_attn.attn_{letter}.<head>, so it is not a checkpoint of the "
            "official code; load_adapter reads an adapter folder, import_folded a folded checkpoint"
        )
    every = ((layer, head) for layer in range(n_layers) for head in range(n_heads))
    missing = next((at for at in every if at not in keys), None)
    outside = next((at for at in sorted(keys) if at[0] >= n_layers or at[1] >= n_heads), None)
    wrong = missing or outside
    if wrong is not None:
        raise ModelError(
            f"{found.name}: attn_{letter} of {Head(*wrong)} is {'missing' if missing else 'outside the model'} (config.json: "
            f"{n_layers} layers of {n_heads} heads); fetch the checkpoint again"
        )
    grid = torch.zeros(shape)
    for at, name in keys.items():
        values = found.read(name)
        if tuple(values.shape) != (d_head,):
            raise DataError(f"{found.name}: {name} has shape {list(values.shape)}; expected [{d_head}]")
        if not bool(torch.isfinite(values.float()).all()):
            raise DataError(f"{found.name}: {name} holds NaN, infinity or a number too large for float32")
        grid[at] = values
    return grid
