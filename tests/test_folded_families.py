"""Folded checkpoints of families beyond the small ones: mixtures of experts, norms after attention, and no room for a bias."""

import sys
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # they import each other by name, as scripts do

import families

from lofit_lens.errors import ModelError
from lofit_lens.sharing import export_peft
from lofit_lens.sharing.recover import import_folded
from tests.adapters import edited
from tests.folding import config, drawn, fold, plain, quick_collection, said, tensors  # noqa: F401

ROOM = ("Olmo", "Olmo2", "Olmo3", "Olmoe", "Gemma3", "Qwen3Moe", "Qwen3-MoE: dense layer", "GptOss")
NO_ROOM = ("Mixtral", "Phi3", "Phi3: rope longrope")
QUICK = ("Olmo2", "Qwen3Moe", "Phi3")
listed = lambda names: [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def base_of(once):
    """Name of a case -> its checkpoint, written once."""

    def folder_of(name):
        case = next(c for c in families.cases() if c.name == name)
        return once(f"family {name.replace(':', '')}", lambda folder: families.save(case, folder))

    return folder_of


def check_same(base, folder, adapter):
    """Plain transformers, logits and greedy answers from a key-value cache: the folder as the base with the edit by hooks."""
    model = plain(base)
    without, _ = said(model)
    with edited(model, adapter):
        expected, text = said(model)
    model, told = plain(folder, output_loading_info=True)
    got, answered = said(model)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - without).abs().max() > 0.1 * expected.abs().max()
    assert torch.equal(answered, text)
    assert not told["missing_keys"] | told["unexpected_keys"]


@pytest.mark.parametrize("name", listed(ROOM))
def test_offsets_and_scalings_in_the_weights(base_of, tmp_path, name, caplog):
    """The class stays; biases of zeros are added where it has none; and it is read back."""
    base = base_of(name)
    adapter = drawn(base)
    found = fold(adapter, tmp_path / "out")
    assert found.verified.passed
    assert found.verified.same_greedy
    assert found.architecture == found.was
    assert bool(found.added) == (name != "GptOss")
    new = tensors(found.folder)
    assert all(not new[bias].any() for bias in set(found.added) - set(found.changed))
    check_same(base, found.folder, adapter)
    assert ("(--model-impl transformers)" in caplog.text) == name.startswith(("Olmoe", "Qwen3"))
    read = import_folded(found.folder, heads=adapter.heads, base=base)
    for head in adapter.heads:
        assert torch.allclose(read.A[head], adapter.A[head], atol=1e-3)
        assert torch.allclose(read.v[head], adapter.v[head], atol=1e-3)


@pytest.mark.parametrize("name", listed(NO_ROOM))
def test_scalings_alone_where_there_is_no_bias(base_of, tmp_path, name):
    """Offsets are refused with the reason, whatever the configuration says; scalings fold; offsets alone go through PEFT."""
    base = base_of(name)
    with pytest.raises(
        ModelError, match=r"has no bias in attention's output projection, and no setting gives it one.*export_peft"
    ):
        fold(drawn(base), tmp_path / "out")
    assert not any(tmp_path.iterdir())
    scalings = drawn(base, A=2.0, v=0.0)
    found = fold(scalings, tmp_path / "out")
    assert not found.added
    assert config(found.folder) == config(base)
    check_same(base, found.folder, scalings)
    offsets = drawn(base, A=0.0, v=2.0)
    model = plain(base)
    with edited(model, offsets):
        expected, text = said(model)
    carried = peft.PeftModel.from_pretrained(model, export_peft(offsets, tmp_path / "peft", device="cpu"))
    got, answered = said(carried)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(answered, text)
