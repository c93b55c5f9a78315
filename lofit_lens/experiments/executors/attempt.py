"""One try at one group of cells, the same in this process, in a worker process and in a Ray task.

A group that is already done, or of which another runner holds a cell, is skipped. All output of the work (log records,
warnings, prints, the traceback of a failure) is appended to the group's log in the store.
"""

import contextlib
import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TextIO

from lofit_lens import io
from lofit_lens.errors import DiskFull, InputError, TrainingDiverged
from lofit_lens.experiments.executors.process import one_thread, streams_to
from lofit_lens.experiments.executors.schedule import Group
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Store

Each = Callable[[Cell], AbstractContextManager[None]]
"""cell -> the block in which its run is written; an error in it affects only that cell."""

Work = Callable[[Store, Group, Any, str | None, Each], None]
"""(store, group, context, device, each): computes the group's cells and writes those that the store lacks, one after the other,
each through `store.new` in `with each(cell):`; it must be picklable by reference."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one attempt at a cell.

    Attributes:
        name: name of the cell.
        state: "done" (computed now), "there" (already done), "busy" (held by another runner), "failed" or "stopped" (Ctrl-C).
        error: for a failure, kind and text of the error.
        again: whether another attempt may succeed.
        full: the disk is full.
    """

    name: str
    state: Literal["done", "there", "busy", "failed", "stopped"]
    error: str = ""
    again: bool = True
    full: bool = False


Outcomes = tuple[Outcome, ...]
"""Outcomes of one attempt at a group, one for each of its cells, in order."""


def attempt(
    store: Store, group: Group, work: Work, context: Any, device: str | None, *, whole_process: bool = False
) -> Outcomes:
    """Compute a group unless it is done or held by another runner; on one thread, so that the result is the same everywhere.

    Args:
        store: store in which cells are looked up and written.
        group: the group to compute.
        work: function that computes it.
        context: passed to `work`.
        device: passed to `work`.
        whole_process: the log gets everything that this process writes, including C libraries, and output outside of groups is
            discarded; False = the log gets only what Python code writes.

    Returns:
        The outcome of each cell. An error of the work is an outcome and not raised; so is Ctrl-C ("stopped").
    """
    names = [cell.name for cell in group.cells]
    there: set[str] = set()
    failed: dict[str, Outcome] = {}
    rest = Outcome("", "busy")  # the outcome of all cells without one of their own

    def all_there() -> bool:
        there.update(name for name in names if store.done(name))
        return len(there) == len(names)

    @contextlib.contextmanager
    def each(cell: Cell) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as e:
            traceback.print_exc()
            failed[cell.name] = _failure(e)

    try:
        with contextlib.ExitStack() as claims:
            # Locks are taken in the same order everywhere: of two runners with overlapping groups, one gets all of its own.
            mine = not all_there() and all(claims.enter_context(store.claim(name)) for name in sorted(names))
            if mine and not all_there():  # another may have computed it between the two checks
                with logged(store, group, whole_process=whole_process), one_thread():
                    work(store, group, context, device, each)
                    for cell in group.cells:
                        if cell.name not in failed and not store.done(cell.name):
                            raise RuntimeError(f"the work of {cell.label} ended without writing its run (store.new)")
                if not failed:
                    store.state_file(group.name).unlink(missing_ok=True)
                rest = Outcome("", "done")
    except KeyboardInterrupt:
        rest = Outcome("", "stopped")
    except (Exception, SystemExit) as e:
        rest = _failure(e)

    def outcome(name: str) -> Outcome:
        if name in there:
            return Outcome(name, "there")
        if rest.state != "busy" and store.done(name):
            return Outcome(name, "done")
        return replace(failed.get(name, rest), name=name)

    return tuple(outcome(name) for name in names)


def _failure(e: BaseException) -> Outcome:
    again = not isinstance(e, InputError | TrainingDiverged)
    return Outcome("", "failed", _text(e), again=again, full=_is_full(e))


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
def logged(store: Store, group: Group, *, whole_process: bool) -> Iterator[None]:
    """Append the output of the block to the group's log, between a start line and an end line."""
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_opened(store, group))
        if whole_process:
            streams_to(store.log_file(group.name))
            stack.callback(streams_to, os.devnull)
        else:
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(warnings.catch_warnings())  # warnings that an earlier group gave are shown again
        records = logging.StreamHandler(log)
        records.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
        logging.getLogger().addHandler(records)
        stack.callback(logging.getLogger().removeHandler, records)
        log.write(f"{_now()} start: {', '.join(cell.label for cell in group.cells)} (process {os.getpid()})\n")
        try:
            yield
        except BaseException as e:
            said = "" if isinstance(e, KeyboardInterrupt) else traceback.format_exc()
            with contextlib.suppress(OSError):  # on a full disk the error itself matters, not the log
                log.write(f"{said}{_now()} {_text(e)} (after {time.perf_counter() - start:.1f} s)\n")
            raise
        log.write(f"{_now()} end, after {time.perf_counter() - start:.1f} s\n")


def log_line(store: Store, group: Group, text: str) -> None:
    """Add a line to the group's log, for a worker that can no longer do so."""
    with contextlib.suppress(OSError), _opened(store, group) as log:
        log.write(f"{_now()} {text}\n")


def _opened(store: Store, group: Group) -> TextIO:
    path = store.log_file(group.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
