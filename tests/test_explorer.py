"""The explorer without a browser: what is chosen, what is computed, what the view is given, what stands in its place."""

import logging

import numpy as np
import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.explorer import Explorer, running
from lofit_lens.explorer.panel import p_text
from lofit_lens.heads import Head, HeadScores, HeadSet
from lofit_lens.interventions import ITI, HeadAblation, Lofit, Red
from tests import report_data, tiny
from tests.report_data import EDITS, TRUTH, ranked, scored

SHAPE = (3, 4)  # of report_data and of the tiny Llama
PROMPT = "Ann is the aunt of Bob"


def scores(best, **fields):
    return HeadScores(scored(ranked(best)), **{"kind": "A-norm", **fields})


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


def shown(ex):
    return ex.widget.state


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
    """The view gets the same sets, the same numbers and nothing of its own."""
    ex = ll.explore(pair, k=4)
    state = shown(ex)
    assert state["shared"] == ["L0H0", "L1H1", "L2H2"]
    assert state["own"] == [["L0H3"], ["L2H3"]]
    assert [value for _, value, _ in state["overlap"]] == [
        "3 of 4 and 4",
        "1.33",
        "0.067",
        "0.062",
        "0.60",
    ]  # p within layers: 1/2 * 1/4 * 1/2
    data = ex.widget.data
    assert data["shape"] == [3, 4]
    assert data["sides"][0]["ranks"][:5] == [1, 11, 12, 4, 5]
    assert data["sides"][0]["scores"][0] == 1.2
    assert (data["sides"][0]["shade"][0], min(data["sides"][0]["shade"])) == (1.0, 0.0)
    assert [s["kind"] for s in data["sides"]] == ["A-norm", "probe accuracy"]


def test_usual_k():
    """3 % of all heads, but at least one; a set's own size; a given one wins."""
    big = HeadScores(np.arange(1600.0).reshape(40, 40))
    assert ll.explore({"a": big, "b": big}).k == (48, 48)
    assert ll.explore({"a": scores(TRUTH), "b": HeadSet(EDITS)}).k == (1, 5)
    assert ll.explore({"a": scores(TRUTH), "b": HeadSet(EDITS)}, k=(7, 2)).k == (7, 2)


def test_a_set_without_scores():
    """Its places are shown, heads outside stay blank, and K ends at its size."""
    ex = ll.explore({"file": HeadSet(EDITS), "LoFiT": scores(TRUTH)})
    side = ex.widget.data["sides"][0]
    assert (side["scores"], side["k_max"], side["legend"]) == (None, 5, ["rank 5", "rank 1"])
    assert side["shade"][5] == 1.0  # L1H1
    assert side["shade"][11] == 0.6  # L2H3, third of five
    assert side["shade"][2] is None
    with pytest.raises(InputError, match="K = 6 heads asked for; file has 5"):
        ex.k = 6
    ex.head = "L0H2"
    assert shown(ex)["table"]["rows"][0] == ["file", "place in the set", "", "not among 5", "no"]
    with pytest.raises(InputError, match="file has no scores of all heads"):
        ex.figure()


def test_one_set_stands_on_both_sides():
    """Even with two K: then the names say which."""
    ex = ll.explore({"only": scores(TRUTH)}, k=2)
    assert (ex.left, ex.right, len(ex.sets)) == ("only", "only", 1)
    ex.k = (1, 3)
    assert {n: len(s) for n, s in ex.sets.items()} == {"only (left)": 1, "only (right)": 3}
    ex.head = "L2H2"  # third
    assert shown(ex)["table"]["rows"] == [["only", "A-norm", "1", "3 of 12", "yes"]]
    assert ex.figure().layout.title.text == "only and only"


# -------------------------------------------------------------------------------------------------------- choosing


def test_another_method_of_the_same_task_comes_first(four):
    """Left: the first entry; right: the same task by another method."""
    ex = ll.explore(four)
    assert (ex.left, ex.right) == ("truth, A-norm", "truth, probes")
    assert [c["part"] for c in shown(ex)["choosers"][0]] == ["task", "method"]
    assert shown(ex)["choosers"][0][1]["options"] == ["A-norm", "probes"]


def test_choosing_a_task_keeps_the_method(four):
    """Where the task has it; else the task's first."""
    ex = ll.explore(four)
    ex._heard({"do": "choose", "side": "right", "part": "task", "value": "edits"})
    assert ex.right == "edits, probes"
    assert shown(ex)["choosers"][1][1]["options"] == ["A-norm", "probes", "file"]
    ex._heard({"do": "choose", "side": "right", "part": "method", "value": "file"})
    assert ex.right == "edits, file"
    ex._heard({"do": "choose", "side": "right", "part": "task", "value": "truth"})
    assert ex.right == "truth, A-norm"
    ex.left = ("edits", "A-norm")
    assert ex.left == "edits, A-norm"
    assert ex.widget.data["sides"][0]["name"] == "edits, A-norm"


def test_k_shrinks_to_a_smaller_set(four):
    """Twelve heads cannot be shown of a set of five."""
    ex = ll.explore(four, k=12)
    ex.right = "edits, file"
    assert ex.k == (12, 5)


def test_linked_k(pair):
    """Both K move together while they are linked; a pair of two numbers parts them."""
    ex = ll.explore(pair, k=2)
    ex._heard({"do": "k", "side": "right", "value": 5})
    assert ex.k == (5, 5)
    ex._heard({"do": "link", "value": False})
    ex._heard({"do": "k", "side": "right", "value": 3})
    assert ex.k == (5, 3)
    ex._heard({"do": "link", "value": True})
    assert ex.k == (5, 5)
    ex.k = (2, 4)
    assert not shown(ex)["linked"]


def test_only_some_tasks(four):
    """Others cannot be chosen."""
    ex = ll.explore(four, tasks=["edits"])
    assert ex.names == ("edits, A-norm", "edits, probes", "edits, file")
    with pytest.raises(InputError, match="unknown head set 'truth, A-norm'"):
        ex.left = ("truth", "A-norm")


def test_clicking_marks_and_opens(pair):
    """A second click takes the mark away; the head stays open."""
    ex = ll.explore(pair)
    for head in ("L1H1", "L2H0", "L1H1"):
        ex._heard({"do": "click", "head": head})
    assert (ex.head, str(ex.selection), ex.selection.shape) == (Head(1, 1), "L2H0", SHAPE)
    assert shown(ex)["selection"] == ["L2H0"]
    ex._heard({"do": "close"})
    assert (ex.head, shown(ex)["head"]) == (None, None)
    ex.selection = ["L0H0", (2, 3)]
    assert str(ex.selection) == "L0H0 L2H3"
    assert shown(ex)["selection"] == ["L0H0", "L2H3"]
    ex._heard({"do": "clear"})
    assert len(ex.selection) == 0


def test_a_head_everywhere(four):
    """Score and rank in all tasks and methods; those shown say whether it is in the top K."""
    ex = ll.explore(four, k=2)
    ex.head = "L2H2"  # third of TRUTH, fourth of EDITS
    assert ex.table()["rank"].tolist() == [3, 4, 4, 3, 4]
    assert ex.table()["score"].tolist()[:4] == [1.0, 0.9, 0.9, 1.0]
    assert np.isnan(ex.table("L2H2")["score"].iloc[4])
    rows = shown(ex)["table"]["rows"]
    assert rows[0] == ["truth", "A-norm", "A-norm", "1", "3 of 12", "no"]
    assert [r[-1] for r in rows] == ["no", "", "no", "", ""]
    ex.k = (3, 2)
    assert shown(ex)["table"]["rows"][0][-1] == "yes"
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
        ({"a": HeadSet(["L0H0"], shape=(3, 4)), "b": HeadSet(["L0H0"], shape=(4, 4))}, {}, "a: 3x4, b: 4x4"),
        ({"a": HeadSet(["L0H0"], shape=(3, 4)), ("t", "b"): HeadSet(["L0H0"])}, {}, r"or \(task, method\) for all"),
        ({"a": HeadSet(["L0H0"], shape=(3, 4))}, {"k": 2}, "K = 2 heads asked for; a has 1"),
        ({"a": HeadSet(["L0H0"], shape=(3, 4))}, {"k": (1, 1, 1)}, "or a pair"),
        ({"a": HeadSet(["L0H0"], shape=(3, 4))}, {"tasks": ["x"]}, "leave it out"),
        ({("t", "a"): HeadSet(["L0H0"], shape=(3, 4))}, {"tasks": ["x"]}, "unknown task 'x'; allowed: t"),
        ({("t", "a"): HeadSet(["L0H0"], shape=(3, 4))}, {"tasks": []}, "tasks is empty"),
        ({"a": HeadSet(["L0H0"], shape=(3, 4))}, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"a": HeadSet(["L0H0"], shape=(3, 4))}, {"adapters": {"x": "LoFiT"}}, "adapter 'x' is 'LoFiT'; give what"),
    ],
)  # fmt: skip
def test_bad_input(source, options, message):
    """It says what was given and what is allowed."""
    with pytest.raises(InputError, match=message):
        ll.explore(source, **options)


def test_names_and_heads_that_are_not_there(pair, lofit):
    """Nothing changes."""
    ex = ll.explore(pair, adapters={"LoFiT": lofit})
    for name, value, message in (
        ("left", "LoFit", "unknown head set 'LoFit'; allowed: LoFiT, ITI. Did you mean 'LoFiT'"),
        ("head", "L9H0", "head L9H0 is outside"), ("head", "five", "'five' is not a head"),
        ("selection", ["L0H0", "L0H0"], "listed twice"), ("adapter", "x", "unknown adapter"),
    ):  # fmt: skip
        before = getattr(ex, name)
        with pytest.raises(InputError, match=message):
            setattr(ex, name, value)
        assert getattr(ex, name) == before


def test_another_models_heads_and_adapters(bridge_llama, pair, lofit):
    """Heads of a 2x2 model on one of 3x4; an adapter with a head that a model of 1x4 does not have."""
    with pytest.raises(InputError, match=r"2 layers x 2 heads; .* has 3 x 4"):
        ll.explore({"a": HeadScores([[1, 2], [3, 4]])}, bridge_llama)
    with pytest.raises(InputError, match="head L1H1 is outside this model"):
        ll.explore({"a": HeadScores([[1, 2, 3, 4]])}, adapters={"LoFiT": lofit})


def test_a_folder_without_results(tmp_path):
    """It says how to make some."""
    with pytest.raises(DataError, match="holds no study"):
        ll.explore(tmp_path)


def test_without_the_widgets_package(pair, monkeypatch):
    """One line that says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "lofit-lens\[notebook\]"'):
        ll.explore(pair)


def test_an_error_in_the_browser_is_one_line(pair, bridge_llama, monkeypatch, caplog):
    """What the reader did wrong is said; our own mistakes are logged as well; the next action clears the line."""
    ex = ll.explore(pair, bridge_llama)
    with caplog.at_level(logging.ERROR):
        ex._heard({"do": "run", "prompt": "  "})
        assert shown(ex)["error"] == "the prompt is empty; type a text for the model to go on from"
        ex._heard({"do": "fly"})
        assert "does not know {'do': 'fly'}" in shown(ex)["error"]
        assert not caplog.records
        monkeypatch.setattr("lofit_lens.explorer.explorer.run_prompt", lambda *a, **k: 1 / 0)
        ex._heard({"do": "run", "prompt": "x"})
    assert shown(ex)["error"] == "ZeroDivisionError: division by zero"
    assert (shown(ex)["busy"], len(caplog.records)) == ("", 1)
    assert caplog.records[0].exc_info
    ex._heard({"do": "k", "side": "left", "value": 2})
    assert shown(ex)["error"] == ""


# ------------------------------------------------------------------------------------------------- with the model


def test_running_a_prompt(bridge_llama, pair, lofit):
    """Each text is what `generate` gives with the same edit attached; patterns are those of `attention_patterns`."""
    ex = ll.explore(pair, bridge_llama, adapters={"LoFiT": lofit}, prompts=[PROMPT], max_new_tokens=4)
    ex.head = "L1H1"
    busy = []
    ex.widget.observe(lambda change: busy.append(change["new"]["busy"]), "state")
    ex._heard({"do": "run", "prompt": PROMPT})
    assert [b for b in busy if b] == ["Running the prompt ..."]
    assert shown(ex)["busy"] == ""
    run = ex.last_run
    assert (run.prompt, run.head, run.adapter) == (PROMPT, Head(1, 1), "LoFiT")
    edits = {
        "unmodified model": (), "with LoFiT": (lofit,), "with LoFiT, L1H1 left out": (lofit.restrict(HeadSet(["L0H0"])),),
        "unmodified model, L1H1 silenced (z = 0)": (HeadAblation.of(bridge_llama, HeadSet(["L1H1"])),),
    }  # fmt: skip
    assert list(run.texts) == list(edits)
    for name, acting in edits.items():
        with ll.attached(bridge_llama, *acting):
            assert run.texts[name] == ll.generate(bridge_llama, PROMPT, max_new_tokens=4)
    assert run.texts["unmodified model"] != run.texts["with LoFiT"]
    assert list(run.attention) == ["unmodified model", "with LoFiT"]
    every = HeadSet.all(SHAPE)
    with lofit.attached(bridge_llama):
        expected = ll.analysis.attention_patterns(bridge_llama, [PROMPT], every)
    assert torch.equal(run.attention["with LoFiT"].patterns[0], expected.patterns[0])
    state = shown(ex)
    assert state["answers"]["rows"][1] == ["with LoFiT", run.texts["with LoFiT"]]
    maps = state["attention"]["maps"]
    assert [m["title"] for m in maps] == ["unmodified model", "with LoFiT"]
    np.testing.assert_allclose(maps[1]["weights"][-1], expected.of("L1H1")[-1], atol=5e-4)
    assert [len(row) for row in maps[0]["weights"]] == list(range(1, run.n_tokens + 1))
    ex._heard({"do": "click", "head": "L2H0"})  # its patterns are there, its answers are not
    state = shown(ex)
    np.testing.assert_allclose(state["attention"]["maps"][1]["weights"][-1], expected.of("L2H0")[-1], atol=5e-4)
    assert state["answers"]["note"] == "This was run with L1H1 open and LoFiT; press Run again."
    assert "with LoFiT, L2H0 left out" not in ex.run().texts
    assert shown(ex)["answers"]["note"] == ""


def test_without_a_head_and_without_an_adapter(bridge_llama, pair):
    """The model alone answers; nothing is left out."""
    ex = ll.explore(pair, bridge_llama)
    ex.prompt = PROMPT
    assert list(ex.run().texts) == ["unmodified model"]
    assert shown(ex)["attention"] == {"maps": [], "note": ""}


def test_of_a_large_model_only_the_open_heads_pattern_is_kept(bridge_llama, pair, monkeypatch):
    """Another head then asks for another run."""
    monkeypatch.setattr(running, "MOST_WEIGHTS", 10)
    ex = ll.explore(pair, bridge_llama, prompts=[PROMPT])
    ex.head = "L2H1"
    assert str(ex.run().attention["unmodified model"].heads) == "L2H1"
    ex.head = "L0H0"
    assert shown(ex)["attention"] == {"maps": [], "note": "Press Run to see where L0H0 looks."}


def test_a_prompt_that_is_too_long_to_be_drawn(bridge_llama, pair, monkeypatch):
    """It is answered all the same."""
    monkeypatch.setattr(running, "MOST_TOKENS", 3)
    monkeypatch.setattr("lofit_lens.explorer.panel.MOST_TOKENS", 3)
    ex = ll.explore(pair, bridge_llama, prompts=[PROMPT])
    ex.head = "L0H0"
    run = ex.run()
    assert run.attention == {}
    assert run.texts["unmodified model"] == ll.generate(bridge_llama, PROMPT, max_new_tokens=16)
    assert "cannot be read here: see ll.plots.attention_html" in shown(ex)["attention"]["note"]


def test_what_cannot_be_run(bridge_llama, pair, lofit):
    """No model; an adapter that is attached already. Nothing stays attached or busy."""
    ex = ll.explore(pair)
    assert "ll.explore(..., model" in shown(ex)["no_model"]
    with pytest.raises(InputError, match="needs the model"):
        ex.run()
    ex = ll.explore(pair, bridge_llama, adapters={"LoFiT": lofit}, prompts=[PROMPT])
    with lofit.attached(bridge_llama):
        ex._heard({"do": "run", "prompt": PROMPT})
        assert "leave its `with` block" in shown(ex)["error"]
        with pytest.raises(InputError, match="attached to this model already"):
            ex.run()
        with pytest.raises(AdapterError, match="already attached"):
            ll.explore(pair, bridge_llama, adapters={"LoFiT": lofit})
    assert (shown(ex)["busy"], shown(ex)["no_model"]) == ("", "")


def test_an_error_ends_with_what_is_done_next(bridge_llama, pair):
    """Also from code; and it is there for a view that is made later."""
    ex = ll.explore(pair, bridge_llama, prompts=[PROMPT], max_new_tokens=1)
    ex._heard({"do": "run", "prompt": ""})
    assert "empty" in shown(ex)["error"]
    ex.prompt = PROMPT
    assert shown(ex)["error"] == ""
    ex._heard({"do": "run", "prompt": ""})
    ex.prompt = PROMPT
    ex.run()
    assert (shown(ex)["error"], shown(ex)["busy"]) == ("", "")


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
    ex._heard({"do": "click", "head": str(lofit.heads[0])})
    state = shown(ex)
    assert state["head"] == str(lofit.heads[0])
    assert [t["note"] for t in state["tokens"]] == ["ZeroDivisionError: division by zero"]
    assert caplog.records[0].exc_info


def test_one_model_at_a_time():
    """Scores of two models are not compared; names that read alike would hide each other."""
    values = torch.rand(3, 4)
    with pytest.raises(InputError, match=r"several models \(m1, m2\)"):
        ll.explore({"a": HeadScores(values, model="m1"), "b": HeadScores(values, model="m2")})
    with pytest.raises(InputError, match="read alike"):
        ll.explore({("a, b", "c"): HeadScores(values), ("a", "b, c"): HeadScores(values)})


def test_a_text_is_no_list_of_prompts(pair):
    """It is one prompt: its letters are not offered as examples."""
    assert shown(ll.explore(pair, prompts="abc"))["prompts"] == ["abc"]
    with pytest.raises(InputError, match="prompts holds 1 at place 0; give a list of texts"):
        ll.explore(pair, prompts=[1])


def test_both_views_shade_alike(pair):
    """Lowest and highest score are 0 and 1; scores that are all alike lie between; of a set, places count."""
    given = {"flat": HeadScores(torch.ones(3, 4)), "set": HeadSet(["L0H1", "L2H3"], shape=(3, 4)), **pair}
    entries = ll.explore(given).state.source.entries
    flat, listed, first = (entries[name].shades for name in ("flat", "set", "LoFiT"))
    assert set(flat.values()) == {0.5}
    assert {str(h): x for h, x in listed.items()} == {"L0H1": 1.0, "L2H3": 0.5}
    assert (min(first.values()), max(first.values())) == (0.0, 1.0)


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
    first, second, third = shown(ex)["tokens"]
    own = ll.analysis.promoted_tokens(bridge_llama, lofit, prompts=[PROMPT], heads=HeadSet(["L1H1"]), top=8).of("L1H1")
    assert [float(x) for _, x in first["promoted"] + first["suppressed"]] == [round(x, 2) for x in own["logit"]]
    assert (first["unit"], first["note"]) == ("logits", "The final norm's scale was measured on 1 prompts.")
    shift = (steer.alpha * steer.sigma[0] * steer.directions[0])[None]
    by = ll.analysis.promoted_by(bridge_llama, shift, HeadSet(["L1H1"]), prompts=[PROMPT], top=8).of("L1H1")
    assert [float(x) for _, x in second["promoted"]] == [round(x, 2) for x in by["logit"][:8]]
    assert (third["title"], third["promoted"]) == ("A", [])
    assert "every offset of these heads is zero" in third["note"]
    ex.head = "L2H2"
    assert shown(ex)["tokens"] == []


# ------------------------------------------------------------------------------------------------- the still picture


def test_the_still_picture(pair):
    """Two tables with as many marks as there are heads in the sets, the numbers, no script, nothing to fetch."""
    text = ll.explore(pair, k=4).to_html()
    grids = text.split("in the top K of both")[0]
    assert (grids.count(">&#9670;</td>"), grids.count(">&#9675;</td>")) == (6, 2)
    assert 'title="L2H3, rank 3"' in text
    assert (
        "LoFiT (top 4) and ITI (top 4) of 3x4 heads: 3 shared, 1.33 expected by chance, p = 0.067 over all heads"
        in text
    )
    assert "Shared heads: L0H0 L1H1 L2H2." in text
    assert text.isascii()
    assert not [word for word in ("<script", "http", "src=", "url(", "class=") if word in text]


def test_hostile_names_stay_text():
    """In the still picture; the browser's part is in test_explorer_browser."""
    text = ll.explore({report_data.HOSTILE: scores(TRUTH, kind="<b>x</b>")}).to_html()
    assert "<script" not in text.lower()
    assert "<b>x" not in text


def test_what_a_notebook_keeps(pair):
    """The widget, a text and the still picture, the last two the same every time and without an id."""
    ex = ll.explore(pair, k=4)
    data, _ = ex._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/plain", "text/html"}
    again, _ = ll.explore(pair, k=4)._repr_mimebundle_()
    assert [again[k] for k in ("text/plain", "text/html")] == [data[k] for k in ("text/plain", "text/html")]
    assert data["text/plain"].startswith("Explorer(LoFiT (top 4) and ITI (top 4) of 3x4 heads: 3 shared")
    assert ex._repr_html_() == ex.to_html() == data["text/html"]


def test_the_figure(pair):
    """Top K and shared heads as in the widget."""
    fig = ll.explore(pair, k=4).figure()
    marked = [t for t in fig.data if t.name == "shared"]
    assert [len(t.x) for t in fig.data if t.name == "chosen"] == [4, 4]
    assert [list(zip(t.y, t.x, strict=True)) for t in marked] == [[(0, 0), (1, 1), (2, 2)]] * 2


def test_p_values_as_text():
    """Never zero."""
    assert [p_text(p) for p in (1.0, 0.0449, 0.0005, 0.0004)] == ["1.000", "0.045", "0.001", "< 0.001"]


def test_nothing_is_sent_twice(pair):
    """Scores travel when another set is shown, not when K moves."""
    ex = ll.explore(pair)
    sent = []
    ex.widget.observe(lambda change: sent.append(change["name"]), ["data", "state"])
    ex.k = 3
    ex.head = "L0H0"
    assert sent == ["state", "state"]
    ex.left = "ITI"
    assert sent[2:] == ["data", "state"]


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
    assert [c["part"] for c in shown(ex)["choosers"][0]] == ["task", "method", "seed"]
    ex._heard({"do": "choose", "side": "left", "part": "task", "value": "kin"})
    assert ex.left == "kin, A-norm, seed 1"
    head = results.adapter("kin").heads[0]
    ex.head = head
    state = shown(ex)
    title = [t["title"] for t in state["tokens"]]
    assert "LoFiT on kin, from the results" in title
    assert len(state["tokens"][0]["promoted"]) == 8
    assert state["attention"]["maps"][0]["title"].startswith("with LoFiT's adapter of kin, from the results")
    assert state["prompts"]
    ex = ll.explore(results, bridge_llama, tasks=["kin"], max_new_tokens=2)
    assert list(ex.adapters) == ["LoFiT on kin"]
    ex.head = head
    assert [t["title"] for t in shown(ex)["tokens"]] == title
    assert f"with LoFiT on kin, {head} left out" in ex.run().texts


def test_results_of_another_model(study_folder, loaded, tmp_path):
    """Of another shape, or of the same with other weights; with or without adapters of one's own."""
    with pytest.raises(InputError, match=r"has other weights|layers x"):
        ll.explore(study_folder, loaded("gpt2", "bridge"))
    changed = ll.load_model(tiny.save(tmp_path / "changed", seed=1), backend="bridge", device="cpu")
    for more in ({}, {"adapters": {}}):
        with pytest.raises(InputError, match="has other weights"):
            ll.explore(study_folder, changed, **more)
