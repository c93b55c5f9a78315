"""The order of a grid's work: which cells share a pass, which may start now, which can no longer be computed. No files.

Fits of one model can share the passes over it (`training.tune_many`); such cells form a group. Different groupings differ by
rounding, so groups must follow from the grid: they are a function of the list of cells, whatever is already done and whoever
computes it (except that a cell leaves its group if it can never be computed, since one that it needs failed for good). A group is
submitted, claimed, retried and checkpointed as a unit; members that are already done are trained along and not written again. In
another grid, with other members, last digits differ.
"""

import graphlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lofit_lens import io
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.records import JOINED

TOGETHER = 8  # maximum number of cells in a group: on two cores more gain little (`benchmarks/many.py`)
LEAST = 3  # minimum size of a group that is split off to keep a second worker busy


@dataclass(frozen=True)
class Group:
    """Cells that are computed together; none of them needs another. Most groups are one cell.

    Attributes:
        cells: in the grid's order.
    """

    cells: tuple[Cell, ...]

    @cached_property
    def name(self) -> str:
        """Name of its checkpoint and log: the last cell's name, with a digest of all names appended if there are several."""
        names = [cell.name for cell in self.cells]
        return names[-1] if len(names) == 1 else f"{names[-1]}{JOINED}{io.digest(names)[:16]}"

    @property
    def label(self) -> str:
        """Label for people."""
        more = len(self.cells) - 1
        return self.cells[0].label + (f" and {more} more" if more else "")

    @property
    def model(self) -> Any:
        """The cells' model."""
        return self.cells[0].model

    @property
    def cost(self) -> float:
        """Sum over all cells."""
        return sum(cell.cost for cell in self.cells)

    @cached_property
    def needs(self) -> frozenset[str]:
        """Names of cells that must be done first."""
        return frozenset(need for cell in self.cells for need in cell.needs)


def grouped(cells: Mapping[str, Cell], together: int = TOGETHER) -> list[Group]:
    """Put every cell into a group: cells that share a pass (`Cell.shares`) and are at the same level of the graph of needs.

    A step's n cells are split evenly, in order, into groups of `together` at most, and into an even number of groups where
    those have three cells or more.

    Args:
        cells: cells of a grid, by name, without cycles.
        together: maximum number of cells in a group; 1 = one cell per group.

    Returns:
        Groups in the order of their first cells.
    """
    steps: dict[str, int] = {}  # length of the longest chain of needs below a cell
    for name in graphlib.TopologicalSorter({n: c.needs for n, c in cells.items()}).static_order():
        below = cells[name].needs if name in cells else ()
        steps[name] = max((1 + steps[need] for need in below if need in cells), default=0)
    sharing: dict[tuple[Any, ...], list[Cell]] = {}
    for name, cell in cells.items():
        sharing.setdefault((cell.shares, cell.model, steps[name]) if cell.shares else (name,), []).append(cell)
    found = [Group(tuple(part)) for step in sharing.values() for part in _split(step, together)]
    place = {name: i for i, name in enumerate(cells)}
    return sorted(found, key=lambda group: place[group.cells[0].name])


def _split(cells: list[Cell], together: int) -> Iterable[list[Cell]]:
    n, parts = len(cells), -(-len(cells) // together)
    if parts % 2 and together > 1 and n // (parts + 1) >= LEAST:
        parts += 1
    return (cells[n * i // parts : n * (i + 1) // parts] for i in range(parts))


class Schedule:
    """The remaining work of a grid, submitted in order: first attempts before retries, long ones first, then as given.

    Attributes:
        cells: of all groups, by name.
        left: names of cells that are not done.
        failed: cell -> its error, for cells that this run does not retry.
        running: submitted groups that have not ended.
        stopping: whether to submit nothing more.
    """

    def __init__(self, groups: Iterable[Group], there: Iterable[str], retries: int = 0) -> None:
        """List the remaining cells.

        Args:
            groups: groups of all cells, without cycles.
            there: names of cells that are done.
            retries: further attempts at a group after a failure that may be temporary.
        """
        self._groups = list(groups)
        self.cells = {cell.name: cell for group in self._groups for cell in group.cells}
        self.left = self.cells.keys() - set(there)
        self.failed: dict[str, str] = {}
        self.running: list[Group] = []
        self.stopping = False
        self._retries = retries
        self._tries: Counter[Group] = Counter()
        self._not_before: dict[Group, float] = {}
        self._lost: dict[str, str] = {}  # cells that left their groups -> the failed cell that they need

    # -------------------------------------------------------------------------------------------------- what comes

    def take(self, now: float, loaded: Collection[Any]) -> Group | None:
        """Return the next group; None if no group can start now.

        Args:
            now: current time in seconds.
            loaded: models (`Cell.model`) that idle workers hold; groups with one of them go first.
        """
        ready = [group for group in self._open() if self._not_before.get(group, now) <= now]
        if self.stopping or not ready:
            return None
        first = min(ready, key=lambda g: (g.model not in loaded, self._tries[g], -g.cost))  # ties: the first
        self.running.append(first)
        return first

    @property
    def idle(self) -> bool:
        """Whether nothing can start, now or later, until a submitted cell is done."""
        return not self._open()

    def _open(self) -> list[Group]:
        return [
            group
            for group in self._groups
            if group.needs.isdisjoint(self.left) and group not in self.running
            and any(cell.name in self.left for cell in group.cells)
        ]  # fmt: skip

    # ------------------------------------------------------------------------------------- what became of a group

    def put_back(self, group: Group, when: float) -> None:
        """Another runner holds one of its cells: submit it again from time `when` on."""
        self.running.remove(group)
        self._not_before[group] = when

    def done(self, name: str) -> None:
        """Mark a cell as stored; cells that waited for it may start."""
        self.left.discard(name)

    def finish(self, group: Group, failed: Mapping[str, str], *, may_pass: bool) -> bool:
        """Record that a submitted group has ended.

        Args:
            group: the group.
            failed: those of its cells that failed -> their errors.
            may_pass: whether one of the failures may be temporary.

        Returns:
            Whether it will be submitted again, after those not tried yet; if not, its failures are final (in `failed`).
        """
        self.running.remove(group)
        self._tries[group] += 1
        if failed and may_pass and self._tries[group] <= self._retries:
            return True
        self._groups.remove(group)
        self.failed |= failed
        return False

    def lose(self, name: str) -> None:
        """A cell has failed for good: cells that need it, directly or not, leave their groups, which continue without them."""
        gone = {name}
        while more := {c.name for g in self._groups for c in g.cells if not gone.isdisjoint(c.needs)} - gone:
            gone |= more
        self._lost |= dict.fromkeys((gone & self.left) - {name}, name)
        kept = [Group(tuple(cell for cell in group.cells if cell.name not in gone)) for group in self._groups]
        self._groups = [group for group in kept if group.cells]

    # ---------------------------------------------------------------------------------------------- how it stands

    @property
    def blocked(self) -> dict[str, str]:
        """Cells that cannot be computed -> the failed cell that they, or other cells of their group, need, directly or not."""
        cause = dict.fromkeys(self.failed, "") | self._lost
        more = True
        while more:
            more = {
                cell.name: next(cause[need] or need for cell in group.cells for need in cell.needs if need in cause)
                for group in self._groups if not group.needs.isdisjoint(cause)
                for cell in group.cells if cell.name in self.left and cell.name not in cause
            }  # fmt: skip
            cause |= more
        return {name: failed for name, failed in cause.items() if failed}

    @property
    def counts(self) -> str:
        """One sentence for messages."""
        n, others = len(self.cells), (("failed", self.failed), ("blocked", self.blocked))
        more = "".join(f", {len(names)} {what}" for what, names in others if names)
        return f"{n - len(self.left)} of {n} cells are done{more}"
