"""The demo as a grid: on the embedded model, and on a small real language model.

Step 1 chooses heads and step 2 tunes offsets on them. Baselines are the unmodified model, as many random heads, and all heads
(embedded model) or ITI with as many heads (real model). `cli/demo.py` runs it and reports the results.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lofit_lens.experiments.grid.specs import OTHERS, Grid, ModelSpec, Run, TaskSpec
from lofit_lens.experiments.methods.base import ALL, OWN, RANDOM
from lofit_lens.experiments.tables.results import Results
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.organism.words import TASKS

REAL_MODEL, REAL_TASK = "smollm2", "mquake"
REAL_HEADS = "10 %"  # 27 of SmolLM2's 270; the 3 % of the paper's far larger models would be 8
PROBES = "probe accuracy"  # ITI's choice of heads
PARTS_OF_REAL = (
    "heads by step 1, offsets by step 2, then bare model, LoFiT, as many random heads and ITI on the same questions"
)
VALIDATION_ROWS = 32  # rows on which ITI's strength is chosen: four strengths on all 95 would take as long as two tests


def embedded_grid(
    model: str = "organism", *, backend: str = "auto", seeds: Sequence[int] = (0, 1), draws: int = 5, full: bool = False
) -> Grid:
    """Grid of the embedded model's three tasks; `full` adds offsets on the heads that the other tasks chose.

    Args:
        model: `"organism"`, or a folder written by `python -m lofit_lens.organism.train`.
        backend: as in `load_model`.
        seeds: of LoFiT.
        draws: of random heads.
        full: add the transfer matrix.
    """
    runs = [Run(method=("zero-shot",)), Run(heads=(OWN,)), Run(heads=(RANDOM,), draws=draws), Run(heads=(ALL,))]
    if full:
        runs.append(Run(heads=(OWN,), of=(OTHERS,)))
    tasks = tuple(TaskSpec(name=f"organism/{t}") for t in TASKS)
    spec = ModelSpec(name=model, backend=backend)
    return Grid(name="demo", model=(spec,), tasks=tasks, seeds=tuple(seeds), runs=tuple(runs))


def real_grid(
    model: str = REAL_MODEL, *, backend: str = "auto", seeds: Sequence[int] = (0,), draws: int = 1, limit: int = 200,
    data_dir: str | None = None,
) -> Grid:  # fmt: skip
    """Grid of MQuAKE on a real model, with a tenth of its heads.

    Args:
        model: as in `load_model`.
        backend: as in `load_model`.
        seeds: of LoFiT and ITI.
        draws: of random heads.
        limit: use only the first test rows.
        data_dir: folder with MQuAKE's files; None = they are fetched.
    """
    k = (REAL_HEADS,)
    return Grid(
        name="demo real", model=(ModelSpec(name=model, backend=backend),), tasks=(TaskSpec(name=REAL_TASK, data_dir=data_dir),),
        seeds=tuple(seeds), limit=limit, tuning_limit=VALIDATION_ROWS, scores=(OWN, PROBES),
        runs=(
            Run(method=("zero-shot",)), Run(heads=(OWN,), k=k), Run(heads=(RANDOM,), k=k, draws=draws), Run(method=("ITI",), k=k)
        ),
    )  # fmt: skip


def ranks(
    results: Results, known: Mapping[str, HeadSet], patching: Mapping[str, HeadScores] | None = None
) -> pd.DataFrame:
    """Rank of each known head among all heads, from 1: by A-norm (each seed) and by patching.

    Args:
        results: results of `embedded_grid`.
        known: last part of a task's name -> its heads.
        patching: last part of a task's name -> effects.
    """
    found = []
    for short, heads in known.items():
        for head in heads:
            by_norm = {
                f"A-norm, seed {s}": results.scores[f"organism/{short}", OWN, s].rank(head) for s in results.seeds
            }
            by_patch = {"patching": patching[short].rank(head)} if patching else {}
            found.append({"task": short, "head": str(head), **by_norm, **by_patch})
    return pd.DataFrame(found)


def questions(results: Results, n: int) -> list[dict[str, Any]]:
    """The first `n` test questions of the first task, with the bare model's answer and that of LoFiT's first seed.

    Returns:
        Records with `prompt`, `wanted` (the first right answer), `before` and `after` (the answers), `before_right` and
        `after_right`.
    """
    task = results.tasks[0]
    rows = (results.zero_shot(task), results.lofit(task, seed=results.seeds[0]))
    before, after = (results.evaluations[r.index[0]].items.to_dict("records") for r in rows)
    metric = results.metric(task)
    return [
        {
            "prompt": b["prompt"], "wanted": b["references"][0], "before": b["generated"], "before_right": b[metric] == 1,
            "after": a["generated"], "after_right": a[metric] == 1,
        }
        for b, a in list(zip(before, after, strict=True))[:n]
    ]  # fmt: skip


def run_table(results: Results) -> pd.DataFrame:
    """One row per run, with its own mean and 95 % interval over items; nothing in it depends on the machine's speed."""
    frame = results.runs.drop(columns=["fit_seconds", "eval_seconds"])
    bounds = [next(iter(e.metrics.values())).interval or (None, None) for e in results.evaluations]
    return frame.assign(low=[b[0] for b in bounds], high=[b[1] for b in bounds])
