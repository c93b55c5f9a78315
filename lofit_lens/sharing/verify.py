"""Verify that an export computes the same logits as the hooked model, before it is kept.

The reference is the base model with the adapter attached by hooks, run on seeded random tokens of two lengths and on its own
answers to them. The export is then loaded by the tool that it is meant for, and run over the same tokens:

    error  = max |logits of the export - logits with the adapter attached|
    effect = max |logits with the adapter attached - logits without it|

An export that lacks a part of the edit is off by about the effect of that part, so an error is judged relative to the effect.
"""

import copy
import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import ModelError
from lofit_lens.interventions import Adapter
from lofit_lens.models import context_length, device_of, load_model, logits_of, model_info, parse_device
from lofit_lens.sharing.checkpoints import Checkpoint

RECORD, SCHEMA = "lofit_lens_export.json", 1
LENGTHS = (8, 33)  # lengths of the random prompts, in tokens
ANSWER = 8  # tokens of the greedy answer to each
EXACT = 1e-4  # allowed error in float32, relative to the logits' scale; tiny models stay below 1e-6, 40 random layers below 2e-6
HALF = 16.0  # allowed error in half precision, in multiples of the dtype's resolution
WELL_BELOW = 0.2  # maximum error relative to the effect


@dataclass(frozen=True)
class Verified:
    """How far an export is from the hooked model.

    Attributes:
        error: largest difference of a logit between export and hooked model.
        effect: largest change of a logit by the adapter.
        scale: largest absolute logit.
        same_greedy: whether all greedily answered tokens are the same.
        tokens: positions that were compared.
        dtype: dtype in which both ran.
    """

    error: float
    effect: float
    scale: float
    same_greedy: bool
    tokens: int
    dtype: str

    @property
    def bound(self) -> float:
        """The largest allowed error: within the dtype's rounding, and well below the effect."""
        kind = io.torch_dtype(self.dtype)
        part = HALF * torch.finfo(kind).eps if kind.itemsize < 4 else EXACT
        return min(part * self.scale, WELL_BELOW * self.effect)

    @property
    def passed(self) -> bool:
        """Whether there is an effect and the error is within the bound; False for NaN."""
        return self.effect > 0 and self.error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


@dataclass(frozen=True)
class Told:
    """One prompt with its greedy answer, `tokens[start:]`, and the float32 logits at every position, on the CPU."""

    tokens: Int[Tensor, " pos"]
    start: int
    logits: Float[Tensor, "pos d_vocab"]


@dataclass(frozen=True)
class Reference:
    """Outputs of the base model with the adapter attached by hooks, and how far they are from those without it."""

    told: tuple[Told, ...]
    effect: float
    dtype: str


def hooked_reference(
    adapter: Adapter,
    base: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
) -> Reference:
    """Load the base model, run it with and without the adapter, and free it again.

    Args:
        adapter: any method; it may be attached elsewhere.
        base: a folder, a hub id or `"organism"`.
        revision: hub commit, tag or branch.
        dtype: dtype in which the export will run.
        device: device; None = CUDA if available, else the CPU.

    Raises:
        AdapterError: an adapter that does not fit the model.
        ModelError: a model that cannot be loaded as a TransformerBridge.
    """
    model = load_model(base, backend="bridge", dtype=dtype, device=device, revision=revision)
    told, effect = _told(copy.deepcopy(adapter), model)
    del model
    gc.collect()  # a bridge refers to itself: its weights would stay in memory
    return Reference(told, effect, str(io.torch_dtype(dtype)).removeprefix("torch."))


def plain_model(folder: Path, dtype: str | torch.dtype, device: str | torch.device | None = None) -> Any:
    """Load a checkpoint as any user would: by plain transformers, with eager attention like the hooked model.

    Raises:
        InputError: an unknown type or device.
        ModelError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    kind, where = io.torch_dtype(dtype), parse_device(device)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=kind,
            use_safetensors=True,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as e:
        raise ModelError(f"transformers cannot load {folder}: {e}") from e
    return model.to(where)


@torch.no_grad()
def compared(reference: Reference, model: Any) -> Verified:
    """Run a Hugging Face or PEFT model over the reference's tokens and measure its distance from the reference."""
    model.eval()
    device = next(model.parameters()).device
    error, same = 0.0, True
    for one in reference.told:
        tokens = _batch(one, device)
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        error = _larger(error, _difference(logits, one))
        answer = logits[0, one.start - 1 : -1].argmax(-1).cpu()
        same = same and bool((answer == one.tokens[one.start :]).all())
    scale = max(float(one.logits.abs().max()) for one in reference.told)
    return Verified(
        error, reference.effect, scale, same, sum(len(one.tokens) for one in reference.told), reference.dtype
    )


def check(found: Verified, what: str) -> Verified:
    """Return the comparison if it passed.

    Raises:
        ModelError: the error is too large; says how large, and what to do.
    """
    if found.passed:
        return found
    measured = (
        f"{what} differs from the hooked model by {found.error:.3g} in a logit ({found.dtype}; logits up to {found.scale:.3g}, "
        f"the adapter changes them by up to {found.effect:.3g}); allowed: {found.bound:.2g}. It was not kept. "
    )
    if not math.isfinite(found.error):
        raise ModelError(measured + f"This model overflows in {found.dtype}: use dtype='float32' or 'bfloat16'")
    if found.effect == 0 or (found.error <= EXACT * found.scale and io.torch_dtype(found.dtype).itemsize >= 4):
        raise ModelError(
            measured + "The adapter's effect is lost in rounding, so the export cannot be told from the base"
        )
    if io.torch_dtype(found.dtype).itemsize < 4:
        raise ModelError(measured + "Half precision rounds too much to tell: use dtype='float32'")
    raise ModelError(measured + "Report it, with the base model's name and the versions of torch and transformers")


def write_record(
    folder: Path, kind: str, adapter: Adapter, base: Checkpoint, verified: Verified, more: Mapping[str, Any]
) -> None:
    """Write a record beside an export: its adapter and base, and the comparison with the hooked model."""
    io.write_json(folder / RECORD, {
        "kind": kind, "schema": SCHEMA,
        "base": {"name": base.name, "revision": base.revision, "architecture": base.architecture},
        "adapter": adapter._record() | {"history": [], "source": adapter.meta.source},
        **more, "verified": verified.to_dict(), "versions": io.environment() | {"peft": version("peft")},
    })  # fmt: skip


@torch.no_grad()
def _told(adapter: Adapter, model: Any) -> tuple[tuple[Told, ...], float]:
    """Prompts, answers and logits with the adapter attached, and the largest difference to the logits without."""
    device = device_of(model)

    def run(tokens: Int[Tensor, "1 pos"]) -> Tensor:
        return logits_of(model, tokens, torch.ones_like(tokens))

    lengths = [max(1, min(n, context_length(model) - ANSWER)) for n in LENGTHS]
    with adapter.attached(model):
        told = tuple(_answered(run, prompt) for prompt in _prompts(model_info(model).d_vocab, lengths, device))
    return told, max(_difference(run(_batch(one, device)), one) for one in told)


def _prompts(d_vocab: int, lengths: list[int], device: torch.device) -> list[Int[Tensor, "1 _"]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, d_vocab, (1, n), generator=generator).to(device) for n in lengths]


def _answered(run: Callable[[Tensor], Tensor], prompt: Int[Tensor, "1 pos"]) -> Told:
    """The prompt, its greedy answer and all logits, with one full forward pass per token: no KV cache that could differ."""
    tokens = prompt
    for _ in range(ANSWER):
        tokens = torch.cat([tokens, run(tokens)[:, -1:].argmax(-1).to(tokens)], dim=1)
    return Told(tokens[0].cpu(), prompt.shape[1], run(tokens)[0].float().cpu())


def _batch(one: Told, device: torch.device) -> Int[Tensor, "1 pos"]:
    return one.tokens[None].to(device)


def _difference(logits: Float[Tensor, "1 pos d_vocab"], one: Told) -> float:
    return float((logits[0].float().cpu() - one.logits).abs().max())


def _larger(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b  # NaN stays
