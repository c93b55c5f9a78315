"""Work for tests of runners, importable in worker processes: cheap, countable, and failing in every way that counts.

A cell's spec says what it does: {"does": what, "log": a file that gets one line for every computation}.
"""

import errno
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from lofit_lens.errors import DiskFull, InputError, TrainingDiverged
from lofit_lens.experiments.cells import Cell


def cell(label, folder, *, needs=(), does="write", cost=1.0, model=None, **more):
    """A cell that adds its label to `folder/computed` when it is computed."""
    spec = {"label": label, "needs": list(needs), "does": does, "log": str(folder / "computed"), **more}
    return Cell(label, spec, tuple(needs), {"model": model}, cost)


def computed(folder):
    """Labels in the order of their computations, with repetitions."""
    path = folder / "computed"
    return path.read_text().split() if path.exists() else []


def note(path, text):
    """Append a line that no other process can tear."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def work(store, cell, context, device):
    """Do what the spec says, then write a run whose record depends on the spec and the context alone."""
    spec = cell.spec
    note(spec["log"], cell.label)
    tries = computed(Path(spec["log"]).parent).count(cell.label)
    _DOES[spec["does"]](spec, tries)
    with store.new(cell) as draft:
        draft.record["result"] = {"label": cell.label, "context": context, "device": device}


def forgetful(store, cell, context, device):
    """Write nothing."""


def talk(spec, tries):
    """In every way."""
    print("a print")
    print("a print to stderr", file=sys.stderr)
    logging.getLogger("lofit_lens.tests").info("a record")
    logging.getLogger("other").warning("another record")
    logging.getLogger("other").info("a record that nobody asked for")
    warnings.warn("a warning", stacklevel=1)
    os.write(2, b"from below\n")


def fail(spec, tries):
    """The first `times` times."""
    if tries <= spec.get("times", 99):
        raise RuntimeError(f"try {tries} failed")


def die(spec, tries):
    """By SIGKILL, as by the kernel when memory is short, the first `times` times."""
    if tries <= spec.get("times", 99):
        os.kill(os.getpid(), signal.SIGKILL)


def hang(spec, tries):
    """Until Ctrl-C, the first `times` times; says that it began and that it was stopped."""
    if tries <= spec.get("times", 99):
        note(spec["log"] + ".hangs", os.getpid())
        try:
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            note(spec["log"] + ".stopped", os.getpid())
            raise


def raises(error):
    """An action that raises."""

    def action(spec, tries):
        raise error

    return action


_DOES = {
    "write": lambda spec, tries: time.sleep(spec.get("seconds", 0)),
    "talk": talk, "fail": fail, "die": die, "hang": hang, "exit": lambda spec, tries: sys.exit(3),
    "bad input": raises(InputError("no such head")), "diverge": raises(TrainingDiverged("loss is nan")),
    "disk full": raises(DiskFull("no space left for it")), "no space": raises(OSError(errno.ENOSPC, "No space left on device")),
    "stop": raises(KeyboardInterrupt()),
}  # fmt: skip


class Unreadable:
    """A context that cannot be unpickled."""

    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise ImportError("no module of that name here")
