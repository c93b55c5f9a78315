"""Choice of settings on the validation split, and methods side by side: what is run, on which rows, how often."""

import copy
import json

import pytest
import torch

from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import InputError, ModelError, TrainingDiverged
from lofit_lens.experiments import comparison, methods, tuning
from lofit_lens.experiments.comparison import compare_methods, compare_selectors, compare_tasks
from lofit_lens.experiments.methods import CHANCE, LEARNED, METHODS, TRIALS, Method, Workbench, method_of
from lofit_lens.experiments.tuning import tune_method
from lofit_lens.interventions.base import _attached
from lofit_lens.models import load_model, model_info
from lofit_lens.tasks import Task
from tests import tiny
from tests.conftest import needs_hooked

ROWS = [{"prompt": f"Ann {w} Bob", "answer": a} for w, a in (("asked", " son"), ("saw", " aunt"), ("met", " uncle"))]
TASK = Task.from_records("kin", train=ROWS, val=ROWS[:2], test=ROWS[1:], max_new_tokens=1)


@pytest.fixture
def model(bridge_llama):
    return bridge_llama


@pytest.fixture
def asked(monkeypatch):
    """Every evaluation from here on, as (split, mean of v of what was fitted last)."""
    seen, inner = [], tuning.evaluate

    def spy(model, task, *, split, **options):
        seen.append(split)
        return inner(model, task, split=split, **options)

    monkeypatch.setattr(tuning, "evaluate", spy)
    monkeypatch.setattr(comparison, "evaluate", spy)
    return seen


def counted(name, fits, *, grid=({"x": 1.0}, {"x": 2.0}), diverge=(), **options):
    """A method that adds x to z of one head and writes down each fit."""

    def fit(bench, settings, seed):
        fits.append((name, settings["x"], seed))
        if settings["x"] in diverge:
            raise TrainingDiverged("loss is nan")
        lofit = Lofit.for_model(bench.model, HeadSet(["L0H1"]))
        with torch.no_grad():
            lofit.v[0, 1] = settings["x"]
        return lofit

    return Method(name, fit, lambda bench: grid, **options)


def values(monkeypatch, by_x):
    """Make the validation metric a given function of x."""
    inner = tuning.evaluate

    def fake(model, task, **options):
        found = inner(model, task, **options)
        x = float(next(iter(_attached)).v[0, 1, 0])
        found.items["em"] = float(by_x(x))
        found.metrics["em"] = type(found.metrics["em"]).of(found.items["em"].tolist())
        return found

    monkeypatch.setattr(tuning, "evaluate", fake)


# ------------------------------------------------------------------------------------------------- tune_method


@pytest.mark.parametrize(("by_x", "best"), [(lambda x: x == 2, 2.0), (lambda x: x == 3, 3.0), (lambda x: x >= 2, 2.0)])
def test_best_point_on_validation_and_of_equals_the_first(model, monkeypatch, by_x, best):
    """The largest mean wins; where two are equal, the one that stands first in the grid."""
    values(monkeypatch, by_x)
    grid = [{"x": x} for x in (1.0, 2.0, 3.0)]
    found = tune_method(model, TASK, counted("m", []), grid=grid, progress=False)
    assert found.settings == {"x": best}
    assert found.trials["chosen"].tolist() == [x == best for x in (1.0, 2.0, 3.0)]
    assert found.trials["value"].tolist() == [float(by_x(x)) for x in (1.0, 2.0, 3.0)]


def test_every_point_with_every_seed_on_validation_only(model, asked):
    """Points x seeds fits, in order; the test split is not asked for."""
    fits = []
    found = tune_method(model, TASK, counted("m", fits), seeds=(3, 5), progress=False)
    assert fits == [("m", 1.0, 3), ("m", 1.0, 5), ("m", 2.0, 3), ("m", 2.0, 5)]
    assert set(asked) == {"val"}
    assert len(asked) == len(found.trials) == 4
    assert found.tried == 2


@pytest.mark.parametrize(
    ("by_x", "edge"),
    [
        (lambda x: x == 1, ["x"]),
        (lambda x: x == 3, ["x"]),
        (lambda x: x == 2, []),
        (lambda x: x < 3, []),
        (lambda x: 1, []),
    ],
)
def test_a_choice_at_the_edge_is_said(model, monkeypatch, by_x, edge):
    """The smallest or largest, if it beats the one next to it; no plateau, and no point within."""
    values(monkeypatch, by_x)
    grid = [{"x": x, "kind": "a"} for x in (1.0, 2.0, 3.0)]
    assert tune_method(model, TASK, counted("m", []), grid=grid, progress=False).at_edge == edge
    assert tune_method(model, TASK, counted("m", []), grid=grid[1:], progress=False).at_edge == []


def test_mean_over_seeds_decides(model, monkeypatch):
    """A point that wins on one seed and loses on the other does not beat a steady one."""
    table = {(1.0, 0): 0.0, (1.0, 1): 1.0, (2.0, 0): 0.0, (2.0, 1): 0.0, (3.0, 0): 0.75, (3.0, 1): 0.75}
    last, fits = {}, []
    base = counted("m", fits)

    def fit(bench, settings, seed):
        last["at"] = (settings["x"], seed)
        return base.fit(bench, settings, seed)

    values(monkeypatch, lambda x: table[last["at"]])
    grid = [{"x": x} for x in (1.0, 2.0, 3.0)]
    found = tune_method(model, TASK, Method("m", fit, base.grid), grid=grid, seeds=(0, 1), progress=False)
    assert found.settings == {"x": 3.0}


def test_a_point_that_diverges_is_never_chosen(model, caplog):
    """It is kept among the trials with its reason, and warned about; if all do, that is an error."""
    found = tune_method(model, TASK, counted("m", [], diverge=(1.0,)), progress=False)
    assert found.settings == {"x": 2.0}
    assert found.trials["value"].isna().tolist() == [True, False]
    assert "nan" in found.trials["note"][0]
    assert "nan" in caplog.text
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["trials"][0]["value"] is None
    with pytest.raises(TrainingDiverged, match="every point"):
        tune_method(model, TASK, counted("m", [], diverge=(1.0, 2.0)), progress=False)


def test_trials_that_are_kept_are_not_run_again(model, tmp_path):
    """The second time nothing is fitted and the same is found; another seed is fitted."""
    fits = []
    first = tune_method(model, TASK, counted("m", fits), out=tmp_path, progress=False)
    again = tune_method(model, TASK, counted("m", fits), out=tmp_path, progress=False)
    assert len(fits) == 2
    assert again.settings == first.settings
    assert again.trials.to_dict() == first.trials.to_dict()
    tune_method(model, TASK, counted("m", fits), out=tmp_path, seeds=(1,), progress=False)
    assert len(fits) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"grid": []}, "0 settings"), ({"seeds": ()}, "0 seeds"), ({"task": "no val"}, "no validation rows")],
)
def test_nothing_to_choose_from_is_refused(model, options, message):
    """Empty grid, no seed, no validation split."""
    task = Task.from_records("kin", train=ROWS, test=ROWS) if options.pop("task", None) else TASK
    with pytest.raises(InputError, match=message):
        tune_method(model, task, counted("m", []), progress=False, **options)


def test_unknown_method_and_its_nearest_name(model):
    """As everywhere."""
    with pytest.raises(InputError, match="Did you mean 'LoReFT'"):
        tune_method(model, TASK, "LoREFT", progress=False)


# ------------------------------------------------------------------------------------------------ compare_methods


def test_settings_by_validation_then_one_run_a_seed_on_test(model, asked):
    """Trials first, all on val; then each seed once on test: never back again."""
    fits = []
    table = compare_methods(
        model, TASK, methods=[counted("a", fits), counted("b", fits)], reference="a", seeds=(0, 1, 2), progress=False
    )
    assert asked == (["val"] * 2 + ["test"] * 3) * 2
    assert fits == [(m, x, s) for m in "ba" for x, s in ((1.0, 0), (2.0, 0), (1.0, 0), (1.0, 1), (1.0, 2))]
    assert [r.method for r in table.rows] == ["a", "b"]
    assert table["a"].tried == 2


def test_given_settings_are_not_chosen(model, asked):
    """No trial; the settings as they are."""
    fits = []
    compare_methods(
        model, TASK, methods=[counted("a", fits)], settings={"a": {"x": 7.0}}, reference="a", seeds=(0,), progress=False
    )
    assert fits == [("a", 7.0, 0)]
    assert asked == ["test"]


def test_seedless_once_and_chance_five_times(model):
    """What no seed changes is run with one, what is by chance with five at least."""
    fits = []
    made = [counted("a", fits), counted("once", fits, seeded=False), counted("chance", fits, least_seeds=5)]
    compare_methods(
        model,
        TASK,
        methods=made,
        settings={m.name: {"x": 1.0} for m in made},
        reference="a",
        seeds=(4, 6),
        progress=False,
    )
    assert [s for m, _, s in fits if m == "a"] == [4, 6]
    assert [s for m, _, s in fits if m == "once"] == [4]
    assert [s for m, _, s in fits if m == "chance"] == [0, 1, 2, 3, 4]


def test_runs_that_are_kept_are_not_run_again(model, tmp_path):
    """A comparison that is asked for twice, with damage: nothing is fitted, the same table."""
    fits, options = (
        [],
        {"reference": "a", "seeds": (0, 1), "out": tmp_path, "texts": ["Ann met Bob"], "progress": False},
    )
    first = compare_methods(model, TASK, methods=[counted("a", fits), counted("b", fits)], **options)
    n = len(fits)
    again = compare_methods(model, TASK, methods=[counted("a", fits), counted("b", fits)], **options)
    assert len(fits) == n
    assert again.cells() == first.cells()
    assert {p.name for p in tmp_path.iterdir()} == {"store.json", "runs", "drafts", "locks", "trials"}
    compare_methods(model, TASK, methods=[counted("a", fits)], **{**options, "texts": ["Bob met Ann"]})
    assert len(fits) == n + 2  # other texts: other runs


def test_damage_is_measured_where_texts_are_given(model):
    """KL of each seed and text; none without texts and for the model as it is."""
    made = [counted("a", []), METHODS["zero-shot"]]
    settings = {"a": {"x": 1.0}, "zero-shot": {}}
    options = {"methods": made, "settings": settings, "reference": "a", "progress": False}
    table = compare_methods(model, TASK, texts=["Ann met Bob", "Bob saw Eve"], **options)
    assert table["a"].kl.mean > 0
    assert (table["a"].kl.seeds, table["a"].kl.n) == (2, 2)
    assert table["zero-shot"].kl is None
    assert compare_methods(model, TASK, **options)["a"].kl is None


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["LoFT 3 %"]}, "unknown method"),
        ({"seeds": ()}, "0 seeds"),
        ({"methods": ["zero-shot"]}, "reference 'LoFiT 3 %' is not among"),
        ({"methods": [LEARNED, LEARNED]}, "given twice"),
        ({"workers": 2}, "by name"),
    ],
)
def test_bad_requests_are_refused_first(model, asked, options, message):
    """Nothing is run."""
    with pytest.raises(InputError, match=message):
        compare_methods(model, TASK, progress=False, **options)
    assert asked == []


@needs_hooked
def test_lora_without_its_checkpoint_is_refused_first(hf, asked):
    """A HookedTransformer made in memory cannot be read again as a bridge: said before the first fit, with what to do."""
    plain = copy.deepcopy(hf("llama"))
    plain.config.name_or_path = ""
    loaded = load_model(plain, tokenizer=tiny.tokenizer(), backend="hooked", device="cpu")
    with pytest.raises(ModelError, match="Leave LoRA out"):
        compare_methods(loaded, TASK, methods=[LEARNED, "LoRA"], progress=False)
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
    bench = Workbench(model, TASK)
    sizes = {name: len(m.grid(bench)) for name, m in METHODS.items()}
    assert sizes.pop("zero-shot") == 1
    assert set(sizes.values()) == {TRIALS}
    for name, m in METHODS.items():
        points = [json.dumps(p, sort_keys=True) for p in m.grid(bench)]
        assert len(set(points)) == len(points), name


def test_random_heads_take_over_the_learned_heads_settings(model, monkeypatch):
    """The control differs in its heads alone: no trial of its own, the settings of LoFiT 3 %."""
    fits = []
    own = counted(LEARNED, fits, grid=({"x": 1.0}, {"x": 2.0}))
    chance = counted(CHANCE, fits, grid=({"x": 9.0},), least_seeds=5)
    monkeypatch.setitem(methods.METHODS, LEARNED, own)
    monkeypatch.setitem(methods.METHODS, CHANCE, chance)
    values(monkeypatch, lambda x: x == 2.0)
    table = compare_methods(model, TASK, methods=[CHANCE, LEARNED], progress=False)
    assert {x for m, x, _ in fits if m == CHANCE} == {2.0}
    assert [r.method for r in table.rows] == [CHANCE, LEARNED]
    assert table[CHANCE].tried == 0


def test_several_tasks_give_a_table_each(model):
    """By task name, in the order given."""
    other = Task.from_records("kin2", train=ROWS, val=ROWS, test=ROWS)
    tables = compare_tasks(
        model, [other, TASK], methods=[counted("a", [])], settings={"a": {"x": 1.0}}, reference="a", progress=False
    )
    assert list(tables) == ["kin2", "kin"]
    assert len(tables["kin2"].methods[0].runs[0].result.items) == 3


def test_selectors_are_compared_after_offset_tuning(model):
    """Each selector's K heads, offsets tuned alike, A-norm as the reference; random with five draws."""
    table = compare_selectors(model, TASK, selectors=["random", "A-norm"], seeds=(0,), progress=False)
    assert [r.method for r in table.rows] == ["heads by A-norm", "heads by random"]
    assert table.reference == "heads by A-norm"
    assert len(table.methods[1].runs) == 5
    assert {r.n_parameters for r in table.rows} == {8}  # K = 1 head of size 8
    assert len({r.heads for r in table.methods[1].runs}) > 1
    with pytest.raises(InputError, match="Did you mean 'A-norm'"):
        compare_selectors(model, TASK, selectors=["A-Norm"], progress=False)


def test_method_by_name_or_as_it_is():
    """A method of one's own passes through."""
    own = counted("own", [])
    assert method_of(own) is own
    assert method_of("ITI") is METHODS["ITI"]
    assert method_of("heads by random").least_seeds == 5
