"""Edits of the residual stream of a plain Hugging Face model, at the outputs of its blocks, written without the library."""

import contextlib

import torch


def blocks(plain):
    """The decoder's blocks."""
    kind = type(plain).__name__
    if kind == "GPT2LMHeadModel":
        return plain.transformer.h
    if kind == "GPTNeoXForCausalLM":
        return plain.gpt_neox.layers
    return plain.model.decoder.layers if kind == "OPTForCausalLM" else plain.model.layers


@contextlib.contextmanager
def at_blocks(plain, *edits):
    """Put `(layer, edit)` on block outputs `[batch, pos, d_model]`, in the order given; None leaves the output as it is."""

    def hook(edit):
        def apply(module, args, out):
            h = out[0] if isinstance(out, tuple) else out
            new = edit(h)
            if new is None:
                return None
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return apply

    handles = [blocks(plain)[layer].register_forward_hook(hook(edit)) for layer, edit in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adding(vector, start=0):
    """An edit that adds a vector (or one a position) from a position on."""

    def edit(h):
        new = h.clone()
        new[:, start:] += vector[start:] if vector.ndim == 2 else vector
        return new

    return edit


@torch.no_grad()
def streams(plain, ids, layers, *edits):
    """Layer -> `[pos, d_model]` of one sequence, after the edits."""
    seen = {}

    def recorder(layer):
        def keep(h):
            seen[layer] = h[0].clone()

        return layer, keep

    with at_blocks(plain, *edits, *map(recorder, layers)):
        plain(torch.tensor([ids]))
    return seen
