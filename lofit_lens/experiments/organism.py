"""The embedded model's grid: is LoFiT worth its localisation here, and does it find the heads that are known to matter?

For every task and seed: zero-shot; step 1 then step 2 on the K heads it chose; step 2 on random heads (five draws a task);
step 2 on all heads. With `full`, also step 2 on the heads that the *other* tasks chose (the transfer matrix), and every
head's effect by activation patching between a good and a neutral cue, the causal yardstick for the planted heads.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.errors import DataError
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.evaluation.stats import bootstrap_interval_over_seeds
from lofit_lens.experiments.pool import Pool, kept_model, one_thread
from lofit_lens.experiments.runs import save_run
from lofit_lens.heads import Head, HeadScores, HeadSet
from lofit_lens.models import (
    ORGANISM,
    ModelInfo,
    device_of,
    hook_z,
    hooked,
    logits_of,
    model_info,
    tokenizer_of,
)
from lofit_lens.organism.words import TASKS, TaskName
from lofit_lens.organism.world import rows, with_cue
from lofit_lens.tasks import load_task
from lofit_lens.tasks.collate import encode, pad, pad_id
from lofit_lens.training import preset, select_heads, tune_offsets
from lofit_lens.training.patching import patch_effects, replace_head

N_RANDOM = 5
METHODS = ("zero-shot", "LoFiT heads", "random heads", "all heads")


@dataclass(frozen=True)
class Cell:
    """One run of the grid; `heads` is None where they follow from the method."""

    model: str
    backend: str
    task: TaskName
    method: str
    seed: int
    draw: int = 0
    heads: tuple[tuple[int, int], ...] | None = None


@dataclass
class GridResult:
    """What the grid found.

    Attributes:
        runs: one row a run: task, method, seed, draw, metric (name), value in [0, 1], low and high (95 % over items),
            n_items, heads, seconds.
        items: every item's value, one list a row of `runs`.
        scores: (task, seed) -> A-norms of step 1.
        patching: task -> mean change of the right answer's log-prob (nats) when one head's z comes from the good cue.
        planted: task -> the heads that alone could read the cue in pretraining.
        model: what was run.
    """

    runs: pd.DataFrame
    items: list[list[float]]
    scores: dict[tuple[str, int], HeadScores]
    patching: dict[str, HeadScores]
    planted: dict[str, HeadSet]
    model: ModelInfo

    def table(self) -> pd.DataFrame:
        """Each task and method: mean, 95 % interval over runs and items (`low`, `high`), lowest and highest run, runs.

        The interval draws runs and items with replacement; with few runs it can be too narrow.
        """
        found = []
        for key, runs in self.runs.groupby(["task", "method"], sort=False):
            task, method = list(key)  # pyright: ignore
            interval = bootstrap_interval_over_seeds([self.items[i] for i in runs.index], binary=True)
            low, high = interval or (None, None)
            value = runs["value"]
            found.append({
                "task": task, "method": method, "mean": value.mean(), "low": low, "high": high, "min": value.min(),
                "max": value.max(), "count": len(runs),
            })  # fmt: skip
        return pd.DataFrame(found)

    def ranks(self) -> pd.DataFrame:
        """Rank of each planted head by A-norm (each seed) and by patching, from 1."""
        found = []
        for task, heads in self.planted.items():
            for head in heads:
                by_norm = {f"A-norm, seed {s}": sc.rank(head) for (t, s), sc in self.scores.items() if t == task}
                by_patch = {"patching": self.patching[task].rank(head)} if task in self.patching else {}
                found.append({"task": task, "head": str(head), **by_norm, **by_patch})
        return pd.DataFrame(found)


def run_demo(
    *,
    model: str = "organism",
    backend: str = "auto",
    seeds: Sequence[int] = (0, 1),
    out: str | Path | None = None,
    full: bool = False,
    draws: int = N_RANDOM,
    workers: int = 1,
    progress: bool = True,
) -> GridResult:
    """Run the grid; every run is single-threaded, so that its numbers do not depend on `workers`.

    Args:
        model: `"organism"`, or a folder written by `python -m lofit_lens.organism.train`.
        backend: as in `load_model`.
        seeds: of LoFiT (draw of examples, init, row order).
        out: store for the runs; None = keep nothing.
        full: add the transfer matrix and the patching ranks.
        draws: of random heads.
        workers: processes.
        progress: show a bar.
    """
    plant = planted(ORGANISM if model == "organism" else Path(model))
    cells = [Cell(model, backend, t, m, s) for t in TASKS for s in seeds for m in ("LoFiT heads", "all heads")]
    cells += [Cell(model, backend, t, "random heads", seeds[d % len(seeds)], d) for t in TASKS for d in range(draws)]
    cells += [Cell(model, backend, t, "zero-shot", seeds[0]) for t in TASKS]
    n_cross = len(TASKS) * (len(TASKS) - 1) * len(seeds) if full else 0
    records: list[dict[str, Any]] = []
    scores: dict[tuple[str, int], HeadScores] = {}
    with Pool(workers) as pool, tqdm(total=len(cells) + n_cross, desc="runs", disable=not progress, unit="run") as bar:
        for i, (record, values) in pool.run(run_cell, [(c, out) for c in cells], bar):
            records.append(record)
            cell = cells[i]
            if values is not None:
                scores[cell.task, cell.seed] = HeadScores(values, "A-norm", model, cell.task)
        if full:
            crossed = [
                Cell(model, backend, t, f"heads of {o}", s, heads=_chosen(records, o, s))
                for t in TASKS for o in TASKS for s in seeds if o != t
            ]  # fmt: skip
            records += [record for _, (record, _) in pool.run(run_cell, [(c, out) for c in crossed], bar)]
    order = {m: i for i, m in enumerate((*METHODS, *(f"heads of {t}" for t in TASKS)))}
    records.sort(key=lambda r: (TASKS.index(r["task"]), order[r["method"]], r["seed"], r["draw"]))
    loaded = kept_model(model, backend=backend)
    with one_thread():
        patching = {t: cue_patching(loaded, t) for t in TASKS} if full else {}
    ordered = {(t, s): scores[t, s] for t in TASKS for s in seeds}
    items = [record.pop("items") for record in records]
    return GridResult(pd.DataFrame(records), items, ordered, patching, plant, model_info(loaded))


def planted(folder: Path) -> dict[str, HeadSet]:
    """The planted heads of a trained organism, by task.

    Raises:
        DataError: the folder has no organism.json.
    """
    record = io.read_json(folder / "organism.json")
    if not isinstance(record, dict) or "planted_heads" not in record:
        raise DataError(f"{folder / 'organism.json'} lacks the field 'planted_heads'")
    return {
        task: HeadSet([Head.parse(h) for h in heads], label="planted")
        for task, heads in record["planted_heads"].items()
    }


def _chosen(records: Sequence[dict[str, Any]], task: str, seed: int) -> tuple[tuple[int, int], ...]:
    found = next(r for r in records if (r["task"], r["seed"], r["method"]) == (task, seed, "LoFiT heads"))
    return tuple((h.layer, h.head) for h in map(Head.parse, found["heads"].split()))


def run_cell(cell: Cell, out: str | Path | None = None) -> tuple[dict[str, Any], list[list[float]] | None]:
    """One run: its row for the table, and the A-norms where heads were selected."""
    start = time.perf_counter()
    model = kept_model(cell.model, backend=cell.backend)
    task, info = load_task(f"organism/{cell.task}"), model_info(model)
    settings, grid = preset(info, task.family, task.objective), (info.n_layers, info.n_heads)
    scores = lofit = None
    if cell.method == "LoFiT heads":
        scores = select_heads(model, task, seed=cell.seed, progress=False)
        heads = scores.top(settings.k)
    elif cell.method == "random heads":
        heads = HeadSet.random(grid, settings.k, seed=cell.draw)
    elif cell.method == "all heads":
        heads = HeadSet.all(grid)
    elif cell.heads is not None:
        heads = HeadSet(cell.heads, shape=grid, label=cell.method)
    else:
        heads = None
    if heads is None:
        result = evaluate(model, task, label=cell.method, progress=False)
    else:
        lofit = tune_offsets(model, task, heads, seed=cell.seed, progress=False)
        with lofit.attached(model):
            result = evaluate(model, task, label=cell.method, progress=False)
    seconds = time.perf_counter() - start
    if out is not None:
        spec = {**asdict(cell), "task": task.name, "model": info.to_dict(), "k": lofit and lofit.k,
                "data_hash": task.data_hash, "select": settings.select.to_dict(), "tune": settings.tune.to_dict()}  # fmt: skip
        save_run(out, spec, result, adapter=lofit, scores=scores, timing={"seconds": seconds})
    metric = result.metrics[task.metric]
    low, high = metric.interval or (None, None)
    record = {
        "task": cell.task, "method": cell.method, "seed": cell.seed, "draw": cell.draw, "metric": task.metric,
        "value": metric.mean, "low": low, "high": high, "n_items": metric.n, "heads": "" if lofit is None else str(lofit.heads),
        "seconds": seconds, "items": result.items[task.metric].tolist(),
    }  # fmt: skip
    return record, None if scores is None else scores.values.tolist()


@torch.no_grad()
def cue_patching(model: Any, task: TaskName, *, split: str = "val") -> HeadScores:
    """Activation patching, one head at a time: z of a head from the good-cue prompt put into the neutral one.

    The score is the mean change, over the split's rows, of the right answer's log-prob in nats. Both prompts have the same
    tokens but the cue word, so that positions correspond.
    """
    tokenizer, device = tokenizer_of(model), device_of(model)
    listed = rows(task, split)  # pyright: ignore[reportArgumentType]
    answers = [encode(tokenizer, r["prompt"] + " " + (r.get("answer") or r["best"]))[-1] for r in listed]
    sides = {}
    for kind in ("good", "neutral"):
        prompts = [encode(tokenizer, (with_cue(task, r, kind) if kind == "good" else r)["prompt"]) for r in listed]
        sides[kind] = pad(prompts, side="left", pad_id=pad_id(tokenizer), device=device)
    target = torch.tensor(answers, device=device)

    def answer_log_probs(side: str) -> torch.Tensor:
        logits = logits_of(model, *sides[side])[:, -1]
        return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

    @functools.lru_cache(maxsize=1)  # heads come layer by layer
    def good_z(layer: int) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with hooked(hook_z(model, layer), lambda z, hook: kept.append(z.clone())):
            answer_log_probs("good")
        return kept[0]

    effects = patch_effects(
        model, lambda: answer_log_probs("neutral"), progress=False,
        patch=lambda head: replace_head(head.head, good_z(head.layer)[:, :, head.head]),
    )  # fmt: skip
    return HeadScores(effects.mean(dim=-1), "patching effect", model_info(model).name, task)
