"""Figures of overlap, layers, transfer, sweeps and stability: values, marks, bands, labels; nothing to draw is an error."""

import numpy as np
import pandas as pd
import pytest

from lofit_lens.analysis.overlap import agreement, agreement_by_k, overlap
from lofit_lens.analysis.stability import stability
from lofit_lens.analysis.sweeps import sweep
from lofit_lens.analysis.transfer import transfer_matrix
from lofit_lens.errors import InputError
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.plots.layers import layer_distribution
from lofit_lens.plots.overlap import agreement_curves, overlap_heatmap, score_scatter
from lofit_lens.plots.stability import stability_curves
from lofit_lens.plots.sweeps import data_efficiency, k_sweep
from lofit_lens.plots.transfer import transfer_heatmap

SHAPE = (6, 8)
SETS = {"one": HeadSet.random(SHAPE, 8, seed=0), "two": HeadSet.random(SHAPE, 6, seed=1)}
SETS["three"] = HeadSet(SETS["one"].heads[:7] + SETS["two"].heads[:1], shape=SHAPE)


def lines(fig):
    """Legend name -> the trace with the values (bands have no entry of their own)."""
    return {t.name: t for t in fig.data if t.type == "scatter" and t.showlegend is not False}


def bands(fig):
    """Name -> (x, high) and (x, low) of a band that is one closed outline."""
    found = {}
    for t in fig.data:
        if t.fill == "toself":
            half = len(t.x) // 2
            assert list(t.x[:half]) == list(t.x[half:])[::-1], "back along the same points"
            found[t.name] = (list(t.x[:half]), list(t.y[:half]), list(t.y[half:])[::-1])
    return found


def notes(fig):
    return " ".join(a.text for a in fig.layout.annotations).replace("<br>", " ")


# Overlap


@pytest.mark.parametrize(
    ("value", "form", "label"),
    [
        ("jaccard", "{:.2f}", "Jaccard index"),
        ("shared", "{:.0f}", "shared heads"),
        ("rbo", "{:.2f}", "rank-biased overlap"),
    ],
)
def test_overlap_heatmap_shows_each_pair_twice(value, form, label):
    """Symmetric, nothing on the diagonal but K; numbers with Holm's mark, chance in the hover, the scale from 0."""
    frame = overlap(SETS)
    fig = overlap_heatmap(frame, value)
    (heat,) = fig.data
    z = np.array(heat.z, dtype=float)
    assert list(heat.x) == list(heat.y) == list(SETS)
    assert np.isnan(np.diag(z)).all()
    assert [heat.text[i][i] for i in range(3)] == ["K=8", "K=6", "K=8"]
    for row in frame.to_dict("records"):
        i, j = list(SETS).index(row["a"]), list(SETS).index(row["b"])
        assert z[i, j] == z[j, i] == row[value]
        p = row["p_layer_holm"]
        mark = "*" if p < 0.05 else "+" if p < 0.1 else "°" if row["p_holm"] < 0.05 else ""
        assert heat.text[i][j] == heat.text[j][i] == form.format(row[value]) + mark
        for said in (
            f"{row['expected']:.2f} shared",
            f"{row['expected_layer']:.2f} shared",
            f"Holm {row['p_layer_holm']:.2g}",
        ):
            assert said in heat.customdata[i][j]
    assert "*" in heat.text[0][2], "seven of eight heads are no chance"
    assert (heat.zmin, heat.zmax) == (0, frame[value].max())
    assert heat.colorbar.title.text == label
    assert fig.layout.yaxis.autorange == "reversed", "first set on top"
    assert "same number of heads in each layer" in notes(fig)


def test_overlap_marks_tell_layers_from_heads():
    """Two sets that fill one layer: many shared heads for a whole model, none too many for that layer; the note names it."""
    a, b = (HeadSet([f"L2H{h}" for h in range(i, i + 7)], shape=(30, 8)) for i in (0, 1))
    fig = overlap_heatmap(overlap({"a": a, "b": b}), "shared")
    assert fig.data[0].text[0][1] == "6°"
    assert "° p < 0.05 only against random sets over all layers (hypergeometric test)" in notes(fig)
    assert fig.data[0].colorbar.dtick == 2, "shared heads are counted in whole steps"


def test_agreement_curves_lie_over_the_chance_band():
    """One curve a pair, one band and one dashed line of chance, axes named."""
    rankings = {name: HeadScores(np.random.default_rng(i).random(SHAPE)) for i, name in enumerate("abc")}
    frame = agreement(rankings, [4, 8, 16])
    for value, low, high, middle in (
        ("shared", frame.low, frame.high, frame.expected),
        (
            "jaccard",
            frame.low / (2 * frame.k - frame.low),
            frame.high / (2 * frame.k - frame.high),
            frame.expected_jaccard,
        ),
    ):
        fig = agreement_curves(frame, value)
        assert bands(fig) == {"chance range": ([4, 8, 16], high[:3].tolist(), low[:3].tolist())}
        found = lines(fig)
        assert list(found) == ["by chance", "a & b", "a & c", "b & c"]
        assert list(found["by chance"].y) == middle[:3].tolist()
        assert found["by chance"].line.dash == "dash"
        assert list(found["a & c"].y) == frame[frame.pair == "a & c"][value].tolist()
        assert fig.layout.xaxis.title.text.startswith("K")
    assert fig.layout.yaxis.title.text == "Jaccard index"
    assert agreement_curves(frame).layout.yaxis.title.text == "shared heads"


def test_score_scatter_colors_the_top_of_each():
    """Heads of a 2x3 model: the top 2 are L1H2 L0H0 and L1H2 L0H1; one in both, one in each alone, three others."""
    a, b = HeadScores([[5, 1, 0], [2, 3, 9]], "A-norm", task="t"), HeadScores([[1, 5, 0], [2, 3, 9]], "probe accuracy")
    fig = score_scatter(a, b, 2)
    found = {t.name: list(t.text) for t in fig.data}
    assert found == {"other heads (3)": ["L0H2", "L1H0", "L1H1"], "only t A-norm (1)": ["L0H0"],
                     "only probe accuracy (1)": ["L0H1"], "both (1)": ["L1H2"]}  # fmt: skip
    alone = fig.data[1]
    assert (alone.x, alone.y) == ((5,), (1,))
    assert (fig.layout.xaxis.title.text, fig.layout.yaxis.title.text) == ("t A-norm", "probe accuracy")
    rank = 1 - 6 * (9 + 9) / (6 * 35)  # L0H0 is 5th and 2nd, L0H1 2nd and 5th
    assert f"rho {rank:.2f}, n=6 heads" in notes(fig)
    plain = score_scatter(a, b, labels=("LoFiT", "ITI"))
    assert [len(t.x) for t in plain.data] == [6]
    assert plain.layout.xaxis.title.text == "LoFiT"
    assert "not defined" in notes(score_scatter(a, HeadScores(np.ones((2, 3)))))


# Layers


def test_layer_panels():
    """One panel a set, first on top, all on one scale; the dotted line is an even spread, the triangle the mean layer."""
    fig = layer_distribution(SETS)
    assert [t.name for t in fig.data] == ["one (K=8)", "two (K=6)", "three (K=8)"]
    for bars, heads in zip(fig.data, SETS.values(), strict=True):
        assert list(bars.customdata) == heads.layer_counts().tolist()
        assert sum(bars.y) == pytest.approx(100)
    tops = [fig.layout[t.yaxis.replace("y", "yaxis")].domain[1] for t in fig.data]
    assert tops == sorted(tops, reverse=True)
    ranges = {fig.layout[t.yaxis.replace("y", "yaxis")].range for t in fig.data}
    assert len(ranges) == 1
    assert ranges.pop()[1] >= max(max(t.y) for t in fig.data)
    assert [s.y0 for s in fig.layout.shapes] == [pytest.approx(100 / 6)] * 3
    assert [a.x for a in fig.layout.annotations if a.text == "▼"] == [h.mean_layer for h in SETS.values()]
    assert f"mean layer {SETS['two'].mean_layer:.1f}" in notes(fig)
    titles = [fig.layout[t.xaxis.replace("x", "xaxis")].title.text for t in fig.data]
    assert titles == [None, None, "layer"]


# Transfer


@pytest.fixture
def runs():
    draw = np.random.default_rng(0)
    rate = {("a", "a"): 0.9, ("a", "b"): 0.6, ("b", "a"): 0.85, ("b", "b"): 0.8}
    return {key: (draw.random((2, 60)) < r).astype(float) for key, r in rate.items()}


def test_transfer_heatmap(runs):
    """Rows are sources, columns tasks, one color scale; marks in the cells, all numbers in the hover; random apart."""
    random = {t: (np.random.default_rng(1).random((3, 60)) < 0.3).astype(float) for t in "ab"}
    found = transfer_matrix(runs, random=random, metrics={"a": "MC1", "b": "EM"})
    fig = transfer_heatmap(found)
    tasks, chance = fig.data
    wide = found.matrix()
    assert np.array(tasks.z) == pytest.approx(wide.loc[["a", "b"]].to_numpy())
    assert np.array(chance.z) == pytest.approx(wide.loc[["random"]].to_numpy())
    assert list(tasks.x) == list(chance.x) == ["a", "b"]
    assert (tasks.zmin, tasks.zmax) == (chance.zmin, chance.zmax)
    assert [bool(t.showscale) for t in fig.data] == [True, False]
    assert tasks.text[1][0] == f"{wide.loc['b', 'a']:.1f}*", "heads of b, tuned on a"
    assert tasks.text[0][0] == "100.0"
    row = found.frame.query("task == 'a' and source == 'b'").iloc[0]
    for said in (f"MC1 {row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]",
                 f"relative {row.relative:.1f} % [{row.low:.1f}, {row.high:.1f}]", f"Holm {row.p_holm:.3g}",
                 "60 items"):  # fmt: skip
        assert said in tasks.customdata[1][0]
    assert list(tasks.y) == [-0.5, 0.5, 1.5], "edges of the rows"
    assert chance.y[0] > 1.5
    assert list(fig.layout.yaxis.ticktext) == ["a", "b", "random heads"]
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1], "first row on top"
    assert list(fig.layout.xaxis.ticktext) == ["a<br>(MC1, n=60)", "b<br>(EM, n=60)"]
    assert "2 runs per cell, 3 runs with random heads" in notes(fig)
    assert fig.layout.xaxis.title.text == "tuned and tested on"
    assert fig.layout.yaxis.title.text == "heads chosen for"


def test_transfer_without_own_accuracy(runs):
    """Where own heads get nothing right, the cell says n/a; a matrix of nothing else is drawn too."""
    fig = transfer_heatmap(transfer_matrix(runs | {("a", "a"): np.zeros((2, 60))}))
    assert [row[0] for row in fig.data[0].z] == [None, None]
    assert [row[0] for row in fig.data[0].text] == ["n/a", "n/a"]
    none = transfer_heatmap(transfer_matrix({("a", s): np.zeros((1, 60)) for s in "ab"}))
    assert (none.data[0].zmin, none.data[0].zmax) == (0, 100)


# Sweeps


def values():
    draw = np.random.default_rng(0)
    made = {n: {k: (draw.random((2, 60)) < r).astype(float) for k in (1, 4, 16)} for n, r in (("x", 0.5), ("y", 0.7))}
    return made | {"zero-shot": {0: (draw.random((1, 60)) < 0.3).astype(float)}}


def test_k_sweep():
    """Means with bands, the untuned model as a dashed line over the whole width, K in per cent, n in the note."""
    frame = sweep(values())
    fig = k_sweep(frame, metric="MC1", n_heads_total=32)
    found = lines(fig)
    assert list(found) == ["zero-shot", "x", "y"]
    x = frame[frame.series == "x"]
    assert list(found["x"].x) == [1, 4, 16]
    assert list(found["x"].y) == x["mean"].tolist()
    assert bands(fig)["x"] == ([1, 4, 16], x.high.tolist(), x.low.tolist())
    assert np.array(found["x"].customdata) == pytest.approx(
        x[["low", "high", "lowest", "highest", "n_seeds", "n_items"]].to_numpy()
    )
    untuned = frame[frame.series == "zero-shot"].iloc[0]
    assert (list(found["zero-shot"].x), list(found["zero-shot"].y)) == ([1, 16], [untuned["mean"]] * 2)
    assert found["zero-shot"].line.dash == "dash"
    edges = {t.name: t.y[0] for t in fig.data if t.name in ("zero-shot low", "zero-shot high")}
    assert edges == {"zero-shot low": untuned.low, "zero-shot high": untuned.high}
    assert fig.layout.xaxis.type == "log"
    assert list(fig.layout.xaxis.ticktext) == ["1<br>3.1%", "4<br>12.5%", "16<br>50.0%"]
    assert fig.layout.yaxis.title.text == "MC1"
    assert "K (tuned heads)" in fig.layout.xaxis.title.text
    assert "1 to 2" not in notes(fig), "the untuned model is no point of the curves"
    assert "2 seeds, n=60 items" in notes(fig)
    assert fig.layout.yaxis.tickformat == "~%"
    with pytest.raises(InputError, match="K = 16"):
        k_sweep(frame, n_heads_total=15)


def test_data_efficiency_and_single_points():
    """Training examples on the x axis; one point has error bars instead of a band; close values stay on a linear axis."""
    frame = sweep(values())
    fig = data_efficiency(frame, metric="exact match")
    assert fig.layout.xaxis.title.text == "training examples"
    assert fig.layout.yaxis.title.text == "exact match"
    one = frame[(frame.series == "x") & (frame.x == 4)]
    (dot,) = data_efficiency(one).data
    row = one.iloc[0]
    assert (list(dot.x), list(dot.y)) == ([4], [row["mean"]])
    assert list(dot.error_y.array) == [row.high - row["mean"]]
    assert list(dot.error_y.arrayminus) == [row["mean"] - row.low]
    assert data_efficiency(one).layout.xaxis.type is None
    alone = data_efficiency(frame[frame.series == "zero-shot"])
    assert [list(t.x) for t in alone.data] == [[0]], "the untuned model alone is a point"


# Stability


def test_stability_curves():
    """Mean Jaccard, lowest to highest pair as band, one chance line for equal models and one each for unequal ones."""
    frames = {n: stability([HeadScores(np.random.default_rng(10 * i + j).random(SHAPE)) for j in range(3)], [2, 8, 20])
              for i, n in enumerate("ab")}  # fmt: skip
    fig = stability_curves(frames)
    found = lines(fig)
    assert list(found) == ["a (3 runs)", "b (3 runs)", "by chance"]
    for name, frame in frames.items():
        assert list(found[f"{name} (3 runs)"].y) == frame.jaccard.tolist()
        assert bands(fig)[f"{name} (3 runs)"] == ([2, 8, 20], frame.highest.tolist(), frame.lowest.tolist())
    assert list(found["by chance"].y) == frames["a"].expected.tolist()
    assert found["by chance"].line.dash == "dash"
    assert fig.layout.xaxis.title.text == "K (heads)"
    assert "Jaccard" in fig.layout.yaxis.title.text
    other = stability([HeadScores(np.random.default_rng(j).random((2, 12))) for j in range(2)], [2, 8, 20])
    unequal = lines(stability_curves(frames | {"c": other}))
    assert [n for n in unequal if "chance" in n] == ["by chance (a, b)", "by chance (c)"]
    single = lines(stability_curves(frames["a"].iloc[1:2]))
    assert list(single["runs (3 runs)"].error_y.array) == [
        pytest.approx(frames["a"].highest[1] - frames["a"].jaccard[1])
    ]


# Nothing to draw


def test_nothing_to_draw_is_an_error():
    """Empty tables, tables of another kind, unknown values and mixed models each say what to give."""
    empty, wrong = overlap(SETS).iloc[:0], pd.DataFrame({"x": [1]})
    for draw, source in ((overlap_heatmap, "overlap"), (agreement_curves, "agreement_by_k"), (k_sweep, "sweep"),
                         (data_efficiency, "sweep"), (stability_curves, "stability")):  # fmt: skip
        with pytest.raises(InputError, match=f"no column .* give what analysis.*{source} returns"):
            draw(wrong)
    with pytest.raises(InputError, match="no rows"):
        overlap_heatmap(empty)
    with pytest.raises(InputError, match="no rows"):
        k_sweep(sweep(values()).iloc[:0])
    with pytest.raises(InputError, match="no tables"):
        stability_curves({})
    with pytest.raises(InputError, match=r"unknown value 'jacard'.*Did you mean 'jaccard'"):
        overlap_heatmap(overlap(SETS), "jacard")
    a, b = (HeadScores(np.random.default_rng(i).random(SHAPE)) for i in range(2))
    with pytest.raises(InputError, match="unknown value 'rbo'"):
        agreement_curves(agreement_by_k(a, b), "rbo")
    small = agreement_by_k(*(HeadScores(s.values[:2]) for s in (a, b)), [4])
    with pytest.raises(InputError, match="different size"):
        agreement_curves(pd.concat([f.assign(pair=n) for n, f in (("x", small), ("y", agreement_by_k(a, b, [4])))]))
    with pytest.raises(InputError, match="different models"):
        score_scatter(a, HeadScores(b.values[:2]))
    with pytest.raises(InputError, match="from 1 to 48"):
        score_scatter(a, b, 49)
