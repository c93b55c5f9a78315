"""A model that computes the same function, but in which all heads of a layer are equally good places for an offset.

    z'_h = z_h at head h's own places, 0 elsewhere        n_heads * d_head wide
    W_O' = all heads' W_O, at every head                  sum over h of W_O' z'_h = sum over h of W_O[h] z_h

Every head writes what it wrote before. But an offset at any head of a layer can now reach all that the layer's heads could reach
together. A task that can be steered at some heads of a layer can then be steered equally well at any others: a known case of an
edit that is *not* localized among the heads of its layers.
"""

import copy
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import LlamaForCausalLM

from lofit_lens.errors import InputError


@torch.no_grad()
def spread_evenly(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a Llama with the same logits (up to rounding) in which each head reaches what its layer's heads reach together.

    The heads become `n_heads` times as wide; queries and keys keep their values and rotate by the same angles.

    Args:
        model: a Llama with as many key-value heads as heads, and the usual rotary frequencies.

    Raises:
        InputError: fewer key-value heads than heads, a bias, scaled rotary frequencies, or head sizes that give other angles.
    """
    config = copy.deepcopy(model.config)
    heads = config.num_attention_heads
    size = config.head_dim or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    if config.num_key_value_heads != heads or config.attention_bias or rope.get("rope_type", "default") != "default":
        raise InputError(
            f"{config.num_key_value_heads} key-value heads of {heads}, attention bias {config.attention_bias}, rotary "
            f"{rope.get('rope_type', 'default')}; give a Llama with a key-value head for each head, no bias and default rotary"
        )
    config.head_dim = heads * size
    made = LlamaForCausalLM(config).to(model.dtype)  # pyright: ignore[reportArgumentType]
    own, wide = model.state_dict(), {}
    for name, weight in own.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Logits are divided by the root of the head's size, which is `heads` times as large.
            wide[name] = _turning(weight, heads) * (heads**0.5 if "q_proj" in name else 1)
        elif name.endswith("v_proj.weight"):
            wide[name] = _own_places(weight, heads)
        elif name.endswith("o_proj.weight"):
            wide[name] = repeat(weight, "out inner -> out (head inner)", head=heads)
        else:
            wide[name] = weight
    made.load_state_dict(wide)
    return made.eval()


def _turning(weight: Tensor, heads: int) -> Tensor:
    """Place rows of queries or keys so that the wider head rotates by the same angles: pair i of a head at pair i * heads."""
    rows = rearrange(weight, "(head half pair) d -> head half pair d", head=heads, half=2)
    wide = rows.new_zeros(heads, 2, rows.shape[2] * heads, rows.shape[3])
    wide[:, :, ::heads] = rows
    return rearrange(wide, "head half pair d -> (head half pair) d")


def _own_places(weight: Tensor, heads: int) -> Tensor:
    """Place rows of values so that each head has its own places."""
    rows = rearrange(weight, "(head size) d -> head size d", head=heads)
    wide: Any = rows.new_zeros(heads, heads, rows.shape[1], rows.shape[2])
    wide[range(heads), range(heads)] = rows
    return rearrange(wide, "head place size d -> (head place size) d")
