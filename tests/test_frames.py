"""What a user takes into pandas and numpy: `to_frame` of heads and results, and the scores as an array."""

import numpy as np
import pandas as pd
import pytest
import torch

from lofit_lens.errors import InputError
from lofit_lens.evaluation import EvalResult, compare
from lofit_lens.evaluation.result import Metric
from lofit_lens.experiments.tables.table import MethodTable
from lofit_lens.heads import HeadScores, HeadSet

SCORES = HeadScores(np.array([[0.5, 3.0], [2.0, 0.5]]), "A-norm")


def test_scores_as_a_frame():
    """Best first, equal ones layer by layer; name, layer and place in it."""
    assert SCORES.to_frame().to_dict("list") == {
        "head": ["L0H1", "L1H0", "L0H0", "L1H1"], "layer": [0, 1, 0, 1], "index": [1, 0, 0, 1], "rank": [1, 2, 3, 4],
        "score": [3.0, 2.0, 0.5, 0.5],
    }  # fmt: skip


def test_only_layers_with_heads_are_in_it():
    """A model in which only layer 1 has heads."""
    frame = HeadScores(np.array([[9.0, 9.0], [2.0, 0.5]]), layers=[1]).to_frame()
    assert frame["head"].tolist() == ["L1H0", "L1H1"]


def test_a_head_set_as_a_frame():
    """In its order; without scores the column is there and empty; no heads, no rows."""
    pd.testing.assert_frame_equal(SCORES.top(2).to_frame(), SCORES.to_frame().head(2))
    frame = HeadSet("L4H3 L2H1").to_frame()
    assert frame["head"].tolist() == ["L4H3", "L2H1"]
    assert frame["score"].isna().all()
    empty = HeadSet([]).to_frame()
    assert (len(empty), list(empty)) == (0, list(frame))


def result(values, label):
    items = pd.DataFrame({
        "item": [1, 2, 3, 4], "group": "", "prompt": list("abcd"), "accuracy": values, "correct": [v == 1 for v in values],
    })  # fmt: skip
    return EvalResult("kin", "test", {"accuracy": Metric.of(values)}, items, form="choices", label=label)


def test_a_result_as_a_frame():
    """One row a metric, so that several results can be put below each other; a single value has no interval."""
    found = result([1.0, 0.0, 1.0, 1.0], "LoFiT")
    (row,) = found.to_frame().to_dict("records")
    low, high = found.metrics["accuracy"].interval
    assert row == {
        "task": "kin", "split": "test", "form": "choices", "label": "LoFiT", "metric": "accuracy", "mean": 0.75, "low": low,
        "high": high, "n": 4, "seeds": 1,
    }  # fmt: skip
    single = EvalResult("kin", "test", {"accuracy": Metric(0.5, None, 1)}, pd.DataFrame())
    assert single.to_frame()[["low", "high"]].isna().all(axis=None)


def test_other_results_say_it_by_the_same_name():
    """A comparison, and a table of methods (see test_method_table)."""
    found = compare(result([1.0, 1.0, 1.0, 0.0], "a"), result([1.0, 0.0, 0.0, 0.0], "b"))
    assert found.to_frame()["difference"].tolist() == [0.5]
    assert callable(MethodTable.to_frame)


def test_scores_as_an_array():
    """numpy's protocol with `dtype` and `copy`; nobody changes the scores through it."""
    taken = np.asarray(SCORES)
    assert (taken.dtype, taken.shape) == (np.float64, (2, 2))
    taken[0, 0] = 7.0
    assert SCORES["L0H0"] == 0.5
    assert np.asarray(SCORES, dtype=np.float32).dtype == np.float32
    assert SCORES.__array__(np.float32, copy=True).tolist() == SCORES.values.tolist()
    view = SCORES.__array__(copy=False)
    assert np.shares_memory(view, SCORES.values.numpy())
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 7.0
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert not np.array(SCORES, copy=False).flags.writeable
        with pytest.raises(ValueError, match="copy"):
            np.array(SCORES, dtype=np.float32, copy=False)
    assert np.mean(SCORES) == 1.5
    assert torch.equal(torch.from_dlpack(SCORES), SCORES.values)
    with pytest.raises(InputError, match="must be numbers"):
        HeadScores(["x"])
