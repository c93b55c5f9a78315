"""Attention heads as data: one head, an ordered set of heads, and a score for every head.

`HeadScores [n_layers, n_heads] -> .top(k) -> HeadSet -> .mask()` is the path from step 1 of LoFiT
(arXiv 2406.01563, section 3: keep the K heads with the largest norm) to step 2.

>>> scores = HeadScores([[0.1, 0.9], [0.7, 0.2]], kind="A-norm")
>>> str(scores.top(2))
'L0H1 L1H0'
>>> scores.top(1) | HeadSet([(1, 1)], shape=(2, 2))
HeadSet(2 of 2x2 heads: L0H1 L1H1)
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import DataError, InputError
from lofit_lens.html import first_of, grid_html

SCHEMA = 1


class Head(NamedTuple):
    """One attention head, both indices from 0; printed `L12H7`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: "str | Sequence[int] | Head") -> "Head":
        """Read `"L12H7"`, `"12.7"` or a pair of integers.

        Raises:
            InputError: anything else, or a negative index.
        """
        if isinstance(text, np.ndarray):
            text = text.tolist()
        if isinstance(text, str):
            found = re.fullmatch(r"L?(\d+)[H.,:](\d+)", text.strip())
            if not found:
                raise InputError(f"{text!r} is not a head; write L12H7 (layer 12, head 7, both from 0)")
            return cls(int(found[1]), int(found[2]))
        pair = tuple(text) if isinstance(text, Sequence) else ()
        if len(pair) != 2 or not all(isinstance(i, int | np.integer) and i >= 0 for i in pair):
            raise InputError(f"{text!r} is not a head; give (layer, head), both whole numbers from 0")
        return cls(int(pair[0]), int(pair[1]))


@dataclass(frozen=True)
class HeadSet:
    """An ordered set of heads, best first, with optional scores.

    Args:
        heads: heads as `Head`, `(layer, head)` or `"L12H7"`; no head twice.
        scores: one number a head, same order, or None.
        shape: `(n_layers, n_heads)` of the model they belong to, or None if unknown.
        label: what they are, for tables and figures.

    Raises:
        InputError: a head twice or outside `shape`; scores of another length.
    """

    heads: tuple[Head, ...]
    scores: tuple[float, ...] | None = None
    shape: tuple[int, int] | None = None
    label: str = ""

    def __init__(
        self,
        heads: Iterable[Head | Sequence[int] | str],
        scores: Iterable[float] | None = None,
        shape: tuple[int, int] | None = None,
        label: str = "",
    ) -> None:
        listed = tuple(Head.parse(h) for h in heads)
        numbers = None if scores is None else tuple(float(s) for s in scores)
        if len(set(listed)) != len(listed):
            twice = next(h for i, h in enumerate(listed) if h in listed[:i])
            raise InputError(f"head {twice} is listed twice; a head set holds each head once")
        if numbers is not None and len(numbers) != len(listed):
            raise InputError(f"{len(numbers)} scores for {len(listed)} heads; give one score a head")
        object.__setattr__(self, "heads", listed)
        object.__setattr__(self, "scores", numbers)
        object.__setattr__(self, "shape", None if shape is None else (int(shape[0]), int(shape[1])))
        object.__setattr__(self, "label", label)
        if shape is not None:
            self.check(shape)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise InputError if a head lies outside `(n_layers, n_heads)`."""
        n_layers, n_heads = shape
        for h in self.heads:
            if h.layer >= n_layers or h.head >= n_heads:
                of = f"; this head set was made for {self.label}" if self.label else ""
                raise InputError(
                    f"head {h} is outside this model ({n_layers} layers of {n_heads} heads, both from 0){of}"
                )

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: object) -> bool:
        return isinstance(head, tuple | str) and Head.parse(head) in self.heads

    def __getitem__(self, index: int) -> Head:
        return self.heads[index]

    def _pick(self, keep: Iterable[int], label: str) -> "HeadSet":
        keep = list(keep)
        scores = None if self.scores is None else [self.scores[i] for i in keep]
        return HeadSet([self.heads[i] for i in keep], scores, self.shape, label)

    def _joint_shape(self, other: "HeadSet") -> tuple[int, int] | None:
        if self.shape and other.shape and self.shape != other.shape:
            raise InputError(f"these head sets belong to different models: {self.shape} and {other.shape} heads")
        return self.shape or other.shape

    def __and__(self, other: "HeadSet") -> "HeadSet":
        """Heads in both, in this set's order and with its scores."""
        shape = self._joint_shape(other)
        common = self._pick((i for i, h in enumerate(self.heads) if h in other.heads), "")
        return HeadSet(common.heads, common.scores, shape)

    def __or__(self, other: "HeadSet") -> "HeadSet":
        """Heads in either: this set's first, then the other's new ones; scores are dropped."""
        return HeadSet(
            self.heads + tuple(h for h in other.heads if h not in self.heads), shape=self._joint_shape(other)
        )

    def __sub__(self, other: "HeadSet") -> "HeadSet":
        """Heads of this set that are not in the other."""
        shape = self._joint_shape(other)
        left = self._pick((i for i, h in enumerate(self.heads) if h not in other.heads), "")
        return HeadSet(left.heads, left.scores, shape)

    def top(self, k: int) -> "HeadSet":
        """The first `k` heads.

        Raises:
            InputError: `k` below 1 or above the number of heads.
        """
        check_k(k, len(self), "this head set")
        return self._pick(range(k), self.label)

    def restrict(self, layers: Iterable[int]) -> "HeadSet":
        """Only the heads in these layers."""
        wanted = set(layers)
        return self._pick((i for i, h in enumerate(self.heads) if h.layer in wanted), self.label)

    def layer_counts(self, n_layers: int | None = None) -> Int[np.ndarray, " n_layers"]:
        """Number of chosen heads in each layer."""
        n = n_layers if n_layers is not None else self._need_shape()[0]
        return np.bincount([h.layer for h in self.heads], minlength=n).astype(np.int64)

    @property
    def mean_layer(self) -> float:
        """Mean layer index of the heads, layers counted from 0."""
        if not self.heads:
            raise InputError("an empty head set has no mean layer")
        return float(np.mean([h.layer for h in self.heads]))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that hold at least one head, ascending."""
        return tuple(sorted({h.layer for h in self.heads}))

    def mask(self, shape: tuple[int, int] | None = None) -> Bool[Tensor, "n_layers n_heads"]:
        """True at the chosen heads."""
        shape = shape or self._need_shape()
        self.check(shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        for h in self.heads:
            mask[h] = True
        return mask

    def _need_shape(self) -> tuple[int, int]:
        if self.shape is None:
            raise InputError("this head set does not know its model; give shape=(n_layers, n_heads)")
        return self.shape

    @classmethod
    def all(cls, shape: tuple[int, int]) -> "HeadSet":
        """Every head of a model, layer by layer."""
        return cls([(layer, head) for layer in range(shape[0]) for head in range(shape[1])], shape=shape, label="all")

    @classmethod
    def random(cls, shape: tuple[int, int], k: int, *, seed: int, exclude: "HeadSet | None" = None) -> "HeadSet":
        """`k` heads drawn evenly without replacement, by `random.Random(seed)`."""
        pool = [h for h in cls.all(shape) if exclude is None or h not in exclude.heads]
        check_k(k, len(pool), "this model")
        return cls(random.Random(seed).sample(pool, k), shape=shape, label=f"random (seed {seed})")

    @classmethod
    def from_npy(cls, path: str | Path, *, shape: tuple[int, int] | None = None, label: str = "") -> "HeadSet":
        """Read a head file of the official code: int64 `[k, 2]` = (layer, head), best first.

        Raises:
            DataError: missing, holding Python objects (never unpickled), or of another shape or type.
        """
        try:
            pairs = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"{path} is not a numpy file of integer pairs: {e}") from e
        if not isinstance(pairs, np.ndarray) or pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
            raise DataError(f"{path}: expected integers of shape [k, 2] = (layer, head)")
        return cls(pairs.tolist(), shape=shape, label=label or Path(path).stem)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; `from_dict` reads it back."""
        return {
            "kind": "lofit_lens.HeadSet", "schema": SCHEMA, "label": self.label,
            "shape": None if self.shape is None else list(self.shape),
            "heads": [list(h) for h in self.heads],
            "scores": None if self.scores is None else list(self.scores),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, record: Any, *, where: str = "this record") -> "HeadSet":
        """Read what `to_dict` wrote.

        Raises:
            DataError: another kind of record, a newer schema or a missing field.
        """
        io.check_record(record, "lofit_lens.HeadSet", SCHEMA, ("heads",), where)
        shape, heads = record.get("shape"), record["heads"]
        if not isinstance(heads, list) or not (shape is None or (isinstance(shape, list) and len(shape) == 2)):
            raise DataError(f"{where}: 'heads' must be a list and 'shape' null or two numbers")
        try:
            grid = None if shape is None else (int(shape[0]), int(shape[1]))
            return cls(heads, record.get("scores"), grid, record.get("label", ""))
        except (TypeError, ValueError) as e:
            raise DataError(f"{where}: {e}") from e

    def save(self, path: str | Path) -> Path:
        """Write as JSON."""
        return io.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "HeadSet":
        """Read a JSON file written by `save`, or an official `.npy` head file."""
        if str(path).endswith(".npy"):
            return cls.from_npy(path)
        return cls.from_dict(io.read_json(path), where=str(path))

    def __str__(self) -> str:
        return " ".join(map(str, self.heads))

    def __repr__(self) -> str:
        of = f" of {self.shape[0]}x{self.shape[1]}" if self.shape else ""
        label = f" {self.label}:" if self.label else ""
        return f"HeadSet({len(self)}{of} heads:{label} {first_of(self.heads)})"

    def _repr_html_(self) -> str:
        shape = self.shape or (max((h.layer for h in self), default=0) + 1, max((h.head for h in self), default=0) + 1)
        rank = {h: i + 1 for i, h in enumerate(self.heads)}
        return grid_html(
            shape,
            {h: 1.0 - 0.7 * (r - 1) / max(1, len(rank)) for h, r in rank.items()},
            {
                h: f"{h}: rank {r}" + (f", score {self.scores[r - 1]:.4g}" if self.scores else "")
                for h, r in rank.items()
            },
            f"{self.label or 'head set'}: {len(self)} heads",
            first_of(self.heads),
        )


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A score for every head of a model.

    Args:
        values: `[n_layers, n_heads]`, larger = chosen earlier; stored as float64 on the CPU.
        kind: what the score is, e.g. `"A-norm"` (the L2 norm of each head's A) or `"probe accuracy"`.
        model: name of the model.
        task: name of the task.
        meta: how it was made (config, seed, history, data hash, versions).

    Raises:
        InputError: not two-dimensional, empty, or a score that is not finite.
    """

    values: Float[Tensor, "n_layers n_heads"]
    kind: str = "score"
    model: str = ""
    task: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self, values: Any, kind: str = "score", model: str = "", task: str = "", meta: dict[str, Any] | None = None
    ) -> None:
        try:
            numbers = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as e:
            raise InputError(f"head scores must be numbers [n_layers, n_heads]: {e}") from e
        table = numbers.detach().to("cpu", torch.float64).clone()
        if table.ndim != 2 or table.numel() == 0:
            raise InputError(f"head scores must be [n_layers, n_heads], got shape {tuple(table.shape)}")
        if not torch.isfinite(table).all():
            bad = Head(*torch.nonzero(~torch.isfinite(table))[0].tolist())
            raise InputError(f"the score of head {bad} is {table[bad].item()}; scores must be finite")
        object.__setattr__(self, "values", table)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "meta", dict(meta or {}))

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_layers, n_heads)`."""
        return (self.values.shape[0], self.values.shape[1])

    def ranking(self) -> HeadSet:
        """All heads, best first; equal scores keep layer-major order."""
        order = torch.argsort(self.values.flatten(), descending=True, stable=True).tolist()
        heads = [divmod(i, self.shape[1]) for i in order]
        label = " ".join(filter(None, [self.model, self.task, self.kind]))
        return HeadSet(heads, [self.values[h].item() for h in heads], self.shape, label)

    def top(self, k: int) -> HeadSet:
        """The `k` heads with the largest scores, best first.

        Raises:
            InputError: `k` below 1 or above the number of heads.
        """
        check_k(k, self.values.numel(), "this model")
        return self.ranking().top(k)

    def rank(self, head: Head | Sequence[int] | str) -> int:
        """Place of a head in the ranking, from 1."""
        found = Head.parse(head)
        HeadSet([found]).check(self.shape)
        return self.ranking().heads.index(found) + 1

    def __getitem__(self, head: Head | Sequence[int] | str) -> float:
        found = Head.parse(head)
        HeadSet([found]).check(self.shape)
        return self.values[found].item()

    def save(self, path: str | Path) -> Path:
        """Write as JSON, every score exact."""
        return io.write_json(path, {
            "kind": "lofit_lens.HeadScores", "schema": SCHEMA, "score": self.kind, "model": self.model,
            "task": self.task, "values": self.values.tolist(), "meta": self.meta,
        })  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """Read what `save` wrote.

        Raises:
            DataError: missing, not JSON, another kind of record, a newer schema or a missing field.
        """
        record = io.read_json(path)
        io.check_record(record, "lofit_lens.HeadScores", SCHEMA, ("score", "values"), str(path))
        return cls(
            record["values"], record["score"], record.get("model", ""), record.get("task", ""), record.get("meta")
        )

    def __repr__(self) -> str:
        of = ", ".join(filter(None, [self.kind, self.model, self.task]))
        return f"HeadScores({of}: {self.shape[0]} layers x {self.shape[1]} heads, best {self.top(1)})"

    def _repr_html_(self) -> str:
        low, high = self.values.min().item(), self.values.max().item()
        span = (high - low) or 1.0
        heads = HeadSet.all(self.shape)
        return grid_html(
            self.shape,
            {h: (self.values[h].item() - low) / span for h in heads},
            {h: f"{h}: {self.kind} {self.values[h].item():.4g}" for h in heads},
            f"{self.kind} {self.model} {self.task} ({low:.3g} to {high:.3g})",
            f"best: {first_of(self.ranking().heads[:6])}",
        )


def check_k(k: int, available: int, of: str) -> None:
    """Raise InputError unless `1 <= k <= available`."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool):
        raise InputError(f"K must be a whole number of heads, got {k!r}")
    if k < 1 or k > available:
        raise InputError(f"K = {k} heads asked for; {of} has {available}, so give K from 1 to {available}")
