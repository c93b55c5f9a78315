"""An adapter as TransformerLens' specification for vLLM: what its own code makes of it on a plain model, and refusals.

vLLM needs a GPU. What stands between it and us is TransformerLens' code that needs no vLLM: it checks a specification, writes
it into buffers, and adds these by a hook on each layer's `self_attn`.
"""

import json

import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import AdapterError, ModelError
from lofit_lens.models import logits_of
from tests import tiny
from tests.adapters import CHOSEN, output_projection, random_adapter
from tests.test_iti import random_iti

TOKENS = torch.randint(3, 400, (1, 10), generator=torch.Generator().manual_seed(3))
slow = pytest.mark.slow
THERE = [
    pytest.param(a, marks=() if a in ("llama-gqa", "gemma2") else slow)
    for a in ("llama", "llama-gqa", "llama-bias", "gemma", "gemma2", "gemma3", "mistral", "qwen2", "qwen3")
]


@torch.no_grad()
def hooked(model, adapter):
    with adapter.attached(model):
        return logits_of(model, TOKENS, torch.ones_like(TOKENS))


@torch.no_grad()
def with_hooks(plain, hooks):
    """Logits with a function over each layer's attention output `[pos, d_model]`, as vLLM has it."""
    handles = [
        plain.model.layers[layer].self_attn.register_forward_hook(
            lambda module, args, out, fn=fn: (fn(out[0][0])[None], *out[1:])
        )
        for layer, fn in hooks.items()
    ]
    try:
        return plain(TOKENS).logits
    finally:
        for handle in handles:
            handle.remove()


def layer_of(name):
    assert name.endswith(".attn.hook_out")
    return int(name.split(".")[1])


@pytest.mark.parametrize("architecture", THERE)
def test_adding_the_values_is_the_adapter(loaded, hf, architecture):
    """At attention's output of the edited layers, by hand; it goes through JSON without a loss."""
    model, plain = loaded(architecture, "bridge"), hf(architecture)
    lofit = random_adapter(model, A=0.0)
    spec = ll.to_vllm(lofit)
    assert list(spec) == ["blocks.0.attn.hook_out", "blocks.2.attn.hook_out"]
    assert json.loads(json.dumps(spec)) == spec
    assert {one["op"] for one in spec.values()} == {"add"}
    values = {layer_of(name): torch.tensor(one["value"]) for name, one in spec.items()}
    hooks = {layer: lambda out, b=b: out + b for layer, b in values.items()}
    assert (with_hooks(plain, hooks) - hooked(model, lofit)).abs().max() < 1e-5
    assert (with_hooks(plain, {}) - hooked(model, lofit)).abs().max() > 0.05


@pytest.mark.parametrize("architecture", THERE)
def test_transformer_lens_own_code_takes_it(loaded, hf, architecture):
    """Its driver finds it valid, its worker writes it into the buffers, and its hook adds it."""
    overlays = pytest.importorskip(
        "transformer_lens.model_bridge.sources.vllm.overlays", reason="TransformerLens 4 only"
    )
    from transformer_lens.model_bridge.sources.vllm import driver, plugin, worker_extension

    model, plain = loaded(architecture, "bridge"), hf(architecture)
    iti = random_iti(model)
    spec = ll.to_vllm(iti)
    places = overlays.get_overlay(type(plain).__name__).capture_specs(plain.config)
    reader = object.__new__(driver.VLLMDriver)
    reader.supported_hook_points = frozenset(places)
    reader._hook_widths = {name: width for name, (_, width) in places.items()}
    reader._enable_batching = reader._enable_position_interventions = False
    checked = reader._validate_interventions(spec)
    assert checked == spec

    worker = worker_extension.TLWorkerExtension()
    worker._tl_scale_buffers = {name: torch.ones(width) for name, (_, width) in places.items()}
    worker._tl_bias_buffers = {name: torch.zeros(width) for name, (_, width) in places.items()}
    worker.tl_set_interventions(checked)
    hooks = {}
    for name, (path, width) in places.items():
        if not path.endswith(".self_attn"):
            continue
        assert worker_extension.resolve_dot_path(plain, path) is plain.model.layers[layer_of(name)].self_attn
        buffers = (torch.zeros(64, width), worker._tl_scale_buffers[name], worker._tl_bias_buffers[name])
        counted = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        theirs = plugin._make_capture_hook(*buffers, *counted)
        hooks[layer_of(name)] = lambda out, theirs=theirs: theirs(None, (), out)
    assert (with_hooks(plain, hooks) - hooked(model, iti)).abs().max() < 1e-5


def test_what_is_refused(loaded, bridge_llama, checkpoint):
    """Scalings, other positions, other weights; and models whose attention vLLM keeps elsewhere."""
    with pytest.raises(AdapterError, match=r"scales heads.*export_folded"):
        ll.to_vllm(random_adapter(bridge_llama))
    with pytest.raises(AdapterError, match="only at the positions 'answer'"):
        ll.to_vllm(random_iti(bridge_llama, positions="answer"))
    lofit = random_adapter(bridge_llama, A=0.0)
    with pytest.raises(AdapterError, match="other weights"):
        ll.to_vllm(lofit, base=checkpoint("llama-bias"))
    for architecture in ("gpt2", "opt"):
        with pytest.raises(ModelError, match=r"hooks model\.layers\.N\.self_attn in vLLM.*export_folded"):
            ll.to_vllm(random_adapter(loaded(architecture, "bridge"), A=0.0))


@torch.no_grad()
def test_the_numbers_by_hand(bridge_llama, hf, tmp_path):
    """Each value is W_O v over all heads of the layer; a base can be named."""
    lofit = random_adapter(bridge_llama, CHOSEN, A=0.0)
    lofit.meta.model = None
    spec = ll.to_vllm(lofit, base=tiny.save(tmp_path / "base", seed=0))
    for layer in (0, 2):
        W = output_projection(hf("llama"), layer).weight
        expected = sum(W[:, 8 * h.head : 8 * h.head + 8] @ lofit.v[h] for h in lofit.heads if h.layer == layer)
        assert torch.allclose(torch.tensor(spec[f"blocks.{layer}.attn.hook_out"]["value"]), expected, atol=1e-6)
