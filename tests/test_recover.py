"""Adapters out of folded checkpoints: what was folded comes back, and what is not explained by it is said."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import AdapterError, InputError, ModelError
from lofit_lens.models import logits_of
from lofit_lens.sharing.recover import import_folded, solve_scale, solve_shift
from tests.adapters import CHOSEN
from tests.folding import TOKENS, drawn, fold, plain, quick_collection, said  # noqa: F401

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
    made_for = adapter.meta.model
    assert found.meta.model == made_for


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


@pytest.mark.parametrize("heads", [["L2H1", "L0H3"], ["L2H1", "L2H0"], ["L2H3", "L0H3", "L1H0"]])
def test_other_heads_leave_a_residual(folded, caplog, heads):
    """One head missing, a whole layer missing, a wrong one: the layer that it concerns is told."""
    base, _, folder = folded("llama")
    with caplog.at_level(logging.WARNING):
        found = import_folded(folder, heads=HeadSet(heads), base=base)
    residuals = found.meta.config["residuals"]
    wrong = "0" if heads == ["L2H1", "L2H0"] else "2"
    assert residuals[wrong] > 0.3
    assert residuals["2" if wrong == "0" else "0"] < 1e-5
    assert f"in layer {wrong} is not explained" in caplog.text
    if wrong == "0":
        assert residuals["0"] == 1.0
    outside = HeadSet([(n, h) for n in range(3) for h in range(4)]) - HeadSet(heads)
    assert not any(found.A[h].any() or found.v[h].any() for h in outside)
    with pytest.raises(InputError, match="outside this model"):
        import_folded(folder, heads=HeadSet(["L3H0"]), base=base)


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
    with pytest.raises(ModelError, match=r"3 layers of 4 heads of size 8, and .* 3 of 4 of size 12"):
        import_folded(checkpoint("llama"), base=checkpoint("llama-gqa"))


def test_solving_by_hand():
    """b = W c with c = (3, -2); two equal columns share what either could carry; a part outside W's reach is left over."""
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    exact = solve_shift(W, torch.tensor([3.0, -4.0, 0.0]))
    assert torch.allclose(exact.shift, torch.tensor([3.0, -2.0]))
    assert exact.residual == pytest.approx(0, abs=1e-12)
    assert exact.unique
    off = solve_shift(W, torch.tensor([3.0, 0.0, 4.0]))
    assert off.residual == pytest.approx(0.8)
    twice = solve_shift(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([4.0, 0.0]))
    assert torch.allclose(twice.shift, torch.tensor([2.0, 2.0]))
    assert not twice.unique
    assert solve_shift(torch.zeros(2, 2), torch.zeros(2)).residual == 0
    scaled = torch.stack([W[:, 0] * 1.5, W[:, 1]], dim=1)
    assert solve_scale(W, scaled).tolist() == [1.5, 1.0]
    assert solve_scale(torch.zeros(2, 1), torch.zeros(2, 1)).tolist() == [1.0]
