"""Models whose layers lie on several devices, as `accelerate` places them by a device map.

Hugging Face reads each tensor straight to its device, and hooks of `accelerate` hand the residual stream on from one to the
next. Weights that are kept elsewhere and fetched for every pass (offloaded to the CPU or to disk) are refused: the bridge reads
weights without asking for them first, and each pass would wait for all of them.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lofit_lens.checks import shown
from lofit_lens.errors import InputError, ModelError

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")  # how accelerate itself makes a map
FETCHED = "the bridge reads weights that are not there, and each pass would wait for them"
ROOM = "leave more room (max_memory), take a smaller dtype (bfloat16), or more GPUs"


def check_placing(device: Any, device_map: Any, max_memory: Any, backend: str, *, in_memory: bool) -> None:
    """See that what `load_model` was told about places goes together.

    Raises:
        InputError: it does not, or a place that is none for weights (the CPU beside GPUs, disk, meta).
    """
    if device_map is None:
        if max_memory is not None:
            raise InputError('max_memory says how device_map="auto" may share a model out; give that too')
        return
    if device is not None:
        raise InputError(f"device={str(device)!r} and device_map are both given; give device_map alone for several devices")
    if backend == "hooked":
        raise InputError(
            "device_map is not for HookedTransformer, which rebuilds the weights on one device; take backend='bridge' or 'auto'"
        )
    if in_memory:
        raise InputError(
            "device_map places a model while it is read, and this one is in memory; give it to from_pretrained of Hugging "
            "Face: load_model keeps a model where its own device map says"
        )
    if isinstance(device_map, Mapping) and device_map:
        check_places(device_map.values(), InputError, "map every layer to a GPU")
    elif device_map not in PLANS:
        raise InputError(
            f"device_map is {shown(device_map)}; give one of {', '.join(PLANS)}, or a mapping such as "
            '{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, ...}; for one device there is device='
        )


def check_places(places: Any, error: type[Exception], instead: str) -> None:
    """Raise an error if weights of a device map's values would be fetched for each pass."""
    kinds = {str(place): "cuda" if isinstance(place, int) else str(place).split(":")[0] for place in places}
    away = [place for place, kind in kinds.items() if kind in ("disk", "meta") or (kind == "cpu" and len({*kinds.values()}) > 1)]
    if away:
        raise error(f"device_map leaves weights on {' and '.join(sorted(away))} beside other devices: {FETCHED}; {instead}")


def check_placed(hf: Any, name: str) -> None:
    """Refuse a model of which some weights were offloaded.

    Raises:
        ModelError: names what was.
    """
    placed = getattr(hf, "hf_device_map", None) or {}
    check_places(placed.values(), ModelError, f"{name} does not fit on the devices as asked: {ROOM}")


def device_of_module(module: torch.nn.Module, otherwise: torch.device) -> torch.device:
    """Where a module's first weight lies."""
    return next((p.device for p in module.parameters()), otherwise)


def runs_own_forward(module: torch.nn.Module) -> bool:
    """Whether a module runs its class's forward, be it inside accelerate's, which only moves what goes in."""
    found = module.__dict__.get("forward")
    if found is not None and hasattr(module, "_hf_hook"):
        found = module.__dict__.get("_old_forward", found)
    return found is None or getattr(found, "__func__", None) is type(module).forward
