"""How far an adapter moves representations: z of every head and the residual stream, with and without it.

    cosine = <b, e> / (|b| |e|)     1: the direction is kept
    change = |e - b| / |b|          0: nothing moved; 1: moved by its own norm
    ratio  = |e| / |b|              1: the norm is kept

b is an activation of the unmodified model at one position of one text, e the same with the adapter. Each text counts once: its
positions are averaged first. Intervals are 95 %, mean +- t * standard error over texts. Texts run one by one, so there is no
padding. Only running sums are kept, so memory does not grow with the number of texts.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from lofit_lens.analysis.measure import records
from lofit_lens.checks import check_whole, given, texts_of
from lofit_lens.errors import DataError, InputError, ModelError
from lofit_lens.heads import HeadSet
from lofit_lens.interventions.at_heads import HeadAdapter
from lofit_lens.interventions.base import Intervention, adapters_of, attached
from lofit_lens.models import (
    check_residual,
    context_length,
    device_of,
    frozen,
    head_size,
    hook_z,
    hooked,
    model_info,
    residual_point,
    run_through,
    tokenizer_of,
)
from lofit_lens.progress import tqdm
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import encode

MEASURES = ("cosine", "change", "ratio")
WHERE = ("z", "resid")  # hook_z, hook_resid_post
ENDS = 8  # positions shown from either end of a text


@dataclass(frozen=True, eq=False)
class Drift:
    """How far representations moved, by layer, head and position.

    Attributes:
        layers: one row per layer and site: `where` (`"z"`: mean over all heads; `"resid"`: hook_resid_post), `layer`, then
            `cosine`, `change`, `ratio`, each with `_low` and `_high` (95 % over texts), and `n` (texts).
        heads: the same for z of each edited head: `head`, `layer`, `index`, ...
        positions: the same by position: `where`, `layer`, `position` (0, 1, ... from the start, BOS being 0; -1, -2, ... from the
            end), ...; `n` counts the texts that are long enough.
        n_texts: number of texts.
        n_tokens: number of tokens in all texts.
        cut: number of texts that were longer than the context and were truncated.
        model: name of the model.
        adapters: the attached adapters, in order.
    """

    layers: pd.DataFrame
    heads: pd.DataFrame
    positions: pd.DataFrame
    n_texts: int
    n_tokens: int
    cut: int
    model: str
    adapters: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.Drift", "schema": 1, "model": self.model, "adapters": list(self.adapters),
            "n_texts": self.n_texts, "n_tokens": self.n_tokens, "cut": self.cut, "layers": records(self.layers),
            "heads": records(self.heads), "positions": records(self.positions),
        }  # fmt: skip


class Running:
    """Running mean and spread of arrays added one by one (Welford 1962); NaN marks missing entries."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.n, self.mean, self.squares = np.zeros(shape, dtype=int), np.zeros(shape), np.zeros(shape)

    def add(self, values: np.ndarray) -> None:
        """Add one array."""
        there = ~np.isnan(values)
        self.n += there
        off = np.where(there, values - self.mean, 0.0)
        self.mean += off / np.maximum(self.n, 1)
        self.squares += off * np.where(there, values - self.mean, 0.0)

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the mean by Student's t; NaN for fewer than two numbers."""
        with np.errstate(divide="ignore", invalid="ignore"):
            se = np.sqrt(self.squares / (self.n - 1) / self.n)
        reach = np.where(self.n > 1, stats.t.ppf(0.5 + level / 2, np.maximum(self.n - 1, 1)) * se, np.nan)
        return self.mean - reach, self.mean + reach


def compare(base: Float64[Tensor, "*axes d"], edited: Float64[Tensor, "*axes d"]) -> Float64[Tensor, "3 ..."]:
    """Cosine, change and ratio along the last axis; two zero vectors count as equal (1, 0, 1)."""
    b, e = base.norm(dim=-1), edited.norm(dim=-1)
    both = (b == 0) & (e == 0)
    cosine = torch.where(b * e > 0, (base * edited).sum(dim=-1) / (b * e), both.double())
    change = torch.where(both, 0.0, (edited - base).norm(dim=-1) / b)
    return torch.stack([cosine, change, torch.where(both, 1.0, e / b)])


@torch.no_grad()
def drift(
    model: Any, adapters: Intervention | Sequence[Intervention], texts: Iterable[str] | Task, *, split: str = "test",
    limit: int | None = None, ends: int = ENDS, progress: bool = True,
) -> Drift:  # fmt: skip
    """Compare activations with and without one adapter, or several in a given order.

    Args:
        model: any HookedTransformer or TransformerBridge; interventions that the caller attached act on both sides.
        adapters: attached together, in the order given.
        texts: texts (truncated to the context), or a task, whose prompts are used.
        split: split of the task.
        limit: only the first texts.
        ends: number of positions listed from either end of a text.
        progress: show a bar over texts.

    Raises:
        InputError: no adapter, no text, a limit or `ends` below 1, or an unknown split.
        DataError: a text without tokens; names its index.
        AdapterError: an adapter for another shape.
        ModelError: heads or residual stream that cannot be reached, or activations that are NaN, infinite or all zero.
    """
    info, listed = model_info(model), adapters_of(adapters)
    check_whole(1, ends=ends, **given(limit=limit))
    every = tuple(range(info.n_layers))
    at = {"resid": every, "z": info.grid.layers}
    head_size(model)
    check_residual(model, every, "hook_resid_post")
    sums = {
        "resid": Running((3, info.n_layers)), "z": Running((3, info.n_layers, info.n_heads)),
        "z by layer": Running((3, info.n_layers)), "resid at": Running((3, info.n_layers, 2 * ends)),
        "z at": Running((3, info.n_layers, 2 * ends)),
    }  # fmt: skip
    n_texts = n_tokens = cut = 0
    with frozen(model):
        bar = tqdm(_rows(model, texts, split, limit), desc="drift", disable=not progress, unit="text")
        for ids, was_cut in bar:
            n_texts, n_tokens, cut = n_texts + 1, n_tokens + len(ids), cut + was_cut
            for where, measured in _measured(model, listed, ids, at).items():  # [3, n_layers, pos(, n_heads)]
                of_layers = measured if where == "resid" else measured.mean(axis=-1)
                sums[f"{where} at"].add(_at_ends(of_layers, ends))
                sums["resid" if where == "resid" else "z by layer"].add(of_layers.mean(axis=-1))
                if where == "z":
                    sums["z"].add(measured.mean(axis=2))
    if n_texts == 0:
        raise InputError("no text to compare on; give at least one")
    edited = [h for a in listed if isinstance(a, HeadAdapter) for h in a.heads]
    heads = HeadSet(list(dict.fromkeys(edited)))
    places = [*range(ends), *range(-ends, 0)]
    layers = [{"where": w, "layer": n, **_row(sums["z by layer" if w == "z" else w], n)} for w in WHERE for n in at[w]]
    by_head = [{"head": str(h), "layer": h.layer, "index": h.head, **_row(sums["z"], h.layer, h.head)} for h in heads]
    by_position = [
        {"where": w, "layer": n, "position": p, **_row(sums[f"{w} at"], n, i)}
        for w in WHERE for n in at[w] for i, p in enumerate(places) if sums[f"{w} at"].n[0, n, i]
    ]  # fmt: skip
    names = tuple(str(getattr(a, "title", type(a).__name__)) for a in listed)
    return Drift(
        pd.DataFrame(layers), pd.DataFrame(by_head), pd.DataFrame(by_position), n_texts, n_tokens, cut, info.name, names
    )  # fmt: skip


def _rows(model: Any, texts: Iterable[str] | Task, split: str, limit: int | None) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each text, and whether its end was cut off."""
    prompts = isinstance(texts, Task)
    some = itertools.islice(texts, limit) if isinstance(texts, Iterator) else texts  # it may have no end
    listed = [e.prompt for e in texts.examples(split, limit=limit)] if prompts else texts_of("texts", some)[:limit]
    tokenizer, longest = tokenizer_of(model), context_length(model)
    for i, text in enumerate(listed):
        ids = encode(tokenizer, text)
        if not ids:
            raise DataError(f"text {i} has no tokens; drop it")
        yield ids[:longest], len(ids) > longest


def _measured(
    model: Any, adapters: Sequence[Intervention], ids: list[int], layers: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """`[3, n_layers, pos]` of the stream and `[3, n_layers, pos, n_heads]` of z for one text; NaN in layers without heads."""
    tokens = torch.tensor([ids], device=device_of(model))
    base: dict[tuple[str, int], Tensor] = {}
    found: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Any:
        return lambda x, hook: base.__setitem__(key, x[0].detach().cpu())

    def measure(key: tuple[str, int]) -> Any:
        # Kept activations are freed as soon as they are compared.
        return lambda x, hook: found.__setitem__(key, compare(base.pop(key).double(), x[0].detach().cpu().double()))

    for hook, attach in ((keep, []), (measure, adapters)):
        with attached(model, *attach), contextlib.ExitStack() as stack:
            for n in layers["z"]:
                stack.enter_context(hooked(hook_z(model, n), hook(("z", n))))
            for n in layers["resid"]:
                stack.enter_context(hooked(residual_point(model, n, "hook_resid_post"), hook(("resid", n))))
            run_through(model, tokens, torch.ones_like(tokens))
    for (where, n), values in found.items():
        if not bool(torch.isfinite(values).all()):
            raise ModelError(
                f"{where} of layer {n} of {model_info(model).name} is NaN, infinite or all zero at a position; load the model in "
                "float32 or bfloat16, and check the attached interventions"
            )
    nowhere = torch.full_like(next(values for (where, _), values in found.items() if where == "z"), torch.nan)
    return {w: torch.stack([found.get((w, n), nowhere) for n in layers["resid"]], dim=1).numpy() for w in WHERE}


def _at_ends(values: np.ndarray, ends: int) -> np.ndarray:
    """The first and the last positions of the last axis, NaN where the text is too short."""
    n = min(ends, values.shape[-1])
    out = np.full((*values.shape[:-1], 2 * ends), np.nan)
    out[..., :n] = values[..., :n]
    out[..., 2 * ends - n :] = values[..., values.shape[-1] - n :]
    return out


def _row(sums: Running, *at: int) -> dict[str, Any]:
    low, high = sums.interval()
    found: dict[str, Any] = {}
    for i, name in enumerate(MEASURES):
        place = (i, *at)
        found |= {name: float(sums.mean[place]), f"{name}_low": float(low[place]), f"{name}_high": float(high[place])}
    return {**found, "n": int(sums.n[(0, *at)])}
