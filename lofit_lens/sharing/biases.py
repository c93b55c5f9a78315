"""Offsets as biases of attention's output projection, which other tools accept without changed weights.

An offset v of z is the same vector at attention's output, whatever the input:

    W_O (z + v) = W_O z + b,    b = W_O v
"""

from pathlib import Path
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lofit_lens.errors import AdapterError, ModelError
from lofit_lens.interventions import Adapter
from lofit_lens.sharing.affine import affine
from lofit_lens.sharing.folded import base_of, check_fits
from lofit_lens.sharing.outputs import Outputs, outputs_of

Biases = dict[int, Float[Tensor, " d_model"]]  # layer -> W_O v
IN_VLLM = ".self_attn.o_proj"  # the projection of an attention that TransformerLens hooks in vLLM


def biases_of(
    adapter: Adapter, base: str | Path | None = None, revision: str | None = None, *, strict: bool = True
) -> tuple[Outputs, Biases]:
    """Return the base's output projections, and for every edited layer the bias equivalent to the adapter, float32.

    Raises:
        AdapterError: scalings, which no bias can hold; an edit that is not the same at all positions, or changes nothing; or an
            adapter made for another model.
        ModelError: an architecture that is not known here, or a base that cannot be read.
        InputError: no such base.
    """
    scale, shift = affine(adapter)
    if bool((scale != 1).any()):
        raise AdapterError(
            f"this {adapter.title} adapter scales heads' outputs, and a bias only adds; fold it into the weights instead "
            "(export_folded), or train only offsets"
        )
    outputs = outputs_of(base_of(adapter, base, revision, strict=strict))
    check_fits(adapter, outputs, scale)
    flat = rearrange(shift, "layer head d -> layer (head d)")
    found = {}
    for layer, c in enumerate(flat):
        if bool(c.any()):
            weight = outputs.weight(layer)
            found[layer] = (weight @ c.to(weight)).float()
    return outputs, found


def to_vllm(
    adapter: Adapter, *, base: str | Path | None = None, revision: str | None = None, strict: bool = True
) -> dict[str, dict[str, Any]]:
    """Return the adapter as the `intervene=` of a model that TransformerLens 4 runs on vLLM (`RemoteBridge.boot_vllm`).

    The adapter's offsets become `{"blocks.3.attn.hook_out": {"op": "add", "value": [...]}}`, one entry per edited layer with
    `W_O v` as `d_model` numbers; the dictionary can be written as JSON. That bridge runs one forward at a time, with or without
    a cache of activations: it does not generate.

    Args:
        adapter: LoFiT without scalings, or ITI at all positions.
        base: folder or hub id of the base model; None = the one that the adapter was made for.
        revision: hub commit, tag or branch of the base; None = the adapter's, or main.
        strict: refuse a base with other weights than those the adapter was made for.

    Raises:
        AdapterError: scalings, which no bias can hold; an edit that is not the same at all positions, or changes nothing; or an
            adapter made for another model.
        ModelError: an architecture whose attention TransformerLens does not hook in vLLM, or a base that cannot be read.
        InputError: no such base.
    """
    outputs, biases = biases_of(adapter, base, revision, strict=strict)
    architecture = outputs.checkpoint.architecture
    # vLLM calls GPT-OSS's attention `attn`, and its GPT-2, GPT-NeoX and OPT keep their layers elsewhere.
    if not outputs.names[0].endswith(IN_VLLM) or architecture == "GptOssForCausalLM":
        raise ModelError(
            f"{outputs.checkpoint.name}: TransformerLens hooks model.layers.N.self_attn in vLLM, which {architecture} does not "
            "have there; serve a folded checkpoint instead (export_folded), or attach the adapter at run time"
        )
    return {f"blocks.{layer}.attn.hook_out": {"op": "add", "value": b.tolist()} for layer, b in biases.items()}
