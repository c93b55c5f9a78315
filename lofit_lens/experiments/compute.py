"""What a cell of a grid computes: head scores, a fit with its test, a trial, a test on another task, damage on text."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import InputError, ModelError, TrainingDiverged
from lofit_lens.evaluation.damage import damage
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.experiments.cells import Cell
from lofit_lens.experiments.comparison import bench_of
from lofit_lens.experiments.expand import model_key
from lofit_lens.experiments.methods import METHODS, Training, Workbench, fit_offsets
from lofit_lens.experiments.pool import kept_model
from lofit_lens.experiments.runs import DAMAGE_COLUMNS
from lofit_lens.experiments.specs import LOFIT
from lofit_lens.experiments.store import Draft, Store
from lofit_lens.experiments.tuning import Tuned, choose
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Intervention, load_adapter
from lofit_lens.models import ModelInfo, device_of, model_info
from lofit_lens.tasks.base import Task
from lofit_lens.training import TrainConfig
from lofit_lens.training.selectors import SELECTORS
from lofit_lens.training.trackers import Tracked, tracked, tracker


@dataclass(frozen=True, eq=False)
class Context:
    """What every cell of a grid may need and its spec only names.

    Attributes:
        load: digest of a model's key -> arguments of `load_model`.
        infos: digest of a model's key -> what it will be.
        tasks: digest of a task's key -> task.
        loaded: a model in memory, in place of all that `load` names; for one process.
        device: of the models, where the runner gives none.
        track: `"wandb"` or `"tensorboard"`: who reads the steps of training.
    """

    load: Mapping[str, Mapping[str, Any]]
    infos: Mapping[str, ModelInfo]
    tasks: Mapping[str, Task]
    loaded: Any = None
    device: str | None = None
    track: str | None = None


_silent: set[str] = set()  # trackers that failed in this process


def compute(store: Store, cell: Cell, context: Any, device: str | None) -> None:
    """Compute a cell whose needs are done, and write its folder.

    Args:
        store: where needs lie and the result goes.
        cell: made by `expand`.
        context: a `Context`.
        device: of the model; None = the context's.

    Raises:
        ModelError: the model is another one than was planned.
        InputError: the cell cannot be computed as asked.
        TrainingDiverged: training gave NaN or infinity.
    """
    bench = _bench(cell, context, device)
    start = time.perf_counter()
    reader = None
    if context.track and cell.spec.get("config") and context.track not in _silent:
        reader = tracker(context.track, store.root / "track")
    with tracked(reader, cell.name, cell.spec) as steps, store.new(cell) as draft:
        KINDS[cell.spec["kind"]](_Job(store, cell, bench, draft, steps))
        draft.timing |= {"seconds": time.perf_counter() - start, "device": str(device_of(bench.model))}
    if context.track and reader is not None and steps.reader is None:
        _silent.add(context.track)  # it failed; no further cell waits for it


def _bench(cell: Cell, context: Context, device: str | None) -> Workbench:
    key = io.digest(cell.spec["model"])
    model, planned = context.loaded, context.infos[key]
    if model is None:
        load = dict(context.load[key])
        model = kept_model(load.pop("name"), device=device or context.device, **load)
    if (found := model_key(model_info(model))) != model_key(planned):
        raise ModelError(
            f"the model that was loaded ({found}) is not the one that was planned ({model_key(planned)}); name its class in the "
            "grid (backend: bridge), or plan the grid anew if the files have changed"
        )
    task = context.tasks[io.digest(cell.spec["task"])] if "task" in cell.spec else next(iter(context.tasks.values()))
    return bench_of(model, task, cell.spec.get("n_train"))


@dataclass
class _Job:
    store: Store
    cell: Cell
    bench: Workbench
    draft: Draft
    steps: Tracked
    spec: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.spec = self.cell.spec

    @property
    def checkpoint(self) -> Path:
        """State of the training inside this cell."""
        return self.store.state_file(self.cell.name)


def _scores(job: _Job) -> None:
    spec, bench = job.spec, job.bench
    heads = None
    if spec["among"] is not None:
        heads = HeadScores.load(job.store.folder(spec["among"]["cell"]) / "scores.json").top(spec["among"]["k"])
    options: dict[str, Any] = {"seed": spec["seed"], "n_train": spec["n_train"], "progress": False}
    if spec["config"] is not None:
        config = TrainConfig(**{**spec["config"], "betas": tuple(spec["config"]["betas"])})
        options |= {"heads": heads, "config": config, "checkpoint": job.checkpoint, "on_step": job.steps}
    scores = SELECTORS[spec["by"]](bench.model, bench.task, **options)
    scores.save(job.draft.path / "scores.json")


def _fit(job: _Job) -> None:
    """Fit, keep the adapter, and test it on its own task's rows."""
    spec, draft = job.spec, job.draft
    tuned = None if spec["chosen"] is None else _chosen(job)
    settings = spec["settings"] if tuned is None else tuned.settings
    fitted, draft.timing["fit_seconds"] = job.bench.timed(lambda: _fitted(job, settings))
    draft.record["settings"] = settings
    draft.record["run"] = {
        "n_parameters": 0 if fitted is None else fitted.n_parameters, "heads": str(getattr(fitted, "heads", None) or ""),
    }  # fmt: skip
    if fitted is not None:
        fitted.save_pretrained(draft.path / "adapter")
    _test(job, fitted)


def _trial(job: _Job) -> None:
    """A fit that diverges is a result: this point is not chosen."""
    record = job.draft.record
    record["settings"] = job.spec["settings"]
    try:
        fitted, job.draft.timing["fit_seconds"] = job.bench.timed(lambda: _fitted(job, job.spec["settings"]))
    except TrainingDiverged as e:
        record["note"] = str(e).split(";")[0]
    else:
        _test(job, fitted)


def _fitted(job: _Job, settings: Mapping[str, Any]) -> Intervention | None:
    spec, bench = job.spec, job.bench
    if spec["config"] is not None:  # all of it: the preset may be another where the model has another name
        settings = {**spec["config"], "betas": tuple(spec["config"]["betas"]), **settings}
    bench.training = Training(job.checkpoint, job.steps)
    try:
        if spec["method"] != LOFIT:
            return METHODS[spec["method"]].fit(bench, settings, spec["seed"])
        return fit_offsets(bench, _heads(job), settings, spec["seed"])
    finally:
        bench.training = Training()


def _heads(job: _Job) -> HeadSet:
    heads, grid = job.spec["heads"], (job.bench.info.n_layers, job.bench.info.n_heads)
    if "cell" in heads:
        return HeadScores.load(job.store.folder(heads["cell"]) / "scores.json").top(heads["k"])
    return HeadSet.all(grid) if "all" in heads else HeadSet.random(grid, heads["k"], seed=heads["random"])


def _test(job: _Job, fitted: Intervention | None) -> None:
    spec, bench = job.spec, job.bench
    model, start = _model_of(job, spec["method"]), time.perf_counter()
    with nullcontext() if fitted is None else fitted.attached(model):
        result = evaluate(
            model, bench.task, split=spec["split"], limit=spec.get("limit"), batch_size=spec["batch_size"],
            label=spec["method"], progress=False,
        )  # fmt: skip
    job.draft.timing["eval_seconds"] = time.perf_counter() - start
    result.write_into(job.draft.path)
    job.draft.record["result"] = result.to_dict()
    job.steps.metrics = {name: m.mean for name, m in result.metrics.items()}


def _other(job: _Job) -> None:
    """The adapter of a fit on a task that it did not learn."""
    before = job.store.read(job.spec["fit"])
    for name in ("settings", "run"):
        job.draft.record[name] = before[name]
    method = before["spec"]["method"]
    job.spec = {**job.spec, "method": method, "split": "test"}
    _test(job, _kept(job, method))


def _damage(job: _Job) -> None:
    method = job.store.read(job.spec["fit"])["spec"]["method"]
    fitted = _kept(job, method)
    if fitted is None:
        raise InputError(f"{method} has no adapter that could do damage")
    texts = damage(_model_of(job, method), fitted, job.store.kept(job.spec["texts"]), progress=False).texts
    job.draft.record["damage"] = {name: texts[name].tolist() for name in DAMAGE_COLUMNS}


def _kept(job: _Job, method: str) -> Intervention | None:
    """The adapter in a fit's folder; None where it has none."""
    folder = job.store.folder(job.spec["fit"]) / "adapter"
    return load_adapter(folder, model=_model_of(job, method)) if folder.is_dir() else None


def _model_of(job: _Job, method: str) -> Any:
    return METHODS[method].model(job.bench) if method in METHODS else job.bench.model


def _chosen(job: _Job) -> Tuned:
    task = job.bench.task
    return choice(job.store, job.spec["chosen"], job.spec["method"], task.name, task.metric)


def choice(store: Store, points: list[list[str]], method: str, task: str, metric: str) -> Tuned:
    """The point that was best on the validation rows, from its trials in the store (a list of seeds for each point).

    Raises:
        TrainingDiverged: every point diverged.
        DataError: a damaged trial.
    """
    rows, settings = [], []
    for place, name in ((i, n) for point in points for i, n in enumerate(point)):
        record = store.read(name)
        if place == 0:
            settings.append(record["settings"])
        found: dict[str, Any] = {"value": None, "low": None, "high": None}
        if "result" in record:
            mean = record["result"]["metrics"][metric]
            low, high = mean["interval"] or (None, None)
            found = {"value": mean["mean"], "low": low, "high": high}
        seconds = store.timing(name).get("fit_seconds")
        rows.append({
            **record["settings"], "seed": record["spec"]["seed"], **found, "seconds": seconds, "note": record.get("note", "")
        })  # fmt: skip
    return choose(method, task, metric, settings, len(points[0]), rows)


KINDS = {"scores": _scores, "fit": _fit, "trial": _trial, "test": _other, "damage": _damage}
