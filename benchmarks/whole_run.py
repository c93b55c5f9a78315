"""A whole run, select + tune + evaluate, against a straightforward implementation of the same (`straightforward.py`).

    python benchmarks/whole_run.py --data-dir DATA

Both get SmolLM2, the same real rows (`--train` training and `--test` test rows a task), the same seeds and the model's own
settings, all epochs. Both have to choose the same heads and to find the same metrics; the file holds the differences. Each run
has a process of its own: times (CPU seconds, on a GPU wall seconds) are those of the three phases after a warm-up, which also
takes what the library tries once a model, as ratios within a round; the peak of resident memory is that of the phases above what
stood before them. Tokens are counted at the model's door.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import record
import straightforward
import torch
from tqdm.auto import tqdm

from lofit_lens.evaluation import evaluate
from lofit_lens.heads import HeadScores
from lofit_lens.models import load_model, model_info
from lofit_lens.tasks import Task, load_task
from lofit_lens.training import Preset, objective, preset, select_heads, tune_offsets

TASKS = ("truthfulqa", "mquake", "clutrr")
PHASES = ("select", "tune", "evaluate")
SEED = 42


@dataclasses.dataclass
class Run:
    """What a whole run found, and what each phase took."""

    heads: list[str] = dataclasses.field(default_factory=list)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    values: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    said: list[Any] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    peak: float = 0.0

    def phase(self, name: str, model: Any, call: Callable[[], Any]) -> Any:
        """Run a phase, with its time (CPU seconds where it runs on a CPU, which other work disturbs less) and its tokens."""
        device = str(next(model.parameters()).device)
        with measure.counted_tokens(model) as tokens:
            before = time.process_time()
            found, wall = measure.clocked(call, device)
        self.seconds[name] = time.process_time() - before if device == "cpu" else wall
        self.tokens[name] = dict(tokens)
        return found


def library(model: Any, task: Task, settings: Preset, n_train: int, n_test: int) -> Run:
    """The library's own three calls."""
    objective._references.clear()  # what an earlier round computed
    run = Run()
    more: dict[str, Any] = {"seed": SEED, "n_train": n_train, "progress": False}
    scores = run.phase("select", model, lambda: select_heads(model, task, config=settings.select, **more))
    heads = scores.top(settings.k)
    lofit = run.phase("tune", model, lambda: tune_offsets(model, task, heads, config=settings.tune, **more))
    with lofit.attached(model):
        found = run.phase("evaluate", model, lambda: evaluate(model, task, limit=n_test, progress=False))
    run.heads, run.values = sorted(map(str, heads)), lofit.v.detach().cpu().numpy()
    run.losses = {
        "select": [r["loss"] for r in scores.meta["history"]], "tune": [r["loss"] for r in lofit.meta.history]
    }  # fmt: skip
    run.metrics = {name: m.mean for name, m in found.metrics.items()}
    run.said = list(found.items["generated"]) if "generated" in found.items else list(found.items["score_best"])
    return run


def plain(model: Any, task: Task, settings: Preset, n_train: int, n_test: int) -> Run:
    """The straightforward ones."""
    run = Run()
    more: dict[str, Any] = {"seed": SEED, "n_train": n_train}
    A, losses_A = run.phase(
        "select", model, lambda: straightforward.train(model, task, None, "A", settings.select, **more)
    )
    heads = HeadScores(A.double().norm(dim=-1), "A-norm").top(settings.k)
    v, losses_v = run.phase(
        "tune", model, lambda: straightforward.train(model, task, heads, "v", settings.tune, **more)
    )
    zero = torch.zeros_like(v)
    run.metrics, said = run.phase(
        "evaluate", model, lambda: straightforward.evaluate(model, task, zero, v, heads, limit=n_test)
    )
    run.heads, run.values = sorted(map(str, heads)), v.cpu().numpy()
    run.losses = {"select": losses_A, "tune": losses_v}
    run.said = [s[0] if isinstance(s, list) else s for s in said]  # of choices the best answer's
    return run


def agreement(a: Run, b: Run) -> dict[str, Any]:
    """How far two runs are apart."""
    texts = isinstance(a.said[0], str)
    return {
        "same_heads": a.heads == b.heads,
        "heads": a.heads,
        "losses": {p: max(abs(x - y) for x, y in zip(a.losses[p], b.losses[p], strict=True)) for p in a.losses},
        "offsets": float(np.abs(a.values - b.values).max()),
        "metrics": {name: abs(a.metrics[name] - b.metrics[name]) for name in a.metrics},
        "same_texts": sum(x == y for x, y in zip(a.said, b.said, strict=True)) / len(a.said) if texts else None,
        "scores_nats": None if texts else max(abs(x - y) for x, y in zip(a.said, b.said, strict=True)),
    }


WAYS: dict[str, Callable[..., Run]] = {"straightforward": plain, "library": library}


def in_a_process(
    way: str, name: str, folder: str | None, n_train: int, n_test: int, epochs: int | None, model: str, backend: str,
    device: str, threads: int,
) -> Run:  # fmt: skip
    """One whole run; called in a process of its own."""
    torch.set_num_threads(threads)
    task, loaded = load_task(name, data_dir=folder), load_model(model, backend=backend, device=device)
    base = preset(model_info(loaded), task.family, task.objective)
    settings = Preset(base.select.with_changes(epochs=epochs), base.tune.with_changes(epochs=epochs), base.k)
    few = Preset(*(c.with_changes(epochs=1, max_steps=1) for c in (settings.select, settings.tune)), settings.k)
    call = WAYS[way]
    call(loaded, task, few, min(2, n_train), 1)
    with measure.peaked(device) as peak:
        run = call(loaded, task, settings, n_train, n_test)
    run.peak = peak()
    return run


def one_task(calls: dict[str, tuple[Any, ...]], rounds: int, n_train: int, n_test: int, desc: str) -> dict[str, Any]:
    """Both ways, round by round."""
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    with tqdm(total=rounds * len(calls), desc=desc, leave=False) as bar:
        for i in range(rounds):
            for name in sorted(calls, reverse=bool(i % 2)):
                runs[name].append(measure.in_a_process(in_a_process, *calls[name]))
                bar.update()
    seconds = {
        name: {p: [r.seconds[p] for r in found] for p in PHASES} | {"total": [sum(r.seconds.values()) for r in found]}
        for name, found in runs.items()
    }
    first = {name: found[0] for name, found in runs.items()}
    return {
        "train_rows": n_train, "test_rows": n_test, "k": len(first["library"].heads),
        "steps": {p: len(losses) for p, losses in first["library"].losses.items()},
        "metrics": first["library"].metrics,
        "gain": {p: measure.ratio(seconds["straightforward"][p], seconds["library"][p]) for p in (*PHASES, "total")},
        "median_seconds": {n: {p: statistics.median(s) for p, s in found.items()} for n, found in seconds.items()},
        "peak_mib": {name: statistics.median(r.peak for r in found) for name, found in runs.items()},
        "tokens": {name: run.tokens for name, run in first.items()},
        "difference": agreement(first["straightforward"], first["library"]),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "whole_run", rounds=1)
    parser.add_argument("--model", default="smollm2", help="as in load_model")
    parser.add_argument("--data-dir", type=Path, help="folder of the three tasks' folders; left out: fetched")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--train", type=int, default=40, help="training rows of a task")
    parser.add_argument("--test", type=int, default=100, help="test rows of a task")
    parser.add_argument("--epochs", type=int, help="left out: the model's settings")
    args = measure.parsed(parser, argv)
    results: dict[str, Any] = {}
    started, hashes = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.train, args.test, args.epochs, args.model = 4, 3, 1, folder
            measure.build(Path(folder), ["a b c"], measure.TINY)
        for name in args.tasks:
            task = load_task(name, data_dir=args.data_dir)
            hashes[task.name] = task.data_hash
            for backend in args.backends:
                calls = {way: (
                    way, name, args.data_dir and str(args.data_dir), args.train, args.test, args.epochs, args.model,
                    backend, args.device, torch.get_num_threads(),
                ) for way in WAYS}  # fmt: skip
                found = one_task(calls, args.rounds, args.train, args.test, f"{name}, {backend}")
                results.setdefault(name, {})[backend] = found
                print(f"{name}, {backend}: {found['gain']['total']['median_ratio']:.2f}x, {found['difference']}")
    settings = {
        "command": args.command, "model": "tiny" if args.quick else args.model, "dtype": "float32",
        "device": args.device, "rounds": args.rounds, "train_rows": args.train, "test_rows": args.test,
        "epochs": args.epochs, "seed": SEED, "data_hashes": hashes,
        "prompts_decoded_together": straightforward.BATCH, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    record.write(args.out, "whole_run", settings, results)


if __name__ == "__main__":
    main()
