"""Worker processes on this machine. Each reads the library and the context once, then computes one group after the other.

A worker is started when a group has no free one, in a process group of its own: a terminal's Ctrl-C reaches the parent alone,
which passes it on. A worker that dies costs its cells one try. When the parent dies, its workers exit at once.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lofit_lens.errors import InputError
from lofit_lens.experiments.executors.attempt import Outcome, Outcomes, Work, attempt, write_line
from lofit_lens.experiments.executors.groups import Group
from lofit_lens.experiments.executors.process import prepare_process
from lofit_lens.experiments.store.store import Store

_READY = "ready"
PATIENCE = 5.0  # seconds that a worker which closed its pipe gets to exit by itself


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    device: str | None
    group: Group | None = None
    model: Any = None
    ready: bool = False


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
            InputError: a worker cannot be started here.
        """
        for worker in [w for w in self._workers if w.group is None and not w.process.is_alive()]:
            self._drop(worker)
        free = [w for w in self._workers if w.group is None]
        worker = next((w for w in free if w.model == group.model), None)
        if worker is None:
            worker = self._start() if len(self._workers) < self.slots else free[0]
        worker.group, worker.model = group, group.model
        if worker.ready:
            self._send(worker, group)

    def wait(self, timeout: float) -> list[Outcomes]:
        """Outcomes that came within `timeout` seconds.

        Raises:
            InputError: a worker could not be started, or could not read the context.
        """
        busy = [w for w in self._workers if w.group is not None]
        heard = set(wait([x for w in busy for x in (w.pipe, w.process.sentinel)], timeout))
        found = [self._hear(w) for w in busy if w.pipe in heard or w.process.sentinel in heard]
        return [outcomes for outcomes in found if outcomes is not None]

    def interrupt(self) -> None:
        """SIGINT for every worker that computes; once, since a second one stops training without a checkpoint."""
        if not self._interrupted:
            self._interrupted = True
            for worker in self._workers:
                if worker.group is not None and worker.process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.process.pid, signal.SIGINT)

    def close(self) -> None:
        """End all workers at once; a free one holds nothing that could be lost."""
        for worker in self._workers:
            worker.process.kill()
        for worker in [*self._workers]:
            self._drop(worker)

    def _start(self) -> _Worker:
        used = [w.device for w in self._workers]
        device = min(self._devices, key=used.count)
        pipe, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, device), daemon=True)
        with _no_ctrl_c():
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, pipe, device))
        return self._workers[-1]

    def _send(self, worker: _Worker, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died, which `wait` sees
            worker.pipe.send(message)

    def _hear(self, worker: _Worker) -> Outcomes | None:
        try:
            message = worker.pipe.recv() if worker.pipe.poll() else None
        except (EOFError, OSError):
            message = None
        if message is None:
            return self._died(worker)
        if message == _READY:
            worker.ready = True
            try:
                self._send(worker, self._setting)
            except Exception as e:
                raise InputError(
                    f"the work or its context cannot be sent to a worker process ({e}); use workers=1"
                ) from e
            self._send(worker, worker.group)
            return None
        if isinstance(message, str):
            raise InputError(f"a worker process cannot read the work or its context; it said:\n{message}")
        worker.group = None
        self._workers.append(self._workers.pop(self._workers.index(worker)))
        return message

    def _died(self, worker: _Worker) -> Outcomes:
        group = worker.group
        assert group is not None
        code = self._drop(worker)
        if self._interrupted:
            return tuple(Outcome(cell.name, "stopped") for cell in group.cells)
        if not worker.ready and code > 0:
            raise InputError(
                f"a worker process ended while it started (exit code {code}); its own message is on stderr. A script that "
                'calls this needs `if __name__ == "__main__":` around it; or use workers=1'
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = f"worker died ({how}){': out of memory?' if code == -signal.SIGKILL else ''}"
        for cell in group.cells:
            write_line(self._setting[0], cell, error)
        return tuple(Outcome(cell.name, "failed", error) for cell in group.cells)

    def _drop(self, worker: _Worker) -> int:
        """Forget a worker that is dead or dying; its exit code, negative for a signal."""
        worker.process.join(PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        code = worker.process.exitcode
        worker.pipe.close()
        worker.process.close()
        self._workers.remove(worker)
        return code if code is not None else 1


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Block SIGINT here and in a process that is started meanwhile, until that has a process group of its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------------------- in the worker


def _serve(pipe: Connection, device: str | None) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _silence()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Ctrl-C outside a cell and a parent that is gone or wants no more: the end.
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        prepare_process()
        pipe.send(_READY)
        try:
            store, work, context = pipe.recv()
        except (EOFError, OSError):
            return
        except Exception:
            pipe.send(traceback.format_exc())
            return
        while True:
            group = pipe.recv()
            pipe.send(attempt(store, group, work, context, device, whole_process=True))


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
