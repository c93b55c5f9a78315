"""Whole processes on SmolLM2 and MQuAKE, from start to end, beside plain transformers doing the same: CPU and wall seconds.

    python benchmarks/processes.py --data-dir DATA

- `eval`: `lofit-lens eval` of the first test rows with a LoFiT adapter attached, and plain `transformers.generate` on the same
  prompts, sorted by length, 16 at a time, with the same edit at the input of `o_proj`. The answers have to be the same.
- `select`: `lofit-lens select --max-steps 1`, and one training step of plain transformers on as many rows, with A on every head.
- `help`: `lofit-lens --help`.

`--former CHECKOUT` runs the evaluation of another checkout of the project too.

Every process gets one thread, and in every round all run one after the other. The adapter is drawn, not learned, with values of
about the size that training gives: it changes answers, and both ways have to agree on them.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
import record
import torch
from tqdm.auto import tqdm

from lofit_lens.interventions import Lofit
from lofit_lens.models import load_model, located, model_info, tokenizer_of
from lofit_lens.tasks import load_task
from lofit_lens.tasks.collate import encode, encode_training
from lofit_lens.training import preset

K, BATCH, STD = 27, 16, 0.05
FORMER = "former_"
PLAIN = Path(__file__).with_name("plain_transformers.py")


def ran(command: Sequence[str], former: Path | None) -> dict[str, float]:
    """CPU and wall seconds of a process on one thread, with the project's code or a former one's."""
    alone = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # `python -m` finds a package where it is started before the one that is installed.
    done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True, cwd=former)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "wall": wall}


def prepared(folder: Path, args: Any) -> dict[str, Any]:
    """Write the adapter, and what the plain process is given: token ids of prompts, rows of one training step, and the edit."""
    model, task = load_model(args.model, device="cpu"), load_task("mquake", data_dir=args.data_dir)
    info, tokenizer = model_info(model), tokenizer_of(model)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(info.n_layers, info.n_heads, generator=generator)
    chosen = scores >= scores.flatten().topk(args.k).values[-1]
    heads = [(int(layer), int(head)) for layer, head in chosen.nonzero()]
    lofit = Lofit.for_model(model, heads).init_("v", seed=0, std=STD)
    lofit.save_pretrained(folder / "adapter")
    settings = preset(info, task.family, task.objective)
    rows = [encode_training(tokenizer, e)[0] for e in task.training_examples("train", n=None, seed=0)]
    given = {
        "model": str(located(args.model)[0]),
        "prompts": [encode(tokenizer, e.prompt) for e in task.examples("test", limit=args.limit)],
        "rows": [(list(r.ids), r.start) for r in rows[: settings.select.batch_size]],
        "v": lofit.v.detach().tolist(), "max_new_tokens": task.max_new_tokens, "lr": settings.select.lr,
        "l1": settings.select.l1, "batch": BATCH,
    }  # fmt: skip
    (folder / "given.json").write_text(json.dumps(given))
    return {"model": info.to_dict(), "task": task.name, "data_hash": task.data_hash}


def commands(folder: Path, args: Any) -> dict[str, dict[str, list[str]]]:
    """What runs, by part and way."""
    shell = [sys.executable, "-m", "lofit_lens.cli"]
    asked = ["--model", args.model, "--task", "mquake", "--device", "cpu", "--quiet", "--overwrite"]
    asked += ["--data-dir", str(args.data_dir.resolve())] if args.data_dir else []
    plain = [sys.executable, str(PLAIN)]
    given = str(folder / "given.json")
    found = {
        "eval": {"plain": [*plain, "generate", given, str(folder / "plain.json")]},
        "select": {"plain": [*plain, "step", given, str(folder / "step.json")]},
        "help": {"lofit-lens": [*shell, "--help"]},
    }
    for backend in args.backends:
        on = ["--backend", backend]
        found["eval"][backend] = [
            *shell, "eval", *asked, *on, "--adapter", str(folder / "adapter"), "--limit", str(args.limit), "--out",
            str(folder / backend),
        ]  # fmt: skip
        if args.former:
            found["eval"][FORMER + backend] = [*found["eval"][backend][:-1], str(folder / (FORMER + backend))]
        found["select"][backend] = [
            *shell, "select", *asked, *on, "--max-steps", "1", "--out", str(folder / f"{backend}-heads"),
        ]  # fmt: skip
    return found


def same_answers(folder: Path, ways: Sequence[str]) -> dict[str, float]:
    """Share of answers that are those of the plain process, for each way."""
    plain = json.loads((folder / "plain.json").read_text())
    shares = {}
    for way in ways:
        items = [json.loads(line) for line in (folder / way / "items.jsonl").read_text().splitlines()]
        shares[way] = sum(i["generated"] == p for i, p in zip(items, plain, strict=True)) / len(plain)
    return shares


def summed_up(seconds: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians, and ratios to the plain process within each round."""
    found: dict[str, Any] = {}
    for part, ways in seconds.items():
        for kind in ("cpu", "wall"):
            values = {way: [s[kind] for s in rounds] for way, rounds in ways.items()}
            found.setdefault(part, {})[kind] = measure.compared(
                values, "plain" if "plain" in values else next(iter(values))
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "processes", rounds=3)
    parser.add_argument("--model", default="smollm2", help="as in load_model")
    parser.add_argument("--data-dir", type=Path, help="folder of MQuAKE's folder; left out: fetched")
    parser.add_argument("--limit", type=int, default=200, help="test rows")
    parser.add_argument("--former", type=Path, help="another checkout")
    parser.add_argument("--k", type=int, default=K, help="heads of the adapter")
    args = measure.parsed(parser, argv)
    if args.quick:
        args.limit, args.k = 4, 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = prepared(folder, args)
        listed = commands(folder, args)
        seconds: dict[str, dict[str, list[dict[str, float]]]] = {p: {w: [] for w in ways} for p, ways in listed.items()}
        with tqdm(total=args.rounds * sum(map(len, listed.values())), desc="processes") as bar:
            for _ in range(args.rounds):
                for part, ways in listed.items():
                    for way, command in ways.items():
                        seconds[part][way].append(ran(command, args.former if way.startswith(FORMER) else None))
                        bar.update()
        ways = [w for w in listed["eval"] if w != "plain"]
        results = {**summed_up(seconds), "same_answers": same_answers(folder, ways)}
    settings = {
        "command": args.command,
        "limit": args.limit,
        "rounds": args.rounds,
        "device": "cpu",
        "k": args.k,
        **told,
    }
    record.write(args.out, "processes", settings, results)
    for part, kinds in results.items():
        print(
            part,
            json.dumps({w: round(f["median_ratio"], 2) for w, f in kinds["cpu"].items()} if "cpu" in kinds else kinds),
        )


if __name__ == "__main__":
    main()
