"""Worker processes on this machine. Each reads the library and the context once, then computes one group after the other.

Every worker is a `ProcessPoolExecutor` of its own, so that one that dies costs its own group one try and no other's. It is
started when a group has no free one, in a process group of its own: a terminal's Ctrl-C reaches the parent alone, which passes
it on. When the parent dies, its workers exit at once.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from lofit_lens.errors import InputError
from lofit_lens.experiments.executors.attempt import Outcome, Outcomes, Work, attempt, log_line
from lofit_lens.experiments.executors.process import prepare_process
from lofit_lens.experiments.executors.schedule import Group
from lofit_lens.experiments.store.store import Store

PATIENCE = 5.0  # seconds that an idle worker gets to exit by itself
CTRL_C = {signal.SIGINT}


@dataclass(eq=False)
class _Worker:
    """One process.

    Attributes:
        pool: its only process is the worker.
        process: the worker.
        device: of its groups.
        ready: done when it has imported the library and read the work and the context.
        group: that it computes; None = it is free.
        outcomes: of that group.
        model: of its last group.
    """

    pool: ProcessPoolExecutor
    process: BaseProcess
    device: str | None
    ready: Future[int]
    group: Group | None = None
    outcomes: Future[Outcomes] | None = None
    model: Any = None


class LocalExecutor:
    """Processes by spawn, started when they are needed and kept.

    Args:
        store: as `run_cells`; sent to every worker once, like the next two.
        work: as `run_cells`.
        context: as `run_cells`.
        workers: processes at most.
        devices: worker i gets `devices[i % n]`; None = none gets one.
    """

    def __init__(
        self, store: Store, work: Work, context: Any, workers: int, devices: Sequence[str] | None = None
    ) -> None:
        self.slots = workers
        self._setting = (store, work, context)
        self._devices: list[str | None] = [devices[i % len(devices)] if devices else None for i in range(workers)]
        self._workers: list[_Worker] = []  # those free for the longest time first
        self._interrupted = False

    def submit(self, group: Group) -> None:
        """Begin a group: on a free worker that holds its model, else on a new one, else on the one free for longest.

        Raises:
            InputError: a worker cannot be started, or the work and its context cannot be sent to it.
        """
        for worker in [w for w in self._workers if w.group is None and not w.process.is_alive()]:
            self._end(worker)
        free = [w for w in self._workers if w.group is None]
        worker = next((w for w in free if w.model == group.model), None)
        if worker is None:
            worker = self._start() if len(self._workers) < self.slots else free[0]
        worker.group, worker.model = group, group.model
        worker.outcomes = worker.pool.submit(_compute, group)

    def wait(self, timeout: float) -> list[Outcomes]:
        """Outcomes that came within `timeout` seconds.

        Raises:
            InputError: a worker ended before it was ready.
        """
        busy = {w.outcomes: w for w in self._workers if w.outcomes is not None}
        ended, _ = wait(busy, timeout, FIRST_COMPLETED)
        return [self._outcomes(busy[outcomes]) for outcomes in ended]

    def interrupt(self) -> None:
        """SIGINT for every worker that computes; once, since a second one stops training without a checkpoint."""
        if self._interrupted:
            return
        self._interrupted = True
        for worker in self._workers:
            if not worker.ready.done():
                worker.process.kill()
            elif worker.group is not None and worker.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGINT)

    def close(self) -> None:
        """End all workers: one that computes at once."""
        for worker in self._workers:
            if worker.group is not None:
                worker.process.kill()
            worker.pool.shutdown(wait=False)
        for worker in [*self._workers]:
            self._end(worker)

    def _start(self) -> _Worker:
        used = [w.device for w in self._workers]
        device = min(self._devices, key=used.count)
        before = multiprocessing.active_children()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, CTRL_C)  # in the new process too
        try:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (*self._setting, device))
            ready = pool.submit(os.getpid)
        except Exception as e:
            raise InputError(
                f"a worker process cannot be started, or the work and its context cannot be sent to it ({e}); use workers=1"
            ) from e
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        (process,) = set(multiprocessing.active_children()) - set(before)
        self._workers.append(_Worker(pool, process, device, ready))
        return self._workers[-1]

    def _outcomes(self, worker: _Worker) -> Outcomes:
        group, outcomes = worker.group, worker.outcomes
        assert group is not None
        assert outcomes is not None
        error = outcomes.exception()
        if isinstance(error, BrokenProcessPool):
            return self._died(worker, group)
        worker.group = worker.outcomes = None
        self._workers.append(self._workers.pop(self._workers.index(worker)))
        if isinstance(error, KeyboardInterrupt):  # just before or after the attempt
            return tuple(Outcome(cell.name, "stopped") for cell in group.cells)
        return outcomes.result()

    def _died(self, worker: _Worker, group: Group) -> Outcomes:
        code = self._end(worker)
        if self._interrupted:
            return tuple(Outcome(cell.name, "stopped") for cell in group.cells)
        if code > 0 and worker.ready.exception() is not None:
            raise InputError(
                f"a worker process ended while it started (exit code {code}); its own message is on stderr. A script that "
                'calls this needs `if __name__ == "__main__":` around it, and workers must be able to import the work and '
                "what is in its context; or use workers=1"
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = f"worker died ({how}){': out of memory?' if code == -signal.SIGKILL else ''}"
        log_line(self._setting[0], group, error)
        return tuple(Outcome(cell.name, "failed", error) for cell in group.cells)

    def _end(self, worker: _Worker) -> int:
        """Forget a worker that is dead or exits; its exit code, negative for a signal."""
        worker.process.join(PATIENCE)
        worker.process.kill()
        worker.pool.shutdown()
        self._workers.remove(worker)
        return worker.process.exitcode or 0


# ------------------------------------------------------------------------------------------------- in the worker

_given: tuple[Any, ...] = ()


def _begin(store: Store, work: Work, context: Any, device: str | None) -> None:
    """Prepare this process. It was started with SIGINT blocked, which then waits for a group."""
    global _given
    os.setpgid(0, 0)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _silence()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_process()
    _given = (store, work, context, device)


def _compute(group: Group) -> Outcomes:
    store, work, context, device = _given
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CTRL_C)
        return attempt(store, group, work, context, device, whole_process=True)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, CTRL_C)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _silence() -> None:
    """Outside a cell nothing goes to the terminal, where the parent's table is; a crash's C traceback goes to the cell's log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    faulthandler.enable()
