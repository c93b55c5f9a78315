"""Uncertainty of a mean and of a difference: by hand, against scipy's textbook tests, and by simulation."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from scipy import stats as textbook

from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import (
    RESAMPLES,
    PairedTest,
    benjamini_hochberg,
    bootstrap_interval,
    bootstrap_interval_over_seeds,
    holm,
    mark,
    minimum_detectable_difference,
    paired_bootstrap_test,
    paired_permutation_test,
    sd_of_discordance,
)

PAIRED = (paired_bootstrap_test, paired_permutation_test)
ALTERNATIVES = ("two-sided", "greater", "less")


def right_or_wrong(draw, n, rate, difference=0.0):
    """Scores 0 or 1 of two runs that differ on `rate` of the items; the mean of a - b is `difference`."""
    kind = draw.choice(3, size=n, p=[(rate + difference) / 2, (rate - difference) / 2, 1 - rate])
    same = draw.random(n) < 0.5
    return np.where(kind == 2, same, kind == 0).astype(float), np.where(kind == 2, same, kind == 1).astype(float)


def shared_difficulty(draw, n):
    """Scores in (0, 1) like MC2: most near 0 or 1, two runs apart by symmetric noise on the logit."""
    base = draw.normal(0, 2, n)
    return tuple(1 / (1 + np.exp(-base - draw.normal(0, 1, n))) for _ in range(2))


def sure_and_unsure(draw, n):
    """Scores in [0, 1] of mean .4: one run near 0 and 1, one in between, so that their difference is skewed."""
    return draw.beta(0.4, 0.6, n), draw.beta(4, 6, n)


# Intervals


def test_intervals_of_a_mean():
    """200 ones among 400: the binomial's 0.5 -+ 1.96 * 0.025 = .451 to .549; the same each time; a higher level is wider."""
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.006)
    assert bootstrap_interval(values) == (low, high)
    wide = bootstrap_interval(values, level=0.99)
    assert wide[0] < low < high < wide[1]


def test_intervals_without_spread_or_items():
    """One value has none; equal ones are both ends; no hit in 216 may still be 1 - .025 ** (1 / 216) = 1.69 % (binomial)."""
    assert bootstrap_interval([0.3]) is None
    assert bootstrap_interval([0.1] * 50) == (0.1, 0.1)
    assert bootstrap_interval([0.0] * 216, binary=True) == pytest.approx((0.0, 1 - 0.025 ** (1 / 216)))
    assert bootstrap_interval_over_seeds([[1.0] * 216] * 2, binary=True) == pytest.approx((0.025 ** (1 / 216), 1.0))


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Over 100 samples of 50 draws of probability .3, the 95 % interval holds .3 in about 95 (at least 86: four sigmas)."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        low, high = bootstrap_interval((draw.random(50) < 0.3).astype(float).tolist(), resamples=500)
        hits += low <= 0.3 <= high
    assert hits >= 86


def test_interval_over_seeds_by_hand():
    """Seeds of constant score 0, 1, 5: all three draws are one seed with 1/27 = 3.7 %, more than 2.5 %: the whole range.

    At level .9 the 5 % point lies past the 3.7 % of (0, 0, 0), at (0, 0, 1), whose mean is 1/3.
    """
    grid = [[score] * 4 for score in (0.0, 1.0, 5.0)]
    assert bootstrap_interval_over_seeds(grid) == (0.0, 5.0)
    assert bootstrap_interval_over_seeds(grid, level=0.9)[0] == pytest.approx(1 / 3)


def test_interval_over_seeds_adds_both_variances():
    """For score = seed + item the variance is var(seed) / k + var(item) / n: here .25 / 12 + .04 / 40, so 1.96 * .1478."""
    grid = np.add.outer([0.0, 1.0] * 6, [0.0, 0.4] * 20)
    low, high = bootstrap_interval_over_seeds(grid)
    half = 1.96 * np.sqrt(0.25 / 12 + 0.04 / 40)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.02)
    assert bootstrap_interval_over_seeds(grid) == (low, high)
    assert bootstrap_interval_over_seeds(grid, seed=1) != (low, high)


def test_interval_over_seeds_of_one_row_or_column():
    """One seed gives the interval over items, one item the interval over seeds, bit by bit; one of both gives none."""
    values = [0.1, 0.7, 0.4, 0.9]
    alone = bootstrap_interval(values, level=0.8, resamples=300, seed=3)
    assert bootstrap_interval_over_seeds([values], level=0.8, resamples=300, seed=3) == alone
    assert bootstrap_interval_over_seeds([[v] for v in values], level=0.8, resamples=300, seed=3) == alone
    assert bootstrap_interval_over_seeds([[0.5]]) is None


def test_memory_is_bounded(monkeypatch):
    """5,000 resamples of 400 scores are 16 MB for each array; in batches of 100,000 numbers .8 MB."""
    monkeypatch.setattr("lofit_lens.evaluation.stats.BATCH_NUMBERS", 100_000)
    flat = np.random.default_rng(0).random(400)
    for run in (
        lambda: bootstrap_interval_over_seeds(flat.reshape(4, 100), resamples=5_000),
        *(lambda made=made: made(flat, flat[::-1], resamples=5_000) for made in PAIRED),
    ):
        tracemalloc.start()
        run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6


# Paired tests


def test_printing_and_record():
    """Signed difference, interval, p and mark to three digits; no -0.000; the record goes through JSON and back."""
    test = PairedTest(0.12, (0.05, 0.19), 0.004, "two-sided", "paired bootstrap", 200, 10_000, 0)
    assert str(test) == "+0.120 [0.050, 0.190], p = 0.004 *"
    nothing = PairedTest(-1e-9, (-1e-9, 0.0), 0.5, "less", "paired bootstrap", 2, 9, 0)
    assert str(nothing) == "+0.000 [0.000, 0.000], p = 0.500"
    assert str(PairedTest(-0.5, None, 0.0001, "less", "paired permutation", 1, 9, 0)) == "-0.500, p < 0.001 *"
    record = json.loads(json.dumps(test.to_dict()))
    assert PairedTest(**record | {"interval": tuple(record["interval"])}) == test


def test_marks():
    """`*` strictly below .05, `+` strictly below .1, as the paper's Figure 2 has them."""
    for p, expected in ((0.0, "*"), (0.0499, "*"), (0.05, "+"), (0.0999, "+"), (0.1, ""), (1.0, "")):
        assert mark(p) == PairedTest(0.0, None, p, "two-sided", "paired bootstrap", 1, 1, 0).mark == expected


@pytest.mark.parametrize(("alternative", "expected"), [("two-sided", 1 / 4), ("greater", 1 / 8), ("less", 7 / 8)])
def test_bootstrap_p_by_hand(alternative, expected):
    """d = (1, 0), D = 1/2: resampled means less D are -1/2, 0, 1/2 with chance 1/4, 1/2, 1/4.

    Two-sided: no value beyond 1/2, ties 1/2, halved 1/4. Greater: ties 1/4, halved 1/8. Less: beyond 3/4, plus 1/8.
    """
    found = paired_bootstrap_test([1, 1], [0, 1], alternative=alternative)
    assert found.p == pytest.approx(expected, abs=0.015)
    assert (found.difference, found.n, found.resamples) == (0.5, 2, RESAMPLES)


def test_bootstrap_p_is_never_zero():
    """Differences of .9 to 1: no shifted mean reaches .95, so p is 1 / (resamples + 1), and 1 on the wrong side."""
    a = np.linspace(0.9, 1, 40)
    assert paired_bootstrap_test(a, 0 * a, resamples=199).p == 1 / 200
    assert paired_bootstrap_test(a, 0 * a, resamples=199, alternative="greater").p == 1 / 200
    assert paired_bootstrap_test(a, 0 * a, resamples=199, alternative="less").p == 1.0


@pytest.mark.parametrize("score", [0.1, 0.7])
def test_ties_survive_rounding(score):
    """p does not hang on the unit: sums of .1 or .7 are inexact in binary, yet ties as they would be with 1."""
    a, b = np.array([1] * 5 + [0] * 5), np.array([0] * 5 + [1] * 3 + [0] * 2)
    for alternative in ALTERNATIVES:
        in_ones = paired_bootstrap_test(a, b, alternative=alternative)
        assert paired_bootstrap_test(score * a, score * b, alternative=alternative).p == in_ones.p


def test_bootstrap_agrees_with_the_t_test():
    """400 normal differences: the p-values of the t-test, within four sigmas of 10,000 draws, on all three sides."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(0.07, 1, 400), np.zeros(400)
    for alternative in ALTERNATIVES:
        expected = textbook.ttest_rel(a, b, alternative=alternative).pvalue
        assert paired_bootstrap_test(a, b, alternative=alternative).p == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("paired_test", PAIRED)
def test_swapping_the_runs_swaps_the_sides(paired_test):
    """a - b turns into b - a: the difference and its interval change sign, greater becomes less, two-sided stays."""
    a, b = right_or_wrong(np.random.default_rng(1), 150, 0.2, 0.15)
    for alternative, other in zip(ALTERNATIVES, ("two-sided", "less", "greater"), strict=True):
        one, two = paired_test(a, b, alternative=alternative), paired_test(b, a, alternative=other)
        assert one.difference == -two.difference == np.mean(a - b) > 0
        assert one.p == pytest.approx(two.p, abs=0.01)
        assert one.interval == pytest.approx((-two.interval[1], -two.interval[0]))
    assert paired_test(a, b, alternative="greater").p < 0.1 < 0.9 < paired_test(a, b, alternative="less").p


@pytest.mark.parametrize("paired_test", PAIRED)
def test_interval_and_settings_of_a_paired_test(paired_test):
    """The interval is that of the mean difference; settings are passed on (p in 501sts) and recorded; same seed, same bits."""
    a, b = right_or_wrong(np.random.default_rng(2), 80, 0.3)
    settings = {"level": 0.8, "resamples": 500, "seed": 5}
    found = paired_test(a, b, alternative="less", **settings)
    assert found.interval == bootstrap_interval((a - b).tolist(), **settings)
    assert (found.level, found.resamples, found.seed, found.n, found.alternative) == (0.8, 500, 5, 80, "less")
    assert 2 * 501 * found.p == pytest.approx(round(2 * 501 * found.p))
    assert paired_test(a, b, alternative="less", **settings) == found
    assert paired_test(a, b, alternative="less", **settings | {"seed": 6}).p != found.p


@pytest.mark.parametrize("paired_test", PAIRED)
@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_no_difference_and_one_item(paired_test, alternative):
    """Identical runs differ by 0 with p = 1 on every side; a single item has no interval and shows nothing, p = 1."""
    same = paired_test([0.2, 0.9, 0.4], [0.2, 0.9, 0.4], alternative=alternative)
    assert (same.difference, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)
    one = paired_test([1.0], [0.0], alternative=alternative)
    assert (one.difference, one.interval, one.p, one.n) == (1.0, None, 1.0, 1)


@pytest.mark.parametrize("paired_test", PAIRED)
def test_losses_that_balance_gains(paired_test):
    """Two gains and two losses: D = 0, and every resample is at least as far from 0, so p is 1."""
    assert paired_test([1, 1, 0, 0, 1], [0, 0, 1, 1, 1]).p == 1.0


@pytest.mark.parametrize(("alternative", "expected"), [("two-sided", 2 / 32), ("greater", 1 / 32), ("less", 1.0)])
def test_permutation_p_by_hand(alternative, expected):
    """Five gains: of 2**5 = 32 swaps only the observed one is as high, and only its mirror as low; all are at most it."""
    found = paired_permutation_test([0.9, 0.8, 0.7, 0.9, 0.6], [0.5] * 5, alternative=alternative)
    assert (found.p, found.resamples) == (expected, 32)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_permutation_is_the_sign_test(alternative):
    """Gains and losses of 1: the exact binomial test. 9 of 12 runs through 4,096 swaps; 34 of 50 is drawn."""
    for gains, n, within in ((9, 12, 1e-12), (34, 50, 0.01)):
        a = np.arange(n) < gains
        expected = textbook.binomtest(gains, n, alternative=alternative).pvalue
        found = paired_permutation_test(a, ~a, alternative=alternative)
        assert (found.p, found.resamples) == (pytest.approx(expected, abs=within), min(2**n, RESAMPLES))


# Several tests at once


def test_holm_by_hand():
    """Sorted .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04; the last must not fall below .06; at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_benjamini_hochberg_by_hand():
    """Sorted .005, .01, .03, .04 times 4, 2, 4/3, 1: .02, .02, .04, .04; .5 and .6: 1 must not exceed the next, .6."""
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert benjamini_hochberg([0.6, 0.5]) == pytest.approx([0.6, 0.6])
    assert benjamini_hochberg([]) == []


# Power


def test_detectable_difference_by_the_books():
    """Half a standard deviation needs 34 pairs two-sided and 27 one-sided (power .8, 5 %), and no fewer."""
    assert minimum_detectable_difference(34, sd=1) < 0.5 < minimum_detectable_difference(33, sd=1)
    for side in ("greater", "less"):
        of_27, of_26 = (minimum_detectable_difference(n, sd=1, alternative=side) for n in (27, 26))
        assert of_27 < 0.5 < of_26


@pytest.mark.parametrize("alternative", ALTERNATIVES[:2])
def test_detectable_difference_is_found_as_often_as_said(alternative):
    """20,000 t-tests of 5 normal differences with that mean: 70 % below .05, within four sigmas (.013)."""
    mean = minimum_detectable_difference(5, sd=2, power=0.7, alternative=alternative)
    d = np.random.default_rng(0).normal(mean, 2, (20_000, 5))
    p = textbook.ttest_1samp(d, 0, axis=1, alternative=alternative).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.7, abs=0.013)


def test_sd_of_discordance_by_hand():
    """15 gains and 5 losses among 100: mean .1, mean square .2, so the variance is .2 - .01."""
    d = [1] * 15 + [-1] * 5 + [0] * 80
    assert sd_of_discordance(0.2, 0.1) == pytest.approx(np.std(d))
    assert sd_of_discordance(0.2) == pytest.approx(np.sqrt(0.2))


# Refusals

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("paired_test", PAIRED)
@pytest.mark.parametrize(
    ("a", "b", "said"),
    [([1, 0, 1], [1, 0], "a has 3 items and b has 2"), ([], [], "a and b are empty"),
     ([1, NAN], [1, 0], r"a\[1\] is nan"), ([1, 0], [INF, 0], r"b\[0\] is inf"),
     ([[1, 0]], [1, 0], r"a has shape \(1, 2\)"), ([1, 0], ["yes", "no"], "b must be numbers")],
)  # fmt: skip
def test_unusable_pairs(paired_test, a, b, said):
    """Runs that cannot be paired item by item are refused, naming the run and the place."""
    with pytest.raises(InputError, match=said):
        paired_test(a, b)


DRAWING = (
    lambda **settings: bootstrap_interval([0.0, 1.0], **settings),
    lambda **settings: bootstrap_interval_over_seeds([[0.0, 1.0], [1.0, 1.0]], **settings),
    *(lambda made=made, **settings: made([0.0, 1.0], [1.0, 1.0], **settings) for made in PAIRED),
)


@pytest.mark.parametrize("draws", DRAWING)
@pytest.mark.parametrize(
    ("settings", "said"),
    [({"level": 0.0}, "level is 0.0"), ({"level": 1.0}, "level is 1.0"), ({"level": NAN}, "between 0 and 1"),
     ({"resamples": 0}, "resamples is 0"), ({"seed": -1}, "seed is -1")],
)  # fmt: skip
def test_draws_out_of_range(draws, settings, said):
    """Every function that draws refuses the same settings, and says what it got."""
    with pytest.raises(InputError, match=said):
        draws(**settings)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: bootstrap_interval([0.1, NAN, 0.2, NAN]), r"values\[1\] is nan \(2 such\)"),
        (lambda: bootstrap_interval_over_seeds([[0.1, 0.2], [0.3]]), "rows of equal length"),
        (lambda: bootstrap_interval_over_seeds([0.1, 0.2]), r"shape \(2,\); allowed: \[n_seeds, n_items\]"),
        (lambda: bootstrap_interval_over_seeds([[0.1, 0.2], [0.3, NAN]]), r"values\[1, 1\] is nan"),
        (lambda: bootstrap_interval_over_seeds([[], []]), r"shape \(2, 0\) hold no score"),
        (lambda: paired_bootstrap_test([1], [0], alternative="grater"), "Did you mean 'greater'"),
        (lambda: paired_permutation_test([1], [0], alternative="both"), "unknown alternative 'both'"),
        (lambda: holm([0.1, 1.2]), "p-value 1.2 is outside"),
        (lambda: benjamini_hochberg([0.5, -0.1]), "p-value -0.1 is outside"),
        (lambda: benjamini_hochberg([NAN]), r"p_values\[0\] is nan"),
        (lambda: mark(NAN), r"p_values\[0\] is nan"),
        (lambda: minimum_detectable_difference(1, sd=1.0), "n is 1; .* at least 2"),
        (lambda: minimum_detectable_difference(9, sd=0.0), "sd is 0.0"),
        (lambda: minimum_detectable_difference(9, sd=INF), "sd is inf"),
        (lambda: minimum_detectable_difference(9, sd=1.0, level=0.0), "level is 0.0"),
        (lambda: minimum_detectable_difference(9, sd=1.0, power=0.05), "power is 0.05; .* 0.05, and 1"),
        (lambda: minimum_detectable_difference(9, sd=1.0, alternative="right"), "unknown alternative 'right'"),
        (lambda: sd_of_discordance(1.1), "rate is 1.1"),
        (lambda: sd_of_discordance(0.1, -0.2), "difference is -0.2; .* -0.1 to 0.1"),
    ],
)
def test_refusals(run, said):
    """Each refusal names the value, and a place or a range."""
    with pytest.raises(InputError, match=said):
        run()


# Simulations. They draw 999 resamples, not 10,000, for time: p < .05 is then a nominal 4.9 %.

SHAPES = {
    "right or wrong": [lambda draw, n, rate=rate: right_or_wrong(draw, n, rate) for rate in (0.1, 0.2, 0.3, 0.4)],
    "like MC2": [shared_difficulty, sure_and_unsure],
}


@pytest.mark.slow
@pytest.mark.parametrize("scores", SHAPES)
def test_false_positives_and_coverage(scores):
    """Without a true difference p < .05 in 4 to 6 % on each side, and the 95 % interval holds 0 in 93 to 97 %.

    1,000 simulations of 200 and of 400 items for each shape, counted together: 8,000 for right or wrong (standard
    error .24 %), 4,000 like MC2 (.34 %). Less than .05 on one side is more than .95 + .001 on the other.
    """
    draw, seeds, counts = np.random.default_rng(0), itertools.count(), []
    for shape, n, _ in itertools.product(SHAPES[scores], (200, 400), range(1_000)):
        a, b = shape(draw, n)
        drawn = {"resamples": 999, "seed": next(seeds)}
        both = paired_bootstrap_test(a, b, **drawn)
        greater = paired_bootstrap_test(a, b, alternative="greater", **drawn).p
        counts.append((both.p < 0.05, greater < 0.05, greater > 0.951, both.interval[0] <= 0 <= both.interval[1]))
    two_sided, greater, less, covered = np.mean(counts, axis=0)
    for rate in (two_sided, greater, less):
        assert 0.04 <= rate <= 0.06
    assert 0.93 <= covered <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("paired_test", PAIRED)
def test_false_positives_where_few_items_differ(paired_test):
    """200 items of which 1, 2 or 3 % differ, either way with equal chance: p < .05 in at most 5 %, summed over all outcomes.

    The bootstrap has 1.4, 4.2 and 4.7 %, and the permutation test, which counts ties in full, 0, .5 and 1.3 %. Given that exactly
    four items differ, all four on one side are p < .05 by bootstrap, which chance brings about in one case of eight.
    """
    found = {}
    for plus, minus in itertools.combinations_with_replacement(range(16), 2):
        if plus + minus < 16:
            a, b = np.zeros((2, 200))
            a[:plus], b[plus : plus + minus] = 1, 1
            found[plus, minus] = paired_test(a, b, resamples=999).p < 0.05
    for rate in (0.01, 0.02, 0.03):
        of = [
            textbook.binom.pmf(m, 200, rate) * textbook.binom.pmf(plus, m, 0.5) * found[tuple(sorted((plus, m - plus)))]
            for m in range(16) for plus in range(m + 1)
        ]  # fmt: skip
        assert sum(of) <= 0.05


@pytest.mark.slow
def test_true_differences_are_found_and_covered():
    """The detectable difference of 400 items, 20 % of them discordant, is found in 80 % and covered in 95 %.

    1,000 simulations: within three standard errors, 3.8 % and 2 %.
    """
    true = minimum_detectable_difference(400, sd=sd_of_discordance(0.2))
    draw, counts = np.random.default_rng(0), []
    for seed in range(1_000):
        found = paired_bootstrap_test(*right_or_wrong(draw, 400, 0.2, true), resamples=999, seed=seed)
        counts.append((found.p < 0.05, found.interval[0] <= true <= found.interval[1]))
    assert np.mean(counts, axis=0) == pytest.approx((0.8, 0.95), abs=0.038)
    assert np.mean(counts, axis=0)[1] == pytest.approx(0.95, abs=0.02)
