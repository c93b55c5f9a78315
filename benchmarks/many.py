"""Many LoFiT runs in the same passes (`tune_many`) against the same runs one after another, interleaved in one run.

    python benchmarks/many.py
    python benchmarks/many.py --model smollm2 --tasks mquake --sizes 1 2 4 8 --n-train 8 --epochs 1 --data-dir DATA

Runs of the embedded model: its three tasks in turn (two by SFT, one by DPO), a new seed after each three, A on every head, its
own settings, `--n-train` examples each; or of another model and its tasks. In every round, and for each number of threads, R
runs are trained together and one by one; the one-by-one time of R runs is the sum over the first R. Times are ratios within a
round. What both learned is compared.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import record
import torch
from tqdm.auto import tqdm

from lofit_lens.errors import TrainingDiverged
from lofit_lens.heads import HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.models import device_of, load_model, model_info
from lofit_lens.tasks import Task, load_task
from lofit_lens.training import preset
from lofit_lens.training.lofit import LofitRun, tune_many

TASKS = ("organism/truth", "organism/kinship", "organism/edits")
SIZES = (1, 4, 8, 16, 36, 64)


def listed_runs(
    model: Any, tasks: Sequence[Task], n: int, *, component: Any = "A", n_train: int | None = None, epochs: int | None = None,
    max_steps: int | None = None,
) -> list[LofitRun]:  # fmt: skip
    """The first `n` runs: tasks in turn, seeds from 42; A on every head, or v on a few heads drawn by the seed."""
    runs, info = [], model_info(model)
    for i in range(n):
        task, seed = tasks[i % len(tasks)], 42 + i // len(tasks)
        base = preset(info, task.family, task.objective)
        config = (base.select if component == "A" else base.tune).with_changes(epochs=epochs, max_steps=max_steps)
        heads = None if component == "A" else HeadSet.random((info.n_layers, info.n_heads), base.k, seed=seed)
        runs.append(LofitRun(task, component, heads=heads, seed=seed, config=config, n_train=n_train))
    return runs


def trained(model: Any, runs: Sequence[LofitRun]) -> list[Lofit]:
    """Runs in the same passes.

    Raises:
        TrainingDiverged: one of them.
    """
    found = []
    for made in tune_many(model, runs, progress=False):
        if isinstance(made, TrainingDiverged):
            raise made
        found.append(made)
    return found


def compare(model: Any, runs: Sequence[LofitRun], sizes: Sequence[int], rounds: int, desc: str = "") -> dict[str, Any]:
    """Gain, seconds and agreement for each number of runs."""
    sizes, device = sorted(n for n in sizes if n <= len(runs)), str(device_of(model))
    together: dict[int, list[float]] = {n: [] for n in sizes}
    apart: dict[int, list[float]] = {n: [] for n in sizes}
    differ = dict.fromkeys(sizes, 0.0)
    same = dict.fromkeys(sizes, True)
    trained(model, runs[:1])  # warm-up
    with tqdm(total=rounds * (max(sizes) + len(sizes)), desc=desc, leave=False) as bar:
        for _ in range(rounds):
            alone: list[Lofit] = []
            seconds = 0.0
            for n in sizes:
                joint, took = measure.clocked(lambda n=n: trained(model, runs[:n]), device)
                together[n].append(took)
                bar.update()
                for run in runs[len(alone) : n]:
                    (made,), took = measure.clocked(lambda run=run: trained(model, [run]), device)
                    alone.append(made)
                    seconds += took
                    bar.update()
                apart[n].append(seconds)
                for a, b, run in zip(alone, joint, runs, strict=False):
                    differ[n] = float(np.maximum(differ[n], learned_apart(a, b)))  # NaN stays
                    same[n] &= run.component != "A" or chosen(model, run, a) == chosen(model, run, b)
    return {
        str(n): {
            "gain": measure.ratio(apart[n], together[n]),
            "median_seconds": {"together": statistics.median(together[n]), "apart": statistics.median(apart[n])},
            "largest_difference": differ[n], "same_heads": same[n],
        }
        for n in sizes
    }  # fmt: skip


def learned_apart(a: Lofit, b: Lofit) -> float:
    """Largest difference of what two trainings learned."""
    return float(torch.stack([(getattr(a, part) - getattr(b, part)).abs().max() for part in ("A", "v")]).max())


def chosen(model: Any, run: LofitRun, lofit: Lofit) -> list[str]:
    """The heads that a run would go on with."""
    k = preset(model_info(model), run.task.family, run.task.objective).k
    return sorted(map(str, lofit.norms("A").top(k)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "many", rounds=2)
    parser.add_argument("--model", default="organism", help="as in load_model")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="in turn")
    parser.add_argument("--data-dir", type=Path, help="folder of the tasks' folders; left out: fetched")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="numbers of runs")
    parser.add_argument("--each-threads", nargs="+", type=int, help="numbers of torch threads; left out: 1 and all")
    parser.add_argument("--component", default="A", choices=["A", "v"])
    parser.add_argument("--n-train", type=int, default=24, help="training examples of each run")
    parser.add_argument("--epochs", type=int, help="left out: the settings of the embedded model")
    parser.set_defaults(backends=["bridge"])
    args = measure.parsed(parser, argv)
    if args.quick:
        args.sizes, args.n_train, args.epochs = [1, 4], 8, 1
    before = torch.get_num_threads()
    counts = args.each_threads or sorted({1, args.threads or before})
    tasks = [load_task(name, data_dir=args.data_dir) for name in args.tasks]
    results: dict[str, Any] = {}
    for backend in args.backends:
        model = load_model(args.model, backend=backend, device=args.device)
        runs = listed_runs(
            model, tasks, max(args.sizes), component=args.component, n_train=args.n_train, epochs=args.epochs
        )
        for threads in counts:
            torch.set_num_threads(threads)
            found = compare(model, runs, args.sizes, args.rounds, f"{backend}, {threads} threads")
            results.setdefault(backend, {})[str(threads)] = found
            gains = ", ".join(f"R={n}: {f['gain']['median_ratio']:.2f}x" for n, f in found.items())
            print(f"{backend}, {threads} threads: {gains}")
    torch.set_num_threads(before)
    settings = {
        "command": args.command, "model": args.model, "tasks": args.tasks, "component": args.component,
        "n_train": args.n_train, "epochs": runs[0].config.epochs if runs[0].config else None, "device": args.device,
        "rounds": args.rounds, "sizes": args.sizes, "threads": counts,
    }  # fmt: skip
    record.write(args.out, "many", settings, results)


if __name__ == "__main__":
    main()
