"""The two readings of ITI side by side: how statements end, and where the shift begins when answers are scored.

    python benchmarks/iti.py --data-dir DATA

Probes of TruthfulQA's statements with and without a full stop at their end (`fit_probes(full_stop=...)`): accuracy of the K best
heads, heads in common, Spearman correlation of all heads' scores, cosine of the directions of the heads in common. Then MC1 and
MC2 of the shift by alpha at positions "answer", "second" and "predicting", and of the unmodified model. Probes are validated on
one in five of the training rows that are drawn.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import record
import torch

from lofit_lens import evaluate, fit_probes, load_model, load_task, model_info
from lofit_lens.analysis.overlap import score_agreement
from lofit_lens.evaluation.result import EvalResult
from lofit_lens.probing import Probes

SEED = 42
ENDS = {"full stop": True, "none": False}
POSITIONS = ("answer", "second", "predicting")


def scores_of(result: EvalResult) -> dict[str, Any]:
    """Means, intervals and rows, and how many answers the shift cannot reach."""
    metrics = {k: {"mean": m.mean, "interval": m.interval, "n": m.n} for k, m in result.metrics.items()}
    return {**metrics, "unreached": result.counted.get("answers that the edit cannot reach", 0)}


def probed(probes: Probes, k: int) -> dict[str, Any]:
    """What the K best heads' probes reach."""
    best, meta = probes.scores.top(k), probes.scores.meta
    return {
        "heads": str(best), "accuracy": float(np.mean([probes.scores[h] for h in best])), "majority": meta["majority"],
        "n_fitting": meta["n_fitting"], "n_validation": meta["n_validation"],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    parser = measure.options(__doc__, "iti", rounds=1, backends=False)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="truthfulqa")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--train", type=int, help="training rows; left out: all")
    parser.add_argument("--test", type=int, help="test rows; left out: all; 0: probes alone")
    parser.add_argument("--k", type=int, default=27)
    parser.add_argument("--alphas", type=float, nargs="+", default=[5.0, 15.0])
    args = measure.parsed(parser, argv)
    if args.quick:
        args.train, args.test, args.k, args.alphas = 8, 2, 2, [5.0]
    model, task = load_model(args.model, device=args.device), load_task(args.task, data_dir=args.data_dir)
    task = replace(task, training={"train": task.training["train"]})
    made = {end: fit_probes(model, task, seed=SEED, n_train=args.train, full_stop=stop) for end, stop in ENDS.items()}
    one, other = made.values()
    both = one.scores.top(args.k) & other.scores.top(args.k)
    cosines = torch.cosine_similarity(one.direction(), other.direction(), dim=-1)
    rho = score_agreement({end: p.scores for end, p in made.items()})["rho"].iloc[0]
    found: dict[str, Any] = {
        "model": model_info(model).to_dict(), "probes": {end: probed(p, args.k) for end, p in made.items()},
        "heads_in_common": len(both), "rank_correlation": float(rho),
        "cosines_in_common": [round(float(cosines[h]), 4) for h in both],
        "shifted": [],
    }  # fmt: skip
    if args.test != 0:
        found["unmodified"] = scores_of(evaluate(model, task, limit=args.test))
        print("unmodified", found["unmodified"])
    for end, probes in made.items():
        for alpha in args.alphas if args.test != 0 else ():
            for positions in POSITIONS:
                with probes.iti(args.k, alpha=alpha, positions=positions).attached(model):
                    result = evaluate(model, task, limit=args.test)
                row = {"statements": end, "alpha": alpha, "positions": positions, **scores_of(result)}
                found["shifted"].append(row)
                print(end, alpha, positions, {k: round(v["mean"], 3) for k, v in row.items() if isinstance(v, dict)})
    print({k: v for k, v in found.items() if k not in ("model", "shifted")})
    record.write(args.out, "iti", {"command": args.command, "seed": SEED, "k": args.k}, found)


if __name__ == "__main__":
    main()
