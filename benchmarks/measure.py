"""What the benchmarks share: their options, a small random model, interleaved timing, and memory."""

import argparse
import contextlib
import functools
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm

from lofit_lens.models import hooked_class

RESULTS = Path("benchmarks/results")
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 32000,
}
TINY = SHAPE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
MIB = 2**20
# A variant to time: entering it (not timed) makes it ready and gives the call that is timed.
Variant = Callable[[], contextlib.AbstractContextManager[Callable[[], Any]]]


# ------------------------------------------------------------------------------------------------------------ options


def options(doc: str | None, name: str, *, rounds: int, backends: bool = True) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        f"{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, help="of torch; left out: as many as it takes by itself")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if backends:
        classes = ["hooked", "bridge"] if hooked_class() is not None else ["bridge"]
        parser.add_argument("--backends", nargs="+", default=classes, choices=["hooked", "bridge"])
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: to see that it runs")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the command in `.command`; sets the number of threads and one round if quick."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.command = command(parser.prog, words)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.rounds = 1
    quiet()
    return args


def quiet() -> None:
    """No word and no bar of transformers' own."""
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


def command(program: str, words: Sequence[str]) -> str:
    """What was typed, without the folders of the machine: DATA stands for --data-dir's; --out and --former are left out."""
    kept, given = [], iter(word for w in words for word in (w.split("=", 1) if w.startswith("--") else [w]))
    for word in given:
        if word in ("--data-dir", "--former", "--out"):
            next(given, None)
            kept += ["--data-dir", "DATA"] if word == "--data-dir" else []
        else:
            kept.append(word)
    return " ".join(["python", f"benchmarks/{program}", *kept])


# -------------------------------------------------------------------------------------------------------------- model


def tokenizer_for(texts: Iterable[str], *, size: int = 8000) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE trained on texts; ids 0, 1, 2 are padding, BOS and EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))  # fmt: skip
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llama_config(shape: Mapping[str, int], **more: Any) -> tf.LlamaConfig:
    """A Llama of a given shape."""
    return tf.LlamaConfig(
        **shape, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        **more,
    )  # fmt: skip


def build(folder: Path, texts: Iterable[str], shape: Mapping[str, int] = SHAPE) -> None:
    """Write a random Llama and a tokenizer trained on texts."""
    torch.manual_seed(0)
    tf.LlamaForCausalLM(llama_config(shape)).save_pretrained(folder)
    tokenizer_for(texts).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------------------- time


def wait(device: str) -> None:
    """Until the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clocked(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What a call gives, and seconds it took."""
    wait(device)
    start = time.perf_counter()
    found = call()
    wait(device)
    return found, time.perf_counter() - start


def interleaved(
    variants: Mapping[str, Variant], *, rounds: int, device: str, desc: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every variant in every round; in each round all run one after the other, beginning with another one."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(rounds + warm_up) * len(names), desc=desc, leave=False) as bar:
        for i in range(-warm_up, rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                with variants[name]() as call:
                    _, took = clocked(call, device)
                if i >= 0:
                    seconds[name].append(took)
                bar.update()
    return seconds


def compared(seconds: Mapping[str, Sequence[float]], floor: str) -> dict[str, dict[str, Any]]:
    """Each variant's median seconds, and its ratio to the floor: the median over rounds of the ratios within a round."""
    return {
        name: {"median_seconds": statistics.median(values), **ratio(values, seconds[floor])}
        for name, values in seconds.items()
    }


def ratio(values: Sequence[float], floor: Sequence[float]) -> dict[str, Any]:
    """Median of the ratios of two rows of figures taken in the same rounds, and all of them."""
    ratios = [a / b for a, b in zip(values, floor, strict=True)]
    return {"median_ratio": statistics.median(ratios), "ratios": ratios}


# ------------------------------------------------------------------------------------------------------------- memory


def resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def peak_mib(call: Callable[[], Any], device: str) -> float:
    """MiB at the peak of a call, above what was taken before it: resident, or on a GPU the allocator's."""
    with peaked(device) as peak:
        call()
    return peak()


@contextlib.contextmanager
def peaked(device: str) -> Iterator[Callable[[], float]]:
    """Yields a function that tells, after the block, the MiB at its peak above what was taken before it; see `peak_mib`."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - before) / MIB
        return
    done, seen = threading.Event(), [resident_mib()]

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(seen) - seen[0]
    finally:
        done.set()
        watcher.join()


def in_own_processes(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a function gives for each of several arguments, each in a new process whose freed memory goes back at once.

    Raises:
        RuntimeError: a process ended without a result.
    """
    with _environment(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536"):
        return [in_a_process(function, *call) for call in tqdm(calls, "memory", leave=False)]


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a new process.

    Raises:
        RuntimeError: the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(theirs, function, *arguments))
    child.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError as e:
        raise RuntimeError(f"{function.__name__}{arguments} ended without a result (its error is above)") from e
    finally:
        child.join()


def _send(pipe: Any, function: Callable[..., Any], *arguments: Any) -> None:
    quiet()
    pipe.send(function(*arguments))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Nothing that C code writes to standard error is seen (torch's profiler says when it starts and stops)."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function that tells the bytes that graphs made in the block keep, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # a graph that keeps its own outputs would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield lambda: sum(seen.values())


# ------------------------------------------------------------------------------------------------------------- tokens


@contextlib.contextmanager
def counted_tokens(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts, over all passes of the block, the tokens a model is given and those of them that are no padding."""
    found = {"padded": 0, "real": 0}

    # Not by a hook: under somebody's hooks the library leaves some of its shortcuts out.
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens, mask = args[0], kwargs.get("attention_mask")
        found["padded"] += tokens.numel()
        found["real"] += tokens.numel() if mask is None else int(mask[:, -tokens.shape[1] :].sum())
        return own(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del model.forward
