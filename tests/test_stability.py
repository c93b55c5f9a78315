"""Agreement of head selection over runs: by hand, planted, and at chance."""

import math

import numpy as np
import pytest
import torch

from lofit_lens.analysis.stability import mean_spearman, selection_frequency, stability
from lofit_lens.errors import InputError
from lofit_lens.heads import HeadScores

A, B, C = (HeadScores([row], task="t") for row in ([4, 3, 2, 1], [3, 4, 1, 2], [1, 2, 3, 4]))


def test_stability_by_hand():
    """Top 2 of A, B, C among four heads: {0, 1}, {0, 1}, {2, 3}: Jaccard 1, 0, 0; by chance 4/6 * 1/3 + 1/6."""
    frame = stability([A, B, C])
    assert frame.k.tolist() == [1, 2, 3, 4]
    two = frame.iloc[1]
    assert (two.jaccard, two.shared) == pytest.approx((1 / 3, 2 / 3))
    assert (two.lowest, two.highest) == (0, 1)
    assert two.expected == pytest.approx(4 / 18 + 1 / 6)
    assert two.expected_shared == 1
    assert (two.n_runs, two.n_pairs) == (3, 3)
    assert frame.jaccard[3] == frame.lowest[3] == frame.expected[3] == 1, "all heads are all heads"
    assert frame.shared.tolist() == pytest.approx([0, 2 / 3, 6 / 3, 4])


def test_unrelated_runs_agree_as_chance_says():
    """30 runs of noise: the mean Jaccard of the 435 pairs is the expected one, for small and large K."""
    draw = np.random.default_rng(0)
    frame = stability([HeadScores(draw.random((6, 8))) for _ in range(30)], [4, 12, 24])
    assert frame.jaccard.to_numpy() == pytest.approx(frame.expected.to_numpy(), abs=0.015)
    assert frame.shared.to_numpy() == pytest.approx(frame.expected_shared.to_numpy(), abs=0.3)


def test_planted_heads_are_found_in_every_run():
    """Four planted heads above noise: Jaccard 1 at K = 4, each chosen in all runs, no other."""
    draw = np.random.default_rng(1)
    planted = torch.zeros(3, 5, dtype=torch.float64)
    planted[[0, 1, 1, 2], [4, 0, 3, 2]] = 1
    runs = [HeadScores(planted.numpy() + 0.5 * draw.random((3, 5)), "A-norm", "m", "t") for _ in range(5)]
    assert stability(runs, [4]).loc[0, ["jaccard", "lowest", "highest"]].tolist() == [1, 1, 1]
    frequency = selection_frequency(runs, 4)
    assert torch.equal(frequency.values, planted)
    assert (frequency.model, frequency.task) == ("m", "t")
    assert "5 runs" in frequency.kind


def test_frequency_by_hand():
    """Heads 0 and 1 lead in two of three runs, 2 and 3 in one; shares sum to K. Other tasks leave the name out."""
    frequency = selection_frequency([A, B, C], 2)
    assert frequency.values.tolist() == [pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3])]
    assert frequency.task == "t"
    assert selection_frequency([A, HeadScores(B.values, task="u")], 1).task == ""
    assert selection_frequency([A], 1).values.tolist() == [[1, 0, 0, 0]]


def test_mean_spearman_by_hand():
    """A & B: 1 - 6 * 4 / 60 = .6; A & C: -1; B & C: -.6: mean -1/3."""
    assert mean_spearman([A, B, C]) == pytest.approx(-1 / 3)
    assert math.isclose(mean_spearman([A, A]), 1)


def test_bad_input():
    """One run, other models, no K, a K above the model, no runs."""
    with pytest.raises(InputError, match=r"[01] runs given; give at least 2"):
        stability([A])
    with pytest.raises(InputError, match=r"[01] runs given; give at least 2"):
        mean_spearman([])
    with pytest.raises(InputError, match="different models"):
        stability([A, HeadScores([[1, 2]])])
    with pytest.raises(InputError, match=r"ks is \[\]; give numbers of heads from 1 to 4"):
        stability([A, B], [])
    with pytest.raises(InputError, match="from 1 to 4"):
        stability([A, B], [5])
    with pytest.raises(InputError, match="0 runs given; give at least 1"):
        selection_frequency([], 1)
    with pytest.raises(InputError, match="from 1 to 4"):
        selection_frequency([A, B], 0)
