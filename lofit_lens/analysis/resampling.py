"""Means of several runs on the same items, drawn again together.

Runs that answered the same items share what is hard about them, so their ratio or difference is steadier than either mean.
Here every draw takes the same items for all of them, and the same seeds for those with equally many:

    m*_g = mean over s in S*_g, i in I* of values_g[s, i]      S* seeds, I* items, both drawn with replacement
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lofit_lens.checks import check_seed, check_share, check_whole
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import (
    BATCH_NUMBERS,
    FEW,
    RESAMPLES,
    PairedTest,
    bootstrap_interval_over_seeds,
    paired_bootstrap_test,
    paired_permutation_test,
)

NAN = float("nan")


def item_scores(values: ArrayLike, name: str) -> Float[np.ndarray, "n_seeds n_items"]:
    """These scores as an array, a single run as one row.

    Args:
        values: [n_seeds, n_items] or [n_items].
        name: of the run, for the error.

    Raises:
        InputError: not numbers, rows of unequal length, no items, NaN or infinite values.
    """
    return score_array(values, name, ("n_seeds", "n_items"), single=True)


def score_array(values: ArrayLike, name: str, axes: Sequence[str], *, single: bool = False) -> np.ndarray:
    """Scores as an array with these axes, all of them finite.

    Args:
        values: the scores.
        name: of what has them, for the error.
        axes: their names, e.g. `("n_seeds", "n_items")`.
        single: take a single row as one of several.

    Raises:
        InputError: not numbers, rows of unequal length, other axes, no scores, NaN or infinite values.
    """
    wanted = f"[{', '.join(axes)}]"
    try:
        found = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as e:
        raise InputError(f"the scores of {name} must be numbers {wanted}, rows of equal length: {e}") from e
    found = np.atleast_2d(found) if single else found
    if found.ndim != len(axes) or not found.size:
        raise InputError(f"the scores of {name} have shape {found.shape}; give {wanted} with at least one of each")
    if not np.isfinite(found).all():
        where = np.argwhere(~np.isfinite(found))[0].tolist()
        raise InputError(f"score {where} of {name} is {found[tuple(where)]}; drop or replace such items first")
    return found


def resampled_means(
    runs: Sequence[Float[np.ndarray, "_ n_items"]], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "n_runs resamples"]:
    """Mean of every run in each draw of items and seeds.

    Args:
        runs: [n_seeds, n_items] each; the same items in the same order. Runs with equally many seeds have theirs drawn
            together: give the same seeds in the same order (for unrelated seeds any order does).
        resamples: draws.
        seed: of the draws.

    Raises:
        InputError: no runs, runs of different numbers of items, or a draw setting out of range.
    """
    if not runs or len({r.shape[1] for r in runs}) > 1:
        raise InputError(f"runs of {[r.shape[1] for r in runs]} items; give runs on the same items in the same order")
    check_whole(1, resamples=resamples)
    check_seed(seed)
    generator, n_items = np.random.default_rng(seed), runs[0].shape[1]
    sizes = sorted({r.shape[0] for r in runs})
    found = np.empty((len(runs), resamples))
    step = max(1, BATCH_NUMBERS // n_items)
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        items = _counts(generator, n, n_items)
        seeds = {size: _counts(generator, n, size) for size in sizes}
        for g, run in enumerate(runs):
            found[g, start : start + n] = np.einsum("ds,ds->d", items @ run.T, seeds[run.shape[0]]) / run.size
    return found


def interval_of(draws: Float[np.ndarray, " resamples"], *, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval; draws that are NaN count as lying outside on both sides. NaN, NaN where that leaves no end.

    Raises:
        InputError: a level outside (0, 1).
    """
    check_share("level", level)
    unknown = np.isnan(draws)
    low, high = np.sort(np.where(unknown, -np.inf, draws)), np.sort(np.where(unknown, np.inf, draws))
    at = int(round((1 - level) / 2 * draws.size, 6))
    ends = float(low[at]), float(high[draws.size - 1 - at])
    return ends if np.isfinite(ends).all() else (NAN, NAN)


def mean_interval(
    values: Float[np.ndarray, "n_seeds n_items"], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap_interval_over_seeds` of scores that are taken as right or wrong where all are 0 or 1; NaN for one score."""
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    found = bootstrap_interval_over_seeds(values, level=level, resamples=resamples, seed=seed, binary=binary)
    return found or (NAN, NAN)


def paired_test_of_means(
    a: Float[np.ndarray, "_ n_items"], b: Float[np.ndarray, "_ n_items"], *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedTest:
    """Paired test over items of a - b, each item averaged over the seeds first.

    The bootstrap test, or below 50 items the permutation test. The seeds are taken as given: p says whether other items
    would show the difference, not whether other seeds would.
    """
    test = paired_permutation_test if a.shape[1] < FEW else paired_bootstrap_test
    return test(a.mean(0), b.mean(0), resamples=resamples, seed=seed)


def _counts(generator: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """How often each of n things comes up in n draws with replacement, [draws, n]."""
    drawn = generator.integers(n, size=(draws, n)) + np.arange(draws)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(float)
