"""A study: everything that the paper's figures and tables are drawn from, run once and kept in a folder.

1. Head scores of every task, by every selector, with every seed.
2. Fits: each method with its settings, LoFiT on heads of its own task, of other tasks, by other selectors, by chance, with
   other K and with fewer training examples; each is tested on the test rows once, adapters also on tasks that they did not learn.

`RESULTS/study.json` says what was asked for, `RESULTS/scores` holds the head scores, `RESULTS/runs` one folder a fit. What is
there is not computed again, so that a stopped study goes on. Figures and tables only read (`experiments.results`).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.errors import DataError, InputError, unknown
from lofit_lens.evaluation.damage import damage
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.experiments.comparison import bench_of
from lofit_lens.experiments.methods import LEARNED, METHODS, Settings, Workbench
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
LOFIT, ZERO, CHANCE, OWN = "LoFiT", "zero-shot", "random", "A-norm"
STEERING, TRAINED = ("ITI", "RepE"), ("LoRA", "RED", "LoReFT")
PARTS = ("transfer", "methods", "selectors", "k", "data", "other tasks")


@dataclass(frozen=True)
class Plan:
    """What a study holds.

    Attributes:
        seeds: of selection and fits.
        extra_seeds: of head selection alone, for its stability.
        parts: of `PARTS`; scores, zero-shot, LoFiT's own heads and random heads are always there.
        selectors: whose heads are tuned (Table 2); the A-norm is always there.
        scored: further selectors, whose scores alone are compared with the others'.
        trained: methods that are fitted at several numbers of training examples beside LoFiT.
        ks: numbers of heads (Figure 5); None = 1, K, 3 K and 20 % of the heads.
        sizes: numbers of training examples (Figure 4) beside the task's own.
        draws: of random heads.
        tune: choose the trained methods' learning rates on the validation rows too (four points each); else they are the
            presets. ITI's and RepE's strength is always chosen there.
        limit: only the first test rows.
        n_texts: ordinary texts on which damage is measured.
    """

    seeds: tuple[int, ...] = (0, 1)
    extra_seeds: tuple[int, ...] = (2, 3)
    parts: tuple[str, ...] = PARTS
    selectors: tuple[str, ...] = ("bias norm", "probe accuracy", "probing layers")
    scored: tuple[str, ...] = ("gradient attribution",)
    trained: tuple[str, ...] = ("LoRA", "RED")
    ks: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = (10, 40)
    draws: int = 5
    tune: bool = False
    limit: int | None = None
    n_texts: int = 50

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("part", self.parts, PARTS),
            ("selector", (*self.selectors, *self.scored), SELECTORS),
            ("method", self.trained, TRAINED),
        ):
            for one in given:
                if one not in allowed:
                    raise unknown(name, one, allowed)
        if not self.seeds or self.draws < 1:
            raise InputError(
                f"{len(self.seeds)} seeds and {self.draws} draws of random heads; give one or more of each"
            )
        if any(n < 1 for n in (*self.sizes, *(self.ks or ()))):
            raise InputError(f"K and numbers of training examples start at 1, got {self.ks} and {self.sizes}")


@dataclass(frozen=True)
class Fit:
    """One fit. `heads` says which heads are edited where `heads_from` alone does not: `source` is the task they come from."""

    task: str
    method: str
    seed: int
    heads_from: str = ""
    source: str = ""
    k: int | None = None
    draw: int = 0
    n_train: int | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    also: tuple[str, ...] = field(default=(), compare=False)  # other tasks on which the fitted adapter is tested


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
        texts: ordinary texts on which LoFiT's adapters' damage is measured.
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
    load = {"backend": backend, "dtype": dtype, "device": device, "revision": revision} if by_name else None
    every = {t.name: t for t in (*tasks, *other_tasks)}
    setting = _Setting(model, load, every, plan, tuple(texts), str(out), batch_size)
    info = setting.bench(names[0]).info
    presets = {t.name: preset(info, t.family, t.objective) for t in tasks}
    k = {name: p.k for name, p in presets.items()}
    _write_record(Path(out), plan, info, tasks, other_tasks, presets, setting.texts)
    with Pool(workers) as pool:
        _run(pool, _score, setting, _scores_of(plan, names), "head scores", progress)
        fits = plan_fits(plan, names, [t.name for t in other_tasks], info, k, read_scores(Path(out)))
        _run(pool, _fit, setting, fits, "fits", progress)
    return Path(out)


def _write_record(
    out: Path, plan: Plan, info: ModelInfo, tasks: Sequence[Task], others: Sequence[Task], presets: Mapping[str, Preset],
    texts: Sequence[str],
) -> None:  # fmt: skip
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
        "texts": io.digest(list(texts)), "versions": io.environment(),
    }  # fmt: skip
    path = out / "study.json"
    if path.is_file():
        there = io.read_json(path)
        io.check_record(there, KIND, SCHEMA, ("model", "plan", "tasks", "other_tasks"), str(path))
        for what, old, new in (
            ("another model", there["model"], record["model"]), ("other tasks", there["tasks"], record["tasks"]),
            *((f"another {n}", there["plan"][n], record["plan"][n]) for n in ("limit", "tune")),
        ):  # fmt: skip
            if old != new:
                raise InputError(f"{out} holds a study of {what} ({old}, not {new}); give another folder")
        record["other_tasks"] = {**there["other_tasks"], **record["other_tasks"]}
    io.write_json(path, record)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}


def _run(pool: Pool, work: Any, setting: _Setting, jobs: Sequence[Any], label: str, progress: bool) -> None:
    left = [job for job in jobs if not _is_there(setting, job)]
    with tqdm(total=len(left), desc=label, disable=not progress, unit="run") as bar:
        for _ in pool.run(work, [(setting, job) for job in left], bar):
            pass


# -------------------------------------------------------------------------------------------------- head scores

ScoreJob = tuple[str, str, int]


def _scores_of(plan: Plan, tasks: Sequence[str]) -> list[ScoreJob]:
    wanted = [(t, OWN, s) for t in tasks for s in (*plan.seeds, *plan.extra_seeds)]
    if "selectors" in plan.parts:
        others = [by for by in dict.fromkeys((*plan.selectors, *plan.scored)) if by not in (OWN, CHANCE)]
        wanted += [(t, by, s) for by in others for t in tasks for s in plan.seeds]
    return wanted


def _score(setting: _Setting, job: ScoreJob) -> None:
    task, by, seed = job
    bench = setting.bench(task)
    scores = SELECTORS[by](bench.model, bench.task, seed=seed, progress=False)
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
        found[scores.task, path.stem.split("--")[1].replace("_", " "), int(scores.meta["seed"])] = scores
    return found


# --------------------------------------------------------------------------------------------------------- fits


def plan_fits(
    plan: Plan, tasks: Sequence[str], others: Sequence[str], info: ModelInfo, k: Mapping[str, int],
    scores: Mapping[tuple[str, str, int], HeadScores],
) -> list[Fit]:  # fmt: skip
    """All fits of a study, each once; long ones first."""
    n_heads, parts, seeds = info.n_layers * info.n_heads, plan.parts, plan.seeds
    also = tuple(others) if "other tasks" in parts else ()

    def lofit(task: str, seed: int, by: str, n: int, source: str = "") -> Fit:
        heads = tuple((h.layer, h.head) for h in scores[source or task, by, seed].top(n))
        return Fit(task, LOFIT, seed, by, source or task, n, heads=heads)

    fits: list[Fit] = []
    if "methods" in parts:
        fits += [Fit(t, m, s) for m in (*TRAINED, *STEERING) for t in tasks for s in seeds]
        fits += [lofit(t, s, OWN, min(3 * k[t], n_heads)) for t in tasks for s in seeds]
    if "k" in parts:
        fits += [lofit(t, s, OWN, n) for t in tasks for s in seeds for n in plan.ks or usual_ks(k[t], n_heads)]
    if "transfer" in parts:
        fits += [lofit(t, s, OWN, k[t], o) for t in tasks for o in tasks for s in seeds if o != t]
    if "selectors" in parts:
        chosen = [by for by in plan.selectors if by not in (OWN, CHANCE)]
        fits += [lofit(t, s, by, k[t]) for by in chosen for t in tasks for s in seeds]
    for t in tasks:
        for d in range(plan.draws):
            drawn = HeadSet.random((info.n_layers, info.n_heads), k[t], seed=d)
            heads = tuple((h.layer, h.head) for h in drawn)
            fits.append(Fit(t, LOFIT, d, CHANCE, "", k[t], d, heads=heads))
    own = [replace(lofit(t, s, OWN, k[t]), also=also) for t in tasks for s in seeds]
    if "data" in parts:
        fits += [Fit(t, m, s, n_train=n) for n in plan.sizes for m in plan.trained for t in tasks for s in seeds]
        fits += [Fit(t, LOFIT, s, OWN, t, k[t], n_train=n) for n in plan.sizes for t in tasks for s in seeds]
    zero = [Fit(t, ZERO, seeds[0], also=() if i else also) for i, t in enumerate(tasks)]
    known = set(own)
    fits = [f for f in fits if f not in known]
    return list(dict.fromkeys([*fits, *own, *zero]))


def usual_ks(k: int, n_heads: int) -> tuple[int, ...]:
    """Figure 5's numbers of heads: one, the preset's K (3 %), three times as many (10 %) and 20 % of all heads."""
    return tuple(sorted({min(n, n_heads) for n in (1, k, 3 * k, max(1, round(0.2 * n_heads)))}))


def _spec(setting: _Setting, fit: Fit, tested: str) -> dict[str, Any]:
    task = setting.tasks[tested]
    return {
        "study": SCHEMA, **{k: v for k, v in asdict(fit).items() if k != "also"}, "tested": tested, "data_hash": task.data_hash,
        "form": task.form, "limit": setting.plan.limit, "tune": setting.plan.tune,
    }  # fmt: skip


def _is_there(setting: _Setting, job: Any) -> bool:
    if not isinstance(job, Fit):
        return _score_file(setting, job).is_file()
    return all(run_folder(Path(setting.out) / "runs", _spec(setting, job, t)).is_dir() for t in (job.task, *job.also))


def _fit(setting: _Setting, job: Fit) -> None:
    """Fit, test and keep; other tasks first, so that the run of the task itself says that all is there."""
    bench = setting.bench(job.task, job.n_train)
    tuned = _tuned(setting, job)
    settings = _preset_of(bench, job) if tuned is None else tuned.settings
    fitted, seconds = bench.timed(lambda: _fitted(bench, job, settings))
    model = METHODS[job.method].model(bench) if job.method in METHODS else bench.model
    hurt = None
    if setting.texts and job.also and fitted is not None:
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
            seconds=seconds + took, more={"run": run, "settings": settings, "tuned": tuned and tuned.to_dict()},
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
