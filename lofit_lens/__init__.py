"""lofit_lens: LoFiT (arXiv 2406.01563) on TransformerLens. Which attention heads does a task use, and how to steer it there.

    z <- (1 + A) * z + v        at every chosen head's hook_z

>>> import lofit_lens as ll
>>> str(ll.Head.parse("L12H7"))
'L12H7'
"""

import importlib
from typing import Any

from lofit_lens.evaluation import Damage, EvalResult, compare, damage, evaluate, generate, over_seeds
from lofit_lens.heads import Head, HeadScores, HeadSet
from lofit_lens.interventions import (
    ITI,
    ContrastVectors,
    Intervention,
    Lofit,
    Lora,
    LoReft,
    Red,
    RepE,
    attached,
    edit_z,
    load_adapter,
    load_lora,
)
from lofit_lens.models import Positions, load_model, model_info
from lofit_lens.organism import tasks as _organism_tasks  # registers organism/...
from lofit_lens.tasks import Task, load_task
from lofit_lens.training import (
    PLAIN,
    LofitRun,
    Passes,
    Preset,
    TrainConfig,
    fit,
    learned_scores,
    preset,
    select_heads,
    tune_many,
    tune_offsets,
    tune_scalings,
)

del _organism_tasks


_PARTS = ("analysis", "experiments", "plots", "probing", "report", "sharing")
_LATER = {
    "Grid": "experiments.specs", "compare_methods": "experiments.comparison", "compare_selectors": "experiments.comparison",
    "explore": "explorer",
    "export_folded": "sharing", "export_iti": "sharing", "export_peft": "sharing", "export_svec": "sharing",
    "fit_probes": "probing", "import_folded": "sharing", "import_iti": "sharing", "import_lofit": "sharing",
    "import_svec": "sharing", "load_results": "experiments.results", "paper_grid": "experiments.paper",
    "parameter_counts": "training.counts", "probe_heads": "probing", "read_grid": "experiments.specs",
    "reading_vectors": "probing", "run_grid": "experiments.grid", "tune_method": "experiments.tuning",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Parts that need scikit-learn, plotly or peft are read when they are first asked for."""
    if name in _PARTS:
        return importlib.import_module(f"lofit_lens.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(f"lofit_lens.{_LATER[name]}"), name)
    raise AttributeError(f"module 'lofit_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER, *_PARTS})


__version__ = "0.1.0"

__all__ = [
    "ITI", "PLAIN", "ContrastVectors", "Damage", "EvalResult", "Head", "HeadScores", "HeadSet", "Intervention", "LoReft", "Lofit",
    "LofitRun", "Lora", "Passes", "Positions", "Preset", "Red", "RepE", "Task", "TrainConfig", "attached", "compare", "damage",
    "edit_z", "evaluate", "fit", "generate", "learned_scores", "load_adapter", "load_lora", "load_model", "load_task",
    "model_info", "over_seeds", "preset", "select_heads", "tune_many", "tune_offsets", "tune_scalings",
]  # fmt: skip
