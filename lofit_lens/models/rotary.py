"""Compare HookedTransformer's positions with Hugging Face's where a probe of a few tokens cannot.

Rotary angles grow with the position, and a sliding window cuts off distant tokens: both are compared as tables instead.
"""

from typing import Any

import torch

CHANGING = ("dynamic", "longrope")  # angles that depend on the length of the text
FAR = 2047  # position at which angles are compared
NEAR = 1e-2  # of a cosine; float32 angles at that position are off by 1e-4


def positions_refusal(cfg: Any, config: Any) -> str | None:
    """Return why HookedTransformer's configuration would treat distant tokens differently from Hugging Face's, or None."""
    text = config.get_text_config()
    if changing := changing_angles(config):
        return (
            f"its rotary angles change with the length of the text (rope_type {changing!r}), which it does not follow"
        )
    window, n_ctx, n_layers = getattr(text, "sliding_window", None), int(cfg.n_ctx), int(cfg.n_layers)
    if not isinstance(window, int) or getattr(text, "use_sliding_window", True) is False or window >= n_ctx:
        window = None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * n_layers
    theirs = [window if kind == "sliding_attention" else None for kind in kinds]
    local = (cfg.attn_types or ["local"] * n_layers) if cfg.use_local_attn else ["global"] * n_layers
    ours = [cfg.window_size if kind == "local" and (cfg.window_size or n_ctx) < n_ctx else None for kind in local]
    for layer, (want, got) in enumerate(zip(theirs, ours, strict=True)):
        if want != got:
            return f"layer {layer} has a sliding window of {want or 'no'} tokens, but HookedTransformer would use {got or 'none'}"
    return None


def changing_angles(config: Any) -> str | None:
    """Return the kind of rotary scaling whose angles depend on the length of the text, or None."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)}
    return next(iter(sorted(kinds.intersection(CHANGING))), None)


@torch.no_grad()
def rotary_refusal(model: Any, hf: Any) -> str | None:
    """Return why a HookedTransformer's rotary angles differ from the Hugging Face model's far from the start, or None."""
    known = []
    for module in hf.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.startswith("original"):
                if buffer.dtype != torch.float32:  # it was rounded when the model was cast
                    return None
                scaling = getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0)
                known.append((buffer.float().cpu(), float(scaling)))
    for layer, block in enumerate(model.blocks):
        table = getattr(block.attn, "rotary_cos", None)
        if table is None or not known:
            continue
        place = min(FAR, len(table) - 1)
        row = table[place].float().cpu()
        row = row[::2] if model.cfg.rotary_adjacent_pairs else row[: len(row) // 2]
        same = (
            f.shape == row.shape and bool(((place * f).cos() * scale - row).abs().max() < NEAR) for f, scale in known
        )
        if not any(same):
            return f"its rotary angles of layer {layer} differ from the Hugging Face model's at position {place}"
    return None
