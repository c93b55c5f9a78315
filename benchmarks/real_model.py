"""LoFiT on SmolLM2 and MQuAKE with BOS in front of every text, and as the model's tokenizer does it (nothing in front).

K = 27 heads (10 %), the preset's settings, seed 42: step 1, step 2, exact match before and after on the first test rows.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import record

from lofit_lens import evaluate, load_model, load_task, model_info, select_heads, tune_offsets

K, SEED = 27, 42
WAYS = {"BOS in front": True, "as the tokenizer does": None}


def way(name: str, prepend_bos: bool | None, args: Any) -> dict[str, Any]:
    """One way to put texts in front of the model."""
    start = time.perf_counter()
    model = load_model(name, prepend_bos=prepend_bos, device=args.device)
    task = load_task("mquake", data_dir=args.data_dir)
    more = {"n_train": 8} if args.quick else {}
    before = evaluate(model, task, limit=args.limit)
    heads = select_heads(model, task, seed=SEED, **more).top(args.k)
    lofit = tune_offsets(model, task, heads, seed=SEED, **more)
    with lofit.attached(model):
        after = evaluate(model, task, limit=args.limit)
    found = {
        when: {k: {"mean": m.mean, "interval": m.interval, "n": m.n} for k, m in result.metrics.items()}
        for when, result in (("before", before), ("after", after))
    }
    return {
        "model": model_info(model).to_dict(), "heads": str(heads), "learned": lofit.n_parameters, **found,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "real_model", rounds=1, backends=False)
    parser.add_argument("--model", default="smollm2", help="as in load_model")
    parser.add_argument("--data-dir", type=Path, help="folder of the task's folder; left out: fetched")
    parser.add_argument("--limit", type=int, default=200, help="test rows")
    parser.add_argument("--k", type=int, default=K, help="heads")
    args = measure.parsed(parser, argv)
    if args.quick:
        args.limit, args.k = 2, 2
    results = {name: way(args.model, bos, args) for name, bos in WAYS.items()}
    for name, found in results.items():
        print(f"{name}: {found['before']['em']['mean']:.3f} -> {found['after']['em']['mean']:.3f}")
    settings = {"command": args.command, "limit": args.limit, "k": args.k, "seed": SEED}
    record.write(args.out, "real_model", settings, results)


if __name__ == "__main__":
    main()
