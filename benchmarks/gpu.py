"""Head selection, memory and many runs on a GPU at the shapes of Pythia-1.4B, Llama-2-7B and Llama-2-13B, random bf16 weights.

    python benchmarks/gpu.py

Nothing is fetched: models are made from their configuration on the GPU, tasks are random words. Real tokens (no padding) a second
are counted as 4N FLOP each, N = parameters without the embeddings, plus the unembedding's at scored tokens, and divided by the
fastest of some large bfloat16 matrix products taken just before: the share of the ceiling. What does not fit into the memory is
recorded as such. Exits with 2 where there is no GPU.
"""

import gc
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import many
import measure
import record
import torch
import transformers as tf
from tqdm.auto import tqdm

from lofit_lens.models import load_model
from lofit_lens.models.fused import fused_refusal
from lofit_lens.tasks import Task, load_task
from lofit_lens.training import TrainConfig, select_heads
from lofit_lens.training.objective import encoded_rows

WORDS = [f"w{i}" for i in range(500)]
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}


def llama(d_model: int, n_layers: int, n_heads: int, d_mlp: int, vocab: int = 32000) -> tf.LlamaConfig:
    """A Llama."""
    return measure.llama_config({
        "hidden_size": d_model, "num_hidden_layers": n_layers, "num_attention_heads": n_heads, "intermediate_size": d_mlp,
        "vocab_size": vocab,
    }, attn_implementation="eager")  # fmt: skip


def pythia(d_model: int, n_layers: int, n_heads: int, vocab: int = 50304) -> tf.GPTNeoXConfig:
    """A Pythia."""
    return tf.GPTNeoXConfig(
        vocab_size=vocab, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        intermediate_size=4 * d_model, max_position_embeddings=2048, **IDS,
    )  # fmt: skip


def shapes(*, quick: bool) -> dict[str, tf.PretrainedConfig]:
    """Configurations by name."""
    if quick:
        return {
            "pythia-1.4b": pythia(32, 2, 4, 1000), "llama-2-7b": llama(32, 2, 4, 48, 1000),
            "llama-2-13b": llama(48, 2, 4, 64, 1000),
        }  # fmt: skip
    return {
        "pythia-1.4b": pythia(2048, 24, 16), "llama-2-7b": llama(4096, 32, 32, 11008), "llama-2-13b": llama(5120, 40, 40, 13824)
    }  # fmt: skip


def made(config: tf.PretrainedConfig, tokenizer: Any, backend: str, device: str) -> tuple[Any, int, int]:
    """A random model in bfloat16, made on the device; its parameters but for both embeddings, and those of the unembedding."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            hf = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    unembedding = hf.get_output_embeddings().weight.numel()
    counted = sum(p.numel() for p in hf.parameters()) - hf.get_input_embeddings().weight.numel() - unembedding
    model = load_model(hf.eval(), tokenizer=tokenizer, backend=backend, dtype="bfloat16", device=device)
    return model, counted, unembedding


def scored_share(model: Any, task: Task) -> float:
    """Label tokens of a task's rows as a share of all their tokens: where the unembedding is applied."""
    rows = [form for forms in encoded_rows(model, task.training_examples("train")) for form in forms]
    return sum(form.n_labels for form in rows) / sum(len(form.ids) for form in rows)


def words_task(n: int, mean_words: int) -> Task:
    """`n` rows to learn: prompts of a half to one and a half times as many random words, answers of one to three."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(f" {draw.choice(WORDS)}" for _ in range(draw.randint(low, high)))

    rows = [
        {"prompt": text(max(1, mean_words // 2), 3 * mean_words // 2), "answer": text(1, 3)}
        for _ in tqdm(range(n), "rows", leave=False)
    ]
    return Task.from_records(f"words-{mean_words}", train=rows, test=rows[:1])


def ceiling(device: str, *, size: int, rounds: int) -> float:
    """FLOP a second of the fastest of some bfloat16 matrix products, medians over rounds."""
    found = []
    for m, n, k in ((size, size, size), (size // 2, 2 * size, size), (2 * size, size, size // 2)):
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        seconds = [measure.clocked(lambda a=a, b=b: a @ b, device)[1] for _ in range(rounds + 2)][2:]
        found.append(2 * m * n * k / statistics.median(seconds))
    return max(found)


def selection(model: Any, task: Task, config: TrainConfig, device: str) -> dict[str, Any]:
    """Seconds of a whole head selection, its tokens, the time of its steps, and its peak memory."""
    ends: list[float] = []

    def on_step(record: Any) -> None:
        measure.wait(device)
        ends.append(time.perf_counter())

    def run() -> None:
        select_heads(model, task, config=config, on_step=on_step, progress=False)

    with measure.counted_tokens(model) as tokens:
        took: list[float] = []
        peak = measure.peak_mib(lambda: took.append(measure.clocked(run, device)[1]), device)
    steps = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "seconds": took[0], "steps": len(ends), "median_step_seconds": statistics.median(steps),
        "tokens": dict(tokens), "tokens_a_second": tokens["real"] / took[0], "peak_memory_mib": peak,
    }  # fmt: skip


def one_shape(name: str, config: tf.PretrainedConfig, args: Any) -> dict[str, Any]:
    """All that is measured of one shape."""
    tokenizer = measure.tokenizer_for([f" {w}" for w in WORDS])
    model, counted, unembedding = made(config, tokenizer, args.backend, args.device)
    flops = ceiling(args.device, size=args.matrix, rounds=5)
    found: dict[str, Any] = {
        "parameters_counted": counted, "unembedding": unembedding, "ceiling_tflops": flops / 1e12,
        "fused_refusal": fused_refusal(model),
        "weights_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / measure.MIB, "selection": {},
    }  # fmt: skip
    settings = TrainConfig(lr=5e-3, l1=5e-4, epochs=args.epochs)
    for mean in args.tokens:
        task = words_task(args.examples, mean)
        select_heads(model, task, config=settings.with_changes(max_steps=2), progress=False)  # warm-up
        took = [selection(model, task, settings, args.device) for _ in range(args.rounds)]
        scored = scored_share(model, task)
        through = counted + scored * unembedding  # weights that a token meets, on average
        share = [4 * through * t["tokens_a_second"] / flops for t in took]
        found["selection"][str(mean)] = {
            **took[0], "seconds": statistics.median(t["seconds"] for t in took),
            "tokens_a_second": statistics.median(t["tokens_a_second"] for t in took),
            "scored_share": scored, "share_of_ceiling": statistics.median(share), "shares": share,
        }  # fmt: skip
    if name in args.many_at:
        task = words_task(args.examples, args.tokens[0])
        runs = many.listed_runs(
            model, [task], max(args.runs), n_train=8 * args.many_steps, epochs=1, max_steps=args.many_steps
        )
        found["many"] = many.compare(model, runs, args.runs, args.rounds, f"{name}, many")
    return found


def tried(call: Any, device: str) -> dict[str, Any]:
    """What a call gives, or that the memory did not suffice."""
    try:
        return call()
    except torch.OutOfMemoryError as e:
        return {"error": f"out of memory: {str(e).splitlines()[0]}"}
    finally:
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "gpu", rounds=2, backends=False)
    parser.set_defaults(device="cuda")
    parser.add_argument("--backend", default="bridge", choices=["hooked", "bridge"])
    parser.add_argument("--shapes", nargs="+", default=list(shapes(quick=True)), choices=list(shapes(quick=True)))
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[170, 512], help="mean tokens of an example (CLUTRR: 170)"
    )
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=8192, help="side of the products that the ceiling is taken from")
    parser.add_argument("--runs", nargs="+", type=int, default=[4, 8], help="numbers of runs in one pass")
    parser.add_argument("--many-at", nargs="*", default=["llama-2-7b"])
    parser.add_argument("--many-steps", type=int, default=10)
    parser.add_argument("--organism-sizes", nargs="*", type=int, default=[4, 8, 16, 36, 64])
    args = measure.parsed(parser, argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu.py needs a GPU: torch sees no CUDA device here", file=sys.stderr)
        sys.exit(2)
    if not args.device.startswith("cuda") and not args.quick:
        print(f"gpu.py measures a GPU; on {args.device} only --quick runs, with tiny shapes", file=sys.stderr)
        sys.exit(2)
    if args.quick:
        args.tokens, args.examples, args.epochs, args.matrix = [12], 16, 1, 64
        args.runs, args.many_steps, args.organism_sizes = [2], 2, [2]
    listed = {name: config for name, config in shapes(quick=args.quick).items() if name in args.shapes}
    results: dict[str, Any] = {"shapes": {}}
    for name, config in listed.items():
        results["shapes"][name] = tried(lambda name=name, config=config: one_shape(name, config, args), args.device)
        print(name, results["shapes"][name])
    if args.organism_sizes:
        results["organism"] = tried(lambda: organism(args), args.device)
        print("organism", results["organism"])
    settings = {
        "command": args.command, "dtype": "bfloat16", "device": args.device, "backend": args.backend, "rounds": args.rounds,
        "examples": args.examples, "epochs": args.epochs, "batch_size": TrainConfig(lr=1.0).batch_size,
        "tokens": args.tokens, "quick": args.quick, "many_steps": args.many_steps,
    }  # fmt: skip
    record.write(args.out, "gpu", settings, results)


def organism(args: Any) -> dict[str, Any]:
    """Many runs of the embedded model, in float32."""
    model = load_model("organism", backend=args.backend, device=args.device)
    n_train = 8 if args.quick else 24
    runs = many.listed_runs(model, [load_task(n) for n in many.TASKS], max(args.organism_sizes), n_train=n_train)
    return many.compare(model, runs, args.organism_sizes, args.rounds, "organism")


if __name__ == "__main__":
    main()
