"""Choice of settings on the validation rows, with the same number of trials and the same seeds for every method."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lofit_lens.errors import TrainingDiverged

Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Tuned:
    """The settings that were tried, and those that were chosen.

    Attributes:
        method: name.
        task: name of the task.
        metric: the task's own metric, by which the choice was made.
        settings: the chosen point of the grid.
        tried: number of points of the grid.
        trials: one row per point and seed: settings, seed, `value` (mean of the metric over the validation rows; None where
            training diverged), `low` and `high` (95 % over items), `n_items` (validation rows), `seconds` (fit), `note`,
            `chosen`.
    """

    method: str
    task: str
    metric: str
    settings: dict[str, Any]
    tried: int
    trials: pd.DataFrame

    @property
    def at_edge(self) -> list[str]:
        """Settings whose chosen value is the smallest or largest of at least three, and better than its neighbor.

        A wider grid might do even better.
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


def choose(
    method: str, task: str, metric: str, points: Sequence[Settings], n_seeds: int, rows: Sequence[dict[str, Any]]
) -> Tuned:  # fmt: skip
    """Choose the point with the largest mean over seeds (ties: the first); a point with a failed trial is excluded.

    Args:
        method: name.
        task: on whose validation rows they were tried; a name.
        metric: the task's own.
        points: settings, from weak to strong.
        n_seeds: number of trials per point.
        rows: trials, point by point, with their `value` (None if training diverged).

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
