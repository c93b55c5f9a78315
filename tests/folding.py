"""Adapters drawn for a checkpoint, folded and read again: what the tests of folded checkpoints share."""

import gc
import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from lofit_lens import Lofit
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import planned_info
from lofit_lens.sharing import open_checkpoint, outputs_of
from lofit_lens.sharing.folded import export_folded
from tests.adapters import CHOSEN

RELABELLED = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TOKENS = torch.randint(3, 400, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """An export collects garbage to let go of a model; what was imported before is no garbage and need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def drawn(base, *, A=0.5, v=0.5, heads=CHOSEN):
    """A LoFiT adapter of a checkpoint with normal numbers on its heads."""
    made = Lofit(outputs_of(open_checkpoint(base)).shape, heads, AdapterMeta(planned_info(base, backend="bridge")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in made.heads:
            made.A[head] = torch.randn(made.d_head, generator=generator) * A
            made.v[head] = torch.randn(made.d_head, generator=generator) * v
    return made


def plain(folder, **more):
    return tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **more)


def tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(config(folder) | fields))


def fold(adapter, folder, **more):
    return export_folded(adapter, folder, device="cpu", progress=False, **more)


@torch.no_grad()
def said(model, tokens=TOKENS):
    return model(tokens, attention_mask=torch.ones_like(tokens)).logits, model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=6, pad_token_id=0
    )
