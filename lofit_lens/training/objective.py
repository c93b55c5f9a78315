"""A task's training rows and what is learned from them: SFT, or DPO against the model as it stands before training."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import DataError
from lofit_lens.models import Borders, context_length, device_of, fingerprint, is_watched, logits_of, tokenizer_of
from lofit_lens.tasks.collate import Batch, Encoded, collate, encode_training, pad_id
from lofit_lens.tasks.examples import TrainingExample
from lofit_lens.tasks.grouping import near_lengths
from lofit_lens.training.loop import LossOfRows
from lofit_lens.training.losses import dpo_loss, sft_loss, summed_log_probs
from lofit_lens.training.passes import PLAIN, Passes, log_probs_of

REFERENCE_SETS = 64  # kept a model; each is a few kilobytes


@dataclass(frozen=True, eq=False)
class Objective:
    """Training rows as token ids, and their loss.

    Attributes:
        rows: one sequence a row (SFT), or chosen and rejected (DPO).
        beta: DPO's inverse temperature.
        reference: `[rows, 2]` summed log-probs (nats) of chosen and rejected under the model before training; None for SFT.
    """

    rows: Sequence[tuple[Encoded, ...]]
    beta: float
    reference: Float[Tensor, "rows 2"] | None = None

    def parts(self, rows: Sequence[int]) -> int:
        """What the loss of these rows is a mean over: their label tokens (SFT), or pairs (DPO)."""
        return len(rows) if self.reference is not None else sum(self.rows[r][0].n_labels for r in rows)

    def total(self, rows: Sequence[int], sums: Float[Tensor, "rows forms"]) -> Float[Tensor, ""]:
        """Sum of the loss over `parts`, from each sequence's summed log-prob (nats)."""
        if self.reference is None:
            return -sums.sum()
        reference = self.reference[list(rows)].to(sums.device)
        return len(rows) * dpo_loss(*sums.unbind(dim=1), *reference.unbind(dim=1), beta=self.beta)


def objective(
    model: Any, examples: Sequence[TrainingExample], *, beta: float, passes: Passes = PLAIN, batch_size: int = 8,
    weights: Callable[[], str] | None = None,
) -> Objective:  # fmt: skip
    """The rows of a task for a model.

    Call it with no adapter attached: a DPO task's reference log-probs are those of the model as it stands. They are kept by
    content (weights, token ids, way of running), so that further runs on the same rows get them at no cost; not under anybody's
    hooks, nor in training mode.

    Args:
        model: any HookedTransformer or TransformerBridge.
        examples: training examples of one kind.
        beta: DPO's inverse temperature.
        passes: how the reference is run.
        batch_size: pairs of one pass of it, at most.
        weights: gives the model's fingerprint, where several objectives share it; None = taken here.

    Raises:
        DataError: a row longer than the model's context.
    """
    rows = encoded_rows(model, examples)
    if len(rows[0]) == 1:
        return Objective(rows, beta)
    return Objective(
        rows, beta, _kept_reference(model, rows, passes, batch_size, weights or (lambda: fingerprint(model)))
    )


def task_loss(model: Any, examples: Sequence[TrainingExample], *, beta: float, batch_size: int = 8) -> LossOfRows:
    """The loss of given rows as a function of whatever is attached when it is called: one padded batch, full logits.

    Arguments and errors as in `objective`. In the batch stand all first forms (chosen), then all second ones (rejected).
    """
    known = objective(model, examples, beta=beta, batch_size=batch_size)
    batch_of = _batcher(model, known.rows)
    if known.reference is None:

        def sft(rows: Sequence[int]) -> Tensor:
            batch = batch_of(rows)
            return sft_loss(logits(model, batch), batch.tokens, batch.labels)

        return sft

    def dpo(rows: Sequence[int]) -> Tensor:
        batch = batch_of(rows)
        sums = summed_log_probs(logits(model, batch), batch.tokens, batch.labels)
        return known.total(rows, sums.view(2, -1).T) / len(rows)

    return dpo


def logits(model: Any, batch: Batch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a right-padded batch whose labels are its answers."""
    borders = Borders(batch.labels.int().argmax(dim=1), batch.mask.sum(dim=1))
    return logits_of(model, batch.tokens, batch.mask, borders)


def _batcher(model: Any, rows: Sequence[tuple[Encoded, ...]]) -> Callable[[Sequence[int]], Batch]:
    fill, device = pad_id(tokenizer_of(model)), device_of(model)

    def batch_of(some: Sequence[int]) -> Batch:
        return collate([rows[r][f] for f in range(len(rows[0])) for r in some], pad_id=fill, device=device)

    return batch_of


_references: "weakref.WeakKeyDictionary[Any, dict[str, Tensor]]" = weakref.WeakKeyDictionary()


def _kept_reference(
    model: Any, rows: Sequence[tuple[Encoded, ...]], passes: Passes, batch_size: int, weights: Callable[[], str]
) -> Float[Tensor, "rows 2"]:
    """Reference log-probs, computed once for the same rows in any order, and to the same bits."""
    order = sorted(set(rows), key=lambda forms: [(len(f.ids), f.ids, f.start) for f in forms])
    place = {forms: i for i, forms in enumerate(order)}
    at = torch.tensor([place[forms] for forms in rows], device=device_of(model))
    if is_watched(model) or any(module.training for module in model.modules()):
        return reference_log_probs(model, order, passes=passes, batch_size=batch_size)[at]
    kept = _references.setdefault(model, {})
    content = [[(f.ids, f.start) for f in forms] for forms in order]
    key = io.digest([weights(), str(device_of(model)), passes.to_dict(), batch_size, content])
    if key not in kept:
        while len(kept) >= REFERENCE_SETS:
            del kept[next(iter(kept))]
        kept[key] = reference_log_probs(model, order, passes=passes, batch_size=batch_size)
    return kept[key][at]


@torch.no_grad()
def reference_log_probs(
    model: Any, rows: Sequence[tuple[Encoded, ...]], *, passes: Passes = PLAIN, batch_size: int = 8
) -> Float[Tensor, "rows 2"]:
    """Summed log-probs (nats) of chosen and rejected answers under the model as it stands, within the passes' token budget."""
    found: dict[int, Tensor] = {}
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        sizes = [(len(forms), max(len(f.ids) for f in forms)) for forms in part]
        for group in near_lengths(sizes, budget=passes.token_budget):
            found |= {
                first + i: row
                for i, row in zip(group, log_probs_of(model, [part[i] for i in group], passes), strict=True)
            }
    return torch.stack([found[i] for i in range(len(rows))])


def encoded_rows(model: Any, examples: Sequence[TrainingExample]) -> list[tuple[Encoded, ...]]:
    """Token ids of each example: one sequence (SFT), or chosen and rejected (DPO).

    Raises:
        DataError: a row longer than the model's context.
    """
    rows, limit = [encode_training(tokenizer_of(model), e) for e in examples], context_length(model)
    for i, forms in enumerate(rows):
        longest = max(len(f.ids) for f in forms)
        if longest > limit:
            raise DataError(
                f"training example {i} has {longest} tokens; the context of {model.cfg.model_name} is {limit}: "
                "shorten or drop it"
            )
    return rows
