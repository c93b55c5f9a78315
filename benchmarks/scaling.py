"""Cost of a training step against heads, layers, tokens and model size; a cost model fitted to it; what it says of 7B, 13B, 70B.

    python benchmarks/scaling.py

Time of a step (seconds), all coefficients at least 0:

    a * forward FLOP + b * backward FLOP + c * attention FLOP + d * edited numbers + e * layer passes + f

forward FLOP    2 a parameter and token (unembedding: a scored token)
backward FLOP   the same above the lowest edited layer, unembedding included; none below it
attention FLOP  4 * d_model a layer and pair of query and key, twice that again for the backward above the lowest edited layer
edited numbers  d_model a token and edited layer
layer passes    layers run forward and layers run backward: what each costs whatever it holds

Memory: bytes that a step keeps for the backward (float32), fitted alike on numbers of the residual stream's width, of the MLP's
and of the vocabulary. The fit minimizes relative errors. The prediction for another machine takes FLOP, peak and share alone. On
the machine measured it goes far beyond what was measured, so take it for an order of magnitude.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measure
import numpy as np
import record
import torch
import torch.nn.functional as F
import transformers as tf
from scipy.optimize import nnls

from lofit_lens.heads import HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.models import frozen, fused_attention, load_model, logits_at
from lofit_lens.training.losses import token_log_probs

VOCAB = 32000


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama."""

    d_model: int
    n_layers: int
    d_mlp: int
    n_heads: int
    n_kv: int
    vocab: int = VOCAB

    @property
    def in_layer(self) -> int:
        """Parameters of one layer's matrices."""
        kv = 2 * self.d_model * self.d_model * self.n_kv // self.n_heads
        return 2 * self.d_model**2 + kv + 3 * self.d_model * self.d_mlp

    @property
    def parameters(self) -> int:
        """All, embedding and unembedding included."""
        return self.n_layers * self.in_layer + 2 * self.vocab * self.d_model

    def config(self) -> tf.LlamaConfig:
        """For Hugging Face."""
        return measure.llama_config({
            "hidden_size": self.d_model, "intermediate_size": self.d_mlp, "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads, "num_key_value_heads": self.n_kv, "vocab_size": self.vocab,
        }, attn_implementation="eager")  # fmt: skip


def small(d_model: int, n_layers: int, vocab: int = VOCAB) -> Shape:
    """Llama's proportions: heads of 64 numbers, an MLP of 2.75 times the width."""
    n_heads = max(1, d_model // 64)
    return Shape(d_model, n_layers, d_model * 11 // 4, n_heads, n_heads, vocab)


LARGE = {
    "Llama-2-7B": Shape(4096, 32, 11008, 32, 32),
    "Llama-2-13B": Shape(5120, 40, 13824, 40, 40),
    "Llama-2-70B": Shape(8192, 80, 28672, 64, 8),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One step: a model, a batch, the edited heads (`per_layer` of each layer from `lowest` on), a share of scored places."""

    shape: Shape
    rows: int = 8
    length: int = 128
    lowest: int = 0
    per_layer: int | None = None
    layers: int | None = None
    scored: float = 0.25

    @property
    def edited(self) -> range:
        """Edited layers."""
        return range(self.lowest, self.shape.n_layers if self.layers is None else self.lowest + self.layers)

    @property
    def heads(self) -> int:
        """Edited heads."""
        return len(self.edited) * (self.shape.n_heads if self.per_layer is None else self.per_layer)

    def flop(self) -> dict[str, float]:
        """Forward, backward, attention."""
        tokens, s = self.rows * self.length, self.shape
        above = s.n_layers - self.lowest
        head = 2 * s.vocab * s.d_model * tokens * self.scored
        pairs = 4 * s.d_model * self.rows * self.length**2
        return {
            "forward": 2.0 * s.n_layers * s.in_layer * tokens + head,
            "backward": 2.0 * above * s.in_layer * tokens + head,
            "attention": float(pairs * (s.n_layers + 2 * above)),
        }

    def time_features(self) -> list[float]:
        """What a step's time is made of, in the order of `TIME`."""
        edited = float(len(self.edited) * self.shape.d_model * self.rows * self.length)
        return [*self.flop().values(), edited, float(2 * self.shape.n_layers - self.lowest), 1.0]

    def kept_features(self) -> list[float]:
        """Numbers that a step keeps for the backward, in the order of `KEPT`."""
        tokens, above = self.rows * self.length, self.shape.n_layers - self.lowest
        return [
            float(tokens * above * self.shape.d_model), float(tokens * above * self.shape.d_mlp),
            float(tokens * self.scored * self.shape.vocab), 1.0,
        ]  # fmt: skip


TIME = ("forward", "backward", "attention", "edited", "layer_passes", "constant")
KEPT = ("residual", "mlp", "vocabulary", "constant")


def points(base: Shape, *, quick: bool = False) -> dict[str, Point]:
    """What is measured: one thing changed at a time, and some together."""
    d, n = base.d_model, base.n_layers
    made = {
        "base": Point(base),
        "1 head a layer": Point(base, per_layer=1),
        "all heads of layer 0": Point(base, layers=1),
        "1 head of layer 0": Point(base, layers=1, per_layer=1),
        **{f"from layer {low}": Point(base, lowest=low) for low in (n // 4, n // 2, 3 * n // 4, n - 1)},
        **{f"{k} layers": Point(small(d, k, base.vocab)) for k in (n // 4, n // 2, 3 * n // 2)},
        **{
            f"{r}x{length}": Point(base, r, length) for r, length in ((1, 128), (2, 128), (4, 128), (2, 512), (1, 1024))
        },
        **{f"width {w}": Point(small(w, n, base.vocab)) for w in (d // 2, 3 * d // 4, 3 * d // 2)},
        f"width {2 * d}, {n // 2} layers": Point(small(2 * d, n // 2, base.vocab), 4),
        "all places scored": Point(base, scored=1.0),
    }
    if quick:
        made = {name: dataclasses.replace(p, length=p.length // 8) for name, p in list(made.items())[:8]}
    return made


class Models:
    """One model a shape, made when first asked for."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device, self.made = backend, device, {}
        self.tokenizer = measure.tokenizer_for(["a b c"])

    def of(self, shape: Shape) -> Any:
        """The model of a shape."""
        if shape not in self.made:
            torch.manual_seed(0)
            self.made[shape] = load_model(
                tf.LlamaForCausalLM(shape.config()), tokenizer=self.tokenizer, backend=self.backend, device=self.device
            )
        return self.made[shape]


@contextlib.contextmanager
def ready(models: Models, point: Point) -> Iterator[Callable[[], torch.Tensor]]:
    """The forward of a point; `.backward()` of what it gives is the rest of the step."""
    model, s = models.of(point.shape), point.shape
    take = s.n_heads if point.per_layer is None else point.per_layer
    heads = HeadSet([(layer, head) for layer in point.edited for head in range(take)])
    lofit = Lofit.for_model(model, heads).init_("A", seed=0).train_only("A")
    tokens = torch.randint(3, s.vocab, (point.rows, point.length), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros_like(tokens, dtype=torch.bool)
    labels[:, max(1, round(point.length * (1 - point.scored))) :] = True
    tokens, labels = tokens.to(models.device), labels.to(models.device)
    mask, at = torch.ones_like(tokens), F.pad(labels[:, 1:], (0, 1))

    def loss_of() -> torch.Tensor:
        return -token_log_probs(logits_at(model, tokens, mask, at), tokens[labels]).mean()

    with frozen(model), lofit.attached(model), fused_attention(model):
        yield loss_of


@contextlib.contextmanager
def whole_step(models: Models, point: Point) -> Iterator[Callable[[], None]]:
    """A point's forward and backward."""
    with ready(models, point) as loss_of:
        yield lambda: loss_of().backward()


def kept_bytes(models: Models, point: Point) -> int:
    """Bytes a step keeps for the backward."""
    with ready(models, point) as loss_of, measure.saved_for_backward(models.of(point.shape)) as saved:
        loss = loss_of()
        found = saved()
        del loss
    return found


def fitted(features: Sequence[Sequence[float]], values: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Coefficients of at least 0 with the least relative errors; R^2, residuals, and errors when a point is left out."""
    x, y = np.array(features), np.array(values)

    def solve(rows: np.ndarray) -> np.ndarray:
        scaled = x[rows] / y[rows, None]
        size = np.maximum(scaled.max(axis=0), 1e-300)
        return nnls(scaled / size, np.ones(rows.sum()))[0] / size

    every = np.ones(len(y), dtype=bool)
    found = solve(every)
    guess = x @ found
    left_out = []
    for i in range(len(y)):
        rows = every.copy()
        rows[i] = False
        left_out.append(float(x[i] @ solve(rows) / y[i] - 1))
    return {
        "coefficients": dict(zip(names, found.tolist(), strict=True)),
        "r2": float(1 - ((y - guess) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        "relative_residuals": (guess / y - 1).tolist(),
        "median_error_left_out": statistics.median(map(abs, left_out)),
        "largest_error_left_out": max(map(abs, left_out)),
    }


def predicted(
    name: str, shape: Shape, time: dict[str, Any], kept: dict[str, Any], args: Any, lowest: int, heads: int | None
) -> dict[str, Any]:
    """Time and memory of one of the paper's trainings."""
    layers = None if heads is None else min(heads, shape.n_layers - lowest)
    point = Point(shape, args.batch, args.tokens, lowest, layers=layers, scored=args.scored)
    steps = -(-args.examples // args.batch) * args.epochs
    flop = sum(point.flop().values()) * steps
    step = float(np.dot(point.time_features(), list(time["coefficients"].values())))
    bytes_kept = float(np.dot(point.kept_features(), list(kept["coefficients"].values()))) / 2  # bfloat16
    return {
        "parameters": shape.parameters, "lowest_layer": lowest, "edited_layers": len(point.edited), "steps": steps,
        "flop": flop, "hours_here": step * steps / 3600,
        "seconds_on_accelerator": flop / (args.peak_tflops * 1e12 * args.share),
        "weights_gib": 2 * shape.parameters / 2**30, "kept_for_backward_gib": bytes_kept / 2**30,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run and write."""
    parser = measure.options(__doc__, "scaling", rounds=3)
    parser.add_argument("--examples", type=int, default=300, help="of the predicted training")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="mean tokens of an example (a pair: of both)")
    parser.add_argument("--scored", type=float, default=0.1, help="share of them that are labels")
    parser.add_argument("--lowest", type=int, default=1, help="lowest chosen layer of step 2")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of an accelerator, dense bfloat16")
    parser.add_argument("--share", type=float, default=0.45, help="of its peak that is reached")
    parser.set_defaults(backends=["bridge"])
    args = measure.parsed(parser, argv)
    base = small(64, 4, 400) if args.quick else small(512, 8)
    listed, results = points(base, quick=args.quick), {}
    for backend in args.backends:
        models = Models(backend, args.device)
        seconds = measure.interleaved(
            {name: lambda p=p, models=models: whole_step(models, p) for name, p in listed.items()},
            rounds=args.rounds, device=args.device, desc=backend,
        )  # fmt: skip
        times = [statistics.median(s) for s in seconds.values()]
        kept = [kept_bytes(models, p) for p in listed.values()]
        time_fit = fitted([p.time_features() for p in listed.values()], times, TIME)
        kept_fit = fitted([p.kept_features() for p in listed.values()], [float(k) for k in kept], KEPT)
        results[backend] = {
            "points": {
                name: {
                    **{k: v for k, v in dataclasses.asdict(p).items() if k != "shape"},
                    "shape": dataclasses.asdict(p.shape), "heads": p.heads,
                    "seconds": t, "kept_mib": k / measure.MIB,
                }
                for (name, p), t, k in zip(listed.items(), times, kept, strict=True)
            },
            "time": time_fit, "memory": kept_fit,
            "predicted": {
                name: {
                    "step 1": predicted(name, shape, time_fit, kept_fit, args, 0, None),
                    "step 2": predicted(name, shape, time_fit, kept_fit, args, args.lowest, shape.n_layers // 2),
                }
                for name, shape in LARGE.items()
            },
        }  # fmt: skip
        report(backend, listed, results[backend])
    settings = {
        "command": args.command, "dtype": "float32", "device": args.device, "rounds": args.rounds,
        **{k: getattr(args, k) for k in ("examples", "epochs", "batch", "tokens", "scored", "lowest", "peak_tflops", "share")},
    }  # fmt: skip
    record.write(args.out, "scaling", settings, results)


def report(backend: str, listed: dict[str, Point], found: dict[str, Any]) -> None:
    """Print the fit and the predictions."""
    for what in ("time", "memory"):
        fit = found[what]
        print(
            f"{backend}, {what}: R^2 {fit['r2']:.4f}; left out: median {fit['median_error_left_out']:.1%}, "
            f"largest {fit['largest_error_left_out']:.1%}"
        )
        for name, off in zip(listed, fit["relative_residuals"], strict=True):
            print(f"  {name}: {off:+.1%}")
    for name, steps in found["predicted"].items():
        for which, p in steps.items():
            print(
                f"{name}, {which}: {p['hours_here']:.1f} h here, {p['seconds_on_accelerator']:.0f} s on the accelerator, "
                f"{p['weights_gib']:.1f} GiB of weights and {p['kept_for_backward_gib']:.2f} GiB kept"
            )


if __name__ == "__main__":
    main()
