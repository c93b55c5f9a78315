"""Compare methods on the same rows, metric, tuning budget and seeds (the paper's Tables 1, 2 and 3). A comparison is a grid.

Each method's settings are chosen on the validation rows; then it is fitted once per seed and sees the test rows once. Head
selectors are compared in the same way with the preset's settings: each is followed by offset tuning.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lofit_lens.errors import InputError, TrainingDiverged, unknown
from lofit_lens.experiments.executors.runner import Report, run_cells
from lofit_lens.experiments.grid.compute import choice, compute
from lofit_lens.experiments.grid.run import plan_grid, run_grid
from lofit_lens.experiments.grid.specs import CHOSEN, PRESET, Grid, ModelSpec, Run, TaskSpec
from lofit_lens.experiments.methods import METHODS, Method, lofit, method_of
from lofit_lens.experiments.methods.base import OWN, RANDOM
from lofit_lens.experiments.methods.choice import Settings, Tuned
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.experiments.tables.results import Results
from lofit_lens.experiments.tables.table import MethodTable
from lofit_lens.tasks.base import Task
from lofit_lens.training.selectors import SELECTORS

DRAWS = 5  # number of draws of random heads
Block = tuple[Method, dict[str, Any]]
"""A row of a comparison as a block of a grid: its method and the fields of `Run` beside it."""


def rows_of(methods: Iterable[Method], draws: int = DRAWS) -> dict[str, Block]:
    """Name of each row -> its runs; a method whose runs name its heads has three rows: random heads, 3 % and 10 %."""
    found: dict[str, Block] = {}
    for method in methods:
        if method.heads == "chosen":
            found[method.row(RANDOM)] = method, {"heads": RANDOM, "draws": draws}
            found[own_row(method)] = method, {"heads": OWN}
            found[method.row(OWN, 3, 1, 3)] = method, {"heads": OWN, "k": "3K"}
        else:
            found[method.row()] = method, {}
    return found


def own_row(method: Method) -> str:
    """Name of a method's main row; if its runs name heads, the one on the task's own heads with the preset's K."""
    return method.row(OWN, 1, 1, 3)


REFERENCE = own_row(lofit.METHOD)


def compare_methods(
    model: Any,
    task: Task,
    *,
    methods: Sequence[str | Method] | None = None,
    settings: Mapping[str, Settings] | None = None,
    seeds: Sequence[int] = (0, 1),
    tuning_seeds: Sequence[int] = (0,),
    split: str = "test",
    limit: int | None = None,
    n_train: int | None = None,
    texts: Iterable[str] = (),
    reference: str = REFERENCE,
    batch_size: int | None = None,
    workers: int = 1,
    device: str | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> MethodTable:
    """Compare LoFiT with zero-shot, random heads and the other methods (`experiments/methods/`) on one task.

    Args:
        model: any HookedTransformer or TransformerBridge; or a name, a folder or a `ModelSpec`, needed for several workers.
        task: a task with training rows, and with validation rows unless all settings are given.
        methods: names of rows, or your own methods; None = all rows of the library's methods.
        settings: row -> settings to use instead of a choice.
        seeds: each method is fitted with each seed; random heads are drawn at least five times; zero-shot runs once.
        tuning_seeds: seeds of the trials.
        split: the split to test on.
        limit: only its first rows.
        n_train: training rows drawn; None = the task's own number.
        texts: ordinary texts on which damage is measured; empty = not measured.
        reference: the row that the others are tested against.
        batch_size: of the evaluation, as in `evaluate`.
        workers: processes, each on one thread.
        device: of a model given by name.
        out: folder of a store for the runs; what is in it is not computed again. None = they are not kept.
        progress: show what is done and the time left.

    Raises:
        InputError: an unknown method, no seed, a reference that is not compared, several workers with a model in memory, or a
            run that failed.
        ModelError: a method that is not available for this model (found before the first fit).
        TrainingDiverged: training gave NaN or infinity.
    """
    given = [own_row(method_of(m)) if isinstance(m, Method) else m for m in methods or ()]
    known = rows_of(METHODS.values(), max(DRAWS, len(seeds)))
    names = [name for name, (method, _) in known.items() if not method.source] if methods is None else given
    for name in (*names, *(settings or {})):
        if name not in known:
            raise unknown("method", name, known)
    reference = own_row(METHODS[reference]) if reference in METHODS else reference
    if not names or not seeds:
        raise InputError(f"{len(names)} methods, {len(seeds)} seeds; give at least one of each")
    if len(set(names)) < len(names):
        raise InputError(f"a method is given twice: {', '.join(names)}")
    if reference not in names:
        raise InputError(
            f"the reference {reference!r} is not among the methods compared ({', '.join(names)}); name one of them"
        )
    if len(names) < 2:
        raise InputError(f"only {names[0]} is given; name another method to compare it with")
    texts = list(texts)
    runs = []
    for name in names:
        method, fields = known[name]
        if method.fit is not None:
            wanted = CHOSEN if settings is None or name not in settings else dict(settings[name])
            fields = {**fields, "settings": wanted, "damage": bool(texts)}
        runs.append(Run(method=(method.name,), **fields))
    grid = one_task_grid(
        "compare", model, task, runs, seeds=tuple(seeds), tuning_seeds=tuple(tuning_seeds), split=split, limit=limit,
        batch_size=batch_size,
    )  # fmt: skip
    with grid_results(
        grid, model, [task], n_train, out, texts=texts, workers=workers, device=device, progress=progress
    ) as results:
        table = results.method_table(task.name, reference)
    assert table is not None
    return table


def compare_selectors(
    model: Any,
    task: Task,
    *,
    selectors: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    split: str = "test",
    limit: int | None = None,
    n_train: int | None = None,
    batch_size: int | None = None,
    workers: int = 1,
    device: str | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> MethodTable:
    """Compare head selectors, each followed by offset tuning with the preset's settings (the paper's Table 2).

    Args:
        model: as in `compare_methods`.
        task: with training rows.
        selectors: names (see `training.selectors.SELECTORS`); None = all. The A-norm, the reference, is always included.
        seeds: seeds of selection and tuning; random heads are drawn at least five times.
        split: as in `compare_methods`, like all arguments below.
        limit: only its first rows.
        n_train: training rows drawn.
        batch_size: of the evaluation, as in `evaluate`.
        workers: processes.
        device: of a model given by name.
        out: folder of a store for the runs.
        progress: show what is done and the time left.

    Raises:
        InputError: an unknown selector, or as in `compare_methods`.
    """
    for name in selectors or ():
        if name not in SELECTORS:
            raise unknown("selector", name, SELECTORS)
    names = [name for name in SELECTORS if selectors is None or name in (OWN, *selectors)]
    runs = [Run(heads=tuple(name for name in names if name != RANDOM), settings=PRESET)]
    if RANDOM in names:
        runs.append(Run(heads=(RANDOM,), draws=max(DRAWS, len(seeds))))
    grid = one_task_grid(
        "compare selectors", model, task, runs, seeds=tuple(seeds), split=split, limit=limit, batch_size=batch_size
    )
    with grid_results(grid, model, [task], n_train, out, workers=workers, device=device, progress=progress) as results:
        table = results.selector_table(task.name)
    if table is None:
        raise InputError(f"only the selector {names[0]} is given; name another one to compare it with")
    return table


def tune_method(
    model: Any,
    task: Task,
    method: str | Method,
    *,
    grid: Sequence[Settings] | None = None,
    seeds: Sequence[int] = (0,),
    n_train: int | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Tuned:
    """Fit a method at every point of a grid, on the training rows, and keep the point that is best on the validation rows.

    The best point has the largest mean of the task's own metric over seeds; ties go to the first in the grid, whose points
    go from weak to strong. The test rows are not used. A method whose runs name its heads is fitted on the task's own.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: with training and validation rows.
        method: a name, or your own method.
        grid: settings to try; None = the method's own points.
        seeds: each point is tried with each seed.
        n_train: training rows drawn; None = the task's own number.
        batch_size: of the evaluation, as in `evaluate`.
        out: folder of a store for the trials; trials that it already holds are not run again. None = they are not kept.
        progress: show what is done and the time left.

    Raises:
        InputError: unknown method, an empty grid, no seed, nothing to choose, or a task without validation rows.
        TrainingDiverged: every point diverged.
    """
    known = rows_of(METHODS.values())
    chosen = known[method][0] if isinstance(method, str) and method in known else method_of(method)
    if not seeds or (grid is not None and not grid):
        raise InputError(
            f"{len(grid or ())} settings and {len(seeds)} seeds to try for {chosen.name}; give at least one of each"
        )
    points = CHOSEN if grid is None else tuple(dict(point) for point in grid)
    asked = one_task_grid(
        "tune",
        model,
        task,
        [Run(method=(chosen.name,), settings=points)],
        tuning_seeds=tuple(seeds),
        batch_size=batch_size,
    )
    task = _with_rows(task, n_train)
    planned = plan_grid(asked, model=model, tasks=[task])
    fit = next(cell for cell in planned.cells if cell.row["kind"] == "fit")
    trials = fit.spec["chosen"]
    if trials is None:
        raise InputError(f"{chosen.name} has no settings to choose")
    with _folder(out) as folder:
        store = Store(folder)
        needed = [cell for cell in planned.cells if cell.row["kind"] in ("scores", "trial")]
        _check(run_cells(store, needed, compute, planned.context, progress=progress))
        return choice(store, trials, chosen.name, task.name, task.metric)


def one_task_grid(kind: str, model: Any, task: Task, runs: Sequence[Run], **fields: Any) -> Grid:
    """Make a grid of these runs on one model and task, named after its kind and the task."""
    if not isinstance(model, ModelSpec):
        model = ModelSpec(name=str(model) if isinstance(model, str | Path) else "in memory")
    name = re.sub(r"[^A-Za-z0-9._ +-]+", "-", f"{kind} {task.name}")[:100]
    return Grid(name=name, model=(model,), tasks=(TaskSpec(name=task.name),), runs=tuple(runs), **fields)


@contextlib.contextmanager
def grid_results(
    grid: Grid, model: Any, tasks: Sequence[Task], n_train: int | None, out: str | Path | None, *, workers: int,
    device: str | None, progress: bool, texts: Sequence[str] = (), other_tasks: Sequence[Task] = (),
) -> Iterator[Results]:  # fmt: skip
    """Run the grid and read it, from a store that is deleted after the block unless `out` is given."""
    by_name = isinstance(model, str | Path | ModelSpec)
    with _folder(out) as folder:
        report = run_grid(
            grid, folder, model=None if by_name else model, tasks=[_with_rows(t, n_train) for t in tasks],
            other_tasks=other_tasks, texts=texts, workers=workers, device=device, progress=progress,
        )  # fmt: skip
        _check(report)
        yield load_results(folder, grids=[grid.name])


def _with_rows(task: Task, n_train: int | None) -> Task:
    return task if n_train is None else replace(task, n_train=n_train)


@contextlib.contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="lofit-lens-") as folder:
        yield Path(folder)


def _check(report: Report) -> None:
    """Raise the error of the first failed run.

    Raises:
        TrainingDiverged: it diverged.
        InputError: any other failure.
    """
    if not report.failed:
        return
    name, error = next(iter(report.failed.items()))
    kind, _, text = error.partition(": ")
    if kind == TrainingDiverged.__name__:
        raise TrainingDiverged(text)
    others = f" and {len(report.failed) - 1} other runs" if len(report.failed) > 1 else ""
    raise InputError(f"the run {name}{others} failed: {text or kind}")
