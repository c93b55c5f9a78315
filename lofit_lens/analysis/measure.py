"""Shared by all experiments here: a task's metric per item with adapters attached, and its row in a table."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lofit_lens.analysis.resampling import paired_test_of_means
from lofit_lens.checks import check_seed, check_whole, shown
from lofit_lens.errors import InputError
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.evaluation.result import Metric
from lofit_lens.evaluation.stats import PairedTest
from lofit_lens.interventions.base import Intervention, attached
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.registry import task_of

Items = tuple[float, ...]  # the metric of every item of a split, in order


def items_of(
    model: Any, task: Task | str, *adapters: Intervention, split: str = "test", limit: int | None = None
) -> Items:
    """The task's own metric of each item, with adapters attached in the order given.

    Raises:
        InputError, DataError: as in `evaluate`.
    """
    task = task_of(task)
    with attached(model, *adapters):
        result = evaluate(model, task, split=split, limit=limit, progress=False)
    return tuple(result.items[task.metric].tolist())


def summary(items: Sequence[float]) -> dict[str, Any]:
    """`value` (mean), `low` and `high` (95 % bootstrap interval over items; NaN for a single one), `n`."""
    metric = Metric.of(list(items))
    low, high = metric.interval or (np.nan, np.nan)
    return {"value": metric.mean, "low": low, "high": high, "n": metric.n}


def paired(first: Items, second: Items) -> PairedTest:
    """Paired test of first - second over items: bootstrap, or permutation below 50 items."""
    return paired_test_of_means(np.array([first], dtype=float), np.array([second], dtype=float))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, with None for NaN, which JSON lacks."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")  # pyright: ignore[reportReturnType]


def check_ks(ks: Sequence[int] | None, most: int) -> tuple[int, ...]:
    """Numbers of heads to try, ascending; None = 1 to `most`, or powers of two and `most` itself if `most` is above 12.

    Raises:
        InputError: a number outside 1 to `most`, or an empty list.
    """
    if ks is None:
        return (
            tuple(range(1, most + 1))
            if most <= 12
            else (*(2**i for i in range(most.bit_length()) if 2**i < most), most)
        )
    listed: list[Any] = list(ks) if isinstance(ks, Iterable) and not isinstance(ks, str) else []
    if not listed or not all(isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= most for k in listed):
        raise InputError(f"ks is {shown(ks)}; give a list of numbers of heads from 1 to {most}")
    return tuple(sorted(set(listed)))


def check_draws(draws: int, seed: int) -> None:
    """Raise InputError unless there is at least one draw and the seed is valid."""
    check_whole(1, draws=draws)
    check_seed(seed)
