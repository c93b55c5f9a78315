"""Multiple-choice scoring against the one-choice-at-a-time loop of the official evaluation, interleaved in one run.

    python benchmarks/mc_eval.py --data-dir DATA --out benchmarks/results/mc_eval.json

The loop runs prompt + answer from the start for every answer, batch of one. Both use the same model, the same token ids and
the official six-shot prompt of TruthfulQA. Times are ratios within a run: in every round the methods run one after the other,
the loop on a few of the questions (its cost is one pass an answer), the scorer on all of them. Memory is the peak above what
the loaded model takes, each method in a process of its own (resident memory, sampled every 5 ms; on a GPU the allocator's
peak).
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import record
import torch
from tqdm.auto import tqdm

from lofit_lens.evaluation.scoring import TOKEN_BUDGET, score_encoded
from lofit_lens.interventions import Lofit
from lofit_lens.models import device_of, frozen, load_model, logits_of, tokenizer_of
from lofit_lens.tasks import ChoiceExample, load_task
from lofit_lens.tasks.collate import Encoded, collate, encode_continuations, pad_id
from lofit_lens.training.losses import summed_log_probs

Questions = list[tuple[Encoded, ...]]
Scorer = Callable[[Any, Questions], list[list[float]]]
CHOICES = (2, 4, 8, 16, 32)


@torch.no_grad()
def one_by_one(model: Any, questions: Questions) -> list[list[float]]:
    """Every answer by a forward pass of its own over the whole prompt."""
    fill, device = pad_id(tokenizer_of(model)), device_of(model)
    scores = []
    with frozen(model):
        for answers in questions:
            scores.append([])
            for answer in answers:
                batch = collate([answer], pad_id=fill, device=device)
                logits = logits_of(model, batch.tokens, batch.mask)
                scores[-1].append(float(summed_log_probs(logits, batch.tokens, batch.labels)[0]))
    return scores


def shared(model: Any, questions: Questions) -> list[list[float]]:
    """The library's scorer."""
    return score_encoded(model, questions, token_budget=TOKEN_BUDGET)


METHODS: dict[str, Scorer] = {"one_by_one": one_by_one, "shared": shared}


def encode(model: Any, examples: list[ChoiceExample]) -> Questions:
    """The answers of each question, joined with its prompt."""
    tokenizer = tokenizer_of(model)
    return [encode_continuations(tokenizer, e.prompt, tuple(dict.fromkeys((*e.true, *e.false)))) for e in examples]


def with_choices(model: Any, examples: list[ChoiceExample], n: int) -> Questions:
    """The same questions with exactly `n` answers each, drawn in order from all answers there are."""
    pool = [a for e in examples for a in (*e.true, *e.false)]
    return [
        encode_continuations(tokenizer_of(model), e.prompt, [pool[(i * n + j) % len(pool)] for j in range(n)])
        for i, e in enumerate(examples)
    ]


def timed(model: Any, questions: Questions, rounds: int, slow: int, desc: str) -> dict[str, Any]:
    """Seconds a question of both methods, and their ratio, round by round.

    The loop runs `slow` of the questions a round, others each time; its time is taken to all of them by the number of
    answers, since its cost is one pass an answer.
    """
    for method in METHODS.values():
        method(model, questions[:2])  # warm-up
    answers, device = sum(map(len, questions)), str(device_of(model))
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    apart = []
    for i in tqdm(range(rounds), desc=desc):
        some = [q % len(questions) for q in range(i * slow, i * slow + min(slow, len(questions)))]
        one, share = measure.clocked(lambda some=some: one_by_one(model, [questions[q] for q in some]), device)
        every, whole = measure.clocked(lambda: shared(model, questions), device)
        seconds["one_by_one"].append(share * answers / sum(len(questions[q]) for q in some) / len(questions))
        seconds["shared"].append(whole / len(questions))
        apart += [
            abs(a - b) for q, scores in zip(some, one, strict=True) for a, b in zip(scores, every[q], strict=True)
        ]
    ratios = [one / all_ for one, all_ in zip(seconds["one_by_one"], seconds["shared"], strict=True)]
    return {
        "questions": len(questions), "answers": answers, "median_ratio": statistics.median(ratios), "ratios": ratios,
        "median_seconds_a_question": {k: statistics.median(v) for k, v in seconds.items()},
        "largest_difference_nats": max(apart), "answers_compared": len(apart),
    }  # fmt: skip


def peak_memory(folder: str, backend: str, device: str, name: str, examples: list[ChoiceExample]) -> float:
    """MiB above the loaded model at the peak; run in a process of its own."""
    model = load_model(folder, backend=backend, device=device)
    questions = encode(model, examples)
    METHODS[name](model, [questions[0][:1]])
    return measure.peak_mib(lambda: METHODS[name](model, questions), device)


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "mc_eval", rounds=3)
    parser.add_argument("--data-dir", type=Path, help="folder with TruthfulQA's files; left out: fetched")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--slow", type=int, default=6, help="questions of the loop in each round")
    args = measure.parsed(parser, argv)
    shape = measure.TINY if args.quick else measure.SHAPE
    if args.quick:
        args.questions, args.slow = 4, 2
    task = load_task("truthfulqa", data_dir=args.data_dir)
    every = [e for e in task.examples("test") if isinstance(e, ChoiceExample)]
    examples = every[: args.questions]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = [
            t for e in every for t in (e.prompt.rsplit("\n\n", 1)[-1], *e.true, *e.false)
        ]  # a primer would shrink it
        measure.build(Path(folder), texts, shape)
        for backend in args.backends:
            model = load_model(folder, backend=backend, device=args.device)
            found: dict[str, Any] = {
                "truthfulqa": timed(model, encode(model, examples), args.rounds, args.slow, backend)
            }
            zero = Lofit.for_model(model)
            with zero.attached(model):
                found["truthfulqa_with_adapter"] = timed(
                    model, encode(model, examples), args.rounds, args.slow, f"{backend}, adapter"
                )
            few = examples[: max(2, args.questions // 4)]
            found["by_number_of_choices"] = {
                str(n): timed(model, with_choices(model, few, n), args.rounds, 2, f"{backend}, {n} choices")
                for n in CHOICES
            }
            calls = [(folder, backend, args.device, name, examples[:27]) for name in METHODS]
            found["peak_memory_mib"] = dict(zip(METHODS, measure.in_own_processes(peak_memory, calls), strict=True))
            results[backend] = found
            del model
    settings = {
        "command": args.command, "shape": shape, "dtype": "float32", "device": args.device, "questions": args.questions,
        "rounds": args.rounds, "questions_of_the_loop": args.slow, "token_budget": TOKEN_BUDGET, "task": task.name,
        "data_hash": task.data_hash,
    }  # fmt: skip
    record.write(args.out, "mc_eval", settings, results)
    for backend, found in results.items():
        main_, memory = found["truthfulqa"], found["peak_memory_mib"]
        print(
            f"{backend}: {main_['median_ratio']:.1f}x less time a question "
            f"({found['truthfulqa_with_adapter']['median_ratio']:.1f}x with an adapter), scores within "
            f"{main_['largest_difference_nats']:.1e} nats, peak memory {memory['shared']:.0f} MiB "
            f"against {memory['one_by_one']:.0f}; by choices: "
            + ", ".join(f"{n}: {f['median_ratio']:.1f}x" for n, f in found["by_number_of_choices"].items())
        )


if __name__ == "__main__":
    main()
