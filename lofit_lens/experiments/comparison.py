"""Methods side by side: the same rows, metric, tuning budget and seeds (the paper's Tables 1, 2 and 3).

Each method's settings are chosen on the validation split (`tune_method`), then it is fitted once a seed and run on the test
split, once. Head selectors are compared in the same way, without a choice of settings: each is followed by offset tuning.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lofit_lens.errors import InputError, unknown
from lofit_lens.evaluation.damage import damage
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.experiments.executors.process import Pool, kept_model
from lofit_lens.experiments.methods import CHANCE, LEARNED, METHODS, SELECTED_BY, Method, Settings, Workbench, method_of
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.runs import DAMAGE_COLUMNS, MethodRuns, Run, load_run, save_run
from lofit_lens.experiments.tables.table import MethodTable
from lofit_lens.experiments.tuning import spec_of, tune_method
from lofit_lens.tasks.base import Task
from lofit_lens.training.selectors import SELECTORS

KEPT = "_lofit_lens_benches"  # attribute of a model: its workbenches


@dataclass(frozen=True)
class Options:
    """How methods are compared; see `compare_methods`."""

    seeds: tuple[int, ...] = (0, 1)
    tuning_seeds: tuple[int, ...] = (0,)
    split: str = "test"
    limit: int | None = None
    n_train: int | None = None
    batch_size: int | None = None
    texts: tuple[str, ...] = ()
    out: str | None = None


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
    reference: str = LEARNED,
    batch_size: int | None = None,
    workers: int = 1,
    out: str | Path | None = None,
    progress: bool = True,
) -> MethodTable:
    """LoFiT beside zero-shot, ITI, RepE, random heads, LoRA, RED and LoReFT on one task.

    Args:
        model: any HookedTransformer or TransformerBridge; or the name or folder of a model, needed for several workers.
        task: with training rows, and validation rows unless all settings are given.
        methods: names or methods of one's own; None = all of `METHODS`.
        settings: method -> settings that are given, not chosen.
        seeds: each method is fitted with each (methods by chance with five or more, zero-shot once).
        tuning_seeds: seeds of the trials.
        split: that the table is about.
        limit: only its first rows.
        n_train: training rows drawn; None = the task's own number.
        texts: ordinary texts on which damage is measured; none = not measured.
        reference: the method that the others are tested against.
        batch_size: of the evaluation, as in `evaluate`.
        workers: processes, each on one thread; more than one need the model by name.
        out: folder for runs and trials; those that are in it are not computed again, so that a stopped comparison goes on.
        progress: show a bar.

    Raises:
        InputError: an unknown method, no seed, a reference that is not compared, or several workers with a model in memory.
        ModelError: a method that cannot be had for this model (found before the first fit).
    """
    return compare_tasks(
        model, [task], methods=methods, settings=settings, seeds=seeds, tuning_seeds=tuning_seeds, split=split, limit=limit,
        n_train=n_train, texts=texts, reference=reference, batch_size=batch_size, workers=workers, out=out, progress=progress,
    )[task.name]  # fmt: skip


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
    out: str | Path | None = None,
    progress: bool = True,
) -> MethodTable:
    """The paper's Table 2: heads by each selector, each followed by offset tuning with the same settings (the preset's).

    Args:
        model: as in `compare_methods`.
        task: with training rows.
        selectors: names (see `training.selectors.SELECTORS`); None = all.
        seeds: of selection and tuning.
        split: as in `compare_methods`, like all that follow.
        limit: only its first rows.
        n_train: training rows drawn.
        batch_size: of the evaluation, as in `evaluate`.
        workers: processes.
        out: folder for runs.
        progress: show a bar.

    Raises:
        InputError: an unknown selector, or as `compare_methods`.
    """
    names = selector_names(selectors)
    return compare_methods(
        model, task, methods=names, settings={n: {} for n in names}, seeds=seeds, split=split, limit=limit, n_train=n_train,
        reference=names[0], batch_size=batch_size, workers=workers, out=out, progress=progress,
    )  # fmt: skip


def selector_names(selectors: Sequence[str] | None = None) -> list[str]:
    """Selectors' names as methods, in the order of `SELECTORS`, the A-norm first.

    Raises:
        InputError: an unknown selector.
    """
    if selectors is None:
        return list(SELECTED_BY)
    for name in selectors:
        if name not in SELECTORS:
            raise unknown("selector", name, SELECTORS)
    return [f"heads by {name}" for name in SELECTORS if name in selectors]


def compare_tasks(
    model: Any,
    tasks: Sequence[Task],
    *,
    methods: Sequence[str | Method] | None = None,
    settings: Mapping[str, Settings] | None = None,
    seeds: Sequence[int] = (0, 1),
    tuning_seeds: Sequence[int] = (0,),
    split: str = "test",
    limit: int | None = None,
    n_train: int | None = None,
    texts: Iterable[str] = (),
    reference: str = LEARNED,
    batch_size: int | None = None,
    workers: int = 1,
    out: str | Path | None = None,
    backend: str = "auto",
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    prepend_bos: bool | None = None,
    name: str | None = None,
    progress: bool = True,
) -> dict[str, MethodTable]:
    """`compare_methods` on several tasks, whose jobs share the workers: task -> table.

    `backend`, `dtype`, `device`, `revision`, `prepend_bos` and `name` are `load_model`'s, for a model given by name. Other
    arguments and errors as in `compare_methods`.
    """
    given = dict(settings or {})
    wanted = [method_of(m) for m in (METHODS if methods is None else methods)]
    names = [m.name for m in wanted]
    if not tasks or not wanted or not seeds:
        raise InputError(f"{len(tasks)} tasks, {len(wanted)} methods, {len(seeds)} seeds; give one or more of each")
    if len(set(names)) < len(names):
        raise InputError(f"a method is given twice: {', '.join(names)}")
    if reference not in names:
        raise InputError(
            f"the reference {reference!r} is not among the methods compared ({', '.join(names)}); name one of them"
        )
    by_name = isinstance(model, str | Path)
    if by_name and (own := next((m.name for m in wanted if m is not method_of(m.name)), None)) is not None:
        raise InputError(
            f"{own} is a method of your own, which needs a loaded model: compare_methods(load_model(...), ...)"
        )
    if workers > 1 and not by_name:
        raise InputError(f"{workers} workers need the model by name, since each loads its own; or give workers=1")
    options = Options(
        tuple(seeds),
        tuple(tuning_seeds),
        split,
        limit,
        n_train,
        batch_size,
        tuple(texts),
        None if out is None else str(out),
    )
    if out is not None:
        Store(out)  # better refused now than after the first fit
    groups = _groups(wanted)
    for m in [] if by_name else wanted:
        m.model(Workbench(model, tasks[0]))
    jobs = [
        (task, [m.name if by_name else m for m in group]) for group in reversed(groups) for task in tasks
    ]  # long ones first
    load = {
        "backend": backend, "dtype": dtype, "device": device, "revision": revision, "prepend_bos": prepend_bos, "name": name,
    }  # fmt: skip
    found: dict[str, list[MethodRuns]] = {task.name: [] for task in tasks}
    with Pool(workers) as pool, tqdm(total=len(jobs), desc="compare", disable=not progress, unit="job") as bar:
        work = [(model, load if by_name else None, task, group, given, options) for task, group in jobs]
        for i, runs in pool.run(_job, work, bar):
            found[jobs[i][0].name] += runs
    return {
        task.name: MethodTable.of(sorted(found[task.name], key=lambda r: names.index(r.method)), reference)
        for task in tasks
    }


def _groups(wanted: Sequence[Method]) -> list[list[Method]]:
    """Methods that are fitted one after another; random heads follow the learned ones, whose settings they take over."""
    rest = [m for m in wanted if m.name != CHANCE]
    groups = [[m] for m in rest]
    for m in wanted:
        if m.name == CHANCE:
            group = next((g for g in groups if g[0].name == LEARNED), None)
            groups.append([m]) if group is None else group.append(m)
    return groups


def _job(
    model: Any,
    load: dict[str, Any] | None,
    task: Task,
    methods: list[str | Method],
    given: dict[str, Settings],
    options: Options,
) -> list[MethodRuns]:
    loaded = model if load is None else kept_model(str(model), **load)
    bench = bench_of(loaded, task, options.n_train)
    return [run_method(bench, method_of(m), given.get(method_of(m).name), options) for m in methods]


def bench_of(model: Any, task: Task, n_train: int | None) -> Workbench:
    """The workbench of a model and a task in this process, made once; it goes with the model."""
    task = task.asked_of(model)
    if (kept := getattr(model, KEPT, None)) is None:
        kept = {}
        object.__setattr__(model, KEPT, kept)
    key = (task.name, task.form, n_train)
    if key not in kept or kept[key].task != task:
        kept[key] = Workbench(model, task, n_train=n_train)
    return kept[key]


def run_method(bench: Workbench, method: Method, settings: Settings | None, options: Options) -> MethodRuns:
    """Choose the method's settings (unless given), then one run a seed."""
    tuned = None
    if settings is None:
        trials = None if options.out is None else Path(options.out) / "trials"
        tuned = tune_method(
            bench, bench.task, METHODS[LEARNED] if method.name == CHANCE else method, seeds=options.tuning_seeds,
            batch_size=options.batch_size, out=trials, progress=False,
        )  # fmt: skip
        settings = tuned.settings
    seeds: Sequence[int] = options.seeds if method.seeded else options.seeds[:1]
    if len(seeds) < method.least_seeds:
        seeds = range(method.least_seeds)
    runs = tuple(_run(bench, method, dict(settings), seed, options) for seed in seeds)
    return MethodRuns(method.name, runs, None if method.name == CHANCE else tuned)


def _run(bench: Workbench, method: Method, settings: dict[str, Any], seed: int, options: Options) -> Run:
    spec = {
        **spec_of(bench, method, settings, seed), "split": options.split, "limit": options.limit,
        "texts": list(options.texts),
    }  # fmt: skip
    root = options.out
    if root is not None and (found := load_run(root, spec)) is not None:
        seconds, took = (found[2].get(k, float("nan")) for k in ("fit_seconds", "eval_seconds"))
        return Run(seed, settings, found[0], fit_seconds=seconds, eval_seconds=took, **found[1]["run"])
    model = method.model(bench)
    fitted, seconds = bench.timed(lambda: method.fit(bench, settings, seed))
    start = time.perf_counter()
    with nullcontext() if fitted is None else fitted.attached(model):
        result = evaluate(
            model, bench.task, split=options.split, limit=options.limit, batch_size=options.batch_size,
            label=method.name, progress=False,
        )  # fmt: skip
    took = time.perf_counter() - start
    hurt = None
    if options.texts and fitted is not None:
        texts = damage(model, fitted, options.texts, progress=False).texts
        hurt = {name: texts[name].tolist() for name in DAMAGE_COLUMNS}
    heads = getattr(fitted, "heads", None)
    more: dict[str, Any] = {
        "n_parameters": 0 if fitted is None else fitted.n_parameters, "damage": hurt,
        "heads": "" if heads is None else str(heads),
    }  # fmt: skip
    timing: dict[str, Any] = {"fit_seconds": seconds, "eval_seconds": took}
    if root is not None:
        save_run(root, spec, result, adapter=fitted, more={"run": more}, timing=timing)
    return Run(seed, settings, result, **more, **timing)
