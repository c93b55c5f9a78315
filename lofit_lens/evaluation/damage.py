"""Measure what an intervention does to ordinary text: cross-entropy, and divergence from the unmodified model.

With p the unmodified model and q the edited one, at position t of a text:

    cross-entropy  -log q(x_t | x_<t)              (and -log p(x_t | x_<t) beside it)
    KL             sum_x p(x | x_<t) log [p(x | x_<t) / q(x | x_<t)]

both in nats, averaged over the positions of a text, then over texts, as in ITI's evaluation (Li et al. 2023, section 5.4:
the first 128 tokens of each text). Texts are streamed; memory does not grow with their number.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_seed, check_whole, given, shown
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.result import Metric, table_html
from lofit_lens.evaluation.stats import (
    FEW,
    PairedTest,
    paired_bootstrap_test,
    paired_permutation_test,
)
from lofit_lens.html import wrapped
from lofit_lens.interventions import Intervention, attached
from lofit_lens.interventions.base import adapters_of
from lofit_lens.models import (
    ALL,
    ModelInfo,
    backend_of,
    context_length,
    device_of,
    frozen,
    logits_of,
    model_info,
    not_finite,
    tokenizer_of,
)
from lofit_lens.progress import tqdm
from lofit_lens.tasks.collate import encode, pad, pad_id

COLUMNS = ("cross_entropy_base", "cross_entropy", "kl")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Damage:
    """Cross-entropy and KL on text, all in nats.

    Attributes:
        metrics: `cross_entropy_base`, `cross_entropy` and `kl` -> mean over texts with its interval.
        increase: paired test of cross-entropy, edited minus unmodified, over texts (permutation test for fewer than 50).
        texts: one row per text: first characters, tokens predicted, and the three means.
        positions: one row per position (1 = second token): texts that reach it, and the three means there.
        label: name of the intervention.
        counted: texts left out because no token in them is predicted, texts cut at `max_tokens`, and texts that the edit cannot
            reach since it edits only their last token.
        model: the model.
        text_hash: SHA-256 over the texts, in order.
        config: settings.
        versions: Python and package versions.
    """

    metrics: dict[str, Metric]
    increase: PairedTest
    texts: pd.DataFrame
    positions: pd.DataFrame
    label: str
    counted: dict[str, int]
    model: ModelInfo
    text_hash: str
    config: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the individual texts, JSON-able."""
        return {
            "kind": "lofit_lens.Damage", "schema": 1, "label": self.label,
            "metrics": {k: asdict(m) for k, m in self.metrics.items()}, "increase": self.increase.to_dict(),
            "positions": self.positions.to_dict("list"), "counted": self.counted, "model": asdict(self.model),
            "text_hash": self.text_hash, "config": self.config, "versions": self.versions,
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON, atomically."""
        return io.write_json(path, self.to_dict())

    def rows(self) -> list[tuple[str, str, str]]:
        """One row per quantity, as text: name, mean, 95 % interval over texts."""
        named = (
            ("cross-entropy, unmodified", "cross_entropy_base"),
            ("cross-entropy, edited", "cross_entropy"),
            ("KL", "kl"),
        )
        rows = [(name, f"{self.metrics[k].mean:.4f}", _between(self.metrics[k].interval)) for name, k in named]
        test = self.increase
        difference = f"increase of cross-entropy (p = {test.p:.4f} {test.mark}".rstrip() + ")"
        return [*rows, (difference, f"{test.difference:+.4f}", _between(test.interval))]

    def __repr__(self) -> str:
        m = self.metrics
        return wrapped(
            f"Damage({self.label or 'intervention'}, {m['kl'].n} texts: cross-entropy {m['cross_entropy_base']} -> "
            f"{m['cross_entropy']} nats, KL {m['kl']} nats)"
        )

    def _repr_html_(self) -> str:
        title = f"{self.label or 'intervention'} on {self.metrics['kl'].n} texts, nats per token"
        notes = [f"{k}: {n}" for k, n in self.counted.items()]
        return table_html(title, ("quantity", "mean", "95 % interval over texts"), self.rows(), notes)


def damage(
    model: Any,
    interventions: Intervention | Sequence[Intervention],
    texts: Iterable[str],
    *,
    max_tokens: int = 128,
    batch_size: int = 8,
    limit: int | None = None,
    label: str = "",
    seed: int = 0,
    progress: bool = True,
) -> Damage:
    """Measure cross-entropy and KL of the edited model on text, position by position, beside the unmodified model's.

    Args:
        model: any HookedTransformer or TransformerBridge, with none of the interventions attached.
        interventions: one, or several that are applied together in this order.
        texts: any iterable; with `limit` it may be endless.
        max_tokens: tokens of each text that are read, including BOS.
        batch_size: texts run together.
        limit: only the first texts.
        label: stored in the result.
        seed: seed of the bootstrap.
        progress: show a bar.

    Raises:
        InputError: a number below its minimum, no intervention, or a single text instead of several.
        DataError: no text with at least two tokens, or an item that is not text.
        ModelError: losses that are NaN or infinite.
    """
    backend_of(model)
    listed = adapters_of(interventions)
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise InputError(f"texts is {shown(texts)}; give a list of texts, or any iterable")
    check_whole(2, max_tokens=max_tokens)
    check_whole(1, batch_size=batch_size, **given(limit=limit))
    check_seed(seed)
    length = min(max_tokens, context_length(model))
    sums = np.zeros((len(COLUMNS), length - 1))
    reached = np.zeros(length - 1, dtype=int)
    counted, rows, seen = {"texts left out": 0, "texts cut": 0}, [], hashlib.sha256()
    with frozen(model), tqdm(total=limit, desc="damage", disable=not progress, unit="text") as bar:
        for batch in _batches(model, islice(texts, limit), length, batch_size, counted, seen, bar):
            tokens, mask = pad(
                [ids for _, ids in batch], side="right", pad_id=pad_id(tokenizer_of(model)), device=device_of(model)
            )
            values, wanted = _both(model, listed, tokens, mask)
            if not np.isfinite(values).all():
                which = "edited" if np.isfinite(values[0]).all() else "unmodified"
                raise not_finite(
                    model, f"losses of the {which} model on {batch[0][0][:60]!r} or one of the texts run with it"
                )
            width = wanted.shape[1]
            sums[:, :width] += values.sum(axis=1)
            reached[:width] += wanted.sum(axis=0)
            for i, (text, ids) in enumerate(batch):
                means = values[:, i].sum(axis=1) / (len(ids) - 1)
                rows.append(
                    {"text": text[:80], "tokens": len(ids) - 1, **dict(zip(COLUMNS, means.tolist(), strict=True))}
                )
    if not rows:
        raise DataError("no text has two or more tokens; give texts in which a token can be predicted")
    if all(getattr(one, "positions", ALL).name == "last" for one in listed):
        counted["texts that the edit cannot reach"] = len(rows)
        log.warning(
            "this intervention edits only the last token of a text, from which nothing is predicted: its damage is 0, whatever "
            "it does during generation; measure it at positions 'all'"
        )
    test = paired_permutation_test if len(rows) < FEW else paired_bootstrap_test
    per_text, last = pd.DataFrame(rows), int((reached > 0).sum())
    positions = pd.DataFrame({"position": range(1, last + 1), "texts": reached[:last]})
    for name, total in zip(COLUMNS, sums, strict=True):
        positions[name] = total[:last] / reached[:last]
    return Damage(
        metrics={name: Metric.of(per_text[name].tolist(), share=False) for name in COLUMNS},
        increase=test(per_text["cross_entropy"].tolist(), per_text["cross_entropy_base"].tolist(), seed=seed),
        texts=per_text, positions=positions, label=label, counted={k: n for k, n in counted.items() if n},
        model=model_info(model), text_hash=seen.hexdigest(), versions=io.environment(),
        config={"max_tokens": length, "batch_size": batch_size, "limit": limit, "seed": seed},
    )  # fmt: skip


def _batches(
    model: Any, texts: Iterator[str], length: int, batch_size: int, counted: dict[str, int], seen: Any, bar: Any
) -> Iterator[list[tuple[str, list[int]]]]:
    batch = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {i + 1} is {type(text).__name__}, not text: {text!r:.80}")
        bar.update()
        seen.update(text.encode() + b"\0")
        ids = encode(tokenizer_of(model), text)
        if len(ids) < 2:
            counted["texts left out"] += 1
            continue
        counted["texts cut"] += len(ids) > length
        batch.append((text, ids[:length]))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def _both(
    model: Any, interventions: Sequence[Intervention], tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> tuple[np.ndarray, np.ndarray]:
    """`[3, batch, pos - 1]` values in the order of `COLUMNS`, 0 at padding; and a mask of the predicted tokens."""
    base = logits_of(model, tokens, mask)
    with attached(model, *interventions):
        edited = logits_of(model, tokens, mask)
    wanted = mask[:, 1:].bool()
    # Row by row: log-probs of a whole batch at once would double its memory.
    rows = [_row(b[:-1], e[:-1], t[1:], w) for b, e, t, w in zip(base, edited, tokens, wanted, strict=True)]
    return torch.stack(rows, dim=1).cpu().double().numpy(), wanted.cpu().numpy()


def _row(
    base: Float[Tensor, "pos d_vocab"],
    edited: Float[Tensor, "pos d_vocab"],
    targets: Int[Tensor, " pos"],
    wanted: Bool[Tensor, " pos"],
) -> Float[Tensor, "3 pos"]:
    p, q = (x.float().log_softmax(dim=-1) for x in (base, edited))
    picked = [-x.gather(-1, targets[:, None])[:, 0] for x in (p, q)]
    return torch.stack([*picked, (p.exp() * (p - q)).sum(dim=-1)]) * wanted


def _between(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "one text: none"
