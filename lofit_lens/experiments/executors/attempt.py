"""One try at one group of cells, the same in this process, in a worker process and in a Ray task.

A group that is there already, or of which another runner holds a cell, is left alone. What the work says while it runs (log
records, warnings, prints, the traceback of a failure) is appended to logs in the store: of what cells compute together to the
group's, of each cell's own part to the cell's.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TextIO

from lofit_lens import io
from lofit_lens.errors import DiskFull, InputError, TrainingDiverged
from lofit_lens.experiments.executors.groups import Group
from lofit_lens.experiments.executors.process import one_thread
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Store

Each = Callable[[Cell], AbstractContextManager[None]]
"""cell -> the block in which its run is written; an error in it is that cell's alone."""

Work = Callable[[Store, Group, Any, str | None, Each], None]
"""(store, group, context, device, each): computes the group's cells and writes those that the store has not, one after the other,
each through `store.new` in `with each(cell):`; picklable by reference."""


@dataclass(frozen=True)
class Outcome:
    """What became of one try at a cell.

    Attributes:
        name: of the cell.
        state: "done" (computed now), "there" (was done already), "busy" (another holds it), "failed" or "stopped" (Ctrl-C).
        error: kind and text of the error, of a failure.
        details: its traceback.
        again: a failure that may not come a second time.
        full: the disk is full.
        seconds: that it took, with its share of what the group's cells took together.
    """

    name: str
    state: Literal["done", "there", "busy", "failed", "stopped"]
    error: str = ""
    details: str = ""
    again: bool = True
    full: bool = False
    seconds: float = 0.0


Outcomes = tuple[Outcome, ...]
"""Of one try at a group: one for each of its cells, in order."""


def attempt(
    store: Store, group: Group, work: Work, context: Any, device: str | None, *, whole_process: bool = False
) -> Outcomes:
    """Compute a group if it is not there and nobody else does; on one thread, so that the result is the same everywhere.

    Args:
        store: where its cells are looked up and written.
        group: what to compute.
        work: computes it.
        context: handed to `work`.
        device: handed to `work`.
        whole_process: the logs take all that this process writes, C libraries too; False = what Python code writes.

    Returns:
        What became of each cell. An error of the work is an outcome, not raised; so is Ctrl-C ("stopped").
    """
    one = _Try(store, group, whole_process)
    try:
        rest = Outcome("", one.run(lambda: work(store, group, context, device, one.each)))
    except KeyboardInterrupt as e:
        rest = Outcome("", "stopped", str(e))
    except (Exception, SystemExit) as e:
        rest = _failure(e)
    return one.outcomes(rest)


class _Try:
    """What is known of the cells while a group is tried."""

    def __init__(self, store: Store, group: Group, whole_process: bool) -> None:
        self.store, self.group, self.whole_process = store, group, whole_process
        self.found: dict[str, Outcome] = {}
        self.start = time.perf_counter()

    def run(self, work: Callable[[], None]) -> Literal["done", "there", "busy"]:
        store, cells = self.store, self.group.cells
        if self.all_there():
            return "there"
        with contextlib.ExitStack() as claims:
            # In one order everywhere: of two runners that want cells of each other's groups, one gets all of its own.
            if not all(claims.enter_context(store.claim(name)) for name in sorted(c.name for c in cells)):
                return "busy"
            if self.all_there():  # by another, between the two looks
                return "there"
            with cell_log(store, self.group, whole_process=self.whole_process), one_thread():
                for cell in cells if len(cells) > 1 else ():
                    write_line(store, cell, f"computed with {len(cells) - 1} others: {store.log_file(self.group.name)}")
                work()
                for cell in cells:
                    if cell.name not in self.found and not store.done(cell.name):
                        raise RuntimeError(f"the work of {cell.label} ended without writing its run (store.new)")
            if all(store.done(cell.name) for cell in cells):
                store.state_file(self.group.name).unlink(missing_ok=True)
        return "done"

    def all_there(self) -> bool:
        for cell in self.group.cells:
            if self.store.done(cell.name):
                self.found[cell.name] = Outcome(cell.name, "there")
        return len(self.found) == len(self.group.cells)

    @contextlib.contextmanager
    def each(self, cell: Cell) -> Iterator[None]:
        if len(self.group.cells) == 1:  # its log is open, and an error in it is the group's
            yield
            return
        start, found = time.perf_counter(), Outcome("", "done")
        try:
            with cell_log(self.store, cell, whole_process=self.whole_process):
                yield
        except (Exception, SystemExit) as e:
            found = _failure(e)
        if found.state == "failed" or self.store.done(cell.name):
            self.found[cell.name] = replace(found, name=cell.name, seconds=time.perf_counter() - start)

    def outcomes(self, rest: Outcome) -> Outcomes:
        """Of all cells; `rest` = of those that nothing is known of."""
        names = [cell.name for cell in self.group.cells]
        found = [self.found.get(name, replace(rest, name=name)) for name in names]
        shared = time.perf_counter() - self.start - sum(outcome.seconds for outcome in found)
        return tuple(replace(outcome, seconds=outcome.seconds + shared / len(names)) for outcome in found)


def _failure(e: BaseException) -> Outcome:
    again = not isinstance(e, InputError | TrainingDiverged)
    return Outcome("", "failed", _text(e), _traceback(e), again=again, full=_is_full(e))


def _text(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}" if str(e) else type(e).__name__


def _is_full(e: BaseException | None) -> bool:
    while e is not None:
        if isinstance(e, DiskFull) or (isinstance(e, OSError) and e.errno in io.FULL):
            return True
        e = e.__cause__ or e.__context__
    return False


# --------------------------------------------------------------------------------------------------------- log


@contextlib.contextmanager
def cell_log(store: Store, of: Cell | Group, *, whole_process: bool) -> Iterator[None]:
    """Append what is said in the block to the log of a cell or a group, between a line of its start and one of its end."""
    path = store.log_file(of.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace"))
        stack.enter_context(_everything_to(log) if whole_process else _prints_to(log))
        stack.enter_context(warnings.catch_warnings())  # a warning that an earlier cell gave is given anew
        stack.enter_context(_records_to(log))
        log.write(f"{_now()} start: {of.label} (process {os.getpid()})\n")
        try:
            yield
        except BaseException as e:
            with contextlib.suppress(OSError):  # a full disk: the error itself is what counts
                log.write(f"{_traceback(e)}{_now()} {_text(e)} (after {time.perf_counter() - start:.1f} s)\n")
            raise
        log.write(f"{_now()} done in {time.perf_counter() - start:.1f} s\n")


def write_line(store: Store, cell: Cell, text: str) -> None:
    """Add a line to the cell's log, for a worker that can no longer do so."""
    path = store.log_file(cell.name)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as log:
            log.write(f"{_now()} {text}\n")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _traceback(e: BaseException) -> str:
    return "" if isinstance(e, KeyboardInterrupt) else "".join(traceback.format_exception(e))


@contextlib.contextmanager
def _prints_to(log: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


@contextlib.contextmanager
def _everything_to(log: TextIO) -> Iterator[None]:
    """The process's own stdout and stderr, whoever writes there."""
    before = [os.dup(1), os.dup(2)]
    try:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)


@contextlib.contextmanager
def _records_to(log: TextIO) -> Iterator[None]:
    """Log records: this library's from INFO, others' as they are; other handlers see what they saw before."""
    root, ours = logging.getLogger(), logging.getLogger("lofit_lens")
    level, floor = ours.level, ours.getEffectiveLevel()
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    others = list(root.handlers)

    def seen_before(record: logging.LogRecord) -> bool:
        return record.levelno >= floor or not record.name.startswith("lofit_lens")

    for other in others:
        other.addFilter(seen_before)
    root.addHandler(handler)
    ours.setLevel(min(floor, logging.INFO))
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        for other in others:
            other.removeFilter(seen_before)
