"""AISteer360's steering vectors: bit-equal round trips, what its own rules make of a file, other tools' files, and refusals."""

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch

from lofit_lens import HeadScores, HeadSet, Lofit
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.interventions import HeadAblation
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import ModelInfo, logits_of, model_info, source_of
from lofit_lens.sharing.svec import export_svec, import_svec
from tests.adapters import CHOSEN, output_projection, random_adapter
from tests.test_iti import random_iti, small
from tests.test_iti_dict import Trap

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
SHAPE = (3, 4, 8)
SCORED = HeadSet(CHOSEN.heads, scores=[0.5, 0.9, 0.7])  # L2H1 L0H3 L2H0


def offsets(heads=CHOSEN):
    """A LoFiT adapter of no model: 3 layers of 4 heads of d_head 8."""
    lofit = Lofit((3, 4, 8), heads, AdapterMeta(task="mquake", seed=3, config={"lr": 0.1}, history=[{"loss": 1.0}]))
    with torch.no_grad():
        for i, head in enumerate(lofit.heads):
            lofit.v[head] = torch.randn(8, generator=torch.Generator().manual_seed(i))
    return lofit


def write(path, record):
    path.write_text(json.dumps(record))
    return path


def theirs(**changes):
    """What AISteer360 writes itself: every head of layers 0 and 1 (of 3), accuracies, no `meta`."""
    generator = torch.Generator().manual_seed(5)
    record = {
        "model_type": "llama",
        "directions": {str(i): torch.randn(4, 8, generator=generator).tolist() for i in range(2)},
        "num_heads": 4, "head_dim": 8,
        "probe_accuracies": {f"{i}:{j}": acc for (i, j), acc in zip(
            [(i, j) for i in range(2) for j in range(4)], [0.5, 0.8, 0.6, 0.5, 0.7, 0.8, 0.4, 0.3], strict=True)},
    }  # fmt: skip
    return {k: x for k, x in (record | changes).items() if x is not None}


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("heads", [CHOSEN, SCORED], ids=["unscored", "scored"])
@pytest.mark.parametrize("make", [lambda heads: small(heads=heads, alpha=3.0, positions="last"), offsets])
def test_a_round_trip_is_bit_equal(tmp_path, make, heads):
    """All tensors, heads in order with scores, strength, positions and provenance; the training history is left behind."""
    adapter = make(heads)
    back = import_svec(export_svec(adapter, tmp_path / "x.svec", model_type="llama"))
    assert type(back) is type(adapter)
    assert back.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in adapter.state_dict().items())
    assert (back.heads, str(back.positions), back.shape) == (adapter.heads, str(adapter.positions), adapter.shape)
    assert getattr(back, "alpha", None) == getattr(adapter, "alpha", None)
    assert (back.meta.task, back.meta.seed, back.meta.config) == (
        adapter.meta.task,
        adapter.meta.seed,
        adapter.meta.config,
    )
    assert back.meta.history == []


def test_the_base_model_stays_in_it(bridge_llama, tmp_path):
    """The adapter that is read knows the model it was made for, a folder by its last name alone; its type was read there."""
    adapter = random_iti(bridge_llama)
    file = export_svec(adapter, tmp_path / "x.svec")
    assert json.loads(file.read_text())["model_type"] == "llama"
    made_for = model_info(bridge_llama)
    assert import_svec(file).meta.model == made_for
    folder = Path(source_of(made_for.name, made_for.revision))
    assert (folder.is_absolute(), folder.name) == (True, made_for.name)
    assert str(folder.parent) not in file.read_text()
    assert "platform" not in json.loads(file.read_text())["meta"]["lofit_lens"]["record"]["versions"]


def test_the_file_by_hand(tmp_path):
    """sigma * d in float32 at the chosen heads of layers that have one, 0 at the others; scores of the chosen heads alone."""
    iti = small(heads=SCORED)
    record = json.loads(export_svec(iti, tmp_path / "x.svec", model_type="llama").read_text())
    assert sorted(record["directions"]) == ["0", "2"]
    assert (record["num_heads"], record["head_dim"]) == (4, 8)
    for layer, rows in record["directions"].items():
        for head, row in enumerate(rows):
            at = [i for i, h in enumerate(iti.heads) if h == (int(layer), head)]
            expected = (iti.sigma[at[0]] * iti.directions[at[0]]).tolist() if at else [0.0] * 8
            assert row == expected
    assert record["probe_accuracies"] == {"2:1": 0.5, "0:3": 0.9, "2:0": 0.7}


def test_scores_can_be_given(tmp_path):
    """Of every head; the adapter's own are written, and without any there is no field. Another model's are refused."""
    scores = HeadScores([[(4 * i + j) / 12 for j in range(4)] for i in range(3)])
    record = json.loads(export_svec(offsets(), tmp_path / "x.svec", scores=scores, model_type="llama").read_text())
    assert record["probe_accuracies"] == {"2:1": 9 / 12, "0:3": 3 / 12, "2:0": 8 / 12}
    assert "probe_accuracies" not in json.loads(
        export_svec(offsets(), tmp_path / "y.svec", model_type="llama").read_text()
    )
    with pytest.raises(InputError, match="scores of 2 layers of 4 heads for an adapter of 3 of 4"):
        export_svec(offsets(), tmp_path / "z.svec", scores=HeadScores(torch.ones(2, 4)), model_type="llama")


# ------------------------------------------------------------------------------- what the other tool makes of a file


@torch.no_grad()
def steered(plain, file, *, alpha, num_heads):
    """Logits with a file used by AISteer360's rules: float32 rows, the `num_heads` best by accuracy, alpha * row added."""
    record = json.loads(file.read_text())
    directions = {int(layer): torch.tensor(rows, dtype=torch.float32) for layer, rows in record["directions"].items()}
    accuracies = {tuple(map(int, key.split(":"))): float(acc) for key, acc in record["probe_accuracies"].items()}
    chosen = [at for at, _ in sorted(accuracies.items(), key=lambda item: item[1], reverse=True)[:num_heads]]
    d_head, handles = record["head_dim"], []
    for layer in {layer for layer, _ in chosen}:

        def hook(module, args, layer=layer):
            out = args[0].clone()
            for head in (head for at, head in chosen if at == layer):
                out[:, :, head * d_head : (head + 1) * d_head] += alpha * directions[layer][head]
            return (out,)

        handles.append(output_projection(plain, layer).register_forward_pre_hook(hook))
    logits = plain(TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("method", ["iti", "lofit"])
@torch.no_grad()
def test_their_rules_give_the_same_logits(loaded, hf, tmp_path, caplog, architecture, method):
    """At all positions, with the strength and number of heads that the log names; more heads change nothing."""
    model, plain = loaded(architecture, "bridge"), hf(architecture)
    adapter = random_iti(model, heads=SCORED) if method == "iti" else random_adapter(model, SCORED, A=0.0)
    with caplog.at_level(logging.INFO, "lofit_lens"):
        file = export_svec(adapter, tmp_path / "x.svec")
    alpha = adapter.alpha if method == "iti" else 1.0
    assert f"alpha={alpha:g}, num_heads=3, token_scope='all'" in caplog.text
    with adapter.attached(model):
        got = logits_of(model, TOKENS, torch.ones_like(TOKENS))
    for num_heads in (3, 48):
        expected = steered(plain, file, alpha=alpha, num_heads=num_heads)
        assert (got - expected).abs().max() < 1e-5
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05


@torch.no_grad()
def test_their_file_gives_the_same_logits_here(loaded, hf, tmp_path):
    """The three best of their accuracies, alpha 4, all positions: their rules on plain Hugging Face against the ITI read."""
    model, plain = loaded("llama", "bridge"), hf("llama")
    file = write(tmp_path / "x.svec", theirs())
    iti = import_svec(file, heads=3, shape=SHAPE, alpha=4.0, positions="all")
    with iti.attached(model):
        got = logits_of(model, TOKENS, torch.ones_like(TOKENS))
    assert (got - steered(plain, file, alpha=4.0, num_heads=3)).abs().max() < 1e-5
    assert str(iti.heads) == "L0H1 L1H1 L1H0"  # equal accuracies in the file's order
    assert iti.heads.scores == (0.8, 0.8, 0.7)


def test_their_file_by_hand(tmp_path):
    """Row (3, 4, 0, ...): sigma 5, d (0.6, 0.8, 0, ...); a row of zeros keeps its head. Defaults are theirs."""
    rows = [[3.0, 4.0] + [0.0] * 6, [0.0] * 8] + [[1.0] * 8] * 2
    file = write(tmp_path / "x.svec", theirs(directions={"1": rows}, probe_accuracies=None))
    iti = import_svec(file, heads=HeadSet(["L1H1", "L1H0"]), shape=SHAPE)
    assert iti.sigma.tolist() == [0.0, 5.0]
    assert iti.directions.tolist() == [[0.0] * 8, torch.tensor([0.6, 0.8] + [0.0] * 6).tolist()]
    assert (iti.alpha, str(iti.positions), iti.shape, iti.heads.scores) == (15.0, "answer", (3, 4, 8), None)
    assert iti.meta.config["made_by"] == "AISteer360"


def test_scores_of_a_given_head_set_are_kept(tmp_path):
    """The file's accuracies serve where the set has none."""
    file = write(tmp_path / "x.svec", theirs())
    given = import_svec(file, heads=HeadSet(["L0H2"], scores=[7.0]), shape=SHAPE)
    assert given.heads.scores == (7.0,)
    assert import_svec(file, heads=HeadSet(["L0H2"]), shape=SHAPE).heads.scores == (0.6,)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_their_file_needs_what_it_does_not_say(tmp_path):
    """Heads and number of layers are asked for, and must fit it."""
    file = write(tmp_path / "x.svec", theirs())
    for given in ({}, {"heads": 3}, {"shape": SHAPE}):
        with pytest.raises(InputError, match=r"8 heads of the layers 0 to 1.*give heads=48"):
            import_svec(file, **given)
    for heads in (0, 9):
        with pytest.raises(InputError, match=f"heads={heads} is not possible: it has 8"):
            import_svec(file, heads=heads, shape=SHAPE)
    with pytest.raises(InputError, match="heads=True is no number of heads"):
        import_svec(file, heads=True, shape=SHAPE)
    with pytest.raises(InputError, match="L2H0; its layers are 0, 1"):
        import_svec(file, heads=HeadSet(["L2H0"]), shape=SHAPE)
    with pytest.raises(InputError, match="L1H1 is outside this model"):
        import_svec(file, heads=3, shape=(1, 4, 8))
    for shape in ((3, 5, 8), (3, 4, 9)):
        with pytest.raises(InputError, match=r"for heads of shape \(4, 8\), and the model's are"):
            import_svec(file, heads=3, shape=shape)
    with pytest.raises(InputError, match="L0H4 is outside this model"):
        import_svec(file, heads=HeadSet(["L0H4"]), shape=SHAPE)


@pytest.mark.parametrize("change", [{"directions": {"0": [[1.0] * 8] * 4, "3": [[1.0] * 8] * 4}},
                                    {"probe_accuracies": {"0:1": 0.5, "3:0": 0.4}}])  # fmt: skip
def test_layers_beyond_the_model_are_refused(tmp_path, change):
    """Even where no head of theirs is chosen: it is another model's file."""
    file = write(tmp_path / "x.svec", theirs(**change))
    with pytest.raises(InputError, match=r"x\.svec: it holds layer 3, and the model has 3 layers"):
        import_svec(file, heads=HeadSet(["L0H1"]), shape=SHAPE)
    assert import_svec(file, heads=HeadSet(["L0H1"]), shape=(4, 4, 8)).shape == (4, 4, 8)


@pytest.mark.parametrize("given", [{"heads": 3}, {"alpha": 1.0}, {"positions": "all"}])
def test_our_file_says_it_all(tmp_path, given):
    """Arguments that it would not follow are refused."""
    file = export_svec(small(), tmp_path / "x.svec", model_type="llama")
    with pytest.raises(InputError, match="says its heads, strength and positions itself"):
        import_svec(file, **given)


def test_the_models_shape_is_checked_for_ours_too(tmp_path):
    """Layers, heads and their size."""
    file = export_svec(small(), tmp_path / "x.svec", model_type="llama")
    assert import_svec(file, shape=SHAPE).shape == SHAPE
    for shape in ((2, 4, 8), (3, 5, 8), (3, 4, 9)):
        with pytest.raises(InputError, match="it is for"):
            import_svec(file, shape=shape)


NAN, INF = float("nan"), float("inf")
ROWS = theirs()["directions"]["0"]
WRONG = {
    "no model type": (theirs(model_type=None), "lacks directions or model_type"),
    "an empty model type": (theirs(model_type=""), "lacks directions or model_type"),
    "no directions": (theirs(directions=None), "lacks directions or model_type"),
    "empty directions": (theirs(directions={}), "lacks directions or model_type"),
    "a list of directions": (theirs(directions=[ROWS]), "lacks directions or model_type"),
    "another JSON": ({"kind": "lofit_lens.HeadSet"}, "lacks directions"),
    "the residual stream's": (theirs(num_heads=None, head_dim=None), "of the residual stream and not of heads"),
    "a number of heads that is none": (theirs(num_heads="4"), "num_heads is '4'"),
    "a negative number of heads": (theirs(num_heads=-4), "num_heads is -4"),
    "too few rows": (theirs(num_heads=5), r"directions\['0'\] has shape \[4, 8\].*\[5, 8\]"),
    "short rows": (theirs(head_dim=9), r"has shape \[4, 8\].*\[4, 9\]"),
    "ragged rows": (theirs(directions={"0": [*ROWS[:3], [1.0]]}), "no table of numbers"),
    "a row of text": (theirs(directions={"0": [["1"] * 8] * 4}), "expected numbers"),
    "keys of an older version": (theirs(directions={"0:1": ROWS[0]}), "'0:1' is not a layer"),
    "a layer twice": (theirs(directions={"1": ROWS, "01": ROWS}), "'01' is not a layer"),
    "a layer with a space": (theirs(directions={" 1": ROWS}), "' 1' is not a layer"),
    "NaN": (theirs(directions={"0": [*ROWS[:3], [NAN] * 8]}), "NaN"),
    "infinity": (theirs(directions={"0": [*ROWS[:3], [INF] * 8]}), "nfinity"),
    "too large": (theirs(directions={"0": [*ROWS[:3], [1e39] * 8]}), "too large for float32"),
    "accuracies in a list": (theirs(probe_accuracies=[0.5]), "probe_accuracies is list"),
    "an accuracy of another head": (theirs(probe_accuracies={"0:4": 0.5}), "'0:4', and there are 4 heads"),
    "an accuracy of no head": (theirs(probe_accuracies={"0": 0.5}), "'' is not the head of '0'"),
    "an accuracy of NaN": (theirs(probe_accuracies={"0:1": NAN}), "NaN"),
    "an accuracy of text": (theirs(probe_accuracies={"0:1": "0.5"}), "expected numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused(tmp_path, case):
    """Each with its own reason and the file's name."""
    record, message = WRONG[case]
    with pytest.raises(DataError, match=message) as caught:
        import_svec(write(tmp_path / "x.svec", record), heads=1, shape=SHAPE)
    assert "x.svec" in str(caught.value)


def test_a_layer_twice_is_refused(tmp_path):
    """JSON would let the last one win."""
    text = json.dumps(theirs()).replace('"1": [', '"0": [')
    (tmp_path / "x.svec").write_text(text)
    with pytest.raises(DataError, match="twice"):
        import_svec(tmp_path / "x.svec", heads=1, shape=SHAPE)


def cut(record, *path):
    for key in path[:-1]:
        record = record[key]
    del record[path[-1]]


CHANGED = {
    "a direction": lambda r: r["directions"]["0"][3].__setitem__(0, 9.0),
    "a direction of another head": lambda r: r["directions"]["0"][0].__setitem__(0, 9.0),
    "a layer less": lambda r: cut(r, "directions", "0"),
    "a sigma": lambda r: r["meta"]["lofit_lens"]["tensors"]["sigma"].__setitem__(0, 9.0),
    "a sigma of NaN": lambda r: r["meta"]["lofit_lens"]["tensors"]["sigma"].__setitem__(0, NAN),
    "a sigma too large": lambda r: r["meta"]["lofit_lens"]["tensors"]["sigma"].__setitem__(0, 1e300),
    "a sigma beyond all floats": lambda r: r["meta"]["lofit_lens"]["tensors"]["sigma"].__setitem__(0, 10**400),
    "a sigma of text": lambda r: r["meta"]["lofit_lens"]["tensors"]["sigma"].__setitem__(0, "x"),
    "no sigma": lambda r: cut(r, "meta", "lofit_lens", "tensors", "sigma"),
    "no tensors": lambda r: cut(r, "meta", "lofit_lens", "tensors"),
    "no record": lambda r: cut(r, "meta", "lofit_lens", "record"),
    "no heads": lambda r: cut(r, "meta", "lofit_lens", "record", "heads"),
    "a list": lambda r: r["meta"].update(lofit_lens=[1]),
    "a record in a list": lambda r: r["meta"]["lofit_lens"].update(record=[1]),
    "another method": lambda r: r["meta"]["lofit_lens"]["record"].update(method="lora"),
    "a newer schema": lambda r: r["meta"]["lofit_lens"]["record"].update(lofit_lens_schema=99),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_file_of_ours_that_was_changed_is_refused(tmp_path, case):
    """The record in it and the directions have to agree."""
    file = export_svec(small(), tmp_path / "x.svec", model_type="llama")
    record = json.loads(file.read_text())
    CHANGED[case](record)
    with pytest.raises(DataError, match=r"x\.svec.*(changed since|is damaged|NaN is not)") as caught:
        import_svec(write(file, record))
    assert "svec-" not in str(caught.value)  # the folder that it was read through is gone


def test_an_ablation_in_our_record_is_refused(tmp_path):
    """A whole adapter of a method that no file is written of."""
    made = HeadAblation((3, 4, 8), CHOSEN, values=torch.zeros(3, 8))
    file = export_svec(small(), tmp_path / "x.svec", model_type="llama")
    record = json.loads(file.read_text())
    record["meta"]["lofit_lens"] = {
        "record": made._record(), "tensors": {k: t.tolist() for k, t in made._tensors().items()}
    }  # fmt: skip
    with pytest.raises(DataError, match="which no such file is written of"):
        import_svec(write(file, record))


def test_our_record_taken_out_leaves_a_file_of_theirs(tmp_path):
    """As the message advises; `meta` of others is left alone."""
    iti = small(heads=SCORED)
    record = json.loads(export_svec(iti, tmp_path / "x.svec", model_type="llama").read_text())
    record["meta"] = {"model_fingerprint": "0123"}
    back = import_svec(write(tmp_path / "x.svec", record), heads=3, shape=SHAPE)
    assert str(back.heads) == "L0H3 L2H0 L2H1"
    torch.testing.assert_close(back.shift(2), iti.with_strength(15).shift(2))


def test_a_pickle_is_never_opened(tmp_path):
    """Under this name neither; the code in it does not run."""
    (tmp_path / "x.svec").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(DataError, match="never opened here"):
        import_svec(tmp_path / "x.svec")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_written_is_refused(bridge_llama, tmp_path):
    """Scalings, strengths that the other tool refuses, other methods, an unknown base, another ending; nothing is left."""
    with pytest.raises(AdapterError, match=r"scales heads .*export_folded"):
        export_svec(random_adapter(bridge_llama), tmp_path / "x.svec")
    for alpha in (0.0, -5.0):
        with pytest.raises(AdapterError, match=f"alpha is {alpha:g}"):
            export_svec(random_iti(bridge_llama, alpha=alpha), tmp_path / "x.svec")
    with pytest.raises(AdapterError, match="does not add a vector"):
        export_svec(HeadAblation((3, 4, 8), CHOSEN, values=torch.zeros(3, 8)), tmp_path / "x.svec")
    with pytest.raises(InputError, match=r"does not say its base model.*give model_type"):
        export_svec(small(), tmp_path / "x.svec")
    with pytest.raises(InputError, match=r"name it .*x\.json\.svec"):
        export_svec(small(), tmp_path / "x.json", model_type="llama")
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_gone_is_said(hub, tmp_path):
    """Its type is asked for."""
    gone = ModelInfo("org/gone", "a" * 40, "bridge", False, "float32", 3, 4, 32, 400)
    adapter = small(meta=AdapterMeta(gone))
    with pytest.raises(InputError, match=r"type of the base model is not known.*give model_type"):
        export_svec(adapter, tmp_path / "x.svec")


def test_a_file_is_replaced_on_demand_alone(tmp_path):
    """The old one stays where nobody asked."""
    file = export_svec(small(), tmp_path / "x.svec", model_type="llama")
    before = file.read_bytes()
    with pytest.raises(InputError, match="exists; give another name"):
        export_svec(offsets(), file, model_type="llama")
    assert file.read_bytes() == before
    assert isinstance(import_svec(export_svec(offsets(), file, model_type="llama", overwrite=True)), Lofit)
