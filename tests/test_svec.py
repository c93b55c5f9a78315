"""Steerability's (AISteer360's) steering vectors: what its rules make of a file that is written here, its own file, refusals."""

import json
import logging

import pytest
import torch

from lofit_lens import ITI, HeadSet
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.interventions import HeadAblation
from lofit_lens.models import logits_of
from lofit_lens.sharing.svec import export_svec, import_svec, svec_use
from tests.adapters import CHOSEN, output_projection, random_adapter
from tests.test_iti import random_iti, small

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
SHAPE = (3, 4, 8)
ROWS = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(5)).tolist()


def theirs(file, **changes):
    """What AISteer360 writes itself: every head of layers 0 and 1 (of 3), and accuracies."""
    accuracies = [0.5, 0.8, 0.6, 0.5, 0.7, 0.8, 0.4, 0.3]
    record = {
        "model_type": "llama", "directions": dict(zip("01", ROWS, strict=True)), "num_heads": 4, "head_dim": 8,
        "probe_accuracies": {f"{i // 4}:{i % 4}": accuracy for i, accuracy in enumerate(accuracies)},
    }  # fmt: skip
    file.write_text(json.dumps({k: x for k, x in (record | changes).items() if x is not None}))
    return file


@torch.no_grad()
def steered(plain, file, *, alpha, heads):
    """Logits with a file used by AISteer360's rules: alpha * row, in float32, added to each selected head."""
    record = json.loads(file.read_text())
    d_head, handles = record["head_dim"], []
    for layer in {layer for layer, _ in heads}:

        def hook(module, args, layer=layer):
            out = args[0].clone()
            for head in (head for at, head in heads if at == layer):
                row = torch.tensor(record["directions"][str(layer)][head], dtype=torch.float32)
                out[:, :, head * d_head : (head + 1) * d_head] += alpha * row
            return (out,)

        handles.append(output_projection(plain, layer).register_forward_pre_hook(hook))
    logits = plain(TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("method", ["iti", "away", "lofit"])
@torch.no_grad()
def test_their_rules_give_the_same_logits(loaded, hf, tmp_path, caplog, architecture, method):
    """With the heads and the strength of the call that is logged, which says the scope of our positions; and read back."""
    model, plain = loaded(architecture, "bridge"), hf(architecture)
    adapter = (
        random_adapter(model, A=0.0)
        if method == "lofit"
        else random_iti(model, alpha=5.3 if method == "iti" else -4 / 3)
    )
    with caplog.at_level(logging.INFO, "lofit_lens"):
        file = export_svec(adapter, tmp_path / "x.svec")
    alpha = 1.0 if method == "lofit" else abs(adapter.alpha)  # theirs must be above 0
    use = f"selected_heads=[(2, 1), (0, 3), (2, 0)], alpha={alpha!r}, token_scope='all')"
    assert use in caplog.text
    expected = steered(plain, file, alpha=alpha, heads=[(2, 1), (0, 3), (2, 0)])
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05
    again = import_svec(file, CHOSEN, adapter.shape, alpha=alpha, positions="all")
    for one in (adapter, again):
        with one.attached(model):
            assert (logits_of(model, TOKENS, torch.ones_like(TOKENS)) - expected).abs().max() < 1e-5
    assert "token_scope='after_prompt'" in svec_use(small(positions="answer"))


def test_the_file_by_hand(tmp_path):
    """sigma * d at the chosen heads of layers that have one, 0 at the others; the type of the base model where it is given."""
    iti = small()
    record = json.loads(export_svec(iti, tmp_path / "x.svec", model_type="llama").read_text())
    assert list(record) == ["model_type", "directions", "num_heads", "head_dim"]
    assert (sorted(record["directions"]), record["num_heads"], record["head_dim"]) == (["0", "2"], 4, 8)
    for layer, rows in record["directions"].items():
        for head, row in enumerate(rows):
            at = [i for i, h in enumerate(iti.heads) if h == (int(layer), head)]
            assert row == ((iti.sigma[at[0]] * iti.directions[at[0]]).tolist() if at else [0.0] * 8)


@torch.no_grad()
def test_their_file_gives_the_same_logits_here(loaded, hf, tmp_path):
    """The three best of their accuracies, equal ones in the file's order; alpha 4, all positions."""
    model, plain = loaded("llama", "bridge"), hf("llama")
    file = theirs(tmp_path / "x.svec")
    iti = import_svec(file, 3, SHAPE, alpha=4.0, positions="all")
    assert str(iti.heads) == "L0H1 L1H1 L1H0"
    with iti.attached(model):
        got = logits_of(model, TOKENS, torch.ones_like(TOKENS))
    assert (got - steered(plain, file, alpha=4.0, heads=[(0, 1), (1, 1), (1, 0)])).abs().max() < 1e-5


def test_their_file_by_hand(tmp_path):
    """Row (3, 4, 0, ...): sigma 5, d (0.6, 0.8, 0, ...); a row of zeros keeps its head."""
    rows = [[3.0, 4.0] + [0.0] * 6, [0.0] * 8] + [[1.0] * 8] * 2
    file = theirs(tmp_path / "x.svec", directions={"1": rows}, probe_accuracies=None)
    iti = import_svec(file, ["L1H1", "L1H0"], SHAPE, alpha=15, positions="answer")
    assert iti.sigma.tolist() == [0.0, 5.0]
    assert iti.directions.tolist() == [[0.0] * 8, torch.tensor([0.6, 0.8] + [0.0] * 6).tolist()]
    assert (iti.alpha, str(iti.positions), iti.shape) == (15.0, "answer", SHAPE)
    assert iti.meta.config["made_by"] == "AISteer360"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"directions": None}, "not a .svec file"), ({"directions": [ROWS[0]]}, "not a .svec file"),
     ({"num_heads": None, "head_dim": None}, "says num_heads None"), ({"num_heads": "4"}, "num_heads 4"),
     ({"num_heads": 5}, "num_heads 5"), ({"head_dim": 9}, "head_dim 9"), ({"directions": {"0": [*ROWS[0][:3], [1.0]]}}, "no"),
     ({"directions": {"0": ROWS[0][:3]}}, "does not hold finite"), ({"directions": {"0": [["1"] * 8] * 4}}, "not a .svec file"),
     ({"directions": {"0": [[1e39] * 8] * 4}}, "does not hold finite"), ({"directions": {"0": [[float("nan")] * 8] * 4}}, "NaN"),
     ({"probe_accuracies": [0.5]}, "not a .svec file"), ({"probe_accuracies": {"0:1": "high"}}, "not a .svec file")],
)  # fmt: skip
def test_wrong_files_are_refused(tmp_path, changes, message):
    """Each by its name and with its reason."""
    with pytest.raises(DataError, match=rf"x\.svec.*{message}"):
        import_svec(theirs(tmp_path / "x.svec", **changes), ["L0H1"], SHAPE, alpha=1, positions="all")


def test_wrong_heads_and_other_files_are_refused(tmp_path):
    """More heads than accuracies, heads that the model or the file lacks, another model's shape, bytes that are no text."""
    file = theirs(tmp_path / "x.svec")
    for heads, shape, message in (
        (9, SHAPE, "heads is 9; give 1 to 8"), (True, SHAPE, "heads is True"), (["L0H4"], SHAPE, "L0H4 is outside"),
        (["L2H0"], SHAPE, "no directions of layer 2; its layers are 0, 1"), (3, (1, 4, 8), "L1H1 is outside"),
        (3, (3, 4, 9), "4 heads of size 9"),
    ):  # fmt: skip
        with pytest.raises((InputError, DataError), match=message):
            import_svec(file, heads, shape, alpha=1, positions="all")
    with pytest.raises(InputError, match="L0H"):
        import_svec(theirs(tmp_path / "y.svec", probe_accuracies={"0": 0.5}), 1, SHAPE, alpha=1, positions="all")
    (tmp_path / "x.svec").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=r"x\.svec"):
        import_svec(file, 3, SHAPE, alpha=1, positions="all")


def test_what_cannot_be_written_is_refused(bridge_llama, tmp_path):
    """Scalings, other methods and positions, an unknown base, another ending, a file that is there; nothing is left."""
    for adapter in (
        random_adapter(bridge_llama),
        small(positions="last"),
        HeadAblation(SHAPE, CHOSEN, values=torch.zeros(3, 8)),
    ):
        with pytest.raises(AdapterError, match=r"LoFiT without scalings, at positions all or answer.*export_folded"):
            export_svec(adapter, tmp_path / "x.svec")
    with pytest.raises(AdapterError, match=r"alpha is 0.*with_strength"):
        export_svec(small(alpha=0.0), tmp_path / "x.svec", model_type="llama")
    with pytest.raises(InputError, match=r"does not name its base model.*give model_type"):
        export_svec(small(), tmp_path / "x.svec")
    with pytest.raises(InputError, match=r"name it .*x\.json\.svec"):
        export_svec(small(), tmp_path / "x.json", model_type="llama")
    assert not list(tmp_path.iterdir())
    file = export_svec(small(), tmp_path / "x.svec", model_type="llama")
    before = file.read_bytes()
    other = small(heads=HeadSet(["L1H0", "L1H1", "L1H2"]))
    with pytest.raises(InputError, match="exists; give another name"):
        export_svec(other, file, model_type="llama")
    assert file.read_bytes() == before
    again = import_svec(
        export_svec(other, file, model_type="llama", overwrite=True), ["L1H0"], SHAPE, alpha=1, positions="all"
    )
    assert isinstance(again, ITI)
