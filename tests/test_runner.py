"""The runner: the order of cells, one try at a cell, the loop, worker processes, what a terminal shows."""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from lofit_lens.errors import DiskFull, InputError
from lofit_lens.experiments.executors import attempt as tries
from lofit_lens.experiments.executors import runner
from lofit_lens.experiments.executors.attempt import Outcome
from lofit_lens.experiments.executors.local import LocalExecutor
from lofit_lens.experiments.executors.runner import run_cells
from lofit_lens.experiments.executors.schedule import Group, Schedule, grouped
from lofit_lens.experiments.store.store import Store
from tests import fake_work
from tests.fake_work import cell, computed, work

ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Cells of other runners are looked at again without a pause."""
    monkeypatch.setattr(runner, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(runner, "TICK", 0.01)


@pytest.fixture(autouse=True)
def usual_ctrl_c():
    """Also where the tests were started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def alone(cell):
    return Group((cell,))


def attempt(store, cell, work, context, device):
    """One try at one cell."""
    (outcome,) = tries.attempt(store, alone(cell), work, context, device)
    return outcome


def schedule(*cells, there=(), retries=0):
    return Schedule(grouped({c.name: c for c in cells}), there, retries)


def taken(plan, loaded=()):
    """Labels of all that can begin now, in order."""
    found = []
    while (one := plan.take(0.0, list(loaded))) is not None:
        found.append(one.label)
    return found


# ----------------------------------------------------------------------------------------------------- the order


def test_long_cells_first_then_as_given(tmp_path):
    """By cost, ties in the order given; cells that are there are not handed out."""
    a, b, c, d = (cell(n, tmp_path, cost=cost) for n, cost in (("a", 1), ("b", 5), ("c", 1), ("d", 9)))
    assert taken(schedule(a, b, c, d, there=[d.name])) == ["b", "a", "c"]


def test_a_cell_begins_when_all_that_it_needs_is_done(tmp_path):
    """Of two needs one is not enough; a need that is there counts."""
    a, b, old = (cell(n, tmp_path) for n in ("a", "b", "old"))
    last = cell("last", tmp_path, needs=[a.name, b.name, old.name])
    plan = schedule(last, a, b, old, there=[old.name])
    assert taken(plan) == ["a", "b"]
    plan.done(a.name)
    assert not taken(plan)
    plan.done(b.name)
    assert taken(plan) == ["last"]
    assert plan.idle


def test_a_failed_cell_comes_after_the_others_and_a_busy_one_at_its_time(tmp_path):
    """Retries are counted; a cell that another runner holds is not handed out before its time."""
    a, b = cell("a", tmp_path, cost=2), cell("b", tmp_path)
    plan = schedule(a, b, retries=1)
    assert plan.take(0.0, []) == alone(a)
    assert plan.finish(alone(a), {a.name: "error"}, may_pass=True)
    assert taken(plan) == ["b", "a"]
    assert not plan.finish(alone(a), {a.name: "error"}, may_pass=True)
    assert plan.failed == {a.name: "error"}
    plan.put_back(alone(b), 5.0)
    assert not plan.idle
    assert plan.take(4.9, []) is None
    assert plan.take(5.0, []) == alone(b)
    assert plan.idle


# ----------------------------------------------------------------------------------------------------- one try


def test_a_try_computes_once(tmp_path, store):
    """Done, then there; busy while another holds the lock, and the work is not called."""
    a = cell("a", tmp_path)
    with store.claim(a.name):
        assert attempt(store, a, work, 1, None).state == "busy"
    outcome = attempt(store, a, work, 1, "cuda:1")
    assert (outcome.name, outcome.state, outcome.error) == (a.name, "done", "")
    assert store.read(a.name)["result"] == {"label": "a", "context": 1, "device": "cuda:1"}
    assert attempt(store, a, work, 1, None).state == "there"
    assert computed(tmp_path) == ["a"]


def test_a_cell_that_was_done_before_the_lock_was_had_is_there(tmp_path, store):
    """Another runner finished it between the first look and the lock."""
    a = cell("a", tmp_path)

    class Late(Store):
        @contextlib.contextmanager
        def claim(self, name):
            with store.new(a), super().claim(name) as ours:
                pass
            yield ours

    assert attempt(Late(store.root), a, work, 1, None).state == "there"
    assert computed(tmp_path) == []


def test_ctrl_c_is_an_outcome(tmp_path, store):
    """No traceback in the log."""
    one = cell("one", tmp_path, does="stop")
    assert attempt(store, one, work, 1, None).state == "stopped"
    assert "KeyboardInterrupt" in store.log_file(one.name).read_text()
    assert "Traceback" not in store.log_file(one.name).read_text()


@pytest.mark.filterwarnings("ignore:a warning")
def test_the_log_has_what_the_cell_says_over_all_tries(tmp_path, store, capsys, caplog):
    """Prints and records, which other handlers get as before; then all is as it was."""
    one = cell("one", tmp_path, does="talk")
    before = (logging.getLogger().handlers[:], sys.stdout)
    attempt(store, one, work, 1, None)
    store.remove(one.name)
    attempt(store, one, work, 1, None)
    said = store.log_file(one.name).read_text()
    for text in ("start: one", "a print\n", "a print to stderr\n", "WARNING other: another record\n", "end, after "):
        assert said.count(text) == 2, text
    assert "nobody" not in said
    assert caplog.messages == ["another record"] * 2
    assert "print" not in capsys.readouterr().out
    assert (logging.getLogger().handlers, sys.stdout) == before


def test_work_runs_on_one_thread(tmp_path, store):
    """Wherever it runs, so that the result does not depend on it."""
    torch.set_num_threads(2)
    try:
        found = []
        attempt(store, cell("a", tmp_path), lambda *_: found.append(torch.get_num_threads()), 1, None)
        assert (found, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------- the loop, in this process


def names(*cells):
    return tuple(c.name for c in cells)


def test_a_grid_runs_once(tmp_path, store):
    """Needs first; the second time nothing is computed and nothing is called."""
    a = cell("a", tmp_path)
    b = cell("b", tmp_path, needs=[a.name], cost=9)
    report = run_cells(store, [b, a, a], work, "c", progress=False)
    assert (report.computed, report.there, report.failed, report.blocked) == (names(b, a), (), {}, {})
    assert computed(tmp_path) == ["a", "b"]
    assert store.read(a.name)["result"] == {"label": "a", "context": "c", "device": None}
    again = run_cells(store, [b, a], fake_work.forgetful, "c", progress=False)
    assert (again.computed, again.there) == ((), names(b, a))
    assert run_cells(store, [], work, "c").computed == ()


@pytest.mark.parametrize("bad", [{"workers": 0}, {"retries": -1}, {"together": 0}, {"devices": []}])
def test_impossible_settings(store, bad):
    """Say what was asked for."""
    with pytest.raises(InputError, match=next(iter(bad))):
        run_cells(store, [], work, "c", **bad)


def test_failures_are_retried_then_reported_and_the_rest_goes_on(tmp_path, store, caplog):
    """One that works at the second try; one that never does, with all behind it; bad input is not tried again."""
    once = cell("once", tmp_path, does="fail", times=1)
    never = cell("never", tmp_path, does="fail")
    bad = cell("bad", tmp_path, does="bad input")
    behind = cell("behind", tmp_path, needs=[never.name])
    far = cell("far", tmp_path, needs=[behind.name])
    fine = cell("fine", tmp_path)
    report = run_cells(
        store, [far, behind, never, bad, once, fine], work, "c", retries=2, devices=["cpu"], progress=False
    )
    assert report.computed == names(once, fine)
    assert report.failed == {never.name: "RuntimeError: try 3 failed", bad.name: "InputError: no such head"}
    assert report.blocked == {far.name: never.name, behind.name: never.name}
    assert store.failures() == report.failed
    assert Counter(computed(tmp_path)) == {"never": 3, "bad": 1, "once": 2, "fine": 1}
    assert f"never failed: RuntimeError: try 3 failed (see {store.log_file(never.name)})" in caplog.messages
    assert store.read(fine.name)["result"]["device"] == "cpu"


@pytest.mark.parametrize("does", ["disk full", "no space"])
def test_a_full_disk_ends_the_run(tmp_path, store, does):
    """No other cell begins; the error says how much is done and what to do."""
    cells = [cell("a", tmp_path, cost=3), cell("full", tmp_path, does=does, cost=2), cell("c", tmp_path)]
    with pytest.raises(DiskFull, match="1 of 3 cells are done; free space and run the same command again") as e:
        run_cells(store, cells, work, "c", progress=False)
    assert "o space left" in str(e.value)
    assert computed(tmp_path) == ["a", "full"]
    assert store.failures() == {}


def test_ctrl_c_says_how_to_go_on(tmp_path, store):
    """What is done stays done; the cell in progress is tried by the next run."""
    cells = [cell("a", tmp_path, cost=3), cell("b", tmp_path, does="stop", cost=2), cell("c", tmp_path)]
    with pytest.raises(KeyboardInterrupt, match="stopped: 1 of 3 cells are done; the same call continues"):
        run_cells(store, cells, work, "c", progress=False)
    assert computed(tmp_path) == ["a", "b"]
    assert run_cells(store, [cells[0], cells[2]], work, "c", progress=False).there == names(cells[0])


def test_a_real_ctrl_c_in_this_process_reaches_the_work(tmp_path, store):
    """It is not held back for the loop."""
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt, match="0 of 1 cells"):
        run_cells(store, [cell("a", tmp_path, does="hang")], work, "c", progress=False)
    assert len(computed(tmp_path)) == 1


# ---------------------------------------------------------------------------------------- the loop, on any executor


class Scripted:
    """An executor without processes: outcomes as told, one a call of `wait`, first come first served."""

    def __init__(self, store, script=None, slots=2):
        self.store, self.script, self.slots = store, script or {}, slots
        self.given, self.running, self.calls, self.most = [], [], [], 0

    def submit(self, group):
        (cell,) = group.cells
        self.given.append(cell.label)
        self.running.append(cell)
        self.most = max(self.most, len(self.running))

    def wait(self, timeout):
        one = self.running.pop(0)
        left = self.script.get(one.label, [])
        state = left.pop(0) if left else "done"
        if callable(state):
            state = state()
        if state == "done":
            with self.store.new(one):
                pass
        return [(state if isinstance(state, Outcome) else Outcome(one.name, state),)]

    def interrupt(self):
        self.calls.append("interrupt")

    def close(self):
        self.calls.append("close")


def test_slots_are_filled_and_never_more(tmp_path, store):
    """As many cells at a time as the executor has slots; it is closed at the end."""
    executor = Scripted(store, slots=3)
    cells = [cell(f"c{i}", tmp_path, cost=i) for i in range(7)]
    report = run_cells(store, cells, work, None, executor=executor, progress=False)
    assert executor.given == [f"c{i}" for i in (6, 5, 4, 3, 2, 1, 0)]
    assert (executor.most, executor.calls, len(report.computed)) == (3, ["close"], 7)


def test_a_freed_worker_gets_a_cell_of_its_model(tmp_path, store):
    """With several models in the grid; the longest cell first where no free worker holds a ready one's."""
    cells = [cell(f"{m}{i}", tmp_path, cost=cost, model=m) for m, cost in (("X", 2), ("Y", 1)) for i in range(3)]
    executor = Scripted(store, slots=1)
    run_cells(store, [*cells, cell("Y3", tmp_path, cost=9, model="Y")], work, None, executor=executor, progress=False)
    assert executor.given == ["Y3", "Y0", "Y1", "Y2", "X0", "X1", "X2"]


def test_a_loaded_model_is_given_out_once(tmp_path, store):
    """The worker of X has got its cell: the next free worker, Y's, takes Y's, though X's is longer."""
    asked = (("X0", 9, "X"), ("Y0", 8, "Y"), ("X1", 3, "X"), ("X2", 2, "X"), ("Y1", 1, "Y"))
    cells = [cell(label, tmp_path, cost=cost, model=model) for label, cost, model in asked]
    executor = Scripted(store, slots=2)
    run_cells(store, cells, work, None, executor=executor, progress=False)
    assert executor.given == ["X0", "Y0", "X1", "Y1", "X2"]


def test_a_busy_cell_is_tried_again_and_others_go_on(tmp_path, store):
    """Held by another runner: computed here when it let go, or counted as there when it is done."""
    a, b, c, d = (cell(n, tmp_path, cost=cost) for n, cost in (("a", 4), ("b", 3), ("c", 2), ("d", 1)))

    def by_another():
        with store.new(b):
            pass
        return "busy"

    executor = Scripted(store, {"a": ["busy", "busy"], "b": [by_another, "there"], "c": ["there"]}, slots=1)
    report = run_cells(store, [a, b, c, d], work, None, executor=executor, progress=False)
    assert (report.computed, report.there) == (names(a, d), names(b, c))
    assert Counter(executor.given) == {"a": 3, "b": 2, "c": 1, "d": 1}


def test_ctrl_c_is_passed_on_once_and_outcomes_are_awaited(tmp_path, store):
    """Nothing else begins; cells that end after it count; a second Ctrl-C ends the waiting."""
    a, b, c = (cell(n, tmp_path, cost=cost) for n, cost in (("a", 3), ("b", 2), ("c", 1)))

    def ctrl_c(state):
        def press():
            signal.raise_signal(signal.SIGINT)
            return state

        return press

    executor = Scripted(store, {"a": [ctrl_c("done")], "b": ["stopped"]})
    with pytest.raises(KeyboardInterrupt, match="stopped: 1 of 3 cells are done"):
        run_cells(store, [a, b, c], work, None, executor=executor, progress=False)
    assert (executor.given, executor.calls, executor.running) == (["a", "b"], ["interrupt", "close"], [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    executor = Scripted(store, {"b": [ctrl_c("stopped")], "c": [ctrl_c("done")]})
    with pytest.raises(KeyboardInterrupt, match="stopped: 1 of 3 cells are done"):
        run_cells(store, [a, b, c], work, None, executor=executor, progress=False)
    assert (executor.calls, store.done(c.name)) == (["interrupt", "close"], False)


def test_a_full_disk_waits_for_what_is_in_progress(tmp_path, store):
    """A second cell that runs meanwhile is let finish; a third does not begin."""
    a, b, c = (cell(n, tmp_path, cost=cost) for n, cost in (("a", 3), ("b", 2), ("c", 1)))
    executor = Scripted(store, {"a": [Outcome(a.name, "failed", "DiskFull: no space", again=False, full=True)]})
    with pytest.raises(DiskFull, match="no space; 1 of 3 cells are done"):
        run_cells(store, [a, b, c], work, None, executor=executor, progress=False)
    assert (executor.given, executor.calls, store.done(b.name)) == (["a", "b"], ["close"], True)


def test_a_failure_that_cannot_be_recorded_for_want_of_space(tmp_path, store, monkeypatch):
    """Is a full disk too."""

    def full(self, name, error):
        raise DiskFull("cannot write failed/x.json: no space")

    monkeypatch.setattr(Store, "fail", full)
    with pytest.raises(DiskFull, match=r"failed/x.json: no space; 0 of 2 cells are done, 1 failed"):
        run_cells(
            store, [cell("bad", tmp_path, does="bad input", cost=2), cell("c", tmp_path)], work, "c", progress=False
        )


def test_the_executor_is_closed_on_any_error(tmp_path, store):
    """So that no worker is left."""
    executor = Scripted(store)
    executor.wait = lambda timeout: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_cells(store, [cell("a", tmp_path)], work, None, executor=executor, progress=False)
    assert executor.calls == ["close"]


# --------------------------------------------------------------------------------------------- what is shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_counts_what_runs_and_what_failed(tmp_path, store, monkeypatch):
    """On one line that is wiped at the end; the log's warnings stand above it, also those of a handler on the terminal."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    cells = [cell("first", tmp_path, cost=9), cell("bad", tmp_path, does="bad input"), cell("last", tmp_path)]
    try:
        run_cells(store, [*cells, cell("behind", tmp_path, needs=[cells[1].name])], work, "c")
    finally:
        logging.getLogger().removeHandler(handler)
    shown = terminal.getvalue().split("\r")
    assert any(line.startswith("0 of 4 cells are done |") and line.rstrip().endswith(", first") for line in shown)
    assert any(line.startswith("1 of 4 cells are done, 1 failed, 1 blocked |") and ", last" in line for line in shown)
    assert any(line.startswith("bad failed: InputError: no such head (see ") for line in shown)
    assert not shown[-1].strip()
    assert handler.stream is terminal


def test_elsewhere_cells_are_log_records(tmp_path, store, caplog, capsys):
    """No bar where stderr is no terminal."""
    with caplog.at_level(logging.INFO):
        run_cells(store, [cell("a", tmp_path), cell("b", tmp_path)], work, "c")
    assert caplog.messages == ["begun: a", "[1/2] a: done", "begun: b", "[2/2] b: done", "2 of 2 cells are done"]
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------- processes


class Kept:
    """An executor that outlives a run."""

    def __init__(self, executor):
        self.slots, self.submit, self.wait, self.interrupt = 2, executor.submit, executor.wait, executor.interrupt

    def close(self):
        pass


@pytest.mark.slow
def test_two_workers_compute_each_cell_once(tmp_path, store):
    """Each on its device, needs first, with the context; what a cell says, C code too, is in its log."""
    a, b = cell("a", tmp_path, does="talk", seconds=0.2, cost=2), cell("b", tmp_path, does="fail", times=1)
    c = cell("c", tmp_path, needs=[a.name, b.name])
    bad = cell("bad", tmp_path, does="bad input")
    devices = ["cuda:0", "cuda:1"]
    report = run_cells(store, [c, a, b, bad], work, "context", workers=2, devices=devices, progress=False)
    assert (report.computed, report.failed) == (names(c, a, b), {bad.name: "InputError: no such head"})
    assert Counter(computed(tmp_path)) == {"a": 1, "b": 2, "c": 1, "bad": 1}
    assert computed(tmp_path)[-1] == "c"
    results = [store.read(x.name)["result"] for x in (a, b, c)]
    assert {r["context"] for r in results} == {"context"}
    assert {r["device"] for r in results} <= set(devices)
    said = store.log_file(a.name).read_text()
    for text in (
        "a print\n",
        "from below\n",
        "INFO lofit_lens.tests: a record\n",
        "UserWarning: a warning",
        "end, after ",
    ):
        assert said.count(text) == 1, text
    assert "RuntimeError: try 1 failed" in store.log_file(b.name).read_text()


@pytest.mark.slow
def test_a_worker_that_dies_costs_a_try(tmp_path, store):
    """It is replaced; a cell that kills its worker every time is a failure, and the rest goes on."""
    always, fine = cell("always", tmp_path, does="die", cost=3), cell("fine", tmp_path)
    executor = LocalExecutor(store, work, "c", 1)
    report = run_cells(store, [always, fine], work, "c", executor=executor, progress=False)
    assert report.computed == names(fine)
    assert report.failed == {always.name: "worker died (signal 9): out of memory?"}
    assert computed(tmp_path) == ["always", "fine", "always"]
    assert store.log_file(always.name).read_text().count("worker died (signal 9)") == 2


@pytest.mark.slow
def test_an_idle_worker_that_dies_is_replaced(tmp_path, store):
    """Without a failure."""
    executor = LocalExecutor(store, work, "context", 1)
    run_cells(store, [cell("a", tmp_path)], work, None, executor=Kept(executor), progress=False)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join()
    report = run_cells(store, [cell("b", tmp_path)], work, None, executor=executor, retries=0, progress=False)
    assert len(report.computed) == 1


@pytest.mark.slow
def test_a_context_that_a_worker_cannot_read(tmp_path, store, capfd):
    """Is an error at once, not an endless start of workers; so is one that cannot be sent."""
    with pytest.raises(
        InputError, match=r"ended while it started \(exit code 1\); its own message is on stderr.*workers=1"
    ):
        run_cells(store, [cell("a", tmp_path)], work, fake_work.Unreadable(), workers=2, progress=False)
    assert "no module of that name here" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"cannot be sent to a worker process .*use workers=1"):
        run_cells(store, [cell("a", tmp_path)], work, lambda: 0, workers=2, progress=False)
    assert computed(tmp_path) == []


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    """It would start itself again in every worker."""
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\nfrom tests.fake_work import *\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "run_cells(Store(folder / 'store'), [cell('a', folder)], work, 'c', workers=2)\n"
    )
    command, env = [sys.executable, str(tmp_path / "script.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1
    assert "a script that calls this needs `if __name__ ==" in done.stderr.splitlines()[-1]
    assert computed(tmp_path) == []


# -------------------------------------------------------------------------------- runners in processes of their own


def start(folder, cells, *, workers, runners=1):
    """A runner of these cells as a process, in a process group of its own."""
    (folder / "cells.json").write_text(json.dumps(cells))
    code = "from tests.fake_work import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(workers), str(runners)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip


def lines(path):
    return path.read_text().split() if path.exists() else []


def until(condition):
    """Wait for something that will come, or fail after two minutes."""
    for _ in range(12000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def alive(pid):
    """A process that is neither gone nor a zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    return state not in ("", "Z") and not state.startswith("Z")


@pytest.mark.slow
def test_two_runners_share_a_store(tmp_path):
    """Every cell is computed once, by one of them; both end with all cells done."""
    cells = [{"label": f"c{i}", "seconds": 0.05} for i in range(20)]
    both = [start(tmp_path, cells, workers=1, runners=2) for _ in range(2)]
    reports = [json.loads(p.communicate(timeout=120)[0]) for p in both]
    assert sorted(computed(tmp_path)) == sorted(c["label"] for c in cells)
    first, second = (set(r["computed"]) for r in reports)
    assert first
    assert second
    assert not first & second
    assert first | second == set(Store(tmp_path / "store").names())
    assert {len(r["computed"]) + len(r["there"]) for r in reports} == {20}


@pytest.mark.slow
def test_workers_of_a_killed_parent_are_gone(tmp_path):
    """At once, in the middle of a cell; the next run completes the grid."""
    cells = [{"label": f"c{i}", "does": "hang", "times": 1} for i in range(2)]
    parent = start(tmp_path, cells, workers=2)
    until(lambda: len(lines(tmp_path / "computed.hangs")) == 2)
    workers = lines(tmp_path / "computed.hangs")
    assert all(alive(pid) for pid in workers)
    parent.kill()
    parent.communicate()
    until(lambda: not any(alive(pid) for pid in workers))
    assert not (tmp_path / "computed.stopped").exists()
    again = [cell(one["label"], tmp_path, does="hang", times=1) for one in cells]
    assert run_cells(Store(tmp_path / "store"), again, work, "context", progress=False).computed == names(*again)


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_stops_workers_between_two_steps(tmp_path):
    """The group's SIGINT reaches the parent alone; each worker gets one, ends its step, and is gone when the parent is."""
    cells = [{"label": f"c{i}", "does": "step", "seconds": 0.5} for i in range(3)]
    parent = start(tmp_path, cells, workers=2)
    until(lambda: len(lines(tmp_path / "computed.hangs")) == 2)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert (parent.returncode, err) == (130, "")
    assert out == "stopped: 0 of 3 cells are done; the same call continues with the rest\n"
    workers = lines(tmp_path / "computed.hangs")
    assert sorted(lines(tmp_path / "computed.signals")) == sorted(workers)
    assert not any(alive(pid) for pid in workers)
    assert len(computed(tmp_path)) == 2


@pytest.mark.slow
def test_a_second_ctrl_c_kills(tmp_path):
    """A step that takes an hour is not waited for."""
    parent = start(tmp_path, [{"label": "c", "does": "step", "seconds": 3600}], workers=2)
    until(lambda: lines(tmp_path / "computed.hangs"))
    os.killpg(parent.pid, signal.SIGINT)
    until(lambda: lines(tmp_path / "computed.signals"))
    os.killpg(parent.pid, signal.SIGINT)
    out, _ = parent.communicate(timeout=60)
    assert (parent.returncode, out[:27]) == (130, "stopped: 0 of 1 cells are d")
    assert not any(alive(pid) for pid in lines(tmp_path / "computed.hangs"))
