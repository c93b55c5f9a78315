"""Folded checkpoints: plain transformers say what the hooked model says, on every architecture, in as much memory as it takes."""

import subprocess
import sys

import pytest
import torch
import transformers as tf

from lofit_lens import io
from tests import tiny
from tests.adapters import edited
from tests.folding import RELABELLED, config, drawn, fold, plain, quick_collection, said, tensors  # noqa: F401

EVERY = tuple(a for a in tiny.configs() if a != "mamba")
HAS_BIAS = ("llama-bias", "gpt2", "pythia", "opt")


@pytest.mark.parametrize("architecture", EVERY)
def test_plain_transformers_say_what_the_hooked_model_says(checkpoint, tmp_path, architecture, caplog):
    """Against the edit on plain Hugging Face by hooks that the library has no part in; greedy texts are the same."""
    base = checkpoint(architecture)
    adapter = drawn(base)
    found = fold(adapter, tmp_path / "out")
    model = plain(base)
    without, _ = said(model)
    with edited(model, adapter):
        expected, text = said(model)
    model, told = plain(found.folder, output_loading_info=True)
    got, answered = said(model)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale
    assert (expected - without).abs().max() > 0.1 * scale  # there is something to be lost
    assert torch.equal(answered, text)
    assert not told["missing_keys"] | told["unexpected_keys"]
    assert found.verified.passed
    assert found.verified.same_greedy
    assert found.verified.error <= 1e-5 * found.verified.scale
    assert (found.verified.dtype, found.verified.tokens) == ("float32", 57)
    own = config(base)["architectures"][0]
    assert ("leave this model's new biases out" in caplog.text) == (architecture == "gemma")
    assert ("leaves this model's new biases out" in caplog.text) == (architecture == "qwen3")
    assert all(file.stat().st_mode & 0o777 == io.new_mode() for file in found.folder.iterdir())
    assert (found.was, found.architecture) == (own, "LlamaForCausalLM" if architecture in RELABELLED else own)
    assert config(found.folder)["architectures"] == [found.architecture]
    old, new = tensors(base), tensors(found.folder)
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(found.changed) - set(found.added)
    assert set(new) - set(old) == set(found.added)
    assert all(not new[name].any() for name in set(found.added) - set(found.changed))
    assert bool(found.added) == (architecture not in HAS_BIAS)
    read = tf.AutoTokenizer.from_pretrained
    assert read(found.folder)(tiny.CORPUS[0]).input_ids == read(base)(tiny.CORPUS[0]).input_ids


MEASURED = """
import resource, sys
import torch, transformers
torch.set_num_threads(1)
import transformer_lens.model_bridge
from lofit_lens import HeadSet, Lofit
from lofit_lens.sharing.folded import export_folded
what, base, out = sys.argv[1:]
if what == "load":
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        model(torch.randint(0, 400, (1, 41)))
else:
    adapter = Lofit((12, 8, 64), HeadSet([(1, 2), (7, 4)]))
    with torch.no_grad():
        for head in adapter.heads:
            adapter.A[head], adapter.v[head] = 0.5, 1.0
    export_folded(adapter, out, base=base, device="cpu", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_peak_memory_is_at_most_one_file_above_the_loaded_model(tmp_path):
    """Two processes that import the same: one loads 158 MiB in 9 files with plain transformers and runs it, one exports."""
    base = tmp_path / "base"
    shape = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1536, "num_hidden_layers": 12}
    tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny.SHARED, **shape})).save_pretrained(base, max_shard_size="20MB")
    tiny.tokenizer().save_pretrained(base)
    files = [f.stat().st_size for f in base.glob("*.safetensors")]
    peaks = {}
    for what in ("load", "export"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, what, base, tmp_path / "out"], capture_output=True, text=True, check=True
        )
        peaks[what] = int(done.stdout.split()[-1])
    assert len(files) > 7
    assert peaks["export"] <= peaks["load"] + max(files)
