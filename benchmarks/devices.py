"""How often training, scoring and decoding wait for their device, and what they copy; counted on pretend devices.

    python benchmarks/devices.py

No accelerator is needed: `tests/pretend.py` counts what Python asks of a device that computes on the CPU. A wait is a value that
Python needs before it can go on (a loss, a token, how many places a mask has); a copy is a tensor that goes from one device to
another, or from the CPU. Counts do not depend on the size of the model, apart from its layers.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import record
from record import ROOT

sys.path.insert(0, str(ROOT))

import lofit_lens as ll
from lofit_lens import HeadSet, Lofit, Task
from lofit_lens.evaluation import score_continuations
from lofit_lens.evaluation.generation import decode_ids
from lofit_lens.models import load_model
from tests import pretend, tiny
from tests.device_cases import ANSWERS, CONFIG, PROMPTS, QUIET, in_two
from tests.selecting import DPO, SFT

HEADS = HeadSet(["L2H1", "L0H3"])
FEW, MANY = 2, 3


def _steps(model: Any, task: Task, n: int) -> None:
    config = CONFIG.with_changes(max_steps=n, epochs=2, l1=0.0)
    ll.tune_offsets(model, task, HEADS, config=config, **QUIET)


def _scored(model: Any, n: int) -> None:
    """Prompts that run one by one, each with an answer of several tokens."""
    with Lofit.for_model(model, HEADS).attached(model):
        score_continuations(model, PROMPTS[:1] * n, ANSWERS[:1] * n, token_budget=1)


def _decoded(model: Any, n: int) -> None:
    with Lofit.for_model(model, HEADS).attached(model):
        new = decode_ids(model, [[1, 40, 50, 60], [1, 70]], n)
    assert [len(ids) for ids in new] == [n, n], "an end token came first"


UNITS: dict[str, Callable[[Any, int], None]] = {
    "training step, SFT": lambda model, n: _steps(model, SFT, n),
    "training step, DPO": lambda model, n: _steps(model, DPO, n),
    "scored prompt with its answers": _scored,
    "decoded token": _decoded,
}


def counted(model: Any, run: Callable[[Any, int], None]) -> dict[str, Any]:
    """Of one unit more: copies, waits, those of the library's own lines, and the lines."""
    run(model, FEW)  # what is tried once a model
    found = []
    for n in (FEW, MANY):
        with pretend.counting() as counts:
            run(model, n)
        found.append(counts)
    unit: dict[str, Any] = {}
    for what in ("copies", "waits"):
        few, many = (getattr(counts, what) for counts in found)
        more = {place: (many[place] - few[place]) / (MANY - FEW) for place in sorted(Counter(many))}
        more = {place: n for place, n in more.items() if n}
        unit[what] = sum(more.values())
        unit[f"own {what}"] = sum(n for place, n in more.items() if place.startswith("lofit_lens/"))
        unit[f"{what} at"] = more
    return unit


def models(folder: Path) -> dict[str, Callable[[], Any]]:
    """A tiny Llama on one device in each class, and in two parts."""
    one = {
        name: lambda name=name: load_model(folder, backend=name, device="pretend:0") for name in ("hooked", "bridge")
    }
    return {**one, "bridge, two devices": lambda: in_two(folder)}


def main(argv: Sequence[str] | None = None) -> None:
    """Count and write."""
    args = measure.parsed(measure.options(__doc__, "devices", rounds=1), argv)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, pretend.devices():
        tiny.save(Path(folder), "llama")
        for name, load in models(Path(folder)).items():
            if name.split(",")[0] in args.backends:
                model = load()
                results[name] = {unit: counted(model, run) for unit, run in UNITS.items()}
    settings = {
        "command": args.command,
        "model": "tiny Llama of 3 layers, random weights",
        "edited heads": list(map(str, HEADS)),
    }
    record.write(args.out, "devices", settings, results)
    for name, found in results.items():
        for unit, n in found.items():
            print(f"{name}, {unit}: {n['waits']:g} waits ({n['own waits']:g} of the library), {n['copies']:g} copies")


if __name__ == "__main__":
    main()
