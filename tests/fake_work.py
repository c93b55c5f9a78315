"""Work for tests of runners, importable in worker processes: cheap, countable, and failing in every way that counts.

A cell's spec says what it does: {"does": what, "log": a file that gets one line for every computation}.
"""

import errno
import json
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from lofit_lens.errors import DiskFull, InputError, TrainingDiverged
from lofit_lens.experiments.executors.runner import run_cells
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Store


def cell(label, folder, *, needs=(), does="write", cost=1.0, model=None, shares="", **more):
    """A cell that adds its label to `folder/computed` when it is computed."""
    spec = {"label": label, "needs": list(needs), "does": does, "log": str(folder / "computed"), **more}
    return Cell(label, spec, tuple(needs), {"model": model}, cost, shares)


def computed(folder, what=""):
    """Labels in the order of their computations (`.shared`: of the parts that are computed together), with repetitions."""
    path = folder / f"computed{what}"
    return path.read_text().split() if path.exists() else []


def note(path, text):
    """Append a line that no other process can tear."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def work(store, group, context, device, each):
    """Do what the specs say, then write runs whose records depend on the specs, who is computed together, and the context.

    A cell of several first does what its spec says under "shared" in the part that all share.
    """
    labels = [cell.label for cell in group.cells]
    for cell in group.cells:
        if "shared" in cell.spec:
            note(cell.spec["log"] + ".shared", cell.label)
            _DOES[cell.spec["shared"]](cell.spec, computed(Path(cell.spec["log"]).parent, ".shared").count(cell.label))
    for cell in group.cells:
        if store.done(cell.name):
            continue
        with each(cell):
            spec = cell.spec
            note(spec["log"], cell.label)
            tries = computed(Path(spec["log"]).parent).count(cell.label)
            _DOES[spec["does"]](spec, tries)
            with store.new(cell) as draft:
                draft.record["result"] = {"label": cell.label, "context": context, "device": device}
                if len(labels) > 1:
                    draft.record["with"] = labels


def forgetful(store, group, context, device, each):
    """Write nothing."""


def talk(spec, tries):
    """In every way."""
    print("a print")  # noqa: T201
    print("a print to stderr", file=sys.stderr)  # noqa: T201
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


def wrap(spec, tries):
    """A full disk behind another error."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as e:
        raise RuntimeError("cannot save") from e


def step(spec, tries):
    """Like training: a first Ctrl-C lets the step in progress end; notes every Ctrl-C."""
    seen = []

    def remember(number, frame):
        seen.append(number)
        note(spec["log"] + ".signals", os.getpid())

    if tries <= spec.get("times", 99):
        signal.signal(signal.SIGINT, remember)
        note(spec["log"] + ".hangs", os.getpid())
        while not seen:
            time.sleep(0.01)
        time.sleep(spec.get("seconds", 0))
        raise KeyboardInterrupt


def raises(error):
    """An action that raises."""

    def action(spec, tries):
        raise error

    return action


_DOES = {
    "write": lambda spec, tries: time.sleep(spec.get("seconds", 0)),
    "talk": talk, "fail": fail, "die": die, "hang": hang, "step": step, "wrapped": wrap, "exit": lambda spec, tries: sys.exit(3),
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


def main():
    """Run cells as a process of its own: FOLDER WORKERS RUNNERS, cells from FOLDER/cells.json; the report goes to stdout.

    It begins when so many runners (lines of FOLDER/runners) are there.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent process does with Ctrl-C
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "cells.json").read_text())
    cells = [cell(one.pop("label"), folder, **one) for one in asked]
    note(folder / "runners", os.getpid())
    while len((folder / "runners").read_text().split()) < int(sys.argv[3]):
        time.sleep(0.01)
    try:
        report = run_cells(Store(folder / "store"), cells, work, "context", workers=int(sys.argv[2]))
    except KeyboardInterrupt as e:
        sys.stdout.write(f"{e}\n")
        raise SystemExit(130) from None
    sys.stdout.write(json.dumps({"computed": report.computed, "there": report.there, "failed": report.failed}))
