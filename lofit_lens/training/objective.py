"""A task's training rows and their loss: SFT, or DPO against the model before training.

`Objective` is the loss of rows; `Steps` runs it through the model, forward and backward, rows of similar lengths together.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_is
from lofit_lens.errors import DataError, InputError
from lofit_lens.models import context_length, device_of, fingerprint, is_watched, tokenizer_of
from lofit_lens.tasks.collate import encode_training
from lofit_lens.tasks.examples import TrainingExample
from lofit_lens.tasks.grouping import near_lengths
from lofit_lens.training.loop import Share
from lofit_lens.training.losses import dpo_loss
from lofit_lens.training.passes import (
    PLAIN,
    Forms,
    Passes,
    cache_is_exact,
    log_probs,
    log_probs_of,
    shared_log_probs,
    sharing_pays,
    waste_of,
)

LossOfRows = Callable[[Sequence[int]], Tensor]
REFERENCE_SETS = 64  # kept per model; each is a few kilobytes


@dataclass(frozen=True, eq=False)
class Objective:
    """Training rows as token ids, and their loss.

    Attributes:
        rows: one sequence per row (SFT), or chosen and rejected (DPO).
        beta: DPO's inverse temperature.
        reference: `[rows, 2]` summed log-probs (nats) of chosen and rejected under the model before training; None for SFT.
    """

    rows: Sequence[Forms]
    beta: float
    reference: Float[Tensor, "rows 2"] | None = None

    def parts(self, rows: Sequence[int]) -> int:
        """Count what the loss of these rows is averaged over: their label tokens (SFT), or pairs (DPO)."""
        return len(rows) if self.reference is not None else sum(self.rows[r][0].n_labels for r in rows)

    def total(self, rows: Sequence[int], sums: Float[Tensor, "rows forms"]) -> Float[Tensor, ""]:
        """Sum the loss over `parts`, from each sequence's summed log-prob (nats)."""
        if self.reference is None:
            return -sums.sum()
        reference = self.reference[list(rows)].to(sums.device)
        return len(rows) * dpo_loss(*sums.unbind(dim=1), *reference.unbind(dim=1), beta=self.beta)


def objective(
    model: Any, examples: Sequence[TrainingExample], *, beta: float, passes: Passes = PLAIN, batch_size: int = 8,
    weights: Callable[[], str] | None = None, reference: Float[Tensor, "rows 2"] | None = None,
) -> Objective:  # fmt: skip
    """Build the objective of a task's rows for a model.

    Call it without an attached adapter: a DPO task's reference log-probs are those of the model in its current state. They are
    cached by content (weights, token ids, way of running), so further runs on the same rows get them at no cost; but not if the
    model has hooks or is in training mode.

    Args:
        model: any HookedTransformer or TransformerBridge.
        examples: training examples of one kind.
        beta: DPO's inverse temperature.
        passes: how to run the reference.
        batch_size: most pairs in one pass of the reference.
        weights: returns the model's fingerprint, if several objectives share it; None = computed here.
        reference: DPO's, one row per example (`reference_log_probs`); None = the model in its current state.

    Raises:
        DataError: a row longer than the model's context.
        InputError: a reference with a wrong shape, not finite, or for a task without pairs.
    """
    rows = encoded_rows(model, examples)
    pairs = len(rows[0]) == 2
    if reference is not None:
        check_is(reference, Tensor, "reference", "the result of reference_log_probs")
        if not pairs or tuple(reference.shape) != (len(rows), 2) or not bool(reference.isfinite().all()):
            wanted = f"finite numbers of shape [{len(rows)}, 2]" if pairs else "none: this task has no pairs (DPO)"
            raise InputError(f"the reference has shape {list(reference.shape)}; give {wanted}")
        return Objective(rows, beta, reference.detach())
    if not pairs:
        return Objective(rows, beta)
    return Objective(
        rows, beta, _kept_reference(model, rows, passes, batch_size, weights or (lambda: fingerprint(model)))
    )


def task_loss(
    model: Any, examples: Sequence[TrainingExample], *, beta: float, batch_size: int = 8,
    reference: Float[Tensor, "rows 2"] | None = None,
) -> LossOfRows:  # fmt: skip
    """Return a function from rows to their loss, with whatever is attached when it is called: one padded batch, full logits.

    Arguments and errors as in `objective`. In the batch of pairs, each chosen answer comes before its rejected one.
    """
    known = objective(model, examples, beta=beta, batch_size=batch_size, reference=reference)

    def loss_of(rows: Sequence[int]) -> Tensor:
        sums = log_probs_of(model, [known.rows[row] for row in rows], PLAIN)
        return known.total(rows, sums) / known.parts(rows)

    return loss_of


_references: "weakref.WeakKeyDictionary[Any, dict[str, Tensor]]" = weakref.WeakKeyDictionary()


def _kept_reference(
    model: Any, rows: Sequence[Forms], passes: Passes, batch_size: int, weights: Callable[[], str]
) -> Float[Tensor, "rows 2"]:
    """Return reference log-probs, computed once for the same rows in any order, bit for bit the same."""
    order = sorted(set(rows), key=lambda forms: [(len(f.ids), f.ids, f.start) for f in forms])
    place = {forms: i for i, forms in enumerate(order)}
    at = torch.tensor([place[forms] for forms in rows], device=device_of(model))
    if is_watched(model) or any(module.training for module in model.modules()):
        return _reference(model, order, passes, batch_size)[at]
    kept = _references.setdefault(model, {})
    content = [[(f.ids, f.start) for f in forms] for forms in order]
    key = io.digest([weights(), str(device_of(model)), passes.to_dict(), batch_size, content])
    if key not in kept:
        while len(kept) >= REFERENCE_SETS:
            del kept[next(iter(kept))]
        kept[key] = _reference(model, order, passes, batch_size)
    return kept[key][at]


def reference_log_probs(
    model: Any, examples: Sequence[TrainingExample], *, passes: Passes = PLAIN, batch_size: int = 8
) -> Float[Tensor, "rows 2"]:
    """Return summed log-probs (nats) of each pair's chosen and rejected answer, under the model with whatever is attached.

    Args:
        model: any HookedTransformer or TransformerBridge, not necessarily the one to train.
        examples: pairs.
        passes: how to run the model.
        batch_size: most pairs in one pass.

    Raises:
        InputError: examples that are not pairs.
        DataError: a row longer than the model's context.
    """
    rows = encoded_rows(model, examples)
    if len(rows[0]) != 2:
        raise InputError("a reference is taken of pairs (chosen and rejected), and these examples have one answer")
    return _reference(model, rows, passes, batch_size)


@torch.no_grad()
def _reference(model: Any, rows: Sequence[Forms], passes: Passes, batch_size: int) -> Float[Tensor, "rows 2"]:
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


def encoded_rows(model: Any, examples: Sequence[TrainingExample]) -> list[Forms]:
    """Return the token ids of each example: one sequence (SFT), or chosen and rejected (DPO).

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


class Steps:
    """Map rows to losses, with gradients; `training.loop` calls it in every step.

    Args:
        model: the model, with nothing attached yet.
        objectives: one for each run.
        passes: how to run the model.
        owned: whether several adapters are attached side by side, so that each pass says which run owns each row.
    """

    def __init__(self, model: Any, objectives: Sequence[Objective], passes: Passes, *, owned: bool) -> None:
        self.model, self.objectives, self.passes, self.owned = model, objectives, passes, owned
        self.waste = waste_of(model) if passes.near_lengths else None
        pairs = any(o.reference is not None for o in objectives)
        # A user's hook may count positions, which a pass over only the answers would shift.
        wanted = pairs and passes.share_prompts and not passes.checkpointing and not is_watched(model)
        self.sharing = wanted and cache_is_exact(model)

    def __call__(self, shares: Sequence[Share]) -> list[Tensor]:
        """Return the task loss of each run on its rows; gradients are added to its parameters."""
        units = [(i, row) for i, rows in shares for row in rows]
        forms = [self.objectives[i].rows[row] for i, row in units]
        sizes = [(len(f), max(len(e.ids) for e in f)) for f in forms]
        parts = {i: self.objectives[i].parts(rows) for i, rows in shares}
        losses: dict[int, Tensor] = {}
        for group in near_lengths(sizes, budget=self.passes.token_budget, waste=self.waste):
            found = self._group([units[u] for u in group], [forms[u] for u in group], parts)
            for i, loss in found.items():
                losses[i] = losses[i] + loss if i in losses else loss
        return [losses[i] for i, _ in shares]

    def _group(
        self, units: Sequence[tuple[int, int]], forms: Sequence[Forms], parts: dict[int, int]
    ) -> dict[int, Tensor]:
        """Run one pass (or two, with shared prompts) forward and backward; return what it adds to each run's loss."""
        owner = torch.tensor([i for i, _ in units]) if self.owned else None
        if self.sharing and sharing_pays(forms, self.waste or 0):
            sums = shared_log_probs(self.model, forms, owner)
        else:
            sums = log_probs(self.model, forms, owner, self.passes)
        found, at = {}, 0
        for i in dict.fromkeys(i for i, _ in units):
            rows = [row for run, row in units if run == i]
            n = sum(len(self.objectives[i].rows[row]) for row in rows)
            mine = rearrange(sums[at : at + n], "(row form) -> row form", row=len(rows))
            found[i] = self.objectives[i].total(rows, mine) / parts[i]
            at += n
        torch.stack(list(found.values())).sum().backward()
        return {i: loss.detach() for i, loss in found.items()}
