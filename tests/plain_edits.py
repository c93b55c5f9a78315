"""RED, LoReFT, post-block steering and LoRA on plain Hugging Face models, by hooks on modules, written without the library."""

import contextlib

import torch

from lofit_lens.interventions import Lora, LoReft, PostBlock, Red


def blocks_of(plain):
    """The decoder layers."""
    for path in ("transformer.h", "gpt_neox.layers", "model.decoder.layers", "model.layers"):
        found = plain
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise AssertionError(type(plain))


def mlp_of(block):
    """The module whose output is added to the residual stream behind attention."""
    return block.fc2 if hasattr(block, "fc2") else block.mlp


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _like(out, new):
    return (new, *out[1:]) if isinstance(out, tuple) else new


def _red(red, at):
    return lambda module, args, out: _like(out, _first(out) * red.s[at] + red.b[at])


def _loreft(loreft, at, where):
    def hook(module, args, out):
        h = _first(out)
        R, W, b = loreft.R[at], loreft.W[at], loreft.b[at]
        new = h + (h @ W.T + b - h @ R.T) @ R
        keep = torch.ones(h.shape[1], dtype=torch.bool) if where is None else where(h.shape[1])
        return _like(out, torch.where(keep[None, :, None], new, h))

    return hook


def _post_block(adapter, at):
    def hook(module, args, out):
        h = _first(out)
        x = h @ adapter.D[at].T
        if adapter.f == "silu":
            x = x / (1 + torch.exp(-x))
        return _like(out, h + x @ adapter.U[at].T)

    return hook


def _lora(plain, lora, layer):
    """(module, hook) of each changed projection of a layer; fused ones by the part of their output that belongs to it."""
    kind, block = type(plain).__name__, blocks_of(plain)[layer]
    n_heads = plain.config.num_attention_heads
    for name in lora.targets:
        A, B = lora.A[f"L{layer}_{name}"], lora.B[f"L{layer}_{name}"]

        def change(x, A=A, B=B):
            return (x @ A.T @ B.T) * (lora.alpha / lora.rank)

        part = "qkv".index(name) if name in "qkv" else None
        if kind == "GPT2LMHeadModel" and part is not None:

            def hook(module, args, out, change=change, part=part):
                thirds = list(out.chunk(3, dim=-1))
                thirds[part] = thirds[part] + change(args[0])
                return torch.cat(thirds, dim=-1)

            yield block.attn.c_attn, hook
        elif kind == "GPTNeoXForCausalLM" and part is not None:

            def hook(module, args, out, change=change, part=part):
                by_head = list(out.unflatten(-1, (n_heads, 3, -1)).unbind(-2))
                by_head[part] = by_head[part] + change(args[0]).unflatten(-1, (n_heads, -1))
                return torch.stack(by_head, dim=-2).flatten(-3)

            yield block.attention.query_key_value, hook
        else:
            yield getattr(block.self_attn, f"{name}_proj"), lambda m, args, out, change=change: out + change(args[0])


@contextlib.contextmanager
def edited_plain(plain, adapter, where=None):
    """The adapter's edit. `where(n)` gives True for the positions to edit of n (LoReFT); None = all."""
    pairs = []
    if isinstance(adapter, Lora):
        pairs = [pair for layer in range(adapter.n_layers) for pair in _lora(plain, adapter, layer)]
    elif isinstance(adapter, Red):
        pairs = [(mlp_of(blocks_of(plain)[n]), _red(adapter, i)) for i, n in enumerate(adapter.layers)]
    elif isinstance(adapter, LoReft):
        pairs = [(blocks_of(plain)[n], _loreft(adapter, i, where)) for i, n in enumerate(adapter.layers)]
    elif isinstance(adapter, PostBlock):
        pairs = [(blocks_of(plain)[n], _post_block(adapter, i)) for i, n in enumerate(adapter.layers)]
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_and_last(n_prompt, first=7, last=7):
    """f7+l7 by its definition: a function of the number of positions."""
    places = {*range(min(first, n_prompt)), *range(max(0, n_prompt - last), n_prompt)}
    return lambda n: torch.tensor([i in places for i in range(n)])
