"""The transfer matrix: ratios by hand, intervals by simulation, p by the paired test, and what is missing is named."""

import json

import numpy as np
import pytest

from lofit_lens.analysis.resampling import interval_of, item_scores, paired_test_of_means, resampled_means
from lofit_lens.analysis.transfer import transfer_matrix
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import (
    bootstrap_interval_over_seeds,
    holm,
    paired_bootstrap_test,
    paired_permutation_test,
)


def scores(right, n=100, seeds=2):
    """[seeds, n] with the first `right` items right."""
    return np.tile(np.arange(n) < right, (seeds, 1)).astype(float)


RUNS = {("a", "a"): scores(80), ("a", "b"): scores(60), ("b", "b"): scores(50), ("b", "a"): scores(55)}


def cell(transfer, task, source):
    found = transfer.frame.query("task == @task and source == @source")
    assert len(found) == 1
    return found.iloc[0]


# Drawing again


def test_resampled_means_share_items_and_seeds():
    """A run drawn beside its double moves with it exactly; one that is the other plus .1 keeps that distance."""
    run = np.random.default_rng(0).random((3, 20))
    first, double, above = resampled_means([run, run.copy(), run + 0.1], resamples=500, seed=1)
    assert np.array_equal(first, double)
    assert above - first == pytest.approx(np.full(500, 0.1))
    assert np.ptp(first) > 0


def test_resampled_means_have_the_variance_of_items_and_seeds():
    """One run: variance of items / n. Seeds that alone differ: variance of seeds / n (both with divisor n), 4 errors."""
    draw = np.random.default_rng(0)
    items, seeds = draw.random((1, 50)), draw.random((6, 1)) * np.ones((1, 50))
    for run, expected in ((items, items.var() / 50), (seeds, seeds[:, 0].var() / 6)):
        means = resampled_means([run], resamples=4000, seed=2)[0]
        assert means.mean() == pytest.approx(run.mean(), abs=4 * np.sqrt(expected / 4000))
        assert means.var() == pytest.approx(expected, rel=4 * np.sqrt(2 / 4000))


def test_resampled_means_agree_with_the_library_interval():
    """The same draws as `bootstrap_interval_over_seeds`: the ends agree within the noise of 10,000 draws."""
    grid = (np.random.default_rng(3).random((4, 60)) < 0.6).astype(float)
    mine = interval_of(resampled_means([grid])[0])
    assert mine == pytest.approx(bootstrap_interval_over_seeds(grid), abs=0.006)


def test_interval_of_draws():
    """0 to 999 at 90 %: 50 to 949. Unknown draws lie outside on both sides; too many of them leave no interval."""
    draws = np.arange(1000.0)
    assert interval_of(draws, level=0.9) == (50, 949)
    draws[:10] = np.nan
    assert interval_of(draws, level=0.9) == (50, 959), "990 known draws from 10 to 999, ten more on either side"
    draws[:50] = np.nan
    assert np.isnan(interval_of(draws[::-1].copy(), level=0.9)).tolist() == [False, False]
    draws[:51] = np.nan
    assert np.isnan(interval_of(draws, level=0.9)).all()


def test_paired_test_follows_the_number_of_items():
    """50 items and more: bootstrap; fewer: permutation; seeds are averaged first."""
    draw = np.random.default_rng(5)
    a, b = draw.random((3, 50)), draw.random((2, 50))
    assert paired_test_of_means(a, b) == paired_bootstrap_test(a.mean(0), b.mean(0))
    assert paired_test_of_means(a[:, :49], b[:, :49]) == paired_permutation_test(a[:, :49].mean(0), b[:, :49].mean(0))


# The matrix


def test_relative_accuracy_by_hand():
    """a: 60 of 80 right = 75 %; b: 55 of 50 = 110 %; the diagonal is 100; random heads: 40 of 80 and 0 of 50."""
    found = transfer_matrix(RUNS, random={"a": scores(40, seeds=3), "b": scores(0, seeds=3)}, metrics={"a": "MC1"})
    wide = found.matrix()
    assert wide.index.tolist() == ["a", "b", "random"]
    assert wide.columns.tolist() == ["a", "b"]
    assert wide.to_numpy() == pytest.approx(np.array([[100, 110], [75, 100], [50, 0]]))
    assert found.matrix("accuracy").loc["b", "a"] == 0.6
    assert cell(found, "a", "b").metric == "MC1"
    assert cell(found, "b", "a").metric == "accuracy"
    assert (cell(found, "a", "random").n_seeds, cell(found, "a", "random").n_items) == (3, 100)
    assert found.tasks == ("a", "b")
    with pytest.raises(InputError, match="no column 'rel'"):
        found.matrix("rel")


def test_p_is_of_the_paired_test_and_holm_counts_all_tested_cells():
    """Six cells, two of them on the diagonal: four p-values, adjusted together; marks follow the raw p."""
    draw = np.random.default_rng(0)
    runs = {key: (draw.random((2, 80)) < x).astype(float) for key, x in
            {("a", "a"): 0.8, ("a", "b"): 0.7, ("b", "b"): 0.6, ("b", "a"): 0.5}.items()}  # fmt: skip
    chance = {"a": (draw.random((3, 80)) < 0.3).astype(float), "b": (draw.random((3, 80)) < 0.3).astype(float)}
    found = transfer_matrix(runs, random=chance, seed=7)
    p = {(t, s): cell(found, t, s).p for t, s in [("a", "b"), ("a", "random"), ("b", "a"), ("b", "random")]}
    for (task, source), value in p.items():
        other = chance[task] if source == "random" else runs[task, source]
        assert value == paired_bootstrap_test(other.mean(0), runs[task, task].mean(0), seed=7).p
    assert [cell(found, *key).p_holm for key in p] == pytest.approx(holm(list(p.values())))
    assert np.isnan(cell(found, "a", "a").p)
    assert np.isnan(cell(found, "a", "a").p_holm)
    assert cell(found, "a", "random")["mark"] == "*"
    assert [cell(found, *key)["mark"] for key in p] == ["*" if x < 0.05 else "+" if x < 0.1 else "" for x in p.values()]


def test_interval_is_paired():
    """B's heads lose exactly every tenth right item whatever the item: the ratio hardly moves, though accuracy does."""
    draw = np.random.default_rng(1)
    own = draw.random((1, 300)) * (draw.random((1, 300)) < 0.5)
    found = transfer_matrix({("a", "a"): own, ("a", "b"): 0.9 * own, ("b", "b"): own, ("b", "a"): own[:, ::-1]})
    exact, loose = cell(found, "a", "b"), cell(found, "b", "a")
    assert (exact.low, exact.high) == pytest.approx((90, 90))
    assert loose.relative == pytest.approx(100)
    assert loose.high - loose.low > 15, "the same scores on other items are no pair"
    assert exact.accuracy_high - exact.accuracy_low > 0.05


@pytest.mark.slow
def test_interval_holds_the_true_ratio():
    """Truth .6 / .8 = 75 %, 200 items of two seeds: 95 % intervals hold it in 93 to 99.5 % of 150 repeats."""
    draw, held = np.random.default_rng(2), 0
    for _ in range(150):
        hard = draw.random((1, 200))
        runs = {key: (0.5 * hard + 0.5 * draw.random((2, 200)) < cut).astype(float) for key, cut in
                {("a", "a"): 0.6838, ("a", "b"): 0.5528, ("b", "b"): 0.5, ("b", "a"): 0.5}.items()}  # fmt: skip
        both = resampled_means([runs["a", "b"], runs["a", "a"]], resamples=400)
        low, high = interval_of(both[0] / both[1])
        held += low <= 0.6 / 0.8 <= high
    # The sum of two even halves is triangular on [0, 1]: P(< .6838) = 1 - 2 * .3162^2 = .8, P(< .5528) = .6.
    assert 0.93 <= held / 150 <= 0.995


def test_each_seed_is_kept():
    """Seed 0: 3 of 4 against 4 of 4; seed 1: 2 against 1. Random heads have three draws: against the mean own 5/8."""
    runs = {("a", "a"): [[1, 1, 1, 1], [1, 0, 0, 0]], ("a", "b"): [[1, 1, 1, 0], [1, 1, 0, 0]], ("b", "b"): [[1, 1]],
            ("b", "a"): [[1, 0]]}  # fmt: skip
    found = transfer_matrix(runs, random={"a": [[1, 0, 0, 0]] * 3, "b": [1, 0]})
    table = found.per_seed.set_index(["task", "source", "seed"])
    assert table.loc[("a", "b")].relative.tolist() == [75, 200]
    assert table.loc[("a", "b")].accuracy.tolist() == [0.75, 0.5]
    assert table.loc[("a", "random")].relative.tolist() == pytest.approx([40, 40, 40])
    assert table.loc[("a", "a")].relative.tolist() == [100, 100]
    assert "permutation test" in " ".join(found.notes)


def test_own_accuracy_of_zero_is_said():
    """Nothing right with its own heads: relative accuracy is NaN and a note says so; the accuracies stand."""
    found = transfer_matrix(
        {("a", "a"): scores(0), ("a", "b"): scores(10), ("b", "b"): scores(50), ("b", "a"): scores(40)}
    )
    assert found.frame.query("task == 'a'")[["relative", "low", "high"]].isna().all(axis=None)
    assert cell(found, "a", "b").accuracy == 0.1
    assert cell(found, "b", "a").relative == 80
    assert any("a: accuracy with its own heads is 0" in note for note in found.notes)
    assert "n/a" in found._repr_html_()


def test_heads_of_a_task_that_is_not_tuned():
    """A source without a row of its own is one more row of the matrix."""
    found = transfer_matrix({("a", "a"): scores(80), ("a", "ITI"): scores(40)})
    assert found.matrix()["a"].tolist() == [100, 50]


def test_same_seed_same_numbers_and_json():
    """Bit for bit; JSON has no NaN; printing shows the percentages."""
    draw = np.random.default_rng(0)
    runs = {key: draw.random((2, 30)) for key in RUNS}
    one, two = (transfer_matrix(runs, resamples=300, seed=5) for _ in range(2))
    assert one.frame.equals(two.frame)
    record = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert record["cells"][0]["p"] is None
    assert record["cells"][1]["relative"] == one.frame.relative[1]
    assert len(record["per_seed"]) == 8
    assert "100.0" in one._repr_html_()
    assert "2 tasks" in repr(one)


def test_bad_input():
    """Each gap and mismatch is named."""
    with pytest.raises(InputError, match="tuned on b with the heads of a"):
        transfer_matrix({k: v for k, v in RUNS.items() if k != ("b", "a")})
    with pytest.raises(InputError, match="tuned on b with random heads"):
        transfer_matrix(RUNS, random={"a": scores(1)})
    for few in ({}, {("a", "a"): scores(80)}):
        with pytest.raises(InputError, match="at least two"):
            transfer_matrix(few)
    with pytest.raises(InputError, match="100 items with its own heads and 90 with those of b"):
        transfer_matrix(RUNS | {("a", "b"): scores(60, n=90)})
    with pytest.raises(InputError, match="of at least 0"):
        transfer_matrix(RUNS | {("a", "b"): -scores(60)})
    with pytest.raises(InputError, match="metrics names c"):
        transfer_matrix(RUNS, metrics={"c": "MC1"})
    with pytest.raises(InputError, match="random names c"):
        transfer_matrix(RUNS, random={"a": scores(1), "b": scores(1), "c": scores(1)})
    with pytest.raises(InputError, match="rename it"):
        transfer_matrix({("random", "random"): scores(1)}, random={"random": scores(1)})
    with pytest.raises(InputError, match="items; give runs on the same items"):
        resampled_means([scores(1), scores(1, n=9)])
    with pytest.raises(InputError, match="resamples is 0"):
        resampled_means([scores(1)], resamples=0)


def test_item_scores():
    """A single run is one row; ragged, empty, deep and unfinished ones are refused by name."""
    assert item_scores([1, 0], "x").tolist() == [[1, 0]]
    for bad, said in (([[1, 0], [1]], "rows of equal length"), ([], "shape"), ([[[1.0]]], "shape"), (["a"], "numbers"),
                      ([[1, np.nan]], r"score \[0, 1\] of x is nan")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            item_scores(bad, "x")
