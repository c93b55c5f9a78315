"""Offsets inside a LoRA adapter that stock PEFT loads: a few kilobytes, and the base model stays as it is.

An offset v of z is the same vector W_O v at attention's output, whatever the input, and PEFT's LoRA can carry one: with
`lora_bias=True` its B has a bias. So the carrier has rank 1, A and B of zeros, and

    lora_B.bias = W_O v        (float32, one module an edited layer)

A LoRA of alpha = r scales by 1. Modules are named in full, since `c_proj` alone would be GPT-2's MLP too. Where the base's output
projection has no bias (Llama), PEFT adds the carrier but cannot merge it.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import ModelError
from lofit_lens.hub import commit_of
from lofit_lens.interventions import Adapter
from lofit_lens.interventions.files import WEIGHTS_FILE
from lofit_lens.sharing.affine import offsets
from lofit_lens.sharing.folded import base_of, check_apart, check_fits
from lofit_lens.sharing.outputs import Outputs, outputs_of
from lofit_lens.sharing.verify import check, compared, hooked_reference, plain_model, write_record

logger = logging.getLogger(__name__)


def carrier_tensors(
    module: str, weight: Float[Tensor, "d_model z"], shift: Float[Tensor, " z"]
) -> dict[str, Float[Tensor, "..."]]:
    """What PEFT's file holds for one module: A `[1, z]` and B `[d_model, 1]` of zeros, and B's bias `W_O v` `[d_model]`."""
    d_model, z = weight.shape
    front = f"base_model.model.{module}"
    return {
        f"{front}.lora_A.weight": torch.zeros(1, z),
        f"{front}.lora_B.weight": torch.zeros(d_model, 1),
        f"{front}.lora_B.bias": (weight @ shift.to(weight)).float(),
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
    """Write a LoRA adapter for PEFT that does what an adapter of offsets does, and compare both on the base model.

    It is read by `peft.PeftModel.from_pretrained(model, folder)`. `lofit_lens_export.json` lies beside it: what it was made of,
    and the comparison.

    Args:
        adapter: LoFiT without scalings, or ITI at all positions.
        folder: to write.
        base: folder or hub id of the base model; None = the one that the adapter was made for.
        revision: hub commit, tag or branch of the base; None = the adapter's, or main.
        dtype: that the comparison runs in; the carrier is float32 in any case. A half-precision type takes half the memory, and
            proves less.
        device: of the comparison; None = CUDA where available, else the CPU.
        strict: refuse a base with other weights than those the adapter was made for.
        overwrite: replace an earlier export.

    Raises:
        AdapterError: scalings, which no bias can carry; an edit that is not the same at all positions, or changes nothing; or an
            adapter made for another model.
        ModelError: an architecture that is not known here, a base that cannot be read, or a carrier that differs from the hooked
            model in PEFT (and was deleted).
        InputError: a folder that exists or cannot be written, or no such base.
    """
    shift = offsets(adapter, "a LoRA's bias only adds")
    checkpoint = base_of(adapter, base, revision, strict=strict)
    check_apart(folder, checkpoint)
    outputs = outputs_of(checkpoint)
    check_fits(adapter, outputs, torch.ones_like(shift))
    commit = commit_of(checkpoint.revision)
    with io.new_folder(folder, overwrite=overwrite) as made:
        reference = hooked_reference(adapter, checkpoint.source, revision=commit, dtype=dtype, device=device)
        plain = plain_model(checkpoint.folder, dtype, device)
        modules = modules_in(plain, outputs)
        edited = [layer for layer in range(len(modules)) if bool(shift[layer].any())]
        tensors: dict[str, Tensor] = {}
        for layer in edited:
            tensors |= carrier_tensors(
                modules[layer], outputs.weight(layer), rearrange(shift[layer], "head d -> (head d)")
            )
        io.save_tensors(made / WEIGHTS_FILE, tensors, {"format": "pt"})
        _write_config(made, [modules[layer] for layer in edited], outputs, commit)
        verified = check(compared(reference, _carried(plain, made)), f"the carrier for {folder}")
        write_record(made, "PEFT carrier", adapter, checkpoint, verified, {})
    logger.info("%s: in PEFT it differs from the hooked model by %.2g in a logit", folder, verified.error)
    return Path(folder)


def modules_in(plain: Any, outputs: Outputs) -> list[str]:
    """The output projections' names in a model, which may have a part in front that the checkpoint's have not.

    Raises:
        ModelError: one is no module of the model, or several.
    """
    names = [name for name, _ in plain.named_modules()]
    found = []
    for short in outputs.names:
        hits = [name for name in names if name == short or name.endswith(f".{short}")]
        if len(hits) != 1:
            raise ModelError(
                f"{outputs.checkpoint.name}: {short} is {len(hits)} modules of the model that transformers builds of it, so that "
                "no tool can be told which to edit; save the model again with save_pretrained"
            )
        found += hits
    return found


def _write_config(folder: Path, modules: list[str], outputs: Outputs, commit: str | None) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=1, lora_alpha=1, lora_dropout=0.0, target_modules=modules, lora_bias=True, bias="none",
        fan_in_fan_out=outputs.transposed, task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=outputs.checkpoint.name if commit else str(outputs.checkpoint.folder), revision=commit,
    )  # fmt: skip
    config.target_modules = sorted(modules)  # a set's order is another one in every process
    config.save_pretrained(str(folder))


def _carried(plain: Any, folder: Path) -> Any:
    """The base model with the carrier, as anybody would load it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*merging LoRA weights won't be possible")
        try:
            return PeftModel.from_pretrained(plain, str(folder))
        except Exception as e:
            raise ModelError(f"PEFT cannot load what was written, so it was deleted: {e}") from e
