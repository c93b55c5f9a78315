"""The order of a grid's work: which cells share a pass, what may begin now, what can no longer be computed. No files.

Fits of one model can share the passes over it (`training.tune_many`); such cells form a group. Numbers of a shared pass differ by
rounding from those of another, so who shares one follows from the grid: groups are a function of the list of cells, whatever is
done already and whoever computes it (but a cell that can never be computed, since one that it needs failed for good, leaves its
group). A group is handed out, claimed, tried again and checkpointed as a whole; members that are there already are trained along
and not written again. In another grid, with other partners, last digits differ.
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

    @cached_property
    def needs(self) -> frozenset[str]:
        """Cells that must be done before."""
        return frozenset(need for cell in self.cells for need in cell.needs)


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
    """What is left of a grid, handed out in order: first tries before others, long ones first, then as given.

    Attributes:
        cells: of all groups, by name.
        left: names of cells that are not done.
        failed: cell -> its error, of those that are not tried again by this run.
        running: groups that were handed out.
        stopping: nothing more is handed out.
    """

    def __init__(self, groups: Iterable[Group], there: Iterable[str], retries: int = 0) -> None:
        """List what is left.

        Args:
            groups: of all cells, free of cycles.
            there: names of cells that are done.
            retries: further tries of a group after a failure that may pass.
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
        """Hand out the next group; None where none can begin now.

        Args:
            now: seconds.
            loaded: models (`Cell.model`) that free workers hold; a group of one of them goes first.
        """
        ready = [group for group in self._open() if self._not_before.get(group, now) <= now]
        if self.stopping or not ready:
            return None
        first = min(ready, key=lambda g: (g.model not in loaded, self._tries[g], -g.cost))  # the first of equals
        self.running.append(first)
        return first

    @property
    def idle(self) -> bool:
        """Nothing can begin, now or later, before a cell that was handed out is done."""
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
        """Another runner holds one of its cells: it is handed out again from then on."""
        self.running.remove(group)
        self._not_before[group] = when

    def done(self, name: str) -> None:
        """A cell is in the store: those that waited for it may begin."""
        self.left.discard(name)

    def finish(self, group: Group, failed: Mapping[str, str], *, may_pass: bool) -> bool:
        """A group that was handed out has ended.

        Args:
            group: the group.
            failed: those of its cells that failed -> their errors.
            may_pass: whether one of them may do better the next time.

        Returns:
            Whether it will be handed out again, after those not tried yet; if not, its failures are in `failed` for good.
        """
        self.running.remove(group)
        self._tries[group] += 1
        if failed and may_pass and self._tries[group] <= self._retries:
            return True
        self._groups.remove(group)
        self.failed |= failed
        return False

    def lose(self, name: str) -> None:
        """A cell fails whenever it is tried: those that need it, directly or not, leave their groups, which go on without."""
        gone = {name}
        while more := {c.name for g in self._groups for c in g.cells if not gone.isdisjoint(c.needs)} - gone:
            gone |= more
        self._lost |= dict.fromkeys((gone & self.left) - {name}, name)
        kept = [Group(tuple(cell for cell in group.cells if cell.name not in gone)) for group in self._groups]
        self._groups = [group for group in kept if group.cells]

    # ---------------------------------------------------------------------------------------------- how it stands

    @property
    def blocked(self) -> dict[str, str]:
        """Cells that cannot be computed -> the failed cell that they, or others of their group, need, directly or not."""
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
