"""Choice of hyperparameters on the validation split: the same number of trials and the same seeds for every method."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.errors import InputError, TrainingDiverged
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.experiments.methods import Method, Settings, Workbench, method_of
from lofit_lens.tasks.base import Task

KIND, SCHEMA = "lofit_lens.trial", 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was tried, and what was chosen.

    Attributes:
        method: name.
        task: name.
        metric: the task's own, by which the choice was made.
        settings: the chosen point of the grid.
        tried: points of the grid.
        trials: one row a point and seed: settings, seed, `value` (mean of the metric over the validation rows; None where
            training diverged), `low` and `high` (95 % over items), `seconds` (fit), `note`, `chosen`.
    """

    method: str
    task: str
    metric: str
    settings: dict[str, Any]
    tried: int
    trials: pd.DataFrame

    @property
    def at_edge(self) -> list[str]:
        """Settings of which the smallest or largest of three or more numbers was chosen, and is better than the one next to it.

        A wider grid might do better still.
        """
        found, values = [], {}
        for row in self.trials.to_dict("records"):
            values.setdefault(_key(row, self.settings), []).append(row["value"])
        means = {point: float(np.mean([np.nan if v is None else v for v in of])) for point, of in values.items()}
        for name, value in self.settings.items():
            known = sorted({v for v in self.trials[name] if isinstance(v, int | float)})
            if len(known) < 3 or value not in (known[0], known[-1]):
                continue
            beside = {**self.settings, name: known[1] if value == known[0] else known[-2]}
            if not means.get(_key(beside, self.settings), np.nan) >= means[_key(self.settings, self.settings)]:
                found.append(name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rows = self.trials.astype(object).where(self.trials.notna(), None).to_dict("records")
        return {
            "method": self.method, "task": self.task, "metric": self.metric, "split": "val", "settings": self.settings,
            "tried": self.tried, "trials": rows,
        }  # fmt: skip


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

    The best point has the largest mean of the task's own metric over seeds; of equal ones the first in the grid, whose points
    go from weak to strong. The test split is not touched.

    Args:
        model: any HookedTransformer or TransformerBridge, or a `Workbench` of it, whose shared work is then used.
        task: with training and validation rows.
        method: a name (see `METHODS`) or a method of one's own.
        grid: settings to try; None = the method's own grid of `TRIALS` points.
        seeds: each point is tried with each.
        n_train: training rows drawn; None = the task's own number.
        batch_size: of the evaluation, as in `evaluate`.
        out: folder that keeps each trial; trials that are in it already are not run again.
        progress: show a bar.

    Raises:
        InputError: unknown method, an empty grid, no seed, or a task without validation rows.
        TrainingDiverged: every point diverged.
    """
    chosen = method_of(method)
    bench = model if isinstance(model, Workbench) else Workbench(model, task, n_train=n_train)
    points = [dict(p) for p in (chosen.grid(bench) if grid is None else grid)]
    if not points or not seeds:
        raise InputError(
            f"{len(points)} settings and {len(seeds)} seeds to try for {chosen.name}; give one or more of each"
        )
    if not task.test.get("val"):
        raise InputError(
            f"{task.name} has no validation rows to choose by; give settings for every method instead "
            "(compare_methods(..., settings={...}))"
        )
    rows = []
    with tqdm(total=len(points) * len(seeds), desc=f"tune {chosen.name}", disable=not progress, unit="trial") as bar:
        for point in points:
            for seed in seeds:
                rows.append({**point, "seed": seed, **_trial(bench, chosen, point, seed, batch_size, out)})
                bar.update()
    return choose(chosen.name, task.name, task.metric, points, len(seeds), rows)


def choose(
    method: str, task: str, metric: str, points: Sequence[Settings], n_seeds: int, rows: Sequence[dict[str, Any]]
) -> Tuned:  # fmt: skip
    """The best of the points: the largest mean over seeds, of equal ones the first; a point with a failed trial is out.

    Args:
        method: name.
        task: on whose validation rows they were tried; a name.
        metric: the task's own.
        points: settings, from weak to strong.
        n_seeds: trials a point.
        rows: trials, point by point, with their `value` (None where training diverged).

    Raises:
        TrainingDiverged: every point diverged.
    """
    means: list[float | None] = []
    for i in range(len(points)):
        values = [r["value"] for r in rows[i * n_seeds : (i + 1) * n_seeds]]
        means.append(None if None in values else sum(values) / len(values))
    known = [m for m in means if m is not None]
    if not known:
        raise TrainingDiverged(f"{method} diverged at every point of its grid: {list(points)}; give smaller ones")
    best = means.index(max(known))
    trials = pd.DataFrame([{**row, "chosen": i // n_seeds == best} for i, row in enumerate(rows)])
    return Tuned(method, task, metric, dict(points[best]), len(points), trials)


def _key(point: Mapping[Any, Any], names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(point[n] for n in names)


def _trial(
    bench: Workbench,
    method: Method,
    point: Mapping[str, Any],
    seed: int,
    batch_size: int | None,
    out: str | Path | None,
) -> dict[str, Any]:
    spec = {**spec_of(bench, method, point, seed), "split": "val"}
    path = None if out is None else Path(out) / f"trial-{io.digest(spec)[:16]}.json"
    if path is not None and path.is_file():
        record = io.read_json(path)
        io.check_record(record, KIND, SCHEMA, ("spec", "found"), str(path))
        return record["found"]
    model, task = method.model(bench), bench.task
    found: dict[str, Any] = {"value": None, "low": None, "high": None, "seconds": None, "note": ""}
    try:
        fitted, found["seconds"] = bench.timed(lambda: method.fit(bench, point, seed))
    except TrainingDiverged as e:
        log.warning("%s at %s: %s", method.name, dict(point), e)
        found["note"] = str(e)
    else:
        with nullcontext() if fitted is None else fitted.attached(model):
            metric = evaluate(model, task, split="val", batch_size=batch_size, progress=False).metrics[task.metric]
        low, high = metric.interval or (None, None)
        found |= {"value": metric.mean, "low": low, "high": high}
    if path is not None:
        record = {"kind": KIND, "schema": SCHEMA, "spec": spec, "found": found, "versions": io.environment()}
        io.write_json(path, record)
    return found


def spec_of(bench: Workbench, method: Method, point: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """All that tells one fit from another."""
    return {
        "task": bench.task.name, "data_hash": bench.task.data_hash, "form": bench.task.form, "method": method.name,
        "settings": dict(point), "seed": seed, "n_train": bench.n_train, "model": bench.info.to_dict(),
        "preset": {
            "k": bench.preset.k, "select": bench.preset.select.to_dict(), "tune": bench.preset.tune.to_dict(),
        },
    }  # fmt: skip
