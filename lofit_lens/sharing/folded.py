"""Fold an adapter into a plain Hugging Face checkpoint, which any server loads: exact, and without hooks.

An edit `z <- s * z + c` of attention's output before W_O is the same function as changed weights,

    W' = W diag(s)        b' = b + W c        (c through the unscaled W)

computed in float32 and rounded once. LoFiT: s = 1 + A, c = v. The checkpoint is written file by file; files without an edited
tensor are copied. The result is loaded with plain transformers and compared with the hooked model; if it differs, it is
deleted.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import AdapterError, InputError, ModelError
from lofit_lens.hub import commit_of, leads_out
from lofit_lens.interventions import Adapter
from lofit_lens.models import same_weights, source_of
from lofit_lens.progress import tqdm
from lofit_lens.sharing.affine import affine
from lofit_lens.sharing.checkpoints import CONFIG, INDEX, Checkpoint, open_checkpoint
from lofit_lens.sharing.outputs import Outputs, outputs_of
from lofit_lens.sharing.slots import IGNORED_BY, Slot, slot_for
from lofit_lens.sharing.tokenizers import keep_tokenizer
from lofit_lens.sharing.verify import (
    Verified,
    check,
    compared,
    hooked_reference,
    plain_model,
    write_record,
)

logger = logging.getLogger(__name__)

# Files that are copied: the tokenizer's, settings that transformers reads, and licenses.
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "LICENSE*", "LICENCE*",
    "NOTICE*", "USE_POLICY*",
)  # fmt: skip
Makers = Mapping[str, Callable[[], Tensor]]  # tensor -> how it is made


@dataclass(frozen=True)
class FoldedExport:
    """A checkpoint that was written.

    Attributes:
        folder: its folder.
        architecture: its Hugging Face class.
        was: the class of the base.
        verified: comparison with the hooked model.
        changed: names of the tensors that carry the edit.
        added: names of the tensors that the base lacks; those not in `changed` are zero.
    """

    folder: Path
    architecture: str
    was: str
    verified: Verified
    changed: tuple[str, ...]
    added: tuple[str, ...]


def folded_bias(
    weight: Float[Tensor, "d_model z"], bias: Float[Tensor, " d_model"] | None, shift: Float[Tensor, " z"]
) -> Float[Tensor, " d_model"]:
    """`b + W c`, with the unscaled W; a missing bias counts as zero."""
    added = weight @ shift.to(weight)
    return added if bias is None else bias + added


def export_folded(
    adapter: Adapter,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    strict: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> FoldedExport:
    """Write a plain Hugging Face checkpoint that computes what the base model does with the adapter attached.

    Tokenizer, generation settings and license files are copied; code is not. Memory never holds more than the loaded model
    and one of the checkpoint's files (for GPT-NeoX, TransformerBridge holds q, k and v twice). Nothing remains if it fails or is
    interrupted.

    Args:
        adapter: LoFiT, ITI at all positions, or an ablation.
        folder: folder to write, with `lofit_lens_export.json` beside the weights, which records the origin and the comparison.
        base: folder or hub id of the base model; None = the one that the adapter was made for.
        revision: hub commit, tag or branch of the base; None = the adapter's, or main.
        dtype: dtype of the written weights and of the comparison (float32 for float64); None = that of the base.
        device: device of the comparison; None = CUDA if available, else the CPU.
        strict: refuse a base with other weights than those the adapter was made for.
        overwrite: replace an earlier export.
        progress: show a bar over the files.

    Raises:
        AdapterError: an edit that is not the same at all positions, one that changes nothing, or one made for another model.
        ModelError: an architecture without room for the bias, a base that cannot be read, or a checkpoint that differs from the
            hooked model (and was deleted).
        InputError: a folder that exists or cannot be written, or no such base.
    """
    scale, shift = affine(adapter)
    checkpoint = base_of(adapter, base, revision, strict=strict)
    check_apart(folder, checkpoint)
    outputs = outputs_of(checkpoint)
    check_fits(adapter, outputs, scale)
    slot = slot_for(outputs, [layer for layer in range(len(shift)) if bool(shift[layer].any())])
    deaf = IGNORED_BY.get(slot.config["architectures"][0])
    if slot.added and deaf:
        logger.warning("%s: %s", folder, deaf)
    edits = _edits(outputs, scale, shift)
    kind = _written_type(outputs, dtype)
    runs_in = torch.float32 if kind == torch.float64 else kind  # attention overflows at padded positions in float64
    with io.new_folder(folder, overwrite=overwrite) as made:
        commit = commit_of(checkpoint.revision)
        reference = hooked_reference(adapter, checkpoint.source, revision=commit, dtype=runs_in, device=device)
        try:
            _write(made, checkpoint, slot, edits, kind if dtype is not None else None, progress)
        except (OSError, SafetensorError) as e:
            raise io.cannot_write(folder, _system_error(e), "choose another folder") from e
        keep_tokenizer(checkpoint.folder, made)
        verified = check(compared(reference, plain_model(made, runs_in, device)), f"the checkpoint for {folder}")
        _check_written(made, outputs, scale, shift, kind)
        architecture = str(slot.config["architectures"][0])
        found = FoldedExport(
            Path(folder),
            architecture,
            checkpoint.architecture,
            verified,
            tuple(sorted(edits)),
            tuple(sorted(slot.added)),
        )
        told = {"architecture": architecture, "changed": list(found.changed), "added": list(found.added)}
        write_record(made, "folded checkpoint", adapter, checkpoint, verified, told)
    return found


def base_of(adapter: Adapter, base: str | Path | None, revision: str | None, *, strict: bool = True) -> Checkpoint:
    """Open the checkpoint of an adapter's base model, or the given one; with `strict`, only if it can be the same model.

    Raises:
        AdapterError: no base is given or named by the adapter, or its weights are known to differ.
        InputError, ModelError: see `open_checkpoint`.
    """
    made_for = adapter.meta.model
    if base is None:
        if made_for is None:
            raise AdapterError("this adapter does not say which model it was made for; give it (base=, --model)")
        base = source_of(made_for.name, made_for.revision)
    if revision is None and made_for and made_for.name == str(base):
        revision = commit_of(made_for.revision)
    checkpoint = open_checkpoint(base, revision=revision)
    # Names are ignored: only differing revisions show that it is another model.
    if (
        strict
        and made_for
        and not same_weights(replace(made_for, name=""), replace(made_for, name="", revision=checkpoint.revision))
    ):
        raise AdapterError(
            f"this adapter was made for {made_for.name} ({made_for.revision}); {checkpoint.name} ({checkpoint.revision}) has "
            "other weights. Give the model it was made for (base=, revision=), or, if this is another revision or a copy of it, "
            "accept it with strict=False (--other-model)"
        )
    if any(".attn_A." in name for name in checkpoint.where):
        raise ModelError(
            f"{checkpoint.name} holds attn_A and attn_v of the official code, which plain transformers does not know; use the "
            "model it was tuned from"
        )
    return checkpoint


def check_apart(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Raise InputError if an export would overwrite its own base."""
    if Path(folder).resolve() == checkpoint.folder.resolve():
        raise InputError(f"{folder} is the base model itself, which would be lost; give another folder")


def check_fits(adapter: Adapter, outputs: Outputs, scale: Tensor) -> None:
    """Raise AdapterError unless an adapter has a checkpoint's shape, and its scalings mean the same there."""
    theirs = outputs.shape
    if theirs != tuple(scale.shape):
        raise AdapterError(
            f"this adapter is for {scale.shape[0]} layers of {scale.shape[1]} heads of size {scale.shape[2]}, and "
            f"{outputs.checkpoint.name} has {theirs[0]} of {theirs[1]} of size {theirs[2]}. Give the model it was made for"
        )
    if adapter.meta.model and adapter.meta.model.processed and bool((scale != 1).any()):
        raise AdapterError(
            "this adapter scales the z of a model whose weights TransformerLens processed on loading, where z can mean something "
            "else than in the checkpoint; fit it on the model as load_model loads it"
        )


def _edits(outputs: Outputs, scale: Tensor, shift: Tensor) -> Makers:
    """Makers of the tensors that carry the edit, float32, in the checkpoint's layout."""
    made: dict[str, Callable[[], Tensor]] = {}
    for layer, name in enumerate(outputs.names):
        s, c = (rearrange(x[layer], "head d -> (head d)") for x in (scale, shift))
        if bool((s != 1).any()):
            made[f"{name}.weight"] = partial(_new_weight, outputs, layer, s)
        if bool(c.any()):
            made[f"{name}.bias"] = partial(_new_bias, outputs, layer, c)
    return made


def _new_weight(outputs: Outputs, layer: int, scale: Float[Tensor, " z"]) -> Tensor:
    return outputs.raw(outputs.weight(layer) * scale)  # column j multiplies entry j of the heads' concatenated outputs


def _new_bias(outputs: Outputs, layer: int, shift: Float[Tensor, " z"]) -> Tensor:
    return folded_bias(outputs.weight(layer), outputs.bias(layer), shift)


def _written_type(outputs: Outputs, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype that the weights will have."""
    if dtype is not None:
        return io.torch_dtype(dtype)
    kinds = [outputs.checkpoint.dtype_of(f"{name}.weight") for name in outputs.names]
    found = min(kinds, key=lambda kind: kind.itemsize)  # the comparison must allow for the coarsest
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ModelError(
            f"{outputs.checkpoint.name} holds weights of type {found}; give the type to write (dtype='bfloat16')"
        )
    return found


# ---------------------------------------------------------------------------------------------------- writing


def _write(
    made: Path, checkpoint: Checkpoint, slot: Slot, edits: Makers, dtype: torch.dtype | None, progress: bool
) -> None:
    """Write all files but the record; one file's tensors are in memory at a time."""
    where = dict(checkpoint.where)
    for bias in slot.added:
        where[bias] = where[bias.removesuffix("bias") + "weight"]
    for file in tqdm(checkpoint.files, desc="files", disable=not progress):
        names = sorted(name for name, held in where.items() if held == file)
        if dtype is None and not any(name in edits or name in slot.added for name in names):
            shutil.copyfile(checkpoint.folder / file, made / file)
        else:
            tensors = {name: _made(name, checkpoint, slot, edits, dtype) for name in names}
            save_file(tensors, made / file, metadata={"format": "pt"})
            os.chmod(made / file, io.new_mode())  # safetensors makes it readable only for its owner
            del tensors
    if (checkpoint.folder / INDEX).is_file():
        size = sum(_payload(made / file) for file in checkpoint.files)
        io.write_json(made / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})
    config = dict(slot.config)
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    io.write_json(made / CONFIG, config)
    for path in _beside(checkpoint.folder):
        shutil.copyfile(path, made / path.name)
    io.sync(made)


def _made(name: str, checkpoint: Checkpoint, slot: Slot, edits: Makers, dtype: torch.dtype | None) -> Tensor:
    """The tensor to write: the edit rounded once, a new bias of zeros, or the base's tensor."""
    if name in checkpoint.where:
        own = checkpoint.read(name)
    else:
        own = torch.zeros(slot.added[name], dtype=checkpoint.dtype_of(name.removesuffix("bias") + "weight"))
    kind = dtype if dtype is not None and own.is_floating_point() else own.dtype
    return (edits[name]() if name in edits else own).to(kind).contiguous()


def _beside(folder: Path) -> Iterable[Path]:
    """Files of the base besides its weights."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if leads_out(path) is None)


def _check_written(made: Path, outputs: Outputs, scale: Tensor, shift: Tensor, kind: torch.dtype) -> None:
    """Read W' and b' of all layers again and compare them with the edit, computed in float64.

    One rounding to `kind` is allowed. In half precision, comparing only logits would not reveal an error in one head.
    """
    written = outputs_of(open_checkpoint(made))
    rounding, smallest = torch.finfo(kind).eps, torch.finfo(kind).smallest_normal
    for layer, name in enumerate(outputs.names):
        weight, bias, found = outputs.weight(layer).double(), outputs.bias(layer), written.bias(layer)
        s, c = (rearrange(x[layer].double(), "head d -> (head d)") for x in (scale, shift))
        new_weight, new_bias, size = weight * s, weight @ c, weight.abs() @ c.abs()
        if bias is not None:
            new_bias = new_bias + bias.double()
        found_bias = torch.zeros_like(new_bias) if found is None else found.double()
        off = (
            (written.weight(layer).double() - new_weight).abs() - rounding * new_weight.abs() - smallest,
            (found_bias - new_bias).abs() - rounding * new_bias.abs() - 1e-6 * size - smallest,
        )
        if not all(bool((one <= 0).all()) for one in off):
            raise ModelError(
                f"{name} was not written as computed, so the export was deleted; try again, and report it if it persists"
            )


def _payload(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: they follow its header, whose length comes first."""
    with file.open("rb") as f:
        return file.stat().st_size - 8 - int.from_bytes(f.read(8), "little")


def _system_error(e: Exception) -> OSError:
    """Recover the OSError, which safetensors reports only as text."""
    if isinstance(e, OSError):
        return e
    number = re.search(r"os error (\d+)", str(e))
    return OSError(int(number[1]) if number else 0, str(e))
