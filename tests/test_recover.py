"""Adapters out of folded checkpoints: what was folded comes back, and what is not explained by it is said."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import AdapterError, InputError, ModelError
from lofit_lens.models import logits_of
from lofit_lens.sharing import open_checkpoint, outputs_of
from lofit_lens.sharing.recover import import_folded, solve_scale, solve_shift
from tests import tiny
from tests.adapters import CHOSEN
from tests.folding import TOKENS, config, drawn, fold, plain, quick_collection, said  # noqa: F401

NAME = "model.layers.{}.self_attn.o_proj.{}"


@pytest.fixture(scope="module")
def folded(checkpoint, tmp_path_factory):
    """(architecture, scalings too) -> base, adapter and the checkpoint that it was folded into."""
    made = {}

    def of(architecture, A=0.5):
        if (architecture, A) not in made:
            adapter = drawn(checkpoint(architecture), A=A)
            folder = fold(adapter, tmp_path_factory.mktemp("folded") / "out").folder
            made[architecture, A] = checkpoint(architecture), adapter, folder
        return made[architecture, A]

    return of


@pytest.fixture
def by_hand(checkpoint, tmp_path):
    """A function that changes tensors of a copy of the tiny Llama with biases of zero; returns its folder."""

    def write(change):
        folder = shutil.copytree(checkpoint("llama"), tmp_path / "by-hand")
        held = load_file(folder / "model.safetensors")
        for layer in range(3):
            for what in "qkvo":
                held[f"model.layers.{layer}.self_attn.{what}_proj.bias"] = torch.zeros(32)
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.mark.parametrize("architecture", ["llama", "llama-gqa", "gpt2", "pythia", "mistral", "opt"])
def test_scalings_and_offsets_come_back(folded, architecture):
    """With the base and the heads, to float32's precision: Conv1D, own biases, and another class than the base's."""
    base, adapter, folder = folded(architecture)
    found = import_folded(folder, heads=CHOSEN, base=base)
    assert torch.allclose(found.A, adapter.A, atol=1e-5)
    assert torch.allclose(found.v, adapter.v, atol=2e-5)
    assert found.heads.heads == CHOSEN.heads
    assert sorted(found.meta.config["residuals"]) == ["0", "2"]  # layer 1 has no edited head
    assert max(found.meta.config["residuals"].values()) < 1e-5
    assert found.meta.config["unique"] is True
    # Weights do not say whether BOS stood in front of the texts.
    assert found.meta.model == replace(adapter.meta.model, prepend_bos=None)


def test_the_recovered_adapter_does_the_same(folded, loaded, tmp_path):
    """Attached to the base it gives the folded checkpoint's logits; it is saved and read like any other."""
    base, _, folder = folded("llama")
    found = import_folded(folder, base=base)  # all heads of two layers: 32 columns for 32 rows
    found.save_pretrained(tmp_path / "adapter")
    read = Lofit.from_pretrained(tmp_path / "adapter")
    assert torch.equal(read.v, found.v)
    assert read.meta.config == json.loads(json.dumps(found.meta.config))
    with read.attached(loaded("llama", "bridge")) as _:
        got = logits_of(loaded("llama", "bridge"), TOKENS, torch.ones_like(TOKENS))
    expected = said(plain(folder))[0]
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert read.heads == HeadSet([(layer, n) for layer in (0, 2) for n in range(4)], shape=(3, 4))


def test_without_heads_and_base_the_shortest_offset_is_taken(folded, checkpoint, caplog):
    """48 columns for 32 rows: not unique, said so, shorter than what was folded, and of the same effect."""
    _, adapter, folder = folded("llama-gqa", 0.0)
    with caplog.at_level(logging.WARNING):
        found = import_folded(folder)
    assert "not unique" in caplog.text
    assert found.meta.config["unique"] is False
    assert found.meta.model is None
    assert not found.A.any()
    assert found.v[2].norm() < 0.99 * adapter.v[2].norm()
    W = load_file(checkpoint("llama-gqa") / "model.safetensors")[NAME.format(2, "weight")]
    assert torch.allclose(W @ found.v[2].flatten(), W @ adapter.v[2].flatten(), atol=1e-5)
    with_heads = import_folded(folder, heads=CHOSEN)
    assert torch.allclose(with_heads.v, adapter.v, atol=1e-5)
    assert with_heads.meta.config["unique"] is True


def test_a_head_too_few_leaves_a_residual(checkpoint, tmp_path, caplog):
    """The smaller of two edits of a layer is not asked for: that layer is told, and the other head is left alone."""
    adapter = drawn(checkpoint("llama"))
    with torch.no_grad():
        adapter.A[2, 0] *= 0.2
        adapter.v[2, 0] *= 0.2
    folder, heads = fold(adapter, tmp_path / "out").folder, HeadSet(["L2H1", "L0H3"])
    with caplog.at_level(logging.WARNING):
        found = import_folded(folder, heads=heads, base=checkpoint("llama"))
    residuals = found.meta.config["residuals"]
    assert 0.05 < residuals["2"] < 0.5
    assert residuals["0"] < 1e-5
    assert "in layer 2 is not explained" in caplog.text
    outside = HeadSet([(n, h) for n in range(3) for h in range(4)]) - heads
    assert not any(found.A[h].any() or found.v[h].any() for h in outside)


@pytest.mark.parametrize(
    ("heads", "what"),
    [(["L2H1", "L2H0"], "no head of layer 0 was given"), (["L2H3", "L0H3"], "too much is left in layer 2"),
     (["L0H0"], "no head of layer 2 was given")],
)  # fmt: skip
def test_heads_that_explain_little_are_refused(folded, heads, what):
    """A layer without any of its heads, a wrong head, and neither right: all layers that differ are told."""
    base, _, folder = folded("llama")
    with pytest.raises(AdapterError, match=rf"{what}\. Layers that differ.*: 0 \(.*\), 2 \(.*give the heads that were"):
        import_folded(folder, heads=HeadSet(heads), base=base)
    with pytest.raises(InputError, match="outside this model"):
        import_folded(folder, heads=HeadSet(["L3H0"]), base=base)


def test_another_base_is_refused(folded, tmp_path):
    """Of the same shape: neither scalings nor offsets make one model of another."""
    _, _, folder = folded("llama")
    with pytest.raises(AdapterError, match="the base is another model, or more was changed"):
        import_folded(folder, base=tiny.save(tmp_path / "other", seed=1))


def test_scalings_below_the_types_rounding_are_no_reason_to_refuse(checkpoint, tmp_path):
    """0.2 % in bfloat16 is mostly rounding, which leaves more than half of it; the offsets beside it come back."""
    adapter = drawn(checkpoint("llama"), A=0.002)
    folder = fold(adapter, tmp_path / "out", dtype="bfloat16").folder
    found = import_folded(folder, heads=CHOSEN, base=checkpoint("llama"))
    assert max(found.meta.config["residuals"].values()) > 0.5
    assert torch.allclose(found.v, adapter.v, atol=3e-2)


@pytest.mark.parametrize(("where", "part"), [("made", "weight"), ("made", "bias"), ("base", "weight")])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(by_hand, checkpoint, tmp_path, where, part, number):
    """In W', b' or W: the layer, the tensor and its file are named."""
    name = NAME.format(1, part)
    made = by_hand(
        lambda t: t[name].view(-1)[3].fill_(number) if where == "made" else t[NAME.format(1, "bias")].fill_(1)
    )
    base = shutil.copytree(checkpoint("llama"), tmp_path / "base")
    if where == "base":
        held = load_file(base / "model.safetensors")
        held[name][0, 0] = number
        save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    file = (made if where == "made" else base) / "model.safetensors"
    with pytest.raises(ModelError, match=rf"{file}: {name} \(layer 1\) holds NaN or infinity"):
        import_folded(made, base=base)


def test_a_difference_beyond_numbers_is_refused(by_hand, checkpoint):
    """Its square is infinite, and the share that is left is NaN."""
    name = NAME.format(1, "bias")
    made = by_hand(lambda t: t.update({name: torch.full((32,), 1e200, dtype=torch.float64)}))
    with pytest.raises(AdapterError, match=r"is not explained .*1 \(nan\)"):
        import_folded(made, base=checkpoint("llama"))


def test_a_base_that_does_not_say_its_vocabulary(folded, tmp_path):
    """Its embedding has as many rows; without one it is said."""
    base, adapter, folder = folded("llama")
    base = shutil.copytree(base, tmp_path / "base")
    settings = config(base)
    (base / "config.json").write_text(json.dumps({k: x for k, x in settings.items() if k != "vocab_size"}))
    assert import_folded(folder, heads=CHOSEN, base=base).meta.model.d_vocab == adapter.meta.model.d_vocab == 400
    held = load_file(base / "model.safetensors")
    del held["model.embed_tokens.weight"]
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has no vocab_size"):
        import_folded(folder, heads=CHOSEN, base=base)


def test_double_precision_is_kept(checkpoint, tmp_path):
    """A base and a fold in float64 differ by less than float32 can tell; both are read as they are."""
    made = []
    for name, extra in (("base", 0.0), ("out", 1e-9)):
        made.append(shutil.copytree(checkpoint("gpt2"), tmp_path / name))
        held = {n: t.double() for n, t in load_file(made[-1] / "model.safetensors").items()}
        held["transformer.h.1.attn.c_proj.bias"] += extra
        save_file(held, made[-1] / "model.safetensors", metadata={"format": "pt"})
    found = import_folded(made[1], base=made[0])
    W = outputs_of(open_checkpoint(made[0])).weight(1)
    assert W.dtype == torch.float64
    assert torch.allclose(W @ found.v[1].double().flatten(), torch.full((32,), 1e-9, dtype=torch.float64), atol=1e-14)


def test_what_the_type_alone_changed_is_no_edit(checkpoint, tmp_path):
    """A float32 base written as bfloat16: layers and columns that were not edited are none; the rest is there to 1 %."""
    adapter = drawn(checkpoint("pythia"), heads=HeadSet(["L2H1"]))
    folder = fold(adapter, tmp_path / "out", dtype="bfloat16").folder
    found = import_folded(folder, base=checkpoint("pythia"))
    assert list(found.meta.config["residuals"]) == ["2"]
    assert not found.A[2, [0, 2, 3]].any()
    assert 1e-4 < found.meta.config["residuals"]["2"] < 0.05
    assert torch.allclose(found.A[2, 1], adapter.A[2, 1], atol=5e-3)
    with_head = import_folded(folder, base=checkpoint("pythia"), heads=HeadSet(["L2H1"]))
    assert torch.allclose(with_head.v, adapter.v, atol=2e-2)


def test_biases_that_may_be_the_models_own_are_refused_without_the_base(folded, by_hand):
    for architecture in ("gpt2", "qwen2"):  # the second is a Llama now, whose q, k and v have biases
        base, adapter, folder = folded(architecture)
        with pytest.raises(ModelError, match=r"biases of its own.*base="):
            import_folded(folder)
    found = import_folded(folder, heads=CHOSEN, base=base)
    assert torch.allclose(found.v, adapter.v, atol=1e-5)
    v = torch.linspace(-1, 1, 8)
    made = by_hand(lambda t: t.update({NAME.format(1, "bias"): t[NAME.format(1, "weight")][:, 8:16] @ v}))
    found = import_folded(made, heads=HeadSet(["L1H1"]))
    assert torch.allclose(found.v[1, 1], v, atol=1e-5)
    assert found.meta.config["revision"].startswith("sha256:")


def test_nothing_folded_or_another_shape(checkpoint, by_hand):
    with pytest.raises(AdapterError, match="holds no bias"):
        import_folded(checkpoint("llama"))
    with pytest.raises(AdapterError, match="nothing is folded into"):
        import_folded(checkpoint("llama"), base=checkpoint("llama"))
    with pytest.raises(AdapterError, match="nothing is folded into"):
        import_folded(by_hand(lambda t: None))
    with pytest.raises(ModelError, match=r"3 layers of 4 heads of size 8, but .* 3 of 4 of size 12"):
        import_folded(checkpoint("llama"), base=checkpoint("llama-gqa"))


def test_solving_by_hand():
    """b = W c with c = (3, -2); two equal columns share what either could carry; a part outside W's reach is left over."""
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    exact, unique = solve_shift(W, torch.tensor([3.0, -4.0, 0.0]))
    assert torch.allclose(exact, torch.tensor([3.0, -2.0]))
    assert unique
    assert torch.allclose(solve_shift(W, torch.tensor([3.0, 0.0, 4.0]))[0], torch.tensor([3.0, 0.0]))
    shared, unique = solve_shift(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([4.0, 0.0]))
    assert torch.allclose(shared, torch.tensor([2.0, 2.0]))
    assert not unique
    assert not solve_shift(torch.zeros(2, 2), torch.zeros(2))[0].any()
    scaled = torch.stack([W[:, 0] * 1.5, W[:, 1]], dim=1)
    assert solve_scale(W, scaled).tolist() == [1.5, 1.0]
    assert solve_scale(torch.zeros(2, 1), torch.zeros(2, 1)).tolist() == [1.0]
