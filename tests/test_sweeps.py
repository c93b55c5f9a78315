"""Scores along a setting and their differences: by hand and against the paired tests."""

import numpy as np
import pytest

from lofit_lens.analysis.sweeps import paired_differences, sweep
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import bootstrap_interval_over_seeds, holm, paired_bootstrap_test


def scores(rate, n=80, seeds=3, seed=0):
    return (np.random.default_rng(seed).random((seeds, n)) < rate).astype(float)


def test_sweep_by_hand():
    """Seeds with 3 and 1 of 4 right: mean .5, single seeds .75 and .25; points are sorted by x."""
    frame = sweep({"LoFiT": {8: [[1, 1, 1, 0], [0, 1, 0, 0]], 2: [[1, 0, 0, 0]]}, "zero-shot": {0: [0, 1]}})
    assert frame.series.tolist() == ["LoFiT", "LoFiT", "zero-shot"]
    assert frame.x.tolist() == [2, 8, 0]
    assert frame["mean"].tolist() == [0.25, 0.5, 0.5]
    assert frame.lowest.tolist() == [0.25, 0.25, 0.5]
    assert frame.highest.tolist() == [0.25, 0.75, 0.5]
    assert frame.n_seeds.tolist() == [1, 2, 1]
    assert frame.n_items.tolist() == [4, 4, 2]


def test_intervals_are_those_of_the_library():
    """Over seeds and items; where all is right the exact binomial one; a single score has none."""
    mixed = scores(0.6)
    frame = sweep({"a": {1: mixed, 2: np.ones((2, 40)), 3: [[1.0]], 4: np.full((2, 5), 0.5)}}, seed=3, level=0.9)
    assert tuple(frame.loc[0, ["low", "high"]]) == bootstrap_interval_over_seeds(mixed, seed=3, level=0.9)
    assert frame.low[1] == pytest.approx(0.05 ** (1 / 40))  # Clopper & Pearson: (1 - level) / 2 to the power of 1 / n
    assert frame.high[1] == 1
    assert frame.loc[2, ["low", "high"]].isna().all()
    assert frame.loc[3, ["low", "high"]].tolist() == [0.5, 0.5]
    assert frame.equals(
        sweep({"a": {1: mixed, 2: np.ones((2, 40)), 3: [[1.0]], 4: np.full((2, 5), 0.5)}}, seed=3, level=0.9)
    )


def test_differences_against_a_reference():
    """At each x the other series minus the reference, the paired test of the seeds' mean, Holm over all rows."""
    values = {name: {x: scores(rate + x / 100, seed=i * 10 + x) for x in (1, 5)}
              for i, (name, rate) in enumerate({"LoRA": 0.4, "LoFiT": 0.7, "RED": 0.45}.items())}  # fmt: skip
    frame = paired_differences(values, "LoRA", seed=2)
    assert list(zip(frame.series, frame.x, strict=True)) == [("LoFiT", 1), ("LoFiT", 5), ("RED", 1), ("RED", 5)]
    for row in frame.itertuples():
        a, b = values[row.series][row.x], values["LoRA"][row.x]
        test = paired_bootstrap_test(a.mean(0), b.mean(0), seed=2)
        assert row.difference == pytest.approx(a.mean() - b.mean())
        assert row.p == test.p
        assert row.mark == test.mark
        assert row.low < row.difference < row.high
        assert row.high - row.low > 0.9 * (test.interval[1] - test.interval[0]), "seeds add to the spread of items"
    assert frame.p_holm.tolist() == pytest.approx(holm(frame.p))
    assert frame.n_items.tolist() == [80] * 4


def test_a_reference_of_one_point_serves_every_x():
    """The untuned model, run once: every K is held against it. A constant shift has no spread."""
    base = scores(0.5, seeds=1)
    frame = paired_differences({"LoFiT": {1: base + 0.25, 8: base + 0.5}, "zero-shot": {0: base}}, "zero-shot")
    assert frame.difference.tolist() == pytest.approx([0.25, 0.5])
    assert frame.low.tolist() == pytest.approx([0.25, 0.5])
    assert frame.high.tolist() == pytest.approx([0.25, 0.5])
    single = paired_differences({"a": {1: [[1.0]]}, "b": {1: [[0.0]]}}, "b")
    assert single.loc[0, ["low", "high"]].isna().all()
    assert single.p[0] == 1


def test_bad_input():
    """No series, a series without points, an unknown reference, a missing x, other items, broken scores."""
    with pytest.raises(InputError, match=r"values is \{\}; give series -> x -> scores"):
        sweep({})
    with pytest.raises(InputError, match=r"series 'a' is \{\}; give x -> scores .*at least one x"):
        sweep({"a": {}})
    with pytest.raises(InputError, match="'a' at 4"):
        sweep({"a": {4: [[1, np.inf]]}})
    values = {"a": {1: scores(0.5), 2: scores(0.5), 9: scores(0.5)}, "b": {1: scores(0.5), 2: scores(0.5)}}
    with pytest.raises(InputError, match="no series 'c'"):
        paired_differences(values, "c")
    with pytest.raises(InputError, match="a point at 9, the reference 'b' only at 1, 2"):
        paired_differences(values, "b")
    with pytest.raises(InputError, match="second series"):
        paired_differences({"a": {1: [1, 0]}}, "a")
    with pytest.raises(InputError, match="80 items and 'b' 70"):
        paired_differences({"a": {1: scores(0.5)}, "b": {1: scores(0.5, n=70)}}, "b")
