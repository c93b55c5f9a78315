"""Heads by layer and mean layers: by hand, and p against every way to deal the heads."""

import itertools

import numpy as np
import pytest

from lofit_lens.analysis.layers import layer_shares, mean_layer_differences, mean_layers
from lofit_lens.errors import InputError
from lofit_lens.heads import HeadSet

SHAPE = (3, 4)


def test_shares_by_hand():
    """Two of four heads in layer 0, one in layer 1 and 2; by chance a third in each; one head: all in its layer."""
    four = HeadSet(["L0H0", "L2H1", "L0H3", "L1H0"], shape=SHAPE)
    frame = layer_shares({"four": four, "one": four.top(1)})
    assert frame.set.tolist() == ["four"] * 3 + ["one"] * 3
    assert frame.layer.tolist() == [0, 1, 2] * 2
    assert frame["count"].tolist() == [2, 1, 1, 1, 0, 0]
    assert frame.share.tolist() == [0.5, 0.25, 0.25, 1, 0, 0]
    assert frame.expected.tolist() == pytest.approx([1 / 3] * 6)


@pytest.mark.slow
def test_chance_range_of_a_layer_against_drawn_sets():
    """Of 40 heads drawn from 10 layers of 16, the 95 % range holds the number in layer 3 in 95 % of draws or a little more."""
    frame = layer_shares({"x": HeadSet.random((10, 16), 40, seed=0)})
    low, high = frame.low[3], frame.high[3]
    draw = np.random.default_rng(0)
    share = np.array([(draw.choice(160, 40, False) // 16 == 3).mean() for _ in range(4000)])
    inside = ((share >= low) & (share <= high)).mean()
    assert 0.94 < inside < 0.99
    assert ((share > low) & (share < high)).mean() < 0.95, "no wider than needed"
    assert low < 0.1 < high


def test_sets_without_a_model_have_no_chance_range():
    """n_layers alone gives shares; how many heads a layer has is not known."""
    frame = layer_shares({"x": HeadSet(["L1H9"])}, n_layers=4)
    assert frame.share.tolist() == [0, 1, 0, 0]
    assert frame.low.isna().all()
    with pytest.raises(InputError, match="name none"):
        layer_shares({"x": HeadSet(["L1H9"])})
    with pytest.raises(InputError, match="layers 0 to 0"):
        layer_shares({"x": HeadSet(["L1H9"])}, n_layers=1)
    with pytest.raises(InputError, match=r"\[3, 4\] layers"):
        layer_shares({"x": HeadSet(["L1H3"], shape=SHAPE)}, n_layers=4)


def test_mean_layers_by_hand():
    """Layers 0, 2, 0, 2: mean 1, sd sqrt(4/3); the bootstrap lies between; one head has neither."""
    four = HeadSet(["L0H0", "L2H1", "L0H3", "L2H0"], shape=SHAPE)
    frame = mean_layers({"four": four, "one": four.top(1)})
    assert frame.k.tolist() == [4, 1]
    assert frame.mean_layer.tolist() == [1, 0]
    assert frame.sd[0] == pytest.approx(np.sqrt(4 / 3))
    assert frame.loc[0, ["low", "high"]].tolist() == [0.0, 2.0]
    assert frame.loc[1, ["sd", "low", "high"]].isna().all()


def test_interval_of_the_mean_layer_by_the_normal_law():
    """400 heads in layers 0 to 9: the interval is the mean -+ 1.96 sd / sqrt(400), to a few per cent."""
    layers = np.random.default_rng(0).integers(0, 10, 400)
    heads = HeadSet([(int(layer), i) for i, layer in enumerate(layers)])
    row = mean_layers({"x": heads}).iloc[0]
    assert row.high - row.low == pytest.approx(2 * 1.96 * row.sd / 20, rel=0.05)


def test_difference_of_mean_layers_equals_every_way_to_deal():
    """Layers 0 0 1 against 2 2, one shared head in layer 1: p = share of the C(4, 2) deals at least as far apart."""
    a = HeadSet(["L0H0", "L0H1", "L1H0"], shape=SHAPE)
    b = HeadSet(["L2H0", "L2H1", "L1H0"], shape=SHAPE)
    row = mean_layer_differences({"a": a, "b": b}).iloc[0]
    assert row.difference == pytest.approx(1 / 3 - 5 / 3)
    pool, far = [0, 0, 2, 2], 0
    for left in itertools.combinations(range(4), 2):
        mine = sum(pool[i] for i in left)
        far += abs((mine + 1) / 3 - (4 - mine + 1) / 3) >= 4 / 3 - 1e-9
    assert row.p == pytest.approx(far / 6)
    assert row.p_holm == row.p


def test_deeper_heads_are_found_and_equal_ones_are_not():
    """40 heads in the upper half against 40 in the lower: p small. Sets within one another cannot be dealt: p = 1."""
    low = HeadSet([(i % 4, i // 4) for i in range(40)], shape=(8, 12))
    high = HeadSet([(4 + i % 4, i // 4) for i in range(40)], shape=(8, 12))
    frame = mean_layer_differences({"low": low, "high": high, "part": low.top(20)}, permutations=999)
    assert frame.p[0] == pytest.approx(2 / 1000)
    assert frame.difference[0] == -4
    assert frame.p[1] == 1
    assert frame.p_holm[0] == pytest.approx(3 * frame.p[0])
    assert frame.equals(mean_layer_differences({"low": low, "high": high, "part": low.top(20)}, permutations=999))


def test_nothing_given_is_an_error():
    """No set, an empty set, one set where two are compared."""
    for function in (layer_shares, mean_layers, mean_layer_differences):
        with pytest.raises(InputError, match="no head sets"):
            function({})
        with pytest.raises(InputError, match="'x' is empty"):
            function({"x": HeadSet([], shape=SHAPE)})
    with pytest.raises(InputError, match="at least two"):
        mean_layer_differences({"x": HeadSet(["L0H0"])})
