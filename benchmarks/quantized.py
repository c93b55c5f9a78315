"""LoFiT on SmolLM2 and MQuAKE over quantized weights, beside the same over float32.

    python benchmarks/quantized.py --data-dir DATA

Step 1, step 2 with the preset's settings, and the first test rows before and after, for bases quantized by bitsandbytes (8 bit; 4
bit, nf4) and by torchao (8 bit, weights only). Of each: the heads that float32 chooses too, the rank correlation of the head
scores, the metrics, seconds. What was run is written after each base.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measure
import record
import torch
import transformers as tf

from lofit_lens import evaluate, load_model, load_task, model_info, select_heads, tune_offsets
from lofit_lens.analysis.overlap import score_agreement
from lofit_lens.heads import HeadScores
from lofit_lens.models import located

K, SEED = 27, 42


def _bitsandbytes(folder: Path, device: str, **settings: Any) -> Any:
    config = tf.BitsAndBytesConfig(**settings)
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": device}
    )


def _torchao(folder: Path, device: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    hf = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    quantize_(hf.model.layers, Int8WeightOnlyConfig())
    return hf


BASES: Mapping[str, Callable[[Path, str], Any]] = {
    "float32": lambda folder, device: folder,
    "bitsandbytes, 8 bit": lambda folder, device: _bitsandbytes(folder, device, load_in_8bit=True),
    "bitsandbytes, 4 bit nf4": lambda folder, device: _bitsandbytes(
        folder, device, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao, 8 bit": _torchao,
}


def run(name: str, args: Any) -> tuple[dict[str, Any], HeadScores]:
    """One base."""
    folder, _ = located(args.model)
    base = BASES[name](Path(folder), args.device)
    more: dict[str, Any] = {} if name == "float32" else {"tokenizer": folder, "name": args.model}
    model = load_model(base, backend="bridge", device=args.device, **more)
    task = load_task("mquake", data_dir=args.data_dir)
    start, found, seconds = time.perf_counter(), dict[str, Any](), dict[str, float]()

    def lap(what: str) -> None:
        nonlocal start
        seconds[what], start = time.perf_counter() - start, time.perf_counter()

    before = evaluate(model, task, limit=args.test)
    lap("evaluate")
    scores = select_heads(model, task, seed=SEED, n_train=args.train)
    lap("select")
    lofit = tune_offsets(model, task, scores.top(args.k), seed=SEED, n_train=args.train)
    lap("tune")
    with lofit.attached(model):
        after = evaluate(model, task, limit=args.test)
    for when, result in (("before", before), ("after", after)):
        found[when] = {k: {"mean": m.mean, "interval": m.interval, "n": m.n} for k, m in result.metrics.items()}
    return {"model": model_info(model).to_dict(), "heads": str(scores.top(args.k)), "seconds": seconds, **found}, scores


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "quantized", rounds=1, backends=False)
    parser.add_argument("--model", default="smollm2", help="as in load_model")
    parser.add_argument("--data-dir", type=Path, help="folder of the task's folder; left out: fetched")
    parser.add_argument("--train", type=int, default=40, help="training rows")
    parser.add_argument("--test", type=int, default=100, help="test rows")
    parser.add_argument("--k", type=int, default=K, help="heads")
    args = measure.parsed(parser, argv)
    if args.quick:
        args.train, args.test, args.k = 8, 2, 2
    settings = {"command": args.command, "train": args.train, "test": args.test, "k": args.k, "seed": SEED}
    results: dict[str, Any] = {}
    known: dict[str, HeadScores] = {}
    for name in BASES:
        if name.startswith("torchao") and find_spec("torchao") is None:
            print(f"{name}: left out, since torchao is not installed (pip install torchao)")
            continue
        results[name], known[name] = run(name, args)
        if name != "float32":
            shared = known["float32"].top(args.k) & known[name].top(args.k)
            rho = score_agreement({"float32": known["float32"], name: known[name]})["rho"].iloc[0]
            results[name] |= {"heads shared with float32": len(shared), "rank correlation with float32": float(rho)}
        em = [f"{results[name][when]['em']['mean']:.3f}" for when in ("before", "after")]
        print(f"{name}: exact match {' -> '.join(em)}, {results[name].get('heads shared with float32', args.k)} heads")
        record.write(args.out, "quantized", settings, results)


if __name__ == "__main__":
    main()
