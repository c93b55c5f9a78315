"""Figures: what is drawn is what was given, every axis has its label, and nothing to draw is an error."""

import pytest
import torch

from lofit_lens import HeadScores, HeadSet
from lofit_lens.errors import InputError
from lofit_lens.plots import head_grid, layer_distribution, save_figure


@pytest.fixture
def scores():
    return {
        "a": HeadScores([[0.0, 3.0], [1.0, 2.0], [0.5, 0.25]], "A-norm"),
        "b": HeadScores([[1.0, 1.0], [4.0, 0.0], [0.0, 0.0]], "A-norm"),
    }


def test_grid_shows_scores_and_both_kinds_of_marks(scores):
    """One heat map a panel on one color scale; marks stand at (head, layer)."""
    fig = head_grid(scores, {"a": scores["a"].top(2)}, marked={"a": HeadSet(["L2H0"])}, marked_label="known")
    maps = [t for t in fig.data if t.type == "heatmap"]
    assert [[list(row) for row in t.z] for t in maps] == [scores["a"].values.tolist(), scores["b"].values.tolist()]
    assert {(t.zmin, t.zmax) for t in maps} == {(0.0, 4.0)}, "panels can be compared"
    assert sum(bool(t.showscale) for t in maps) == 1
    marks = {t.name: (list(t.x), list(t.y)) for t in fig.data if t.type == "scatter"}
    assert marks == {"chosen": ([1, 1], [0, 1]), "known": ([0], [2])}  # L0H1, L1H1; L2H0
    assert fig.layout.xaxis.title.text == "head"
    assert fig.layout.yaxis.title.text == "layer"
    assert maps[-1].colorbar.title.text == "A-norm"


def test_scores_of_several_kinds_have_a_scale_each(scores):
    """Norms beside accuracies: each panel spans its own range and has its own bar, beside its own panel."""
    both = {"LoFiT": scores["a"], "ITI": HeadScores([[0.5, 0.6], [0.7, 0.5], [0.5, 0.5]], "probe accuracy")}
    maps = [t for t in head_grid(both).data if t.type == "heatmap"]
    assert [(t.zmin, t.zmax) for t in maps] == [(0.0, 3.0), (pytest.approx(0.5), pytest.approx(0.7))]
    assert [t.colorbar.title.text for t in maps] == ["A-norm", "probe accuracy"]
    assert maps[0].colorbar.x < 0.6 < maps[1].colorbar.x


def test_grid_legend_names_each_mark_once(scores):
    """Two panels with chosen heads share one legend entry."""
    fig = head_grid(scores, {k: s.top(1) for k, s in scores.items()})
    assert [t.showlegend for t in fig.data if t.type == "scatter"] == [True, False]


def test_layer_shares(scores):
    """Bars are percentages of the head set: 2 of 4 heads in layer 0 make 50 %."""
    heads = HeadSet(["L0H0", "L0H1", "L2H1", "L1H0"], shape=(3, 2))
    fig = layer_distribution({"x": heads, "y": heads.top(1)})
    assert list(fig.data[0].y) == [50.0, 25.0, 25.0]
    assert list(fig.data[1].y) == [100.0, 0.0, 0.0]
    assert fig.data[0].name == "x (K=4)"
    assert fig.layout.xaxis2.title.text == "layer"
    assert fig.layout.yaxis.ticksuffix == "%"


def test_nothing_to_draw_is_an_error(scores):
    """Empty input, empty sets, mixed models and marks without a panel each say what to give."""
    with pytest.raises(InputError, match="no head scores"):
        head_grid({})
    with pytest.raises(InputError, match="no head sets"):
        layer_distribution({})
    with pytest.raises(InputError, match="'x' is empty"):
        layer_distribution({"x": HeadSet([], shape=(3, 2))})
    with pytest.raises(InputError, match="n_layers"):
        layer_distribution({"x": HeadSet(["L0H0"])})
    with pytest.raises(InputError, match="different models"):
        head_grid(scores | {"c": HeadScores(torch.zeros(5, 2))})
    with pytest.raises(InputError, match="without scores: z"):
        head_grid(scores, {"z": HeadSet(["L0H0"])})


def test_saved_page_is_self_contained(scores, tmp_path):
    """The page holds plotly.js and asks no server for anything; another ending is refused."""
    (page,) = save_figure(layer_distribution({"x": scores["a"].top(2)}), tmp_path / "new" / "layers.html")
    text = page.read_text()
    assert "<script src=" not in text
    assert len(text) > 1_000_000
    with pytest.raises(InputError, match=r"\.docx"):
        save_figure(layer_distribution({"x": scores["a"].top(2)}), tmp_path / "layers.docx")
