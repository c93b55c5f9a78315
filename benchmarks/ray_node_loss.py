"""A grid on a Ray cluster that loses a node half-way, against the same grid computed locally.

    python benchmarks/ray_node_loss.py organism/fig5 --local runs/local --out benchmarks/results/ray_node_loss.json

A head without a CPU for cells and two worker nodes with one each, as separate `ray start` processes on this machine. When half of
the cells are done, one worker node gets SIGKILL with all its processes. Every cell must be done at the end, and every file of
every run be the same bytes as in the local store (made first, where it is missing), timings aside.
"""

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import record
from kills import files_of, run_once

from lofit_lens.experiments.grid import plan_grid

MEMORY = str(100 * 2**20)  # bytes of a node's object store


def start(*options: str) -> subprocess.Popen[bytes]:
    """A node in a session of its own; `--block` keeps its processes together."""
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--block", "--object-store-memory", MEMORY, "--disable-usage-stats", *options]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cut_power(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a node and all that it started."""
    everything = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in everything:
        with contextlib.suppress(psutil.Error):
            process.kill()
    node.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--local", type=Path, default=Path("build/ray/local"))
    parser.add_argument("--folder", type=Path, default=Path("build/ray/cluster"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ray_node_loss.json"))
    asked = parser.parse_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    n_cells = len(plan_grid(asked.grid).cells)
    if run_once(asked.grid, asked.local, []).wait():
        raise SystemExit("the local run failed")
    port = free_port()
    address = f"127.0.0.1:{port}"
    quick = json.dumps({"health_check_period_ms": 1000, "health_check_failure_threshold": 3})
    here = ("--node-ip-address", "127.0.0.1")
    nodes = [
        start(
            "--head",
            *here,
            "--port",
            str(port),
            "--num-cpus",
            "0",
            "--include-dashboard=false",
            "--system-config",
            quick,
        )
    ]
    try:
        time.sleep(10)
        nodes += [start("--address", address, *here, "--num-cpus", "1") for _ in range(2)]
        time.sleep(10)
        begun = time.monotonic()
        driver = run_once(asked.grid, asked.folder, ["--executor", "ray", "--address", address])
        at_loss, half = 0, n_cells // 2
        while driver.poll() is None:
            done = len(list((asked.folder / "runs").glob("*"))) if (asked.folder / "runs").is_dir() else 0
            if not at_loss and done >= half:
                cut_power(nodes[1])
                at_loss = done
            time.sleep(0.5)
        seconds = time.monotonic() - begun
    finally:
        for node in nodes:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                cut_power(node)
    local, cluster = files_of(asked.local), files_of(asked.folder)
    names = {cell.name for cell in plan_grid(asked.grid).cells}
    wanted = {name: data for name, data in local.items() if name.split("/")[0] in names}
    differ = sorted(name for name in {*wanted, *cluster} if wanted.get(name) != cluster.get(name))
    record.write(asked.out, "ray_node_loss", {"grid": asked.grid, "nodes": 2, "cpus_a_node": 1}, {
        "exit_code": driver.returncode, "runs": len({n.split("/")[0] for n in cluster}), "runs_when_the_node_was_lost": at_loss,
        "files": len(cluster), "files_that_differ": differ, "seconds": seconds,
    })  # fmt: skip
    raise SystemExit(bool(driver.returncode or differ or not at_loss))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
