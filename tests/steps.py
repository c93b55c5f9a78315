"""What a training step computes, for tests that run it in two ways: logits and gradients with every head's z edited."""

import contextlib

import torch
from transformers import PretrainedConfig

from lofit_lens.interventions import Lofit
from lofit_lens.models import load_model, logits_of
from tests import tiny

KERNEL = "scaled_dot_product_attention"  # of torch.nn.functional
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(3, 400, (3, 12), generator=GENERATOR)


def padded(side):
    """Twelve, seven and four tokens in one batch; padding is filled with ordinary tokens so that a lost mask shows."""
    mask = torch.zeros_like(TOKENS)
    for row, n in enumerate((12, 7, 4)):
        mask[row, {"right": slice(0, n), "left": slice(12 - n, 12), "none": slice(None)}[side]] = 1
    return TOKENS, mask


def loaded_from(config, folder, monkeypatch, backend):
    """A tiny model of a configuration that the suite has no other use for."""
    monkeypatch.setattr(tiny, "configs", lambda: {"other": config})
    return load_model(tiny.save(folder / "plain", "other"), backend=backend, device="cpu")


def adapter(model, seed=0):
    """Scalings and offsets of some size on every head, both trainable."""
    lofit = Lofit.for_model(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        lofit.A.normal_(0, 0.3, generator=generator)
        lofit.v.normal_(0, 0.3, generator=generator)
    lofit.A.requires_grad_()
    lofit.v.requires_grad_()
    return lofit


def run(model, tokens, mask, *around, logits=logits_of):
    """Logits at tokens, and the gradients of a weighted sum of them with respect to A and v, inside given blocks."""
    lofit = adapter(model)
    with contextlib.ExitStack() as stack:
        for block in around:
            stack.enter_context(block(model))
        stack.enter_context(lofit.attached(model))
        found = logits(model, tokens, mask)
        found = found[mask.bool()] if found.ndim == 3 else found
        weights = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
        (found * weights).sum().backward()
    return found.detach(), lofit.A.grad, lofit.v.grad


def close(found, wanted, within):
    """Whether all tensors agree within a share of each one's largest number."""
    return all((f - w).abs().max() <= within * w.abs().max() for f, w in zip(found, wanted, strict=True))


def kept_bytes(model, forward):
    """Bytes that a forward keeps for backward, each piece of memory once, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = forward()
    own |= {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    del out
    return total


def snapshot(model):
    """All that a block may change about a model: own attributes, hooks, configurations, memory layout, weights, modes."""
    modules = dict(model.named_modules())
    configs = {id(c): c for m in modules.values() if isinstance(c := m.__dict__.get("config"), PretrainedConfig)}
    return {
        "attributes": {n: {k: id(v) for k, v in m.__dict__.items() if callable(v)} for n, m in modules.items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in modules.items()},
        "configs": {
            i: {k: v for k, v in c.__dict__.items() if "attn" in k or "attent" in k} for i, c in configs.items()
        },
        "layout": {n: (p.stride(), p.requires_grad) for n, p in model.named_parameters()},
        "weights": {n: p.detach().double().sum().item() for n, p in model.named_parameters()},
    }
