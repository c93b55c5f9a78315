"""Read an adapter folder of any method."""

from pathlib import Path
from typing import Any

from lofit_lens.errors import AdapterError
from lofit_lens.interventions import (  # noqa: F401 (each registers its class)
    ablation,
    contrast,
    iti,
    lofit,
    lora,
    loreft,
    post_block,
    red,
    repe,
)
from lofit_lens.interventions.base import KNOWN, Adapter
from lofit_lens.interventions.files import CONFIG_FILE, located_adapter, read_config


def method_in(folder: str | Path) -> str:
    """Return the name of the method whose adapter a folder holds.

    Raises:
        AdapterError: it holds no adapter, or one of an unknown method.
    """
    method = read_config(folder)["method"]
    if method not in KNOWN:
        raise AdapterError(
            f"{Path(folder) / CONFIG_FILE} describes an adapter of method {method!r}; known: {', '.join(KNOWN)}. For a method of "
            "your own, first import the file that holds its class"
        )
    return method


def load_adapter(folder: str | Path, *, model: Any = None, revision: str | None = None, strict: bool = True) -> Adapter:
    """Load an adapter from a folder or the Hugging Face hub as its own class; with `model`, checked against it, on its device.

    Args:
        folder: an adapter folder, or `"user/name"` on the hub.
        model: see `Adapter.from_pretrained`, also for the next two.
        revision: hub commit, tag or branch.
        strict: refuse a `model` with other weights.

    Raises:
        AdapterError: no adapter, an unknown method, damaged files, another shape or other weights.
        InputError: neither a folder nor a repository that can be reached.
        ModelError: a model that the method cannot be attached to (LoRA needs a TransformerBridge).
    """
    found, source = located_adapter(folder, revision)
    made = KNOWN[method_in(found)].from_pretrained(found, model=model, strict=strict)
    made.meta.source = source
    return made
