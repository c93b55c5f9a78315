"""Kill a grid's runner at random moments, start it again each time, and compare what it made with an undisturbed run.

    python benchmarks/kills.py organism/fig5 --kills 50 --out benchmarks/results/kills.json

Every life of `lofit-lens grid` ends by SIGKILL: of the parent and all its workers, or of the parent alone. Its moment is drawn
evenly from the `--life` seconds that follow the first sign of work (a lock), so that kills fall on loading, training, testing
and writing. At the end every file of every run must be the same bytes as in a store that nobody disturbed, timings aside.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__":
    import record

STARTS = 120.0  # seconds in which the first cell must have begun


def run_once(grid: str, store: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the verb on a store, in a session of its own."""
    command = [sys.executable, "-m", "lofit_lens.cli", "grid", grid, "--store", str(store), "--quiet", *options]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of every finished run but its timing."""
    runs = store / "runs"
    return {
        str(p.relative_to(runs)): p.read_bytes() for p in runs.rglob("*") if p.is_file() and p.name != "timing.json"
    }


def phase(store: Path) -> str:
    """What a store's folders say of the moment of a kill."""

    def some(part: str) -> bool:
        return (store / part).is_dir() and any((store / part).iterdir())

    return ", ".join(part for part in ("drafts", "states", "locks") if some(part)) or "between cells"


def locked_since(store: Path, moment: float) -> bool:
    """Whether some cell's lock is newer than a moment; those of dead runners are older."""
    for lock in (store / "locks").glob("*.lock"):
        with contextlib.suppress(FileNotFoundError):
            if lock.stat().st_mtime > moment:
                return True
    return False


def kill(process: subprocess.Popen[bytes], *, children: bool) -> None:
    """SIGKILL, to the workers at the same moment or not; waits until all are gone."""
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for worker in workers if children else ():
        worker.kill()
    process.wait()
    gone = psutil.wait_procs(workers, timeout=30)[1]
    if gone:
        raise SystemExit(f"workers {gone} go on after their parent's death")


def kill_often(
    grid: str, store: Path, *, kills: int, life: float, options: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Run the grid into an empty store with that many kills, then to its end; what happened at each kill."""
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    made, before, finished_early = [], 0, 0
    for _ in range(kills):
        begun = time.time()
        process = run_once(grid, store, options)
        while not locked_since(store, begun) and process.poll() is None:
            if time.time() - begun > STARTS:
                raise SystemExit("no cell was begun")
            time.sleep(0.02)
        try:
            process.wait(draw.uniform(0, life))
            finished_early += 1
            continue
        except subprocess.TimeoutExpired:
            kill(process, children=draw.random() < 0.5)
        found[phase(store)] += 1
        done = len(list((store / "runs").iterdir())) if (store / "runs").is_dir() else 0
        made.append(done - before)
        before = done
    last = run_once(grid, store, options)
    if last.wait():
        raise SystemExit("the last run failed")
    return {
        "kills": sum(found.values()),
        "finished_early": finished_early,
        "at": dict(found),
        "runs_made_in_a_life": made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--life", type=float, default=14.0)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--folder", type=Path, default=Path("build/kills"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.json"))
    asked = parser.parse_args()
    shutil.rmtree(asked.folder / "killed", ignore_errors=True)
    options = ["--workers", asked.workers]
    if run_once(asked.grid, asked.folder / "whole", options).wait():  # of an earlier call: nothing is computed
        raise SystemExit("the undisturbed run failed")
    start = time.monotonic()
    found = kill_often(asked.grid, asked.folder / "killed", kills=asked.kills, life=asked.life, options=options)
    whole, killed = files_of(asked.folder / "whole"), files_of(asked.folder / "killed")
    differ = sorted(name for name in {*whole, *killed} if whole.get(name) != killed.get(name))
    verified = subprocess.run(
        [sys.executable, "-m", "lofit_lens.cli", "store", "verify", str(asked.folder / "killed")], check=False
    )
    settings = {"grid": asked.grid, "workers": int(asked.workers), "life_seconds": asked.life, "seed": 0}
    record.write(asked.out, "kills", settings, {
        **found, "files": len(whole), "files_that_differ": differ, "verify_exit_code": verified.returncode,
        "seconds": time.monotonic() - start,
    })  # fmt: skip
    raise SystemExit(bool(differ or verified.returncode))


if __name__ == "__main__":
    main()
