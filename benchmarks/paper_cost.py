"""What the paper's grids would take on one accelerator: cells counted from the grids, time and memory from a cost model.

    python benchmarks/paper_cost.py --data-dir DATA

Nothing is run and no weights are read. Each grid is expanded as `lofit-lens grid paper/NAME --dry-run` does, with the real rows
of TruthfulQA, MQuAKE and CLUTRR; a cell costs

    FLOP / (peak * share) + decoding steps * bytes of the weights / (bandwidth * share)

FLOP     2 a parameter and token forward; as much again for the backward, which has no gradients of weights to take; 2 * width *
         vocabulary a scored token. Each training row is run in full in every epoch, above and below the edited layers.
decoding one step a new token and batch, up to the task's limit; it reads all weights.
memory   weights, and what one training pass keeps for the backward: the model fitted by `scaling.py`, at as many tokens as a
         pass has at most (the rows of `--together` runs, 8192 tokens where that is less).

Rows of TriviaQA, NQ and MMLU are not read: their public numbers and a length are assumed. What no term holds (Python, kernels'
launches, loading, reading files) is not in the result: take it for an order of magnitude.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import measure
import record

from lofit_lens.experiments.grid.expand import Setting, expand
from lofit_lens.experiments.grid.paper import PARTS, grid_named
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.models import ModelInfo
from lofit_lens.tasks import ChoiceExample, GenerationExample, OptionExample, Task, load_task
from lofit_lens.tasks.statements import statements
from lofit_lens.training import Passes

BUDGET = Passes().token_budget  # padded tokens of a pass
BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Model:
    """Shape of one of the paper's models, from its public configuration."""

    n_layers: int
    n_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    vocab: int
    tied: bool = False

    @property
    def in_layers(self) -> int:
        """Parameters of all layers' matrices."""
        return self.n_layers * (4 * self.d_model * self.n_heads * self.d_head + 3 * self.d_model * self.d_mlp)

    @property
    def parameters(self) -> int:
        """All."""
        return self.in_layers + (1 if self.tied else 2) * self.vocab * self.d_model


MODELS = {
    "google/gemma-7b": Model(28, 16, 256, 3072, 24576, 256000, tied=True),
    "meta-llama/Llama-2-7b-hf": Model(32, 32, 128, 4096, 11008, 32000),
    "meta-llama/Llama-2-13b-hf": Model(40, 40, 128, 5120, 13824, 32000),
}
# rows, tokens of a prompt, tokens of its answers, new tokens
ASSUMED = {"triviaqa": (17944, 24, 0, 24), "nq": (3610, 14, 0, 24), "mmlu": (14042, 110, 4, 0)}


@dataclasses.dataclass(frozen=True)
class Load:
    """Work of one cell: tokens run forward and backward, scored tokens, steps of decoding, tokens scored with a backward."""

    forward: float = 0.0
    backward: float = 0.0
    scored: float = 0.0
    steps: float = 0.0
    learned: float = 0.0

    def __add__(self, other: "Load") -> "Load":
        return Load(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def flop(self, model: Model) -> float:
        """Of the layers and of the unembedding."""
        unembedding = 2.0 * model.vocab * model.d_model * (self.scored + self.learned)
        return 2.0 * model.in_layers * (self.forward + self.backward) + unembedding


class Sizes:
    """Tokens of a task's rows, at so many a word."""

    def __init__(self, task: Task, per_word: float) -> None:
        self.task = task
        self.tokens: Callable[[str], float] = lambda text: per_word * len(text.split())

    def tested(self, rows: Sequence[Any], batch: int) -> Load:
        """A front that all prompts share is run once; each question once; answers behind it."""
        load = Load()
        fronts = {r.prompt.rpartition("\n\n")[0] for r in rows}
        front = self.tokens(next(iter(fronts))) if len(fronts) == 1 else 0.0
        for row in rows:
            own = self.tokens(row.prompt) - front
            if isinstance(row, ChoiceExample | OptionExample):
                answers = row.options if isinstance(row, OptionExample) else (row.best, *row.true, *row.false)
                said = sum(map(self.tokens, answers))
                load += Load(forward=own + said, scored=said)
            elif isinstance(row, GenerationExample):
                load += Load(forward=own, scored=1 + self.task.max_new_tokens)
        if isinstance(rows[0], GenerationExample):
            load += Load(steps=-(-len(rows) // batch) * self.task.max_new_tokens)
        return load + Load(forward=front)

    def trained(self, n: int | None, seed: int, epochs: int) -> Load:
        """Every row in every epoch; DPO runs both answers, and once more for the reference."""
        rows = self.task.training_examples(n=n, seed=seed)
        lengths = [self.lengths(r) for r in rows]
        tokens, answers = sum(sum(le) for le in lengths), sum(self.tokens(a) for r in rows for a in self.sides(r))
        reference = Load(forward=tokens, scored=answers) if self.task.objective == "dpo" else Load()
        learned = epochs * answers
        return Load(epochs * tokens, epochs * tokens, learned, learned=learned) + reference

    def sides(self, row: Any) -> tuple[str, ...]:
        """Answers that a training row has."""
        return (row.chosen, row.rejected) if self.task.objective == "dpo" else (row.answer,)

    def lengths(self, row: Any) -> list[float]:
        """Tokens of each sequence of a training row."""
        return [self.tokens(row.prompt) + self.tokens(side) for side in self.sides(row)]

    def longest(self, together: int, batch: int) -> int:
        """Padded tokens of a training pass at most."""
        most = max(sum(self.lengths(r)) for r in self.task.training_examples())
        return round(min(BUDGET, together * batch * most))

    def recorded(self, seed: int) -> Load:
        """Statements of training and validation rows, forward alone."""
        found = [s for split in ("train", "val") for s in statements(self.task, split, seed=seed)]
        return Load(forward=sum(self.tokens(s.prompt) + self.tokens(s.answer) for s in found))


def assumed(name: str) -> Task:
    """A task of the public number of rows that are all alike; words stand for tokens."""
    n, prompt, answers, new = ASSUMED[name]
    text = "w " * prompt
    rows = (GenerationExample(text, ("w",)),) * n if new else (OptionExample(text, ("w",) * answers, 0),) * n
    return Task(name, "sft", {}, {"test": rows}, "em" if new else "accuracy", max_new_tokens=new or 16)


def load_of(cell: Cell, sizes: dict[str, Sizes], batch: int) -> Load:
    """Work of a cell."""
    spec, row = cell.spec, cell.row
    if cell.spec["kind"] == "damage":
        return Load(forward=2 * 50 * 512, scored=2 * 50 * 512)
    own = sizes[row["task"]]
    if spec["kind"] == "test":
        tested = sizes[row["tested"]]
        return tested.tested(tested.task.test["test"], batch)
    seed, config = int(spec["seed"]), spec["config"]
    by = spec["by"] if spec["kind"] == "scores" else spec["method"]
    if config:
        learned = own.trained(spec["n_train"], seed, config["epochs"])
    elif by in ("ITI", "RepE", "probe accuracy", "probing layers"):
        learned = own.recorded(seed)
    elif by == "gradient attribution":
        learned = own.trained(spec["n_train"], seed, 1)
    else:
        assert by == "zero-shot", by
        learned = Load()
    if spec["kind"] == "scores":
        return learned
    return learned + own.tested(own.task.test[spec["split"]], batch)


def cost(
    name: str, tasks: Iterable[Task], sizes: dict[str, Sizes], kept: dict[str, float], args: Any
) -> list[dict[str, Any]]:
    """One of the paper's grids, a row a model."""
    grid, rows = grid_named(f"paper/{name}"), []
    for spec in grid.model:
        m = MODELS[spec.name]
        info = ModelInfo(spec.name, "main", "bridge", False, spec.dtype, m.n_layers, m.n_heads, m.d_model, m.vocab)
        others = {n: sizes[n].task for n in ASSUMED} if grid.other_tasks else {}
        cells = expand(Setting(grid, info, {t.name: t for t in tasks}, others, "texts" if grid.texts else ""))
        work = sum((load_of(c, sizes, grid.batch_size) for c in cells), Load())
        peak, size = args.peak_tflops[spec.dtype] * 1e12, BYTES[spec.dtype]
        seconds = work.flop(m) / (peak * args.share) + work.steps * size * m.parameters / (
            args.bandwidth * 1e12 * args.share
        )
        memory = {
            together: max(_kept(m, sizes[t.name].longest(together, 8), kept, size) for t in tasks)
            for together in (1, 8)
        }
        rows.append({
            "grid": f"paper/{name}", "model": spec.name, "dtype": spec.dtype, "cells": len(cells), "flop": work.flop(m),
            "decoding_steps": work.steps, "hours": seconds / 3600, "weights_gib": size * m.parameters / 2**30,
            "kept_gib_together_8": memory[8], "kept_gib_alone": memory[1],
        })  # fmt: skip
    return rows


def _kept(m: Model, tokens: int, kept: dict[str, float], size: int) -> float:
    """GiB for the backward at so many tokens; a tenth of them scored; the fit is of float32."""
    numbers = (
        kept["residual"] * m.d_model * m.n_layers
        + kept["mlp"] * m.d_mlp * m.n_layers
        + kept["vocabulary"] * m.vocab / 10
    )
    return (tokens * numbers + kept["constant"]) * size / 4 / 2**30


def table(found: dict[str, Any]) -> str:
    """Markdown, as it stands in docs/paper.md."""
    lines = [
        "| grid | model | type | cells | 10^15 FLOP | decoding steps | GPU minutes | weights, GiB | kept, GiB: 8 runs, 1 run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["grids"]:
        lines.append(
            f"| `{r['grid']}` | {r['model'].split('/')[1]} | {r['dtype']} | {r['cells']} | {r['flop'] / 1e15:,.0f} | "
            f"{r['decoding_steps']:,.0f} | {60 * r['hours']:,.0f} | {r['weights_gib']:.1f} | "
            f"{r['kept_gib_together_8']:.1f} / {r['kept_gib_alone']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(
        "paper_cost.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="with truthfulqa, mquake and clutrr in it")
    parser.add_argument("--scaling", type=Path, default=measure.RESULTS / "scaling.json")
    parser.add_argument("--per-word", type=float, default=1.35, help="tokens a word")
    parser.add_argument("--bfloat16", type=float, default=989.0, help="peak of the accelerator, TFLOP/s, dense")
    parser.add_argument("--float32", type=float, default=67.0, help="the same in float32")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of its memory, TB/s")
    parser.add_argument("--share", type=float, default=0.45, help="of either that is reached")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "paper_cost.json")
    args = parser.parse_args(argv)
    args.peak_tflops = {"bfloat16": args.bfloat16, "float32": args.float32}
    tasks = [
        load_task(name, fold=0 if name == "truthfulqa" else None, data_dir=args.data_dir / name)
        for name in ("truthfulqa", "mquake", "clutrr")
    ]
    sizes = {t.name: Sizes(t, args.per_word) for t in tasks} | {n: Sizes(assumed(n), 1.0) for n in ASSUMED}
    kept = json.loads(args.scaling.read_text())["results"]["bridge"]["memory"]["coefficients"]
    rows = {
        t.name: {"train": len(t.training_examples()), "test": len(t.test["test"]),
                 "training_tokens": statistics.mean(sum(sizes[t.name].lengths(r)) for r in t.training_examples())}
        for t in tasks
    }  # fmt: skip
    found = {"rows": rows, "grids": [row for part in (*PARTS, "all") for row in cost(part, tasks, sizes, kept, args)]}
    settings = {k: getattr(args, k) for k in ("per_word", "bfloat16", "float32", "bandwidth", "share")}
    record.write(
        args.out, "paper_cost", {"command": "python benchmarks/paper_cost.py --data-dir DATA", **settings}, found
    )
    print(table(found))


if __name__ == "__main__":
    main()
