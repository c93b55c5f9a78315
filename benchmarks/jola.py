"""JoLA beside LoFiT at equal tuning: as many trials on the validation rows each, then every seed once on the test rows.

    python benchmarks/jola.py                                      # the embedded model's tasks
    python benchmarks/jola.py --model smollm2 --tasks mquake --data-dir DATA

Of each: the metric with its interval over seeds and items, the paired test against LoFiT, learned numbers, settings, seconds of a
fit, edited heads; and how many of LoFiT's heads are among as many with JoLA's largest gates, beside chance. With `--out-store`
what ran is kept, and is not run again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import record

from lofit_lens import load_results, load_task, run_grid
from lofit_lens.analysis.measure import records
from lofit_lens.analysis.overlap import overlap
from lofit_lens.experiments.grid.specs import CHOSEN, Grid, ModelSpec, Run, TaskSpec
from lofit_lens.experiments.methods.base import OWN
from lofit_lens.experiments.tables.results import Results
from lofit_lens.organism.words import TASKS

GATES = "JoLA gates"


def found(results: Results, task: str) -> dict[str, Any]:
    """One task's rows and overlaps."""
    table = results.method_table(task)
    assert table is not None
    heads = {}
    for seed in results.seeds:
        own = results.adapter(task, seed=seed).heads
        gates = results.scores[task, GATES, seed].top(len(own))
        row = records(overlap({"LoFiT": own, "JoLA": gates}, shape=results.model.grid))[0]
        names = ("shared", "expected", "p_hypergeometric", "expected_layer", "p_layer")
        heads[str(seed)] = {"LoFiT": str(own), "JoLA": str(gates), **{n: row[n] for n in names}}
    edited = {m.method: [len(r.heads.split()) for r in m.runs] for m in table.methods}
    return {"table": records(table.to_frame()), "edited heads": edited, "heads": heads}


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write after each task."""
    parser = measure.options(__doc__, "jola", rounds=1, backends=False)
    parser.add_argument("--model", default="organism", help="as in load_model")
    parser.add_argument("--tasks", nargs="+", default=[f"organism/{t}" for t in TASKS])
    parser.add_argument("--data-dir", type=Path, help="folder of the task's folder; left out: fetched")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--test", type=int, help="test rows; left out: all")
    parser.add_argument("--k", default="K", help="heads of LoFiT")
    parser.add_argument("--out-store", type=Path, default=Path("build/jola"))
    args = measure.parsed(parser, argv)
    if args.quick:
        args.tasks, args.seeds, args.test = args.tasks[:1], 1, 4
    results: dict[str, Any] = {}
    for task in args.tasks:
        k = int(args.k) if args.k.isdecimal() else args.k
        grid = Grid(
            name=f"jola {task.replace('/', '-')}", model=(ModelSpec(name=args.model),), tasks=(TaskSpec(name=task),),
            seeds=tuple(range(args.seeds)), limit=args.test, scores=(GATES,),
            runs=(Run(method=("zero-shot",)), Run(heads=(OWN,), k=(k,), settings=CHOSEN), Run(method=("JoLA",), settings=CHOSEN)),
        )  # fmt: skip
        opened = load_task(task, data_dir=args.data_dir) if args.data_dir else load_task(task)
        run_grid(grid, args.out_store, tasks=[opened], device=args.device)
        results[task] = found(load_results(args.out_store, grids=[grid.name]), task)
        settings = {"model": args.model, "seeds": args.seeds, "test": args.test, "k": args.k}
        record.write(args.out, "jola", {"command": "python benchmarks/jola.py", **settings}, results)


if __name__ == "__main__":
    main()
