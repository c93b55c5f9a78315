"""Run the cells of a grid that are not in the store, each after the cells it needs, on any executor.

Cells that can share a pass over the model are handed out as one group (`schedule.grouped`); all others are groups of one.
Only the store records what is done, so a run that was stopped or killed continues when it is called again, and several runners
on one store share the work: a cell that another runner holds is checked again later.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm as Bar
from tqdm.contrib.logging import logging_redirect_tqdm

from lofit_lens.errors import DiskFull, InputError
from lofit_lens.experiments.executors.attempt import Outcome, Outcomes, Work, attempt
from lofit_lens.experiments.executors.local import LocalExecutor
from lofit_lens.experiments.executors.schedule import TOGETHER, Group, Schedule, grouped
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Store
from lofit_lens.progress import is_live, tqdm
from lofit_lens.training.loop import first_ctrl_c

TICK = 0.2  # seconds between two checks for Ctrl-C
LOOK_AGAIN = 1.0  # seconds until a cell that another runner holds is tried again
STOPPING = "stopping: training writes its checkpoint; Ctrl-C again kills it;"

log = logging.getLogger(__name__)

__all__ = ["Executor", "Outcome", "Outcomes", "Report", "Work", "attempt", "run_cells"]


@runtime_checkable
class Executor(Protocol):
    """Where cells are computed. `run_cells` never submits more than `slots` groups at a time, and closes it at the end.

    Attributes:
        slots: number of groups at a time; may change between calls of `wait`.
    """

    @property
    def slots(self) -> int: ...

    def submit(self, group: Group) -> None:
        """Begin a group and return at once."""

    def wait(self, timeout: float) -> list[Outcomes]:
        """New outcomes, waiting at most `timeout` seconds for the first; one entry for each submitted group."""
        ...

    def interrupt(self) -> None:
        """Interrupt everything in progress: training writes its checkpoint; the outcomes ("stopped") arrive through `wait`."""

    def close(self) -> None:
        """End all workers; work in progress is killed."""


@dataclass(frozen=True)
class Report:
    """What a run of a grid did; cells are listed in the grid's order.

    Attributes:
        computed: cells computed by this run.
        there: cells that were already done, or that another runner did meanwhile.
        failed: cell -> its error.
        blocked: cell -> the failed cell that it, or another cell of its group, needs, directly or not.
    """

    computed: tuple[str, ...]
    there: tuple[str, ...]
    failed: dict[str, str]
    blocked: dict[str, str]


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
    """Compute every cell that is not in the store; a failed cell is retried, then reported, and the rest continues.

    Args:
        store: store in which runs are looked up and written.
        cells: cells of the grid; their needs are among them or in the store.
        work: computes a group of cells; a function of a module that workers can import.
        context: passed to `work`; with several workers it is sent to each once.
        executor: where to compute; None = `workers` processes here, or this process itself if that is 1.
        workers: number of processes, each on one thread.
        devices: assigned to the workers in turn; None = `work` gets None.
        retries: further attempts at a group with a cell whose failure may be temporary.
        together: maximum number of cells that share a pass over the model; 1 = none. Another number changes rounding.
        progress: show a bar on a terminal. Start and end of each group are log records (INFO).

    Returns:
        Which cells were computed, were already there, failed, or could not be started because of a failure.

    Raises:
        InputError: no workers, or workers that cannot start.
        DiskFull: the disk is full; cells in progress were completed, and no other was started.
        KeyboardInterrupt: Ctrl-C; training in progress wrote its checkpoint. A second Ctrl-C kills it.
    """
    if workers < 1 or retries < 0 or together < 1 or devices == []:
        raise InputError(
            f"workers must be at least 1, retries at least 0, together at least 1, and devices not empty; got "
            f"workers={workers}, retries={retries}, together={together}, devices={devices}"
        )
    here = executor is None and workers == 1
    if executor is None:
        executor = (
            _Here(store, work, context, devices) if here else LocalExecutor(store, work, context, workers, devices)
        )
    with closing(executor):
        run = _Run(store, {cell.name: cell for cell in cells}, executor, retries, together)
        try:
            with _bar(run, progress) as run.bar, nullcontext(lambda: False) if here else first_ctrl_c() as ctrl_c:
                run.loop(ctrl_c)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped: {run.schedule.counts}; the same call continues with the rest") from None
    if run.full:
        raise DiskFull(f"{run.full}; {run.schedule.counts}; free space and run the same command again")
    log.info("%s", run.schedule.counts)
    return run.report()


class _Run:
    """One run of a grid: the loop between its schedule and its executor."""

    bar: Bar

    def __init__(self, store: Store, cells: dict[str, Cell], executor: Executor, retries: int, together: int) -> None:
        self.store, self.cells, self.executor = store, cells, executor
        self.there = {name for name in cells if store.done(name)}
        self.computed: set[str] = set()
        self.schedule = Schedule(grouped(cells, together), self.there, retries)
        self.loaded: list[Any] = []  # the model that each free worker holds
        self.stopped = False  # whether Ctrl-C was pressed
        self.full = ""  # the error of a full disk

    def loop(self, ctrl_c: Callable[[], bool]) -> None:
        schedule = self.schedule
        while True:
            if ctrl_c():
                self._stop()
            self._hand_out()
            if schedule.running:
                self._show()
                for outcomes in self.executor.wait(TICK):
                    self._take_in(outcomes)
            elif self.stopped:
                raise KeyboardInterrupt
            elif schedule.stopping or schedule.idle:
                return
            else:
                time.sleep(TICK)  # another runner holds the remaining cells

    def _stop(self) -> None:
        if not self.stopped:
            self.stopped = self.schedule.stopping = True
            self.executor.interrupt()

    def _show(self) -> None:
        running = ", ".join(group.label for group in self.schedule.running)
        self.bar.set_description_str(self.schedule.counts, refresh=False)
        self.bar.set_postfix_str(f"{STOPPING} {running}" if self.stopped else running, refresh=is_live())
        self.bar.update(0)  # in a log: a line if it is time for one

    def _hand_out(self) -> None:
        running = self.schedule.running
        while len(running) < self.executor.slots:
            group = self.schedule.take(time.monotonic(), self.loaded)
            if group is None:
                return
            if group.model in self.loaded:
                self.loaded.remove(group.model)
            elif self.loaded and len(self.loaded) + len(running) > self.executor.slots:
                self.loaded.pop(0)
            log.info("begun: %s", group.label)
            self.executor.submit(group)

    def _take_in(self, outcomes: Outcomes) -> None:
        group = next(g for g in self.schedule.running if g.cells[0].name == outcomes[0].name)
        self.loaded.append(group.model)
        failed: list[Outcome] = []
        for outcome in outcomes:
            # A worker may have died after it wrote some of its cells.
            if outcome.state in ("done", "there") or (outcome.state == "failed" and self.store.done(outcome.name)):
                self._finish(outcome)
            elif outcome.state == "failed":
                failed.append(outcome)
        full = next((outcome for outcome in failed if outcome.full), None)
        if any(outcome.state == "busy" for outcome in outcomes):
            self.schedule.put_back(group, time.monotonic() + LOOK_AGAIN)
        elif full or any(outcome.state == "stopped" for outcome in outcomes):
            self.schedule.running.remove(group)
            if full:
                self.full, self.schedule.stopping = full.error, True
            else:
                self._stop()
        elif self.schedule.finish(group, {o.name: o.error for o in failed}, may_pass=any(o.again for o in failed)):
            for outcome in failed:
                log.info("%s failed and is retried: %s", self.cells[outcome.name].label, outcome.error)
        else:
            for outcome in failed:
                self._fail(group, outcome)

    def _finish(self, outcome: Outcome) -> None:
        name, left = outcome.name, self.schedule.left
        if name not in left:  # it was done before this run began
            return
        self.schedule.done(name)
        (self.computed if outcome.state == "done" else self.there).add(name)
        self.bar.update(self.cells[name].cost)
        how = "done" if outcome.state == "done" else "done by another runner"
        log.info("[%d/%d] %s: %s", len(self.cells) - len(left), len(self.cells), self.cells[name].label, how)

    def _fail(self, group: Group, outcome: Outcome) -> None:
        name = outcome.name
        if not outcome.again:
            self.schedule.lose(name)
        log.warning("%s failed: %s (see %s)", self.cells[name].label, outcome.error, self.store.log_file(group.name))
        try:
            self.store.fail(name, outcome.error)
        except DiskFull as e:
            self.full, self.schedule.stopping = str(e), True

    def report(self) -> Report:
        failed, blocked = self.schedule.failed, self.schedule.blocked
        return Report(
            tuple(n for n in self.cells if n in self.computed), tuple(n for n in self.cells if n in self.there),
            {n: failed[n] for n in self.cells if n in failed}, {n: blocked[n] for n in self.cells if n in blocked},
        )  # fmt: skip


@contextmanager
def _bar(run: _Run, progress: bool) -> Iterator[Bar]:
    """Show a bar over the cost of the remaining cells; on a terminal log records appear above it."""
    cost = sum(run.cells[name].cost for name in run.schedule.left)
    form = "{desc} |{bar}| {elapsed}, {remaining} left{postfix}"
    with (
        tqdm(total=cost, bar_format=form, smoothing=0, dynamic_ncols=True, leave=False, disable=not progress) as bar,
        logging_redirect_tqdm() if progress and is_live() else nullcontext(),
    ):
        yield bar


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
