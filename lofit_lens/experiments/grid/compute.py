"""Compute a cell of a grid: head scores, a fit and its test, a trial, a test on another task, damage, a reading."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import InputError, ModelError, TrainingDiverged
from lofit_lens.evaluation.damage import damage
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.experiments.executors.attempt import Each
from lofit_lens.experiments.executors.process import kept_model
from lofit_lens.experiments.executors.schedule import Group
from lofit_lens.experiments.grid.keys import check_code, model_key
from lofit_lens.experiments.methods import Fit, Method, Workbench, method_of, register, use_file
from lofit_lens.experiments.methods.choice import Tuned, choose
from lofit_lens.experiments.readings import read_adapter, read_together
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Draft, Store
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Intervention, Lofit, load_adapter
from lofit_lens.models import ModelInfo, device_of, model_info
from lofit_lens.tasks.base import Task
from lofit_lens.training import TrainConfig
from lofit_lens.training.lofit import LofitRun, learned_scores, tune_many
from lofit_lens.training.selectors import LEARNED, SELECTORS, Selector
from lofit_lens.training.trackers import Tracked, Tracker, tracked, tracker


@dataclass(frozen=True, eq=False)
class Context:
    """The objects that cells of a grid need and that their specs only name.

    Attributes:
        load: digest of a model's key -> arguments of `load_model`.
        infos: digest of a model's key -> the planned model.
        tasks: digest of a task's key -> task.
        loaded: a model in memory, in place of all that `load` names; for one process.
        device: device of the models if the runner assigns none.
        track: `"wandb"` or `"tensorboard"`: the tracker that records the steps of training.
        code: files that register methods and selectors (`methods.use_file`).
        methods: methods from outside the library that no such file holds.
        selectors: selectors of that kind, by name.
    """

    load: Mapping[str, Mapping[str, Any]]
    infos: Mapping[str, ModelInfo]
    tasks: Mapping[str, Task]
    loaded: Any = None
    device: str | None = None
    track: str | None = None
    code: tuple[str, ...] = ()
    methods: tuple[Method, ...] = ()
    selectors: Mapping[str, Selector] = field(default_factory=dict)


READINGS = "readings.json"
DAMAGE_COLUMNS = ("kl", "cross_entropy", "cross_entropy_base")
KEPT = "_lofit_lens_benches"  # attribute of a model: its workbenches
_silent: set[str] = set()  # trackers that failed in this process


def compute(store: Store, group: Group, context: Any, device: str | None, each: Each) -> None:
    """Compute a group of cells whose needs are done, and write the folders of those that are not done yet.

    LoFiT fits share passes, including those already done: otherwise the last digits of the others would depend on them.

    Args:
        store: store that holds the needed cells and receives the results.
        group: a group of cells made by `expand`.
        context: a `Context`.
        device: device of the model; None = the context's.
        each: cell -> the block in which it is written.

    Raises:
        ModelError: the loaded model differs from the planned one.
        InputError: a cell cannot be computed as specified.
        TrainingDiverged: training gave NaN or infinity; with several cells, in that cell's own block.
    """
    for file in context.code:
        use_file(file)
    for method in context.methods:
        register(method)
    SELECTORS.update(context.selectors)
    for cell in group.cells:
        check_code(cell.spec, context.tasks)
    jobs = [_Job(store, cell, context, _bench(cell, context, device)) for cell in group.cells]
    with ExitStack() as stack:
        for job in jobs:
            stack.push(job.reading)
            _read_along(job, context)
        if group.cells[0].shares:
            _train(jobs, store.state_file(group.name))
        for job in [j for j in jobs if not store.done(j.cell.name)]:
            with each(job.cell), job.reading, store.new(job.cell) as job.draft:
                start = time.perf_counter()
                KINDS[job.spec["kind"]](job)
                job.draft.timing |= {
                    "seconds": job.seconds + time.perf_counter() - start, "started": job.started,
                    "device": str(device_of(job.bench.model)),
                }  # fmt: skip
                if len(jobs) > 1:
                    job.draft.timing["together"] = [cell.name for cell in group.cells]
    if any(job.failed_reader for job in jobs):
        _silent.add(context.track)  # so that no other cell waits for it


def _read_along(job: "_Job", context: Context) -> None:
    """Let a tracker record the steps of a cell that trains and is not done yet."""
    wanted = job.spec.get("config") and context.track not in _silent and not job.store.done(job.cell.name)
    if context.track and wanted:
        job.reader = tracker(context.track, job.store.root / "track")
    job.steps = job.reading.enter_context(tracked(job.reader, job.cell.name, job.spec))
    if job.failed_reader:
        _silent.add(str(context.track))


def _bench(cell: Cell, context: Context, device: str | None) -> Workbench:
    key = io.digest(cell.spec["model"])
    model, planned = context.loaded, context.infos[key]
    if model is None:
        load = dict(context.load[key])
        model = kept_model(load.pop("name_or_path"), device=device or context.device, **load)
    if (found := model_key(model_info(model))) != model_key(planned):
        raise ModelError(
            f"the model that was loaded ({found}) is not the one that was planned ({model_key(planned)}); name its class in the "
            "grid (backend: bridge), or plan the grid again if the files have changed"
        )
    task = context.tasks[io.digest(cell.spec["task"])] if "task" in cell.spec else next(iter(context.tasks.values()))
    return bench_of(model, task, cell.spec.get("n_train"))


def bench_of(model: Any, task: Task, n_train: int | None) -> Workbench:
    """The workbench of a model and a task in this process, made once; it is dropped together with the model."""
    task = task.asked_of(model)
    if (kept := getattr(model, KEPT, None)) is None:
        kept = {}
        object.__setattr__(model, KEPT, kept)
    key = (task.name, task.form, n_train)
    if key not in kept or kept[key].task != task:
        kept[key] = Workbench(model, task, n_train=n_train)
    return kept[key]


@dataclass
class _Job:
    """A cell while it is computed.

    Attributes:
        reading: keeps its tracked run open.
        trained: result of LoFiT's training.
        seconds: its share of the training time.
    """

    store: Store
    cell: Cell
    context: Context
    bench: Workbench
    reading: ExitStack = field(default_factory=ExitStack)
    reader: Tracker | None = None
    steps: Tracked = field(default_factory=lambda: Tracked(None))
    trained: Lofit | InputError | TrainingDiverged | None = None
    seconds: float = 0.0
    draft: Draft = field(init=False)
    spec: dict[str, Any] = field(init=False)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        self.spec = self.cell.spec

    @property
    def failed_reader(self) -> bool:
        return self.reader is not None and self.steps.reader is None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that were given, or chosen by the trials."""
        spec = self.spec
        return spec["settings"] if spec.get("chosen") is None else _chosen(self).settings

    @property
    def lofit(self) -> Lofit:
        """The trained adapter; raises the error if training failed."""
        if isinstance(self.trained, InputError | TrainingDiverged):
            raise self.trained
        assert self.trained is not None
        return self.trained


def _train(jobs: Sequence[_Job], checkpoint: Path) -> None:
    """Train LoFiT for all cells; one that cannot be trained (every trial diverged, a row too long, ...) is left out."""
    start, runs = time.perf_counter(), {}
    for i, job in enumerate(jobs):
        try:
            runs[i] = _run(job)
            runs[i].check(job.bench.model)
        except (InputError, TrainingDiverged) as e:
            runs.pop(i, None)
            job.trained = e
    if runs:
        found = tune_many(jobs[0].bench.model, list(runs.values()), checkpoint=checkpoint, progress=False)
        for i, trained in zip(runs, found, strict=True):
            jobs[i].trained = trained
    for job in jobs:
        job.seconds = (time.perf_counter() - start) / len(jobs)


def _run(job: _Job) -> LofitRun:
    spec = job.spec
    if spec["kind"] != "scores":
        method = method_of(spec["method"])
        assert method.joint is not None
        return method.joint(job.bench, _asked(job))
    heads = None
    if (among := spec["among"]) is not None:
        heads = HeadScores.load(job.store.folder(among["cell"]) / "scores.json").top(among["k"])
    return LofitRun(
        job.bench.task, LEARNED[spec["by"]], heads, seed=spec["seed"], config=TrainConfig(**_config(spec)),
        n_train=spec["n_train"], on_step=job.steps,
    )  # fmt: skip


def _asked(job: _Job) -> Fit:
    """The fit that the cell requests from its method."""
    spec = job.spec
    config = TrainConfig(**{**_config(spec), **job.settings}) if spec["config"] else None
    return Fit(
        spec["seed"], job.settings, config, heads=_heads(job) if spec["heads"] else None, k=spec["k"],
        checkpoint=job.store.state_file(job.cell.name), on_step=job.steps,
    )  # fmt: skip


def _config(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration: the preset may differ for a model with another name."""
    config = spec["config"] or {}
    return {**config, "betas": tuple(config["betas"])} if config else {}


def _scores(job: _Job) -> None:
    spec, bench = job.spec, job.bench
    if spec["by"] in LEARNED:
        scores = learned_scores(job.lofit, LEARNED[spec["by"]], kind=spec["by"])
    else:
        scores = bench.selected(SELECTORS[spec["by"]], spec["seed"])
    scores.save(job.draft.path / "scores.json")


def _fit(job: _Job) -> None:
    """Fit, keep the adapter, and test it on its own task's rows."""
    draft = job.draft
    fitted = _fitted(job)
    draft.record["settings"] = job.settings
    draft.record["run"] = {
        "n_parameters": 0 if fitted is None else fitted.n_parameters, "heads": str(getattr(fitted, "heads", None) or ""),
    }  # fmt: skip
    if fitted is not None:
        fitted.save_pretrained(draft.path / "adapter")
    _test(job, fitted)


def _trial(job: _Job) -> None:
    """Fit one point of a grid; a fit that diverges is a result, and this point is not chosen."""
    record = job.draft.record
    record["settings"] = job.settings
    try:
        fitted = _fitted(job)
    except TrainingDiverged as e:
        record["note"] = str(e).split(";")[0]
    else:
        _test(job, fitted)


def _fitted(job: _Job) -> Intervention | None:
    method, timing = method_of(job.spec["method"]), job.draft.timing
    timing["fit_seconds"] = 0.0
    if method.fit is None:
        return None
    if method.joint is not None:
        timing["fit_seconds"] = job.seconds
        return job.lofit
    fitted, timing["fit_seconds"] = job.bench.timed(lambda: method.fit(job.bench, _asked(job)))  # pyright: ignore[reportOptionalCall]
    return fitted


def _heads(job: _Job) -> HeadSet:
    heads, grid = job.spec["heads"], job.bench.info.grid
    if "cell" in heads:
        own = HeadScores.load(job.store.folder(heads["cell"]) / "scores.json").top(heads["k"])
        return HeadSet.matched(own, seed=heads["matched"]) if "matched" in heads else own
    return HeadSet.all(grid) if "all" in heads else HeadSet.random(grid, heads["k"], seed=heads["random"])


def _test(job: _Job, fitted: Intervention | None) -> None:
    spec, bench = job.spec, job.bench
    model, start = method_of(spec["method"]).model(job.bench), time.perf_counter()
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
    """Test the adapter of a fit on a task that it did not learn."""
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
        raise InputError(f"{method} has no adapter, so its damage cannot be measured; leave damage out for it")
    texts = damage(method_of(method).model(job.bench), fitted, job.store.kept(job.spec["texts"]), progress=False).texts
    job.draft.record["damage"] = {name: texts[name].tolist() for name in DAMAGE_COLUMNS}


def _kept(job: _Job, method: str) -> Intervention | None:
    """The adapter in a fit's folder; None if it has none."""
    folder = job.store.folder(job.spec["fit"]) / "adapter"
    return load_adapter(folder, model=method_of(method).model(job.bench)) if folder.is_dir() else None


def _reading(job: _Job) -> None:
    """Write what the adapters of fits reveal about the model into a file of its own."""
    spec, model, tasks = job.spec, job.bench.model, job.context.tasks

    def adapter(fit: str) -> Lofit:
        return Lofit.from_pretrained(job.store.folder(fit) / "adapter", model=model)

    def task(key: Mapping[str, Any]) -> Task:
        return tasks[io.digest(key)].asked_of(model)

    if "fits" in spec:
        pairs = {name: (task(spec["tasks"][name]), adapter(fit)) for name, fit in spec["fits"].items()}
        parts = read_together(model, pairs, seed=spec["seed"], limit=spec["limit"])
    else:
        parts = read_adapter(
            model, task(spec["task"]), adapter(spec["fit"]), seed=spec["seed"], limit=spec["limit"], draws=spec["draws"],
            wide=adapter(spec["wide"]) if spec["wide"] else None, cued=task(spec["cued"]) if spec["cued"] else None,
            texts=job.store.kept(spec["texts"]) if spec["texts"] else (), only=spec.get("only", ()),
        )  # fmt: skip
    io.write_json(job.draft.path / READINGS, parts)


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
        found: dict[str, Any] = {"value": None, "low": None, "high": None, "n_items": None}
        if "result" in record:
            mean = record["result"]["metrics"][metric]
            low, high = mean["interval"] or (None, None)
            found = {"value": mean["mean"], "low": low, "high": high, "n_items": mean["n"]}
        seconds = store.timing(name).get("fit_seconds")
        rows.append({
            **record["settings"], "seed": record["spec"]["seed"], **found, "seconds": seconds, "note": record.get("note", "")
        })  # fmt: skip
    return choose(method, task, metric, settings, len(points[0]), rows)


KINDS = {"scores": _scores, "fit": _fit, "trial": _trial, "test": _other, "damage": _damage, "reading": _reading}
