"""Which architectures load right: tiny random checkpoints against plain Hugging Face, on every class of TransformerLens.

    python benchmarks/architectures.py                                   # TransformerLens 3.9: both classes
    .venv-tl4/bin/python benchmarks/architectures.py                     # 4.x: the bridge
    python benchmarks/architectures_page.py                              # docs/architectures.md from both files

For every checkpoint of `families.py` and each class, `load_model` is tried, and what it gives is compared with the Hugging Face
model of the same folder (`architecture_checks.py`): logits at six lengths (within and beyond windows and the lengths at which
rotary scaling sets in), rows padded on the left and on the right, greedy answers from a key-value cache, z against what goes into
Hugging Face's output projection, and the logits under a LoFiT edit against those of the same edit made there. Then gradients of A
are compared with finite differences, and the edit is folded into a checkpoint.
"""

import contextlib
import gc
import json
import multiprocessing
import queue
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import architecture_checks as checks
import families
import measure
import record
import torch
from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.models import load_model

# --------------------------------------------------------------------------------------------------------- one model


def told(check: Callable[[], str]) -> dict[str, Any]:
    """`{"right": True}`; or what is wrong; or why the library refuses; or the raw error that it raises."""
    try:
        reason = check()
        return {"right": not reason, "reason": reason} if reason else {"right": True}
    except InputError as e:
        return {"refused": checks.one_line(e)}
    except Exception as e:
        return {"right": False, "reason": f"{type(e).__name__}: {checks.one_line(e)}"}


def of_class(folder: Path, hf: Any, backend: str) -> dict[str, Any]:
    """What one class makes of a checkpoint."""
    start = time.perf_counter()
    try:
        model = load_model(folder, backend=backend, device="cpu", name=checks.NAME)
    except InputError as e:
        return {"loads": {"refused": checks.one_line(e)}}
    except Exception as e:
        return {"loads": {"right": False, "reason": f"{type(e).__name__}: {checks.one_line(e)}"}}
    found: dict[str, Any] = {"loads": {"right": True}}
    with torch.no_grad():
        found["logits"] = told(lambda: checks.logits(model, hf))
        for side in ("right", "left"):
            found[f"padded on the {side}"] = told(lambda side=side: checks.padding(model, hf, side))
        for name, check in {"answers": checks.answers, "scores": checks.scores, "fused": checks.fused}.items():
            found[name] = told(lambda check=check: check(model, hf))
        layers, reason = checks.reached(model)
    found["layers with heads"] = f"{len(layers)} of {int(model.cfg.n_layers)}"
    if reason:
        found["other layers"] = reason
    if layers:
        made = checks.adapter(model, layers)
        with torch.no_grad():
            found["heads"] = told(lambda: checks.heads(model, hf, made))
        found["training"] = told(lambda: checks.training(model, made))
        if backend == "bridge":  # the checkpoint's, whatever class the adapter was made on
            found["export"] = told(lambda: checks.export(made, folder))
    found["in memory"] = told(lambda: checks.in_memory(hf, backend))
    found["seconds"] = round(time.perf_counter() - start, 2)
    return found


def of_case(case: families.Case, backends: Sequence[str]) -> dict[str, Any]:
    """What every class makes of one checkpoint."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint"
        try:
            families.save(case, folder)
            hf = checks.plain(folder)
            with torch.no_grad():
                reason = checks.itself(hf)
        except Exception as e:
            reason = f"{type(e).__name__}: {checks.one_line(e)}"
        if reason:
            return {"not compared": reason}
        return {backend: of_class(folder, hf, backend) for backend in backends}


# ---------------------------------------------------------------------------------------------------------- all of them


def all_cases(
    chosen: Sequence[families.Case], backends: Sequence[str], workers: int
) -> Iterator[tuple[families.Case, dict[str, Any]]]:
    """Every case, dealt out to several processes, as they come."""
    done: queue.Queue[tuple[families.Case, dict[str, Any]]] = queue.Queue()
    for i in range(workers):
        threading.Thread(target=_beside, args=(chosen[i::workers], backends, done), daemon=True).start()
    for _ in chosen:
        yield done.get()


def _beside(cases: Sequence[families.Case], backends: Sequence[str], done: "queue.Queue[Any]") -> None:
    """Cases in a process beside this one; where that dies, the case under way is marked and a new one goes on."""
    rest = list(cases)
    while rest:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(theirs, rest, backends, torch.get_num_threads()))
        child.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while rest:
                entry = mine.recv()
                done.put((rest.pop(0), entry))
        child.join()
        if rest:
            done.put((rest.pop(0), {"not compared": f"the process died ({child.exitcode})"}))


def _work(pipe: Any, chosen: Sequence[families.Case], backends: Sequence[str], threads: int) -> None:
    torch.set_num_threads(threads)
    measure.quiet()
    gc.freeze()  # an export collects garbage; what was imported is none
    for case in chosen:
        try:
            pipe.send(of_case(case, backends))
        except Exception as e:
            pipe.send({"not compared": f"{type(e).__name__}: {checks.one_line(e)}"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    version = io.environment()["transformer-lens"].split(".")[0]
    parser = measure.options(__doc__, "architectures", rounds=1)
    parser.set_defaults(out=measure.RESULTS / f"architectures_tl{version}.json")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--only", help="cases whose name holds this")
    args = measure.parsed(parser, argv)
    every = families.cases()
    if args.quick:
        every = [case for case in every if case.name in QUICK]
    if args.only:
        every = [case for case in every if args.only.lower() in f"{case.name} {case.architecture}".lower()]
    settings = {
        "command": args.command, "dtype": "float32", "device": "cpu", "lengths": checks.LENGTHS, "rows": checks.ROWS,
        "new": checks.NEW, "exact": checks.EXACT,
    }  # fmt: skip
    found: dict[str, Any] = {}
    for case, entry in tqdm(all_cases(every, args.backends, args.workers), desc="architectures", total=len(every)):
        found[case.name] = {"architecture": case.architecture, **entry}
        ordered = {c.name: found[c.name] for c in every if c.name in found}
        record.write(args.out, "architectures", settings, {"cases": ordered, "claimed": families.claimed()})
    print(json.dumps(found, indent=1) if args.only else f"wrote {args.out}")


QUICK = ("Llama", "Mistral", "GPT2LMHeadModel")


if __name__ == "__main__":
    main()
