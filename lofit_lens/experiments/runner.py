"""Run a grid's cells: those that are not in the store, each after the cells it needs, on any executor.

The store alone knows what is done, so a run that was stopped or killed goes on when it is called again, and several runners
on one store share the work: a cell that another one holds is looked at again later.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lofit_lens.errors import DiskFull, InputError
from lofit_lens.experiments.attempt import Outcome, Work, attempt
from lofit_lens.experiments.cells import Cell
from lofit_lens.experiments.live import Tally, board, duration
from lofit_lens.experiments.schedule import Schedule, checked
from lofit_lens.experiments.store import Store
from lofit_lens.experiments.workers import LocalExecutor
from lofit_lens.training.loop import first_ctrl_c

TICK = 0.2  # seconds between two looks at Ctrl-C
LOOK_AGAIN = 1.0  # seconds until a cell that another runner holds is tried again

log = logging.getLogger(__name__)

__all__ = ["Executor", "Outcome", "Report", "Work", "attempt", "run_cells"]


@runtime_checkable
class Executor(Protocol):
    """Where cells are computed. `run_cells` never hands out more than `slots` at a time, and closes it at the end.

    Attributes:
        slots: cells at a time; may change from call to call of `wait`.
    """

    slots: int

    def submit(self, cell: Cell) -> None:
        """Begin a cell and return at once."""

    def wait(self, timeout: float) -> list[Outcome]:
        """Outcomes that are new, waiting `timeout` seconds at most for the first; each cell handed out has one."""
        ...

    def interrupt(self) -> None:
        """Ctrl-C for all cells in progress: training writes its checkpoint; their outcomes ("stopped") come by `wait`."""

    def close(self) -> None:
        """End all workers; what is in progress is killed."""


@dataclass(frozen=True)
class Report:
    """What a run of a grid did; names in the grid's order.

    Attributes:
        computed: cells computed by this run.
        there: cells that were done already, or done by another runner meanwhile.
        failed: cell -> its error.
        blocked: cell -> the failed cell that it needs, directly or not.
        seconds: from start to end.
    """

    computed: tuple[str, ...]
    there: tuple[str, ...]
    failed: dict[str, str]
    blocked: dict[str, str]
    seconds: float


def run_cells(
    store: Store,
    cells: Iterable[Cell],
    work: Work,
    context: Any,
    *,
    executor: Executor | None = None,
    workers: int = 1,
    devices: Sequence[str] | None = None,
    retries: int = 1,
    progress: bool = True,
) -> Report:
    """Compute every cell that is not in the store; a failed cell is tried again, then reported, and the rest goes on.

    Args:
        store: where runs are looked up and written.
        cells: of the grid; their needs are among them or in the store.
        work: computes one cell; a function of a module that workers can import.
        context: handed to `work`; with several workers it is sent to each once.
        executor: where to compute; None = `workers` processes here, for 1 this process itself.
        workers: number of processes, each on one thread.
        devices: given to the workers in turn; None = `work` gets None.
        retries: further tries of a cell that failed in a way that may not come again.
        progress: show a live table on a terminal; elsewhere every finished cell is a log record (INFO).

    Returns:
        What was computed, what was there, what failed and what could not be begun for it.

    Raises:
        InputError: cells that cannot be run (see `schedule.checked`), no workers, or workers that cannot start.
        DiskFull: cells in progress were let finish, no other was begun.
        KeyboardInterrupt: Ctrl-C; training in progress wrote its checkpoint. A second Ctrl-C kills it.
    """
    if workers < 1 or retries < 0 or devices == []:
        raise InputError(
            f"a run needs 1 worker or more, 0 retries or more, and devices, if any; got workers={workers}, retries={retries}, "
            f"devices={devices}"
        )
    try:
        by_name = checked(cells, store.done)
    except InputError:
        if executor is not None:
            executor.close()
        raise
    there = {name for name in by_name if store.done(name)}
    here = executor is None and workers == 1
    if executor is None:
        executor = (
            _Here(store, work, context, devices) if here else LocalExecutor(store, work, context, workers, devices)
        )
    run = _Run(store, by_name, there, executor, retries)
    try:
        with board(run.tally, progress), nullcontext(lambda: False) if here else first_ctrl_c() as stopped:
            run.loop(stopped)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: {run.tally.counts}; the same call goes on with the rest") from None
    finally:
        executor.close()
    if run.full:
        raise DiskFull(f"{run.full}; {run.tally.counts}; free space and run the same command again")
    report = run.report()
    log.info("%s in %s", run.tally.counts, duration(report.seconds))
    return report


class _Run:
    """One run of a grid: the loop and what it has seen."""

    def __init__(
        self, store: Store, cells: Mapping[str, Cell], there: set[str], executor: Executor, retries: int
    ) -> None:
        self.store, self.cells, self.there, self.executor, self.retries = store, cells, there, executor, retries
        self.schedule = Schedule(cells, there)
        self.tally = Tally(cells, there, executor.slots)
        self.running: set[str] = set()
        self.loaded: list[Any] = []  # the model that each free worker holds
        self.computed: set[str] = set()
        self.failed: dict[str, str] = {}
        self.full = ""
        self.asked = False  # to stop, by Ctrl-C in a worker
        self.stopping = False
        self.start = time.monotonic()

    def loop(self, stopped: Callable[[], bool]) -> None:
        while True:
            if (self.asked or stopped()) and not self.stopping:
                self.stopping = True
                self.tally.note = "stopping: training writes its checkpoint; Ctrl-C again kills it"
                self.executor.interrupt()
            if not (self.stopping or self.full):
                self._hand_out()
            if not self.running:
                if self.stopping:
                    raise KeyboardInterrupt
                if self.full or self.schedule.idle:
                    return
                time.sleep(TICK)  # another runner holds what is left
                continue
            for outcome in self.executor.wait(TICK):
                self._take_in(outcome)

    def _hand_out(self) -> None:
        self.tally.slots = self.executor.slots
        while len(self.running) < self.executor.slots:
            cell = self.schedule.take(time.monotonic(), self.loaded)
            if cell is None:
                return
            if self.store.done(cell.name):  # by another runner
                self._finish(Outcome(cell.name, "there"))
                continue
            model = cell.model
            if model in self.loaded:
                self.loaded.remove(model)
            elif self.loaded and len(self.loaded) + len(self.running) >= self.executor.slots:
                self.loaded.pop(0)
            self.running.add(cell.name)
            self.tally.begin(cell.name)
            self.executor.submit(cell)

    def _take_in(self, outcome: Outcome) -> None:
        name = outcome.name
        self.running.remove(name)
        self.loaded.append(self.cells[name].model)
        self.tally.end(name)
        if outcome.state in ("done", "there"):
            self._finish(outcome)
        elif outcome.state == "busy":
            self.schedule.put_back(name, time.monotonic() + LOOK_AGAIN)
        elif outcome.state == "stopped":
            self.asked = True
        elif outcome.full:
            self.full = outcome.error
        elif not (outcome.again and self.schedule.again(name, self.retries)):
            self._fail(outcome)
        else:
            log.info("%s failed and is tried again: %s", self.cells[name].label, outcome.error)

    def _finish(self, outcome: Outcome) -> None:
        (self.computed if outcome.state == "done" else self.there).add(outcome.name)
        self.schedule.done(outcome.name)
        self.tally.finish(outcome.name, outcome.seconds if outcome.state == "done" else None)
        log.info(
            "[%d/%d] %s: %s", self.tally.done, len(self.cells), self.cells[outcome.name].label,
            f"done in {outcome.seconds:.1f} s" if outcome.state == "done" else "done by another runner",
        )  # fmt: skip

    def _fail(self, outcome: Outcome) -> None:
        label, name = self.cells[outcome.name].label, outcome.name
        self.failed[name] = outcome.error
        log.warning("%s failed: %s (see %s)", label, outcome.error, self.store.log_file(name))
        self.tally.fail(name, outcome.error, set(self.schedule.blocked(self.failed)))
        try:
            self.store.fail(name, outcome.error)
        except DiskFull as e:
            self.full = str(e)

    def report(self) -> Report:
        blocked = self.schedule.blocked(self.failed)
        return Report(
            tuple(n for n in self.cells if n in self.computed), tuple(n for n in self.cells if n in self.there),
            {n: self.failed[n] for n in self.cells if n in self.failed}, {n: blocked[n] for n in self.cells if n in blocked},
            time.monotonic() - self.start,
        )  # fmt: skip


class _Here:
    """This process as the only worker: `wait` computes the cell. Ctrl-C reaches the work by itself."""

    slots = 1

    def __init__(self, store: Store, work: Work, context: Any, devices: Sequence[str] | None) -> None:
        self._try = lambda cell: attempt(store, cell, work, context, devices[0] if devices else None)
        self._cell: Cell | None = None

    def submit(self, cell: Cell) -> None:
        self._cell = cell

    def wait(self, timeout: float) -> list[Outcome]:
        cell, self._cell = self._cell, None
        return [] if cell is None else [self._try(cell)]

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass
