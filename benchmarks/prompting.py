"""What a small instruction-tuned model answers without training, by how it is asked: bare, through its chat template, few-shot.

    python benchmarks/prompting.py --model FOLDER --data-dir DATA

SmolLM2-135M-Instruct on test rows of MQuAKE and CLUTRR: exact match, and whether the answer is contained. Few-shot: solved rows
of the training split in front of each question. `table` renders what stands in docs/howto/chat.md.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import record

from lofit_lens.evaluation import evaluate
from lofit_lens.models import load_model, model_info
from lofit_lens.tasks import Task, load_task

TASKS = ("mquake", "clutrr")
SHOTS = 4
WAYS: dict[str, Callable[[Task], Task]] = {
    "bare": lambda task: task,
    "chat": lambda task: task.as_chat(),
    "few-shot": lambda task: task.few_shot(SHOTS),
    "few-shot chat": lambda task: task.few_shot(SHOTS).as_chat(),
}


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for each way to ask, exact match and contained for each task."""
    head = "".join(f" {name}, em | contains |" for name in results)
    lines = [f"| asked |{head}", f"|---|{'---|' * 2 * len(results)}"]
    for way in WAYS:
        cells = (results[name][way]["metrics"][metric] for name in results for metric in ("em", "contains"))
        lines.append(f"| {way} | {' | '.join(_cell(c) for c in cells)} |")
    return "\n".join(lines)


def _cell(metric: Mapping[str, Any]) -> str:
    mean, low, high = (f"{x:.3f}".removeprefix("0") for x in (metric["mean"], *metric["interval"]))
    return f"{mean} [{low}, {high}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "prompting", rounds=1, backends=False)
    parser.add_argument("--model", default="smollm2", help="as in load_model")
    parser.add_argument("--data-dir", type=Path, help="folder of the tasks' folders; left out: fetched")
    parser.add_argument("--limit", type=int, default=200, help="test rows of each task")
    parser.add_argument("--batch-size", type=int, default=100, help="prompts generated together")
    args = measure.parsed(parser, argv)
    if args.quick:
        args.limit = 2
    model = load_model(args.model, device=args.device)
    results: dict[str, Any] = {}
    for name in TASKS:
        task = load_task(name, data_dir=args.data_dir)
        results[name] = {}
        for way, asked in WAYS.items():
            start = time.perf_counter()
            found = evaluate(model, asked(task), limit=args.limit, batch_size=args.batch_size, label=way)
            results[name][way] = {
                "task": found.task, "data_hash": found.data_hash,
                "metrics": {m: {"mean": v.mean, "interval": v.interval, "n": v.n} for m, v in found.metrics.items()},
                "answers": found.items["generated"].head(5).tolist(), "seconds": time.perf_counter() - start,
            }  # fmt: skip
            print(f"{name}, {way}: {found}")
    settings = {
        "command": args.command,
        "model": model_info(model).to_dict(),
        "limit": args.limit,
        "batch_size": args.batch_size,
        "shots": SHOTS,
    }
    record.write(args.out, "prompting", settings, results)
    print(table(results))


if __name__ == "__main__":
    main()
