"""Cells as Ray tasks: on a cluster of a head and two workers, separate processes on this machine, one of them killed half-way."""

import contextlib
import os
import signal
import socket
import sys
import time

import pytest

from lofit_lens.errors import InputError
from lofit_lens.experiments.executors.runner import run_cells
from lofit_lens.experiments.store.store import Store
from tests import fake_work

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

import psutil  # noqa: E402 (comes with Ray's own tests' needs)

from lofit_lens.experiments.executors import ray as ray_runner  # noqa: E402
from lofit_lens.experiments.executors.ray import RayExecutor  # noqa: E402

NODE = {"object_store_memory": 100 * 2**20}  # bytes, of each node
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


def processes():
    """All processes under this one."""
    return {p for p in psutil.Process().children(recursive=True) if p.is_running()}


@pytest.fixture(scope="module")
def cluster():
    """A head that computes nothing and two workers of two CPUs each, all on this machine; gone at the end, whatever happened."""
    from ray.cluster_utils import Cluster

    before = processes()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = None
    try:
        made = Cluster(initialize_head=True, head_node_args={
            **NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": QUICK,
        })  # fmt: skip
        for _ in range(2):
            made.add_node(num_cpus=2, **NODE)
        yield made
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        if made is not None:
            with contextlib.suppress(Exception):
                made.shutdown()
        left = processes() - before
        for p in left:
            with contextlib.suppress(psutil.Error):
                p.kill()
        psutil.wait_procs(left, timeout=10)


@pytest.fixture(scope="module")
def joined(cluster):
    """This process is connected already: executors share its worker processes and leave it connected."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    return cluster


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", lease=3.0)


def chains(folder, n, seconds=0.3):
    """n cells, and one behind every two of them that needs both."""
    first = [fake_work.cell(f"a{i}", folder, seconds=seconds) for i in range(n)]
    pairs = zip(first[::2], first[1::2], strict=True)
    return [*first, *(fake_work.cell(f"b{i}", folder, needs=(x.name, y.name)) for i, (x, y) in enumerate(pairs))]


def records(store):
    """run.json of every run, as bytes."""
    return {name: (store.folder(name) / "run.json").read_bytes() for name in store.names()}


def run(store, cells, executor, **options):
    return run_cells(store, cells, fake_work.work, "context", executor=executor, progress=False, **options)


def on(cluster, store, **options):
    return RayExecutor(store, fake_work.work, "context", address=cluster.address, **options)


def kill_node(node):
    """SIGKILL for the node's raylet and all that it started, as if its power were cut."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for p in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            p.kill()


def test_a_grid_is_computed_once_and_as_locally(cluster, store, tmp_path):
    """Slots are the workers' CPUs; every cell is computed once, byte for byte as here; the second run finds all."""
    executor = on(cluster, store)
    assert executor.slots == 4
    together = [fake_work.cell(f"c{i}", tmp_path, shares="m") for i in range(3)]
    cells = [*chains(tmp_path, 4, seconds=0.05), *together]
    report = run(store, cells, executor)
    assert report.computed == tuple(c.name for c in cells)
    assert sorted(fake_work.computed(tmp_path)) == sorted(c.label for c in cells)
    assert not ray.is_initialized()
    assert not list(store.root.glob(".seen-by-*"))
    local = Store(tmp_path / "local")
    run_cells(local, cells, fake_work.work, "context", devices=["cpu"], progress=False)
    assert records(store) == records(local)
    assert store.read(together[1].name)["with"] == ["c0", "c1", "c2"]
    again = run(store, cells, on(cluster, store))
    assert (again.computed, len(again.there)) == ((), len(cells))


def test_failures_and_logs(joined, store, tmp_path, monkeypatch):
    """Errors, a dead process and bad input are told apart; what the work says goes to its log."""
    cells = [
        fake_work.cell("fails", tmp_path, does="fail"),
        fake_work.cell("recovers", tmp_path, does="fail", times=1),
        fake_work.cell("refused", tmp_path, does="bad input"),
        fake_work.cell("dies", tmp_path, does="die", times=2),
        fake_work.cell("dies-once", tmp_path, does="die", times=1),
        fake_work.cell("talks", tmp_path, does="talk"),
    ]
    monkeypatch.setattr(ray_runner, "RETRIES", 1)
    report = run(store, cells[:3] + cells[4:], on(joined, store), retries=1)
    assert report.computed == tuple(cells[i].name for i in (1, 4, 5))
    assert report.failed == {cells[0].name: "RuntimeError: try 2 failed", cells[2].name: "InputError: no such head"}
    monkeypatch.setattr(ray_runner, "RETRIES", 0)
    report = run(store, [cells[3]], on(joined, store), retries=0)
    assert report.failed[cells[3].name].startswith("WorkerCrashedError: ")
    done = fake_work.computed(tmp_path)
    assert [done.count(c.label) for c in cells] == [2, 2, 1, 1, 2, 1]
    log = store.log_file(cells[-1].name).read_text()
    assert "a print\n" in log
    assert "from below" in log
    assert ray.is_initialized()


def test_a_worker_node_is_killed_half_way(joined, store, tmp_path):
    """All cells are done; computed twice are those alone that the dead node had in its hands; results are the local ones."""
    extra = joined.add_node(num_cpus=2, **NODE)
    cells = chains(tmp_path, 12, seconds=0.3)
    executor = on(joined, store)
    assert executor.slots == 6
    killed = []

    class Watched:
        """The executor, with a hand on the node's power switch."""

        @property
        def slots(self):
            return executor.slots

        submit, interrupt, close = executor.submit, executor.interrupt, executor.close

        def wait(self, timeout):
            if not killed and len(store.names()) >= 5:
                kill_node(extra)
                killed.append(set(store.names()))
            return executor.wait(timeout)

    report = run(store, cells, Watched())
    assert killed
    assert len(killed[0]) < len(cells) - 4
    # A cell whose node died between its end and the news of it was "there" at the second look.
    assert {*report.computed, *report.there} == {c.name for c in cells}
    assert len(report.there) <= 2
    assert (report.failed, report.blocked) == ({}, {})
    done = fake_work.computed(tmp_path)
    twice = {label for label in done if done.count(label) > 1}
    assert len(twice) <= 2
    assert {c.label for c in cells} == set(done)
    assert not twice & {c.label for c in cells if c.name in killed[0]}
    local = Store(tmp_path / "local")
    run_cells(local, cells, fake_work.work, "context", devices=["cpu"], progress=False)
    assert records(store) == records(local)


def test_ctrl_c_reaches_the_work(joined, store, tmp_path):
    """The first Ctrl-C raises KeyboardInterrupt inside every task, queued ones are not begun, and the call ends with it."""
    executor = on(joined, store)
    n, wait = executor.slots, executor.wait
    cells = [fake_work.cell(f"hangs{i}", tmp_path, does="hang") for i in range(n + 1)]

    def watched(timeout):
        hangs = tmp_path / "computed.hangs"
        if hangs.exists() and len(hangs.read_text().split()) == n:
            hangs.unlink()
            os.kill(os.getpid(), signal.SIGINT)
        return wait(timeout)

    executor.wait = watched
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(store, cells, executor)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len((tmp_path / "computed.stopped").read_text().split()) == n
    assert len(fake_work.computed(tmp_path)) == n


def test_what_a_cluster_cannot_do_is_refused(joined, store):
    """No room for a cell; nothing stays behind."""
    with pytest.raises(InputError, match=r"no node of this cluster has room for a cell \(1 CPUs, 1 GPUs\)"):
        on(joined, store, gpus=1.0)
    with pytest.raises(InputError, match=r"no node .*3 CPUs"):
        on(joined, store, cpus=3.0)
    assert not list(store.root.glob(".seen-by-*"))


def test_a_node_that_cannot_take_part_stops_the_run(joined, store, tmp_path, monkeypatch):
    """Other versions and an unseen store, with the node's name, and what it cannot import; nothing is computed there."""
    cells, here = [fake_work.cell("a", tmp_path)], socket.gethostname()
    with monkeypatch.context() as m:
        m.setattr(ray_runner, "_versions", lambda: {"torch": "1.0", "lofit-lens": "0.0.1"})
        executor = on(joined, store)
    with pytest.raises(InputError, match=rf"node {here} has .*instead of 0.0.1"):
        run(store, cells, executor)
    executor = on(joined, store)
    executor._probe.unlink()
    with pytest.raises(InputError, match=rf"node {here} does not see the store {store.root}"):
        run(store, cells, executor)
    executor = RayExecutor(store, fake_work.work, fake_work.Unreadable())
    with pytest.raises(InputError, match=r"(?s)a node cannot run this library.*no module of that name here"):
        run(store, cells, executor)
    assert fake_work.computed(tmp_path) == []
    assert not list(store.root.glob(".seen-by-*"))


def test_slots_follow_the_cluster(joined, store):
    """A node that joins is counted at the next look."""
    executor = on(joined, store)
    before = executor.slots
    node = joined.add_node(num_cpus=3, **NODE)
    assert executor.slots == before + 3
    executor.close()
    joined.remove_node(node)


def test_no_cluster_there(store, monkeypatch):
    """Nothing listens, or it is no address: said at once."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    start = time.monotonic()
    with pytest.raises(InputError, match=f"no Ray cluster at 127.0.0.1:{free}"):
        RayExecutor(store, fake_work.work, None, address=f"127.0.0.1:{free}")
    for address in ("ray://somewhere:10001", "nonsense"):
        with pytest.raises(InputError, match=f"no Ray cluster at {address}.*HOST:PORT"):
            RayExecutor(store, fake_work.work, None, address=address)
    assert time.monotonic() - start < 30


def test_bad_requests(store):
    """Each with what was given."""
    for options in ({"cpus": 0.0}, {"cpus": -1.0}, {"gpus": -1.0}):
        with pytest.raises(InputError, match="got cpus="):
            RayExecutor(store, fake_work.work, None, **options)


def test_ray_is_missing(store, monkeypatch):
    """The error says how to get it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "lofit-lens\[ray\]"'):
        RayExecutor(store, fake_work.work, None)
