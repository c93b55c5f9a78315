"""The explorer without a browser: what is chosen, what is computed, what the view is given, what stands in its place."""

import logging
import re

import numpy as np
import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.explorer import Explorer, running
from lofit_lens.explorer.state import p_text
from lofit_lens.heads import Head, HeadScores, HeadSet
from lofit_lens.interventions import ITI, HeadAblation, Lofit, Red
from tests import report_data, tiny
from tests.report_data import EDITS, SHAPE, TRUTH, scores  # SHAPE is the tiny Llama's, too

PROMPT = "Ann is the aunt of Bob"
ONE = HeadSet(["L0H0"], shape=SHAPE)


@pytest.fixture
def pair():
    """Two rankings whose overlaps are counted by hand in report_data."""
    return {"LoFiT": scores(TRUTH), "ITI": scores(EDITS, kind="probe accuracy")}


@pytest.fixture
def four():
    """Two methods on two tasks, and one method that only one task has."""
    return {
        ("truth", "A-norm"): scores(TRUTH), ("edits", "A-norm"): scores(EDITS), ("truth", "probes"): scores(EDITS),
        ("edits", "probes"): scores(TRUTH), ("edits", "file"): HeadSet(EDITS, shape=SHAPE),
    }  # fmt: skip


@pytest.fixture
def lofit(bridge_llama):
    """Offsets that change what the tiny model says."""
    made = Lofit.for_model(bridge_llama, HeadSet(["L1H1", "L0H0"], shape=SHAPE)).init_("v", seed=0, std=2.0)
    made.meta.task = "truth"
    return made


def said(ex):
    return ex.widget.said


def pick(ex, **choices):
    """Choose as the browser does."""
    ex.widget.state = {**ex.widget.state, **choices}


def run(ex, prompt):
    """Press Run as the browser does."""
    ex._asked({"do": "run", "prompt": prompt, "state": ex.widget.state})


# ------------------------------------------------------------------------------------------------ sets and numbers


def test_numbers_follow_k(pair):
    """Shared heads for K = 1, 2, 3, 4 are 0, 2, 2, 3 (counted in report_data); expected K^2 / 12; p = 1/66 at K = 2."""
    ex = ll.explore(pair)
    found = {}
    for k in (1, 2, 3, 4):
        ex.k = k
        found[k] = (ex.overlap["shared"], ex.overlap["expected"])
    assert found == {1: (0, 1 / 12), 2: (2, 4 / 12), 3: (2, 9 / 12), 4: (3, 16 / 12)}
    ex.k = 2
    assert ex.overlap["p_hypergeometric"] == pytest.approx(1 / 66)
    # Each layer's heads stay in it: L0 one of four on both sides (1/4), L1 likewise.
    assert ex.overlap["p_layer"] == pytest.approx(1 / 16)
    assert (ex.overlap["a"], ex.overlap["b"]) == ("LoFiT", "ITI")
    ex.k = (4, 3)  # L0H0 L1H1 L2H2 L0H3 and L1H1 L0H0 L2H3
    assert ex.k == (4, 3)
    assert {name: str(s) for name, s in ex.sets.items()} == {"LoFiT": "L0H0 L1H1 L2H2 L0H3", "ITI": "L1H1 L0H0 L2H3"}
    assert str(ex.shared) == "L0H0 L1H1"


def test_what_is_shown_is_what_is_read(pair):
    """The view gets the same sets with scores and rankings, the same K and the same numbers."""
    ex = ll.explore(pair, k=4)
    assert ex.widget.state == {
        "left": "LoFiT", "right": "ITI", "k": [4, 4], "linked": True, "head": None, "selection": [], "adapter": None,
        "chat": False,
    }  # fmt: skip
    # p over all heads 0.067, within layers 1/2 * 1/4 * 1/2; in thousandths.
    assert list(said(ex)["overlap"].values()) == ["LoFiT", "ITI", [4, 4], 1.33, 67, 62]
    data = ex.widget.data
    assert data["shape"] == [3, 4]
    assert data["sets"][0]["ranking"][:5] == [0, 5, 10, 3, 4]
    assert data["sets"][0]["scores"][:2] == [1.2, 0.2]
    assert [s["kind"] for s in data["sets"]] == ["A-norm", "probe accuracy"]


def test_what_is_usual_and_what_is_given():
    """K: 3 % of all heads, but at least one; a set's own size; a given one wins."""
    big = HeadScores(np.arange(1600.0).reshape(40, 40))
    assert ll.explore({"a": big, "b": big}).k == (48, 48)
    assert ll.explore({"a": scores(TRUTH), "b": HeadSet(EDITS)}).k == (1, 5)
    ex = ll.explore({"a": scores(TRUTH), "b": HeadSet(EDITS)}, k=(7, 2), prompts="abc")
    assert ex.k == (7, 2)
    assert said(ex)["prompts"] == ["abc"]  # one text is one prompt


def test_a_set_without_scores():
    """Its places are shown, and K ends at its size."""
    ex = ll.explore({"file": HeadSet(EDITS), "LoFiT": scores(TRUTH)})
    assert ex.widget.data["sets"][0] == {
        "name": "file", "task": "", "kind": "rank in the set", "ranking": [5, 0, 11, 10, 1], "scores": None
    }  # fmt: skip
    with pytest.raises(InputError, match="K = 6 heads asked for; file has 5"):
        ex.k = 6
    assert np.isnan(ex.table("L0H2")["rank"].iloc[0])
    with pytest.raises(InputError, match="file has no scores of all heads"):
        ex.figure()


def test_one_set_stands_on_both_sides():
    """Even with two K: then the names say which."""
    ex = ll.explore({"only": scores(TRUTH)}, k=2)
    assert (ex.left, ex.right, len(ex.sets)) == ("only", "only", 1)
    ex.k = (1, 3)
    assert {n: len(s) for n, s in ex.sets.items()} == {"only (left)": 1, "only (right)": 3}
    assert ex.figure().layout.title.text == "only"


# -------------------------------------------------------------------------------------------------------- choosing


def test_which_sets_stand_there(four):
    """First the same task by another method; any by name or (task, method); with `tasks` no others."""
    ex = ll.explore(four)
    assert (ex.left, ex.right) == ("truth, A-norm", "truth, probes")
    ex.left = ("edits", "A-norm")
    assert (ex.left, ex.widget.state["left"]) == ("edits, A-norm", "edits, A-norm")
    ex = ll.explore(four, tasks=["edits"])
    assert ex.names == ("edits, A-norm", "edits, probes", "edits, file")
    with pytest.raises(InputError, match="unknown head set 'truth, A-norm'"):
        ex.left = ("truth", "A-norm")


def test_k_shrinks_to_a_smaller_set(four):
    """Twelve heads cannot be shown of a set of five; both K are one while they are linked."""
    ex = ll.explore(four, k=12)
    ex.right = "edits, file"
    assert ex.k == (5, 5)
    ex.k = (12, 4)
    ex.left = "edits, probes"
    assert (ex.k, ex.widget.state["linked"]) == ((12, 4), False)


def test_what_the_reader_chooses_is_chosen(four):
    """Sets, K, the open head and the marks arrive together; the numbers follow."""
    ex = ll.explore(four, k=2)
    pick(ex, right="edits, file", k=[4, 3], linked=False, head="L1H1", selection=["L1H1", "L2H0"])
    assert (ex.right, ex.k, ex.head, str(ex.selection)) == ("edits, file", (4, 3), Head(1, 1), "L1H1 L2H0")
    assert said(ex)["overlap"]["k"] == [4, 3]
    assert ex.selection.shape == SHAPE
    assert str(ex.shared) == "L0H0 L1H1"
    pick(ex, head=None, selection=[])
    assert (ex.head, len(ex.selection)) == (None, 0)
    ex.selection = ["L0H0", (2, 3)]
    assert ex.widget.state["selection"] == ["L0H0", "L2H3"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("left", "LoFit", "unknown head set 'LoFit'; allowed: LoFiT, ITI. Did you mean 'LoFiT'"),
     ("k", [13, 2], "K = 13 heads asked for; LoFiT has 12"), ("k", [1, 1, 1], "or a pair"),
     ("head", "L9H0", "head L9H0 is outside"), ("head", "five", "'five' is not a head"),
     ("selection", ["L0H0", "L0H0"], "listed twice"), ("adapter", "x", "unknown adapter"),
     ("chat", True, "the chat template is the model's")],
)  # fmt: skip
def test_what_is_not_there_cannot_be_chosen(pair, lofit, name, value, message):
    """From code it is an error, in the view one line until something else is done; nothing of the choice is taken."""
    ex = ll.explore(pair, adapters={"LoFiT": lofit}, k=2)
    before = ex.widget.state
    with pytest.raises(InputError, match=message):
        setattr(ex, name, value)
    pick(ex, **{"selection": ["L0H0"], name: value})
    assert message in said(ex)["error"]
    assert (ex.widget.state, ex.k, len(ex.selection)) == (before, (2, 2), 0)
    pick(ex, k=[3, 3])
    assert said(ex)["error"] == ""


def test_a_head_everywhere(four):
    """Score and rank in all tasks and methods."""
    ex = ll.explore(four, k=2)
    ex.head = "L2H2"  # third of TRUTH, fourth of EDITS
    assert ex.table()["rank"].tolist() == [3, 4, 4, 3, 4]
    assert ex.table()["score"].tolist()[:4] == [1.0, 0.9, 0.9, 1.0]
    assert np.isnan(ex.table("L2H2")["score"].iloc[4])
    with pytest.raises(InputError, match="no head is open"):
        ll.explore(four).table()


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({}, {}, "no head set to show"),
        ([1], {}, "cannot explore a list; give a results folder"),
        ({"a": [1, 2]}, {}, "'a' is a list; give HeadScores"),
        ({"a": HeadSet([])}, {}, "head set 'a' is empty"),
        ({"a": HeadSet(["L0H0"])}, {}, r"give shape=\(n_layers, n_heads\)"),
        ({"a": ONE, "b": HeadSet(["L0H0"], shape=(4, 4))}, {}, "a: 3x4, b: 4x4"),
        ({"a": ONE, ("t", "b"): HeadSet(["L0H0"])}, {}, r"or \(task, method\) for all"),
        ({"a": HeadScores([[1.0]], model="m1"), "b": HeadScores([[1.0]], model="m2")}, {}, r"several models \(m1, m2\)"),
        ({("a, b", "c"): ONE, ("a", "b, c"): ONE}, {}, "the same name, 'a, b, c'; rename"),
        ({"a": ONE}, {"k": 2}, "K = 2 heads asked for; a has 1"), ({"a": ONE}, {"tasks": ["x"]}, "leave it out"),
        ({("t", "a"): ONE}, {"tasks": ["x"]}, "unknown task 'x'; allowed: t"),
        ({("t", "a"): ONE}, {"tasks": []}, "tasks is empty"),
        ({"a": ONE}, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"a": ONE}, {"adapters": {"x": "LoFiT"}}, "adapter 'x' is 'LoFiT'; give what"),
        ({"a": ONE}, {"prompts": [1]}, "prompts holds 1 at index 0; give a list of texts"),
    ],
)  # fmt: skip
def test_bad_input(source, options, message, unchecked):
    """It says what was given and what is allowed."""
    with pytest.raises(InputError, match=message):
        ll.explore(source, **options)


def test_another_models_heads_and_adapters(bridge_llama, pair, lofit):
    """Heads of a 2x2 model on one of 3x4; an adapter with a head that a model of 1x4 does not have."""
    with pytest.raises(InputError, match=r"2 layers x 2 heads; .* has 3 x 4"):
        ll.explore({"a": HeadScores([[1, 2], [3, 4]])}, bridge_llama)
    with pytest.raises(InputError, match="head L1H1 is outside this model"):
        ll.explore({"a": HeadScores([[1, 2, 3, 4]])}, adapters={"LoFiT": lofit})


def test_without_results_or_the_widgets_package(pair, monkeypatch, tmp_path):
    """One line that says what to do."""
    with pytest.raises(DataError, match="holds no study"):
        ll.explore(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "lofit-lens\[notebook\]"'):
        ll.explore(pair)


def test_an_error_in_the_browser_is_one_line(pair, bridge_llama, monkeypatch, caplog):
    """What the reader did wrong is said; our own mistakes are logged as well; what is done next clears the line."""
    ex = ll.explore(pair, bridge_llama)
    with caplog.at_level(logging.ERROR):
        run(ex, "  ")
        assert said(ex)["error"] == "the prompt is empty; type a text for the model to continue"
        ex.prompt = PROMPT
        assert said(ex)["error"] == ""
        ex._asked({"do": "fly"})
        assert "does not know {'do': 'fly'}" in said(ex)["error"]
        assert not caplog.records
        monkeypatch.setattr("lofit_lens.explorer.explorer.run_prompt", lambda *a, **k: 1 / 0)
        run(ex, "x")
    assert said(ex)["error"] == "ZeroDivisionError: division by zero"
    assert (said(ex)["busy"], len(caplog.records)) == ("", 1)
    assert caplog.records[0].exc_info


# ------------------------------------------------------------------------------------------------- with the model


def test_running_a_prompt(bridge_llama, pair, lofit):
    """Each text is what `generate` gives with the same edit attached; patterns are those of `attention_patterns`."""
    ex = ll.explore(pair, bridge_llama, adapters={"LoFiT": lofit}, prompts=[PROMPT], max_new_tokens=4)
    ex.head = "L1H1"
    busy = []
    ex.widget.observe(lambda change: busy.append(change["new"]["busy"]), "said")
    run(ex, PROMPT)
    assert [b for b in busy if b] == ["Running the prompt ..."]
    assert said(ex)["busy"] == ""
    found = ex.last_run
    assert (found.prompt, found.head, found.adapter) == (PROMPT, Head(1, 1), "LoFiT")
    edits = {
        "unmodified model": (), "with LoFiT": (lofit,), "with LoFiT, L1H1 left out": (lofit.restrict(HeadSet(["L0H0"])),),
        "unmodified model, L1H1 silenced (z = 0)": (HeadAblation.of(bridge_llama, HeadSet(["L1H1"])),),
    }  # fmt: skip
    assert list(found.texts) == list(edits)
    for name, acting in edits.items():
        with ll.attached(bridge_llama, *acting):
            assert found.texts[name] == ll.generate(bridge_llama, PROMPT, max_new_tokens=4)
    assert found.texts["unmodified model"] != found.texts["with LoFiT"]
    assert list(found.attention) == ["unmodified model", "with LoFiT"]
    every = HeadSet.all(SHAPE)
    with lofit.attached(bridge_llama):
        expected = ll.analysis.attention_patterns(bridge_llama, [PROMPT], every)
    assert torch.equal(found.attention["with LoFiT"].patterns[0], expected.patterns[0])
    assert said(ex)["answers"]["rows"][1] == ["with LoFiT", found.texts["with LoFiT"]]
    maps = said(ex)["maps"]
    assert [m["title"] for m in maps] == ["unmodified model", "with LoFiT"]
    np.testing.assert_allclose(maps[1]["weights"][-1], 1000 * expected.of("L1H1")[-1], atol=0.5)
    assert [len(row) for row in maps[0]["weights"]] == list(range(1, found.n_tokens + 1))
    pick(ex, head="L2H0")  # its patterns are there, its answers are not
    np.testing.assert_allclose(said(ex)["maps"][1]["weights"][-1], 1000 * expected.of("L2H0")[-1], atol=0.5)
    assert said(ex)["answers"]["note"] == "This was run with L1H1 open and LoFiT; press Run again."
    assert "with LoFiT, L2H0 left out" not in ex.run().texts
    assert said(ex)["answers"]["note"] == ""


def test_without_a_head_and_without_an_adapter(bridge_llama, pair):
    """The model alone answers; nothing is left out."""
    ex = ll.explore(pair, bridge_llama)
    ex.prompt = PROMPT
    assert list(ex.run().texts) == ["unmodified model"]
    assert said(ex)["maps"] == []


def test_of_a_large_model_only_the_open_heads_pattern_is_kept(bridge_llama, pair, monkeypatch):
    """Another head then asks for another run."""
    monkeypatch.setattr(running, "MOST_WEIGHTS", 10)
    ex = ll.explore(pair, bridge_llama, prompts=[PROMPT])
    ex.head = "L2H1"
    assert str(ex.run().attention["unmodified model"].heads) == "L2H1"
    ex.head = "L0H0"
    assert (said(ex)["maps"], said(ex)["note"]) == ([], "Press Run to see where L0H0 attends.")


def test_a_prompt_that_is_too_long_to_be_drawn(bridge_llama, pair, monkeypatch):
    """It is answered all the same."""
    monkeypatch.setattr(running, "MOST_TOKENS", 3)
    ex = ll.explore(pair, bridge_llama, prompts=[PROMPT])
    ex.head = "L0H0"
    found = ex.run()
    assert found.attention == {}
    assert found.texts["unmodified model"] == ll.generate(bridge_llama, PROMPT, max_new_tokens=16)
    assert "cannot be read here. Use ll.plots.attention_html" in said(ex)["note"]


def test_what_cannot_be_run(bridge_llama, pair, lofit):
    """No model; an adapter that is attached already. Nothing stays attached or busy."""
    ex = ll.explore(pair)
    assert "ll.explore(..., model" in said(ex)["ask"]
    with pytest.raises(InputError, match="needs the model"):
        ex.run()
    ex = ll.explore(pair, bridge_llama, adapters={"LoFiT": lofit}, prompts=[PROMPT])
    with lofit.attached(bridge_llama):
        run(ex, PROMPT)
        assert "leave its `with` block" in said(ex)["error"]
        with pytest.raises(InputError, match="attached to this model already"):
            ex.run()
        with pytest.raises(AdapterError, match="already attached"):
            ll.explore(pair, bridge_llama, adapters={"LoFiT": lofit})
    assert (said(ex)["busy"], said(ex)["ask"]) == ("", "")


@pytest.mark.parametrize("shape", [(3, 4, 6), (4, 4, 8)])
def test_an_adapter_of_another_shape_is_refused(bridge_llama, pair, shape):
    """Another d_head, another depth: at once, by the adapter's own check."""
    one = HeadSet(["L1H1"])
    of_iti = ITI(shape, one, directions=torch.ones(1, shape[2]) / shape[2] ** 0.5, sigma=torch.ones(1), alpha=1.0)
    for other in (Lofit(shape, one), of_iti):
        with pytest.raises(AdapterError):
            ll.explore(pair, bridge_llama, adapters={"other": other})


def test_a_reading_that_fails_is_a_note(bridge_llama, pair, lofit, monkeypatch, caplog):
    """The head is open all the same; our own mistake is logged."""
    ex = ll.explore(pair, bridge_llama, adapters={"LoFiT": lofit})
    monkeypatch.setattr("lofit_lens.explorer.explorer.head_tokens", lambda *a: 1 / 0)
    pick(ex, head=str(lofit.heads[0]))
    assert said(ex)["head"] == str(lofit.heads[0])
    assert [t["note"] for t in said(ex)["readings"]] == ["ZeroDivisionError: division by zero"]
    assert caplog.records[0].exc_info


def iti(heads):
    directions = torch.nn.functional.normalize(
        torch.randn(len(heads), 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    return ITI((3, 4, 8), HeadSet(heads), directions=directions, sigma=torch.linspace(1, 2, len(heads)), alpha=3.0)


def test_an_adapter_without_one_head(bridge_llama, lofit):
    """LoFiT and ITI: the others' edits stay, that head's is gone. Of one head nothing is left. Others have no heads."""
    z = torch.randn(1, 2, 4, 8)
    whole, part = iti(["L0H1", "L1H2", "L1H3"]), running.without_head(iti(["L0H1", "L1H2", "L1H3"]), Head(1, 2))
    assert str(part.heads) == "L0H1 L1H3"
    assert torch.equal(part._edit(1)(z)[:, :, 3], whole._edit(1)(z)[:, :, 3])
    assert torch.equal(part._edit(1)(z)[:, :, 2], z[:, :, 2])
    assert (part.positions, part.alpha) == (whole.positions, 3.0)
    assert torch.equal(running.without_head(iti(["L0H1"]), Head(0, 1))._edit(0)(z), z)
    alone = lofit.restrict(HeadSet(["L0H0"]))
    assert torch.equal(running.without_head(alone, Head(0, 0))._edit(0)(z), z)
    assert running.without_head(lofit, Head(2, 2)) is None
    assert running.without_head(Red.for_model(bridge_llama), Head(0, 0)) is None


def test_promoted_tokens(bridge_llama, pair, lofit):
    """Those of `promoted_tokens` with the prompts given; ITI's shift; nothing for a scaling; only the adapter's own heads."""
    scaling = Lofit.for_model(bridge_llama, HeadSet(["L1H1"])).init_("A", seed=0)
    steer = iti(["L1H1"]).to(next(bridge_llama.parameters()).device)
    adapters = {"LoFiT": lofit, "ITI": steer, "A": scaling, "RED": Red.for_model(bridge_llama)}
    ex = ll.explore(pair, bridge_llama, adapters=adapters, prompts=[PROMPT])
    ex.head = "L1H1"
    first, second, third = said(ex)["readings"]
    own = ll.analysis.promoted_tokens(bridge_llama, lofit, prompts=[PROMPT], heads=HeadSet(["L1H1"]), top=8).of("L1H1")
    assert [float(x) for _, x in first["promoted"] + first["suppressed"]] == [round(x, 2) for x in own["logit"]]
    assert first["unit"] == "logits"
    words = ["no better than chance" if p > 0.05 else "beyond chance" for p in own["p"][[0, 8]]]
    assert first["note"] == (
        "The final norm's scale was measured on 1 prompt. Compared with random offsets of equal norm: promoted "
        f"{words[0]} (p = {own['p'][0]:.3f}), suppressed {words[1]} (p = {own['p'][8]:.3f})."
    )
    shift = (steer.alpha * steer.sigma[0] * steer.directions[0])[None]
    by = ll.analysis.promoted_by(bridge_llama, shift, HeadSet(["L1H1"]), prompts=[PROMPT], top=8).of("L1H1")
    assert [float(x) for _, x in second["promoted"]] == [round(x, 2) for x in by["logit"][:8]]
    assert (third["title"], third["promoted"]) == ("A", [])
    assert "every offset of these heads is zero" in third["note"]
    ex.head = "L2H2"
    assert said(ex)["readings"] == []


# ------------------------------------------------------------------------------- what VS Code and Colab ask of a widget


def test_the_script_needs_its_model_and_the_page_only(pair):
    """One ES module (anywidget's contract): no import, no require.js, no request, no global of a notebook, one export."""
    script = re.sub(r"(?m)//.*$", "", ll.explore(pair).widget._esm)
    words = set(re.findall(r"[A-Za-z_$][\w$]*", re.sub(r'"[^"\n]*"|`[^`$]*`', "", script)))
    assert words.isdisjoint({
        "import", "require", "define", "fetch", "XMLHttpRequest", "WebSocket", "eval", "Function", "Jupyter", "IPython",
        "jupyterapp", "google", "acquireVsCodeApi", "globalThis", "localStorage", "sessionStorage", "innerHTML",
    })  # fmt: skip
    assert script.count("export ") == 1
    assert script.rstrip().endswith("export default { render };")
    assert set(re.findall(r"\bwindow\.(\w+)", script)) == {"innerHeight"}
    assert set(re.findall(r"\bmodel\.(\w+)", script)) == {"get", "set", "save_changes", "send", "on", "off"}


# ------------------------------------------------------------------------------------------------- the still picture


def test_the_still_picture(pair):
    """Without script and style there are two tables with as many marks as there are heads in the sets, and the numbers."""
    text = ll.explore({**pair, report_data.HOSTILE: scores(TRUTH, "<b>x</b>")}, k=4).to_html().split("<script")[0]
    grids = text.split("in the top K of both")[0]
    assert (grids.count(">&#9670;</td>"), grids.count(">&#9675;</td>")) == (6, 2)
    assert 'title="L2H3, rank 3"' in text
    assert (
        "LoFiT (top 4) and ITI (top 4) of 3x4 heads: 3 shared, 1.33 expected by chance, p = 0.067 over all heads"
        in text
    )
    assert "Shared heads: L0H0 L1H1 L2H2." in text
    assert text.isascii()
    assert not [word for word in ("http", "src=", "url(", "class=") if word in text]
    text = ll.explore({report_data.HOSTILE: scores(TRUTH, "<b>x</b>")}).to_html()
    assert text.lower().count("<script") == 2
    assert "<b>x" not in text
    alone = ll.explore(pair["LoFiT"], k=4)
    text = alone.to_html().split("<script")[0]
    assert (text.count("<caption"), text.count(">&#9675;</td>"), text.count("&#9670;")) == (1, 4, 0)
    assert "shared" not in text.lower()
    assert repr(alone).endswith("(top 4 of 3x4 heads))"), "one set is not compared with itself"
    assert " vs " not in alone.label


def test_what_a_notebook_keeps(pair):
    """The widget, a text and the saved view, the last two the same every time and without an id."""
    ex = ll.explore(pair, k=4)
    data, _ = ex._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/plain", "text/html"}
    again, _ = ll.explore(pair, k=4)._repr_mimebundle_()
    assert [again[k] for k in ("text/plain", "text/html")] == [data[k] for k in ("text/plain", "text/html")]
    assert data["text/plain"].startswith("Explorer(LoFiT (top 4) and ITI (top 4) of 3x4 heads: 3 shared")
    assert ex._repr_html_() == ex.to_html()


def test_the_figure(pair):
    """Top K and shared heads as in the widget."""
    fig = ll.explore(pair, k=4).figure()
    marked = [t for t in fig.data if t.name == "shared"]
    assert [len(t.x) for t in fig.data if t.name == "chosen"] == [4, 4]
    assert [list(zip(t.y, t.x, strict=True)) for t in marked] == [[(0, 0), (1, 1), (2, 2)]] * 2


def test_p_values_as_text():
    """Never zero."""
    assert [p_text(p) for p in (1.0, 0.0449, 0.0005, 0.0004)] == ["1.000", "0.045", "0.001", "< 0.001"]


def test_scores_travel_once(pair):
    """What the reader does brings an answer back, and nothing else; what code does, the choice as well."""
    ex = ll.explore(pair)
    sent = []
    ex.widget.observe(lambda change: sent.append(change["name"]), ["data", "state", "said"])
    pick(ex, head="L0H0")
    assert sorted(sent) == ["said", "state"]
    ex.left = "ITI"
    assert sorted(sent[2:]) == ["said", "state"]


# -------------------------------------------------------------------------------------------------- results folders


def test_a_results_folder(study_folder, bridge_llama):
    """Tasks, methods and seeds to choose; readings without a model; LoFiT's adapters with one."""
    results = ll.load_results(study_folder)
    ex = ll.explore(study_folder)
    assert isinstance(ex, Explorer)
    assert ex.names[:2] == ("kin, A-norm, seed 0", "kin, A-norm, seed 1")
    assert ex.k[0] == results.k("kin")
    ex.left = ("place", "A-norm", 1)
    assert ex.sets[ex.left] == results.heads("place", seed=1)
    head = results.adapter("kin").heads[0]
    data = ex.widget.data
    stored = {r["title"]: r for r in data["readings"][str(head)]}
    assert len(stored["LoFiT on kin, from the results"]["promoted"]) == 8
    assert data["attention"][0]["title"].startswith("with LoFiT on kin: ")
    assert said(ex)["prompts"]
    ex = ll.explore(results, bridge_llama, tasks=["kin"], max_new_tokens=2)
    assert list(ex.adapters) == ["LoFiT on kin"]
    ex.head = head
    assert said(ex)["readings"] == []  # the results have it
    assert f"with LoFiT on kin, {head} left out" in ex.run().texts


def test_results_of_another_model(study_folder, loaded, tmp_path):
    """Of another shape, or of the same with other weights; with or without adapters of one's own."""
    with pytest.raises(InputError, match=r"has other weights|layers x"):
        ll.explore(study_folder, loaded("gpt2", "bridge"))
    changed = ll.load_model(tiny.save(tmp_path / "changed", seed=1), backend="bridge", device="cpu")
    for more in ({}, {"adapters": {}}):
        with pytest.raises(InputError, match="has other weights"):
            ll.explore(study_folder, changed, **more)
