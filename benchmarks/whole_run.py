"""A whole run, select + tune + evaluate, against a straightforward implementation of the same (`straightforward.py`).

    python benchmarks/whole_run.py --data-dir DATA

Both get the same random Llama with the same tokenizer (trained on the task's own texts), the same rows, seeds and settings: the
paper's for Llama-2-7B, all its epochs. `--share` of the real training rows and the same share of the real test rows are used,
so that training and evaluation keep their proportion. Both have to choose the same heads and to find the same metrics; the file
holds the differences. Times are ratios within a round. Tokens are counted at the model's door.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import record
import straightforward
import torch
from tqdm.auto import tqdm

from lofit_lens.evaluation import evaluate
from lofit_lens.heads import HeadScores
from lofit_lens.models import load_model, model_info
from lofit_lens.tasks import ChoiceExample, GenerationExample, PairExample, Task, load_task
from lofit_lens.training import Preset, objective, preset, select_heads, tune_offsets

TASKS = ("truthfulqa", "mquake", "clutrr")
PHASES = ("select", "tune", "evaluate")
SEED = 42


@dataclasses.dataclass
class Run:
    """What a whole run found, and what each phase took."""

    heads: list[str] = dataclasses.field(default_factory=list)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    values: torch.Tensor | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    said: list[Any] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    def phase(self, name: str, model: Any, call: Callable[[], Any]) -> Any:
        """Run a phase, with its time and its tokens."""
        with measure.counted_tokens(model) as tokens:
            found, self.seconds[name] = measure.clocked(call, str(next(model.parameters()).device))
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
    run.heads, run.values = sorted(map(str, heads)), lofit.v.detach().cpu()
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
    run.heads, run.values = sorted(map(str, heads)), v.cpu()
    run.losses = {"select": losses_A, "tune": losses_v}
    run.said = [s[0] if isinstance(s, list) else s for s in said]  # of choices the best answer's
    return run


def agreement(a: Run, b: Run) -> dict[str, Any]:
    """How far two runs are apart."""
    assert a.values is not None
    assert b.values is not None
    texts = isinstance(a.said[0], str)
    return {
        "same_heads": a.heads == b.heads,
        "heads": a.heads,
        "losses": {p: max(abs(x - y) for x, y in zip(a.losses[p], b.losses[p], strict=True)) for p in a.losses},
        "offsets": float((a.values - b.values).abs().max()),
        "metrics": {name: abs(a.metrics[name] - b.metrics[name]) for name in a.metrics},
        "same_texts": sum(x == y for x, y in zip(a.said, b.said, strict=True)) / len(a.said) if texts else None,
        "scores_nats": None if texts else max(abs(x - y) for x, y in zip(a.said, b.said, strict=True)),
    }


def one_task(model: Any, task: Task, settings: Preset, rounds: int, n_train: int, n_test: int) -> dict[str, Any]:
    """Both ways, round by round."""
    ways = {"straightforward": plain, "library": library}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for way in ways.values():  # warm-up, and what the library tries once a model
        few = Preset(*(dataclasses.replace(c, epochs=1) for c in (settings.select, settings.tune)), settings.k)
        way(model, task, few, min(2, n_train), 1)
    with tqdm(total=rounds * len(ways), desc=f"{task.name}, {model_info(model).backend}", leave=False) as bar:
        for i in range(rounds):
            for name in sorted(ways, reverse=bool(i % 2)):
                runs[name].append(ways[name](model, task, settings, n_train, n_test))
                bar.update()
    seconds = {
        name: {p: [r.seconds[p] for r in found] for p in PHASES} | {"total": [sum(r.seconds.values()) for r in found]}
        for name, found in runs.items()
    }
    first = {name: found[0] for name, found in runs.items()}
    return {
        "train_rows": n_train, "test_rows": n_test, "k": settings.k,
        "steps": {p: len(losses) for p, losses in first["library"].losses.items()},
        "metrics": first["library"].metrics,
        "gain": {p: measure.ratio(seconds["straightforward"][p], seconds["library"][p]) for p in (*PHASES, "total")},
        "median_seconds": {n: {p: statistics.median(s) for p, s in found.items()} for n, found in seconds.items()},
        "tokens": {name: run.tokens for name, run in first.items()},
        "difference": agreement(first["straightforward"], first["library"]),
    }  # fmt: skip


def texts_of(task: Task) -> list[str]:
    """What the tokenizer is trained on: all texts of a task, a primer once."""
    found = []
    for e in (*task.training_examples("train", n=None), *task.examples("test")):
        found.append(e.prompt.rsplit("\n\n", 1)[-1])
        if isinstance(e, PairExample):
            found += [e.chosen, e.rejected]
        elif isinstance(e, ChoiceExample):
            found += [*e.true, *e.false]
        elif isinstance(e, GenerationExample):
            found += e.references
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "whole_run", rounds=1)
    parser.add_argument("--data-dir", type=Path, help="folder of the three tasks' folders; left out: fetched")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--share", type=float, default=1 / 32, help="of the real training rows and test rows")
    parser.add_argument("--epochs", type=int, help="left out: the paper's")
    args = measure.parsed(parser, argv)
    results: dict[str, Any] = {}
    started, hashes = time.perf_counter(), {}
    for name in args.tasks:
        task = load_task(name, data_dir=args.data_dir)
        hashes[task.name] = task.data_hash
        n_train = max(2, round(args.share * len(task.training_examples("train"))))
        n_test = max(2, round(args.share * len(task.examples("test"))))
        if args.quick:
            n_train, n_test, args.epochs = 4, 3, 1
        with tempfile.TemporaryDirectory() as folder:
            measure.build(Path(folder), texts_of(task), measure.TINY if args.quick else measure.SHAPE)
            for backend in args.backends:
                model = load_model(folder, backend=backend, device=args.device)
                base = preset(model_info(model), task.family, task.objective)
                settings = Preset(
                    base.select.with_changes(epochs=args.epochs), base.tune.with_changes(epochs=args.epochs), base.k
                )
                found = one_task(model, task, settings, args.rounds, n_train, n_test)
                results.setdefault(name, {})[backend] = found
                print(f"{name}, {backend}: {found['gain']['total']['median_ratio']:.2f}x, {found['difference']}")
    settings = {
        "command": args.command, "shape": measure.TINY if args.quick else measure.SHAPE, "dtype": "float32",
        "device": args.device, "rounds": args.rounds, "share": args.share, "epochs": args.epochs or base.tune.epochs,
        "batch_size": base.tune.batch_size, "seed": SEED, "data_hashes": hashes,
        "prompts_decoded_together": straightforward.BATCH, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    record.write(args.out, "whole_run", settings, results)


if __name__ == "__main__":
    main()
