"""A cell: one piece of a grid's work, named by the hash of everything that can change its result."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lofit_lens import io


@dataclass(frozen=True)
class Cell:
    """One piece of work. Cells with equal specs (and so equal labels) are the same, whatever grid they belong to.

    Attributes:
        label: label for people, which follows from the spec.
        spec: everything that can change the result, JSON-able: model, data hash, method, heads, settings, seed, library versions,
            and the names of the cells it builds on.
        needs: names of cells that must be done first; also in `spec`.
        row: its columns in a table of runs (task, method, k, seed, ...): text, whole numbers, decimals or None.
        cost: relative duration, for the order of work and the time left.
        shares: cells with the same value can be trained in the same passes over the model; "" = computed alone.
    """

    label: str
    spec: dict[str, Any] = field(hash=False)
    needs: tuple[str, ...] = ()
    row: dict[str, Any] = field(default_factory=dict, compare=False)
    cost: float = field(default=1.0, compare=False)
    shares: str = field(default="", compare=False)

    @property
    def model(self) -> Any:
        """Identity of its model, for runners that keep a model loaded; None = any."""
        return self.row.get("model_id", self.row.get("model"))

    @cached_property
    def key(self) -> str:
        """SHA-256 of the spec."""
        return io.digest(self.spec)

    @cached_property
    def name(self) -> str:
        """Its folder's name: the label, then the first 16 digits of the key."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '_', self.label).strip('_.')[:100]}-{self.key[:16]}"
