"""The order of a grid's groups: what may begin now, what comes first, what can no longer be computed. No clock, no files."""

import bisect
import graphlib
from collections.abc import Callable, Iterable
from typing import Any

from lofit_lens.errors import InputError
from lofit_lens.experiments.executors.groups import Group
from lofit_lens.experiments.store.cells import Cell


def checked(cells: Iterable[Cell], done: Callable[[str], bool]) -> dict[str, Cell]:
    """The cells by name, each once, in the order given.

    Args:
        cells: of a grid; the same cell may come several times.
        done: whether the store has a finished run of that name.

    Raises:
        InputError: two cells of one name with different specs, a need that is neither among the cells nor done, or a
            cycle of needs (shows it).
    """
    by_name: dict[str, Cell] = {}
    for cell in cells:
        other = by_name.setdefault(cell.name, cell)
        if other.spec != cell.spec or set(other.needs) != set(cell.needs):
            raise InputError(
                f"two cells of the name {cell.name} differ in what they ask for; a cell is named by its spec"
            )
    for cell in by_name.values():
        for need in cell.needs:
            if need not in by_name and not done(need):
                raise InputError(
                    f"{cell.name} needs {need}, which is neither in this grid nor in the store; add that cell to the grid"
                )
    try:
        graphlib.TopologicalSorter({n: c.needs for n, c in by_name.items()}).prepare()
    except graphlib.CycleError as e:
        # graphlib gives each cell after one that it is needed by.
        raise InputError(f"these cells need one another in a circle: {' -> '.join(e.args[1][::-1])}") from e
    return by_name


class Schedule:
    """Groups with cells that are not done, handed out in order: first tries before others, long ones first, then as given.

    Args:
        groups: of all cells, free of cycles.
        there: names of cells that are done.
    """

    def __init__(self, groups: Iterable[Group], there: Iterable[str]) -> None:
        groups, there = list(groups), set(there)
        self.left = {cell.name for group in groups for cell in group.cells if cell.name not in there}
        self._place = {group.name: i for i, group in enumerate(groups)}
        self._tries = dict.fromkeys(self._place, 0)
        self._ready: list[Group] = []
        self._later: list[tuple[float, Group]] = []
        self._waiting = {g.name: g for g in groups if any(cell.name in self.left for cell in g.cells)}
        self._lost: dict[str, str] = {}
        self._open()

    def take(self, now: float, loaded: list[Any]) -> Group | None:
        """The next group; None where none can begin now.

        Args:
            now: seconds on the clock of `put_back`.
            loaded: models (`Cell.model`) that free workers hold; a group of one of them goes first.
        """
        for entry in [e for e in self._later if e[0] <= now]:
            self._later.remove(entry)
            self._insert(entry[1])
        if not self._ready:
            return None
        first = next((i for i, group in enumerate(self._ready) if group.model in loaded), 0)
        return self._ready.pop(first)

    def put_back(self, group: Group, when: float) -> None:
        """Another runner holds one of its cells: hand it out again from then on."""
        self._later.append((when, group))

    def again(self, group: Group, retries: int) -> bool:
        """A try failed: hand the group out again, after those not tried yet; False where its retries are used up."""
        self._tries[group.name] += 1
        if self._tries[group.name] > retries:
            return False
        self._insert(group)
        return True

    def done(self, name: str) -> None:
        """A cell is in the store: those that waited for it may begin."""
        self.left.discard(name)
        self._open()

    def lose(self, name: str) -> None:
        """A cell fails whenever it is tried: those that need it, directly or not, leave their groups, which go on without."""
        gone = {name}
        while more := {c.name for g in self._waiting.values() for c in g.cells if gone & set(c.needs)} - gone:
            gone |= more
        self._lost |= dict.fromkeys((gone & self.left) - {name}, name)
        for group in [g for g in self._waiting.values() if any(c.name in gone for c in g.cells)]:
            del self._waiting[group.name]
            kept = Group(tuple(cell for cell in group.cells if cell.name not in gone))
            if any(cell.name in self.left for cell in kept.cells):
                self._waiting[kept.name] = kept
                self._place[kept.name], self._tries[kept.name] = self._place[group.name], 0
        self._open()

    def blocked(self, failed: Iterable[str]) -> dict[str, str]:
        """Cells that cannot be computed -> the failed cell that they, or others of their group, need, directly or not."""
        cause = {name: name for name in failed} | self._lost
        more = True
        while more:
            more = {
                cell.name: next(cause[need] for cell in group.cells for need in cell.needs if need in cause)
                for group in self._waiting.values() if cause.keys() & group.needs
                for cell in group.cells if cell.name in self.left and cell.name not in cause
            }  # fmt: skip
            cause |= more
        return {name: bad for name, bad in cause.items() if name != bad}

    @property
    def idle(self) -> bool:
        """Nothing can begin, now or later, before a cell that was handed out is done."""
        return not self._ready and not self._later

    def _open(self) -> None:
        for group in [g for g in self._waiting.values() if not g.needs & self.left]:
            self._insert(self._waiting.pop(group.name))

    def _insert(self, group: Group) -> None:
        bisect.insort(self._ready, group, key=lambda g: (self._tries[g.name], -g.cost, self._place[g.name]))
