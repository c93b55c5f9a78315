"""Paired comparisons: differences worked out by hand, seeds averaged, results of other items refused."""

import json

import numpy as np
import pandas as pd
import pytest

from lofit_lens import EvalResult
from lofit_lens.errors import InputError
from lofit_lens.evaluation import Metric, compare, over_seeds
from lofit_lens.evaluation.stats import (
    bootstrap_interval,
    bootstrap_interval_over_seeds,
    minimum_detectable_difference,
    paired_bootstrap_test,
    paired_permutation_test,
)

A, B = [1.0, 1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0, 0.0]  # differences 1, 0, 1, 0, 1


def result(values=A, *, label="", task="t", split="test", form="", prompts=None, **more):
    """A result as `evaluate` makes it; further metrics by name."""
    columns = {"em": values, **more}
    n = len(values)
    items = pd.DataFrame({
        "item": range(1, n + 1), "group": "", "prompt": prompts or [f"p{i}" for i in range(n)],
        "generated": [f"{label}{i}" for i in range(n)], "references": [["r"]] * n, **columns,
    })  # fmt: skip
    return EvalResult(task, split, {k: Metric.of(v) for k, v in columns.items()}, items, form, label)


def test_the_difference_by_hand():
    """Means .8 and .2, difference .6: three items of five went from wrong to right, none back."""
    found = compare(result(A, label="lofit"), result(B, label="bare"))
    assert (found.a["em"].mean, found.b["em"].mean) == (pytest.approx(0.8), pytest.approx(0.2))
    assert found["em"] == paired_bootstrap_test(A, B)
    assert (found["em"].difference, found["em"].n, found["em"].alternative) == (pytest.approx(0.6), 5, "two-sided")
    assert compare(result(B), result(A))["em"].difference == pytest.approx(-0.6)
    # Squares of the differences' distances from .6: 3 * .16 + 2 * .36 = 1.2, over 4: 0.3.
    assert found.detectable["em"] == pytest.approx(minimum_detectable_difference(5, sd=0.3**0.5))
    assert (found.labels, found.task, found.p_holm) == (("lofit", "bare"), "t test", {"em": found["em"].p})
    assert found.a["em"].interval == bootstrap_interval(A)


def test_the_permutation_test_by_hand():
    """Five items, 2^5 swaps, of which the two zeros change nothing: |mean| >= .6 in 2 of 8 sign patterns, p = .25."""
    found = compare(result(A), result(B), test=paired_permutation_test)
    assert (found["em"].p, found["em"].method, found["em"].resamples) == (0.25, "paired permutation", 32)
    assert compare(result(A), result(B), test=paired_permutation_test, alternative="greater")["em"].p == 0.125


def test_a_test_of_ones_own_is_called_with_the_items():
    """It gets both columns as arrays, the alternative and the seed."""
    asked = []

    def mine(a, b, *, alternative, seed):
        asked.append((list(a), list(b), alternative, seed))
        return paired_bootstrap_test(a, b, alternative=alternative, seed=seed)

    assert compare(result(A), result(B), test=mine, alternative="less", seed=7)["em"].seed == 7
    assert asked == [(A, B, "less", 7)]


def test_holm_adjusts_for_the_number_of_metrics():
    """Two metrics with the same values have p and twice that; asked for one of them, nothing is adjusted."""
    both = [result(v, f1=v) for v in (A, B)]
    found = compare(*both)
    p = found["em"].p
    assert found.p_holm == pytest.approx({"em": min(1, 2 * p), "f1": min(1, 2 * p)})
    one = compare(*both, metrics=["f1", "f1"])
    assert (list(one.tests), one.p_holm) == (["f1"], {"f1": p})
    with pytest.raises(InputError, match="no metric 'em' in this comparison; it has f1"):
        one["em"]


def test_only_shared_metrics_are_compared():
    """A metric that one side lacks is left out; asked for, it is an error; none in common is one as well."""
    assert list(compare(result(A, f1=A), result(B)).tests) == ["em"]
    with pytest.raises(InputError, match="metric 'f1' is not in all results; they share em"):
        compare(result(A, f1=A), result(B), metrics=["f1"])
    other = result(B)
    other.metrics["mc1"] = other.metrics.pop("em")
    with pytest.raises(InputError, match="no metric in common"):
        compare(result(A), other)


def test_seeds_are_averaged_item_by_item():
    """Two seeds against one: items .5, 1, .5 against 0, 1, 0, differences .5, 0, .5."""
    seeds = [result([1.0, 1.0, 0.0], label="s0"), result([0.0, 1.0, 1.0], label="s1")]
    found = compare(seeds, result([0.0, 1.0, 0.0], label="bare"))
    assert found["em"] == paired_bootstrap_test([0.5, 1.0, 0.5], [0.0, 1.0, 0.0])
    grid = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert found.a["em"] == Metric(4 / 6, bootstrap_interval_over_seeds(grid), 3, 2)
    assert (found.b["em"].seeds, found.labels) == (1, ("s0 / s1", "bare"))
    assert over_seeds(seeds) == found.a


def test_no_difference_anywhere_has_nothing_to_detect():
    """All items equal: difference 0, p 1, and no spread to compute a detectable difference from."""
    found = compare(result(A), result(A))
    assert (found["em"].difference, found["em"].p, found.detectable["em"]) == (0.0, 1.0, None)
    assert "-" in found.rows()[0]


def test_labels_tell_the_sides_apart():
    """Same label: numbered. None: first and second."""
    assert compare(result(A, label="x"), result(B, label="x")).labels == ("x (1)", "x (2)")
    assert compare(result(A), result(B)).labels == ("first", "second")
    assert compare([result(A, label="x"), result(A, label="x")], result(B, label="y")).labels == ("x", "y")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (result(B, task="u"), "differ in task: 't' and 'u'"),
        (result(B, split="val"), "differ in split: 'test' and 'val'"),
        (result(B, form="options"), "differ in form: '' and 'options'"),
        (result(B[:3]), "have 5 and 3 items"),
        (result(B, prompts=["p0", "p1", "other", "p3", "p4"]), "item 3 differs in 'prompt'"),
    ],
)
def test_other_items_are_refused(other, message):
    """On either side, and between seeds of one side; what differs is named."""
    for call in (
        lambda: compare(result(A), other),
        lambda: compare([result(A), other], result(B)),
        lambda: compare(result(A), [result(B), other]),
        lambda: over_seeds([result(A), other]),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_what_was_asked_must_be_there_on_both_sides():
    """References that differ, or a column that one side lacks; what the model said may differ."""
    changed, lacking = result(B), result(B)
    changed.items.at[1, "references"] = ["s"]
    with pytest.raises(InputError, match="item 2 differs in 'references'"):
        compare(result(A), changed)
    del lacking.items["references"]
    with pytest.raises(InputError, match="only one of these results has a column 'references'"):
        compare(lacking, result(A))
    assert list(result(A, label="a").items["generated"]) != list(result(B, label="b").items["generated"])


def test_nothing_to_compare_is_refused():
    """No result on a side, an unknown metric over seeds, an unknown alternative."""
    for call in (lambda: compare([], result(A)), lambda: compare(result(A), []), lambda: over_seeds([])):
        with pytest.raises(InputError, match="no result given"):
            call()
    with pytest.raises(InputError, match="no metric 'f1'"):
        over_seeds([result(A)], ["f1"])
    with pytest.raises(InputError, match="unknown alternative 'more'"):
        compare(result(A), result(B), alternative="more")


def test_no_mean_stands_alone():
    """Beside a, b and their difference stand their intervals and n, in numbers, in text and in the notebook's table."""
    found = compare(result(A, label="<a>"), result(B, label="b"))
    row = found.to_frame().iloc[0]
    for name in ("a", "b"):
        assert (row[name], (row[f"{name}_low"], row[f"{name}_high"])) == (
            getattr(found, name)["em"].mean,
            getattr(found, name)["em"].interval,
        )
    test = found["em"]
    assert (row["low"], row["high"], row["p"], row["mark"], row["n"]) == (*test.interval, test.p, test.mark, 5)
    metric, a, b, difference, p, *_ = found.rows()[0]
    assert (metric, a, b) == ("em", str(found.a["em"]), str(found.b["em"]))
    assert difference == f"+0.600 [{test.interval[0]:+.3f}, {test.interval[1]:+.3f}]"
    assert p.startswith(f"{test.p:.4f}")
    assert len(found.columns()) == len(found.rows()[0])
    page = found._repr_html_()
    assert "&lt;a&gt; against b: t test" in page
    assert "<a>" not in page
    assert "n=5 items" in page
    assert repr(found).startswith("Comparison(<a> - b, t test: em +0.600 [")


@pytest.mark.parametrize(("alternative", "said"), [("greater", "first above second"), ("less", "first below second")])
def test_one_sided_tests_say_so(alternative, said):
    """The note names the side."""
    assert said in compare(result(A), result(B), alternative=alternative).notes()[0]


def test_a_single_item_is_no_evidence():
    """p = 1, no interval, nothing detectable; text, table and JSON still stand."""
    found = compare(result([1.0]), result([0.0]))
    assert (found["em"].p, found["em"].interval, found.detectable["em"]) == (1.0, None, None)
    assert found.rows()[0][1:4] == ("1.000", "0.000", "+1.000")
    assert found.to_frame().iloc[0]["difference"] == 1.0
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_comparison_as_json():
    """Everything in plain numbers and texts, without NaN; a test can be made from it again."""
    found = compare(result(A, label="a", f1=A), result(B, label="b", f1=A))
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (record["kind"], record["labels"], record["task"]) == ("lofit_lens.Comparison", ["a", "b"], "t test")
    assert record["a"]["em"] == {"mean": 0.8, "interval": list(bootstrap_interval(A)), "n": 5, "seeds": 1}
    assert record["detectable"]["f1"] is None
    kept = record["tests"]["em"]
    assert type(found["em"])(**{**kept, "interval": tuple(kept["interval"])}) == found["em"]
    assert record["versions"]["lofit-lens"]
