"""Read an adapter folder of any method."""

from pathlib import Path
from typing import Any

from lofit_lens.errors import AdapterError
from lofit_lens.interventions.ablation import HeadAblation
from lofit_lens.interventions.base import CONFIG_FILE, Adapter, read_config
from lofit_lens.interventions.contrast import ContrastVectors
from lofit_lens.interventions.iti import ITI
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.interventions.lora import Lora
from lofit_lens.interventions.loreft import LoReft
from lofit_lens.interventions.red import Red
from lofit_lens.interventions.repe import RepE

CLASSES: dict[str, type[Adapter]] = {
    c.method: c for c in (Lofit, ITI, RepE, ContrastVectors, Red, LoReft, Lora, HeadAblation)
}


def method_in(folder: str | Path) -> str:
    """Name of the method whose adapter a folder holds.

    Raises:
        AdapterError: it holds no adapter, or one of an unknown method.
    """
    method = read_config(folder)["method"]
    if method not in CLASSES:
        raise AdapterError(
            f"{Path(folder) / CONFIG_FILE} describes an adapter of method {method!r}; known: {', '.join(CLASSES)}"
        )
    return method


def load_adapter(folder: str | Path, *, model: Any = None) -> Adapter:
    """The adapter that a folder holds, as its own class; with `model`, checked against it and on its device.

    Raises:
        AdapterError: no adapter, an unknown method, damaged files, or another shape.
        ModelError: a model that the method cannot be attached to (LoRA needs a TransformerBridge).
    """
    return CLASSES[method_in(folder)].from_pretrained(folder, model=model)
