"""A grid on a Ray cluster that loses a node half-way, against the same grid computed locally.

    python benchmarks/ray_node_loss.py organism/fig5 --local runs/local --out benchmarks/results/ray_node_loss.json

A head without a CPU for cells and two worker nodes with one each, as separate processes of Ray on this machine. When half of
the cells are done, one worker node gets SIGKILL with all its processes. Every cell must be done at the end, and every file of
every run be the same bytes as in the local store (made first, where it is missing), timings aside.
"""

import argparse
import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import record
from kills import files_of, run_once
from ray.cluster_utils import Cluster

from lofit_lens.experiments.grid.run import plan_grid

NODE = {"object_store_memory": 100 * 2**20}  # bytes


def cut_power(node: Any) -> None:
    """SIGKILL for a node's raylet and all that it started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            process.kill()


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
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, **NODE) for _ in range(2)]
        begun = time.monotonic()
        driver = run_once(asked.grid, asked.folder, ["--executor", "ray", "--address", cluster.address])
        at_loss, half = 0, n_cells // 2
        while driver.poll() is None:
            done = len(list((asked.folder / "runs").glob("*"))) if (asked.folder / "runs").is_dir() else 0
            if not at_loss and done >= half:
                cut_power(nodes[0])
                at_loss = done
            time.sleep(0.5)
        seconds = time.monotonic() - begun
    finally:
        cluster.shutdown()
    local, made = files_of(asked.local), files_of(asked.folder)
    names = {cell.name for cell in plan_grid(asked.grid).cells}
    wanted = {name: data for name, data in local.items() if name.split("/")[0] in names}
    differ = sorted(name for name in {*wanted, *made} if wanted.get(name) != made.get(name))
    record.write(asked.out, "ray_node_loss", {"grid": asked.grid, "nodes": 2, "cpus_a_node": 1, "ray": ray.__version__}, {
        "exit_code": driver.returncode, "runs": len({n.split("/")[0] for n in made}), "runs_when_the_node_was_lost": at_loss,
        "files": len(made), "files_that_differ": differ, "seconds": seconds,
    })  # fmt: skip
    raise SystemExit(bool(driver.returncode or differ or not at_loss))


if __name__ == "__main__":
    main()
