"""Offsets inside an adapter that stock PEFT loads: a few kilobytes, and the base model is unchanged.

An adapter of offsets is a bias W_O v per edited layer (`biases.py`), and PEFT's BEFT (arXiv 2509.15974) is an adapter that adds
a bias to a linear layer's output:

    beft_bias = W_O v        (float32)

BEFT supports only `torch.nn.Linear`, and PEFT has it from 0.20 on. GPT-2's projections are of another class (Conv1D). For them,
and if an older PEFT writes the file, a LoRA of rank 1 carries the bias: with `lora_bias=True` its B has a bias, and A and B are
zeros. Modules are named in full, since `c_proj` would also match GPT-2's MLP. If the base's output projection has no
bias (Llama), PEFT adds the carrier but cannot merge it.
"""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.errors import ModelError
from lofit_lens.hub import commit_of
from lofit_lens.interventions import Adapter
from lofit_lens.interventions.files import WEIGHTS_FILE
from lofit_lens.sharing.biases import biases_of
from lofit_lens.sharing.folded import check_apart
from lofit_lens.sharing.outputs import Outputs
from lofit_lens.sharing.verify import check, compared, hooked_reference, plain_model, write_record

logger = logging.getLogger(__name__)


def beft_tensors(module: str, bias: Float[Tensor, " d_model"]) -> dict[str, Float[Tensor, "1 d_model"]]:
    """Return the entry of PEFT's file for one module under BEFT."""
    return {f"base_model.model.{module}.beft_bias": bias[None]}


def lora_tensors(module: str, bias: Float[Tensor, " d_model"], width: int) -> dict[str, Float[Tensor, "..."]]:
    """Return the entries for LoRA: A `[1, width]` and B `[d_model, 1]` of zeros, and B's bias."""
    front = f"base_model.model.{module}"
    return {
        f"{front}.lora_A.weight": torch.zeros(1, width),
        f"{front}.lora_B.weight": torch.zeros(len(bias), 1),
        f"{front}.lora_B.bias": bias,
    }


def export_peft(
    adapter: Adapter,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    strict: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write a PEFT adapter that is equivalent to an adapter of offsets, and compare both on the base model.

    `peft.PeftModel.from_pretrained(model, folder)` reads it (BEFT: PEFT 0.20 or later). `lofit_lens_export.json` beside it
    records its origin and the comparison.

    Args:
        adapter: LoFiT without scalings, or ITI at all positions.
        folder: folder to write.
        base: folder or hub id of the base model; None = the one that the adapter was made for.
        revision: hub commit, tag or branch of the base; None = the adapter's, or main.
        dtype: dtype of the comparison; the carrier is always float32. A half-precision type needs half the memory, but proves
            less.
        device: device of the comparison; None = CUDA if available, else the CPU.
        strict: refuse a base with other weights than those the adapter was made for.
        overwrite: replace an earlier export.

    Raises:
        AdapterError: scalings, which no bias can carry; an edit that is not the same at all positions, or changes nothing; or an
            adapter made for another model.
        ModelError: an architecture that is not known here, a base that cannot be read, or a carrier that differs from the hooked
            model in PEFT (and was deleted).
        InputError: a folder that exists or cannot be written, or no such base.
    """
    outputs, biases = biases_of(adapter, base, revision, strict=strict)
    checkpoint = outputs.checkpoint
    check_apart(folder, checkpoint)
    commit = commit_of(checkpoint.revision)
    with io.new_folder(folder, overwrite=overwrite) as made:
        reference = hooked_reference(adapter, checkpoint.source, revision=commit, dtype=dtype, device=device)
        plain = plain_model(checkpoint.folder, dtype, device)
        modules = modules_in(plain, outputs)
        edited = {modules[layer]: bias for layer, bias in biases.items()}
        as_beft = _takes_beft(plain, edited)
        width = outputs.shape[1] * outputs.shape[2]
        tensors: dict[str, Tensor] = {}
        for module, bias in edited.items():
            tensors |= beft_tensors(module, bias) if as_beft else lora_tensors(module, bias, width)
        io.save_tensors(made / WEIGHTS_FILE, tensors, {"format": "pt"})
        _write_config(made, list(edited), outputs, commit, as_beft)
        verified = check(compared(reference, _carried(plain, made)), f"the carrier for {folder}")
        write_record(made, "PEFT carrier", adapter, checkpoint, verified, {})
    logger.info("%s: in PEFT it differs from the hooked model by %.2g in a logit", folder, verified.error)
    return Path(folder)


def modules_in(plain: Any, outputs: Outputs) -> list[str]:
    """The output projections' names in a model, which may have a prefix that the checkpoint's names lack.

    Raises:
        ModelError: a projection matches no module of the model, or several.
    """
    names = [name for name, _ in plain.named_modules()]
    found = []
    for short in outputs.names:
        hits = [name for name in names if name == short or name.endswith(f".{short}")]
        if len(hits) != 1:
            raise ModelError(
                f"{outputs.checkpoint.name}: {short} matches {len(hits)} modules of the model that transformers builds from it, "
                "so no tool can be told which one to edit; save the model again with save_pretrained"
            )
        found += hits
    return found


def _takes_beft(plain: Any, modules: Iterable[str]) -> bool:
    """Whether this PEFT has BEFT, and every module is of a class that it supports."""
    import peft

    return hasattr(peft, "BeftConfig") and all(isinstance(plain.get_submodule(name), nn.Linear) for name in modules)


def _write_config(folder: Path, modules: list[str], outputs: Outputs, commit: str | None, as_beft: bool) -> None:
    import peft

    name = outputs.checkpoint.name if commit else str(outputs.checkpoint.folder)
    common: dict[str, Any] = {"base_model_name_or_path": name, "revision": commit, "task_type": "CAUSAL_LM"}
    common |= {"target_modules": modules, "inference_mode": True}
    if as_beft:
        config = peft.BeftConfig(**common)
    else:
        config = peft.LoraConfig(
            r=1,
            lora_alpha=1,
            lora_dropout=0.0,
            lora_bias=True,
            bias="none",
            fan_in_fan_out=outputs.transposed,
            **common,
        )
    config.target_modules = sorted(modules)  # a set's order differs between processes
    config.save_pretrained(str(folder))


def _carried(plain: Any, folder: Path) -> Any:
    """The base model with the carrier, loaded as any user would load it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(merging LoRA weights won't be possible|has no bias term)")
        try:
            return PeftModel.from_pretrained(plain, str(folder))
        except Exception as e:
            raise ModelError(f"PEFT cannot load what was written, so it was deleted: {e}") from e
