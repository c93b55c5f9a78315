"""Run a grid's cells: those that are not in the store, each after the cells it needs, on any executor.

Cells that can share a pass over the model are handed out as one group (`groups.grouped`); all others are groups of one.
The store alone knows what is done, so a run that was stopped or killed goes on when it is called again, and several runners
on one store share the work: a cell that another one holds is looked at again later.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from lofit_lens.errors import DiskFull, InputError
from lofit_lens.experiments.executors.attempt import Outcome, Outcomes, Work, attempt
from lofit_lens.experiments.executors.groups import TOGETHER, Group, grouped
from lofit_lens.experiments.executors.live import Tally, board, duration
from lofit_lens.experiments.executors.local import LocalExecutor
from lofit_lens.experiments.executors.schedule import Schedule, checked
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Store
from lofit_lens.training.loop import first_ctrl_c

TICK = 0.2  # seconds between two looks at Ctrl-C
LOOK_AGAIN = 1.0  # seconds until a cell that another runner holds is tried again

log = logging.getLogger(__name__)

__all__ = ["Executor", "Outcome", "Outcomes", "Report", "Work", "attempt", "run_cells"]


@runtime_checkable
class Executor(Protocol):
    """Where cells are computed. `run_cells` never hands out more than `slots` at a time, and closes it at the end.

    Attributes:
        slots: groups at a time; may change from call to call of `wait`.
    """

    slots: int

    def submit(self, group: Group) -> None:
        """Begin a group and return at once."""

    def wait(self, timeout: float) -> list[Outcomes]:
        """Outcomes that are new, waiting `timeout` seconds at most for the first; one entry for each group handed out."""
        ...

    def interrupt(self) -> None:
        """Ctrl-C for all that is in progress: training writes its checkpoint; the outcomes ("stopped") come by `wait`."""

    def close(self) -> None:
        """End all workers; what is in progress is killed."""


@dataclass(frozen=True)
class Report:
    """What a run of a grid did; names in the grid's order.

    Attributes:
        computed: cells computed by this run.
        there: cells that were done already, or done by another runner meanwhile.
        failed: cell -> its error.
        blocked: cell -> the failed cell that it, or another of its group, needs, directly or not.
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
    together: int = TOGETHER,
    progress: bool = True,
) -> Report:
    """Compute every cell that is not in the store; a failed cell is tried again, then reported, and the rest goes on.

    Args:
        store: where runs are looked up and written.
        cells: of the grid; their needs are among them or in the store.
        work: computes a group of cells; a function of a module that workers can import.
        context: handed to `work`; with several workers it is sent to each once.
        executor: where to compute; None = `workers` processes here, for 1 this process itself.
        workers: number of processes, each on one thread.
        devices: given to the workers in turn; None = `work` gets None.
        retries: further tries of a group with a cell that failed in a way that may not come again.
        together: cells at most that share a pass over the model; 1 = none. Results of another number differ by rounding.
        progress: show a live table on a terminal; elsewhere every finished cell is a log record (INFO).

    Returns:
        What was computed, what was there, what failed and what could not be begun for it.

    Raises:
        InputError: cells that cannot be run (see `schedule.checked`), no workers, or workers that cannot start.
        DiskFull: cells in progress were let finish, no other was begun.
        KeyboardInterrupt: Ctrl-C; training in progress wrote its checkpoint. A second Ctrl-C kills it.
    """
    if workers < 1 or retries < 0 or together < 1 or devices == []:
        raise InputError(
            f"a run needs 1 worker or more, 0 retries or more, 1 cell or more together, and devices, if any; got "
            f"workers={workers}, retries={retries}, together={together}, devices={devices}"
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
    run = _Run(store, by_name, grouped(by_name, together), there, executor, retries)
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
        self, store: Store, cells: Mapping[str, Cell], groups: Sequence[Group], there: set[str], executor: Executor, retries: int
    ) -> None:  # fmt: skip
        self.store, self.cells, self.there, self.executor, self.retries = store, cells, there, executor, retries
        self.schedule = Schedule(groups, there)
        self.tally = Tally(cells, there, executor.slots)
        self.running: list[Group] = []
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
            for outcomes in self.executor.wait(TICK):
                self._take_in(outcomes)

    def _hand_out(self) -> None:
        self.tally.slots = self.executor.slots
        while len(self.running) < self.executor.slots:
            group = self.schedule.take(time.monotonic(), self.loaded)
            if group is None:
                return
            if all(self.store.done(cell.name) for cell in group.cells):  # by another runner
                self._finish(Outcome(cell.name, "there") for cell in group.cells)
                continue
            model = group.model
            if model in self.loaded:
                self.loaded.remove(model)
            elif self.loaded and len(self.loaded) + len(self.running) >= self.executor.slots:
                self.loaded.pop(0)
            self.running.append(group)
            self.tally.begin(group)
            self.executor.submit(group)

    def _take_in(self, outcomes: Outcomes) -> None:
        group = next(g for g in self.running if g.cells[0].name == outcomes[0].name)
        self.running.remove(group)
        self.loaded.append(group.model)
        self.tally.end(group)
        # A worker may have died after it wrote some of its cells.
        outcomes = tuple(
            replace(o, state="there") if o.state == "failed" and self.store.done(o.name) else o for o in outcomes
        )
        self._finish(outcome for outcome in outcomes if outcome.state in ("done", "there"))
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        if any(outcome.state == "busy" for outcome in outcomes):
            self.schedule.put_back(group, time.monotonic() + LOOK_AGAIN)
        elif any(outcome.state == "stopped" for outcome in outcomes):
            self.asked = True
        elif full := [outcome for outcome in failed if outcome.full]:
            self.full = full[0].error
        elif any(outcome.again for outcome in failed) and self.schedule.again(group, self.retries):
            for outcome in failed:
                log.info("%s failed and is tried again: %s", self.cells[outcome.name].label, outcome.error)
        else:
            for outcome in failed:
                self._fail(outcome)

    def _finish(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.name not in self.schedule.left:  # it was there before this run began
                continue
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
        if not outcome.again:
            self.schedule.lose(name)
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
    """This process as the only worker: `wait` computes the group. Ctrl-C reaches the work by itself."""

    slots = 1

    def __init__(self, store: Store, work: Work, context: Any, devices: Sequence[str] | None) -> None:
        self._try = lambda group: attempt(store, group, work, context, devices[0] if devices else None)
        self._group: Group | None = None

    def submit(self, group: Group) -> None:
        self._group = group

    def wait(self, timeout: float) -> list[Outcomes]:
        group, self._group = self._group, None
        return [] if group is None else [self._try(group)]

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass
