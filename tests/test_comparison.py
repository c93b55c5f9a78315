"""Choice of settings on the validation rows, and methods side by side: what is run, on which rows, how often."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import InputError, ModelError, TrainingDiverged
from lofit_lens.experiments.comparison import REFERENCE, compare_methods, compare_selectors, rows_of, tune_method
from lofit_lens.experiments.grid import compute
from lofit_lens.experiments.methods import METHODS, Method, Outline, Workbench, method_of, register
from lofit_lens.experiments.methods.base import TRIALS
from lofit_lens.interventions.base import _attached
from lofit_lens.models import load_model, model_info
from lofit_lens.tasks import Task
from tests import tiny
from tests.conftest import needs_hooked

ROWS = [{"prompt": f"Ann {w} Bob", "answer": a} for w, a in (("asked", " son"), ("saw", " aunt"), ("met", " uncle"))]
TASK = Task.from_records("kin", train=ROWS, val=ROWS[:2], test=ROWS[1:], max_new_tokens=1)
FITS = []  # (method, x, seed) of each fit
DIVERGES = set()  # values of x at which training diverges


def added(bench, asked):
    """x on z of one head."""
    x = asked.settings["x"]
    FITS.append((x, asked.seed))
    if x in DIVERGES:
        raise TrainingDiverged("loss is nan")
    lofit = Lofit.for_model(bench.model, HeadSet(["L0H1"]))
    with torch.no_grad():
        lofit.v[0, 1] = x
    return lofit


added.__module__ = "lofit_lens.tests"  # counted as the library's: its source is not read, so that it may write to FITS


def points(outline):
    return ({"x": 1.0}, {"x": 2.0})


points.__module__ = "lofit_lens.tests"
ONE, TWO = (Method(name, added, points, settings=("x", "kind")) for name in ("one", "two"))


@pytest.fixture
def model(bridge_llama):
    return bridge_llama


@pytest.fixture(autouse=True)
def known_methods(monkeypatch):
    """Methods of a test are forgotten after it."""
    FITS.clear()
    DIVERGES.clear()
    monkeypatch.setattr("lofit_lens.experiments.methods.METHODS", METHODS)
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def asked(monkeypatch):
    """Splits of every evaluation from here on."""
    seen, inner = [], compute.evaluate

    def spy(model, task, *, split, **options):
        seen.append(split)
        return inner(model, task, split=split, **options)

    monkeypatch.setattr(compute, "evaluate", spy)
    return seen


def values(monkeypatch, by_fit):
    """Make the metric a given function of x and seed of the last fit."""
    inner = compute.evaluate

    def fake(model, task, **options):
        found = inner(model, task, **options)
        if len(_attached):
            found.items["em"] = float(by_fit(*FITS[-1]))
            found.metrics["em"] = type(found.metrics["em"]).of(found.items["em"].tolist())
        return found

    monkeypatch.setattr(compute, "evaluate", fake)


def tune(model, method=ONE, **options):
    return tune_method(model, options.pop("task", TASK), method, progress=False, **options)


# ------------------------------------------------------------------------------------------------- tune_method


def test_best_point_on_validation_and_of_equals_the_first(model, monkeypatch):
    """The largest mean wins; where two are equal, the one that stands first in the grid."""
    grid = [{"x": x} for x in (1.0, 2.0, 3.0)]
    for better, best in (({2.0}, 2.0), ({3.0}, 3.0), ({2.0, 3.0}, 2.0)):
        with monkeypatch.context() as patch:
            values(patch, lambda x, seed, better=better: x in better)
            found = tune(model, grid=grid)
        assert found.settings == {"x": best}
        assert found.trials["chosen"].tolist() == [x == best for x in (1.0, 2.0, 3.0)]
        assert found.trials["value"].tolist() == [float(x in better) for x in (1.0, 2.0, 3.0)]


def test_every_point_with_every_seed_on_validation_only(model, asked):
    """Points x seeds fits; the test rows are not asked for."""
    found = tune(model, seeds=(3, 5))
    assert sorted(FITS) == [(1.0, 3), (1.0, 5), (2.0, 3), (2.0, 5)]
    assert asked == ["val"] * 4
    assert len(found.trials) == 4
    assert found.tried == 2


def test_a_choice_at_the_edge_is_said(model, monkeypatch):
    """The smallest or largest, if it beats the one next to it; no plateau, and no point within."""
    grid = [{"x": x, "kind": 1.0} for x in (1.0, 2.0, 3.0)]
    for better, edge in (({1.0}, ["x"]), ({3.0}, ["x"]), ({2.0}, []), ({1.0, 2.0}, []), ({1.0, 2.0, 3.0}, [])):
        with monkeypatch.context() as patch:
            values(patch, lambda x, seed, better=better: x in better)
            assert tune(model, grid=grid).at_edge == edge
            assert tune(model, grid=grid[1:]).at_edge == []


def test_mean_over_seeds_decides(model, monkeypatch):
    """A point that wins on one seed and loses on the other does not beat a steady one."""
    table = {(1.0, 0): 0.0, (1.0, 1): 1.0, (2.0, 0): 0.0, (2.0, 1): 0.0, (3.0, 0): 0.75, (3.0, 1): 0.75}
    values(monkeypatch, lambda x, seed: table[x, seed])
    assert tune(model, grid=[{"x": x} for x in (1.0, 2.0, 3.0)], seeds=(0, 1)).settings == {"x": 3.0}


def test_a_point_that_diverges_is_never_chosen(model):
    """It is kept among the trials with its reason; if all do, that is an error."""
    DIVERGES.add(1.0)
    found = tune(model)
    assert found.settings == {"x": 2.0}
    assert found.trials["value"].isna().tolist() == [True, False]
    assert "nan" in found.trials["note"][0]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["trials"][0]["value"] is None
    DIVERGES.add(2.0)
    with pytest.raises(TrainingDiverged, match="every point"):
        tune(model)


def test_trials_that_are_kept_are_not_run_again(model, tmp_path):
    """The second time nothing is fitted and the same is found; another seed, or fewer rows, are fitted."""
    first = tune(model, out=tmp_path)
    again = tune(model, out=tmp_path)
    assert len(FITS) == 2
    assert again.settings == first.settings
    assert again.trials.to_dict() == first.trials.to_dict()
    tune(model, out=tmp_path, seeds=(1,))
    assert len(FITS) == 4
    tune(model, out=tmp_path, n_train=2)
    assert len(FITS) == 6


def test_nothing_to_choose_from_is_refused(model):
    """Empty grid, no seed, no validation rows, a method without settings, an unknown one."""
    without = Task.from_records("kin", train=ROWS, test=ROWS)
    for options, message in (
        ({"grid": []}, "0 settings"), ({"seeds": ()}, "0 seeds"), ({"task": without}, "no validation rows"),
        ({"method": "zero-shot"}, "zero-shot has no settings to choose"), ({"method": "LoREFT"}, "Did you mean 'LoReFT'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            tune(model, **options)


# ------------------------------------------------------------------------------------------------ compare_methods


def test_settings_by_validation_then_one_run_a_seed_on_test(model, asked):
    """Two trials on val for each method, then each seed once on test; the same rows in the same order as asked."""
    table = compare_methods(model, TASK, methods=[TWO, ONE], reference="one", seeds=(0, 1, 2), progress=False)
    assert sorted(asked) == ["test"] * 6 + ["val"] * 4
    assert sorted(FITS) == sorted([(1.0, 0), (2.0, 0), (1.0, 0), (1.0, 1), (1.0, 2)] * 2)
    assert {r.method for r in table.rows} == {"one", "two"}
    assert table["one"].tried == 2
    assert table.reference == "one"


def test_given_settings_are_not_chosen(model, asked):
    """No trial; the settings as they are; another split where that is asked for."""
    table = compare_methods(
        model, TASK, methods=[ONE, "zero-shot"], settings={"one": {"x": 7.0}}, reference="one", seeds=(4, 6), split="val",
        progress=False,
    )  # fmt: skip
    assert sorted(FITS) == [(7.0, 4), (7.0, 6)]
    assert asked == ["val"] * 3, "the unmodified model once"
    assert table.split == "val"
    assert table["one"].settings == {"x": 7.0}


def test_runs_that_are_kept_are_not_run_again(model, tmp_path):
    """A comparison that is asked for twice, with damage: nothing is fitted, the same table; other texts measure anew."""
    options = {"methods": [ONE, TWO], "reference": "one", "seeds": (0, 1), "out": tmp_path, "progress": False}
    first = compare_methods(model, TASK, texts=["Ann met Bob"], **options)
    n = len(FITS)
    assert n == 8
    again = compare_methods(model, TASK, texts=["Ann met Bob"], **options)
    assert again.cells() == first.cells()
    other = compare_methods(model, TASK, texts=["Bob met Ann"], **options)
    assert other["one"].kl != first["one"].kl
    assert len(FITS) == n


def test_damage_is_measured_where_texts_are_given(model):
    """KL of each seed and text; none without texts and for the model as it is."""
    options = {"methods": [ONE, "zero-shot"], "settings": {"one": {"x": 1.0}}, "reference": "one", "progress": False}
    table = compare_methods(model, TASK, texts=["Ann met Bob", "Bob saw Eve"], **options)
    assert table["one"].kl.mean > 0
    assert (table["one"].kl.seeds, table["one"].kl.n) == (2, 2)
    assert table["zero-shot"].kl is None
    assert compare_methods(model, TASK, **options)["one"].kl is None


def test_seconds_of_shared_work_count_for_everyone(model):
    """Work that another method did before is added to the one that uses it."""
    bench = Workbench(model, TASK)

    def slow():
        torch.ones(1500, 1500) @ torch.ones(1500, 1500)
        return 5

    _, first = bench.timed(lambda: bench.shared("k", slow))
    value, second = bench.timed(lambda: bench.shared("k", slow))
    assert value == 5
    assert second >= bench._kept["k"][1] > 0.5 * first
    _, outer = bench.timed(lambda: bench.shared("outer", lambda: bench.shared("k", slow)))
    assert bench._kept["outer"][1] >= bench._kept["k"][1]
    assert outer >= bench._kept["k"][1]


def test_bad_requests_are_refused_first(model, asked):
    """Nothing is run."""
    for options, message in (
        ({"methods": ["LoFT 3 %"]}, "unknown method"), ({"seeds": ()}, "0 seeds"),
        ({"methods": ["zero-shot"]}, "reference 'LoFiT 3 %' is not among"), ({"methods": [REFERENCE, REFERENCE]}, "given twice"),
        ({"methods": [REFERENCE]}, "only LoFiT 3 % is given; name another method"),
        ({"workers": 2}, "by name"), ({"settings": {"RED": {"lrr": 1.0}}}, "settings of RED: no field 'lrr'"),
        ({"settings": {"RDE": {}}}, "Did you mean 'RED'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            compare_methods(model, TASK, progress=False, **options)
    assert asked == []


def test_what_failed_is_raised(model):
    """A fit that diverges, as what it is."""
    DIVERGES.add(7.0)
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        compare_methods(
            model,
            TASK,
            methods=[ONE, "zero-shot"],
            settings={"one": {"x": 7.0}},
            reference="one",
            seeds=(0,),
            progress=False,
        )


@needs_hooked
def test_lora_without_its_checkpoint_is_refused_first(hf, asked):
    """A HookedTransformer made in memory cannot be read again as a bridge: said before the first fit, with what to do."""
    plain = copy.deepcopy(hf("llama"))
    plain.config.name_or_path = ""
    loaded = load_model(plain, tokenizer=tiny.tokenizer(), backend="hooked", device="cpu")
    with pytest.raises(ModelError, match="Leave LoRA out"):
        compare_methods(loaded, TASK, methods=[REFERENCE, "LoRA"], progress=False)
    assert asked == []


@needs_hooked
def test_lora_on_hooked_runs_on_the_same_checkpoint_as_a_bridge(loaded):
    """One bridge for all tasks of a model; a bridge is its own."""
    hooked, bridge = loaded("llama", "hooked"), loaded("llama", "bridge")
    assert Workbench(bridge, TASK).bridge() is bridge
    found = Workbench(hooked, TASK).bridge()
    assert model_info(found).class_name == "TransformerBridge"
    assert model_info(found).revision == model_info(hooked).revision
    assert Workbench(hooked, TASK).bridge() is found


def test_every_method_has_the_same_number_of_trials(model):
    """One budget for all; the model as it is has nothing to choose."""
    outline = Outline.of(model_info(model), TASK)
    for name, method in METHODS.items():
        points = [json.dumps(p, sort_keys=True) for p in method.points(outline)]
        assert len(set(points)) == len(points) == (TRIALS if method.fit is not None else 0), name


def test_random_heads_take_over_the_learned_heads_settings(model):
    """The control differs in its heads alone: no trial of its own, the settings of LoFiT 3 %, five draws."""
    table = compare_methods(model, TASK, methods=["random heads", REFERENCE, "LoFiT 10 %"], seeds=(0,), progress=False)
    assert [r.method for r in table.rows] == ["random heads", REFERENCE, "LoFiT 10 %"]
    assert [r.tried for r in table.rows] == [0, 4, 0]
    assert table["random heads"].settings == table[REFERENCE].settings == table["LoFiT 10 %"].settings
    assert [len(m.runs) for m in table.methods] == [5, 1, 1]


def test_selectors_are_compared_after_offset_tuning(model):
    """Each selector's K heads, offsets tuned alike, A-norm as the reference; random with five draws."""
    table = compare_selectors(model, TASK, selectors=["random"], seeds=(0,), progress=False)
    assert [r.method for r in table.rows] == ["heads by A-norm", "heads by random"]
    assert table.reference == "heads by A-norm"
    assert len(table.methods[1].runs) == 5
    assert {r.n_parameters for r in table.rows} == {8}  # K = 1 head of size 8
    assert len({r.heads for r in table.methods[1].runs}) > 1
    for names, message in ((["A-Norm"], "Did you mean 'A-norm'"), (["A-norm"], "name another one")):
        with pytest.raises(InputError, match=message):
            compare_selectors(model, TASK, selectors=names, seeds=(0,), progress=False)


# --------------------------------------------------------------------------------------------- methods of one's own


def test_names_of_rows():
    """A method whose runs name its heads has three rows; others have one."""
    gate = Method("gate", added, heads="chosen")
    assert list(rows_of([METHODS["LoFiT"], gate, ONE])) == [
        "random heads", "LoFiT 3 %", "LoFiT 10 %", "gate, random heads", "gate 3 %", "gate 10 %", "one"
    ]  # fmt: skip
    assert gate.row("A-norm", 7, 3, 9) == "gate, 7 heads"
    with pytest.raises(InputError, match="heads of the method gate is 'all'"):
        replace(gate, heads="all")


def test_a_method_by_its_name_or_as_it_is():
    """One's own is made known; the library's names are taken."""
    assert method_of("ITI") is METHODS["ITI"]
    assert method_of(ONE) is METHODS["one"] is ONE
    again = replace(ONE, place=3)
    assert register(again) is METHODS["one"]
    with pytest.raises(InputError, match="the library already has a method 'ITI'"):
        register(replace(ONE, name="ITI"))
