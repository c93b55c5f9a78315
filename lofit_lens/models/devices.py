"""The device, or devices, that hold a model's weights.

A device map places layers on several (through `accelerate`): Hugging Face reads each tensor straight to its device, and hooks
move the residual stream from one to the next. Offloaded weights, which are kept on the CPU or on disk and fetched for every
pass, are refused: the bridge reads weights without fetching them first.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lofit_lens.checks import shown
from lofit_lens.errors import InputError, ModelError

KINDS = ("cpu", "cuda")
PLANS = ("auto", "balanced", "balanced_low_0", "sequential")  # strategies by which accelerate makes a map itself


def parse_device(device: str | torch.device | None) -> torch.device:
    """Turn a device name into a device that exists here.

    Raises:
        InputError: not a device name, or no such device on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise InputError(f"unknown device {str(device)!r}; allowed: cpu, cuda, cuda:0, cuda:1, ...") from e
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {device} here: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    if parsed.type not in KINDS:
        raise InputError(
            f"device {device} is not supported (TransformerLens gives silent errors on MPS); use cpu or cuda"
        )
    return parsed


def check_placing(device: Any, device_map: Any, max_memory: Any, backend: str, *, in_memory: bool) -> None:
    """Check that the arguments of `load_model` about devices fit together.

    Raises:
        InputError: they do not, a device that does not exist here, or weights that would be offloaded.
    """
    if device_map is None:
        if max_memory is not None:
            raise InputError('max_memory bounds what device_map="auto" puts on each device; give that too')
        return
    if device is not None:
        raise InputError(
            f"device={str(device)!r} and device_map are both given; give device= for one device, device_map= for several"
        )
    if backend == "hooked":
        raise InputError(
            "HookedTransformer rebuilds the weights on one device, so it takes no device_map; use backend='bridge' or 'auto'"
        )
    if in_memory:
        raise InputError(
            "device_map places a model while it is read, and this one is in memory already; give device_map to Hugging Face's "
            "from_pretrained: load_model leaves the layers where they are"
        )
    if not (isinstance(device_map, Mapping) and device_map) and device_map not in PLANS:
        raise InputError(
            f"device_map is {shown(device_map)}; give one of {', '.join(PLANS)}, or a mapping of module names to devices, "
            '{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, ...}; device= names a single device'
        )
    if isinstance(device_map, Mapping):
        if away := _offloaded(device_map):
            raise InputError(f"device_map puts {away}; {NOT_FETCHED}: put them on a GPU, or the whole model on the CPU")
        for place in device_map.values():
            parse_device(f"cuda:{place}" if isinstance(place, int) else place)


def check_placed(hf: Any, name: str) -> None:
    """Refuse a Hugging Face model some of whose weights were offloaded for lack of memory.

    Raises:
        ModelError: some were; names them.
    """
    if away := _offloaded(getattr(hf, "hf_device_map", None) or {}):
        raise ModelError(
            f"{name} does not fit: its device map puts {away}; {NOT_FETCHED}. Allow it more memory (max_memory), or use a "
            "smaller dtype (dtype='bfloat16') or more GPUs"
        )


NOT_FETCHED = "offloaded weights are not supported, since the bridge reads weights without fetching them"


def _offloaded(device_map: Mapping[str, Any]) -> str:
    """Describe the modules on disk, or on the CPU while others are on GPUs; empty if there are none."""
    on_cpu = [name for name, place in device_map.items() if str(place) == "cpu"]
    away = [name for name, place in device_map.items() if str(place) in ("disk", "meta")]
    if len(on_cpu) < len(device_map) - len(away) or away:
        away += on_cpu
    if not away:
        return ""
    places = sorted({str(device_map[name]) for name in away})
    return f"{len(away)} modules (first: {away[0] or 'all'}) on {' and '.join(places)}"


def device_of_module(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Return the device of a module's first weight."""
    return next((p.device for p in module.parameters()), otherwise)


def runs_own_forward(module: nn.Module) -> bool:
    """Return whether a module runs its class's forward, possibly inside accelerate's wrapper, which only moves the inputs."""
    found = module.__dict__.get("forward")
    if found is not None and hasattr(module, "_hf_hook"):
        found = module.__dict__.get("_old_forward", found)
    return found is None or getattr(found, "__func__", None) is type(module).forward
