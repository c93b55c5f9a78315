"""Chosen heads against random sets: the arithmetic, the verdicts, and how often the tests err."""

import numpy as np
import pytest
import scipy

from lofit_lens.analysis.controls import EQUIVALENT, LOCALISED, UNCLEAR, WORSE, chosen_against_random
from lofit_lens.errors import InputError

MARGIN = 0.05


def drawn(rng, n_sets, *, n_seeds=2, n_items=200, sets=0.2, seeds=0.1, binary=True):
    """Scores of a chosen set that is one more draw [n_seeds, n_items], and of random sets.

    An item's score is right where its difficulty and the effects of the set, of the set's seed, of the set on the item, and of
    all three are above 0 together.
    """
    shape = (n_sets + 1, n_seeds, n_items)
    above = (
        rng.normal(0, 1, n_items) + rng.normal(0, sets, (n_sets + 1, 1, 1)) + rng.normal(0, seeds, (n_sets + 1, n_seeds, 1))
        + rng.normal(0, 0.3, (n_sets + 1, 1, n_items)) + rng.normal(0, 0.3, shape)
    )  # fmt: skip
    scores = (above > 0).astype(float) if binary else 0.5 + 0.1 * above
    return scores[0], scores[1:]


def right(n_right, n_items=100):
    """Scores of which so many are right."""
    return np.arange(n_items) < n_right


def test_the_test_of_one_more_draw():
    """Where items add nothing, t = D / (s sqrt(1 + 1/n)) with n - 1 degrees of freedom, worked out by hand.

    Sets at .4, .5, .5 and .6 on all items, chosen at .9: D = .4, s = .08165, t = .4 / (s sqrt(5 / 4)) = 4.3818 with 3 degrees of
    freedom: p = .0220. The interval is .4 +- 3.1824 x .09129. Equivalence within .8 has the same t at its near side: p = .0110.
    """
    items = np.linspace(-0.1, 0.1, 50)  # common to all
    sets = np.array([0.4, 0.5, 0.5, 0.6])[:, None, None] + items
    found = chosen_against_random((0.9 + items)[None], sets, margin=0.8)
    assert found.difference == pytest.approx(0.4)
    assert found.p == pytest.approx(0.0220, abs=1e-4)
    assert found.interval == pytest.approx((0.4 - 3.1824 * 0.09129, 0.4 + 3.1824 * 0.09129), abs=1e-4)
    assert found.p_equivalence == pytest.approx(0.0110, abs=1e-4)
    assert (found.beaten_by, found.n_sets, found.n_seeds, found.n_items) == (0, 4, 1, 50)


def test_the_test_where_chosen_heads_are_left_out_of_the_draws():
    """The case above with sets of 2 of 6 others: f = 8 / 4 = 2, t = .4 / (s sqrt(2 + 1 / 4)), 1 / (1/3 + 1/5) degrees of freedom.

    Sets that take nothing, all, or some of three heads tell nothing.
    """
    items = np.linspace(-0.1, 0.1, 50)
    sets, chosen = np.array([0.4, 0.5, 0.5, 0.6])[:, None, None] + items, (0.9 + items)[None]
    found = chosen_against_random(chosen, sets, others=(2, 6))
    t = scipy.stats.t(1 / (1 / 3 + 1 / 5))
    assert found.p == pytest.approx(2 * t.sf(0.4 / (0.08165 * 1.5)), rel=1e-3)
    assert found.interval[1] == pytest.approx(0.4 + t.isf(0.025) * 0.08165 * 1.5, rel=1e-3)
    for others in ((0, 6), (6, 6), (1, 3)):
        untold = chosen_against_random(chosen, sets, others=others)
        assert (untold.interval, untold.p, untold.p_equivalence) == (None, 1.0, 1.0)


def test_items_count_where_random_sets_change_nothing():
    """Sets without spread: the test is the paired t-test over items, not certainty."""
    rng = np.random.default_rng(0)
    base = (rng.random(120) < 0.5).astype(float)
    chosen = np.where(rng.random(120) < 0.3, rng.random(120) < 0.7, base).astype(float)
    found = chosen_against_random(chosen[None], np.repeat(base[None, None], 10, 0))
    assert found.p == pytest.approx(scipy.stats.ttest_rel(chosen, base).pvalue, rel=1e-6)


def test_verdicts():
    """Better, equal and worse heads by hand-made scores; and what few sets, few items or much spread leave open."""
    wobble = [50, 51, 49, 50, 52, 48, 50, 51, 49, 50]
    random = np.array([[right(n), right(n)] for n in wobble])
    better, equal, worse = ([right(n), right(n)] for n in (80, 50, 20))
    assert chosen_against_random(better, random).verdict == LOCALISED
    assert chosen_against_random(equal, random).verdict == EQUIVALENT
    assert chosen_against_random(worse, random).verdict == WORSE
    for n_sets in (1, 2, 3):
        for own in (better, equal, worse):
            few = chosen_against_random(own, random[:n_sets])
            assert (few.verdict, few.interval, few.p, few.p_equivalence) == (UNCLEAR, None, 1.0, 1.0)
    assert chosen_against_random(better, random[:4]).verdict == LOCALISED
    assert chosen_against_random(equal, np.array([[right(n)] * 2 for n in range(20, 80, 6)])).verdict == UNCLEAR
    few = np.repeat(right(5, 10)[None, None], 10, 0)
    assert chosen_against_random(few[0], few).verdict == UNCLEAR, "10 items without a difference prove little"
    many = np.repeat(right(5, 200)[None, None], 10, 0)
    assert chosen_against_random(many[0], many).verdict == EQUIVALENT
    small = chosen_against_random([right(2, 100)] * 2, np.zeros((10, 2, 100)), margin=0.1)
    assert small.verdict == EQUIVALENT
    assert small.beaten_by == 0
    record = chosen_against_random(better, random).to_dict()
    assert (record["verdict"], record["beaten_by"], record["n_sets"]) == (LOCALISED, 0, 10)


@pytest.mark.parametrize(
    ("chosen", "random", "options", "message"),
    [
        ([[1, 0]], [[[1, 0, 1]]], {}, r"shape \(1, 2\) and each random set \(1, 3\); give the same seeds and items"),
        ([[1, 0]], [[[1, 0], [0, 1]]], {}, "give the same seeds and items"),
        ([1, 0], [[[1, 0]]], {}, r"scores of chosen have shape \(2,\); give \[n_seeds, n_items\]"),
        ([[1, 0]], [[1, 0]], {}, r"scores of random have shape \(1, 2\); give \[n_sets, n_seeds, n_items\]"),
        ([[1, 0]], [[["a", 0]]], {}, "scores of random must be numbers"),
        ([[1, float("nan")]], [[[1, 0]]], {}, r"score \[0, 1\] of chosen is nan; drop or replace"),
        ([[1, 0]], [[[1, 0]]], {"margin": 0}, "margin is 0; give the smallest difference that would matter"),
        ([[1, 0]], [[[1, 0]]], {"level": 1.0}, "level is 1.0"),
        ([[1, 0]], [[[1, 0]]], {"others": (3, 2)}, r"others is \(3, 2\); give \(k, M\)"),
        ([[1, 0]], [[[1, 0]]], {"others": (-1, 2)}, "k of others is -1; give 0 or more"),
    ],
)  # fmt: skip
def test_wrong_arguments(chosen, random, options, message):
    with pytest.raises(InputError, match=message):
        chosen_against_random(chosen, random, **options)


@pytest.mark.slow
@pytest.mark.parametrize("n_sets", [4, 5, 10, 20])
@pytest.mark.parametrize("n_seeds", [1, 2])
def test_difference_holds_its_level(n_sets, n_seeds):
    """Where the chosen set is one more draw, p < .05 in 4 to 6 % of cases (measured of 4000, standard error .35 %)."""
    rng = np.random.default_rng(n_sets)
    found = [chosen_against_random(*drawn(rng, n_sets, n_seeds=n_seeds)) for _ in range(4000)]
    assert 0.04 <= np.mean([f.p < 0.05 for f in found]) <= 0.06
    assert np.mean([f.verdict == LOCALISED for f in found]) <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("k", "pool", "n_sets"), [(3, 6, 5), (3, 6, 10), (3, 13, 5), (3, 61, 5), (3, 61, 10)])
def test_difference_holds_its_level_where_chosen_heads_are_left_out(k, pool, n_sets):
    """Removal of k random heads beside k of the others: p < .05 in at most 6 %, and in 4 % or more of a large pool.

    Heads add up to what decides an item; scores are right or wrong. Without `others` the smallest pool gives 20 to 24 %.
    """
    rng, found = np.random.default_rng(pool + n_sets), []
    for _ in range(4000):
        heads = rng.normal(0, 0.2, (pool + k, 1)) + rng.normal(0, 0.3, (pool + k, 200))
        drawn = [range(k), *(k + rng.permutation(pool)[:k] for _ in range(n_sets))]
        difficulty = rng.normal(0, 1, 200)
        scores = np.array([[difficulty + heads[list(some)].sum(0) > 0] for some in drawn], dtype=float)
        found.append(chosen_against_random(scores[0], scores[1:], others=(k, pool)).p < 0.05)
    assert (0.04 if pool > 50 else 0.03) <= np.mean(found) <= 0.06


@pytest.mark.slow
def test_difference_holds_its_level_for_orders_of_the_same_heads():
    """`keep_only`: the best-first order is one more random order, sets of 3 of 9 heads may overlap it: 4 to 6 %."""
    rng, found = np.random.default_rng(9), []
    for _ in range(4000):
        heads, difficulty = rng.normal(0, 0.2, (9, 1)) + rng.normal(0, 0.3, (9, 200)), rng.normal(0, 1, 200)
        scores = np.array([[difficulty + heads[rng.permutation(9)[:3]].sum(0) > 0] for _ in range(11)], dtype=float)
        found.append(chosen_against_random(scores[0], scores[1:]).p < 0.05)
    assert 0.04 <= np.mean(found) <= 0.06


@pytest.mark.slow
def test_difference_holds_its_level_without_spread_of_sets():
    """Random sets that change nothing, and a chosen one that answers every fifth item anew: 4 to 6 % (5.4 %) all the same."""
    rng, found = np.random.default_rng(5), []
    for _ in range(4000):
        base = (rng.normal(size=200) > 0).astype(float)
        anew = np.where(rng.random(200) < 0.2, rng.normal(size=200) > 0, base)
        found.append(chosen_against_random(anew[None], np.repeat(base[None, None], 10, 0)).p < 0.05)
    assert 0.04 <= np.mean(found) <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize("n_sets", [4, 10])
@pytest.mark.parametrize("side", [-1, 1])
def test_equivalence_at_the_margin(n_sets, side):
    """Where the true difference is the margin, equivalence is declared in at most 5 % of cases; the interval covers."""
    rng, found = np.random.default_rng(n_sets), []
    for _ in range(4000):
        chosen, random = drawn(rng, n_sets, sets=0.05, seeds=0.05, binary=False)
        found.append(chosen_against_random(chosen + side * MARGIN, random, margin=MARGIN))
    assert np.mean([f.verdict == EQUIVALENT for f in found]) <= 0.055, "5 % and less than two standard errors"
    covered = [f.interval[0] <= side * MARGIN <= f.interval[1] for f in found]
    assert 0.94 <= np.mean(covered) <= 0.975
