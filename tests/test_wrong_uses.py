"""Wrong uses of the Python API: each gets one clear error, or does what was plainly meant."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import InputError, ModelError
from lofit_lens.interventions.ablation import mean_z
from lofit_lens.training.config import TrainConfig
from lofit_lens.training.selectors import SELECTORS, attribution_scores
from tests.conftest import needs_hooked

pytestmark = pytest.mark.usefixtures("unchecked")
ONE_STEP = TrainConfig(lr=1e-2, max_steps=1, batch_size=2)
SHAPE = (3, 4)
TASK = ll.Task.from_records(
    "own", train=[{"prompt": f"a{i}", "answer": f" b{i}"} for i in range(6)], test=[{"prompt": "c", "answer": " d"}] * 3
)
SCORES = ll.HeadScores([[0.1, 0.9, 0.3, 0.5], [0.7, 0.2, 0.4, 0.6], [0.0, 0.8, 0.15, 0.25]], "A-norm", "tiny", "own")
OTHERS = ll.HeadScores(SCORES.values.flip(1), "probe accuracy", "tiny", "own")
HEADS = SCORES.top(3)
QUIET = {"progress": False}


@pytest.fixture
def model(bridge_llama):
    """A tiny Llama of 3 layers and 4 heads."""
    return bridge_llama


@pytest.fixture
def lofit(model):
    """An adapter with offsets that are not zero."""
    made = ll.Lofit.for_model(model, HEADS)
    return made.init_("v", seed=0, std=1.0).train_only(None)


# ------------------------------------------------------------------------------------------------------ models

TAKES_A_MODEL = {
    "evaluate": lambda m: ll.evaluate(m, TASK),
    "generate": lambda m: ll.generate(m, "a"),
    "damage": lambda m: ll.damage(m, ll.Lofit((3, 4, 8)), ["a b"]),
    "select_heads": lambda m: ll.select_heads(m, TASK, **QUIET),
    "tune_offsets": lambda m: ll.tune_offsets(m, TASK, HEADS, **QUIET),
    "tune_many": lambda m: ll.tune_many(m, [ll.LofitRun(TASK, "v", HEADS)], **QUIET),
    "fit": lambda m: ll.fit(ll.Lofit((3, 4, 8)), m, TASK, ONE_STEP, seed=0),
    "probe_heads": lambda m: ll.probe_heads(m, TASK, **QUIET),
    "reading_vectors": lambda m: ll.reading_vectors(m, TASK, **QUIET),
    "explore": lambda m: ll.explore({"a": SCORES}, m),
    "attached": lambda m: ll.attached(m).__enter__(),
    "for_model": lambda m: ll.Red.for_model(m),
    "geometry": lambda m: ll.analysis.geometry(m, ll.Lofit((3, 4, 8))),
    "promoted_tokens": lambda m: ll.analysis.promoted_tokens(m, ll.Lofit((3, 4, 8))),
    "attention_patterns": lambda m: ll.analysis.attention_patterns(m, ["a"], HEADS),
    "leave_one_out": lambda m: ll.analysis.leave_one_out(m, TASK, ll.Lofit((3, 4, 8)), **QUIET),
    "removal": lambda m: ll.analysis.removal(m, TASK, HEADS, **QUIET),
    "drift": lambda m: ll.analysis.drift(m, ll.Lofit((3, 4, 8)), ["a"], **QUIET),
    "long_context": lambda m: ll.analysis.long_context(m, TASK, ll.Lofit((3, 4, 8)), ["a"], [1], **QUIET),
    "mean_z": lambda m: mean_z(m, ["a"]),
    **{f"selector {name}": (lambda m, s=score: s(m, TASK, progress=False)) for name, score in SELECTORS.items()},
}


@pytest.mark.parametrize("call", TAKES_A_MODEL.values(), ids=TAKES_A_MODEL)
def test_a_plain_model_is_named_with_the_way_to_wrap_it(call, hf):
    """Every function that takes a model says the same of a Hugging Face model, before anything else."""
    with pytest.raises(ModelError, match=r"LlamaForCausalLM is neither .*load_model\(model, tokenizer="):
        call(hf("llama"))


@pytest.mark.parametrize(("wrong", "said"), [
    (lambda: "gpt2", r"load it first: lofit_lens.load_model\('gpt2'\)"), (lambda: ll.Lofit((3, 4, 8)), "with adapter.attached"),
    (lambda: TASK, "a Task is neither"), (lambda: None, "None is neither"), (lambda: ll.Lofit, "the class Lofit"),
])  # fmt: skip
def test_other_things_given_as_a_model(wrong, said):
    """A name, an adapter, a task: the error says what to do with it."""
    with pytest.raises(ModelError, match=said):
        ll.evaluate(wrong(), TASK)


def test_a_peft_model_is_to_be_merged(hf):
    """A PeftModel in memory: merge it, then wrap it."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(copy.deepcopy(hf("llama")), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        ll.evaluate(made, TASK)


# -------------------------------------------------------------------------------------------- tasks and adapters


def test_a_task_may_be_given_by_its_name(model):
    """A name is what load_task takes; the adapter carries the task's own name and hash."""
    made = ll.tune_offsets(model, "organism/kinship", "L1H2", config=ONE_STEP, n_train=2, **QUIET)
    task = ll.load_task("organism/kinship")
    assert (made.meta.task, made.meta.data_hash) == (task.name, task.data_hash)
    assert ll.evaluate(model, "organism/kinship", limit=1, **QUIET).task == task.name


TAKES_A_TASK = {
    "evaluate": lambda m, t: ll.evaluate(m, t),
    "select_heads": lambda m, t: ll.select_heads(m, t, **QUIET),
    "fit": lambda m, t: ll.fit(ll.Red.for_model(m), m, t, ONE_STEP, seed=0),
    "probe_heads": lambda m, t: ll.probe_heads(m, t, **QUIET),
    "drop_edits": lambda m, t: ll.analysis.drop_edits(m, t, ll.Lofit.for_model(m), "L0H0", **QUIET),
    "interference": lambda m, t: ll.analysis.interference(m, dict.fromkeys("ab", (t, ll.Lofit.for_model(m))), **QUIET),
    **{f"selector {name}": (lambda m, t, s=score: s(m, t, progress=False)) for name, score in SELECTORS.items()},
}


@pytest.mark.parametrize("call", TAKES_A_TASK.values(), ids=TAKES_A_TASK)
def test_what_is_no_task_is_refused(call, model):
    """An unknown name is answered with the known ones, anything else with what to give."""
    with pytest.raises(InputError, match=r"unknown task 'organsim/kinship'.*Did you mean 'organism/kinship'"):
        call(model, "organsim/kinship")
    with pytest.raises(InputError, match="task is a HeadScores; give a task"):
        call(model, SCORES)


TAKES_AN_ADAPTER = {
    "damage": lambda m, a: ll.damage(m, a, ["a b"]),
    "attached": lambda m, a: ll.attached(m, a).__enter__(),
    "fit": lambda m, a: ll.fit(a, m, TASK, ONE_STEP, seed=0),
    "drift": lambda m, a: ll.analysis.drift(m, a, ["a"], **QUIET),
    "removal": lambda m, a: ll.analysis.removal(m, TASK, HEADS, adapter=a, draws=1, how="zero", **QUIET),
    "long_context": lambda m, a: ll.analysis.long_context(m, TASK, a, ["a"], [1], **QUIET),
    "affine": lambda m, a: ll.sharing.affine(a),
    "export_svec": lambda m, a: ll.export_svec(a, "nowhere.svec"),
}


@pytest.mark.parametrize("call", TAKES_AN_ADAPTER.values(), ids=TAKES_AN_ADAPTER)
def test_what_is_no_adapter_is_refused(call, model):
    """A folder's name is to be loaded first; a class, a number and a model are named for what they are."""
    with pytest.raises(InputError, match=r"'out/tqa' is not an adapter; load it first: load_adapter\('out/tqa'\)"):
        call(model, "out/tqa")
    for wrong in (ll.Lofit, 5, model, HEADS):
        with pytest.raises(InputError, match="is not an adapter"):
            call(model, wrong)


def test_an_adapter_in_a_later_place_is_a_clear_error(model, lofit):
    """evaluate(model, task, lofit): the error says how an adapter is evaluated."""
    with pytest.raises(InputError, match=r"given a Lofit as well; .*with adapter.attached\(model\)"):
        ll.evaluate(model, TASK, lofit)
    with pytest.raises(InputError, match="lofit is a HeadScores; give a LoFiT adapter"):
        ll.analysis.leave_one_out(model, TASK, SCORES, **QUIET)


# ------------------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("written", [str(HEADS), str(HEADS).replace(" ", ", "), repr(HEADS), list(HEADS), HEADS])
def test_what_print_shows_is_taken(written, model):
    """The text of print(heads), with commas too, and that of repr(heads), which tells the shape as well."""
    assert ll.HeadSet(written).heads == HEADS.heads
    assert ll.HeadSet(repr(HEADS)).shape == SHAPE
    assert ll.tune_offsets(model, TASK, written, config=ONE_STEP, n_train=2, **QUIET).heads.heads == HEADS.heads


def test_head_sets_go_with_heads_written_otherwise(lofit):
    """& | - in == and restrict take a text as well as a head set."""
    first, rest = str(HEADS[0]), str(HEADS[1:])
    assert (HEADS & first).heads == HEADS.heads[:1]
    assert (HEADS - first) == rest
    assert (HEADS | "L2H0").heads[3:] == ((2, 0),)
    assert first in HEADS
    assert list(HEADS[0]) in HEADS
    assert str(HEADS) == HEADS
    assert first != HEADS
    assert HEADS != "nonsense"
    assert hash(HEADS) == hash(str(HEADS))
    assert isinstance(HEADS[:2], ll.HeadSet)
    assert HEADS[:2].scores == HEADS.scores[:2]
    assert lofit.restrict(first).heads.heads == HEADS.heads[:1]


@pytest.mark.parametrize(("wrong", "said"), [
    (SCORES, r"best ones, .top\(k\)"), (5, "5 is not a set of heads"), (None, "None is not a set"),
    ("L1H2 ...", "leaves heads out"),
    ("HeadSet(13 heads: L0H1 ...)", "leaves heads out"), ({"a": 1}, "is not a set of heads"), ([True, 1], "True is not a head"),
    (ll.Lofit((3, 4, 8)), "give its .heads"),
])  # fmt: skip
def test_what_is_no_head_set_is_refused(wrong, said):
    """Each says what to give instead."""
    with pytest.raises(InputError, match=said):
        ll.HeadSet(wrong)


def test_heads_of_another_model_are_not_renamed():
    """A head set that knows its model is not taken for another model's."""
    with pytest.raises(InputError, match=r"\(3, 4\).*\(6, 16\)"):
        ll.HeadSet(HEADS, shape=(6, 16))
    with pytest.raises(InputError, match="not of"):
        ll.explore({"a": SCORES}).selection = ll.HeadSet("L0H0", shape=(6, 16))


@pytest.mark.parametrize("wrong", [(0, 0), (-1, 2), (6,), "6x16", (1.5, 2), 6])
def test_a_shape_is_two_whole_numbers(wrong):
    """Else the grid of heads would be another one in silence."""
    for call in (ll.HeadSet.all, lambda shape: ll.HeadSet("L0H0", shape=shape), HEADS.mask):
        with pytest.raises(InputError, match=r"shape is|n_layers is|n_heads is"):
            call(wrong)


def test_an_adapters_numbers_are_taken_by_a_heads_name(lofit):
    """v["L0H1"] is that head's row, v[heads] one row a head; other indices are torch's, and algebra gives plain tensors."""
    head = HEADS[0]
    assert torch.equal(lofit.v[str(head)], lofit.v[head])
    assert lofit.v[str(head)].shape == (8,)
    assert torch.equal(lofit.v[HEADS], torch.stack([lofit.v[h] for h in HEADS]))
    assert lofit.v[1].shape == (4, 8)
    assert type(lofit.v + 1) is torch.Tensor
    assert bool((lofit.A["L0H0 L0H1"] == 0).all())
    assert copy.deepcopy(lofit).v[str(head)].shape == (8,)
    for wrong in ("foo", "L9H0"):
        with pytest.raises(InputError, match=wrong):
            lofit.v[wrong]


def test_scores_are_an_array_for_numpy_pandas_and_torch():
    """[n_layers, n_heads] for all three; len and iteration go over layers, as of an array."""
    assert np.array_equal(np.asarray(SCORES), SCORES.values.numpy())
    assert np.asarray(SCORES, dtype=np.float32).dtype == np.float32
    assert pd.DataFrame(SCORES).shape == SHAPE
    assert torch.equal(torch.as_tensor(SCORES), SCORES.values)
    assert len(SCORES) == 3
    assert [row.shape for row in SCORES] == [(4,)] * 3
    assert SCORES["L0H1"] == 0.9


# ---------------------------------------------------------------------------------- things by name: sets and scores


def test_head_sets_without_names_are_taken():
    """A list, one alone: by label where labels differ, else by place; figures of one panel take one set."""
    assert ll.analysis.overlap([HEADS, OTHERS.top(3)])["a"].tolist() == [HEADS.label]
    assert ll.analysis.overlap([HEADS, SCORES.top(2)])[["a", "b"]].to_numpy().tolist() == [["1", "2"]]
    assert ll.analysis.overlap({"x": "L0H1", "y": ["L0H1", "L1H0"]}, shape=SHAPE)["shared"].tolist() == [1]
    assert ll.analysis.layer_shares(HEADS)["count"].tolist() == [1, 1, 1]
    assert ll.analysis.score_agreement([SCORES, OTHERS])["a"].tolist() == ["1"]
    assert ll.analysis.stability({"a": SCORES, "b": OTHERS}, [1])["n_runs"].tolist() == [2]
    figure = ll.plots.head_grid(SCORES, HEADS)
    assert [list(t.x) for t in figure.data if t.name == "chosen"] == [[h.head for h in HEADS]]
    assert len(ll.plots.layer_distribution([HEADS, OTHERS.top(2)]).data) == 2
    assert ll.explore([SCORES, HEADS]).names == ("own", HEADS.label)


@pytest.mark.parametrize("call", [
    ll.plots.layer_distribution, ll.analysis.overlap, ll.analysis.layer_shares, ll.analysis.mean_layers,
    ll.analysis.mean_layer_differences, lambda sets: ll.plots.head_grid(SCORES, sets),
])  # fmt: skip
def test_scores_in_the_place_of_head_sets_say_what_to_choose(call):
    """Scores of all heads are no set; anything else neither."""
    for wrong in (SCORES, {"own": SCORES}):
        with pytest.raises(InputError, match=r"give the best ones, .top\(k\)"):
            call(wrong)
    for wrong in (5, ["L0H0"], "nonsense"):
        with pytest.raises(InputError, match=r"not head sets by name|not a head"):
            call(wrong)


def test_a_head_set_for_several_panels_is_named():
    """Two panels: which one is meant has to be said."""
    with pytest.raises(InputError, match="name them as the panels: a, b"):
        ll.plots.head_grid({"a": SCORES, "b": OTHERS}, HEADS)


# --------------------------------------------------------------------------------- numbers, seeds, splits, texts

WRONG_NUMBERS = (0, -1, 1.5, "5", True, float("nan"), [5], None)
NUMBERS = {
    "evaluate batch_size": lambda m, n: ll.evaluate(m, TASK, batch_size=n),
    "evaluate limit": lambda m, n: ll.evaluate(m, TASK, limit=n),
    "generate max_new_tokens": lambda m, n: ll.generate(m, "a", max_new_tokens=n),
    "damage max_tokens": lambda m, n: ll.damage(m, ll.Lofit.for_model(m), ["a"], max_tokens=n),
    "select_heads n_train": lambda m, n: ll.select_heads(m, TASK, n_train=n, config=ONE_STEP, **QUIET),
    "fit_probes max_iter": lambda m, n: ll.fit_probes(m, TASK, max_iter=n, **QUIET),
    "attribution batch_size": lambda m, n: attribution_scores(m, TASK, batch_size=n, **QUIET),
    "TrainConfig epochs": lambda m, n: TrainConfig(lr=0.1, epochs=n),
    "TrainConfig max_steps": lambda m, n: TrainConfig(lr=0.1, max_steps=n),
    "Passes token_budget": lambda m, n: ll.Passes(token_budget=n),
    "keep_only draws": lambda m, n: ll.analysis.keep_only(m, TASK, ll.Lofit.for_model(m), draws=n, **QUIET),
    "sweep resamples": lambda m, n: ll.analysis.sweep({"a": {1: [1, 0]}}, resamples=n),
    "LoReft rank": lambda m, n: ll.LoReft.for_model(m, rank=n, seed=0),
    "PostBlock rank": lambda m, n: ll.PostBlock.for_model(m, rank=n, seed=0),
    "from_records max_new_tokens": lambda m, n: ll.Task.from_records("x", train=[], test=[], max_new_tokens=n),
    "HeadSet top": lambda m, n: HEADS.top(n),
}
MAY_BE_NONE = ("limit", "n_train", "max_steps", "token_budget", "evaluate batch_size")


@pytest.mark.parametrize(("name", "call"), NUMBERS.items(), ids=NUMBERS)
def test_a_count_is_a_whole_number_of_one_or_more(name, call, model):
    """Each wrong number is refused with its value."""
    for wrong in WRONG_NUMBERS:
        if wrong is not None or not {name, name.split()[-1]} & {*MAY_BE_NONE}:
            said = "give [12] (or more|to )" if type(wrong) is int else "give a whole number"
            with pytest.raises(InputError, match=rf"{re.escape(repr(wrong))}; {said}|K (= 0|= -1|must be)"):
                call(model, wrong)


SEEDS = {
    "select_heads": lambda m, s: ll.select_heads(m, TASK, seed=s, config=ONE_STEP, **QUIET),
    "fit": lambda m, s: ll.fit(ll.Red.for_model(m), m, TASK, ONE_STEP, seed=s),
    "HeadSet.random": lambda m, s: ll.HeadSet.random(SHAPE, 2, seed=s),
    "training_examples": lambda m, s: TASK.training_examples(seed=s),
    "damage": lambda m, s: ll.damage(m, ll.Lofit.for_model(m), ["a b"], seed=s, **QUIET),
    "mean_layers": lambda m, s: ll.analysis.mean_layers({"a": HEADS}, seed=s),
    "sweep": lambda m, s: ll.analysis.sweep({"a": {1: [1, 0]}}, seed=s),
    "LoReft": lambda m, s: ll.LoReft.for_model(m, seed=s),
    "PostBlock": lambda m, s: ll.PostBlock.for_model(m, seed=s),
    **{
        f"selector {name}": (lambda m, s, f=score: f(m, TASK, seed=s, progress=False))
        for name, score in SELECTORS.items()
    },
}


@pytest.mark.parametrize("call", SEEDS.values(), ids=SEEDS)
def test_a_seed_that_is_none_is_refused(call, model):
    """None would draw other numbers at each run; fractions, texts and negative numbers are no seeds either."""
    for wrong in (None, -1, 1.5, "0", True, 2**70, np.int64(3)):
        with pytest.raises(InputError, match="seed is "):
            call(model, wrong)


@pytest.mark.parametrize("wrong", ["tset", None, ["test"], 5])
def test_a_split_is_one_of_the_tasks(wrong, model):
    """A list cannot even be looked up."""
    with pytest.raises(InputError, match="unknown split"):
        ll.evaluate(model, TASK, split=wrong)


TEXTS = {
    "generate": lambda m, t: ll.generate(m, t),
    "attention_patterns": lambda m, t: ll.analysis.attention_patterns(m, t, HEADS),
    "mean_z": mean_z,
    "drift": lambda m, t: ll.analysis.drift(m, ll.Lofit.for_model(m), t, **QUIET),
    "explore": lambda m, t: ll.explore({"a": SCORES}, prompts=t),
}


@pytest.mark.parametrize("call", TEXTS.values(), ids=TEXTS)
def test_texts_are_texts(call, model):
    """Numbers, bytes, None and mappings are refused with what they are."""
    for wrong in (5, [5], b"x", [None], {"a": "b"}, None):
        with pytest.raises(InputError, match="texts"):
            call(model, wrong)


def test_one_prompt_is_not_read_letter_by_letter(model):
    """A text where a list is wanted is one prompt."""
    found = ll.analysis.attention_patterns(model, "hello world", HEADS)
    assert found.prompts == ("hello world",)


@pytest.mark.parametrize(("call", "said"), [
    (lambda m: ll.select_heads(m, TASK, config={"lr": 0.1}, **QUIET), "config is {'lr': 0.1}; give a TrainConfig"),
    (lambda m: ll.select_heads(m, TASK, config={}, **QUIET), "config is {}"),
    (lambda m: TrainConfig(lr="1e-3"), "lr is '1e-3'; give a finite number"),
    (lambda m: TrainConfig(lr=0.1, betas=5), "betas is 5"),
    (lambda m: ll.Passes(fused="no"), "fused is 'no'; give True or False"),
    (lambda m: ll.tune_many(m, [TASK]), "runs is"),
    (lambda m: ll.LofitRun(TASK, "B", HEADS).fit(m), "unknown component 'B'"),
    (lambda m: ll.Lofit.for_model(m).norms("B"), "unknown component 'B'"),
    (lambda m: ll.preset(ll.model_info(m), "x", "stf"), "unknown objective 'stf'"),
    (lambda m: ll.compare(5, 5), "a result is 5; give what evaluate returns"),
    (lambda m: ll.over_seeds("x"), "a result is 'x'"),
    (lambda m: 2.5 * ll.Lofit.for_model(m) * float("nan"), "factor is nan"),
    (lambda m: ll.Lofit.for_model(m) + 1, "the other adapter is 1"),
    (lambda m: HEADS.restrict("12"), "layers is '12'"),
    (lambda m: ll.Red.for_model(m, layers=[1.5]), "layer is 1.5"),
    (lambda m: ll.Positions.parse(5), "unknown positions '5'"),
    (lambda m: ll.analysis.sweep({"a": [1, 2]}), "series 'a' is"),
    (lambda m: ll.analysis.transfer_matrix({1: [1]}), "runs is"),
    (lambda m: ll.plots.k_sweep({"a": 1}), "this table is {'a': 1}"),
    (lambda m: ll.plots.drift_layers(SCORES), "drift is a HeadScores; give what analysis.drift gives"),
    (lambda m: ll.plots.keep_figure(None), "found is None; give what analysis.keep_only gives"),
    (lambda m: ll.plots.layer_distribution(HEADS, n_layers=1), "n_layers is 1, and there is a head in layer"),
    (lambda m: ll.Task.from_records("x", train="abc", test=[]), "'abc' is not a list of records"),
    (lambda m: ll.load_task(5), "name is 5"),
])  # fmt: skip
def test_other_wrong_values_are_named(call, said, model):
    """One example of each further kind."""
    with pytest.raises(InputError) as e:
        call(model)
    assert said in str(e.value)


def test_records_may_be_a_table():
    """A table's rows are records; its own iteration gives the names of the columns."""
    rows = pd.DataFrame([{"prompt": "a", "answer": " b"}])
    assert ll.Task.from_records("x", train=rows, test=rows).test["test"][0].prompt == "a"


# -------------------------------------------------------------------------------------------------- gradients


def test_training_goes_on_where_gradients_are_switched_off(model):
    """torch.set_grad_enabled(False) at the top of a notebook: the same numbers as without it, and it stays switched off."""
    runs = {
        "select": lambda: ll.select_heads(model, TASK, config=ONE_STEP, **QUIET).values,
        "tune": lambda: ll.tune_offsets(model, TASK, HEADS, config=ONE_STEP, **QUIET).v.detach(),
        "attribution": lambda: attribution_scores(model, TASK, **QUIET).values,
        "checkpointed": lambda: ll.tune_offsets(
            model, TASK, HEADS, config=ONE_STEP, passes=ll.Passes(checkpointing=True), **QUIET
        ).v.detach(),
    }
    with torch.set_grad_enabled(True):
        expected = {name: run() for name, run in runs.items()}
    with torch.set_grad_enabled(False):
        found = {name: run() for name, run in runs.items()}
        assert not torch.is_grad_enabled()
    assert all(torch.equal(found[name], expected[name]) for name in runs)


@pytest.mark.parametrize("method", ["red", "loreft", "lora"])
def test_every_trained_method_learns_without_gradients_switched_on(method, model):
    """RED, LoReFT and LoRA go through the same loop."""
    make = {"red": ll.Red.for_model, "loreft": ll.LoReft.for_model, "lora": ll.Lora.for_model}[method]
    with torch.no_grad():
        adapter = make(model) if method == "red" else make(model, seed=0)
        before = [p.detach().clone() for p in adapter.parameters()]
        ll.fit(adapter, model, TASK, ONE_STEP, seed=0, **QUIET)
    assert any(not torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))


@pytest.mark.parametrize("call", [
    lambda m: ll.select_heads(m, TASK, config=ONE_STEP, **QUIET),
    lambda m: ll.tune_offsets(m, TASK, HEADS, config=ONE_STEP, **QUIET),
    lambda m: attribution_scores(m, TASK, **QUIET),
])  # fmt: skip
def test_inference_mode_is_refused(call, model):
    """Nothing can be differentiated there."""
    with torch.inference_mode(), pytest.raises(InputError, match="leave its block first"):
        call(model)


# --------------------------------------------------------------------------------------------- processed weights


def test_compatibility_mode_without_processing_is_not_processed(checkpoint):
    """It renames hooks; the weights stay Hugging Face's."""
    model = ll.load_model(checkpoint("gpt2"), backend="bridge", device="cpu")
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert not ll.model_info(model).processed
    model.enable_compatibility_mode(disable_warnings=True)
    assert ll.model_info(model).processed


@needs_hooked
@pytest.mark.parametrize("change", [
    {"center_writing_weights": True}, {"refactor_factored_attn_matrices": True}, {"fold_ln": True}, {"fold_value_biases": True},
])  # fmt: skip
def test_each_kind_of_processing_is_seen(change, checkpoint):
    """Weights that were centered or factored count, layer norms folded or not."""
    model = ll.load_model(checkpoint("gpt2"), backend="hooked", device="cpu")
    assert not ll.model_info(model).processed
    none = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(model.state_dict(), **{**none, **change})
    assert ll.model_info(model).processed


@pytest.mark.parametrize("name", ["", " "])
def test_a_model_without_a_name_is_not_the_current_folder(name):
    """`Path("")` would be it."""
    with pytest.raises(ModelError, match="the model's name is"):
        ll.load_model(name)
