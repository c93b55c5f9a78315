"""Do the heads of one task work for another? The LoFiT paper's Figure 2 (section 6, arXiv 2406.01563).

Offsets are tuned on task A at the heads chosen for task B, and tested on A:

    rel(A <- B) = 100 * accuracy(A, heads of B) / accuracy(A, heads of A)        100 on the diagonal

`*` marks p < 0.05 and `+` p < 0.1 (paired test over A's test items of B's heads against A's own). An additional row has heads
drawn at random: what any heads would achieve.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lofit_lens.analysis.measure import records
from lofit_lens.analysis.resampling import (
    NAN,
    interval_of,
    item_scores,
    mean_interval,
    paired_test_of_means,
    resampled_means,
)
from lofit_lens.checks import check_is, check_share, shown
from lofit_lens.errors import InputError
from lofit_lens.evaluation.result import table_html
from lofit_lens.evaluation.stats import FEW, RESAMPLES, holm, mark

RANDOM = "random"


@dataclass(frozen=True, eq=False)
class Transfer:
    """Accuracy of every task with every task's heads.

    Attributes:
        frame: one row per cell: task (tuned and tested), source (of the heads; "random" last), metric, accuracy (mean over
            seeds and items) with accuracy_low and accuracy_high, relative (%) with low and high, p, p_holm (over all
            tested cells), mark (of p), n_seeds, n_items. p is NaN on the diagonal, relative NaN where a task's own
            accuracy is 0.
        per_seed: one row per cell and seed: task, source, seed (its index), accuracy, relative (to the same seed's own
            accuracy if both have equally many seeds, else to the mean own accuracy).
        notes: how to read the matrix, and what is missing and why.
        level: confidence level of the intervals.
        resamples: draws of the bootstrap.
        seed: seed of these draws.
    """

    frame: pd.DataFrame
    per_seed: pd.DataFrame
    notes: tuple[str, ...]
    level: float
    resamples: int
    seed: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that were tuned and tested."""
        return tuple(dict.fromkeys(self.frame["task"]))

    @property
    def sources(self) -> tuple[str, ...]:
        """Tasks that the heads come from, random heads last."""
        return tuple(dict.fromkeys(self.frame["source"]))

    def matrix(self, value: str = "relative") -> pd.DataFrame:
        """Wide form of one column of `frame`: rows = source of the heads (random last), columns = task.

        Raises:
            InputError: no such column.
        """
        if value not in self.frame.columns:
            raise InputError(f"no column {value!r} in a transfer matrix; it has {', '.join(self.frame.columns)}")
        wide = self.frame.pivot(index="source", columns="task", values=value)
        return wide.loc[list(self.sources), list(self.tasks)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN as None."""
        tables = {name: records(table) for name, table in (("cells", self.frame), ("per_seed", self.per_seed))}
        return {
            "kind": "lofit_lens.Transfer", "schema": 1, **tables, "notes": list(self.notes), "level": self.level,
            "resamples": self.resamples, "seed": self.seed,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"Transfer({len(self.tasks)} tasks, heads from {', '.join(self.sources)})"

    def _repr_html_(self) -> str:
        cells = self.frame.set_index(["source", "task"])
        rows = [(s, *(_text(cells.loc[(s, t)]) for t in self.tasks)) for s in self.sources]
        return table_html("Relative accuracy (%): heads from row, tuned on column", ("", *self.tasks), rows, self.notes)


def transfer_matrix(
    runs: Mapping[tuple[str, str], ArrayLike],
    *,
    random: Mapping[str, ArrayLike] | None = None,
    metrics: Mapping[str, str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Transfer:
    """Relative accuracy of tasks tuned at other tasks' heads, with intervals and tests.

    Intervals draw seeds and items with replacement, the same ones in numerator and denominator (`resampled_means`).
    p is from the paired test over items of the seeds' mean: bootstrap, or permutation below 50 items.

    Args:
        runs: (task A tuned and tested, task B that the heads come from) -> item scores of A `[n_seeds, n_items]`, at least
            0; for each A always the same items and the same seeds in the same order. Every A is needed with every B; B may
            have heads without being tuned itself.
        random: task -> scores with heads drawn at random, `[n_draws, n_items]`, for every task.
        metrics: task -> name of the metric, for labels; default "accuracy".
        level: confidence level of the intervals.
        resamples: number of draws.
        seed: seed of the draws.

    Raises:
        InputError: nothing to compare, a missing cell (named), scores of one task with different numbers of items or below
            0, a name in `random` or `metrics` that is not a task, or a task called "random" together with random heads.

    Examples:
        >>> own, other = [1, 1, 1, 0], [1, 1, 0, 0]
        >>> runs = {("a", "a"): own, ("a", "b"): other, ("b", "a"): other, ("b", "b"): own}
        >>> transfer_matrix(runs).matrix().round(1).loc["b", "a"].item()
        66.7
    """
    check_share("level", level)
    for name, value in (("random", random), ("metrics", metrics)):
        check_is(value, (Mapping, type(None)), name, "a mapping by task, or None")
    cells = _checked(runs, random or {}, metrics or {})
    rows, notes = [], []
    for task in dict.fromkeys(t for t, _ in cells):
        sources = [s for t, s in cells if t == task]
        own, n_items = cells[task, task], cells[task, task].shape[1]
        draws = dict(zip(sources, resampled_means([cells[task, s] for s in sources], resamples=resamples, seed=seed),
                         strict=True))  # fmt: skip
        if own.mean() == 0:
            notes.append(f"{task}: accuracy with its own heads is 0, so relative accuracy is undefined (NaN)")
        elif n_items < FEW:
            notes.append(f"{task}: {n_items} items; permutation test")
        for source in sources:
            scores, same = cells[task, source], source == task
            low, high = mean_interval(scores, level=level, resamples=resamples, seed=seed)
            relative = _percent(scores.mean(), own.mean())
            between = (relative, relative) if same else interval_of(_percent(draws[source], draws[task]), level=level)
            p = NAN if same else paired_test_of_means(scores, own, resamples=resamples, seed=seed).p
            rows.append({
                "task": task, "source": source, "metric": (metrics or {}).get(task, "accuracy"),
                "accuracy": float(scores.mean()), "accuracy_low": low, "accuracy_high": high, "relative": float(relative),
                "low": float(between[0]), "high": float(between[1]), "p": p, "p_holm": NAN, "mark": "" if same else mark(p),
                "n_seeds": scores.shape[0], "n_items": n_items,
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    tested = frame["p"].notna().to_numpy()
    frame.loc[tested, "p_holm"] = holm(frame.loc[tested, "p"])
    legend = (
        f"* p < 0.05, + p < 0.1 (paired test over items, not adjusted; p_holm is, over {int(tested.sum())} cells); "
        f"{level:.0%} intervals over seeds and items"
    )
    return Transfer(frame, _per_seed(cells), (legend, *notes), level, resamples, seed)


def _checked(
    runs: Mapping[tuple[str, str], ArrayLike], random: Mapping[str, ArrayLike], metrics: Mapping[str, str]
) -> dict[tuple[str, str], np.ndarray]:
    """All cells in the order of the matrix, by task, random heads last."""
    pairs = isinstance(runs, Mapping) and all(isinstance(key, tuple) and len(key) == 2 for key in runs)
    if not pairs:
        raise InputError(f"runs is {shown(runs)}; give (task, task that the heads come from) -> item scores")
    tasks = list(dict.fromkeys(a for a, _ in runs))
    sources = tasks + [b for b in dict.fromkeys(b for _, b in runs) if b not in tasks]
    if not tasks or (len(sources) < 2 and not random):
        raise InputError(f"heads of {len(sources)} tasks given; a transfer matrix needs at least two, or random heads")
    for name, given in (("random", random), ("metrics", metrics)):
        if set(given) - set(tasks):
            raise InputError(
                f"{name} names {', '.join(sorted(set(given) - set(tasks)))}; the tasks are {', '.join(tasks)}"
            )
    if random and RANDOM in sources:
        raise InputError(f"a task is called {RANDOM!r}, the name of the row of random heads; rename it")
    cells = {}
    for task in tasks:
        for source in sources:
            if (task, source) not in runs:
                raise InputError(
                    f"no run tuned on {task} with the heads of {source}; give every task with every source"
                )
            cells[task, source] = item_scores(runs[task, source], f"{task} with heads of {source}")
        if random:
            if task not in random:
                raise InputError(f"no run tuned on {task} with random heads; give one for every task, or for none")
            cells[task, RANDOM] = item_scores(random[task], f"{task} with random heads")
    for (task, source), scores in cells.items():
        if scores.shape[1] != cells[task, task].shape[1]:
            raise InputError(
                f"{task} has {cells[task, task].shape[1]} items with its own heads and {scores.shape[1]} with those of "
                f"{source}; give the scores of the same items in the same order"
            )
        if scores.min() < 0:
            raise InputError(
                f"a score of {task} with heads of {source} is {scores.min():g}; relative accuracy needs scores of at least 0"
            )
    return cells


def _percent(part: Any, whole: Any) -> Any:
    """100 part / whole, NaN if the whole is 0."""
    return 100 * np.divide(part, whole, out=np.full(np.shape(whole), NAN), where=np.asarray(whole) > 0)


def _per_seed(cells: Mapping[tuple[str, str], np.ndarray]) -> pd.DataFrame:
    rows = []
    for (task, source), scores in cells.items():
        own = cells[task, task].mean(1)
        whole = own if len(own) == len(scores) else np.full(len(scores), own.mean())
        for i, (part, of) in enumerate(zip(scores.mean(1), whole, strict=True)):
            relative = float(_percent(part, of))
            rows.append({"task": task, "source": source, "seed": i, "accuracy": float(part), "relative": relative})
    return pd.DataFrame(rows)


def _text(cell: pd.Series) -> str:
    if np.isnan(cell["relative"]):
        return f"n/a (accuracy {cell['accuracy']:.3f})"
    between = "" if np.isnan(cell["p"]) or np.isnan(cell["low"]) else f" [{cell['low']:.1f}, {cell['high']:.1f}]"
    return f"{cell['relative']:.1f}{between} {cell['mark']}".rstrip()
