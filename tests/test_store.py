"""A store: a run is there whole or not at all, whoever is killed, whatever else writes, and however full the disk is."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from typer.testing import CliRunner

from lofit_lens import io
from lofit_lens.cli import store as verbs
from lofit_lens.errors import DataError, DiskFull, InputError
from lofit_lens.experiments.store import checks, locks
from lofit_lens.experiments.store import store as stores
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.checks import collect_garbage, remove_damaged, verify
from lofit_lens.experiments.store.store import Store

ELSEWHERE = "host=some-other-machine"


def cell(i: int, needs: tuple[str, ...] = (), **row) -> Cell:
    return Cell(
        f"toy task, K={i}", {"toy": i, "needs": list(needs), "rate": 0.1 * i}, needs, {"task": "toy", "k": i, **row}
    )


def result(i: int) -> dict:
    """As EvalResult.to_dict has it, in parts."""
    metrics = {"mc1": {"mean": i / 7, "interval": [0.1, 0.9], "n": 5, "seeds": 1},
               "ce": {"mean": 1.5, "interval": None, "n": 5, "seeds": 1}}  # fmt: skip
    return {"kind": "lofit_lens.EvalResult", "metrics": metrics}


def fill(draft: stores.Draft, c: Cell) -> None:
    """A small fake work: two files, one in a folder, and a result."""
    (draft.path / "items.jsonl").write_text(f'{{"item": {c.spec["toy"]}}}\n' * 20)
    (draft.path / "adapter").mkdir()
    (draft.path / "adapter" / "weights.bin").write_bytes(random.Random(c.key).randbytes(2000))
    draft.record["result"] = result(c.spec["toy"])


def write(store: Store, *cells: Cell) -> None:
    for c in cells:
        with store.new(c) as draft:
            fill(draft, c)


def spoil(store: Store, change) -> None:
    with store.new(cell(0)) as draft:
        fill(draft, cell(0))
        change(draft)


def bytes_of(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in but
    }


def results_of(store: Store) -> dict[str, bytes]:
    """All that must be the same however often the work was stopped."""
    return bytes_of(store.root / "runs", but=("timing.json",))


def forked(work) -> int:
    """Start a process that does the work; its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def holder(store):
    """A process that holds the lock of cell 0 and writes its draft, until it is killed; yields its id."""
    heard, told = os.pipe()

    def hold():
        with store.claim(cell(0).name) as mine, store.new(cell(0)) as draft:
            fill(draft, cell(0))
            os.write(told, b"1" if mine else b"0")
            time.sleep(600)

    pid = forked(hold)
    assert os.read(heard, 1) == b"1"
    yield pid
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        kill(pid)
    os.close(heard)
    os.close(told)


def left_over(store: Store) -> list[Path]:
    """What a dead process left."""
    return collect_garbage(store, dry_run=True)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def eventually(true) -> None:
    """Wait until it is so."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------ one run


def test_a_run_is_read_back(store):
    """Everything of the cell and of the draft stands in run.json; times stand apart; nothing else lies around."""
    c = cell(3, needs=("other-1",), note=None)
    assert not store.done(c.name)
    store.fail(c.name, "CUDA out of memory")
    io.write_text(store.state_file(c.name), "checkpoint")
    assert store.failures() == {c.name: "CUDA out of memory"}
    with store.new(c) as draft:
        fill(draft, c)
        draft.timing |= {"seconds": 12.5, "device": "cuda:1"}
        assert not store.done(c.name)
    assert store.done(c.name)
    assert store.names() == [c.name]
    record = store.read(c.name)
    assert {k: record[k] for k in ("kind", "schema", "name", "label", "spec", "needs", "row")} == {
        "kind": "lofit_lens.run", "schema": 2, "name": c.name, "label": c.label, "spec": c.spec,
        "needs": ["other-1"], "row": c.row,
    }  # fmt: skip
    assert record["versions"] == io.environment()
    assert list(record["result"]["metrics"]) == ["mc1", "ce"], "the order of metrics is kept"
    files = store.folder(c.name)
    assert record["files"] == {n: io.file_digest(files / n) for n in ("adapter/weights.bin", "items.jsonl")}
    timing = store.timing(c.name)
    assert (timing["seconds"], timing["device"], timing["pid"]) == (12.5, "cuda:1", os.getpid())
    assert {"started", "host"} <= set(timing)
    assert sorted(bytes_of(store.root)) == sorted(
        [
            "store.json",
            *(f"runs/{c.name}/{n}" for n in ("adapter/weights.bin", "items.jsonl", "run.json", "timing.json")),
        ]
    )
    assert store.failures() == {}
    assert verify(store) == []


def test_a_run_has_the_same_bytes_wherever_and_whenever_it_is_made(store, tmp_path, monkeypatch):
    """Another process on another machine in another folder writes the same, timing.json aside."""
    write(store, cell(1), cell(2))
    other = Store(tmp_path / "elsewhere" / "store")
    monkeypatch.setattr(stores.platform, "node", lambda: "another-host")
    assert os.waitpid(forked(lambda: write(other, cell(2), cell(1))), 0)[1] == 0
    assert results_of(other) == results_of(store)
    assert other.timing(cell(1).name)["host"] == "another-host"
    assert other.timing(cell(1).name)["pid"] != store.timing(cell(1).name)["pid"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), FileNotFoundError(2, "no such file")])
def test_an_exception_leaves_nothing(store, error):
    """It comes out as it is; no run, no draft; the checkpoint stays for the next time."""
    io.write_text(store.state_file(cell(0).name), "checkpoint")

    def fails(_draft):
        raise error

    with pytest.raises(type(error)):
        spoil(store, fails)
    assert not store.done(cell(0).name)
    assert list((store.root / "drafts").iterdir()) == []
    assert store.state_file(cell(0).name).read_text() == "checkpoint"


def test_a_record_that_is_no_json_is_refused(store):
    """NaN, which other readers cannot take; nothing is left."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        spoil(store, lambda draft: draft.record.update(loss=float("nan")))
    assert store.names() == []
    assert list((store.root / "drafts").iterdir()) == []


def test_every_byte_is_on_the_disk_before_the_run_appears(store, monkeypatch):
    """All files and folders of the draft are synced before the rename, the folder of runs after it."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see what is synced")
    sync, rename, log = os.fsync, os.rename, []
    monkeypatch.setattr(os, "fsync", lambda f: (log.append(str(Path(f"/proc/self/fd/{f}").readlink())), sync(f))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("RENAME"), rename(a, b))[1])
    with store.new(cell(0)) as draft:
        fill(draft, cell(0))
    at = log.index("RENAME")
    made = ("", "/adapter", "/adapter/weights.bin", "/items.jsonl", "/run.json", "/timing.json")
    assert {f"{draft.path}{name}" for name in made} <= set(log[:at])
    assert log.index(f"{draft.path}/run.json") < log[:at].index(str(draft.path)) == at - 1
    assert log[at + 1 :] == [str(store.root / "runs")]


def test_a_run_may_be_read_by_all_that_the_umask_allows(store):
    """The draft is private, the run is not."""
    before = os.umask(0o027)
    try:
        write(store, cell(0))
        assert store.folder(cell(0).name).stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


# ------------------------------------------------------------------------------------------------ kills and races


def compute(store: Store, cells: list[Cell], journal: Path | None = None) -> None:
    """What a runner does, until all cells are done."""
    while left := [c for c in cells if not store.done(c.name)]:
        for c in left:
            with store.claim(c.name) as mine:
                if mine and not store.done(c.name):
                    if journal:
                        with journal.open("a") as f:
                            f.write(f"{c.name}\n")
                    with store.new(c) as draft:
                        fill(draft, c)
                        time.sleep(0.01)


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments(store, tmp_path, monkeypatch, kills):
    """After each, whatever is done is whole; at the end all is as if nothing had happened, and nothing is left over."""
    monkeypatch.setattr(locks, "EMPTY", 0.2)
    draw, cells, drafts, n_done = random.Random(0), [cell(i) for i in range(40)], 0, [0]
    start = time.monotonic()
    compute(Store(tmp_path / "clock"), cells[:3])
    longest = time.monotonic() - start  # so long a process may live: a few runs, however slow this machine is now
    while len(n_done) <= kills or drafts < 2 or n_done[-1] < 2:
        assert len(n_done) < 500, f"{drafts} kills came while a run was written, {n_done[-1]} runs are done"
        if n_done[-1] > len(cells) - 10:
            cells += [cell(i) for i in range(len(cells), len(cells) + 20)]
        pid = forked(partial(compute, store, cells))
        time.sleep(draw.uniform(0, longest))
        kill(pid)
        assert verify(store) == []
        if len(n_done) % 4 == 0:
            drafts += sum(p.parent.name == "drafts" for p in collect_garbage(store, dry_run=False))
        n_done.append(len(store.names()))
        assert n_done == sorted(n_done), "a finished run was lost"
    compute(store, cells)
    monkeypatch.setattr(checks, "OLD", 0.0)  # what a kill inside the lock's own library left is young; all are dead now
    for _ in range(2):  # a lock without a word is left alone until it has been seen for a while
        collect_garbage(store, dry_run=False)
        time.sleep(3 * locks.EMPTY)
    collect_garbage(store, dry_run=False)
    assert left_over(store) == []
    assert {p.split("/")[0] for p in bytes_of(store.root)} == {"store.json", "runs"}
    undisturbed = Store(tmp_path / "undisturbed")
    write(undisturbed, *cells)
    assert results_of(store) == results_of(undisturbed)


def dies_at(store: Store, cells: list[Cell], function: str, k: int) -> bool:
    """Compute in a process that is killed just before its k-th call of a function of `os`; whether it came to that."""
    real, calls = getattr(os, function), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == k:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    def work():
        setattr(os, function, call)
        compute(store, cells)

    return os.WIFSIGNALED(os.waitpid(forked(work), 0)[1])


@pytest.mark.parametrize("function", ["open", "write", "fsync", "mkdir", "rename", "unlink"])
def test_a_kill_at_each_step_leaves_nothing_or_a_finished_run(store, tmp_path, monkeypatch, function):
    """Before the first call, the second, ... until the run is done: what is done is whole, what is left over is collected."""
    monkeypatch.setattr(locks, "EMPTY", 0.0)
    undisturbed, k = Store(tmp_path / "undisturbed"), 1
    write(undisturbed, cell(0))
    while dies_at(store, [cell(0)], function, k):
        assert verify(store) == []
        compute(store, [cell(0)])
        assert results_of(store) == results_of(undisturbed)
        collect_garbage(store, dry_run=False)
        assert left_over(store) == []
        assert store.remove(cell(0).name)
        k += 1
    assert k > 1
    assert results_of(store) == results_of(undisturbed)


def test_two_runners_compute_each_run_once_and_lose_none(store, tmp_path):
    """Each cell is begun once, by one of them, and done."""
    cells, journal = [cell(i) for i in range(40)], tmp_path / "journal"
    pids = [forked(lambda: compute(store, cells, journal)) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert sorted(journal.read_text().split()) == store.names() == sorted(c.name for c in cells)
    assert {store.timing(n)["pid"] for n in store.names()} <= set(pids)
    assert verify(store) == []


def test_of_two_that_write_one_run_the_first_is_kept_whole(store):
    """The other's draft is dropped without an error, even though it holds other files."""
    with store.new(cell(0)) as slow:
        fill(slow, cell(0))
        (slow.path / "more").write_text("x")
        write(store, cell(0))
        before = bytes_of(store.root / "runs")
    assert bytes_of(store.root / "runs") == before
    assert list((store.root / "drafts").iterdir()) == []
    assert verify(store) == []


def test_a_draft_that_was_tidied_away_after_the_run_was_done_is_no_error(store):
    """A runner that was stopped so long that another finished its run, and whose draft was collected, goes on."""
    with store.new(cell(0)) as slow:
        write(store, cell(0))
        shutil.rmtree(slow.path)
        (slow.path / "items.jsonl").write_text("x")
    assert verify(store) == []
    shutil.rmtree(store.folder(cell(0).name))
    with pytest.raises(FileNotFoundError):
        spoil(store, lambda slow: (shutil.rmtree(slow.path), (slow.path / "items.jsonl").write_text("x")))


# -------------------------------------------------------------------------------------------------------- locks


def test_a_lock_is_held_by_one(store):
    """Not by the same thread again, not by another thread, not by another store object; free after the block."""
    got = []

    def ask():
        with Store(store.root).claim("a") as mine:
            got.append(mine)

    with store.claim("a") as mine, store.claim("b") as other, store.claim("a") as again:
        assert (mine, other, again) == (True, True, False)
        assert store.held("a")
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert os.waitpid(forked(lambda: exit_with(store.claim("a"))), 0)[1] >> 8 == 7
        with store.claim("a") as again:
            assert not again
    assert got == [False]
    assert not store.held("a")
    assert list((store.root / "locks").iterdir()) == []
    ask()
    assert got == [False, True]


def exit_with(claim) -> None:
    with claim as mine:
        os._exit(7 if mine is False else 8)


def test_the_lock_of_a_killed_process_is_taken_over_at_once(store, holder):
    """While it lives: held, and its draft is let alone. Killed: its lock is free, its leavings are collected."""
    name = cell(0).name
    with store.claim(name) as mine:
        assert not mine
    assert store.held(name)
    before = bytes_of(store.root)
    assert collect_garbage(store, dry_run=False) == []
    assert verify(store) == []
    assert bytes_of(store.root) == before
    kill(holder)
    assert not store.held(name)
    assert {path.parent.name for path in left_over(store)} == {"drafts", "locks"}
    with store.claim(name) as mine:
        assert mine
        assert collect_garbage(store, dry_run=False) == [], "it is ours now"
    compute(store, [cell(0)])
    assert len(collect_garbage(store, dry_run=False)) == 1
    assert {p.split("/")[0] for p in bytes_of(store.root)} == {"store.json", "runs"}


def gone_elsewhere(store: Store, pid: int) -> Path:
    """Kill the holder, and make its lock that of a process on another machine, about which nothing is known here."""
    lock = store.root / "locks" / f"{cell(0).name}.lock"
    lines = [ELSEWHERE if line.startswith("host=") else line for line in lock.read_text().splitlines()]
    kill(pid)
    lock.write_text("\n".join(lines) + "\n")
    return lock


def claims(store: Store) -> bool:
    with store.claim(cell(0).name) as mine:
        return mine


def test_the_lock_of_another_machine_is_taken_over_when_it_is_silent(tmp_path, store, holder, monkeypatch):
    """After a lease by this clock, whatever time stands on the file; and not before."""
    lock = gone_elsewhere(store, holder)
    assert ELSEWHERE in lock.read_text()
    for stamp in (0, time.time() + 1e6):  # clocks that differ
        os.utime(lock, (stamp, stamp))
        assert not claims(store)
        assert not claims(Store(store.root))
    assert collect_garbage(store, dry_run=False) == []
    text = lock.read_text().replace("duration=30.0", "duration=0.3")
    assert text != lock.read_text()
    lock.write_text(text)
    assert not claims(Store(store.root, lease=0.3))
    eventually(lambda: claims(Store(store.root, lease=0.3)))  # a new object each time: the process remembers
    assert not lock.exists()


def test_where_names_cannot_be_swapped_a_silent_lock_goes_after_two_leases(store, holder, monkeypatch):
    """As on NFS; a touch of the file starts the time anew, and other lease lengths than one's own are waited for."""
    lock, now = gone_elsewhere(store, holder), [0.0]
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    short = Store(store.root, lease=1.0)  # the lock is one of 30 seconds
    assert not claims(short)
    now[0] = 59.0
    os.utime(lock, (5, 5))
    assert not claims(short)
    now[0] = 59.0 + 59.0
    assert not claims(short)
    assert lock.exists()
    now[0] = 59.0 + 61.0
    assert claims(short)
    assert list(lock.parent.iterdir()) == []


def test_whoever_loses_a_lock_is_told_and_takes_nobody_elses(store, caplog):
    """The lock file becomes another's: a warning, and it is not removed at the end."""
    store = Store(store.root, lease=0.3)
    lock = store.root / "locks" / "a.lock"
    with store.claim("a") as mine:
        assert mine
        text = lock.read_text()
        lock.unlink()
        lock.write_text(text + ELSEWHERE + "\n")
        eventually(lambda: "was lost" in caplog.text)
    assert "a.lock" in caplog.text
    assert lock.read_text() == text + ELSEWHERE + "\n"


def test_locks_that_are_no_locks_are_not_had_by_force(store, monkeypatch):
    """A damaged or empty lock file (its process was killed before it wrote) is another's until it has been still for a while."""
    monkeypatch.setattr(locks, "EMPTY", 0.2)
    lock = store.root / "locks" / f"{cell(0).name}.lock"
    lock.parent.mkdir()
    for content in (b"", b"\x00\xff"):
        lock.write_bytes(content)
        assert not claims(store)
        assert store.held(cell(0).name)
        eventually(lambda: claims(store))


# ---------------------------------------------------------------------------------------------------- full disks


def full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def failing_at(k: int, real):
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == k:
            full()
        return real(*args, **kwargs)

    return call, calls


@pytest.mark.parametrize("function", ["fsync", "replace", "rename", "mkdir", "chmod"])
def test_a_full_disk_at_any_point_of_a_run_leaves_the_store_as_it_was(store, monkeypatch, function):
    """At the k-th call, for every k: DiskFull with path, reason and what to do; or the run was finished already."""
    write(store, cell(0))
    before, real, told = bytes_of(store.root), getattr(os, function), []
    call, calls = failing_at(0, real)
    monkeypatch.setattr(os, function, call)
    write(store, cell(1))
    monkeypatch.undo()
    for k in range(1, len(calls) + 1):
        store.remove(cell(1).name)
        assert bytes_of(store.root) == before
        monkeypatch.setattr(os, function, failing_at(k, real)[0])
        try:
            write(store, cell(1))
        except DiskFull as e:
            told.append(str(e))
            assert not store.done(cell(1).name)
        else:
            assert store.done(cell(1).name)
        monkeypatch.undo()
        assert verify(store) == []
        assert list((store.root / "drafts").iterdir()) == []
    # What may fail without harm: the sync of the folder of runs, and making folders that are there.
    assert all(
        re.fullmatch(r"cannot write .*No space left.*MB are free.*same command again: .*", text) for text in told
    )
    assert len(told) == len(calls) - {"fsync": 1, "mkdir": 4}.get(function, 0) > 0


def test_a_full_disk_in_the_work_itself_is_told_as_such(store):
    """An OSError of any writer inside the block becomes DiskFull; a quota counts too."""
    for code in (28, 122):
        with pytest.raises(DiskFull, match="MB are free"), store.new(cell(0)):
            raise OSError(code, "No space left on device", "adapter.bin")
    assert not list((store.root / "drafts").iterdir())


def test_space_can_be_freed_on_a_full_disk(store, holder, monkeypatch):
    """Where not even a lock can be written, runs and garbage can still be removed, but nothing that is held."""
    write(store, cell(0), cell(1))
    (store.root / "drafts" / f"{cell(1).name}.abc").mkdir()
    opened = os.open
    monkeypatch.setattr(os, "open", lambda p, *a, **k: full() if str(p).endswith(".lock") else opened(p, *a, **k))
    assert not store.remove(cell(0).name)
    assert collect_garbage(store, dry_run=False) == [store.root / "drafts" / f"{cell(1).name}.abc"]
    assert store.remove(cell(1).name)
    assert store.names() == [cell(0).name]


def test_a_full_disk_elsewhere_in_the_store(store, tmp_path, monkeypatch):
    """Locks, notes, grids, inputs, a new store: DiskFull; the index is given all the same."""
    write(store, cell(0))
    opened = os.open
    with monkeypatch.context() as m:
        m.setattr(os, "open", lambda p, *a, **k: full() if str(p).endswith(".lock") else opened(p, *a, **k))
        with pytest.raises(DiskFull, match=r"a\.lock"), store.claim("a"):
            pass
    monkeypatch.setattr(os, "fsync", full)
    for write_it in (
        lambda: store.fail("a", "x"), lambda: store.keep([1]), lambda: store.write_grid("g", {"cells": []}),
        lambda: Store(tmp_path / "new"),
    ):  # fmt: skip
        with pytest.raises(DiskFull):
            write_it()
    assert store.index()["name"].tolist() == [cell(0).name]
    monkeypatch.undo()
    assert verify(store) == []
    assert list((tmp_path / "new").iterdir()) == []
    assert {p.split("/")[0] for p in bytes_of(store.root)} == {"store.json", "runs"}


# ------------------------------------------------------------------------------------------------- damage, versions


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGE = {
    "truncated": ("items.jsonl", lambda p: p.write_bytes(p.read_bytes()[:-1])),
    "emptied": ("items.jsonl", lambda p: p.write_bytes(b"")),
    "flipped": ("adapter/weights.bin", flip),
    "deleted": ("adapter/weights.bin", Path.unlink),
    "folder": ("items.jsonl", lambda p: (p.unlink(), p.mkdir())),
    "record": ("run.json", lambda p: p.write_text(p.read_text().replace('"k": 1', '"k": 2'))),
    "half a record": ("run.json", lambda p: p.write_text(p.read_text()[:100])),
    "no record": ("run.json", Path.unlink),
    "another record": ("run.json", lambda p: p.write_text("[]")),
    "times": ("timing.json", lambda p: p.write_text("{")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_name_and_can_be_computed_again(store, kind):
    """verify names the file of the run, and no other; remove_damaged removes this run; written again, all is as before."""
    write(store, cell(0), cell(1), cell(2))
    before, name = results_of(store), cell(1).name
    file, damage = DAMAGE[kind]
    damage(store.folder(name) / file)
    assert [(p.path, p.kind, p.run) for p in verify(store)] == [(f"runs/{name}/{file}", "damaged", name)]
    if file == "run.json":
        again = rf"{name}/run\.json.*lofit-lens store verify {store.root} --remove.*same grid again"
        with pytest.raises(DataError, match=again):
            store.read(name)
    assert remove_damaged(store, verify(store)) == [store.folder(name)]
    assert store.names() == sorted([cell(0).name, cell(2).name])
    write(store, cell(1))
    assert results_of(store) == before
    assert verify(store) == []


def test_a_run_under_anothers_name_is_found(store):
    """A folder that was renamed, and a spec that was changed together with its checksum."""
    write(store, cell(0), cell(1))
    shutil.move(store.folder(cell(0).name), store.folder("x-0123456789abcdef"))
    path = store.folder(cell(1).name) / "run.json"
    edit(path, spec={"toy": 5})
    record = json.loads(path.read_text())
    edit(path, checksum=io.digest({k: v for k, v in record.items() if k != "checksum"}))
    found = {p.path: p.what for p in verify(store)}
    for name in ("x-0123456789abcdef", cell(1).name):
        assert "belongs to another run" in found[f"runs/{name}/run.json"]
        with pytest.raises(DataError, match=r"belongs to another run .* than its folder says"):
            store.read(name)


def test_what_is_not_the_stores_is_named_and_let_alone(store):
    """Other folders, names that no run's folder has: foreign, and never removed, nor is a file beside a run's own."""
    write(store, cell(0))
    runs = store.root / "runs"
    (runs / cell(0).name / "adapter" / "notes.txt").write_text("mine")
    (runs / "my notes").mkdir()
    (runs / "a\nb-0123456789abcdef").mkdir()
    (runs / "file-0123456789abcdef").write_text("x")
    (runs / "\udcff-0123456789abcdef").mkdir()  # bytes that are no UTF-8
    found = verify(store)
    assert {p.kind for p in found} == {"foreign"}
    assert len(found) == 4
    assert all(str(p).encode() for p in found), "can be printed"
    before = bytes_of(store.root)
    assert remove_damaged(store, found) == []
    assert collect_garbage(store, dry_run=False) == []
    assert bytes_of(store.root) == before
    assert (runs / "my notes").is_dir()


@pytest.mark.parametrize("function", ["file_digest", "decoded"])
def test_what_the_system_does_not_give_now_is_not_removed(store, monkeypatch, function):
    """An error of the disk or the network is reported, and no reason to throw a run away."""
    write(store, cell(0))

    def fails(path):
        try:
            raise OSError(5, "Input/output error")
        except OSError as e:
            if function == "file_digest":
                raise
            raise DataError(f"cannot read {path}: {e}") from e

    monkeypatch.setattr(io, function, fails)
    found = verify(store)
    assert {p.kind for p in found} == {"unreadable"}
    assert all("Input/output error" in p.what for p in found)
    assert remove_damaged(store, found) == []
    assert store.done(cell(0).name)


def test_records_beside_the_runs_are_checked_too(store):
    """Grids, notes and inputs that cannot be read are named, and can be removed."""
    digest = store.keep({"texts": ["a"]})
    store.write_grid("paper/fig2", {"cells": []})
    store.fail("a-0123456789abcdef", "x")
    assert verify(store) == []
    paths = [f"inputs/{digest}.json", "grids/paper-fig2.json", "failed/a-0123456789abcdef.json"]
    for path in paths:
        (store.root / path).write_text('{"texts":["b"]}')
    assert {(p.path, p.kind) for p in verify(store)} == {(path, "damaged") for path in paths}
    with pytest.raises(DataError, match="is damaged"):
        store.kept(digest)
    with pytest.raises(DataError, match="paper-fig2"):
        store.grids()
    assert "the note is lost" in store.failures()["a-0123456789abcdef"]
    assert store.keep({"texts": ["a"]}) == digest
    assert store.kept(digest) == {"texts": ["a"]}, "written anew"
    remove_damaged(store, verify(store))
    assert verify(store) == []


def test_a_store_of_a_newer_version_is_not_touched(store):
    """It is not opened: update; nothing in it changes."""
    edit(store.root / "store.json", schema=2)
    before = bytes_of(store.root)
    with pytest.raises(DataError, match=r"store\.json has schema 2; this version reads 1 to 1: update lofit-lens"):
        Store(store.root)
    assert bytes_of(store.root) == before


def test_a_run_of_a_newer_version_is_neither_read_nor_removed(store):
    """read and index say update; verify says newer; nothing removes it; a newer grid is not written over."""
    write(store, cell(0))
    edit(store.folder(cell(0).name) / "run.json", schema=3)
    store.write_grid("g", {"cells": []})
    edit(store.root / "grids" / "g.json", schema=9)
    before = bytes_of(store.root)
    for ask in (lambda: store.read(cell(0).name), store.index, store.grids, lambda: store.write_grid("g", {"cells": []}),
                lambda: collect_garbage(store, dry_run=False, unused=True)):  # fmt: skip
        with pytest.raises(DataError, match=r"schema .*update lofit-lens"):
            ask()
    found = verify(store)
    assert {(p.path, p.kind) for p in found} == {(f"runs/{cell(0).name}/run.json", "newer"), ("grids/g.json", "newer")}
    assert remove_damaged(store, found) == []
    assert bytes_of(store.root) == before


# ---------------------------------------------------------------------------------------------------- opening, names


def test_places_that_are_no_store_are_refused(tmp_path, monkeypatch):
    """A file, a folder with other things, a place that cannot be read or written, no place: said, and nothing is written."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    before = bytes_of(tmp_path)
    for root, message in (
        (tmp_path / "file", "cannot open the store"), (tmp_path / "thesis", r"holds chapter\.tex and no store\.json"),
        (tmp_path / "file" / "in", "cannot (open|write)"), (Path("/proc/lofit/store"), "cannot write"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Store(root)
    with pytest.raises(InputError, match="no store at"):
        Store(tmp_path / "none", create=False)
    for lease in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="lease is"):
            Store(tmp_path / "none", lease=lease)
    assert bytes_of(tmp_path) == before
    assert not (tmp_path / "none").exists()
    Store(tmp_path / "store")

    def denied(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match=r"cannot open the store .*Permission denied"):
        Store(tmp_path / "store")


def test_a_store_that_was_killed_while_it_was_made_is_made(tmp_path):
    """Hidden files, such as an unfinished store.json, do not stand in the way; nor does an empty folder."""
    (tmp_path / ".store.json.abc.tmp").write_text("{")
    assert Store(tmp_path).names() == []
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(DataError, match=r"store\.json is not JSON"):
        Store(tmp_path)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "../a", "a\\b", "a\0", "a\nb", "x" * 201, "ä" * 101, "\udc80"]
)
def test_names_that_no_file_should_have_are_refused(store, name):
    """Wherever a name is taken; nothing is written."""
    before = bytes_of(store.root)
    for take in (store.folder, store.done, store.read, store.state_file, store.log_file, store.held, store.remove, store.kept,
                 lambda n: store.fail(n, "x"), lambda n: store.claim(n).__enter__()):  # fmt: skip
        with pytest.raises(InputError, match="not a valid name for a run or a grid"):
            take(name)
    assert bytes_of(store.root) == before


def test_labels_with_odd_characters_make_runs(store):
    """A cell's name is made of its label; whatever stands there, the run is found again."""
    odd = [
        Cell(label, {"toy": i}) for i, label in enumerate(("a/../b", "ü\n\0'\"", "x" * 500, "K=3 %, 2->1", "", "[red]"))
    ]
    write(store, *odd)
    assert store.names() == sorted(c.name for c in odd)
    assert [store.read(c.name)["label"] for c in odd] == [c.label for c in odd]
    assert verify(store) == []
    assert set(store.index()["label"]) == {c.label for c in odd}


def test_inputs_and_grids_are_kept(store):
    """What is kept is read back; grids of two names are two files."""
    value = {"texts": ["ä", 1.5, None], "b": {"x": [1]}}
    assert store.kept(store.keep(value)) == value
    assert store.keep(dict(reversed(value.items()))) == store.keep(value)
    with pytest.raises(DataError):
        store.kept("0" * 64)
    store.write_grid("paper/fig2", {"cells": ["a"], "spec": {"seeds": 2}})
    path = store.write_grid("paper/fig2", {"cells": ["a", "b"]})
    assert path == store.root / "grids" / "paper-fig2.json"
    assert store.grids() == {
        "paper/fig2": {"cells": ["a", "b"], "kind": "lofit_lens.grid", "schema": 1, "name": "paper/fig2"}
    }
    with pytest.raises(InputError, match="'paper/fig2' and 'paper-fig2' would share the file"):
        store.write_grid("paper-fig2", {"cells": []})
    with pytest.raises(InputError, match="lacks 'cells'"):
        store.write_grid("x", {})
    with pytest.raises(InputError, match="not a valid name"):
        store.write_grid("../x", {"cells": []})


# -------------------------------------------------------------------------------------------------------- index


def test_the_index_has_one_row_a_run(store):
    """Row, metrics with intervals, items and seconds; whole numbers stay whole where some are missing."""
    cells = [
        cell(1, seed=0, share=0.03, ok=True),
        cell(2, seed=None, share=1, ok=None),
        cell(3, at="all"),
        cell(4, at=3),
    ]
    for c in cells:
        with store.new(c) as draft:
            draft.timing["seconds"] = 2.5
            if c is not cells[2]:
                draft.record["result"] = result(c.spec["toy"])
    table = store.index().set_index("name")
    assert table.index.tolist() == store.names()
    assert table.loc[[c.name for c in cells], "label"].tolist() == [c.label for c in cells]
    assert {c: str(table[c].dtype) for c in ("k", "seed", "share", "ok", "mc1", "mc1_low", "seconds", "n_items")} == {
        "k": "Int64", "seed": "Int64", "share": "float64", "ok": "boolean", "mc1": "float64", "mc1_low": "float64",
        "seconds": "float64", "n_items": "Int64",
    }  # fmt: skip
    row = table.loc[cells[0].name]
    assert (row["task"], row["k"], row["seed"], row["share"], row["mc1"], row["mc1_low"], row["mc1_high"]) == (
        "toy", 1, 0, 0.03, 1 / 7, 0.1, 0.9,
    )  # fmt: skip
    assert (row["ce"], row["n_items"], row["seconds"]) == (1.5, 5, 2.5)
    assert table["ce_low"].isna().all()
    assert table.loc[cells[2].name, ["mc1", "n_items", "seed"]].isna().all()
    assert table.loc[[c.name for c in cells[2:]], "at"].tolist() == ["all", "3"], "a mixed column is text"


def test_the_index_says_what_the_folders_say(store):
    """Whatever the file said before; it is the same table for other readers."""
    assert len(store.index()) == 0
    write(store, cell(0), cell(1))
    path, table = store.root / "index.parquet", store.index()
    assert table["name"].tolist() == store.names()
    path.write_text("x")
    pd.testing.assert_frame_equal(store.index(), table)
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)
    store.remove(cell(0).name)
    write(store, cell(2))
    assert sorted(store.index()["k"]) == [1, 2]


def test_a_damaged_run_stops_the_index(store):
    """A table that leaves out a run without a word would be wrong."""
    write(store, cell(0), cell(1))
    flip(store.folder(cell(1).name) / "run.json")
    with pytest.raises(DataError, match=cell(1).name):
        store.index()


# ------------------------------------------------------------------------------------------------------ garbage


def litter(store: Store) -> None:
    """Two runs (one needs the other) of a grid, one of none, and everything that can be left over."""
    needed, alone = cell(0), cell(2)
    wanted = cell(1, needs=(needed.name,))
    write(store, needed, wanted, alone)
    store.write_grid("g", {"cells": [wanted.name, cell(9).name]})
    for name in (cell(0).name, cell(9).name, cell(8).name):
        io.write_text(store.state_file(name), "checkpoint")
        io.write_text(store.log_file(name), "log")
    store.fail(cell(9).name, "x")
    (store.root / "drafts" / f"{cell(9).name}.abc").mkdir()
    for place in (".", "grids", "locks", "states"):
        for age, name in ((7200, "old"), (0, "new")):
            path = io.write_text(store.root / place / f".{name}.tmp", "x")
            os.utime(path, (time.time() - age,) * 2)


def test_garbage_is_what_nobody_needs(store):
    """A dry run removes nothing and says what would be: drafts, locks, old temporary files, checkpoints of finished runs."""
    litter(store)
    before = bytes_of(store.root)
    said = collect_garbage(store, dry_run=True)
    assert bytes_of(store.root) == before
    assert collect_garbage(store, dry_run=False) == said
    assert {str(p.relative_to(store.root)) for p in said} == {
        f"drafts/{cell(9).name}.abc", f"states/{cell(0).name}.safetensors", ".old.tmp", "grids/.old.tmp", "locks/.old.tmp",
        "states/.old.tmp",
    }  # fmt: skip
    assert not any(p.exists() for p in said)
    assert {k for k in before if k in bytes_of(store.root)} == {
        k for k in before if not any(k.startswith(str(p.relative_to(store.root))) for p in said)
    }
    assert collect_garbage(store, dry_run=False) == []
    assert len(store.names()) == 3


def test_unused_runs_are_those_that_no_grid_names_or_needs(store):
    """What a named run needs stays; without grids, or with one that cannot be read, nothing is called unused."""
    with pytest.raises(InputError, match="has no grids"):
        collect_garbage(store, dry_run=False, unused=True)
    litter(store)
    dry = collect_garbage(store, dry_run=True, unused=True)
    nobodys = {store.folder(cell(2).name), store.state_file(cell(8).name), store.log_file(cell(8).name)}
    assert nobodys <= set(dry)
    assert store.done(cell(2).name)
    assert collect_garbage(store, dry_run=False, unused=True) == dry
    assert store.names() == sorted([cell(0).name, cell(1, needs=(cell(0).name,)).name])
    (store.root / "grids" / "h.json").write_text("{")
    with pytest.raises(DataError, match=r"h\.json"):
        collect_garbage(store, dry_run=False, unused=True)
    assert len(store.names()) == 2


def test_a_run_that_is_locked_is_not_removed(store, holder):
    """Neither by name nor as garbage."""
    write(store, cell(0))
    store.write_grid("g", {"cells": []})
    assert not store.remove(cell(0).name)
    assert collect_garbage(store, dry_run=False, unused=True) == []
    assert store.done(cell(0).name)
    assert not store.remove(cell(1).name)


# ---------------------------------------------------------------------------------------------------- the shell


def shell(*args) -> tuple[int, str, str]:
    done = CliRunner().invoke(verbs.app, [str(a) for a in args], terminal_width=200)
    return done.exit_code, done.stdout, done.stderr


def test_list_and_index(store):
    """What is there, as a table and as JSON."""
    write(store, cell(1), cell(2))
    store.write_grid("paper/fig2", {"cells": [cell(1).name, cell(3).name]})
    store.fail(cell(3).name, "no [memory]")
    code, out, _ = shell("list", store.root)
    assert code == 0
    for text in (cell(1).label, "mc1", "0.143", "paper/fig2: 1 of 2 runs", "no [memory]"):
        assert text in out
    code, out, _ = shell("list", store.root, "--json")
    found = json.loads(out)
    assert found["grids"] == {"paper/fig2": {"done": 1, "cells": 2}}
    assert found["failed"] == {cell(3).name: "no [memory]"}
    assert {(r["k"], r["ce_low"]) for r in found["runs"]} == {(1, None), (2, None)}
    (store.root / "index.parquet").unlink()
    code, out, err = shell("index", store.root, "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert "2 runs" in err
    assert len(pd.read_parquet(store.root / "index.parquet")) == 2


def test_verify_on_the_shell(store):
    """Exit code 0 where all is well, 1 where not; --remove removes, and leaves a store that is well."""
    write(store, cell(1), cell(2))
    code, out, _ = shell("verify", store.root)
    assert code == 0
    assert "2 runs, 0 problems" in out
    flip(store.folder(cell(1).name) / "items.jsonl")
    code, out, _ = shell("verify", store.root)
    assert code == 1
    assert f"damaged: runs/{cell(1).name}/items.jsonl" in out
    assert "--remove" in out
    code, out, _ = shell("verify", store.root, "--json")
    assert code == 1
    assert [p["kind"] for p in json.loads(out)["problems"]] == ["damaged"]
    code, out, _ = shell("verify", store.root, "--remove")
    assert code == 0
    assert f"removed runs/{cell(1).name}" in out
    assert store.names() == [cell(2).name]
    (store.root / "runs" / "my notes").mkdir()
    assert shell("verify", store.root, "--remove")[0] == 1, "what is not removed is still wrong"


def test_gc_on_the_shell(store):
    """Without --yes it only shows."""
    litter(store)
    before = bytes_of(store.root)
    code, out, _ = shell("gc", store.root)
    assert code == 0
    assert f"would remove drafts/{cell(9).name}.abc" in out
    assert "6 to remove; add --yes" in out
    assert bytes_of(store.root) == before
    code, out, _ = shell("gc", store.root, "--yes", "--unused", "--json")
    assert f"runs/{cell(2).name}" in json.loads(out)["removed"]
    assert len(store.names()) == 2


@pytest.mark.parametrize("verb", ["list", "verify", "gc", "index"])
def test_bad_input_on_the_shell(tmp_path, capsys, verb):
    """No store: one line, exit code 2, nothing made; --help has an example."""
    code, _, err = shell(verb, tmp_path / "none")
    assert code == 2
    assert err.startswith("error: no store at")
    assert not (tmp_path / "none").exists()
    assert f"Example: lofit-lens store {verb}" in shell(verb, "--help")[1]
