"""A score for every head of a model, and the ranking that follows from it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.heads.grid import Grid
from lofit_lens.heads.sets import SCHEMA, Head, HeadSet, check_k
from lofit_lens.html import first_of, grid_html, wrapped

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A score for every head of a model.

    Args:
        values: `[n_layers, n_heads]`, larger = chosen earlier; stored as float64 on the CPU.
        kind: what the score is, e.g. `"A-norm"` (the L2 norm of each head's A) or `"probe accuracy"`.
        model: name of the model.
        task: name of the task.
        meta: how it was made (config, seed, history, data hash, versions).
        layers: the layers that have heads; None = all. Values of other layers are ignored and become NaN.

    Raises:
        InputError: not two-dimensional, empty, a score that is not finite, or no layer with heads.
    """

    values: Float[Tensor, "n_layers n_heads"]
    kind: str = "score"
    model: str = ""
    task: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    head_layers: tuple[int, ...] | None = None

    def __init__(
        self, values: Any, kind: str = "score", model: str = "", task: str = "", meta: dict[str, Any] | None = None,
        layers: Iterable[int] | None = None,
    ) -> None:  # fmt: skip
        try:
            numbers = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as e:
            raise InputError(f"head scores must be numbers [n_layers, n_heads]: {e}") from e
        table = numbers.detach().to("cpu", torch.float64).clone()
        if table.ndim != 2 or table.numel() == 0:
            raise InputError(f"head scores must be [n_layers, n_heads], got shape {tuple(table.shape)}")
        grid = Grid(table.shape, layers)
        if not grid.layers:
            raise InputError("no layer of this model has heads that can be edited, so there is nothing to score")
        others = torch.ones(len(table), dtype=torch.bool)
        others[list(grid.layers)] = False
        table[others] = torch.nan
        if (wrong := ~torch.isfinite(table) & ~others[:, None]).any():
            bad = Head(*torch.nonzero(wrong)[0].tolist())
            raise InputError(f"the score of head {bad} is {table[bad].item()}; scores must be finite")
        object.__setattr__(self, "values", table)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "meta", dict(meta or {}))
        object.__setattr__(self, "head_layers", grid.head_layers)

    @property
    def shape(self) -> Grid:
        """`(n_layers, n_heads)`, and which layers have heads."""
        return Grid(self.values.shape, self.head_layers)

    @property
    def at_heads(self) -> Float[Tensor, "layers n_heads"]:
        """Scores of the layers that have heads (all layers, in most models)."""
        return self.values[list(self.shape.layers)]

    def ranking(self) -> HeadSet:
        """Return all heads, best first; equal scores keep layer-major order."""
        order = torch.argsort(self.at_heads.flatten(), descending=True, stable=True).tolist()
        listed = HeadSet.all(self.shape).heads
        heads = [listed[i] for i in order]
        label = " ".join(filter(None, [self.model, self.task, self.kind]))
        return HeadSet(heads, [self.values[h].item() for h in heads], self.shape, label)

    def top(self, k: int) -> HeadSet:
        """Return the `k` heads with the largest scores, best first.

        Raises:
            InputError: `k` below 1 or above the number of heads.
        """
        check_k(k, self.shape.n_total, "this model")
        return self.ranking().top(k)

    def rank(self, head: Head | Sequence[int] | str) -> int:
        """Return a head's place in the ranking, from 1."""
        found = Head.parse(head)
        HeadSet([found]).check(self.shape)
        return self.ranking().heads.index(found) + 1

    def __getitem__(self, head: Head | Sequence[int] | str) -> float:
        found = Head.parse(head)
        HeadSet([found]).check(self.shape)
        return self.values[found].item()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Give the scores to numpy, `[n_layers, n_heads]`: a copy, or a read-only view if `copy` is False."""
        found = np.array(self.values.numpy(), dtype=dtype, copy=copy is not False)
        found.flags.writeable = copy is not False  # the scores themselves stay as they are
        return found

    def __dlpack__(self, **how: Any) -> Any:
        """Give a copy of the scores to torch."""
        return self.values.clone().__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()

    def __len__(self) -> int:
        """Return the number of layers, as an array does."""
        return self.shape[0]

    def __iter__(self) -> Iterator[Float[np.ndarray, " n_heads"]]:
        """Iterate over the layers' scores, as an array does; `.ranking()` gives the heads, best first."""
        return iter(np.asarray(self))

    def to_frame(self) -> "pd.DataFrame":
        """Return a table with one row per head, best first; see `HeadSet.to_frame`."""
        return self.ranking().to_frame()

    def save(self, path: str | Path) -> Path:
        """Write as JSON, every score exact."""
        return io.write_json(path, {
            "kind": "lofit_lens.HeadScores", "schema": SCHEMA, "score": self.kind, "model": self.model,
            "task": self.task, "values": self._listed(), "meta": self.meta,
            **({} if self.head_layers is None else {"head_layers": list(self.head_layers)}),
        })  # fmt: skip

    def _listed(self) -> list[list[float] | None]:
        """Return the rows for JSON, which has no NaN: a layer without heads becomes null."""
        return [row if i in self.shape.layers else None for i, row in enumerate(self.values.tolist())]

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """Read what `save` wrote.

        Raises:
            DataError: missing, not JSON, another kind of record, a newer schema or a missing field.
        """
        record = io.read_json(path)
        io.check_record(record, "lofit_lens.HeadScores", SCHEMA, ("score", "values"), str(path))
        rows, layers = record["values"], record.get("head_layers")
        if layers is not None and isinstance(rows, list):
            width = max((len(row) for row in rows if isinstance(row, list)), default=0)
            rows = [[0.0] * width if row is None else row for row in rows]
        return cls(rows, record["score"], record.get("model", ""), record.get("task", ""), record.get("meta"), layers)

    def __repr__(self) -> str:
        of = ", ".join(filter(None, [self.kind, self.model, self.task]))
        return wrapped(f"HeadScores({of}: {self.shape[0]} layers x {self.shape[1]} heads, best {self.top(1)})")

    def _repr_html_(self) -> str:
        low, high = self.at_heads.min().item(), self.at_heads.max().item()
        span = (high - low) or 1.0
        heads = HeadSet.all(self.shape)
        return grid_html(
            self.shape,
            {h: (self.values[h].item() - low) / span for h in heads},
            {h: f"{h}: {self.kind} {self.values[h].item():.4g}" for h in heads},
            f"{self.kind} {self.model} {self.task} ({low:.3g} to {high:.3g})",
            f"best: {first_of(self.ranking().heads[:6])}",
        )
