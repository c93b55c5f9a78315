"""Scores of heads: ranking, ties, files, grids, and the heads of the official runs."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plotly.colors import sample_colorscale

from lofit_lens.errors import InputError
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.html import HEAT
from lofit_lens.plots import style
from tests.records import edited_record

SHAPE = (3, 4)


def test_top_and_rank_by_hand():
    """Scores .1 .9 / .7 .2 rank L0H1, L1H0, L1H1, L0H0."""
    scores = HeadScores([[0.1, 0.9], [0.7, 0.2]], kind="A-norm")
    assert str(scores.ranking()) == "L0H1 L1H0 L1H1 L0H0"
    assert scores.top(2) == HeadSet(["L0H1", "L1H0"], [0.9, 0.7], (2, 2), "A-norm")
    assert [scores.rank(h) for h in ("L0H1", "L1H0", "L1H1", "L0H0")] == [1, 2, 3, 4]
    assert scores["L1H1"] == 0.2


def test_equal_scores_keep_layer_major_order():
    """Ties are broken by layer, then head, in a table large enough for an unstable sort to show."""
    scores = HeadScores(torch.arange(400).reshape(20, 20) % 2)
    odd = [(layer, h) for layer in range(20) for h in range(20) if (layer * 20 + h) % 2]
    assert list(scores.top(200)) == odd


@given(st.lists(st.floats(-5, 5), min_size=12, max_size=12))
def test_the_ranking_falls_and_holds_every_head_once(values):
    """A ranking is a permutation of all heads with falling scores."""
    found = HeadScores(torch.tensor(values).reshape(SHAPE)).ranking()
    assert sorted(found) == list(HeadSet.all(SHAPE))
    assert list(found.scores) == sorted(found.scores, reverse=True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("k", [0, 5, -2, True, 1.5, "2"])
def test_k_outside_the_model_or_no_number_is_refused(k):
    """K of 0, above the head count, or not a whole number: the value is named."""
    with pytest.raises(InputError, match=str(k)):
        HeadScores([[1.0, 2.0], [3.0, 4.0]]).top(k)


def test_scores_that_are_not_finite_name_the_head():
    """NaN and infinity are refused, with the head."""
    with pytest.raises(InputError, match="L1H0 is nan"):
        HeadScores([[1.0, 2.0], [float("nan"), 1.0]])
    with pytest.raises(InputError, match="L0H1 is inf"):
        HeadScores([[1.0, float("inf")]])


@pytest.mark.parametrize("table", [[1.0, 2.0], [[[1.0]]], [[]]])
def test_scores_of_another_form_are_refused(table):
    """One dimension, three, or none at all."""
    with pytest.raises(InputError, match="n_layers, n_heads"):
        HeadScores(table)


def test_a_head_outside_the_scores_is_refused():
    """rank and [] check the head instead of wrapping around."""
    scores = HeadScores([[1.0, 2.0]])
    for ask in (scores.rank, scores.__getitem__):
        with pytest.raises(InputError, match="L0H2"):
            ask("L0H2")


@given(st.lists(st.floats(-1e300, 1e300), min_size=4, max_size=4))
def test_saved_scores_are_exact(tmp_path_factory, values):
    """save -> load gives back every float64 bit, and the record."""
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    made = HeadScores(torch.tensor(values, dtype=torch.float64).reshape(2, 2), "A-norm", "m", "t", {"seed": 42})
    read = HeadScores.load(made.save(path))
    assert torch.equal(read.values, made.values)
    assert (read.kind, read.model, read.task, read.meta) == ("A-norm", "m", "t", {"seed": 42})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"values": "gone"}, "lacks the field 'values'"), ({"schema": 2}, "schema 2"), ({"kind": "else"}, "HeadScores"),
     ({"values": [[1.0, 2.0], [3.0]]}, "x.json|scores"),
     ({"values": [1.0, 2.0]}, "n_layers"), ({"values": [["a"]]}, "x.json|scores")],
)  # fmt: skip
def test_damaged_head_scores_are_refused(tmp_path, changes, message):
    """A missing field, a newer schema, a ragged, one-dimensional or non-numeric table: each is InputError."""
    path = edited_record(tmp_path, HeadScores([[1.0, 2.0]]), **changes)
    with pytest.raises(InputError, match=message):
        HeadScores.load(path)


def test_scores_do_not_share_memory_with_their_source():
    """Changing the tensor afterwards does not change the scores."""
    source = torch.ones(2, 2)
    scores = HeadScores(source.double())
    source.zero_()
    assert scores["L0H0"] == 1.0


# -------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(
    "made", [HeadSet(["L2H1", "L0H0"], [2.0, 1.0], SHAPE, "<b>"), HeadScores(torch.rand(3, 4), "<b>")]
)
def test_the_grid_has_a_cell_a_head_and_needs_no_script(made):
    """One titled cell a head, last layer on top, text escaped, nothing fetched."""
    page = made._repr_html_()
    assert page.count('<td title="L') == 12
    assert page.index('title="L2H0') < page.index('title="L0H0')
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<script" not in page
    assert "http" not in page


def test_the_grid_names_rank_and_score():
    """A chosen head's cell says its rank and score; another's only its name, and stays gray."""
    page = HeadSet(["L2H1", "L0H0"], [2.0, 1.0], SHAPE)._repr_html_()
    assert "L2H1: rank 1, score 2" in page
    assert "L0H0: rank 2, score 1" in page
    assert page.count("background:#8884") == 10


def test_the_grid_has_the_colors_of_figures_and_its_own_rows():
    """Light is much, as in figures; no row takes the stripes and the hover color that Jupyter gives to rows of tables."""
    page = HeadScores(torch.arange(12.0).view(3, 4))._repr_html_()
    assert HEAT == style.HEAT
    first, last = sample_colorscale(HEAT, [0.0, 1.0])
    cell = r'<td title="{}: [^"]*" style="[^"]*background:{}">'
    assert re.search(cell.format("L0H0", re.escape(first.replace(" ", ""))), page)
    assert re.search(cell.format("L2H3", re.escape(last.replace(" ", ""))), page)
    assert page.count("<tr") == page.count('<tr style="background:none') == 4


def test_a_grid_fits_a_third_of_a_screen():
    """The longer axis lies across: 30 layers of 9 heads are 9 rows, of 16 pixels; 40 rows have 6 pixels each."""
    deep = HeadScores(torch.rand(30, 9))._repr_html_()
    assert deep.count("<tr") == 10
    assert "layer 0 to 29" in deep
    assert deep.index('title="L0H8') < deep.index('title="L1H8') < deep.index('title="L0H7')
    for page, rows in ((deep, 9), (HeadScores(torch.rand(40, 40))._repr_html_(), 40)):
        height = int(re.search(r"height:(\d+)px", page)[1]) + 1  # with its border
        assert rows * height <= 260


def test_heads_are_named_below_the_grid():
    """Best first: all of a small set, twelve of a larger one, six of scores; cells alone have no names on paper."""
    assert ">L2H1 L0H0<" in HeadSet(["L2H1", "L0H0"], shape=SHAPE)._repr_html_()
    assert " ...<" in HeadSet.all((4, 4))._repr_html_()
    values = torch.arange(12.0).view(3, 4)
    assert ">best: L2H3 L2H2 L2H1 L2H0 L1H3 L1H2<" in HeadScores(values)._repr_html_()


# ------------------------------------------------------------------------------- the official runs' heads

OFFICIAL = {  # facts: top K, mean layer (TruthfulQA, MQuAKE, CLUTRR), overlap (TQ&MQ, TQ&CL, MQ&CL)
    "gemma-7b-base": (16, (28, 16), (15.6, 10.5, 10.8), (4, 7, 8)),
    "llama2-7b-base": (32, (32, 32), (12.6, 9.0, 10.3), (6, 4, 5)),
}


@pytest.mark.data
@pytest.mark.parametrize("model", OFFICIAL)
def test_official_heads_have_the_published_overlap_and_mean_layers(data_dir, model):
    """Overlaps and mean layers of the top K of the official runs are the known numbers."""
    k, shape, mean_layers, overlaps = OFFICIAL[model]
    tq, mq, cl = (
        HeadSet.from_npy(data_dir / "official_heads" / f"{model}_{task}_Aonly_top160heads_42.npy", shape=shape)
        for task in ("truthfulqa", "mquake", "clutrr")
    )
    assert len(tq) == len(mq) == len(cl) == 160
    tq, mq, cl = tq.top(k), mq.top(k), cl.top(k)
    assert tuple(round(s.mean_layer, 1) for s in (tq, mq, cl)) == mean_layers
    assert (len(tq & mq), len(tq & cl), len(mq & cl)) == overlaps
