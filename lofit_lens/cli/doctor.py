"""lofit-lens doctor: check what this machine offers."""

import importlib.metadata
import importlib.util
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable

from lofit_lens.cli import common as c

TIMEOUT = 5  # seconds per URL


def doctor() -> None:
    """Report versions, device, TransformerLens classes, Chrome for static figures, and whether data can be reached.

    Example: lofit-lens doctor
    """
    from rich.table import Table

    c.quiet_libraries()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, check in CHECKS.items():
        ok, found = check()
        table.add_row("[green]ok[/green]" if ok else "[yellow]--[/yellow]", f"[bold]{name}[/bold]", found)
    c.console.print(table)


def _versions() -> tuple[bool, str]:
    names = ("lofit-lens", "transformer-lens", "torch", "transformers", "datasets")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return True, f"Python {platform.python_version()}, " + ", ".join(found)


def _device() -> tuple[bool, str]:
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return True, f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} device(s)"
    return False, f"no CUDA device; the CPU ({torch.get_num_threads()} threads) is used, enough for the embedded model"


def _classes() -> tuple[bool, str]:
    from lofit_lens.models import hooked_class

    if hooked_class() is None:
        return True, "TransformerBridge (HookedTransformer left TransformerLens with 4.0)"
    return True, "HookedTransformer and TransformerBridge"


def _organism() -> tuple[bool, str]:
    from lofit_lens.models import ORGANISM

    there = (ORGANISM / "model.safetensors").is_file()
    return there, f"weights in {ORGANISM}" if there else "weights missing: reinstall the package"


def _chrome() -> tuple[bool, str]:
    names = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome")
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        return False, "none on the PATH: figures are HTML only (install Chrome or Chromium for PNG, SVG and PDF)"
    if importlib.util.find_spec("kaleido") is None:
        return False, f"{path}, but no kaleido: figures are HTML only (pip install 'lofit-lens[figures]')"
    return True, f"{path} and kaleido: figures can be saved as PNG, SVG and PDF"


def _address(url: str) -> tuple[bool, str]:
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "lofit-lens-doctor"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            return True, f"reached {url}"
    except urllib.error.HTTPError as e:
        return e.code < 500, f"{url} answers {e.code}"
    except (urllib.error.URLError, OSError, TimeoutError) as e:
        return False, f"cannot reach {url} ({getattr(e, 'reason', e)}); give --data-dir and local folders"


def _task_files() -> tuple[bool, str]:
    from lofit_lens.tasks.mquake import SOURCE

    return _address(SOURCE.url("val.jsonl"))


CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "versions": _versions,
    "device": _device,
    "TransformerLens": _classes,
    "embedded model": _organism,
    "Chrome": _chrome,
    "task files": _task_files,
    "model hub": lambda: _address("https://huggingface.co/api/models/gpt2"),
}
