"""Figures of readings: what is drawn is what was found, with its bounds, labels and counts; nothing to draw is an error."""

import numpy as np
import pandas as pd
import pytest

from lofit_lens import HeadSet
from lofit_lens.analysis.drift import Drift
from lofit_lens.analysis.interference import Interference, LongContext
from lofit_lens.analysis.logit_lens import HeadTokens
from lofit_lens.analysis.needed import KeepOnly, LeaveOneOut, Removal
from lofit_lens.errors import InputError
from lofit_lens.plots.drift import drift_layers, drift_positions
from lofit_lens.plots.interference import interference_figure, long_context_figure
from lofit_lens.plots.readings import (
    cosine_figure,
    keep_figure,
    leave_one_out_figure,
    promoted_figure,
    removal_bars,
    removal_figure,
)

NAN = float("nan")


def bounds(trace):
    """`(low, high)` of each bar or point with error bars."""
    up, down = trace.error_y.array, trace.error_y.arrayminus
    return [(round(y - d, 9), round(y + u, 9)) for y, u, d in zip(trace.y, up, down, strict=True)]


def note(fig):
    return " ".join(a.text for a in fig.layout.annotations).replace("<br>", " ")


def band(fig, name):
    """Low and high of a curve's band, by x."""
    found = next(t for t in fig.data if t.name == name and t.fill == "toself")
    n = len(found.x) // 2
    return list(found.y[n:][::-1]), list(found.y[:n])


# ------------------------------------------------------------------------------------------------- tokens


def tokens(n_heads, *, scale=2.0, top=2):
    names = [f"L{i}H0" for i in range(n_heads)]
    rows = [
        {"head": h, "kind": k, "rank": r + 1, "token_id": r, "token": f" <{k[0]}{r}>", "logit": sign * (9.0 - r)}
        for h in [*names, "total"] for k, sign in (("promoted", 1), ("suppressed", -1)) for r in range(top)
    ]  # fmt: skip
    return HeadTokens(pd.DataFrame(rows), HeadSet(names), scale, 7, "m", "t")


def test_tokens_stand_in_order_of_their_logits():
    """From the most promoted down to the most suppressed; white space is visible and no token is markup."""
    fig = promoted_figure(tokens(2))
    bars = [t for t in fig.data if t.type == "bar"]
    assert [b.name for b in bars] == ["L0H0", "L1H0", "all heads"]
    assert list(bars[0].x) == [9.0, 8.0, -8.0, -9.0]
    assert list(fig.layout.yaxis.ticktext) == ["␣&lt;p0&gt;", "␣&lt;p1&gt;", "␣&lt;s1&gt;", "␣&lt;s0&gt;"]
    assert list(bars[0].marker.color) == ["#0072B2"] * 2 + ["#D55E00"] * 2
    assert tuple(fig.layout.yaxis.range) == (3.5, -0.5), "first on top"
    assert fig.layout.xaxis.title.text == "logits"
    assert "7 prompts" in note(fig)
    assert [list(b.x) for b in promoted_figure(tokens(2), top=1).data] == [[9.0, -9.0]] * 3


def test_lists_of_chance_are_said():
    """Above a panel whose promoted or suppressed tokens are no stronger than chance; older results do not know."""
    found = tokens(2)
    assert "n.s." not in note(promoted_figure(found))
    found.frame["p"] = [0.06 if (h, k) in {("L0H0", "promoted"), ("L1H0", "promoted"), ("L1H0", "suppressed")} else 0.05
                        for h, k in zip(found.frame["head"], found.frame["kind"], strict=True)]  # fmt: skip
    said = [a.text for a in promoted_figure(found).layout.annotations]
    said = [text.replace("<br>", " ") for text in said]
    assert said[:3] == ["L0H0 (promoted: n.s.)", "L1H0 (promoted, suppressed: n.s.)", "all heads"]
    assert "p > 0.05" in note(promoted_figure(found))


def test_many_heads_are_cut_and_said():
    """Nine of twelve panels, without the total; of a single head, the total is the head itself."""
    fig = promoted_figure(tokens(12, scale=None))
    assert [t.name for t in fig.data] == [f"L{i}H0" for i in range(9)]
    assert "first 9 of 12 heads" in note(fig)
    assert "taken as 1" in note(fig)
    assert fig.layout.xaxis7.title.text == "logits (relative)"
    assert fig.layout.xaxis.title.text is None
    assert len(promoted_figure(tokens(1)).data) == 1
    with pytest.raises(InputError, match="top is 0"):
        promoted_figure(tokens(1), top=0)


# ------------------------------------------------------------------------------------------------- angles


def test_cosines_beside_chance():
    """One series a kind of direction, the band at 1.96 / sqrt(d); a missing cosine leaves a gap."""
    frame = pd.DataFrame({
        "head": ["L0H1", "L2H3"], "cos_probe": [0.5, -0.25], "chance_sd_head": [0.25] * 2, "cos_reading": [NAN, 0.1],
        "chance_sd_model": [0.125] * 2,
    })  # fmt: skip
    fig = cosine_figure(frame)
    traces = {t.name: t for t in fig.data}
    assert list(traces["in a head, d = 16"].y) == [0.49, 0.49, -0.49, -0.49]
    assert list(traces["in the residual stream, d = 64"].y) == [0.245, 0.245, -0.245, -0.245]
    assert list(traces["ITI probe"].y) == [0.5, -0.25]
    assert list(traces["RepE reading vector"].y) == [None, 0.1]
    assert list(traces["ITI probe"].customdata) == ["L0H1", "L2H3"]
    assert "ITI mass mean" not in traces
    assert list(fig.layout.xaxis.ticktext) == ["L0H1", "L2H3"]
    assert fig.layout.yaxis.title.text == "cosine"
    for bad, message in ((frame.iloc[:0], "no rows"), (frame[["head"]], "no cosines"), (frame[[]], "no column head")):
        with pytest.raises(InputError, match=message):
            cosine_figure(bad)
    with pytest.raises(InputError, match="65 heads"):
        cosine_figure(pd.concat([frame] * 33)[:65])


# ------------------------------------------------------------------------------------------------- needed


def test_losses_with_intervals_and_marks():
    """Bars with their bounds; the mark stands over the head that differs."""
    frame = pd.DataFrame({
        "head": ["L0H1", "L2H3"], "layer": [0, 2], "index": [1, 3], "full": [0.9] * 2, "without": [0.4, 0.9],
        "loss": [0.5, 0.0], "low": [0.3, -0.1], "high": [0.6, 0.1], "p": [0.001, 1.0], "p_holm": [0.002, 1.0], "n": [20] * 2,
    })  # fmt: skip
    fig = leave_one_out_figure(LeaveOneOut(frame, (), (), (), "kin", "em", "test"))
    assert list(fig.data[0].y) == [0.5, 0.0]
    assert bounds(fig.data[0]) == [(0.3, 0.6), (-0.1, 0.1)]
    stars = [a for a in fig.layout.annotations if a.text == "*"]
    assert [(a.x, a.y) for a in stars] == [(0, 0.6)]
    assert "n=20 items" in note(fig)
    assert "Holm" in note(fig)
    assert fig.layout.yaxis.title.text == "loss in EM"


def test_keeping_few_heads():
    """Best first by its own bounds, random orders by theirs; K on the axis."""
    frame = pd.DataFrame({
        "order": ["best first"] * 3 + ["random"], "k": [0, 1, 2, 1], "value": [0.0, 0.8, 1.0, 0.4],
        "low": [0.0, 0.7, 0.9, 0.3], "high": [0.1, 0.9, 1.0, 0.5],
    })  # fmt: skip
    curve = pd.DataFrame({
        "k": [0, 1, 2], "best": [0.0, 0.8, 1.0], "random": [0.0, 0.4, 1.0], "random_low": [0.0, 0.2, 0.9],
        "random_high": [0.1, 0.6, 1.0], "low": [9.0] * 3, "high": [9.0] * 3, "n": [20] * 3,
    })  # fmt: skip
    fig = keep_figure(KeepOnly(frame, (), curve, "kin", "em", "test", 4, 0))
    lines = {t.name: t for t in fig.data if t.fill is None}
    assert list(lines["best first"].y) == [0.0, 0.8, 1.0]
    assert list(lines["random order (mean of 4 draws)"].y) == [0.0, 0.4, 1.0]
    assert band(fig, "best first") == ([0.0, 0.7, 0.9], [0.1, 0.9, 1.0])
    assert band(fig, "random order (mean of 4 draws)") == ([0.0, 0.2, 0.9], [0.1, 0.6, 1.0])
    assert fig.layout.xaxis.title.text == "k (heads whose edits are kept)"
    assert fig.layout.yaxis.title.text == "EM"


def removed(ks=(1, 3)):
    n = len(ks)
    frame = pd.DataFrame({"which": ["none"], "value": [0.95], "low": [0.9], "high": [1.0]})
    curve = pd.DataFrame({
        "k": ks, "none": [0.95] * n, "chosen": [0.5] * (n - 1) + [0.1], "chosen_low": [0.4] * (n - 1) + [0.05],
        "chosen_high": [0.6] * (n - 1) + [0.2], "random": [0.9] * n, "random_low": [0.85] * n, "random_high": [0.94] * n,
        "difference": [-0.4] * (n - 1) + [-0.8], "low": [-0.5] * (n - 1) + [-0.9], "high": [-0.3] * (n - 1) + [-0.7],
        "draws": [5] * n, "n": [20] * n,
    })  # fmt: skip
    return Removal(frame, (), curve, "kin", "em", "test", "mean", 5, 0)


def test_removal_curves():
    """Chosen and random with bands, nothing removed as a line, the difference at the largest k in words."""
    fig = removal_figure(removed())
    lines = {t.name: t for t in fig.data if t.fill is None}
    assert list(lines["chosen heads"].y) == [0.5, 0.1]
    assert band(fig, "chosen heads") == ([0.4, 0.05], [0.6, 0.2])
    assert band(fig, "random heads (mean of 5 draws)") == ([0.85, 0.85], [0.94, 0.94])
    assert fig.layout.shapes[0].y0 == 0.95
    assert "k = 3: chosen - random -80 [-90, -70] points" in note(fig)
    assert fig.layout.xaxis.title.text == "k (heads removed)"


def test_a_difference_that_was_not_tested_stands_without_an_interval():
    """Few draws: no bounds in the note."""
    found = removed()
    found.curve[["low", "high"]] = float("nan")
    assert "chosen - random -80 points (z at its mean)" in note(removal_figure(found))
    assert "-80" in note(removal_bars(found))
    assert "[" not in note(removal_bars(found))


def test_removal_bars():
    """Three bars a task at its largest k, with bounds, and the paired difference above."""
    fig = removal_bars({"a": removed(), "b": removed((2,))})
    by_name = {t.name: t for t in fig.data}
    assert list(by_name["nothing removed"].y) == [0.95, 0.95]
    assert list(by_name["chosen heads"].y) == [0.1, 0.1]
    assert bounds(by_name["chosen heads"]) == [(0.05, 0.2)] * 2
    assert bounds(by_name["random heads"]) == [(0.85, 0.94)] * 2
    assert bounds(by_name["nothing removed"]) == [(0.9, 1.0)] * 2
    assert list(fig.data[0].x) == ["a<br>(EM, n=20, k=3)", "b<br>(EM, n=20, k=2)"]
    assert note(fig).count("-80 [-90, -70]") == 2
    with pytest.raises(InputError, match="no removals"):
        removal_bars({})


# -------------------------------------------------------------------------------------------------- drift


@pytest.fixture
def drift():
    def rows(**more):
        out = {}
        for i, name in enumerate(("cosine", "change", "ratio")):
            out |= {name: i + 0.5, f"{name}_low": i + 0.4, f"{name}_high": i + 0.7}
        return {**more, **out, "n": 3}

    layers = pd.DataFrame([rows(where=w, layer=n) for w in ("z", "resid") for n in (1, 0)])
    places = [(w, n, p) for w in ("z", "resid") for n in (0, 1) for p in (0, 1, -2, -1)]
    positions = pd.DataFrame([rows(where=w, layer=n, position=p) for w, n, p in places])
    positions["change"] = [10.0 * n + p for _, n, p in places]
    return Drift(layers, pd.DataFrame(), positions, 3, 40, 0, "m", ("LoFiT", "ITI"))


def test_drift_by_layer(drift):
    """Three panels of two lines in order of layers, each with its band."""
    fig = drift_layers(drift)
    lines = [t for t in fig.data if t.fill is None]
    assert [(list(t.x), list(t.y)) for t in lines] == [([0, 1], [v, v]) for v in (0.5, 0.5, 1.5, 1.5, 2.5, 2.5)]
    first = next(t for t in fig.data if t.fill == "toself")
    assert list(first.y) == [0.7, 0.7, 0.4, 0.4]
    assert [t.showlegend for t in lines] == [True, True, False, False, False, False]
    assert fig.layout.yaxis.title.text == "cosine of e and b"
    assert fig.layout.xaxis2.title.text == "layer"
    assert "LoFiT then ITI on m; n=3 texts, 40 tokens" in note(fig)


def test_drift_by_position(drift):
    """Two maps on one scale: from the start, and from the end in reading order."""
    fig = drift_positions(drift)
    assert [list(t.x) for t in fig.data] == [[0, 1], [-2, -1]]
    assert [[list(r) for r in t.z] for t in fig.data] == [[[0, 1], [10, 11]], [[-2, -1], [8, 9]]]
    assert {(t.zmin, t.zmax) for t in fig.data} == {(-2, 11)}
    assert fig.layout.xaxis2.title.text == "position from the end"
    assert fig.data[1].colorbar.title.text.replace("<br>", " ") == "relative change (|e - b| / |b|)"
    with pytest.raises(InputError, match="unknown place 'q'"):
        drift_positions(drift, where="q")
    with pytest.raises(InputError, match="unknown measure 'q'"):
        drift_positions(drift, measure="q")


# ------------------------------------------------------------------------------------------- interference


def test_interference_bars():
    """A bar a condition and task with bounds; the mark stands in the bar that was tested."""
    names = ("no adapter", "own adapter", "all together")
    rows = [
        {"task": t, "metric": "em", "condition": c, "value": v, "low": v - 0.1, "high": v + 0.05, "n": 9}
        for t in ("a", "b") for c, v in zip(names, (0.1, 0.9, 0.5), strict=True)
    ]  # fmt: skip
    tests = pd.DataFrame({
        "task": ["a", "b"], "first": ["all together"] * 2, "second": ["own adapter"] * 2, "p_holm": [0.01, 0.5],
    })  # fmt: skip
    fig = interference_figure(Interference(pd.DataFrame(rows), (), tests, ("a", "b"), "test"))
    assert [t.name for t in fig.data] == [*names, "marks of all together"]
    assert [list(t.y) for t in fig.data[:3]] == [[0.1, 0.1], [0.9, 0.9], [0.5, 0.5]]
    assert bounds(fig.data[2]) == [(0.4, 0.55)] * 2
    assert (list(fig.data[3].text), list(fig.data[3].base)) == (["*", ""], [0.55, 0.55])
    assert fig.data[3].offsetgroup == fig.data[2].offsetgroup
    assert list(fig.data[0].x) == ["a<br>(EM, n=9)", "b<br>(EM, n=9)"]
    assert "order a, b" in note(fig)
    assert fig.layout.title.text == "Adapters of several tasks together"


def test_long_context_lines():
    """With and without the adapter against the mean number of tokens."""
    rows = [
        {"length": n, "tokens": t, "adapter": on, "value": v, "low": v - 0.1, "high": v + 0.1, "n": 9}
        for n, t, on, v in ((0, 0.0, False, 0.2), (0, 0.0, True, 0.8), (50, 44.5, False, 0.1), (50, 44.5, True, 0.6))
    ]
    fig = long_context_figure(LongContext(pd.DataFrame(rows), (), pd.DataFrame(), "kin", "em", "test", 0))
    lines = {t.name: t for t in fig.data if t.fill is None}
    assert (list(lines["with the adapter"].x), list(lines["with the adapter"].y)) == ([0.0, 44.5], [0.8, 0.6])
    assert list(lines["no adapter"].y) == [0.2, 0.1]
    low, high = band(fig, "with the adapter")
    assert np.allclose([low, high], [[0.7, 0.5], [0.9, 0.7]])
    assert "n=9 items" in note(fig)
    assert "tokens" in fig.layout.xaxis.title.text
