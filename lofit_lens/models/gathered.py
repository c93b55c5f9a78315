"""Rows of a key-value cache, gathered when new tokens join them: one copy instead of three.

Answers of one question attend to the same keys. Selecting rows first, joining new keys to them and turning the result into
the layout that attention multiplies would each copy everything that is cached. Here the first forward pass copies each
row once, into `[batch, heads, pos, d_head]` memory, which both classes then multiply without a further copy.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

Rotary = Callable[..., Tensor]  # HookedTransformer's `apply_rotary(x, past_kv_pos_offset, attention_mask)` of one layer


def joined(
    source: Float[Tensor, "rows heads past d_head"],
    rows: Int[Tensor, " batch"] | None,
    new: Float[Tensor, "batch heads new d_head"],
) -> Float[Tensor, "batch heads both d_head"]:
    """Chosen rows of what is cached (None = all, in order), followed by new keys or values."""
    if torch.is_grad_enabled():  # each piece written in place would have a backward pass of its own over the whole
        chosen = source.expand(new.shape[0], -1, -1, -1) if source.shape[0] == 1 else source
        chosen = chosen if rows is None or source.shape[0] == 1 else source[rows.to(source.device)]
        return torch.cat([chosen, new], dim=2)
    past = source.shape[2]
    out = new.new_empty(new.shape[0], new.shape[1], past + new.shape[2], new.shape[3])
    if rows is None or source.shape[0] == 1:
        out[:, :, :past] = source
    elif out.device.type == "cpu":  # row by row is twice as fast as an indexed copy here
        for i, row in enumerate(rows.tolist()):
            out[i, :, :past] = source[row]
    else:
        out[:, :, :past] = source[rows.to(source.device)]
    out[:, :, past:] = new
    return out


@dataclass
class HookedEntry:
    """Stands where HookedTransformer's cache has one layer's entry; `keep=False` leaves it as it was after a pass.

    With `rotated`, keys are kept as rotary embedding left them. HookedTransformer keeps them as they were before and rotates
    all of them again in every pass, which costs more than the rest of its attention; see `rotating_new_keys`.
    """

    keys: Float[Tensor, "rows heads past d_head"]
    values: Float[Tensor, "rows heads past d_head"]
    rows: Int[Tensor, " batch"] | None
    rotated: bool
    keep: bool = True

    def select(self, rows: Int[Tensor, " batch"], *, keep: bool) -> "HookedEntry":
        """Rows of these rows."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows], keep=keep)

    @property
    def past_keys(self) -> Float[Tensor, "batch past heads d_head"]:
        """What is cached; before the first pass over chosen rows only its shape is right, which is all that is read."""
        keys = self.keys if self.rows is None else self.keys[:1].expand(len(self.rows), *self.keys.shape[1:])
        return keys.transpose(1, 2)

    def append(
        self, new_keys: Float[Tensor, "batch new heads d_head"], new_values: Float[Tensor, "batch new heads d_head"]
    ) -> tuple[Float[Tensor, "batch some heads d_head"], Float[Tensor, "batch both heads d_head"]]:
        """Join new keys and values, as HookedTransformer's attention asks for them; keys yet to be rotated come back alone."""
        values = joined(self.values, self.rows, new_values.transpose(1, 2))
        keys = new_keys if self.rotated else self._with_keys(new_keys)
        if self.keep:
            self.values = values
            self.rows = self.rows if self.rotated else None  # else the keys need them still
        return keys, values.transpose(1, 2)

    def rotate(self, original: Rotary, x: Tensor, past: int, mask: Tensor | None) -> Tensor:
        """What `apply_rotary` is asked for in this layer: first queries, whose offset is what is cached, then keys, from 0."""
        if past > 0:
            return original(x, past, mask)
        keys = self._with_keys(original(x, self.keys.shape[2], mask))
        if self.keep:
            self.rows = None
        return keys

    def _with_keys(self, new: Float[Tensor, "batch new heads d_head"]) -> Float[Tensor, "batch both heads d_head"]:
        keys = joined(self.keys, self.rows, new.transpose(1, 2))
        if self.keep:
            self.keys = keys
        return keys.transpose(1, 2)


def hooked_entries(model: Any, cache: Any, mask: Int[Tensor, "batch pos"]) -> list[HookedEntry]:
    """The entries of a HookedTransformer's cache after its first pass, keys rotated once where positions are rotary.

    Dynamic scaling (Qwen 1) turns all keys anew as the text grows, so there they stay as they were.
    """
    rotated = model.cfg.positional_embedding_type == "rotary" and not model.cfg.use_dynamic_ntk_rope
    found = []
    for block, entry in zip(model.blocks, cache.entries, strict=True):
        keys = block.attn.apply_rotary(entry.past_keys, 0, mask) if rotated else entry.past_keys
        found.append(HookedEntry(keys.transpose(1, 2), entry.past_values.transpose(1, 2), None, rotated))
    return found


@contextlib.contextmanager
def rotating_new_keys(model: Any, entries: Sequence[HookedEntry]) -> Iterator[None]:
    """While this holds, attention rotates only keys that its entry has not seen; the layers are put back as they were."""
    with contextlib.ExitStack() as stack:
        for block, entry in zip(model.blocks, entries, strict=True):
            if entry.rotated:
                rotary = partial(_rotary, entry, block.attn.apply_rotary)
                stack.enter_context(replaced(block.attn, "apply_rotary", rotary))
        yield


def _rotary(entry: HookedEntry, original: Rotary, x: Tensor, past: int = 0, mask: Tensor | None = None) -> Tensor:
    return entry.rotate(original, x, past, mask)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Hold another value in an object's own `__dict__` for the length of the block."""
    had, before = name in owner.__dict__, owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            owner.__dict__[name] = before
        else:
            del owner.__dict__[name]


class BridgeLayer(DynamicLayer):
    """Stands where a Hugging Face cache has a layer that grows without limit."""

    def __init__(self, source: DynamicLayer, rows: Int[Tensor, " batch"]):
        super().__init__()
        self.dtype, self.device = source.dtype, source.device
        self.keys, self.values = source.keys, source.values
        self.rows: Tensor | None = rows
        self.is_initialized = True

    def select(self, rows: Int[Tensor, " batch"]) -> "BridgeLayer":
        """Rows of these rows."""
        return BridgeLayer(self, rows if self.rows is None else self.rows[rows])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch heads both d_head"], Float[Tensor, "batch heads both d_head"]]:
        """Join new keys and values `[batch, heads, new, d_head]`, as attention asks for them."""
        assert self.keys is not None
        assert self.values is not None
        self.keys = joined(self.keys, self.rows, key_states)
        self.values = joined(self.values, self.rows, value_states)
        self.rows = None
        return self.keys, self.values
