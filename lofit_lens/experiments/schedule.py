"""The order of a grid's cells: what may begin now, what comes first, what can no longer be computed. No clock, no files."""

import bisect
import graphlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lofit_lens.errors import InputError
from lofit_lens.experiments.cells import Cell


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
    """Cells that are not done, handed out in order: first tries before others, long ones first, then as given.

    Args:
        cells: by name, free of cycles.
        there: names of those that are done.
    """

    def __init__(self, cells: Mapping[str, Cell], there: Iterable[str]) -> None:
        self.left = {name: cell for name, cell in cells.items() if name not in set(there)}
        self._place = {name: i for i, name in enumerate(self.left)}
        self._tries = dict.fromkeys(self.left, 0)
        self._ready: list[Cell] = []
        self._later: dict[str, float] = {}
        self._graph = graphlib.TopologicalSorter(
            {name: [n for n in cell.needs if n in self.left] for name, cell in self.left.items()}
        )
        self._graph.prepare()
        self._open()

    def take(self, now: float, loaded: list[Any]) -> Cell | None:
        """The next cell; None where none can begin now.

        Args:
            now: seconds on the clock of `put_back`.
            loaded: models (`row["model"]`) that free workers hold; a cell of one of them goes first.
        """
        for name in [n for n, when in self._later.items() if when <= now]:
            del self._later[name]
            self._insert(self.left[name])
        if not self._ready:
            return None
        first = next((i for i, cell in enumerate(self._ready) if cell.row.get("model") in loaded), 0)
        return self._ready.pop(first)

    def put_back(self, name: str, when: float) -> None:
        """Another runner holds the cell: hand it out again from then on."""
        self._later[name] = when

    def again(self, name: str, retries: int) -> bool:
        """A try failed: hand the cell out again, after those not tried yet; False where its retries are used up."""
        self._tries[name] += 1
        if self._tries[name] > retries:
            return False
        self._insert(self.left[name])
        return True

    def done(self, name: str) -> None:
        """The cell is in the store: those that waited for it may begin."""
        del self.left[name]
        self._graph.done(name)
        self._open()

    def blocked(self, failed: Iterable[str]) -> dict[str, str]:
        """Cells that cannot be computed -> the failed cell that they need, directly or not."""
        cause = {name: name for name in failed}
        order = graphlib.TopologicalSorter({name: cell.needs for name, cell in self.left.items()}).static_order()
        for name in order:
            if name in self.left and name not in cause:
                bad = next((cause[n] for n in self.left[name].needs if n in cause), None)
                if bad is not None:
                    cause[name] = bad
        return {name: bad for name, bad in cause.items() if name != bad}

    @property
    def idle(self) -> bool:
        """Nothing can begin, now or later, before a cell that was handed out is done."""
        return not self._ready and not self._later

    def _open(self) -> None:
        for name in self._graph.get_ready():
            self._insert(self.left[name])

    def _insert(self, cell: Cell) -> None:
        bisect.insort(self._ready, cell, key=lambda c: (self._tries[c.name], -c.cost, self._place[c.name]))
