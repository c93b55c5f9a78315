"""Uncertainty of a mean, and paired tests of two runs on the same items.

With `d_i = a_i - b_i`, the difference of two runs on item i, and `D = mean(d)`:

    interval     percentiles of mean(d*), d* = n draws from d with replacement
    bootstrap    p = (1 + #{mean(d*) - D beyond D} + #{ties} / 2) / (1 + resamples)
    permutation  p = share of mean(s * d) at least as extreme as D, s_i = -1 or +1
    power        P(T > t), T noncentral t with n - 1 degrees of freedom, shifted by D sqrt(n) / sd

Sources: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 13, 15 and 16; Berg-Kirkpatrick et al. 2012,
An Empirical Investigation of Statistical Significance in NLP; Lancaster 1961 (ties count half); Phipson & Smyth 2010
(p is never 0); Owen 2007, The Pigeonhole Bootstrap (seeds and items); Holm 1979; Benjamini & Hochberg 1995.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy  # submodules load on first use: scipy.stats is slow to import
from numpy.typing import ArrayLike

from lofit_lens.checks import check_one_of, check_seed, check_share, check_whole
from lofit_lens.errors import InputError

RESAMPLES = 10_000
BATCH_NUMBERS = 2_000_000  # numbers held at once while resampling: some tens of MB
FEW = 50  # items; with fewer, the bootstrap test is too liberal, while the permutation test keeps its level
ALTERNATIVES = ("two-sided", "greater", "less")


def mark(p: float) -> str:
    """`*` for p < 0.05, `+` for p < 0.1, else an empty text: the marks of the LoFiT paper's Figure 2.

    Raises:
        InputError: p is not in [0, 1].
    """
    _p_values([p])
    return "*" if p < 0.05 else "+" if p < 0.1 else ""


def p_in_words(p: float) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


@dataclass(frozen=True)
class PairedTest:
    """Difference of two runs on the same items, with its uncertainty. Prints as `+0.120 [0.050, 0.190], p = 0.004 *`.

    Attributes:
        difference: mean of a - b.
        interval: percentile bootstrap interval of the difference; None for a single item.
        p: probability of a difference this large if the true one is 0.
        alternative: `"two-sided"`, `"greater"` (a > b) or `"less"` (a < b).
        method: `"paired bootstrap"` or `"paired permutation"`.
        n: number of items.
        resamples: number of draws for p; 2**n if the permutation test enumerated all of them.
        seed: seed of the draws.
        level: confidence level of the interval.
    """

    difference: float
    interval: tuple[float, float] | None
    p: float
    alternative: str
    method: str
    n: int
    resamples: int
    seed: int
    level: float = 0.95

    @property
    def mark(self) -> str:
        """`*`, `+` or nothing; see `mark`."""
        return mark(self.p)

    def __str__(self) -> str:
        between = f" [{self.interval[0]:z.3f}, {self.interval[1]:z.3f}]" if self.interval else ""
        return f"{self.difference:+z.3f}{between}, {p_in_words(self.p)} {self.mark}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; `PairedTest(**d)` is the inverse."""
        return asdict(self)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0, binary: bool = False
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over items; None for fewer than two values.

    With `binary` (values are right or wrong), resampling has no spread if all values are 0 or all are 1. In that case the
    interval is the exact binomial one (Clopper & Pearson 1934): 0 to 1.7 % for no hit in 216.

    Raises:
        InputError: NaN or infinite values, a level outside (0, 1), or resamples below 1.
    """
    _check_draws(level, resamples, seed)
    sample = _numbers(values, "values")
    if binary and sample.size > 1 and np.ptp(sample) == 0:
        return _without_spread(float(sample[0]), sample.size, level)
    return _interval(sample, level, resamples, seed)


def bootstrap_interval_over_seeds(
    values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0, binary: bool = False
) -> tuple[float, float] | None:
    """Percentile interval of the grand mean when seeds and items are both drawn with replacement.

    Each resample draws rows (seeds) and columns (items) independently, as every seed answers the same items. With one seed
    this is the interval over items, with one item the interval over seeds, and with one of each there is none.

    With few seeds (2 to 5) that really differ, the interval can be too narrow: k seeds show only (k - 1) / k of their
    variance, and resampling never leaves the range they span. If seeds are the only noise, the 95 % interval of 2 seeds
    covers the truth in 50 % of cases, of 3 in 75 %, of 5 in about 84 %. If items are the only noise, it is slightly wide
    (96 to 98 %). An interval over items only would ignore the seeds altogether.

    Args:
        values: [n_seeds, n_items], the score of every item in every seed.
        level: confidence level of the interval.
        resamples: draws of the bootstrap.
        seed: seed of these draws.
        binary: the scores are right or wrong; see `bootstrap_interval`.

    Raises:
        InputError: rows of unequal length, no items, NaN or infinite values, or a level, `resamples` or seed out of range.
    """
    _check_draws(level, resamples, seed)
    grid = _numbers(values, "values", ndim=2)
    if not grid.size:
        raise InputError(f"values of shape {grid.shape} hold no score; give [n_seeds, n_items], at least one of each")
    return _over_seeds(grid.tobytes(), grid.shape, level, resamples, seed, binary)


@functools.lru_cache(maxsize=512)  # tables request the same runs' interval repeatedly
def _over_seeds(
    numbers: bytes, shape: tuple[int, ...], level: float, resamples: int, seed: int, binary: bool
) -> tuple[float, float] | None:
    grid = np.frombuffer(numbers).reshape(shape)
    if 1 in grid.shape:
        return bootstrap_interval(grid.ravel().tolist(), level=level, resamples=resamples, seed=seed, binary=binary)

    def grand_mean(rows: np.ndarray, columns: np.ndarray, axis: int = -1) -> np.ndarray:
        assert axis == -1  # scipy resamples along the last axis
        return grid[rows.astype(int)[..., :, None], columns.astype(int)[..., None, :]].mean((-2, -1))

    if binary and np.ptp(grid) == 0:
        return _without_spread(float(grid[0, 0]), grid.shape[1], level)
    both = (np.arange(grid.shape[0]), np.arange(grid.shape[1]))
    return _bootstrap(both, grand_mean, grid.size, level, resamples, seed)[0]


def paired_bootstrap_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    alternative: str = "two-sided",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedTest:
    """Bootstrap test of whether a and b have the same mean over items.

    Items are drawn with replacement and the differences' means are shifted by the observed difference D, so that they
    vary around 0 (Efron & Tibshirani 1993, section 16.4; Berg-Kirkpatrick et al. 2012 count those beyond 2 D unshifted).
    p is the share that is more extreme than D, with ties counted half; D itself counts once more, so that p is never 0.

    Ties are halved because means of right-or-wrong scores lie on a grid: counted in full, the test at 5 % has a size of
    about 4 % if few items differ; halved, it is 4.9 to 5.2 % for 200 or 400 items of which 10 to 40 % differ. Nothing
    is studentized: that helps only if differences are very skewed and the test is one-sided, and harms if few items
    differ. Below 50 items use `paired_permutation_test`: resamples of so few items show too little spread. A single item is
    no evidence: p = 1.

    Args:
        a: [n] scores of one run, any real number.
        b: [n] scores of the other run on the same items in the same order.
        alternative: `"two-sided"`, `"greater"` (a > b) or `"less"` (a < b).
        level: confidence level of the interval.
        resamples: draws of the bootstrap.
        seed: seed of these draws.

    Raises:
        InputError: a and b differ in length, are empty or hold NaN or infinite values; an unknown alternative; or a level,
            `resamples` or seed out of range.
    """
    d = _differences(a, b, alternative, level, resamples, seed)
    interval, p = None, 1.0
    if d.size > 1:
        interval, means = _bootstrap((d,), np.mean, d.size, level, resamples, seed)
        p = _p_of_shifted(means, float(d.mean()), alternative, tolerance=1e-9 * float(np.abs(d).max()))
    return PairedTest(float(d.mean()), interval, p, alternative, "paired bootstrap", d.size, resamples, seed, level)


def paired_permutation_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    alternative: str = "two-sided",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedTest:
    """Permutation test of whether a and b are interchangeable: the two scores of each item are swapped at random.

    All 2**n swaps are enumerated if there are at most `resamples` of them; otherwise `resamples` swaps are drawn. The size is
    at most the nominal one for any n; for right-or-wrong scores it is lower (3 to 4 % at 5 %), as ties count in full. The
    interval is the bootstrap's. A single item is no evidence: p = 1. Arguments and errors as in `paired_bootstrap_test`.

    Raises:
        InputError: as in `paired_bootstrap_test`.
    """
    d = _differences(a, b, alternative, level, resamples, seed)
    interval = _interval(d, level, resamples, seed)
    p = 1.0
    if d.size > 1:
        # For one sample, scipy's permutation type "samples" flips signs, which is the same as swapping a and b.
        found = scipy.stats.permutation_test(
            (d,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples,
            batch=max(1, BATCH_NUMBERS // (2 * d.size)), alternative=alternative, rng=np.random.default_rng(seed),
        )  # fmt: skip
        p = float(found.pvalue)
    drawn = min(resamples, 2**d.size)
    return PairedTest(float(d.mean()), interval, p, alternative, "paired permutation", d.size, drawn, seed, level)


def holm(p_values: ArrayLike) -> list[float]:
    """Adjusted p-values that bound the chance of any false positive (Holm 1979), in the order given.

    The i-th smallest of m becomes the largest of `(m - j + 1) p_(j)` over j <= i, at most 1.

    Raises:
        InputError: a p-value outside [0, 1].
    """
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted.tolist()


def benjamini_hochberg(p_values: ArrayLike) -> list[float]:
    """Adjusted p-values that bound the share of false positives among the positives, in the order given.

    For independent or positively dependent tests (Benjamini & Hochberg 1995).

    Raises:
        InputError: a p-value outside [0, 1].
    """
    p = _p_values(p_values)
    return scipy.stats.false_discovery_control(p, method="bh").tolist()


def minimum_detectable_difference(
    n: int, *, sd: float, power: float = 0.8, level: float = 0.05, alternative: str = "two-sided"
) -> float:
    """Smallest true mean difference that a paired test over n items finds with this power.

    Solves for the power of the paired t-test, which the two tests above share from some tens of items on. Only a result on
    the side of the true difference counts as found.

    Args:
        n: number of items.
        sd: standard deviation of the items' differences; for right-or-wrong scores see `sd_of_discordance`.
        power: wanted probability of p < level.
        level: significance level of the test.
        alternative: `"two-sided"`, or `"greater"` or `"less"`, which give the same size of difference.

    Raises:
        InputError: n below 2, sd not above 0, level outside (0, 1), power outside (level, 1), or an unknown alternative.
    """
    _check_alternative(alternative)
    if n < 2:
        raise InputError(f"n is {n}; a paired test needs at least 2 items")
    if not (sd > 0 and np.isfinite(sd)):
        raise InputError(f"sd is {sd}; the differences must vary: give a finite number above 0")
    check_share("level", level)
    if not level < power < 1:
        raise InputError(f"power is {power}; allowed: between the level, {level}, and 1. Try 0.8")
    df, sides = n - 1, 2 if alternative == "two-sided" else 1
    t = scipy.stats.t.isf(level / sides, df)

    # At this shift, too wide a spread and too small a mean each cause at most half of the allowed misses.
    missed = (1 - power) / 2
    enough = t * np.sqrt(scipy.stats.chi2.isf(missed, df) / df) + scipy.stats.norm.isf(missed)
    shift = scipy.optimize.root_scalar(
        lambda shift: scipy.stats.nct.sf(t, df, shift) - power, bracket=(0.0, enough)
    ).root
    return float(shift * sd / np.sqrt(n))


def sd_of_discordance(rate: float, difference: float = 0.0) -> float:
    """Standard deviation of paired right-or-wrong differences: `sqrt(rate - difference**2)`.

    Args:
        rate: share of items on which exactly one of the two runs is right.
        difference: mean of a - b.

    Raises:
        InputError: rate outside [0, 1], or a difference larger than the rate.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate is {rate}; a share of items must be between 0 and 1")
    if not abs(difference) <= rate:
        raise InputError(f"difference is {difference}; runs that differ on {rate} of the items allow -{rate} to {rate}")
    return float(np.sqrt(rate - difference**2))


def _bootstrap(
    data: tuple[np.ndarray, ...],
    statistic: Callable[..., Any],
    numbers: int,
    level: float,
    resamples: int,
    seed: int,
) -> tuple[tuple[float, float], np.ndarray]:
    """Percentile interval and all resampled values [resamples]; `numbers` is what one resample holds in memory."""
    found = scipy.stats.bootstrap(
        data, statistic, confidence_level=level, n_resamples=resamples, method="percentile", vectorized=True,
        rng=np.random.default_rng(seed), batch=max(1, BATCH_NUMBERS // numbers),
    )  # fmt: skip
    low, high = found.confidence_interval
    return (float(low), float(high)), found.bootstrap_distribution


def _interval(sample: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float] | None:
    if sample.size < 2:
        return None
    if np.ptp(sample) == 0:
        return (float(sample[0]), float(sample[0]))
    return _bootstrap((sample,), np.mean, sample.size, level, resamples, seed)[0]


def _without_spread(value: float, n: int, level: float) -> tuple[float, float]:
    if value not in (0.0, 1.0):
        return (value, value)
    exact = scipy.stats.binomtest(n * int(value), n).proportion_ci(level, method="exact")
    return (float(exact.low), float(exact.high))


def _p_of_shifted(means: np.ndarray, observed: float, alternative: str, *, tolerance: float) -> float:
    """p of the observed difference among resampled means shifted to 0; values closer than the tolerance are ties."""
    shifted = means - observed
    if alternative == "two-sided":
        shifted, observed = np.abs(shifted), abs(observed)
        if observed <= tolerance:  # every resample is at least as extreme as no difference
            return 1.0
    elif alternative == "less":
        shifted, observed = -shifted, -observed
    beyond = np.count_nonzero(shifted > observed + tolerance)
    ties = np.count_nonzero(np.abs(shifted - observed) <= tolerance)
    return 1.0 if ties == means.size else float((1 + beyond + ties / 2) / (1 + means.size))


def _numbers(values: ArrayLike, name: str, *, ndim: int = 1) -> np.ndarray:
    """Finite float array with that many axes."""
    shape = "one number per item" if ndim == 1 else "[n_seeds, n_items], rows of equal length"
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as e:
        raise InputError(f"{name} must be numbers, {shape}; numpy says: {e}") from e
    if array.ndim != ndim:
        raise InputError(f"{name} has shape {array.shape}; allowed: {shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = ", ".join(str(i) for i in bad[0])
        raise InputError(f"{name}[{where}] is {array[tuple(bad[0])]} ({len(bad)} such); drop or replace them first")
    return array


def _differences(a: ArrayLike, b: ArrayLike, alternative: str, level: float, resamples: int, seed: int) -> np.ndarray:
    """a - b [n] of a paired test, with all its settings checked."""
    _check_alternative(alternative)
    _check_draws(level, resamples, seed)
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if first.size != second.size:
        raise InputError(f"a has {first.size} items and b has {second.size}; give both runs' scores on the same items")
    if not first.size:
        raise InputError("a and b are empty; give the scores of at least one item")
    return first - second


def _p_values(p_values: ArrayLike) -> np.ndarray:
    p = _numbers(p_values, "p_values")
    outside = p[(p < 0) | (p > 1)]
    if outside.size:
        raise InputError(f"p-value {outside[0]} is outside [0, 1]; give p-values before any scaling")
    return p


def _check_alternative(alternative: str) -> None:
    check_one_of("alternative", alternative, ALTERNATIVES, hint="greater means a > b.")


def _check_draws(level: float, resamples: int, seed: int) -> None:
    check_share("level", level)
    check_whole(1, resamples=resamples)
    check_seed(seed)
