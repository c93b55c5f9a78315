"""Cells that are computed together: fits of one model that share the passes over it (`training.tune_many`).

Numbers of a shared pass differ by rounding from those of another, so who shares one follows from the grid: groups are a
function of the list of cells, whatever is done already and whoever computes it (but a cell that can never be computed, since one
that it needs failed for good, leaves its group). A group is handed out, claimed, tried again and checkpointed as a whole; members
that are there already are trained along and not written again. In another grid, with other partners, last digits differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lofit_lens import io
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.records import JOINED

TOGETHER = 8  # cells of a group at most: on two cores more gain little (`benchmarks/many.py`)
LEAST = 3  # of a group, where one more group keeps a second worker busy


@dataclass(frozen=True)
class Group:
    """Cells that are computed at once; none of them needs another. Most groups are one cell.

    Attributes:
        cells: in the grid's order.
    """

    cells: tuple[Cell, ...]

    @cached_property
    def name(self) -> str:
        """Of its checkpoint and log: the last cell's name, of several cells with a digest of all names behind it."""
        names = [cell.name for cell in self.cells]
        return names[-1] if len(names) == 1 else f"{names[-1]}{JOINED}{io.digest(names)[:16]}"

    @property
    def label(self) -> str:
        """What people read."""
        more = len(self.cells) - 1
        return self.cells[0].label + (f" and {more} more" if more else "")

    @property
    def model(self) -> Any:
        """The cells' own."""
        return self.cells[0].model

    @property
    def cost(self) -> float:
        """Of all cells."""
        return sum(cell.cost for cell in self.cells)

    @property
    def needs(self) -> set[str]:
        """Cells that must be done before."""
        return {need for cell in self.cells for need in cell.needs}


def grouped(cells: Mapping[str, Cell], together: int = TOGETHER) -> list[Group]:
    """Every cell in one group: those that share a pass (`Cell.shares`) and stand on the same step of the graph of needs.

    A step's n cells are split evenly, in order, into groups of `together` at most, and into an even number of groups where
    those have three cells or more.

    Args:
        cells: of a grid, by name, free of cycles.
        together: cells of a group at most; 1 = each alone.

    Returns:
        Groups in the order of their first cells.
    """
    depths: dict[str, int] = {}
    by_step: dict[tuple[Any, ...], list[Cell]] = {}
    for name, cell in cells.items():
        key = (cell.shares, cell.model, _depth(name, cells, depths)) if cell.shares else (name,)
        by_step.setdefault(key, []).append(cell)
    found = [Group(tuple(part)) for step in by_step.values() for part in _split(step, together)]
    place = {name: i for i, name in enumerate(cells)}
    return sorted(found, key=lambda group: place[group.cells[0].name])


def _depth(name: str, cells: Mapping[str, Cell], known: dict[str, int]) -> int:
    """Length of the longest chain of needs below a cell."""
    if name not in known:
        known[name] = max((1 + _depth(need, cells, known) for need in cells[name].needs if need in cells), default=0)
    return known[name]


def _split(cells: list[Cell], together: int) -> Iterable[list[Cell]]:
    n, parts = len(cells), -(-len(cells) // together)
    if parts % 2 and together > 1 and n // (parts + 1) >= LEAST:
        parts += 1
    return (cells[n * i // parts : n * (i + 1) // parts] for i in range(parts))
