"""The paper's grids as data (arXiv 2406.01563): one block of runs for each of its tables and figures.

`paper/NAME` asks for the paper's models and tasks, `organism/NAME` for the embedded model's; NAME is one of `PARTS`, or `all`.
Other models and tasks take the same blocks: `paper_grid(parts, model=..., tasks=...)`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lofit_lens.errors import InputError, unknown
from lofit_lens.experiments.grid.specs import CHOSEN, PRESET, Grid, ModelSpec, Run, Selection, TaskSpec
from lofit_lens.experiments.methods.base import OWN, RANDOM
from lofit_lens.organism.words import TASKS

# The baselines of every claim about a head set: the unmodified model, the task's own heads, and as many random heads.
BASE = (
    Run(method=("zero-shot",), tested=True),
    Run(heads=(OWN,), tested=True, damage=True, readings=True),
    Run(heads=(RANDOM,), draws=5),
)  # fmt: skip
BLOCKS: dict[str, tuple[Run, ...]] = {
    "table1": (Run(method=("ITI", "RepE")), Run(heads=(OWN,), k=("3K",))),
    "table2": (Run(heads=("bias norm", "probe accuracy", "probing layers")),),
    "table3": (Run(method=("LoRA", "RED", "LoReFT")), Run(heads=(OWN,), k=("3K",))),
    "table5": (),
    "fig2": (Run(heads=(OWN,), of=("others",)),),
    "fig3": (),
    "fig4": (Run(method=("LoRA", "RED"), n_train=(10, 40)), Run(heads=(OWN,), n_train=(10, 40))),
    "fig5": (Run(heads=(OWN,), k=(1, "K", "3K", "20 %")),),
    "stability": (),
}
WHAT = {
    "table1": "LoFiT beside zero-shot, ITI and RepE", "table2": "heads by other selectors",
    "table3": "LoFiT beside LoRA, RED and LoReFT", "table5": "tuned adapters on other tasks and ordinary text",
    "fig2": "offsets on other tasks' heads", "fig3": "layers of the chosen heads", "fig4": "accuracy by training examples",
    "fig5": "accuracy by number of heads", "stability": "head selection with further seeds", "all": "all of these",
}  # fmt: skip
SCORES_ALONE = ("fig3", "stability")  # these need only head scores, no runs
PARTS = tuple(BLOCKS)
# The models of the paper, in the precision of its runs, and its three tasks. All use the bridge, which LoRA needs, so that all
# parts share their runs.
LLAMA_7B = ModelSpec(name="meta-llama/Llama-2-7b-hf", backend="bridge")
LLAMA_13B = ModelSpec(name="meta-llama/Llama-2-13b-hf", backend="bridge", dtype="bfloat16")
GEMMA = ModelSpec(name="google/gemma-7b", backend="bridge", dtype="bfloat16")
ALL_MODELS = (GEMMA, LLAMA_7B, LLAMA_13B)
MODELS: dict[str, tuple[ModelSpec, ...]] = {
    "table1": ALL_MODELS,
    "fig3": ALL_MODELS,
    "all": ALL_MODELS,
}  # others: Llama-2-7B
PAPER_TASKS = (TaskSpec(name="truthfulqa", fold=0), TaskSpec(name="mquake"), TaskSpec(name="clutrr"))
OUT_OF_DOMAIN = ("triviaqa", "nq", "mmlu")


def paper_grid(
    parts: Iterable[str],
    *,
    name: str,
    model: Any,
    tasks: Sequence[str | TaskSpec],
    other_tasks: Sequence[str | TaskSpec] = (),
    texts: str | None = None,
    seeds: Sequence[int] = (0, 1),
    draws: int = 5,
    limit: int | None = None,
    batch_size: int | None = None,
    tune: bool = False,
    readings: bool = False,
) -> Grid:
    """Make a grid of some parts of the paper for any model and tasks.

    Args:
        parts: names in `PARTS`; `"all"` = all.
        name: name of the grid.
        model: a name, a `ModelSpec`, or several.
        tasks: tasks to train on and test.
        other_tasks: tasks that the task's own adapters are tested on too (Table 5).
        texts: ordinary text for damage; see `load_texts`.
        seeds: seeds of selection and fits; head selection uses two more if its stability is requested.
        draws: number of draws of random heads.
        limit: use only the first test rows.
        batch_size: batch size of the evaluations, as in `evaluate`.
        tune: choose every trained method's learning rate on the validation rows, not only the settings of ITI and RepE.
        readings: also read what the adapters reveal about the model (`experiments.readings`).

    Raises:
        InputError: an unknown part, or a value out of range.

    Examples:
        >>> grid = paper_grid(["fig5"], name="mine", model="organism", tasks=["organism/truth"])
        >>> [run.k for run in grid.runs if run.heads == ("A-norm",)]
        [(1, 'K', '3K', '20 %'), ('K',), ('K',)]
    """
    asked = list(parts)
    for part in asked:
        if part not in (*PARTS, "all"):
            raise unknown("part", part, (*PARTS, "all"))
    if not asked:
        raise InputError(f"no part of the paper is given; give at least one of {', '.join(PARTS)}, or all")
    wanted = PARTS if "all" in asked else tuple(p for p in PARTS if p in asked)
    runs = [run for part in wanted for run in BLOCKS[part]]
    if any(part not in SCORES_ALONE for part in wanted):
        runs += BASE
    changed = tuple(
        _with(
            run,
            draws=draws,
            tune=tune,
            fresh="table5" in wanted and bool(other_tasks),
            measured=texts is not None,
            readings=readings,
        )
        for run in runs
    )
    extra = tuple(range(max(seeds, default=0) + 1, max(seeds, default=0) + 3))
    selections = {OWN: Selection(by=OWN, seeds=extra)} if "stability" in wanted else {}
    scores = (OWN, "gradient attribution") if "table2" in wanted else (OWN,)
    return Grid(
        name=name, model=model, tasks=_tasks(tasks), other_tasks=_tasks(other_tasks) if "table5" in wanted else (),
        texts=texts, seeds=tuple(seeds), limit=limit, batch_size=batch_size, selections=selections, scores=scores,
        runs=tuple(dict.fromkeys(changed)),
    )  # fmt: skip


def _tasks(named: Sequence[str | TaskSpec]) -> tuple[TaskSpec, ...]:
    return tuple(TaskSpec(name=t) if isinstance(t, str) else t for t in named)


def _with(run: Run, *, draws: int, tune: bool, fresh: bool, measured: bool, readings: bool) -> Run:
    """The block with the requested fields; a field that it does not read is unchanged."""
    changes: dict[str, Any] = {"tested": fresh} if run.tested else {}
    if run.damage:
        changes["damage"] = measured
    if run.readings:
        changes["readings"] = readings
    if RANDOM in run.heads:
        changes["draws"] = draws
    if all(method.fit is not None for method in run.methods):
        # There are no presets for methods that are not trained.
        untrained = all(method.config is None for method in run.methods)
        changes["settings"] = CHOSEN if tune or untrained else PRESET
    return run.model_copy(update=changes)


def known_grids() -> dict[str, str]:
    """Name -> description of the grids that come with the library."""
    found = {}
    for part in (*PARTS, "all"):
        models = len(MODELS.get(part, (LLAMA_7B,)))
        found[f"paper/{part}"] = f"{WHAT[part]} ({'Llama-2-7B' if models == 1 else 'Gemma-7B, Llama-2-7B and 13B'})"
    return found | {f"organism/{part}": f"{WHAT[part]} (embedded model)" for part in (*PARTS, "all")}


def grid_named(name: str) -> Grid:
    """A grid that comes with the library.

    Raises:
        InputError: no such grid.
    """
    if name not in known_grids():
        raise unknown("grid", name, known_grids(), hint="Or give a YAML file.")
    family, part = name.split("/")
    if family == "organism":
        return paper_grid(
            [part], name=name, model=ModelSpec(name="organism", backend="bridge"), tasks=[f"organism/{t}" for t in TASKS],
            other_tasks=[f"organism/{t}-cued" for t in TASKS], texts="organism",
        )  # fmt: skip
    return paper_grid(
        [part],
        name=name,
        model=MODELS.get(part, (LLAMA_7B,)),
        tasks=PAPER_TASKS,
        other_tasks=OUT_OF_DOMAIN,
        texts="wikitext",
    )
