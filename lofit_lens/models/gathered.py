"""Rows of a KV cache, gathered when new tokens join them: one copy instead of three; then grown in-place.

Answers to one question attend to the same keys. Selecting rows, joining new keys to them and transposing the result into
the layout that attention multiplies would each copy the whole cache. Here the first forward pass copies each row once, into
`[batch, heads, pos, d_head]` memory, which both classes then multiply without a further copy. That memory has spare room, so
that a decoded token is written after the earlier ones.
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

ROOM = 32  # least number of positions that a cache grows by
Rotary = Callable[..., Tensor]  # HookedTransformer's `apply_rotary(x, past_kv_pos_offset, attention_mask)` of one layer


@dataclass
class Kept:
    """Keys or values of one layer: positions in use, followed by room for future tokens.

    Attributes:
        held: cached values; positions from `n` on are spare room.
        n: number of positions in use.
        rows: chosen rows of `held`, copied when tokens join them; None = all, in order.
    """

    held: Float[Tensor, "rows heads room d_head"]
    n: int
    rows: Int[Tensor, " batch"] | None = None

    @classmethod
    def of(cls, found: Float[Tensor, "rows heads past d_head"]) -> "Kept":
        """Keep keys or values as they are, without room."""
        return cls(found, found.shape[2])

    @property
    def seen(self) -> Float[Tensor, "rows heads past d_head"]:
        """Positions in use, of all rows that are held."""
        return self.held[:, :, : self.n]

    def select(self, rows: Int[Tensor, " batch"]) -> "Kept":
        """Select from these rows; nothing is copied yet."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def join(
        self, new: Float[Tensor, "batch heads new d_head"], *, keep: bool
    ) -> Float[Tensor, "batch heads both d_head"]:
        """Return the cache followed by new keys or values, which stay if `keep`; spare room is used while there is any."""
        n = self.n + new.shape[2]
        if torch.is_grad_enabled():  # each in-place write would add a backward pass over the whole tensor
            whole = torch.cat([self._chosen(new.shape[0]), new], dim=2)
        elif keep and self.rows is None and n <= self.held.shape[2]:
            whole = self.held
            whole[:, :, self.n : n] = new
        else:
            room = max(ROOM, n // 4) if keep else 0
            whole = new.new_empty(new.shape[0], new.shape[1], n + room, new.shape[3])
            self._copy_to(whole[:, :, : self.n])
            whole[:, :, self.n : n] = new
        if keep:
            self.held, self.n, self.rows = whole, n, None
        return whole[:, :, :n]

    @classmethod
    def together(cls, parts: "Sequence[Kept]") -> "Kept":
        """Concatenate the rows of several; rows with fewer positions in use get leading zeros."""
        n, first = max(part.n for part in parts), parts[0].held
        counts = [len(part.held) if part.rows is None else len(part.rows) for part in parts]
        held = first.new_zeros(sum(counts), first.shape[1], n + max(ROOM, n // 4), first.shape[3])
        for part, rows in zip(parts, held.split(counts), strict=True):
            part._copy_to(rows[:, :, n - part.n : n])
        return cls(held, n)

    def _chosen(self, batch: int) -> Float[Tensor, "batch heads past d_head"]:
        if self.rows is None:
            return self.seen
        return self.seen.expand(batch, -1, -1, -1) if len(self.held) == 1 else self.seen[self.rows.to(self.held.device)]

    def _copy_to(self, out: Float[Tensor, "batch heads past d_head"]) -> None:
        if self.rows is not None and len(self.held) > 1 and out.device.type == "cpu":
            for i, row in enumerate(self.rows.tolist()):  # twice as fast as an indexed copy here
                out[i] = self.seen[row]
        else:
            out.copy_(self._chosen(len(out)))


@dataclass
class HookedEntry:
    """Replacement for one layer's entry in HookedTransformer's cache; with `keep=False` a pass leaves it unchanged.

    With `rotated`, keys are cached after rotary embedding. HookedTransformer caches them before it and rotates all of them
    again in every pass, which costs more than the rest of its attention; see `rotating_new_keys`.
    """

    keys: Kept
    values: Kept
    rotated: bool
    keep: bool = True

    def select(self, rows: Int[Tensor, " batch"], *, keep: bool) -> "HookedEntry":
        """Select from these rows."""
        return replace(self, keys=self.keys.select(rows), values=self.values.select(rows), keep=keep)

    @classmethod
    def together(cls, parts: "Sequence[HookedEntry]") -> "HookedEntry":
        """Concatenate the rows of several, as `Kept.together` does."""
        keys, values = (Kept.together([getattr(part, name) for part in parts]) for name in ("keys", "values"))
        return cls(keys, values, parts[0].rotated)

    @property
    def past_keys(self) -> Float[Tensor, "batch past heads d_head"]:
        """Cached keys; before the first pass over chosen rows only the shape is right, and nothing else is read."""
        keys, rows = self.keys.seen, self.keys.rows
        return (keys if rows is None else keys[:1].expand(len(rows), *keys.shape[1:])).transpose(1, 2)

    def append(
        self, new_keys: Float[Tensor, "batch new heads d_head"], new_values: Float[Tensor, "batch new heads d_head"]
    ) -> tuple[Float[Tensor, "batch some heads d_head"], Float[Tensor, "batch both heads d_head"]]:
        """Append new keys and values for HookedTransformer's attention; keys yet to be rotated are returned without the cache."""
        values = self.values.join(new_values.transpose(1, 2), keep=self.keep)
        return new_keys if self.rotated else self._with_keys(new_keys), values.transpose(1, 2)

    def rotate(self, original: Rotary, x: Tensor, past: int, mask: Tensor | None) -> Tensor:
        """Stand in for this layer's `apply_rotary`: first for queries, offset by the cached length, then for keys, from 0."""
        return original(x, past, mask) if past > 0 else self._with_keys(original(x, self.keys.n, mask))

    def _with_keys(self, new: Float[Tensor, "batch new heads d_head"]) -> Float[Tensor, "batch both heads d_head"]:
        return self.keys.join(new.transpose(1, 2), keep=self.keep).transpose(1, 2)


def hooked_entries(model: Any, cache: Any, mask: Int[Tensor, "batch pos"]) -> list[HookedEntry]:
    """Return the entries of a HookedTransformer's cache after its first pass, keys rotated once if positions are rotary.

    Dynamic scaling (Qwen 1) rotates all keys again as the text grows, so there they stay unrotated.
    """
    rotated = model.cfg.positional_embedding_type == "rotary" and not model.cfg.use_dynamic_ntk_rope
    found = []
    for block, entry in zip(model.blocks, cache.entries, strict=True):
        keys = block.attn.apply_rotary(entry.past_keys, 0, mask) if rotated else entry.past_keys
        keys, values = Kept.of(keys.transpose(1, 2)), Kept.of(entry.past_values.transpose(1, 2))
        found.append(HookedEntry(keys, values, rotated))
    return found


@contextlib.contextmanager
def rotating_new_keys(model: Any, entries: Sequence[HookedEntry]) -> Iterator[None]:
    """Have attention rotate only keys that its entry has not seen, within the block; the layers are restored on exit."""
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
    """Hold another value in an object's own `__dict__` within the block."""
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
    """Replacement for a Hugging Face cache layer that grows without limit; transformers reads lengths from `keys`."""

    def __init__(self, keys: Kept, values: Kept, *, keep: bool = True):
        super().__init__()
        self.kept, self.keep = (keys, values), keep
        self.dtype, self.device = keys.held.dtype, keys.held.device
        self.keys, self.values = keys.seen, values.seen
        self.is_initialized = True

    @classmethod
    def of(cls, layer: Any) -> Any:
        """Convert a filled layer that grows without limit; any other (a window, an index, a state) is returned unchanged."""
        if type(layer) is not DynamicLayer or not layer.is_initialized:
            return layer
        assert layer.keys is not None
        assert layer.values is not None
        return cls(Kept.of(layer.keys), Kept.of(layer.values))

    def select(self, rows: Int[Tensor, " batch"], *, keep: bool) -> "BridgeLayer":
        """Select from these rows."""
        keys, values = self.kept
        return BridgeLayer(keys.select(rows), values.select(rows), keep=keep)

    @classmethod
    def together(cls, parts: "Sequence[BridgeLayer]") -> "BridgeLayer":
        """Concatenate the rows of several, as `Kept.together` does."""
        keys, values = (Kept.together([part.kept[i] for part in parts]) for i in range(2))
        return cls(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch heads both d_head"], Float[Tensor, "batch heads both d_head"]]:
        """Append new keys and values `[batch, heads, new, d_head]`; attention calls this."""
        keys, values = self.kept
        self.keys, self.values = keys.join(key_states, keep=self.keep), values.join(value_states, keep=self.keep)
        return self.keys, self.values
