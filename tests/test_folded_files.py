"""What an export writes and what it refuses, the comparison behind it, and that nothing is left of one that failed."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError
from safetensors.torch import save_file

from lofit_lens import HeadSet
from lofit_lens.errors import AdapterError, DiskFull, InputError, ModelError
from lofit_lens.models import planned_info
from lofit_lens.sharing import RECORD, folded
from lofit_lens.sharing.verify import Verified, check, compared, hooked_reference
from tests import tiny
from tests.adapters import edited
from tests.folding import change_config, config, drawn, fold, plain, quick_collection, tensors  # noqa: F401


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of the tiny Llama's checkpoint, to be changed."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "copy")


def test_what_is_copied_and_what_is_not(copied, tmp_path):
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja", "merges.txt"):
        (copied / name).write_text(name)
    for name in ("modeling_x.py", "pytorch_model.bin", "old.pt", "README.md", "tokenizer.py"):
        (copied / name).write_text("{}")
    (copied / "pytorch_model.bin.index.json").write_text("{}")
    change_config(copied, auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    found = fold(drawn(copied), tmp_path / "out")
    assert sorted(p.name for p in found.folder.iterdir()) == sorted((
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", RECORD,
        "LICENSE", "NOTICE.txt", "USE_POLICY.md", "chat_template.jinja", "merges.txt",
    ))  # fmt: skip
    assert config(found.folder) == {k: v for k, v in config(copied).items() if k != "auto_map"} | {
        "attention_bias": True
    }


def test_the_record(checkpoint, tmp_path):
    adapter = drawn(checkpoint("llama"))
    adapter.meta.task, adapter.meta.source = "truthfulqa", "user/repo@1"
    found = fold(adapter, tmp_path / "out")
    record = json.loads((found.folder / RECORD).read_text())
    saved = json.loads((adapter.save_pretrained(tmp_path / "adapter") / "adapter_config.json").read_text())
    same = ("method", "shape", "heads", "task", "seed", "base_model")
    assert {key: record["adapter"][key] for key in same} == {key: saved[key] for key in same}
    assert (record["adapter"]["task"], record["adapter"]["source"]) == ("truthfulqa", "user/repo@1")
    assert record["base"] == {
        "name": checkpoint("llama").name, "revision": adapter.meta.model.revision, "architecture": "LlamaForCausalLM"
    }  # fmt: skip
    assert record["verified"] == found.verified.to_dict()
    assert (tuple(record["changed"]), tuple(record["added"])) == (found.changed, found.added)
    assert record["versions"]["torch"]


def test_an_earlier_export_can_be_replaced_and_nothing_else(checkpoint, tmp_path, monkeypatch):
    adapter, out = drawn(checkpoint("llama")), tmp_path / "out"
    first = fold(adapter, out)
    assert fold(2.0 * adapter, out, overwrite=True, base=checkpoint("llama")).verified.effect != first.verified.effect
    monkeypatch.setattr(folded, "hooked_reference", None)  # refused before anything is loaded
    with pytest.raises(InputError, match="exists"):
        fold(adapter, out)
    (out / RECORD).unlink()
    with pytest.raises(InputError, match="not written by this package"):
        fold(adapter, out, overwrite=True)


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_wrong_fold_is_deleted(checkpoint, tmp_path, monkeypatch):
    """b' = b + W c through the scaled W instead: found by its logits, and nothing is left."""
    adapter = drawn(checkpoint("llama"), A=0.05)
    scale = 1 + adapter.A.detach()
    wrong = lambda weight, bias, shift: (weight * scale[2].flatten()) @ shift
    monkeypatch.setattr(folded, "folded_bias", wrong)
    with pytest.raises(ModelError, match=r"differs from the hooked model by .* It was not kept"):
        fold(adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_one_heads_part_is_missed_in_half_precision_too(checkpoint, tmp_path, monkeypatch):
    """Of 12 heads one offset, or one layer's scalings, left out: logits alone would let it pass over GPT-2 in bfloat16."""
    base = shutil.copytree(checkpoint("gpt2"), tmp_path / "base")
    tf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = drawn(base, heads=HeadSet.all((3, 4)), A=0.3, v=0.3)
    assert fold(adapter, tmp_path / "whole").verified.dtype == "bfloat16"
    inner = folded._edits
    for part in ("A", "v"):

        def less(outputs, scale, shift, part=part):
            scale, shift = scale.clone(), shift.clone()
            if part == "A":
                scale[2] = 1
            else:
                shift[0, 0] = 0
            return inner(outputs, scale, shift)

        monkeypatch.setattr(folded, "_edits", less)
        with pytest.raises(ModelError, match=r"was not written as computed|differs from the hooked model"):
            fold(adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_effect_that_cannot_be_seen_is_told(checkpoint, tmp_path):
    """Offsets so small that no logit changes: the export could not be told from the base."""
    adapter = drawn(checkpoint("llama"))
    with torch.no_grad():
        adapter.A.zero_()
        adapter.v.mul_(1e-12)
    with pytest.raises(ModelError, match="is lost in rounding"):
        fold(adapter, tmp_path / "out")


def test_the_base_is_never_replaced(checkpoint, tmp_path):
    """An export is a checkpoint that another adapter may be folded onto, but not in its own place; strict=False takes copies."""
    first = drawn(checkpoint("llama"))
    out = fold(first, tmp_path / "out").folder
    second = drawn(out, A=0.2)
    with pytest.raises(InputError, match="is the base model itself"):
        fold(second, out, overwrite=True)
    assert fold(second, tmp_path / "both").verified.passed
    with pytest.raises(AdapterError, match="has other weights"):
        fold(second, tmp_path / "x", base=checkpoint("llama"))
    assert fold(second, tmp_path / "x", base=checkpoint("llama"), strict=False).verified.passed


def test_only_what_a_model_needs_is_copied(checkpoint, tmp_path):
    """Licences and the tokenizer; not a trainer's files, nor what a link outside leads to."""
    base = shutil.copytree(checkpoint("llama"), tmp_path / "base")
    (tmp_path / "passwords").write_text("secret")
    (base / "LICENSE").symlink_to(tmp_path / "passwords")
    for name in ("LICENSE.txt", "training_args.json", "notes.txt", "tokenizer.sh"):
        (base / name).write_text("{}")
    made = fold(drawn(base), tmp_path / "out").folder
    beside = ["LICENSE.txt", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert {p.name for p in made.iterdir()} == {*beside, "config.json", "model.safetensors", RECORD}


def test_biases_that_only_some_layers_have_are_not_made_up(checkpoint, tmp_path):
    """A base folded by hand, whose configuration has biases that its file lacks: no model is loaded from such a folder."""
    base = shutil.copytree(checkpoint("llama"), tmp_path / "base")
    change_config(base, attention_bias=True)
    held = tensors(base) | {"model.layers.1.self_attn.o_proj.bias": torch.ones(32)}
    save_file(held, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 11 tensor\(s\) that its configuration asks for"):
        fold(drawn(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), DiskFull),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull), (OSError(errno.EACCES, "Permission denied"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["save_file", "shutil"])
def test_an_interrupted_or_failed_write_leaves_nothing(checkpoint, tmp_path, monkeypatch, error, expected, where):
    def fails(*args, **more):
        raise error

    adapter = drawn(checkpoint("llama"))
    monkeypatch.setattr(folded, "hooked_reference", lambda *args, **more: None)
    if where == "shutil":
        monkeypatch.setattr(folded.shutil, "copyfile", fails)
    else:
        monkeypatch.setattr(folded, "save_file", fails)
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "out"):
        fold(adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_another_base_model_is_refused(checkpoint, tmp_path):
    """By the checksum of the weights, whatever the folders are called; and by shape where no checksum is known."""
    adapter = drawn(checkpoint("llama"))
    other = tiny.save(tmp_path / "llama", seed=1)
    with pytest.raises(AdapterError, match=r"other weights. Give the model it was made for"):
        fold(adapter, tmp_path / "out", base=other)
    moved = shutil.copytree(checkpoint("llama"), tmp_path / "elsewhere")
    assert fold(adapter, tmp_path / "out", base=moved).verified.passed
    adapter.meta.model = None
    with pytest.raises(AdapterError, match="base="):
        fold(adapter, tmp_path / "none")
    with pytest.raises(AdapterError, match=r"3 layers of 4 heads of size 8, and .* has 3 of 4 of size 12"):
        fold(adapter, tmp_path / "none", base=checkpoint("llama-gqa"))


def test_a_base_of_the_hub_at_the_adapters_commit(checkpoint, tmp_path, hub):
    """From the cache, with the hub out of reach: main has moved on since, and the adapter says which commit is its own."""
    folder = hub / "models--someone--tiny"
    shutil.copytree(checkpoint("llama"), folder / "snapshots" / ("a" * 40))
    tiny.save(folder / "snapshots" / ("b" * 40), seed=1)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    adapter = drawn(checkpoint("llama"))
    adapter.meta.model = replace(adapter.meta.model, name="someone/tiny", revision="a" * 40)
    found = fold(adapter, tmp_path / "out")
    assert json.loads((found.folder / RECORD).read_text())["base"]["revision"] == "a" * 40
    adapter.meta.model = replace(planned_info("someone/tiny", backend="bridge"), revision="a" * 40)
    with pytest.raises(AdapterError, match=r"made for someone/tiny \(a{40}\); someone/tiny \(b{40}\)"):
        fold(adapter, tmp_path / "main", revision="main")


def test_of_two_folders_with_the_same_weights_the_one_by_its_name(checkpoint, tmp_path):
    """Their configurations can differ; and one that this process has not read is asked for, as records hold no paths."""
    one, other = (shutil.copytree(checkpoint("llama"), tmp_path / name) for name in ("one", "other"))
    change_config(other, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    adapter = drawn(one)
    drawn(other)  # read last
    found = fold(adapter, tmp_path / "out").folder
    assert config(found)["rope_parameters"] == config(one)["rope_parameters"]
    adapter.meta.model = replace(adapter.meta.model, name="never read")
    with pytest.raises(ModelError, match=r"local model 'never read' .* records do not hold paths; give its folder"):
        fold(adapter, tmp_path / "none")


def test_adapters_that_cannot_be_folded(checkpoint, tmp_path):
    adapter = drawn(checkpoint("llama"))
    with pytest.raises(AdapterError, match="changes nothing"):
        fold(0.0 * adapter, tmp_path / "out")
    adapter.meta.model = planned_info(checkpoint("llama"), backend="bridge")
    broken = 1.0 * adapter
    with torch.no_grad():
        broken.v[2, 1, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        fold(broken, tmp_path / "out")
    object.__setattr__(adapter.meta.model, "processed", True)
    with pytest.raises(AdapterError, match="processed"):
        fold(adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_architecture_that_is_not_known(copied, tmp_path):
    adapter = drawn(copied)
    change_config(copied, architectures=["StableLmForCausalLM"])
    with pytest.raises(ModelError, match="into a StableLmForCausalLM is not supported"):
        fold(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- the comparison


def test_the_comparison_sees_what_is_missing(checkpoint):
    """The base itself is off by the whole effect; one head less is seen too; the edit by other hooks is not off."""
    adapter, model = drawn(checkpoint("llama")), plain(checkpoint("llama"))
    reference = hooked_reference(adapter, checkpoint("llama"), device="cpu")
    base = compared(reference, model)
    assert base.error == pytest.approx(base.effect, rel=1e-5)
    assert not base.passed
    with edited(model, adapter):
        assert compared(reference, model).passed
    with edited(model, adapter.restrict(HeadSet(["L2H1", "L0H3"]))):
        assert not compared(reference, model).passed
    with edited(model, adapter.restrict(HeadSet(["L2H1", "L2H0"]))), pytest.raises(ModelError, match="what"):
        check(compared(reference, model), "what")


def test_the_bound():
    """1e-4 of the scale in float32, 16 times the type's resolution in half; never above a fifth of the effect; NaN fails."""
    of = lambda error, effect, dtype: Verified(error, effect, 10.0, True, 57, dtype)
    assert of(0.9e-3, 1.0, "float32").passed
    assert not of(1.1e-3, 1.0, "float32").passed
    assert not of(0.9e-3, 4e-3, "float32").passed
    assert of(1.2, 9.0, "bfloat16").passed
    assert not of(1.3, 9.0, "bfloat16").passed
    assert not of(1.2, 5.0, "bfloat16").passed
    assert of(0.15, 9.0, "float16").passed
    assert not of(0.2, 9.0, "float16").passed
    for dtype, said in (("float16", "overflows in float16"), ("float32", "Report it")):
        with pytest.raises(ModelError, match=said):
            check(of(float("nan") if dtype == "float16" else 1.0, 5.0, dtype), "x")
    with pytest.raises(ModelError, match="is lost in rounding"):
        check(of(0.9e-4, 1e-4, "float32"), "x")
