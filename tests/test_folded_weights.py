"""The numbers in a folded checkpoint, tensor by tensor: the formula, several files, half precision, the other methods."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lofit_lens import ITI
from lofit_lens.errors import ModelError
from lofit_lens.interventions import HeadAblation
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import load_model, logits_of, planned_info
from lofit_lens.sharing import export_peft
from tests import tiny
from tests.adapters import CHOSEN, edited
from tests.folding import TOKENS, config, drawn, fold, plain, quick_collection, said, tensors  # noqa: F401


def test_the_fold_is_the_formula(checkpoint, tmp_path):
    """W' = W diag(1 + A), b' = W v through the unscaled W; layer 1 has no head and keeps its bits."""
    adapter = drawn(checkpoint("llama"))
    new, old = tensors(fold(adapter, tmp_path / "out").folder), tensors(checkpoint("llama"))
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj"
        W = old[f"{name}.weight"]
        assert torch.equal(new[f"{name}.weight"], W * (1 + adapter.A[layer].detach()).flatten())
        expected = sum(W[:, 8 * h : 8 * h + 8] @ adapter.v[layer, h].detach() for h in range(4))
        assert torch.allclose(new[f"{name}.bias"], expected, atol=1e-6)
    assert torch.equal(new["model.layers.1.self_attn.o_proj.weight"], old["model.layers.1.self_attn.o_proj.weight"])
    assert not new["model.layers.1.self_attn.o_proj.bias"].any()


def test_files_of_a_checkpoint_in_several(tmp_path):
    """Files keep their names, untouched ones their bytes; a new bias lies beside its weight; the index says so."""
    base = tmp_path / "base"
    tiny.hf_model("llama").save_pretrained(base, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(base)
    found = fold(drawn(base), tmp_path / "out")
    before, index = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, found.folder)
    )  # fmt: skip
    where = index["weight_map"]
    assert len(set(where.values())) > 4
    assert {name: where[name] for name in before["weight_map"]} == before["weight_map"]
    for name in found.added:
        assert where[name] == where[name.replace("bias", "weight")]
    touched = {where[name] for name in (*found.changed, *found.added)}
    for file in set(where.values()):
        same = (base / file).read_bytes() == (found.folder / file).read_bytes()
        assert same == (file not in touched)
        assert set(load_file(found.folder / file)) == {name for name, held in where.items() if held == file}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(found.folder).values())
    assert touched < set(where.values())


def test_weight_and_bias_in_different_files_without_a_prefix(checkpoint, tmp_path):
    """GPT-2 as the hub keeps it: no "transformer." in front of the names; and its biases in a file of their own."""
    base = shutil.copytree(checkpoint("gpt2"), tmp_path / "base")
    held = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, t in held.items():
        parts["b.safetensors" if name.endswith("bias") else "a.safetensors"][name] = t
    for file, some in parts.items():
        save_file(some, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = drawn(base)
    found = fold(adapter, tmp_path / "out")
    assert set(tensors(found.folder)) == set(held)
    assert found.changed == tuple(sorted(f"h.{n}.attn.c_proj.{what}" for n in (0, 2) for what in ("bias", "weight")))
    model = plain(base)
    with edited(model, adapter):
        expected, _ = said(model)
    got, _ = said(plain(found.folder))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_half_precision(tmp_path):
    """Rounded once; the same in float32 is exact, every tensor is converted, and the configuration says so."""
    base = tmp_path / "base"
    tiny.hf_model("llama").bfloat16().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    adapter, name = drawn(base), "model.layers.2.self_attn.o_proj.weight"
    found = fold(adapter, tmp_path / "half")
    new, old = tensors(found.folder), tensors(base)
    exact = old[name].float() * (1 + adapter.A[2].detach()).flatten()
    assert torch.equal(new[name], exact.bfloat16())
    assert {t.dtype for t in new.values()} == {torch.bfloat16}
    assert found.verified.dtype == "bfloat16"
    assert 0 < found.verified.error < 0.2 * found.verified.effect
    wide = fold(adapter, tmp_path / "wide", dtype="float32")
    new = tensors(wide.folder)
    assert torch.equal(new[name], exact)
    assert {t.dtype for t in new.values()} == {torch.float32}
    assert config(wide.folder)["dtype"] == "float32"
    assert plain(wide.folder).dtype == torch.float32
    assert wide.verified.error <= 1e-5 * wide.verified.scale
    small = drawn(base, A=0.004, v=0.002)
    with pytest.raises(ModelError, match="use dtype='float32'"):
        fold(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert fold(small, tmp_path / "small", dtype="float32").verified.passed


def test_iti_and_ablation(checkpoint, loaded, tmp_path):
    """Both are scale and shift; against the hooked model of the suite."""
    base, model = checkpoint("llama"), loaded("llama", "bridge")
    meta = AdapterMeta(planned_info(base, backend="bridge"))
    numbers = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    iti = ITI(
        (3, 4, 8), CHOSEN, directions=numbers, sigma=torch.tensor([0.1, 0.2, 0.3]), alpha=5, positions="all", meta=meta
    )
    for i, adapter in enumerate((iti, HeadAblation((3, 4, 8), CHOSEN, values=numbers, meta=meta))):
        with adapter.attached(model):  # an adapter that is in use can be exported
            expected = logits_of(model, TOKENS, torch.ones_like(TOKENS))
            found = fold(adapter, tmp_path / str(i))
        assert (said(plain(found.folder))[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_double_precision(tmp_path):
    """No weight goes through float32 on its way; logits are compared in it, and a PEFT carrier is float32 all the same.

    Hugging Face takes the softmax in float32, where the mask of float64 is minus infinity and rows of padding are NaN: the
    bridge's scores are kept within float32.
    """
    base = tmp_path / "base"
    tiny.hf_model("llama").double().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    adapter, name = drawn(base), "model.layers.2.self_attn.o_proj"
    found = fold(adapter, tmp_path / "out")
    new, W = tensors(found.folder), tensors(base)[f"{name}.weight"]
    scale, shift = (1 + adapter.A[2].detach()).flatten().double(), adapter.v[2].detach().flatten().double()
    assert torch.equal(new[f"{name}.weight"], W * scale)
    assert torch.equal(new[f"{name}.bias"], W @ shift)
    assert found.verified.dtype == "float32"
    model = load_model(base, backend="bridge", dtype="float64", device="cpu")
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    got = logits_of(model, TOKENS, mask)
    assert got.dtype == torch.float64
    assert torch.isfinite(got).all()
    torch.testing.assert_close(
        got[0, 2:].float(), said(plain(base), TOKENS[:1, 2:])[0][0].float(), atol=1e-4, rtol=1e-4
    )
    offsets = drawn(base, A=0.0)
    carried = tensors(export_peft(offsets, tmp_path / "peft", device="cpu"))
    assert {t.dtype for t in carried.values()} == {torch.float32}
