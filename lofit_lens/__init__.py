"""lofit_lens: LoFiT (arXiv 2406.01563) on TransformerLens. Which attention heads does a task use, and how to steer it there.

    z <- (1 + A) * z + v        at every chosen head's hook_z

>>> import lofit_lens as ll
>>> str(ll.Head.parse("L12H7"))
'L12H7'
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lofit_lens.evaluation import Damage, EvalResult, compare, damage, evaluate, generate, over_seeds
    from lofit_lens.experiments.comparison import compare_methods, compare_selectors, tune_method
    from lofit_lens.experiments.grid.paper import paper_grid
    from lofit_lens.experiments.grid.run import read_grid, run_grid
    from lofit_lens.experiments.grid.specs import Grid
    from lofit_lens.experiments.localisation import localisation
    from lofit_lens.experiments.methods import Method
    from lofit_lens.experiments.tables.load import load_results
    from lofit_lens.explorer import explore
    from lofit_lens.heads import Head, HeadScores, HeadSet
    from lofit_lens.interventions import (
        ITI,
        ContrastVectors,
        Intervention,
        Lofit,
        Lora,
        LoReft,
        PostBlock,
        Red,
        RepE,
        attached,
        edit_z,
        load_adapter,
        load_lora,
    )
    from lofit_lens.models import Positions, load_model, model_info
    from lofit_lens.probing import fit_probes, probe_heads, reading_vectors
    from lofit_lens.sharing import (
        export_circuit,
        export_folded,
        export_peft,
        export_steered,
        export_svec,
        import_folded,
        import_lofit,
        import_svec,
        inspect_model,
        lm_eval_model,
        to_vllm,
    )
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
    from lofit_lens.training.counts import parameter_counts

_PARTS = (
    "analysis", "evaluation", "experiments", "explorer", "heads", "interventions", "models", "organism", "plots", "probing",
    "report", "sharing", "tasks", "training",
)  # fmt: skip
_HOMES = {
    "evaluation": "Damage EvalResult compare damage evaluate generate over_seeds",
    "experiments.comparison": "compare_methods compare_selectors tune_method",
    "experiments.localisation": "localisation",
    "experiments.grid.run": "read_grid run_grid",
    "experiments.grid.paper": "paper_grid",
    "experiments.tables.load": "load_results",
    "experiments.grid.specs": "Grid",
    "experiments.methods": "Method",
    "explorer": "explore",
    "heads": "Head HeadScores HeadSet",
    "interventions": (
        "ITI ContrastVectors Intervention LoReft Lofit Lora PostBlock Red RepE attached edit_z load_adapter load_lora"
    ),
    "models": "Positions load_model model_info",
    "probing": "fit_probes probe_heads reading_vectors",
    "sharing": (
        "export_circuit export_folded export_peft export_steered export_svec import_folded import_lofit import_svec "
        "inspect_model lm_eval_model to_vllm"
    ),
    "tasks": "Task load_task",
    "training": (
        "PLAIN LofitRun Passes Preset TrainConfig fit learned_scores preset select_heads tune_many tune_offsets tune_scalings"
    ),
    "training.counts": "parameter_counts",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Everything is read when it is first asked for: torch, transformers and the like are slow to import."""
    if name in _HOME:
        globals()[name] = found = getattr(importlib.import_module(f"lofit_lens.{_HOME[name]}"), name)
        return found
    if name in _PARTS:
        return importlib.import_module(f"lofit_lens.{name}")
    raise AttributeError(f"module 'lofit_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What a user calls: not what this file imports."""
    return sorted({*_HOME, *_PARTS, "errors", "__doc__", "__version__"})


__version__ = "0.2.0"

__all__ = [
    "ITI", "PLAIN", "ContrastVectors", "Damage", "EvalResult", "Grid", "Head", "HeadScores", "HeadSet", "Intervention", "LoReft",
    "Lofit", "LofitRun", "Lora", "Method", "Passes", "Positions", "PostBlock", "Preset", "Red", "RepE", "Task", "TrainConfig",
    "attached", "compare", "compare_methods", "compare_selectors", "damage", "edit_z", "evaluate", "explore", "export_circuit",
    "export_folded", "export_peft", "export_steered", "export_svec", "fit", "fit_probes", "generate", "import_folded",
    "import_lofit", "import_svec", "inspect_model", "learned_scores", "lm_eval_model", "load_adapter", "load_lora", "load_model",
    "load_results", "load_task", "localisation", "model_info", "over_seeds", "paper_grid", "parameter_counts", "preset",
    "probe_heads", "read_grid", "reading_vectors", "run_grid", "select_heads", "to_vllm", "tune_many", "tune_method",
    "tune_offsets", "tune_scalings",
]  # fmt: skip
