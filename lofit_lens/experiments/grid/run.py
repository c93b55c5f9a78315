"""Run a grid: load what it names, expand it into cells, compute those that the store does not hold.

    run_grid("organism/all", "runs/grid")             # again: nothing is computed
    run_grid("my-grid.yaml", "runs/grid", workers=2)

A store may hold several grids; what they share is computed once. `load_results(store)` reads it for tables and figures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from lofit_lens import io
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.texts import load_texts
from lofit_lens.experiments.executors.runner import Executor, Report, Work, run_cells
from lofit_lens.experiments.executors.schedule import TOGETHER
from lofit_lens.experiments.grid.compute import Context, compute
from lofit_lens.experiments.grid.expand import Setting, expand
from lofit_lens.experiments.grid.paper import grid_named, known_grids
from lofit_lens.experiments.grid.specs import HEADS_READ, Grid, ModelSpec, TaskSpec, listed
from lofit_lens.experiments.methods import USED, Outline, Workbench, use_file
from lofit_lens.experiments.methods.base import Method
from lofit_lens.experiments.methods.source import in_library
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Store
from lofit_lens.models import ModelInfo, fingerprint, folder_digest, model_info, planned_info, planned_tokenizer
from lofit_lens.tasks import TASKS, Task, load_task
from lofit_lens.tasks.sources import FORMATS
from lofit_lens.training.selectors import SELECTORS
from lofit_lens.training.trackers import tracker


@dataclass(frozen=True, eq=False)
class Planned:
    """A grid that is ready to be computed.

    Attributes:
        cells: every piece of work, once, after the cells that it needs.
        context: the objects that the cells' specs only name.
        records: name in the store -> record of the grid, one for each model.
        texts: ordinary texts of the grid.
    """

    cells: list[Cell]
    context: Context
    records: dict[str, dict[str, Any]]
    texts: tuple[str, ...]


def open_grid(grid: Grid | str | Path) -> Grid:
    """Return a grid unchanged, one that comes with the library by its name, or one from a YAML file.

    Raises:
        InputError: neither a known name nor a file.
        DataError: not YAML.
    """
    if isinstance(grid, Grid):
        return grid
    if str(grid) not in known_grids() and (Path(grid).is_file() or Path(grid).suffix in (".yaml", ".yml")):
        return read_grid(grid)
    return grid_named(str(grid))


def read_grid(path: str | Path) -> Grid:
    """A grid from a YAML file.

    Raises:
        DataError: unreadable, or not YAML; names the line.
        InputError: an unknown field, a wrong type or name; says where in the file and what is allowed.
    """
    try:
        found = yaml.safe_load(io.decoded(path))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        raise DataError(f"{path}{where} is not YAML: {getattr(e, 'problem', None) or e}") from e
    if not isinstance(found, dict):
        raise DataError(f"{path} holds {type(found).__name__}; a grid is a record with name, model, tasks and runs")
    try:
        for file in listed(found.get("code", ())):
            use_file(Path(path).parent / str(file))
        grid = Grid(**{str(k): v for k, v in found.items()})
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    beside = {part: tuple(_beside(path, t) for t in getattr(grid, part)) for part in ("tasks", "other_tasks")}
    return grid.model_copy(update=beside)


def plan_grid(
    grid: Grid | str | Path,
    *,
    model: Any = None,
    tasks: Sequence[Task] | None = None,
    other_tasks: Sequence[Task] | None = None,
    texts: Sequence[str] | None = None,
    device: str | None = None,
    track: str | None = None,
) -> Planned:
    """Open a grid's data and configurations and list its cells; no weights are read. Arguments and errors as in `run_grid`."""
    grid = open_grid(grid)
    if track is not None:
        tracker(track, ".")  # so that a missing package is reported now
    named = _by_name([_load(t) for t in grid.tasks] if tasks is None else tasks)
    others = _by_name([_load(t) for t in grid.other_tasks] if other_tasks is None else other_tasks)
    if both := [t for t in others if t in named]:
        raise InputError(
            f"{both[0]} is both a task and an other task of this grid; other tasks are those that nothing is tuned on"
        )
    if texts is None:
        wanted = grid.texts is not None and any(run.damage or run.readings for run in grid.runs)
        texts = list(islice(load_texts(str(grid.texts)), grid.n_texts)) if wanted else []
    _check_asked(grid, bool(others), bool(texts))
    digest = io.digest(list(texts)) if texts else ""
    load: dict[str, dict[str, Any]] = {}
    infos: dict[str, ModelInfo] = {}
    cells: dict[str, Cell] = {}
    records: dict[str, dict[str, Any]] = {}
    by_key: dict[str, Task] = {}
    for spec in map(_placed, grid.model) if model is None else (None,):
        info = _info(grid, spec) if spec is not None else model_info(model)
        files = folder_digest(spec.name) if spec is not None else fingerprint(model)
        asked, asked_too = (_asked_of(listed, spec, model) for listed in (named, others))
        setting = Setting(grid, info, asked, asked_too, digest, files)
        key = io.digest(setting.model_key)
        infos[key] = info
        by_key |= {io.digest(setting.task_keys[name]): task for name, task in (*asked.items(), *asked_too.items())}
        if spec is not None:
            commit = info.revision if info.revision and not info.revision.startswith("sha256:") else spec.revision
            load[key] = {
                "name_or_path": spec.name, "backend": info.backend, "dtype": spec.dtype, "revision": commit,
                "prepend_bos": spec.prepend_bos, "name": spec.called,
            }  # fmt: skip
        elif any(method.bridge for method in _methods(grid)):
            Workbench(model, next(iter(named.values()))).bridge()  # fails now rather than after the other fits
        mine = expand(setting)
        cells |= {cell.name: cell for cell in mine}
        name = grid.name if model is not None or len(grid.model) == 1 else f"{grid.name} {info.name}"
        if name in records:
            name = f"{name} {info.backend} {info.dtype}"
        records[name] = _record(setting, mine, digest)
    context = Context(load, infos, by_key, model, device, track, *_from_outside(grid))
    return Planned(list(cells.values()), context, records, tuple(texts))


Place = Callable[[Store, Work, Any], Executor]


def run_grid(
    grid: Grid | str | Path,
    store: str | Path,
    *,
    model: Any = None,
    tasks: Sequence[Task] | None = None,
    other_tasks: Sequence[Task] | None = None,
    texts: Sequence[str] | None = None,
    workers: int = 1,
    devices: Sequence[str] | None = None,
    executor: Place | None = None,
    retries: int = 1,
    together: int = TOGETHER,
    device: str | None = None,
    track: str | None = None,
    progress: bool = True,
) -> Report:
    """Compute the cells of a grid that the store does not hold yet.

    Args:
        grid: a `Grid`, the name of one that comes with the library (`known_grids`), or a YAML file.
        store: folder of the store, created if it is missing. Several runners may work on it at once.
        model: a loaded model in place of the grid's; for one process.
        tasks: tasks in memory in place of the grid's.
        other_tasks: likewise.
        texts: ordinary texts in place of the grid's.
        workers: processes, each on one CPU thread; 1 = this process.
        devices: devices of the workers, in turn, e.g. `["cuda:0", "cuda:1"]`; None = `device`.
        executor: makes another executor from store, work and context, e.g. `RayExecutor`, or
            `functools.partial(RayExecutor, address="auto", gpus=1)`.
        retries: further attempts at a cell whose failure may be temporary.
        together: maximum number of LoFiT fits that share a pass over the model, in groups that follow only from the grid;
            1 = none. Results equal those of separate training up to rounding, and are the same bytes for the same number.
        device: device of the models; None = CUDA if available, else the CPU.
        track: `"wandb"` or `"tensorboard"`: tracker that records the steps of training.
        progress: show what is done, what runs and the time left.

    Returns:
        Which cells were computed, were already there, failed, or could not be started because of a failure.

    Raises:
        InputError: an invalid name, number or field, or several workers with a model in memory (before anything is computed); or
            a full disk.
        DataError: a store of a newer version, or damaged files.
        KeyboardInterrupt: Ctrl-C; the same call continues from there.
    """
    if model is not None and (workers > 1 or executor is not None):
        raise InputError(
            "several workers need the model by name, since each loads its own; leave `model` out, or give workers=1"
        )
    planned = plan_grid(
        grid, model=model, tasks=tasks, other_tasks=other_tasks, texts=texts, device=device, track=track
    )
    kept = Store(store)
    if planned.texts:
        kept.keep(list(planned.texts))
    for name, record in planned.records.items():
        kept.write_grid(name, record)
    where = None if executor is None else executor(kept, compute, planned.context)
    return run_cells(
        kept, planned.cells, compute, planned.context, executor=where, workers=workers, devices=devices, retries=retries,
        together=together, progress=progress,
    )  # fmt: skip


def _placed(spec: ModelSpec) -> ModelSpec:
    """Make a local folder's path absolute: workers may start elsewhere."""
    folder = Path(spec.name)
    return (
        spec.model_copy(update={"name": str(folder.absolute())})
        if folder.is_dir() and spec.name != "organism"
        else spec
    )


def _beside(grid: str | Path, spec: TaskSpec) -> TaskSpec:
    """Resolve a task that is a single file relative to the grid's file."""
    file = Path(spec.name).suffix in FORMATS and spec.name not in TASKS
    return spec.model_copy(update={"name": str(Path(grid).parent / spec.name)}) if file else spec


def _check_asked(grid: Grid, others: bool, texts: bool) -> None:
    """Check that the grid has what its runs request; they would silently be made without it.

    Raises:
        InputError: `tested` without other tasks, or `damage` without texts.
    """
    for field, there, missing in (("tested", others, "other_tasks"), ("damage", texts, "texts")):
        if not there and any(getattr(run, field) for run in grid.runs):
            raise InputError(
                f"a run of the grid {grid.name} says {field!r}, and the grid has no {missing}; add them, or leave it out"
            )


def _load(spec: TaskSpec) -> Task:
    task = load_task(
        spec.name, fold=spec.fold, source=spec.source, form=spec.form, data_dir=spec.data_dir, columns=spec.columns
    )
    return task.as_chat(system=spec.system) if spec.chat or spec.system is not None else task


def _asked_of(tasks: Mapping[str, Task], spec: ModelSpec | None, model: Any) -> dict[str, Task]:
    """Tasks as they are put to a model: its chat template is part of what names a run."""
    if spec is not None and any(t.chat is not None for t in tasks.values()):
        model = planned_tokenizer(spec.name, revision=spec.revision)
    return {name: task.asked_of(model) for name, task in tasks.items()}


def _by_name(tasks: Sequence[Task]) -> dict[str, Task]:
    named = {t.name: t for t in tasks}
    if len(named) < len(tasks):
        raise InputError(f"a grid needs tasks, each once; got {', '.join(t.name for t in tasks)}")
    return named


def _info(grid: Grid, spec: ModelSpec) -> ModelInfo:
    """Describe the planned model. If a method needs the bridge, as LoRA does, every method of the grid runs on that class."""
    backend = spec.backend
    if backend == "auto" and any(method.bridge for method in _methods(grid)):
        backend = "bridge"
    return planned_info(
        spec.name,
        backend=backend,
        dtype=spec.dtype,
        revision=spec.revision,
        prepend_bos=spec.prepend_bos,
        name=spec.called,
    )


def _methods(grid: Grid) -> list[Method]:
    return list({method.name: method for run in grid.runs for method in run.methods}.values())


def _from_outside(grid: Grid) -> tuple[tuple[str, ...], tuple[Method, ...], dict[str, Any]]:
    """Used files, and a grid's methods and selectors that other processes find neither there nor in the library."""
    named = {grid.selection(name).by for name in (*grid.scores, *grid.selections)}
    named |= {grid.selection(h).by for run in grid.runs for h in run.heads if h not in HEADS_READ}
    selectors = {name: SELECTORS[name] for name in sorted(named) if not _is_found(SELECTORS[name])}
    methods = tuple(m for m in _methods(grid) if m.fit is not None and not _is_found(m.fit))
    return tuple(USED.values()), methods, selectors


def _is_found(code: Any) -> bool:
    """Whether another process can find it by itself."""
    return in_library(code) or getattr(code, "__module__", "") in USED


def _record(setting: Setting, cells: Sequence[Cell], texts: str) -> dict[str, Any]:
    def of(task: Task) -> dict[str, Any]:
        return {"data_hash": task.data_hash, "metric": task.metric, "form": task.form}

    tasks: dict[str, dict[str, Any]] = {}
    for name, task in setting.tasks.items():
        preset = Outline.of(setting.info, task).preset
        tasks[name] = {**of(task), "k": preset.k, "select": preset.select.to_dict(), "tune": preset.tune.to_dict()}
    return {
        "grid": json.loads(setting.grid.model_dump_json()), "model": setting.info.to_dict(), "tasks": tasks,
        "other_tasks": {name: of(task) for name, task in setting.others.items()}, "texts": texts,
        "cells": {c.name: c.row for c in cells}, "versions": io.environment(),
    }  # fmt: skip
