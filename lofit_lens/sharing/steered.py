"""Offsets as steering vectors for lm-evaluation-harness, whose model type `steered` adds them to modules' outputs.

An offset v of z is the same vector at attention's output, whatever the input:

    steering_vector = W_O v        action "add", coefficient 1, no head index, at `layers.N.self_attn.o_proj`

Its hook computes `output + coefficient * vector` at every position, in the model's dtype, and normalizes nothing (lm_eval 0.4.13,
`lm_eval/models/hf_steered.py`). The file is written with `torch.save`, since the tool reads vectors in no other format.
"""

import contextlib
import io as memory
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.hub import commit_of
from lofit_lens.interventions import Adapter
from lofit_lens.sharing.biases import biases_of
from lofit_lens.sharing.carrier import modules_in
from lofit_lens.sharing.verify import Verified, check, compared, hooked_reference, plain_model

logger = logging.getLogger(__name__)

Vectors = Mapping[str, Float[Tensor, " d_model"]]  # by hookpoint


@torch.no_grad()
def export_steered(
    adapter: Adapter,
    file: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    strict: bool = True,
    overwrite: bool = False,
) -> Verified:
    """Write steering vectors for `lm_eval --model steered`, if they are equivalent to the adapter on the base model.

    Args:
        adapter: LoFiT without scalings, or ITI at all positions.
        file: its name must end in `.pt` or `.pth`.
        base: folder or hub id of the base model; None = the one that the adapter was made for.
        revision: hub commit, tag or branch of the base; None = the adapter's, or main.
        dtype: dtype of the comparison; the vectors are always float32.
        device: device of the comparison; None = CUDA if available, else the CPU.
        strict: refuse a base with other weights than those the adapter was made for.
        overwrite: replace an existing file.

    Returns:
        The comparison of plain transformers with these vectors and the hooked model.

    Raises:
        AdapterError: scalings, which no constant vector can express; an edit that is not the same at all positions, or changes
            nothing; or an adapter made for another model.
        ModelError: an architecture that is not known here, a base that cannot be read, or vectors that differ from the hooked
            model (nothing is written).
        InputError: another ending, an existing file or one that cannot be written, or no such base.
    """
    path = Path(file)
    if path.suffix not in (".pt", ".pth"):
        raise InputError(f"{path} does not end in .pt, by which lm_eval recognizes its format; name it {path}.pt")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another name, or overwrite it (overwrite=True, --overwrite)")
    outputs, biases = biases_of(adapter, base, revision, strict=strict)
    checkpoint = outputs.checkpoint
    commit = commit_of(checkpoint.revision)
    reference = hooked_reference(adapter, checkpoint.source, revision=commit, dtype=dtype, device=device)
    plain = plain_model(checkpoint.folder, dtype, device)
    modules = modules_in(plain, outputs)
    vectors = {modules[layer].removeprefix(f"{plain.base_model_prefix}."): bias for layer, bias in biases.items()}
    with _added(plain, vectors):
        verified = check(compared(reference, plain), f"what the vectors for {path} do")
    entry = {"steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    written = memory.BytesIO()
    torch.save({name: {"steering_vector": vector, **entry} for name, vector in vectors.items()}, written)
    io.write_bytes(path, written.getvalue())
    logger.info(
        "%s: %d modules; logits differ from the hooked model's by at most %.2g", path, len(vectors), verified.error
    )
    return verified


@contextlib.contextmanager
def _added(plain: Any, vectors: Vectors) -> Iterator[None]:
    """Add the vectors to their modules' outputs, as the tool's hooks do."""
    modules = dict(plain.base_model.named_modules())
    with contextlib.ExitStack() as stack:
        for name, vector in vectors.items():
            handle = modules[name].register_forward_hook(partial(_plus, vector))
            stack.callback(handle.remove)
        yield


def _plus(vector: Tensor, module: Any, given: Any, output: Tensor) -> Tensor:
    return output + vector.to(output)
