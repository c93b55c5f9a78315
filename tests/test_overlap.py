"""Overlap of head sets and agreement of scores: by hand, against simulation, and on the official heads."""

import itertools
import math

import numpy as np
import pytest
import torch

from lofit_lens.analysis.chance import (
    at_least,
    chance_range,
    mean_jaccard,
    rank_biased_overlap,
    shared_by_chance,
    shared_by_chance_in_layers,
    shared_by_depth,
)
from lofit_lens.analysis.layers import mean_layers
from lofit_lens.analysis.overlap import agreement, agreement_by_k, overlap, score_agreement
from lofit_lens.errors import InputError
from lofit_lens.heads import HeadScores, HeadSet

SHAPE = (2, 4)  # 8 heads


def heads(*names, shape=SHAPE):
    return HeadSet(names, shape=shape)


# Chance


def test_shared_heads_by_chance_by_hand():
    """Two sets of 2 among 4 heads: of the 6 second sets 1 shares none, 4 one, 1 both."""
    p = shared_by_chance(2, 2, 4)
    assert p == pytest.approx([1 / 6, 4 / 6, 1 / 6])
    assert [at_least(p, x) for x in range(3)] == pytest.approx([1, 5 / 6, 1 / 6])
    assert mean_jaccard(p, 2, 2) == pytest.approx(4 / 6 * 1 / 3 + 1 / 6)
    with pytest.raises(InputError, match="5 and 2 heads out of 4"):
        shared_by_chance(5, 2, 4)


def test_shared_heads_by_chance_against_drawn_sets():
    """Sets of 5 and 7 among 24: mean, Jaccard and every tail lie within 4 standard errors of 20,000 draws."""
    draw, n = np.random.default_rng(0), 20_000
    place = draw.random((n, 24)).argsort(1)  # of every head in a shuffled list; the first set is heads 0 to 4
    x = (place[:, :5] < 7).sum(1)
    p = shared_by_chance(5, 7, 24)
    for seen, expected in [(x, 35 / 24), (x / (12 - x), mean_jaccard(p, 5, 7))]:
        assert abs(seen.mean() - expected) < 4 * seen.std() / math.sqrt(n)
    for k in range(1, 5):
        tail = at_least(p, k)
        assert abs((x >= k).mean() - tail) < 4 * math.sqrt(tail * (1 - tail) / n) + 1e-12


def test_layer_matched_chance_equals_every_shuffle():
    """Counts (2, 1) and (1, 2) in two layers of 3 heads: all 3^4 pairs of places, counted one by one."""
    two, one = list(itertools.combinations(range(3), 2)), list(itertools.combinations(range(3), 1))
    shared = [len({*a} & {*c}) + len({*b} & {*d}) for a, b, c, d in itertools.product(two, one, one, two)]
    expected = np.bincount(shared) / len(shared)
    found = shared_by_chance_in_layers(np.array([2, 1]), np.array([1, 2]), 3)
    assert found[: expected.size] == pytest.approx(expected)
    assert found[expected.size :] == pytest.approx(0)


def test_chance_range():
    """Of 1/6, 4/6, 1/6 the middle half is one shared head alone, 95 % all three outcomes."""
    p = shared_by_chance(2, 2, 4)
    assert chance_range(p, level=0.5) == (1, 1)
    assert chance_range(p) == (0, 2)
    with pytest.raises(InputError, match="level is 1"):
        chance_range(p, level=1)


# Rank-biased overlap


def test_rank_biased_overlap_by_hand():
    """a b c against b a c, p = .5: agreements 0, 1, 1: .5 * (0 + .5 + .25) + 1 * .125 = .5 (weights p^(d-1)(1-p))."""
    assert rank_biased_overlap("abc", "bac", p=0.5) == pytest.approx(0.5)
    assert rank_biased_overlap("abc", "abc", p=0.3) == pytest.approx(1)
    assert rank_biased_overlap("abc", "xyz") == 0
    assert rank_biased_overlap("abc", "axy") > rank_biased_overlap("abc", "xya"), "the top counts most"


def test_rank_biased_overlap_of_uneven_lists():
    """a against x a, p = .5 (s = 1, l = 2): X = 0, 1; (.5/.5)(0 + .5 * .25) + (1/2 + 0) * .25 = .25.

    And a against a x: X = 1, 1: sums .5 + .5 * .25, unseen 1 * 1/2 * .25, end (0 + 1) * .25: 1 in all.
    """
    assert rank_biased_overlap("a", "xa", p=0.5) == pytest.approx(0.25)
    assert rank_biased_overlap("a", "ax", p=0.5) == pytest.approx(1.0)
    assert rank_biased_overlap("ax", "a", p=0.5) == pytest.approx(1.0), "symmetric"


def test_rank_biased_overlap_is_the_limit_of_a_long_list():
    """Extrapolation: lists that go on agreeing as before have, summed without end, the same value."""
    a = list(range(200))
    b = [*range(10, 20), *range(10), *range(20, 200)]
    endless = sum(0.1 * 0.9 ** (d - 1) * x / d for d, x in enumerate(shared_by_depth(a, b), 1))
    assert rank_biased_overlap(a[:40], b[:40]) == pytest.approx(endless, abs=1e-8)
    for bad in (0, 1, 1.5):
        with pytest.raises(InputError, match="p is"):
            rank_biased_overlap(a, b, p=bad)
    with pytest.raises(InputError, match="a ranking is empty"):
        rank_biased_overlap([], b)


def test_shared_by_depth():
    """a b c against c a: c is shared at depth 3 only, a at depth 2."""
    assert shared_by_depth("abc", "ca").tolist() == [0, 1, 2]
    assert shared_by_depth("ab", "xy").tolist() == [0, 0]


# Sets


def test_overlap_by_hand():
    """Sets of 2 and 3 among 2x4 heads share L0H1; layer-matched, P = 1 - (no hit in layer 0: 3/4) * (layer 1: 1/2)."""
    frame = overlap({"a": heads("L0H0", "L1H0"), "b": heads("L0H0", "L1H1", "L1H2")})
    row = frame.iloc[0]
    assert (row.a, row.b, row.k_a, row.k_b, row.shared) == ("a", "b", 2, 3, 1)
    assert row.jaccard == pytest.approx(1 / 4)
    assert row.expected == pytest.approx(6 / 8)
    assert row.p_hypergeometric == pytest.approx(1 - math.comb(5, 2) / math.comb(8, 2))
    assert row.expected_jaccard == pytest.approx((15 * 1 / 4 + 3 * 2 / 3) / 28)
    assert row.expected_layer == pytest.approx(1 / 4 + 2 / 4)
    assert row.p_layer == pytest.approx(1 - 3 / 4 * 1 / 2)
    assert row.rbo == pytest.approx(rank_biased_overlap(["0", "x"], ["0", "y", "z"]))
    assert row.p_holm == row.p_hypergeometric, "one pair needs no adjusting"


def test_layer_matching_takes_out_a_shared_liking_for_layers():
    """Both sets in layer 0 alone: 3 shared heads look rare in the model (p < .001), not within that layer of 5."""
    a, b = (
        heads(*names, shape=(10, 5)) for names in (("L0H0", "L0H1", "L0H2", "L0H3"), ("L0H1", "L0H2", "L0H3", "L0H4"))
    )
    row = overlap({"a": a, "b": b}).iloc[0]
    assert row.p_hypergeometric < 0.001
    assert row.p_layer == pytest.approx(1.0)
    assert row.expected_layer == pytest.approx(16 / 5)


def test_holm_counts_all_pairs():
    """Three sets make three pairs: the smallest p is tripled, in both kinds of p."""
    sets = {"a": HeadSet.random((6, 8), 8, seed=0), "b": HeadSet.random((6, 8), 8, seed=1)}
    sets["c"] = HeadSet(sets["a"].heads[:7] + sets["b"].heads[:1], shape=(6, 8))
    frame = overlap(sets)
    assert [(r.a, r.b) for r in frame.itertuples()] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert frame.p_holm[1] == pytest.approx(3 * frame.p_hypergeometric[1])
    assert frame.p_layer_holm[1] == pytest.approx(3 * frame.p_layer[1])


def test_overlap_takes_a_shape_for_sets_that_know_none():
    """Sets without a model need one; given, it is checked."""
    bare = {"a": HeadSet(["L0H0"]), "b": HeadSet(["L0H0"])}
    assert overlap(bare, shape=SHAPE).p_hypergeometric[0] == pytest.approx(1 / 8)
    with pytest.raises(InputError, match="give shape="):
        overlap(bare)
    with pytest.raises(InputError, match="L0H3 is outside"):
        overlap(bare | {"c": HeadSet(["L0H3"])}, shape=(2, 2))
    with pytest.raises(InputError, match="different models"):
        overlap({"a": heads("L0H0"), "b": heads("L0H0", shape=(3, 4))})
    with pytest.raises(InputError, match="different models"):
        overlap({"a": heads("L0H0"), "b": heads("L0H0")}, shape=(3, 4))


def test_overlap_needs_two_sets_with_heads():
    """One set, none, and an empty one."""
    for sets in ({}, {"a": heads("L0H0")}):
        with pytest.raises(InputError, match="at least two"):
            overlap(sets)
    with pytest.raises(InputError, match="'b' is empty"):
        overlap({"a": heads("L0H0"), "b": heads()})


# Scores


def test_score_agreement_by_hand():
    """Ranks 1 2 3 4 5 6 against 2 1 4 3 6 5: rho = 1 - 6 * 6 / (6 * 35) = 29/35; reversed -1."""
    a = HeadScores([[1, 2, 3], [4, 5, 6]])
    b = HeadScores([[2, 1, 4], [3, 6, 5]])
    frame = score_agreement({"a": a, "b": b, "c": HeadScores(-a.values)})
    assert frame.rho.tolist() == pytest.approx([29 / 35, -1, -29 / 35])
    assert frame.n.tolist() == [6, 6, 6]
    assert frame.p_holm[0] >= frame.p[0]
    # Ranks less their layer's mean: a = (-1, 0, 1) twice; b = (2, 1, 4) - 7/3 and (3, 6, 5) - 14/3.
    x, y = np.array([-1, 0, 1, -1, 0, 1]), np.array([-1, -4, 5, -5, 4, 1]) / 3
    assert frame.rho_layer[0] == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))


def test_score_agreement_tells_layers_from_heads():
    """Scores that share only their liking for layers: rho is high, rho_layer is not."""
    draw = np.random.default_rng(0)
    layer = 10 * np.arange(20)[:, None]
    row = score_agreement({n: HeadScores(layer + draw.random((20, 10))) for n in "ab"}).iloc[0]
    assert row.rho > 0.95
    assert abs(row.rho_layer) < 4 / math.sqrt(200)


def test_score_agreement_refuses_what_it_cannot_rank():
    """Equal scores, two heads, one score, other models."""
    good = HeadScores(torch.arange(6.0).reshape(2, 3))
    with pytest.raises(InputError, match="'b' are all 1"):
        score_agreement({"a": good, "b": HeadScores(torch.ones(2, 3))})
    with pytest.raises(InputError, match="2 heads"):
        score_agreement({"a": HeadScores([[1, 2]]), "b": HeadScores([[1, 2]])})
    with pytest.raises(InputError, match="at least two"):
        score_agreement({"a": good})
    with pytest.raises(InputError, match="different models"):
        score_agreement({"a": good, "b": HeadScores(torch.arange(6.0).reshape(3, 2))})


# By K


def test_agreement_by_k_by_hand():
    """Rankings 0 1 2 3 and 1 0 3 2 of four heads share 0, 2, 2, 4 of their top 1 to 4."""
    a, b = HeadScores([[4, 3, 2, 1]]), HeadScores([[3, 4, 1, 2]])
    frame = agreement_by_k(a, b)
    assert frame.k.tolist() == [1, 2, 3, 4]
    assert frame.shared.tolist() == [0, 2, 2, 4]
    assert frame.jaccard.tolist() == pytest.approx([0, 1, 2 / 4, 1])
    assert frame.expected.tolist() == pytest.approx([1 / 4, 1, 9 / 4, 4])
    assert frame.p.tolist() == pytest.approx([1, 1 / 6, 1, 1])
    assert list(zip(frame.low, frame.high, strict=True)) == [(0, 1), (0, 2), (2, 3), (4, 4)]
    assert frame.expected_jaccard[1] == pytest.approx(4 / 6 / 3 + 1 / 6)


def test_agreement_by_k_equals_overlap_of_the_top_k():
    """At each K the row says what `overlap` says of the two top-K sets, rank-biased overlap included."""
    draw = np.random.default_rng(3)
    base = draw.random((4, 6))
    a, b = (HeadScores(base + 0.5 * draw.random((4, 6))) for _ in range(2))
    for row in agreement_by_k(a, b, [1, 5, 12, 24], p=0.8).itertuples():
        one = overlap({"a": a.top(row.k), "b": b.top(row.k)}, p=0.8).iloc[0]
        for mine, theirs in (("shared", "shared"), ("jaccard", "jaccard"), ("expected", "expected"), ("rbo", "rbo"),
                             ("p", "p_hypergeometric"), ("expected_jaccard", "expected_jaccard")):  # fmt: skip
            assert getattr(row, mine) == pytest.approx(one[theirs]), mine


def test_agreement_of_short_rankings_and_of_all_pairs():
    """A ranking of 3 heads limits K to 3; `agreement` stacks the pairs."""
    full, short = HeadScores(torch.arange(8.0).reshape(2, 4)), HeadSet(["L1H3", "L0H0", "L1H2"])
    frame = agreement_by_k(full, short)
    assert frame.shared.tolist() == [1, 1, 2]
    stacked = agreement({"full": full, "short": short, "other": HeadScores(-full.values)}, [1, 3])
    assert stacked.pair.tolist() == [x for x in ("full & short", "full & other", "short & other") for _ in range(2)]
    assert stacked[stacked.pair == "full & short"].shared.tolist() == [1, 2]
    with pytest.raises(InputError, match="from 1 to 3"):
        agreement_by_k(full, short, [4])
    with pytest.raises(InputError, match=r"ks is \[\]; give numbers of heads from 1 to 3"):
        agreement_by_k(full, short, [])
    with pytest.raises(InputError, match="give shape="):
        agreement_by_k(short, short)
    with pytest.raises(InputError, match="a ranking is empty"):
        agreement_by_k(full, HeadSet([]))
    with pytest.raises(InputError, match="at least two"):
        agreement({"full": full})


# Official heads

OFFICIAL = {  # shape, K, shared heads of (TQ & MQ, TQ & CL, MQ & CL), mean layer of (TQ, MQ, CL)
    "gemma-7b": ((28, 16), 16, [4, 7, 8], [15.6, 10.5, 10.8]),
    "llama2-7b": ((32, 32), 32, [6, 4, 5], [12.6, 9.0, 10.3]),
}


@pytest.mark.data
@pytest.mark.parametrize("model", OFFICIAL)
def test_official_heads(data_dir, model):
    """The official top-K heads share the known numbers and lie at the known mean layers; every pair beats chance."""
    shape, k, shared, layers = OFFICIAL[model]
    rankings = {
        task: HeadSet.from_npy(
            data_dir / "official_heads" / f"{model}-base_{task}_Aonly_top160heads_42.npy", shape=shape
        )
        for task in ("truthfulqa", "mquake", "clutrr")
    }
    sets = {task: ranking.top(k) for task, ranking in rankings.items()}
    frame = overlap(sets)
    assert frame.shared.tolist() == shared
    assert mean_layers(sets).mean_layer.tolist() == pytest.approx(layers, abs=0.05)
    assert (frame.p_layer_holm < 0.05).all()
    assert agreement(rankings, [k, 160]).query("k == @k").shared.tolist() == shared
