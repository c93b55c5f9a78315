"""Accuracy along one setting: number of heads K, training examples n, heads removed (LoFiT paper, Figures 4 and 5)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lofit_lens.analysis.resampling import (
    interval_of,
    item_scores,
    mean_interval,
    paired_test_of_means,
    resampled_means,
)
from lofit_lens.checks import check_number, shown
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import RESAMPLES, holm, mark

Sweep = Mapping[str, Mapping[float, ArrayLike]]


def sweep(values: Sweep, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Mean score at every point of every series, with its interval over seeds and items.

    Args:
        values: series -> x -> item scores `[n_seeds, n_items]`. Seeds and items may differ from point to point.
        level: confidence level of the interval.
        resamples: draws of the bootstrap.
        seed: seed of these draws.

    Returns:
        One row per point, x ascending: series, x, mean, low, high (`bootstrap_interval_over_seeds`; NaN for a single score),
        lowest and highest (means of single seeds), n_seeds, n_items.

    Raises:
        InputError: no series, a series without points, or scores that are not finite numbers `[n_seeds, n_items]`.

    Examples:
        >>> scores = {"LoFiT": {10: [[0, 1, 1, 0]], 100: [[1, 1, 1, 0]]}}
        >>> sweep(scores)[["x", "mean", "n_items"]].to_dict("records")
        [{'x': 10.0, 'mean': 0.5, 'n_items': 4}, {'x': 100.0, 'mean': 0.75, 'n_items': 4}]
    """
    rows = []
    for series, points in _checked(values).items():
        for x, scores in points.items():
            low, high = mean_interval(scores, level=level, resamples=resamples, seed=seed)
            seeds = scores.mean(1)
            rows.append({
                "series": series, "x": x, "mean": float(scores.mean()), "low": low, "high": high,
                "lowest": float(seeds.min()), "highest": float(seeds.max()), "n_seeds": scores.shape[0],
                "n_items": scores.shape[1],
            })  # fmt: skip
    return pd.DataFrame(rows)


def paired_differences(
    values: Sweep, reference: str, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Every other series minus the reference, at the same x and on the same items.

    The interval draws items and seeds with replacement, jointly for both (`resampled_means`). p is two-sided, from the paired
    test over items of the seeds' mean (bootstrap, or permutation below 50 items).

    Args:
        values: as in `sweep`; at each x all series hold the same items in the same order.
        reference: name of a series. If it has a single point (an untuned model), everything is compared with that.
        level: confidence level of the interval.
        resamples: number of draws.
        seed: seed of the draws.

    Returns:
        One row per point: series, x, difference, low, high, p, p_holm (over all rows), mark (of p), n_items.

    Raises:
        InputError: an unknown reference, no other series, an x that it lacks, or different numbers of items; or as in `sweep`.
    """
    grids = _checked(values)
    if reference not in grids:
        raise InputError(f"no series {reference!r} to compare with; there are {', '.join(grids)}")
    if len(grids) < 2:
        raise InputError(f"only the reference {reference!r} is given; a difference needs a second series")
    base, rows = grids[reference], []
    for series, points in grids.items():
        if series == reference:
            continue
        for x, a in points.items():
            b = next(iter(base.values())) if len(base) == 1 else base.get(x)
            if b is None:
                has = ", ".join(f"{at:g}" for at in base)
                raise InputError(f"{series!r} has a point at {x:g}, the reference {reference!r} only at {has}")
            if a.shape[1] != b.shape[1]:
                raise InputError(
                    f"{series!r} at {x:g} has {a.shape[1]} items and {reference!r} {b.shape[1]}; give the same items"
                )
            draws = resampled_means([a, b], resamples=resamples, seed=seed)
            low, high = interval_of(draws[0] - draws[1], level=level) if a.size + b.size > 2 else (np.nan, np.nan)
            p = paired_test_of_means(a, b, resamples=resamples, seed=seed).p
            rows.append({
                "series": series, "x": x, "difference": float(a.mean() - b.mean()), "low": low, "high": high, "p": p,
                "mark": mark(p), "n_items": a.shape[1],
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.insert(6, "p_holm", holm(frame["p"]))
    return frame


def _checked(values: Sweep) -> dict[str, dict[float, np.ndarray]]:
    """series -> x -> scores, x ascending."""
    if not isinstance(values, Mapping) or not values:
        raise InputError(f"values is {shown(values)}; give series -> x -> scores [n_seeds, n_items]")
    found = {}
    for series, points in values.items():
        if not isinstance(points, Mapping) or not points:
            raise InputError(
                f"series {series!r} is {shown(points)}; give x -> scores [n_seeds, n_items], with at least one x"
            )
        for x in points:
            check_number(**{f"an x of {series!r}": x})
        found[series] = {float(x): item_scores(points[x], f"{series!r} at {x}") for x in sorted(points)}
    return found
