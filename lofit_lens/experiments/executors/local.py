"""Worker processes on this machine. Each loads the library and the context once, then computes one group after the other.

Every worker is a separate `ProcessPoolExecutor`, so a worker that dies costs only its own group one attempt. Workers start when
a group finds no free one, each in its own process group: a terminal's Ctrl-C reaches only the parent, which passes it on. When
the parent dies, its workers exit at once.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from lofit_lens.errors import InputError
from lofit_lens.experiments.executors.attempt import Outcome, Outcomes, Work, attempt, log_line
from lofit_lens.experiments.executors.process import prepare_process, streams_to
from lofit_lens.experiments.executors.schedule import Group
from lofit_lens.experiments.store.store import Store

PATIENCE = 5.0  # seconds that an idle worker has to exit by itself
CTRL_C = {signal.SIGINT}
MAIN_GUARD = 'a script that calls this needs `if __name__ == "__main__":` around it; or use workers=1'


@dataclass(eq=False)
class _Worker:
    """One process.

    Attributes:
        pool: its only process is the worker.
        process: the worker.
        device: device of its groups.
        ready: done when it has imported the library and read the work and the context.
        model: model of its last group.
    """

    pool: ProcessPoolExecutor
    process: BaseProcess
    device: str | None
    ready: Future[None]
    model: Any = None


class LocalExecutor:
    """Spawned processes, started when they are needed and then kept.

    Args:
        store: as in `run_cells`; sent to every worker once, like the next two.
        work: as in `run_cells`.
        context: as in `run_cells`.
        workers: maximum number of processes.
        devices: worker i gets `devices[i % n]`; None = workers get no device.
    """

    def __init__(
        self, store: Store, work: Work, context: Any, workers: int, devices: Sequence[str] | None = None
    ) -> None:
        self.slots = workers
        self._setting = (store, work, context)
        self._devices: list[str | None] = [devices[i % len(devices)] if devices else None for i in range(workers)]
        self._free: list[_Worker] = []  # longest idle first
        self._busy: dict[Future[Outcomes], tuple[_Worker, Group]] = {}
        self._interrupted = False

    def submit(self, group: Group) -> None:
        """Begin a group: on an idle worker that holds its model, else on a new worker, else on the one that was idle longest.

        Raises:
            InputError: a worker cannot be started here.
        """
        self._free = [worker for worker in self._free if worker.process.is_alive()]
        worker = next((w for w in self._free if w.model == group.model), None)
        if worker is None and len(self._free) + len(self._busy) < self.slots:
            worker = self._start()
        else:
            worker = worker or self._free[0]
            self._free.remove(worker)
        worker.model = group.model
        self._busy[worker.pool.submit(_compute, group)] = (worker, group)

    def wait(self, timeout: float) -> list[Outcomes]:
        """Outcomes that arrived within `timeout` seconds.

        Raises:
            InputError: a worker ended before it was ready, or the work and its context cannot be sent to it.
        """
        ended, _ = wait(self._busy, timeout, FIRST_COMPLETED)
        return [self._outcomes(future, *self._busy.pop(future)) for future in ended]

    def interrupt(self) -> None:
        """Send SIGINT to every busy worker, once: a second one would stop training without a checkpoint."""
        if self._interrupted:
            return
        self._interrupted = True
        for worker, _ in self._busy.values():
            if not worker.ready.done():
                worker.process.kill()
            elif worker.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid, signal.SIGINT)

    def close(self) -> None:
        """End all workers; busy ones are killed at once."""
        busy = [worker for worker, _ in self._busy.values()]
        for worker in busy:
            worker.process.kill()
        for worker in self._free:
            worker.pool.shutdown(wait=False)
        for worker in [*self._free, *busy]:
            _exit_code(worker)
        self._free, self._busy = [], {}

    def _start(self) -> _Worker:
        used = [w.device for w in [*self._free, *(worker for worker, _ in self._busy.values())]]
        device = min(self._devices, key=used.count)
        before = multiprocessing.active_children()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, CTRL_C)  # the new process inherits the mask
        try:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
            ready = pool.submit(_prepare, *self._setting, device)
        except (OSError, RuntimeError) as e:
            raise InputError(f"a worker process cannot be started here ({e}); {MAIN_GUARD}") from e
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        (process,) = set(multiprocessing.active_children()) - set(before)
        return _Worker(pool, process, device, ready)

    def _outcomes(self, future: Future[Outcomes], worker: _Worker, group: Group) -> Outcomes:
        error = worker.ready.exception() or future.exception()
        if isinstance(error, BrokenProcessPool):
            return self._died(worker, group)
        if worker.ready.exception() is not None:
            raise InputError(f"the work or its context cannot be sent to a worker process ({error}); use workers=1")
        self._free.append(worker)
        if isinstance(error, KeyboardInterrupt):  # just before or after the attempt
            return tuple(Outcome(cell.name, "stopped") for cell in group.cells)
        return future.result()

    def _died(self, worker: _Worker, group: Group) -> Outcomes:
        code = _exit_code(worker)
        if self._interrupted:
            return tuple(Outcome(cell.name, "stopped") for cell in group.cells)
        if code >= 0 and worker.ready.exception() is not None:
            raise InputError(
                f"a worker process ended while it started (exit code {code}); its own message is on stderr. It must be able to "
                f"import the work and what is in its context; {MAIN_GUARD}"
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = f"worker died ({how}){': out of memory?' if code == -signal.SIGKILL else ''}"
        log_line(self._setting[0], group, error)
        return tuple(Outcome(cell.name, "failed", error) for cell in group.cells)


def _exit_code(worker: _Worker) -> int:
    """Exit code of a worker that is dead or about to exit, negative for a signal."""
    worker.process.join(PATIENCE)
    worker.process.kill()
    worker.pool.shutdown()
    return worker.process.exitcode or 0


# ------------------------------------------------------------------------------------------------- in the worker

_given: tuple[Any, ...] = ()


def _begin() -> None:
    """Leave the parent's process group, and exit when the parent does. The process was started with SIGINT blocked."""
    os.setpgid(0, 0)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _prepare(store: Store, work: Work, context: Any, device: str | None) -> None:
    global _given
    streams_to(os.devnull)  # the parent's bar is on the terminal
    faulthandler.enable()  # a crash's C traceback goes to the group's log
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
