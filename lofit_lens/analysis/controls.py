"""Whether chosen heads do better than random sets of as many heads: a test of difference and one of equivalence.

With `c` the mean of the chosen set and `r_d` that of random set d of D, over seeds and items, and `d_i` the difference on item i
(the chosen set's mean over seeds minus the mean over sets and seeds):

    difference    D^ = c - mean(r)
    variance      V  = (f + 1 / D) var(r) + max(0, var(d_i) - (f + 1 / D) var(e_di)) / n_items,  at least 1 / n_items**2
                  f  = (M + k) / (M - k) if sets are k of M heads other than the chosen; 1 if these may be drawn too
    difference    t  = D^ / sqrt(V), two-sided
    equivalence   t  = (margin - |D^|) / sqrt(V), the smaller of the two one-sided tests (Schuirmann 1987)

The unit is the set. If choosing were no better than drawing, the chosen set would be one more draw: the variance of its mean
around the others' would be `(1 + 1 / D) var(r)`, which includes training noise and what single items add to a set. With only the
first term this is Student's test of one new observation, exact for normal means at any number of sets and seeds (Crawford &
Howell 1998 use it for a single case). The second term accounts for items on which the chosen set differs from the random ones by
more than these differ among themselves (`e_di` is the residual of their scores after removing the means of sets and items).
Without it, random sets that change nothing would have no spread, and any difference would look certain. Degrees of freedom
follow Satterthwaite (1946). Fewer than four random sets, or random sets of fewer than four other heads, are not tested.

If the chosen heads are left out of the draws, random sets share heads with each other and none with the chosen set, so their
spread is smaller than the chosen set's distance from them. If effects of heads add up, a draw's variance is
`k s^2 (1 - k / M)`, and the variance of chosen minus expected random is `k s^2 (1 + k / M)` (sampling without replacement); hence
f. The M heads also limit how well s is known: the degrees of freedom of var(r) are `1 / (1 / (D - 1) + 1 / (M - 1))`, else D - 1.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from lofit_lens.analysis.resampling import score_array
from lofit_lens.checks import check_number, check_share, check_whole
from lofit_lens.errors import InputError

# With fewer sets the spread is known too poorly: p < 0.05 comes up in up to 11 % of cases with two, 6 % with three.
FEW_SETS = 4
LOCALISED = "localised"
EQUIVALENT = "no evidence of localisation: equivalent within the margin"
WORSE = "chosen heads do worse than random ones"
UNCLEAR = "cannot tell"


@dataclass(frozen=True)
class ControlTest:
    """Chosen heads compared with random sets.

    Attributes:
        chosen: mean of the chosen set over seeds and items.
        random: mean of the random sets.
        difference: chosen minus random.
        interval: of the difference, over sets, seeds and items, clipped to -1 and 1 for shares; None for fewer than four random
            sets or two items, or for `others` that allow no test.
        p: p-value of the difference, two-sided; 1 if there is no interval.
        p_equivalence: the larger p-value of the two one-sided tests that the difference lies within the margin; 1 likewise.
        margin: differences closer to 0 than this do not matter; on the scale of the scores.
        beaten_by: number of random sets that do at least as well as the chosen one.
        n_sets: number of random sets.
        n_seeds: number of seeds of each set.
        n_items: number of items, the same for all.
        level: confidence level of the interval.
    """

    chosen: float
    random: float
    difference: float
    interval: tuple[float, float] | None
    p: float
    p_equivalence: float
    margin: float
    beaten_by: int
    n_sets: int
    n_seeds: int
    n_items: int
    level: float = 0.95

    @property
    def verdict(self) -> str:
        """One of `LOCALISED`, `EQUIVALENT`, `WORSE` and `UNCLEAR`; each p is compared with 1 - level.

        Equivalence has priority: a difference that is certainly there and certainly below the margin does not matter.
        """
        if self.p_equivalence < 1 - self.level:
            return EQUIVALENT
        if self.p < 1 - self.level:
            return LOCALISED if self.difference > 0 else WORSE
        return UNCLEAR

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the verdict."""
        return {**asdict(self), "verdict": self.verdict}


def chosen_against_random(
    chosen: ArrayLike,
    random: ArrayLike,
    *,
    others: tuple[int, int] | None = None,
    margin: float = 0.05,
    level: float = 0.95,
) -> ControlTest:
    """Test whether a chosen set of heads does better than random ones, and whether the difference lies within a margin.

    The question is whether choosing is better than drawing one set, not whether this set is above the mean of all: if random
    sets vary widely, many of them lie above their mean. In simulations in which the chosen set is
    one more draw, p < 0.05 comes up in 4 to 5.2 % of cases (4, 5, 10 or 20 sets, 1 or 2 seeds, 200 items, right or wrong), and
    equivalence in at most 5 % if the true difference equals the margin. If the chosen heads are left out of the draws, p < 0.05
    comes up in 3.5 to 5.7 % (3 of 4 to 3 of 61 others); without `others` it would in 5 to 45 %. A percentile bootstrap over sets,
    seeds and items is not used: with 10 sets and 2 seeds its 95 % interval missed the truth in 34 % of the same cases, since it
    ignores the chosen set's own spread. Seeds enter through their mean: training noise that is larger
    for the chosen set than for the random ones goes unnoticed.

    Args:
        chosen: [n_seeds, n_items] scores, from 0 to 1.
        random: [n_sets, n_seeds, n_items] scores on the same items in the same order.
        others: (k, M) if each random set is k of M heads other than the chosen ones; None if these may be drawn too. Nothing is
            tested at k = 0 and k = M, where all random sets are the same, nor for M below 4.
        margin: fixed before the scores are seen; above 0.
        level: confidence level of the interval.

    Raises:
        InputError: invalid shapes, different items or seeds, no set, NaN or infinite scores, a margin that is not above 0, k
            outside 0 to M, or a level outside (0, 1).
    """
    check_margin(margin)
    if others is not None:
        check_whole(0, **{"k of others": others[0], "M of others": others[1]})
        if others[0] > others[1]:
            raise InputError(f"others is {others}; give (k, M): each random set is k of M heads, so k is 0 to M")
    check_share("level", level)
    of = ("n_seeds", "n_items")
    own, sets = score_array(chosen, "chosen", of), score_array(random, "random", ("n_sets", *of))
    if own.shape != sets.shape[1:]:
        raise InputError(
            f"chosen has shape {own.shape} and each random set {sets.shape[1:]}; give the same seeds and items for all"
        )
    (n_sets, n_seeds, n_items), mean, means = sets.shape, float(own.mean()), sets.mean((1, 2))
    difference = mean - float(means.mean())
    found = {"chosen": mean, "random": float(means.mean()), "difference": difference}
    interval, p, p_equivalence = None, 1.0, 1.0
    untold = others is not None and (others[0] in (0, others[1]) or others[1] < FEW_SETS)
    if n_sets >= FEW_SETS and n_items > 1 and not untold:
        variance, df = _variance(own.mean(0), sets.mean(1), others)
        error, t = variance**0.5, scipy.stats.t
        half = float(t.isf((1 - level) / 2, df)) * error
        shares = min(own.min(), sets.min()) >= 0 and max(own.max(), sets.max()) <= 1
        bound = 1.0 if shares else np.inf  # on any difference
        interval = (max(difference - half, -bound), min(difference + half, bound))
        p = float(2 * t.sf(abs(difference) / error, df))
        p_equivalence = float(t.sf((margin - abs(difference)) / error, df))
    beaten_by = int((means >= mean - 1e-12).sum())
    return ControlTest(
        **found, interval=interval, p=p, p_equivalence=p_equivalence, margin=float(margin), beaten_by=beaten_by,
        n_sets=n_sets, n_seeds=n_seeds, n_items=n_items, level=level,
    )  # fmt: skip


def check_margin(margin: float) -> None:
    """Raise InputError unless the margin is a number above 0."""
    check_number(margin=margin)
    if margin <= 0:
        raise InputError(f"margin is {margin}; give the smallest difference that would matter, above 0, e.g. 0.05")


def _variance(own: np.ndarray, sets: np.ndarray, others: tuple[int, int] | None) -> tuple[float, float]:
    """Variance of the difference and its degrees of freedom, from `own` [n_items] and `sets` [n_sets, n_items]."""
    n_sets, n_items = sets.shape
    more, known, means = 1 + 1 / n_sets, 1 / (n_sets - 1), sets.mean(1, keepdims=True)
    if others is not None:
        k, m = others
        more, known = (m + k) / (m - k) + 1 / n_sets, known + 1 / (m - 1)
    between = more * float(means.var(ddof=1))
    left = sets - means - sets.mean(0) + sets.mean()
    residual = float((left**2).sum()) / ((n_sets - 1) * (n_items - 1))
    of_items = float((own - sets.mean(0)).var(ddof=1))
    excess = max(0.0, of_items - more * residual) / n_items
    excess = max(excess, 1 / n_items**2 - between)  # at least as much as if one item had changed
    df = (between + excess) ** 2 / (between**2 * known + excess**2 / (n_items - 1))
    return between + excess, df
