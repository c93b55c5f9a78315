"""models/fused.py: the fused way is put in place only where a few passes prove it; what it cannot do is refused with a reason."""

import logging

import pytest
import torch
import transformers as tf
from torch import nn

from lofit_lens.models import (
    attending,
    fused_attention,
    fused_refusal,
    hook_z,
    hooked,
    load_model,
    logits_of,
    pattern_point,
)
from tests import tiny
from tests.conftest import BACKENDS, needs_hooked
from tests.steps import KERNEL, TOKENS, loaded_from, padded, run, snapshot


def test_the_proof_is_made_once_and_touches_nobody(fresh, kernels):
    """Whoever has hooks in place sees nothing of it, whatever they do; a second question runs nothing."""
    logits_of(fresh, *padded("none"))  # the bridge puts hooks of its own into a first pass
    before = snapshot(fresh)
    seen = []
    with (
        hooked(hook_z(fresh, 0), lambda z, hook: z + float("nan")),
        hooked(pattern_point(fresh, 0), lambda x, hook: seen.append(1)),
    ):
        assert fused_refusal(fresh) is None
    assert seen == []
    assert len(kernels) == 6  # a layer and side
    assert fused_refusal(fresh) is None
    assert len(kernels) == 6  # a layer and side
    assert snapshot(fresh) == before


def _scaled(inner):
    return lambda q, k, v, *rest, **named: inner(q, k, v, *rest, **{**named, "scale": 1.01 * named["scale"]})


def _maskless(inner):
    return lambda q, k, v, **named: inner(q, k, v, **{**named, "attn_mask": None})


@pytest.mark.parametrize("wrong", [_scaled, _maskless])
def test_wrong_numbers_are_refused(fresh, monkeypatch, caplog, wrong):
    """A kernel that scales a little otherwise, or forgets the mask: refused, said once, and the class's own way is taken."""
    monkeypatch.setattr(nn.functional, KERNEL, wrong(getattr(nn.functional, KERNEL)))
    tokens, mask = padded("left")
    wanted = logits_of(fresh, tokens, mask)
    with caplog.at_level(logging.INFO, logger="lofit_lens"):
        for _ in range(2):
            with fused_attention(fresh):
                assert torch.equal(logits_of(fresh, tokens, mask), wanted)
    assert "differs by" in fused_refusal(fresh)
    assert len([r for r in caplog.records if "own attention" in r.getMessage()]) == 1


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("way", ["silent", "bypassed"])
def test_a_hook_z_that_is_passed_by_is_refused(checkpoint, monkeypatch, on, way):
    """z that no hook sees, or whose edit is thrown away."""
    model = load_model(checkpoint("llama"), backend=on, device="cpu")
    inner = attending._inner if on == "bridge" else attending._attend

    def other(attn, *args, **named):
        point = attn.o.hook_in if on == "bridge" else attn.hook_z
        held = dict(point._forward_hooks)
        if way == "bypassed":  # it is called, and what it returns is dropped
            for key, hook in held.items():
                point._forward_hooks[key] = lambda m, a, out, hook=hook: (hook(m, a, out), None)[1]
        else:
            point._forward_hooks.clear()
        try:
            return inner(attn, *args, **named)
        finally:
            point._forward_hooks.update(held)

    monkeypatch.setattr(attending, "_inner" if on == "bridge" else "_attend", other)
    assert ("fires 0 times" if way == "silent" else "differs by") in fused_refusal(model)


@pytest.mark.parametrize(("config", "why"), [
    (tf.Gemma2Config(**tiny.WIDE, num_key_value_heads=2, head_dim=12, attn_logit_softcapping=5.0), "sdpa"),
    (tf.BloomConfig(vocab_size=400, hidden_size=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0), "sdpa"),
    (tf.GptOssConfig(**tiny.WIDE, num_key_value_heads=2, head_dim=12, num_local_experts=2, num_experts_per_tok=1), "sdpa"),
    (tf.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2), "hook_z"),
], ids=["softcap", "alibi", "sinks", "no attention"])  # fmt: skip
@torch.no_grad()
def test_what_the_kernel_cannot_do_is_refused_on_the_bridge(tmp_path, monkeypatch, config, why):
    """With the reason, and the model runs as ever."""
    model = loaded_from(config, tmp_path, monkeypatch, "bridge")
    wanted = logits_of(model, TOKENS, torch.ones_like(TOKENS))
    with fused_attention(model):
        assert torch.equal(logits_of(model, TOKENS, torch.ones_like(TOKENS)), wanted)
    assert why in fused_refusal(model)


@needs_hooked
@pytest.mark.parametrize(("name", "value", "why"), [
    ("attn_scores_soft_cap", 5.0, "soft cap"),
    ("attention_dir", "bidirectional", "bidirectional"),
    ("clip_qkv", 1.0, "clipped"),
    ("use_attention_sinks", True, "sinks"),
])  # fmt: skip
def test_what_the_kernel_cannot_do_is_refused_on_hooked(checkpoint, monkeypatch, name, value, why):
    """Read from the configuration, before anything is run."""
    model = load_model(checkpoint("llama"), backend="hooked", device="cpu")
    monkeypatch.setattr(model.cfg, name, value)
    assert why in fused_refusal(model)


@needs_hooked
def test_alibi_is_refused_on_hooked(tmp_path, monkeypatch):
    """Distances are added to the scores."""
    config = tf.BloomConfig(
        vocab_size=400, hidden_size=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = loaded_from(config, tmp_path, monkeypatch, "hooked")
    assert "alibi" in fused_refusal(model)


def test_a_replaced_attention_is_refused(fresh):
    """Somebody's own forward stays in place."""
    attn = fresh.blocks[1].attn
    own = attn.forward
    attn.forward = lambda *args, **named: own(*args, **named)
    assert "another attention forward" in fused_refusal(fresh)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_proven_too(checkpoint, backend, dtype):
    """Near what it is in float32, nearer than an edit is large."""
    model = load_model(checkpoint("llama-gqa"), backend=backend, dtype=dtype, device="cpu")
    assert fused_refusal(model) is None
    tokens, mask = padded("left")
    wanted, found = run(model, tokens, mask)[0], run(model, tokens, mask, fused_attention)[0]
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
