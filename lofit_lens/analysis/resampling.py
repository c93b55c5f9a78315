"""Joint resampling of the means of several runs on the same items.

Runs on the same items find the same items hard, so their ratio or difference varies less than either mean.
Here every draw takes the same items for all runs, and the same seeds for runs with equally many:

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
    """Scores as an array; a single run becomes one row.

    Args:
        values: [n_seeds, n_items] or [n_items].
        name: name of the run, for error messages.

    Raises:
        InputError: not numbers, rows of unequal length, no items, NaN or infinite values.
    """
    return score_array(values, name, ("n_seeds", "n_items"), single=True)


def score_array(values: ArrayLike, name: str, axes: Sequence[str], *, single: bool = False) -> np.ndarray:
    """Finite scores as an array with these axes.

    Args:
        values: the scores.
        name: name of their owner, for error messages.
        axes: their names, e.g. `("n_seeds", "n_items")`.
        single: accept a single row as one of several.

    Raises:
        InputError: not numbers, rows of unequal length, wrong axes, no scores, NaN or infinite values.
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
            together: give the same seeds in the same order (unrelated seeds may come in any order).
        resamples: number of draws.
        seed: seed of the draws.

    Raises:
        InputError: no runs, runs with different numbers of items, or `resamples` or seed out of range.
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
    """Percentile interval; draws that are NaN count as outside on both sides. (NaN, NaN) if that leaves no bound.

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
    """`bootstrap_interval_over_seeds`, with scores taken as right or wrong if all are 0 or 1; NaN for a single score."""
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    found = bootstrap_interval_over_seeds(values, level=level, resamples=resamples, seed=seed, binary=binary)
    return found or (NAN, NAN)


def paired_test_of_means(
    a: Float[np.ndarray, "_ n_items"], b: Float[np.ndarray, "_ n_items"], *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedTest:
    """Paired test over items of a - b, each item averaged over the seeds first.

    This is the bootstrap test, or below 50 items the permutation test. Seeds are taken as fixed: p says whether other items
    would show the difference, not whether other seeds would.
    """
    test = paired_permutation_test if a.shape[1] < FEW else paired_bootstrap_test
    return test(a.mean(0), b.mean(0), resamples=resamples, seed=seed)


def _counts(generator: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """How often each of n items is drawn in n draws with replacement, [draws, n]."""
    drawn = generator.integers(n, size=(draws, n)) + np.arange(draws)[:, None] * n
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(float)
