"""One training step against plain Hugging Face with SDPA doing the same forward and backward, interleaved in one run.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model smollm2 --sizes 8x64

A random Llama, or another model, on random tokens, frozen; the output of every head (input of `o_proj`) is scaled by `1 + A`, A
trainable in float32; cross-entropy at the label places; backward to A. Variants:

hf_sdpa     plain Hugging Face, SDPA, the edit by a forward-pre-hook on `o_proj`: the floor. Logits of all places, no cache.
hf_eager    the same with eager attention.
*_as_is     a TransformerLens class with the adapter attached, its own attention, logits of all places.
*_ours      the same class with fused attention, and logits of the label places only, read in parts.
*_checkpointed  as ours, and every block is run again in the backward.

Labels stand at all places, or at the last quarter (an answer behind a prompt; the floor takes all logits and the loss at the
labels). "Low" cases edit the upper quarter of the layers only, below which no backward has to go. Times are ratios within a
round. Bytes saved for backward count each storage once, weights left out. Peak memory is what one step takes above the loaded
model, each variant in a process of its own.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
import record
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from lofit_lens.heads import HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.models import checkpointed, frozen, fused_attention, load_model, located, logits_of, read_at
from lofit_lens.training.losses import NO_LABEL, sft_loss, token_log_probs

FLOOR = "hf_sdpa"
Step = Callable[[], tuple[float, Tensor]]  # one forward and backward: the loss, and the gradient of A


@dataclass(frozen=True)
class Case:
    """What one step runs on.

    Attributes:
        rows: sequences.
        length: tokens of each.
        labels: share of the places, the last ones, that are labels.
        lowest: share of the layers, the lower ones, that are not edited.
    """

    rows: int
    length: int
    labels: float = 1.0
    lowest: float = 0.0

    @property
    def name(self) -> str:
        """E.g. `8x128, labels 25 %, lowest 75 %`."""
        low = f", lowest {self.lowest:.0%}" if self.lowest else ""
        return f"{self.rows}x{self.length}, labels {self.labels:.0%}{low}"

    def batch(self, d_vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Random tokens, a mask of ones, and which tokens are labels (never the first)."""
        tokens = torch.randint(3, d_vocab, (self.rows, self.length), generator=torch.Generator().manual_seed(0))
        labels = torch.zeros_like(tokens, dtype=torch.bool)
        labels[:, max(1, round(self.length * (1 - self.labels))) :] = True
        return tokens.to(device), torch.ones_like(tokens).to(device), labels.to(device)


def cases(sizes: Sequence[Sequence[int]]) -> list[Case]:
    """Each size with labels everywhere and at a quarter; the first also with the upper layers edited alone."""
    return [*(c for n, m in sizes for c in (Case(n, m), Case(n, m, 0.25))), Case(*sizes[0], 0.25, 0.75)]


def variants(backends: Sequence[str]) -> list[str]:
    """All of them, the floor first."""
    return [FLOOR, "hf_eager", *(f"{b}_{how}" for b in backends for how in ("as_is", "ours", "checkpointed"))]


class Models:
    """Models by the first word of a variant's name, loaded when first asked for."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.made: dict[str, Any] = {}

    def of(self, variant: str) -> Any:
        """The model of a variant."""
        kind = variant if variant.startswith("hf_") else variant.split("_", maxsplit=1)[0]
        if kind not in self.made:
            if kind.startswith("hf_"):
                made = tf.AutoModelForCausalLM.from_pretrained(
                    located(self.model)[0],
                    attn_implementation=kind.removeprefix("hf_"),
                    dtype=getattr(torch, self.dtype),
                )
                self.made[kind] = made.to(self.device).eval().requires_grad_(False)
            else:
                self.made[kind] = load_model(self.model, backend=kind, device=self.device, dtype=self.dtype)
        return self.made[kind]


def start(shape: tuple[int, int, int], case: Case) -> Lofit:
    """The adapter every variant's numbers come from: A large enough to matter, on the heads of the case."""
    lowest = round(shape[0] * case.lowest)
    heads = HeadSet([(layer, head) for layer in range(lowest, shape[0]) for head in range(shape[1])])
    return Lofit(shape, heads).init_("A", seed=0, std=0.05).train_only("A")


@contextlib.contextmanager
def ready(models: Models, variant: str, case: Case) -> Iterator[Step]:
    """A variant's step on a case, with all that it needs in place."""
    model = models.of(variant)
    if variant.startswith("hf_"):
        context = plain_step(model, case, models.device)
    else:
        context = lens_step(model, case, models.device, variant.split("_", maxsplit=1)[1])
    with context as (A, loss_of):

        def step() -> tuple[float, Tensor]:
            A.grad = None
            loss = loss_of()
            loss.backward()
            assert A.grad is not None
            return loss.item(), A.grad

        step.loss_of = loss_of  # type: ignore[attr-defined]
        yield step


@contextlib.contextmanager
def plain_step(model: Any, case: Case, device: str) -> Iterator[tuple[nn.Parameter, Callable[[], Tensor]]]:
    """Plain Hugging Face: the edit by hooks, logits of all places."""
    cfg = model.config
    n_heads, d_head = cfg.num_attention_heads, cfg.hidden_size // cfg.num_attention_heads
    lofit = start((cfg.num_hidden_layers, n_heads, d_head), case).to(device)
    A = lofit.A
    tokens, mask, labels = case.batch(cfg.vocab_size, device)
    targets = F.pad(torch.where(labels, tokens, NO_LABEL)[:, 1:], (0, 1), value=NO_LABEL).flatten()

    def edit(layer: int) -> Callable[[Any, Any], tuple[Tensor]]:
        def scale(module: Any, args: Any) -> tuple[Tensor]:
            z = args[0].unflatten(-1, (n_heads, d_head))
            return ((z * (1 + A[layer])).to(z.dtype).flatten(-2),)

        return scale

    def loss_of() -> Tensor:
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=NO_LABEL)

    with contextlib.ExitStack() as stack:
        for layer in lofit.heads.layers:
            handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(edit(layer))
            stack.callback(handle.remove)
        yield A, loss_of


@contextlib.contextmanager
def lens_step(model: Any, case: Case, device: str, how: str) -> Iterator[tuple[nn.Parameter, Callable[[], Tensor]]]:
    """A TransformerLens class with the library's adapter: as it is, or with the shortcuts."""
    lofit = start((model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head), case).to(device)
    tokens, mask, labels = case.batch(model.cfg.d_vocab, device)
    at = F.pad(labels[:, 1:], (0, 1))

    def as_is() -> Tensor:
        return sft_loss(logits_of(model, tokens, mask), tokens, labels)

    def ours() -> Tensor:
        wanted = tokens[labels]
        return -read_at(model, tokens, mask, at, lambda logits, part: token_log_probs(logits, wanted[part])).mean()

    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(lofit.attached(model))
        if how != "as_is":
            stack.enter_context(fused_attention(model))
        if how == "checkpointed":
            stack.enter_context(checkpointed(model))
        yield lofit.A, as_is if how == "as_is" else ours


def one_case(models: Models, names: Sequence[str], case: Case, rounds: int) -> dict[str, Any]:
    """Times, agreement and saved bytes of all variants on one case."""
    seconds = measure.interleaved(
        {name: lambda name=name: ready(models, name, case) for name in names},
        rounds=rounds, device=models.device, desc=case.name,
    )  # fmt: skip
    found = measure.compared(seconds, FLOOR)
    floor: tuple[float, Tensor] | None = None
    for name in names:
        with ready(models, name, case) as step:
            with measure.saved_for_backward(models.of(name)) as saved:
                step.loss_of()  # type: ignore[attr-defined]
                found[name]["saved_for_backward_mib"] = saved() / measure.MIB
            loss, gradient = step()
            if name == FLOOR or name.endswith("_ours"):
                found[name]["largest_operations_ms"] = operations(step)
        floor = floor or (loss, gradient.clone())
        found[name] |= {
            "loss": loss,
            "loss_difference": abs(loss - floor[0]),
            "gradient_difference": float((gradient - floor[1]).abs().max() / floor[1].abs().max()),
        }
    return found


def operations(step: Step, *, most: int = 6) -> dict[str, float]:
    """Where a step's time goes: the operations with the most time of their own, in ms."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with measure.silenced(), torch.profiler.profile(activities=kinds) as profile:
        step()
    own = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3 for e in profile.key_averages()}
    return dict(sorted(own.items(), key=lambda item: -item[1])[:most])


def peaks(model: str, variant: str, device: str, dtype: str, threads: int, listed: Sequence[Case]) -> dict[str, float]:
    """Peak MiB of a step on each case; run in a process of its own."""
    torch.set_num_threads(threads)
    models, found = Models(model, device, dtype), {}
    with ready(models, variant, Case(1, 16)) as step:
        step()
    for case in listed:
        with ready(models, variant, case) as step:
            found[case.name] = measure.peak_mib(step, device)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "train_step", rounds=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--model", help="as in load_model; left out: a random Llama")
    parser.add_argument("--sizes", nargs="+", default=["8x128", "2x512"], help="rows x tokens")
    args = measure.parsed(parser, argv)
    sizes = [(2, 16)] if args.quick else [[int(n) for n in size.split("x")] for size in args.sizes]
    shape = measure.TINY if args.quick else measure.SHAPE
    listed, names = cases(sizes), variants(args.backends)
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            measure.build(Path(folder), ["a b c"], shape)
        model = args.model or folder
        models = Models(model, args.device, args.dtype)
        results = {case.name: one_case(models, names, case, args.rounds) for case in listed}
        models.made.clear()
        threads = torch.get_num_threads()
        calls = [(model, name, args.device, args.dtype, threads, listed) for name in names]
        for name, found in zip(names, measure.in_own_processes(peaks, calls), strict=True):
            for case, mib in found.items():
                results[case][name]["peak_memory_mib"] = mib
    settings = {
        "command": args.command, "model": args.model or f"random Llama ({', '.join(f'{k} {v}' for k, v in shape.items())})",
        "dtype": args.dtype, "device": args.device, "rounds": args.rounds,
        "floor": FLOOR, "cases": {c.name: asdict(c) for c in listed},
    }  # fmt: skip
    record.write(args.out, "train_step", settings, results)
    for case, found in results.items():
        print(f"{case}: " + ", ".join(f"{name} {f['median_ratio']:.2f}" for name, f in found.items()))


if __name__ == "__main__":
    main()
