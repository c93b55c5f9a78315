"""A task's loss on given rows: SFT, or DPO against the model as it stands before training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.errors import DataError
from lofit_lens.models import Borders, context_length, device_of, logits_of, tokenizer_of
from lofit_lens.tasks.base import TrainingExample
from lofit_lens.tasks.collate import Batch, Encoded, collate, encode_training, pad_id
from lofit_lens.training.loop import LossOfRows
from lofit_lens.training.losses import dpo_loss, sft_loss, summed_log_probs


def task_loss(model: Any, examples: Sequence[TrainingExample], *, beta: float, batch_size: int = 8) -> LossOfRows:
    """The loss of given rows as a function of whatever is attached when it is called.

    Call it with no adapter attached: a DPO task's reference log-probs are computed here and now.

    Raises:
        DataError: a row longer than the model's context.
    """
    encoded = [encode_training(tokenizer_of(model), e) for e in examples]
    _check_length(model, encoded)
    batch_of = _batcher(model, encoded)
    if len(encoded[0]) == 1:

        def sft(rows: Sequence[int]) -> Tensor:
            batch = batch_of(rows)
            return sft_loss(logits(model, batch), batch.tokens, batch.labels)

        return sft
    reference = reference_log_probs(model, encoded, batch_size=batch_size)

    def dpo(rows: Sequence[int]) -> Tensor:
        batch = batch_of(rows)
        sums = summed_log_probs(logits(model, batch), batch.tokens, batch.labels)
        chosen, rejected = sums.chunk(2)
        return dpo_loss(chosen, rejected, *reference[list(rows)].unbind(dim=1), beta=beta)

    return dpo


def logits(model: Any, batch: Batch) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a right-padded batch whose labels are its answers."""
    borders = Borders(batch.labels.int().argmax(dim=1), batch.mask.sum(dim=1))
    return logits_of(model, batch.tokens, batch.mask, borders)


def _batcher(model: Any, encoded: Sequence[tuple[Encoded, ...]]) -> Callable[[Sequence[int]], Batch]:
    fill, device = pad_id(tokenizer_of(model)), device_of(model)

    def batch_of(rows: Sequence[int]) -> Batch:
        # All first forms (chosen), then all second forms (rejected).
        return collate([encoded[r][f] for f in range(len(encoded[0])) for r in rows], pad_id=fill, device=device)

    return batch_of


@torch.no_grad()
def reference_log_probs(
    model: Any, encoded: Sequence[tuple[Encoded, ...]], *, batch_size: int = 8
) -> Float[Tensor, "rows 2"]:
    """Summed log-probs (nats) of chosen and rejected answers under the model as it stands."""
    batch_of = _batcher(model, encoded)
    parts = []
    for first in range(0, len(encoded), batch_size):
        batch = batch_of(range(first, min(first + batch_size, len(encoded))))
        sums = summed_log_probs(logits(model, batch), batch.tokens, batch.labels)
        parts.append(torch.stack(sums.chunk(2), dim=1))
    return torch.cat(parts)


def _check_length(model: Any, encoded: Sequence[tuple[Encoded, ...]]) -> None:
    limit = context_length(model)
    for i, forms in enumerate(encoded):
        longest = max(len(f.ids) for f in forms)
        if longest > limit:
            raise DataError(
                f"training example {i} has {longest} tokens; the context of {model.cfg.model_name} is {limit}: "
                "shorten or drop it"
            )
