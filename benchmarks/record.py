"""What every benchmark writes beside its figures: machine, versions, commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lofit_lens import io

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """Processor, cores, memory, threads and, if there is one, the GPU."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "processor": _processor(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": None if gpu is None else {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)},
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> dict[str, Any]:
    """The commit that ran, and whether files differed from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed_files": bool(git("status", "--porcelain", "--", "lofit_lens", "benchmarks/*.py")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed_files": None}


def write(path: Path, name: str, settings: dict[str, Any], results: Any) -> None:
    """Write one benchmark's JSON, whole or not at all."""
    io.write_json(path, {
        "benchmark": name, "date": datetime.now(UTC).isoformat(timespec="seconds"), "settings": settings,
        "results": results, "machine": machine(), "versions": io.environment(), **commit(),
    })  # fmt: skip
