"""One attention head, and an ordered set of heads with its algebra.

>>> HeadSet("L4H3 L2H1") & "L2H1"
HeadSet(1 heads: L2H1)
"""

import contextlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union, overload

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_number, check_seed, check_whole, shown
from lofit_lens.errors import DataError, InputError
from lofit_lens.heads.grid import Grid, check_shape, joint_grid, layers_of
from lofit_lens.html import first_of, grid_html, wrapped

if TYPE_CHECKING:
    import pandas as pd

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
        if isinstance(text, np.ndarray | Tensor):
            text = text.tolist()
        if isinstance(text, str):
            found = re.fullmatch(r"L?(\d+)[H.,:](\d+)", text.strip())
            if not found:
                raise InputError(f"{text!r} is not a head; write L12H7 (layer 12, head 7, both from 0)")
            return cls(int(found[1]), int(found[2]))
        pair = tuple(text) if isinstance(text, Sequence) else ()
        whole = (isinstance(i, int | np.integer) and not isinstance(i, bool) and i >= 0 for i in pair)
        if len(pair) != 2 or not all(whole):
            raise InputError(f"{shown(text)} is not a head; give (layer, head), both whole numbers from 0")
        return cls(int(pair[0]), int(pair[1]))


Heads = Union["HeadSet", str, Head, Iterable[Head | Sequence[int] | str]]  # whatever `HeadSet` takes
_PRINTED = re.compile(r"HeadSet\(\d+(?: of (\d+)x(\d+))? heads:(?:.*:)? ?(.*)\)", re.DOTALL)  # what repr(heads) shows


@dataclass(frozen=True)
class HeadSet:
    """An ordered set of heads, best first, with optional scores.

    Every function that takes heads accepts a `HeadSet` or anything that makes one.

    Args:
        heads: heads as `Head`, `(layer, head)` or `"L12H7"`, no head twice; or one text, as a head set prints:
            `"L12H7 L3H1"`, with or without commas.
        scores: one number per head, in the same order, or None.
        shape: `(n_layers, n_heads)` of the model they belong to, a `Grid` where only some layers have heads; None if unknown.
        label: what they are, for tables and figures.

    Raises:
        InputError: not heads, a head twice or outside `shape`, scores of another length, or a score that is not finite.
    """

    heads: tuple[Head, ...]
    scores: tuple[float, ...] | None = None
    shape: tuple[int, int] | None = None
    label: str = ""

    def __init__(
        self,
        heads: Heads,
        scores: Iterable[float] | None = None,
        shape: tuple[int, int] | None = None,
        label: str = "",
    ) -> None:
        listed, printed = _read(heads)
        shape = printed if shape is None else check_shape(shape)
        if printed not in (None, shape):
            raise InputError(f"these heads are of a model of {printed} heads, not of {shape}; give their model's shape")
        numbers = None if scores is None else _numbers(scores)
        if len(set(listed)) != len(listed):
            twice = next(h for i, h in enumerate(listed) if h in listed[:i])
            raise InputError(f"head {twice} is listed twice; a head set holds each head once")
        if numbers is not None and len(numbers) != len(listed):
            raise InputError(f"{len(numbers)} scores for {len(listed)} heads; give one score per head")
        object.__setattr__(self, "heads", listed)
        object.__setattr__(self, "scores", numbers)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "label", label)
        if shape is not None:
            self.check(shape)

    @classmethod
    def of(cls, heads: Heads) -> "HeadSet":
        """Return a head set unchanged, or make one from heads in another form."""
        return heads if isinstance(heads, HeadSet) else cls(heads)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise InputError if a head lies outside `(n_layers, n_heads)`, or in a layer of a `Grid` that has no heads."""
        n_layers, n_heads = grid = check_shape(shape)
        for h in self.heads:
            if h.layer >= n_layers or h.head >= n_heads:
                of = f"; this head set was made for {self.label}" if self.label else ""
                raise InputError(
                    f"head {h} is outside this model ({n_layers} layers of {n_heads} heads, both from 0){of}"
                )
            if h.layer not in grid.layers:
                raise InputError(
                    f"head {h} is not among those that can be edited together, which are in these layers: "
                    f"{', '.join(map(str, grid.layers))}"
                )

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: Any) -> bool:
        return Head.parse(head) in self.heads

    def __eq__(self, other: object) -> bool:
        """Whether heads and their order, scores, shape and label are equal; against a text, only heads and their order."""
        if isinstance(other, str):
            with contextlib.suppress(InputError):
                return self.heads == HeadSet(other).heads
            return False
        return isinstance(other, HeadSet) and asdict(self) == asdict(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @overload
    def __getitem__(self, index: int) -> Head: ...
    @overload
    def __getitem__(self, index: slice) -> "HeadSet": ...
    def __getitem__(self, index: int | slice) -> "Head | HeadSet":
        """Return the head at an index, from 0, or a slice as a head set."""
        if isinstance(index, slice):
            return self._pick(range(len(self))[index], self.label)
        check_whole(-len(self), len(self) - 1, place=index)
        return self.heads[index]

    def _pick(self, keep: Iterable[int], label: str) -> "HeadSet":
        keep = list(keep)
        scores = None if self.scores is None else [self.scores[i] for i in keep]
        return HeadSet([self.heads[i] for i in keep], scores, self.shape, label)

    def _joint_shape(self, other: "HeadSet") -> tuple[int, int] | None:
        if self.shape and other.shape and self.shape != other.shape:
            raise InputError(f"these head sets belong to different models: {self.shape} and {other.shape} heads")
        return joint_grid(s for s in (self.shape, other.shape) if s) if self.shape or other.shape else None

    def __and__(self, other: Heads) -> "HeadSet":
        """Return the heads in both, in this set's order and with its scores."""
        other = HeadSet.of(other)
        shape = self._joint_shape(other)
        common = self._pick((i for i, h in enumerate(self.heads) if h in other.heads), "")
        return HeadSet(common.heads, common.scores, shape)

    def __or__(self, other: Heads) -> "HeadSet":
        """Return the heads in either: this set's first, then the other's new ones; scores are dropped."""
        other = HeadSet.of(other)
        return HeadSet(
            self.heads + tuple(h for h in other.heads if h not in self.heads), shape=self._joint_shape(other)
        )

    def __sub__(self, other: Heads) -> "HeadSet":
        """Return the heads of this set that are not in the other."""
        other = HeadSet.of(other)
        shape = self._joint_shape(other)
        left = self._pick((i for i, h in enumerate(self.heads) if h not in other.heads), "")
        return HeadSet(left.heads, left.scores, shape)

    def top(self, k: int) -> "HeadSet":
        """Return the first `k` heads.

        Raises:
            InputError: `k` below 1 or above the number of heads.
        """
        check_k(k, len(self), "this head set")
        return self._pick(range(k), self.label)

    def restrict(self, layers: Iterable[int]) -> "HeadSet":
        """Return only the heads in these layers.

        Raises:
            InputError: layers that are not whole numbers from 0.
        """
        wanted = set(layers_of(layers))
        return self._pick((i for i, h in enumerate(self.heads) if h.layer in wanted), self.label)

    def layer_counts(self, n_layers: int | None = None) -> Int[np.ndarray, " n_layers"]:
        """Return the number of chosen heads in each layer."""
        n = n_layers if n_layers is not None else self._need_shape()[0]
        check_whole(1, n_layers=n)
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
        """Return a mask that is True at the chosen heads."""
        shape = self._need_shape() if shape is None else check_shape(shape)
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
        """Return every head of a model, layer by layer; for a `Grid`, only heads of the layers that have them."""
        grid = check_shape(shape)
        return cls([(layer, head) for layer in grid.layers for head in range(grid[1])], shape=grid, label="all")

    @classmethod
    def random(cls, shape: tuple[int, int], k: int, *, seed: int, exclude: Heads | None = None) -> "HeadSet":
        """Draw `k` heads uniformly without replacement, by `random.Random(seed)`."""
        check_seed(seed)
        pool = [h for h in cls.all(shape) if exclude is None or h not in HeadSet.of(exclude).heads]
        check_k(k, len(pool), "this model")
        return cls(random.Random(seed).sample(pool, k), shape=shape, label=f"random (seed {seed})")

    @classmethod
    def matched(cls, like: "HeadSet", *, seed: int) -> "HeadSet":
        """Draw as many heads in each layer as `like` has, uniformly without replacement, by `random.Random(seed)`.

        Heads of `like` may be drawn again.

        Raises:
            InputError: `like` does not know its model's shape, or the seed is not a whole number from 0.
        """
        check_seed(seed)
        shape, drawn = like._need_shape(), random.Random(seed)
        counts = enumerate(like.layer_counts())
        heads = [(layer, head) for layer, n in counts for head in drawn.sample(range(shape[1]), int(n))]
        return cls(heads, shape=shape, label=f"random, same layers (seed {seed})")

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

    def to_frame(self) -> "pd.DataFrame":
        """Return one row per head, best first: its name as `head`, `layer`, `index` in it, `rank` from 1, `score` (or NaN)."""
        import pandas as pd

        scores = self.scores or [np.nan] * len(self)
        rows = [(str(h), h.layer, h.head, i + 1, score) for i, (h, score) in enumerate(zip(self, scores, strict=True))]
        return pd.DataFrame(rows, columns=["head", "layer", "index", "rank", "score"])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; `from_dict` reads it back."""
        return {
            "kind": "lofit_lens.HeadSet", "schema": SCHEMA, "label": self.label,
            "shape": None if self.shape is None else list(self.shape),
            "heads": [list(h) for h in self.heads],
            "scores": None if self.scores is None else list(self.scores),
            **_layers_of(self.shape),
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
            grid = None if shape is None else Grid(map(int, shape), record.get("head_layers"))
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
        return wrapped(f"{self}", "")

    def __format__(self, spec: str) -> str:
        return format(" ".join(map(str, self.heads)), spec)  # inside a sentence: one line

    def __repr__(self) -> str:
        of = f" of {self.shape[0]}x{self.shape[1]}" if self.shape else ""
        label = f" {self.label}:" if self.label else ""
        return wrapped(f"HeadSet({len(self)}{of} heads:{label} {first_of(self.heads)})")

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


def _layers_of(shape: tuple[int, int] | None) -> dict[str, list[int]]:
    """Return a record's field for the layers that have heads; empty if all have."""
    layers = None if shape is None else check_shape(shape).head_layers
    return {} if layers is None else {"head_layers": list(layers)}


def check_k(k: int, available: int, of: str) -> None:
    """Raise InputError unless `1 <= k <= available`."""
    if not isinstance(k, int | np.integer) or isinstance(k, bool):
        raise InputError(f"K must be a whole number of heads, got {k!r}")
    if k < 1 or k > available:
        raise InputError(f"K = {k} heads asked for; {of} has {available}, so give K from 1 to {available}")


def _read(heads: Any) -> tuple[tuple[Head, ...], tuple[int, int] | None]:
    """Return the heads in `heads`, and the model's shape if it is stated there."""
    if isinstance(heads, HeadSet):
        return heads.heads, heads.shape
    if isinstance(heads, Head):
        return (heads,), None
    if not isinstance(heads, str):
        if (has := next((name for name in ("heads", "top") if hasattr(heads, name)), None)) is not None:
            instead = "its .heads" if has == "heads" else "the best ones, .top(k)"
            raise InputError(f"{shown(heads)} is not a set of heads; give {instead}")
        if not isinstance(heads, Iterable) or isinstance(heads, bytes | Mapping):
            raise InputError(f"{shown(heads)} is not a set of heads; give e.g. 'L12H7 L3H1'")
        return tuple(Head.parse(h) for h in heads), None
    printed = _PRINTED.fullmatch(heads.strip())
    shape = None if printed is None or printed[1] is None else (int(printed[1]), int(printed[2]))
    names = re.split(r"[\s,;]+", (heads if printed is None else printed[3]).strip())
    if "..." in names:
        raise InputError(f"{heads!r} leaves heads out; give all of them, as str(heads) does")
    return tuple(Head.parse(name) for name in names if name), shape


def _numbers(scores: Any) -> tuple[float, ...]:
    listed = tuple(scores) if isinstance(scores, Iterable) and not isinstance(scores, str) else (scores,)
    for score in listed:
        check_number(score=score)
    return tuple(map(float, listed))
