"""A study: everything that the paper's figures and tables are drawn from, run once and kept in a folder.

1. Head scores of every task, by every selector, with every seed.
2. Fits: each method with its settings, LoFiT on heads of its own task, of other tasks, by other selectors, by chance, with
   other K and with fewer training examples; each is tested on the test rows once, adapters also on tasks that they did not learn.

`RESULTS/study.json` says what was asked for, `RESULTS/scores` holds the head scores, `RESULTS/runs` one folder a fit. What is
there is not computed again, so that a stopped study goes on. Figures and tables only read (`experiments.results`).
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.errors import DataError, InputError, TrainingDiverged
from lofit_lens.evaluation.damage import damage
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.experiments.comparison import bench_of
from lofit_lens.experiments.methods import LEARNED, METHODS, Settings, Workbench
from lofit_lens.experiments.plan import (
    CHANCE,
    LOFIT,
    STEERING,
    TRAINED,
    ZERO,
    Fit,
    Plan,
    ScoreJob,
    plan_fits,
    plan_scores,
)
from lofit_lens.experiments.pool import Pool, kept_model
from lofit_lens.experiments.runs import DAMAGE_COLUMNS
from lofit_lens.experiments.store import run_folder, save_run
from lofit_lens.experiments.tuning import Tuned, tune_method
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Intervention
from lofit_lens.models import ModelInfo
from lofit_lens.tasks.base import Task
from lofit_lens.training import Preset, preset, tune_offsets
from lofit_lens.training.config import method_config
from lofit_lens.training.selectors import SELECTORS

KIND, SCHEMA = "lofit_lens.study", 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Setting:
    """What all jobs of a study share."""

    model: Any
    load: dict[str, Any] | None
    tasks: dict[str, Task]
    plan: Plan
    texts: tuple[str, ...]
    out: str
    batch_size: int

    def bench(self, task: str, n_train: int | None = None) -> Workbench:
        loaded = self.model if self.load is None else kept_model(str(self.model), **self.load)
        return bench_of(loaded, self.tasks[task], n_train)


def run_study(
    model: Any,
    tasks: Sequence[Task],
    *,
    out: str | Path,
    plan: Plan | None = None,
    other_tasks: Sequence[Task] = (),
    texts: Iterable[str] = (),
    batch_size: int = 16,
    workers: int = 1,
    backend: str = "auto",
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Path:
    """Run whatever of the study is not in the folder yet.

    Args:
        model: any HookedTransformer or TransformerBridge; or the name or folder of a model, needed for several workers.
        tasks: with training rows (and validation rows for the methods' part).
        out: folder of the study.
        plan: what to run; None = `Plan()`.
        other_tasks: on which LoFiT's adapters are tested without being trained on them (Table 5).
        texts: ordinary texts on which the damage of LoFiT's adapters (own heads, usual K) is measured as they are made.
        batch_size: of the evaluations.
        workers: processes, each on one thread.
        backend: as `load_model`, like the three that follow, for a model given by name.
        dtype: of the weights.
        device: of the model.
        revision: of the model.
        progress: show bars.

    Returns:
        The folder.

    Raises:
        InputError: no task, a task given twice, a folder that holds another study (names what differs), or several workers with
            a model in memory.
    """
    plan = plan or Plan()
    by_name, names = isinstance(model, str | Path), [t.name for t in tasks]
    if not tasks or len(set(names)) < len(names):
        raise InputError(f"a study needs tasks, each once; got {', '.join(names) or 'none'}")
    if workers > 1 and not by_name:
        raise InputError(f"{workers} workers need the model by name, since each loads its own; or give workers=1")
    if both := [t.name for t in other_tasks if t.name in names]:
        raise InputError(
            f"{both[0]} is a task and an other task of this study; other tasks are those that nothing is tuned on"
        )
    _check_rows(plan, tasks)
    load = {"backend": backend, "dtype": dtype, "device": device, "revision": revision} if by_name else None
    every = {t.name: t for t in (*tasks, *other_tasks)}
    setting = _Setting(model, load, every, plan, tuple(texts), str(out), batch_size)
    bench = setting.bench(names[0])
    if "methods" in plan.parts:
        for name in TRAINED:
            METHODS[name].model(bench)  # LoRA needs the bridge: better known now than after the other fits
    info = bench.info
    presets = {t.name: preset(info, t.family, t.objective) for t in tasks}
    k = {name: p.k for name, p in presets.items()}
    _write_record(Path(out), plan, info, tasks, other_tasks, presets, setting.texts)
    with Pool(workers) as pool:
        _run(pool, _score, setting, plan_scores(plan, names), "head scores", progress)
        fits = plan_fits(plan, names, [t.name for t in other_tasks], info, k, read_scores(Path(out)))
        _run(pool, _fit, setting, fits, "fits", progress)
    return Path(out)


def _check_rows(plan: Plan, tasks: Sequence[Task]) -> None:
    """Raise InputError where a task lacks the rows that the plan needs."""
    for task in tasks:
        if ("methods" in plan.parts or plan.tune) and not task.test.get("val"):
            raise InputError(
                f"{task.name} has no validation rows, on which ITI's and RepE's strength is chosen; add some, or leave the part "
                "'methods' out"
            )
        if "data" in plan.parts:
            for n in plan.sizes:
                task.training_examples("train", n=n)


def _write_record(
    out: Path, plan: Plan, info: ModelInfo, tasks: Sequence[Task], others: Sequence[Task], presets: Mapping[str, Preset],
    texts: Sequence[str],
) -> None:  # fmt: skip
    digest = io.digest(list(texts)) if texts else ""
    record = {
        "kind": KIND, "schema": SCHEMA, "model": info.to_dict(), "plan": _plain(asdict(plan)),
        "tasks": {
            t.name: {
                "data_hash": t.data_hash, "metric": t.metric, "form": t.form, "k": presets[t.name].k,
                "select": presets[t.name].select.to_dict(), "tune": presets[t.name].tune.to_dict(),
            }
            for t in tasks
        },
        "other_tasks": {t.name: {"data_hash": t.data_hash, "metric": t.metric, "form": t.form} for t in others},
        "texts": digest, "versions": io.environment(),
    }  # fmt: skip
    path = out / "study.json"
    if path.is_file():
        there = io.read_json(path)
        io.check_record(there, KIND, SCHEMA, ("model", "plan", "tasks", "other_tasks", "texts"), str(path))
        known = {t: there["other_tasks"][t] for t in record["other_tasks"] if t in there["other_tasks"]}
        for what, old, new in (
            ("another model", there["model"], record["model"]), ("other tasks", there["tasks"], record["tasks"]),
            ("other data", known, {t: record["other_tasks"][t] for t in known}),
            ("other texts", there["texts"] or digest, digest or there["texts"]),
            *((f"another {n}", there["plan"][n], record["plan"][n]) for n in ("limit", "tune")),
        ):  # fmt: skip
            if old != new:
                raise InputError(f"{out} holds a study of {what} ({old}, not {new}); give another folder")
        record["other_tasks"] = {**there["other_tasks"], **record["other_tasks"]}
        record["texts"] = digest or there["texts"]
    io.write_json(path, record)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def _run(pool: Pool, work: Any, setting: _Setting, jobs: Sequence[Any], label: str, progress: bool) -> None:
    left = [job for job in jobs if not _is_there(setting, job)]
    with tqdm(total=len(left), desc=label, disable=not progress, unit="run") as bar:
        for _ in pool.run(work, [(setting, job) for job in left], bar):
            pass


# -------------------------------------------------------------------------------------------------- head scores


def _score(setting: _Setting, job: ScoreJob) -> None:
    task, by, seed = job
    bench = setting.bench(task)
    scores, seconds = bench.timed(lambda: SELECTORS[by](bench.model, bench.task, seed=seed, progress=False))
    scores.meta["seconds"] = seconds
    scores.save(_score_file(setting, job))


def _score_file(setting: _Setting, job: ScoreJob) -> Path:
    front = "--".join(part.replace("/", "-").replace(" ", "_").replace(":", "-") for part in job[:2])
    return Path(setting.out) / "scores" / f"{front}--seed{job[2]}.json"


def read_scores(folder: Path) -> dict[tuple[str, str, int], HeadScores]:
    """(task, selector, seed) -> scores, as they lie in a study's folder.

    Raises:
        DataError: a damaged file.
    """
    found = {}
    for path in sorted((folder / "scores").glob("*.json")):
        scores = HeadScores.load(path)
        if "seed" not in scores.meta:
            raise DataError(f"{path} does not say its seed; remove it and run the study again")
        found[scores.task, path.stem.rsplit("--", 2)[1].replace("_", " "), int(scores.meta["seed"])] = scores
    return found


# --------------------------------------------------------------------------------------------------------- fits


def _spec(setting: _Setting, fit: Fit, tested: str) -> dict[str, Any]:
    task = setting.tasks[tested]
    asked = {k: v for k, v in asdict(fit).items() if k not in ("also", "own")}
    return {
        "study": SCHEMA, **asked, "tested": tested, "data_hash": task.data_hash, "form": task.form, "limit": setting.plan.limit,
        "tune": setting.plan.tune,
    }  # fmt: skip


def _is_there(setting: _Setting, job: Any) -> bool:
    if not isinstance(job, Fit):
        return _score_file(setting, job).is_file()
    return all(run_folder(Path(setting.out) / "runs", _spec(setting, job, t)).is_dir() for t in (job.task, *job.also))


def _fit(setting: _Setting, job: Fit) -> None:
    """Fit, test and keep; other tasks first, so that the run of the task itself says that all is there."""
    bench = setting.bench(job.task, job.n_train)
    try:
        tuned = _tuned(setting, job)
        settings = _preset_of(bench, job) if tuned is None else tuned.settings
        fitted, seconds = bench.timed(lambda: _fitted(bench, job, settings))
    except TrainingDiverged as e:
        log.warning("%s on %s (seed %d) is left out: %s", job.method, job.task, job.seed, e)
        return
    if job.heads is not None and job.heads_from != CHANCE:
        file = _score_file(setting, (job.source, job.heads_from, job.seed))
        seconds += HeadScores.load(file).meta.get("seconds", 0.0)
    model = METHODS[job.method].model(bench) if job.method in METHODS else bench.model
    # LoFiT's other fits take over what was chosen for its own heads.
    chosen = None if tuned is None or (job.method == LOFIT and not job.own) else tuned.to_dict()
    hurt = None
    if setting.texts and job.own:
        assert fitted is not None
        texts = damage(model, fitted, setting.texts, progress=False).texts
        hurt = {name: texts[name].tolist() for name in DAMAGE_COLUMNS}
    for tested in (*job.also, job.task):
        start = time.perf_counter()
        with nullcontext() if fitted is None else fitted.attached(model):
            result = evaluate(
                model, setting.tasks[tested], limit=setting.plan.limit, batch_size=setting.batch_size, label=job.method,
                progress=False,
            )  # fmt: skip
        took = time.perf_counter() - start
        own = tested == job.task
        heads = getattr(fitted, "heads", None)
        run = {
            "n_parameters": 0 if fitted is None else fitted.n_parameters, "fit_seconds": seconds, "eval_seconds": took,
            "damage": hurt if own else None, "heads": "" if heads is None else str(heads),
        }  # fmt: skip
        save_run(
            Path(setting.out) / "runs", _spec(setting, job, tested), result, adapter=fitted if own else None,
            seconds=seconds + took, more={"run": run, "settings": settings, "tuned": chosen},
        )  # fmt: skip


def _fitted(bench: Workbench, job: Fit, settings: Settings) -> Intervention | None:
    if job.method != LOFIT:
        return METHODS[job.method].fit(bench, settings, job.seed)
    heads = job.heads
    chosen = bench.head_scores(job.seed).top(job.k or bench.preset.k) if heads is None else HeadSet(heads)
    config = bench.preset.tune.with_changes(lr=settings["lr"])
    return tune_offsets(
        bench.model, bench.task, chosen, seed=job.seed, config=config, n_train=bench.n_train, progress=False
    )


def _tuned(setting: _Setting, job: Fit) -> Tuned | None:
    """The choice of settings on the validation rows with the task's own number of examples; None where the preset's are taken."""
    if job.method == ZERO or not (job.method in STEERING or setting.plan.tune):
        return None
    whole = setting.bench(job.task)
    name = LEARNED if job.method == LOFIT else job.method
    trials = Path(setting.out) / "trials"
    return tune_method(whole, whole.task, name, batch_size=setting.batch_size, out=trials, progress=False)


def _preset_of(bench: Workbench, job: Fit) -> dict[str, Any]:
    if job.method == ZERO:
        return {}
    if job.method == LOFIT:
        return {"lr": bench.preset.tune.lr}
    return {"lr": method_config(job.method.lower(), bench.info).lr}
