"""One try at one cell, the same in this process, in a worker process and in a Ray task.

A cell that is there already, or that another runner holds, is left alone. What the work says while it runs (log records,
warnings, prints, the traceback of a failure) is appended to the cell's log in the store.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from lofit_lens import io
from lofit_lens.errors import DiskFull, InputError, TrainingDiverged
from lofit_lens.experiments.cells import Cell
from lofit_lens.experiments.pool import one_thread
from lofit_lens.experiments.store import Store

Work = Callable[[Store, Cell, Any, str | None], None]
"""(store, cell, context, device): computes the cell and writes it through `store.new`; picklable by reference."""


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
        seconds: that it took.
    """

    name: str
    state: Literal["done", "there", "busy", "failed", "stopped"]
    error: str = ""
    details: str = ""
    again: bool = True
    full: bool = False
    seconds: float = 0.0


def attempt(
    store: Store, cell: Cell, work: Work, context: Any, device: str | None, *, whole_process: bool = False
) -> Outcome:
    """Compute a cell if it is not there and nobody else does; on one thread, so that the result is the same everywhere.

    Args:
        store: where the cell is looked up and written.
        cell: what to compute.
        work: computes it.
        context: handed to `work`.
        device: handed to `work`.
        whole_process: the cell's log takes all that this process writes, C libraries too; False = what Python code writes.

    Returns:
        What became of it. An error of the work is an outcome, not raised; so is Ctrl-C ("stopped").
    """
    start = time.perf_counter()
    try:
        state = _claimed(store, cell, lambda: work(store, cell, context, device), whole_process)
        return Outcome(cell.name, state, seconds=time.perf_counter() - start)
    except KeyboardInterrupt as e:
        return Outcome(cell.name, "stopped", str(e), seconds=time.perf_counter() - start)
    except (Exception, SystemExit) as e:
        return Outcome(
            cell.name, "failed", _text(e), _traceback(e),
            again=not isinstance(e, InputError | TrainingDiverged), full=_is_full(e), seconds=time.perf_counter() - start,
        )  # fmt: skip


def _claimed(
    store: Store, cell: Cell, compute: Callable[[], None], whole_process: bool
) -> Literal["done", "there", "busy"]:
    if store.done(cell.name):
        return "there"
    with store.claim(cell.name) as ours:
        if not ours:
            return "busy"
        if store.done(cell.name):  # by another, between the two lines above
            return "there"
        with cell_log(store, cell, whole_process=whole_process), one_thread():
            compute()
            if not store.done(cell.name):
                raise RuntimeError(f"the work of {cell.label} ended without writing its run (store.new)")
    return "done"


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
def cell_log(store: Store, cell: Cell, *, whole_process: bool) -> Iterator[None]:
    """Append what is said in the block to the cell's log, between a line of its start and one of its end."""
    path = store.log_file(cell.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace"))
        stack.enter_context(_everything_to(log) if whole_process else _prints_to(log))
        stack.enter_context(warnings.catch_warnings())  # a warning that an earlier cell gave is given anew
        stack.enter_context(_records_to(log))
        log.write(f"{_now()} start: {cell.label} (process {os.getpid()})\n")
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
