"""Proofs that a shortcut works for a checkpoint, kept in the user's cache folder.

A shortcut of a pass is tried on a few tokens before it is used, which costs several passes. A result for the same weights,
configuration, versions and device in another process still holds. Only proofs are kept: a refusal is tried again.
"""

import contextlib
import functools
import json
import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.models.info import backend_of, device_of, origin_of
from lofit_lens.models.sources import cache_folder

LEAST = 10_000_000  # parameters; trying a smaller model is faster than looking it up
CODE = ("attending", "fused", "gathered", "running", "scored")  # the modules whose shortcuts are proven
# Fields of a configuration that say where it is, not what it is.
NAMES = ("_name_or_path", "name_or_path", "model_name", "tokenizer_name")


class Once:
    """A proof that is tried once per model, device and dtype in this process, and kept for other processes if it holds.

    Args:
        proof: returns True if it holds for a model, else why not; None if that cannot be decided now.
        what: name of what is proven.
    """

    def __init__(self, proof: Callable[[Any], bool | str | None], what: str) -> None:
        self.proof, self.what = proof, what
        self.known: weakref.WeakKeyDictionary[Any, dict[Any, bool | str]] = weakref.WeakKeyDictionary()
        functools.update_wrapper(self, proof)

    def __call__(self, model: Any) -> bool:
        """Return whether it holds."""
        return self.refusal(model) is None

    def refusal(self, model: Any) -> str | None:
        """Return why it does not hold; None if it does."""
        known, key = self.known.setdefault(model, {}), (device_of(model), next(model.parameters()).dtype)
        if key not in known and is_proven(model, self.what):
            known[key] = True
        if key not in known:
            found = self.proof(model)
            if found is None:
                return f"{self.what}: it cannot be decided now"
            known[key] = found
            if found is True:
                keep_proof(model, self.what)
        return None if known[key] is True else str(known[key] or f"{self.what}: it does not hold")


def proven_once(what: str) -> Callable[[Callable[[Any], bool | str | None]], Once]:
    """Decorate a proof so that it is tried once (see `Once`)."""
    return functools.partial(Once, what=what)


def is_proven(model: Any, what: str) -> bool:
    """Return whether this was proven for the same model, in any process."""
    return _is_large(model) and _file(model, what).is_file()


def keep_proof(model: Any, what: str) -> None:
    """Remember that this was proven; a cache that cannot be written is ignored."""
    if _is_large(model):
        with contextlib.suppress(OSError, InputError):
            file = _file(model, what)
            file.parent.mkdir(parents=True, exist_ok=True)
            io.write_json(file, {"proven": what, "model": origin_of(model).name, **io.environment()})


def _is_large(model: Any) -> bool:
    return sum(p.numel() for p in model.parameters()) >= LEAST


def _file(model: Any, what: str) -> Path:
    hf = getattr(model, "original_model", None)
    config = model.cfg.to_dict() if hf is None else hf.config.to_dict()
    told = {k: v for k, v in config.items() if k not in NAMES}
    device = device_of(model)
    key = {
        "what": what, "revision": origin_of(model).revision, "class": backend_of(model),
        "config": json.dumps(told, sort_keys=True, default=str), "dtype": str(next(model.parameters()).dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_processor()}",
        "code": _code(), **io.environment(),
    }  # fmt: skip
    return cache_folder() / "proofs" / f"{io.digest(key)}.json"


@functools.cache
def _code() -> str:
    return io.digest([io.file_digest(Path(__file__).with_name(f"{name}.py")) for name in CODE])


@functools.cache
def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
