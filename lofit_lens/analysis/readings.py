"""What a study's adapters say about the model: run once and kept in the study's folder, so that figures and report only read.

`RESULTS/readings/<task>.json` holds, for LoFiT's adapter of a task (its own heads, first seed): promoted tokens, norms and
cosines, attention patterns, what each head is worth, what the model cannot do without the chosen heads, how representations
drift, and whether the adapter works behind long contexts; `RESULTS/readings/together.json` what happens when adapters of several
tasks are attached together or learned in turn.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.analysis.attention import attention_patterns
from lofit_lens.analysis.drift import drift
from lofit_lens.analysis.geometry import geometry
from lofit_lens.analysis.interference import interference, learned_in_turn, long_context
from lofit_lens.analysis.logit_lens import promoted_tokens
from lofit_lens.analysis.measure import records
from lofit_lens.analysis.needed import drop_edits, keep_only, leave_one_out, removal
from lofit_lens.errors import DataError, InputError, TrainingDiverged
from lofit_lens.experiments.executors.process import Pool, kept_model
from lofit_lens.experiments.tables.results import Results, load_results
from lofit_lens.heads import HeadSet
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.models import context_length, tokenizer_of
from lofit_lens.probing.probes import fit_probes
from lofit_lens.probing.reading import reading_vectors
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import encode

KIND, SCHEMA = "lofit_lens.readings", 1
TOGETHER = "together"
PROMPTS = 32  # validation prompts that norms, scales and drift are measured on
LONG_ROWS = 60  # test rows asked behind long contexts
SHOWN = 2  # prompts whose attention patterns are kept
ALL_HEADS = 128  # up to so many heads in a model, the patterns of all are kept; else those of the adapter's heads
LONGEST = 60  # tokens of a prompt whose patterns are kept

log = logging.getLogger(__name__)


def run_readings(
    model: Any,
    tasks: Sequence[Task],
    *,
    out: str | Path,
    other_tasks: Sequence[Task] = (),
    texts: Sequence[str] = (),
    draws: int = 5,
    grids: Sequence[str] | None = None,
    workers: int = 1,
    backend: str = "auto",
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    prepend_bos: bool | None = None,
    name: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Read the adapters that a study holds; what is in its folder already is not computed again.

    Args:
        model: as in `load_model`, or loaded.
        tasks: of the study.
        out: the study's folder.
        other_tasks: of the study; one named `<task>-cued`, which the unmodified model can do, shows whether it needs the heads.
        texts: ordinary texts that stand in front of questions in long contexts; none = that part is left out.
        draws: of random heads and orders.
        grids: names of the study's grids, where the folder holds others too; see `load_results`.
        workers: processes, each on one thread.
        backend: as in `load_model`, like the five that follow, for a model given by name.
        dtype: of the weights.
        device: of the model.
        revision: of the model.
        prepend_bos: whether BOS stands in front.
        name: of the model in results.
        progress: show a bar.

    Returns:
        The files that were written.

    Raises:
        DataError: the folder holds no study.
    """
    results = load_results(out, grids=grids)
    load = {
        "backend": backend, "dtype": dtype, "device": device, "revision": revision, "prepend_bos": prepend_bos, "name": name,
    }  # fmt: skip
    by_name = isinstance(model, str | Path)
    every = {t.name: t for t in (*tasks, *other_tasks)}
    jobs = [
        t.name for t in tasks if len(results.lofit(t.name, seed=results.seeds[0]))
    ]  # head scores alone have no adapter
    if len(jobs) > 1 and set(jobs) == set(results.tasks):
        jobs.append(TOGETHER)
    asked = {name: _asked(results, name, every, texts, draws) for name in jobs}
    left = [name for name in jobs if not _is_there(results.folder, name, asked[name])]
    work = [
        (model, load if by_name else None, str(out), every, name, tuple(texts), asked[name], grids) for name in left
    ]
    with Pool(workers) as pool, tqdm(total=len(left), desc="readings", disable=not progress, unit="task") as bar:
        for _ in pool.run(_read, work, bar):
            pass
    return [reading_file(results.folder, name) for name in left]


def reading_file(folder: Path, task: str) -> Path:
    """Where a task's reading lies in a study's folder."""
    return folder / "readings" / f"{task.replace('/', '-').replace(':', '-')}.json"


def read_readings(results: Results) -> dict[str, dict[str, Any]]:
    """Task (and `"together"`) -> what was read of this model, as far as it is there.

    Raises:
        DataError: a damaged file.
    """
    found = {}
    for name in (*results.tasks, TOGETHER):
        path = reading_file(results.folder, name)
        if path.is_file():
            record = io.read_json(path)
            io.check_record(record, KIND, SCHEMA, ("task", "parts", "asked"), str(path))
            if record["asked"].get("model") == results.record["model"]:
                found[name] = record["parts"]
    return found


def _asked(results: Results, name: str, tasks: Mapping[str, Task], texts: Sequence[str], draws: int) -> dict[str, Any]:
    """What a reading depends on; where it is not what a file was made from, the reading is made anew."""
    of = results.tasks if name == TOGETHER else (name,)
    wide = [] if name == TOGETHER else results.lofit(name, seed=results.seeds[0], k=results.wide_k(name)).index
    return {
        "model": results.record["model"], "seed": results.seeds[0], "draws": draws, "limit": results.record["limit"],
        "heads": {t: str(results.adapter(t).heads) for t in of}, "cued": f"{name}-cued" in tasks, "wide": len(wide) > 0,
        "texts": io.digest(list(texts)) if texts else "",
    }  # fmt: skip


def _is_there(folder: Path, name: str, asked: dict[str, Any]) -> bool:
    path = reading_file(folder, name)
    if not path.is_file():
        return False
    record = io.read_json(path)
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise DataError(f"{path} is not a {KIND} record; remove it")
    return record.get("asked") == asked


def _read(
    model: Any, load: dict[str, Any] | None, folder: str, tasks: Mapping[str, Task], name: str, texts: tuple[str, ...],
    asked: dict[str, Any], grids: Sequence[str] | None,
) -> None:  # fmt: skip
    loaded = model if load is None else kept_model(str(model), **load)
    results = load_results(folder, grids=grids)
    if name == TOGETHER:
        parts = _together(loaded, results, tasks)
    else:
        parts = _of_task(loaded, results, tasks, name, texts, asked["draws"])
    record = {
        "kind": KIND,
        "schema": SCHEMA,
        "task": name,
        "parts": parts,
        "asked": asked,
        "versions": io.environment(),
    }
    io.write_json(reading_file(results.folder, name), record)


def _of_task(
    model: Any, results: Results, tasks: Mapping[str, Task], name: str, texts: tuple[str, ...], draws: int
) -> dict[str, Any]:
    task, lofit = tasks[name], results.adapter(name, model=model)
    seed, limit = results.seeds[0], results.record["limit"]
    split = "val" if task.test.get("val") else "train"
    prompts = [e.prompt for e in task.examples(split, limit=PROMPTS)]
    options: dict[str, Any] = {"limit": limit, "progress": False}
    removed: dict[str, Any] = {"ks": [lofit.k], "draws": draws, **options}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tokens": lambda: promoted_tokens(model, lofit, prompts=prompts).to_dict(),
        "geometry": lambda: _geometry(model, task, lofit, prompts, seed),
        "attention": lambda: _patterns(model, lofit, prompts),
        "leave_one_out": lambda: leave_one_out(model, task, lofit, **options).to_dict(),
        "keep_only": lambda: keep_only(model, task, lofit, draws=min(2, draws), **options).to_dict(),
        "removal": lambda: removal(model, task, lofit.heads, adapter=lofit, **removed).to_dict(),
        "drift": lambda: drift(model, lofit, prompts, progress=False).to_dict(),
    }
    if (cued := tasks.get(f"{name}-cued")) is not None:
        # Means over neutral prompts: those over cued ones would hold the cue.
        parts["removal_cued"] = lambda: removal(model, cued, lofit.heads, prompts=prompts, **removed).to_dict()
    if len(results.lofit(name, k=results.wide_k(name), seed=seed)):
        wide = results.adapter(name, k=results.wide_k(name), model=model)
        parts["removal_edits"] = lambda: drop_edits(model, task, wide, lofit.heads, **removed).to_dict()
    if texts:
        rows = min(LONG_ROWS, limit or LONG_ROWS)
        parts["long_context"] = lambda: long_context(
            model, task, lofit, texts, _lengths(model), separator=" ", limit=rows, progress=False
        ).to_dict()
    return _parts(parts)


def _parts(named: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Each part's result; what a model or task does not allow is left out and said."""
    found = {}
    for name, make in named.items():
        try:
            found[name] = make()
        except (InputError, TrainingDiverged) as e:
            log.warning("%s is left out: %s", name, e)
    return found


def _lengths(model: Any) -> tuple[int, ...]:
    """Tokens in front of a question: none, a fifth and three fifths of the context, at most 2,000."""
    n = context_length(model)
    return (0, min(400, n // 5), min(2000, 3 * n // 5))


def _geometry(model: Any, task: Task, lofit: Lofit, prompts: list[str], seed: int) -> dict[str, Any]:
    """Norms and cosines; without ITI's or RepE's directions where the task has no right and wrong statements."""
    probes = reading = None
    try:
        probes = fit_probes(model, task, seed=seed, progress=False)
        reading = reading_vectors(model, task, seed=seed, progress=False)
    except InputError as e:
        log.warning("cosines with ITI's and RepE's directions are left out: %s", e)
    return {"rows": records(geometry(model, lofit, prompts=prompts, probes=probes, reading=reading))}


def _patterns(model: Any, lofit: Lofit, prompts: Sequence[str]) -> dict[str, Any]:
    """Attention with the adapter: of all heads of a small model, else of the adapter's; on prompts that can be read."""
    short = [p for p in prompts if len(encode(tokenizer_of(model), p)) <= LONGEST][:SHOWN]
    if not short:
        raise InputError(f"every prompt is longer than {LONGEST} tokens, of which a pattern could be read")
    grid = (lofit.shape[0], lofit.shape[1])
    heads = HeadSet.all(grid) if grid[0] * grid[1] <= ALL_HEADS else lofit.heads
    with lofit.attached(model):
        return attention_patterns(model, short, heads).to_dict()


def _together(model: Any, results: Results, tasks: Mapping[str, Task]) -> dict[str, Any]:
    options: dict[str, Any] = {"limit": results.record["limit"], "progress": False}
    pairs = {t: (tasks[t], results.adapter(t, model=model)) for t in results.tasks}
    heads = {t: lofit.heads for t, (_, lofit) in pairs.items()}
    named = {t: tasks[t] for t in pairs}
    return _parts({
        "interference": lambda: interference(model, pairs, **options).to_dict(),
        "learned_in_turn": lambda: learned_in_turn(model, named, heads, seed=results.seeds[0], **options)[0].to_dict(),
    })  # fmt: skip
