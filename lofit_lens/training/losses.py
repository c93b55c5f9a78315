"""Losses as pure functions of log-probabilities.

SFT:  mean over all label tokens of the batch of -log p(token)                         (not a mean over rows)
DPO:  mean over pairs of -log sigmoid(beta * [(log pi(c) - log pi(r)) - (log ref(c) - log ref(r))])
L1:   sum over all entries of |A|                                                        (a raw sum, not a mean)

log pi of an answer is the *sum* of its tokens' log-probs (arXiv 2305.18290, equation 7).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

NO_LABEL = -100  # marks places without a token to predict


def label_log_probs(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], labels: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " n_labels"]:
    """Return the log-prob (nats, at least float32) of every label token given the tokens before it, in row-major order."""
    wanted = labels[:, 1:]
    return token_log_probs(logits[:, :-1][wanted], tokens[:, 1:][wanted])


def token_log_probs(logits: Float[Tensor, "n d_vocab"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the log-prob (nats, at least float32) of each token, 0 for `NO_LABEL`."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(scores, tokens, reduction="none", ignore_index=NO_LABEL)


def summed_log_probs(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], labels: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Sum each row's label log-probs, in nats."""
    return sum_by_row(label_log_probs(logits, tokens, labels), labels[:, 1:])


def sum_by_row(values: Float[Tensor, " n"], at: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """Sum each row's values, which are in row-major order of the True places (on any device)."""
    spread, (rows, columns) = values.new_zeros(at.shape), at.nonzero(as_tuple=True)
    spread[rows.to(values.device), columns.to(values.device)] = values
    return spread.sum(dim=1)


def sft_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], labels: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Average the cross-entropy over all label tokens of the batch, in nats.

    Examples:
        >>> logits, tokens = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
        >>> round(sft_loss(logits, tokens, tokens > 0).item(), 4)  # log 4
        1.3863
    """
    return -label_log_probs(logits, tokens, labels).mean()


def dpo_loss(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    reference_chosen: Float[Tensor, " pairs"],
    reference_rejected: Float[Tensor, " pairs"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """Compute the sigmoid DPO loss from summed log-probs of both answers under the model and under the reference.

    Examples:
        >>> no_change = torch.tensor([-3.0])
        >>> round(dpo_loss(no_change, no_change, no_change, no_change, beta=0.5).item(), 4)  # log 2
        0.6931
    """
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    return -F.logsigmoid(beta * margin).mean()


def l1_norm(A: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Sum the absolute values.

    Examples:
        >>> l1_norm(torch.tensor([[0.5, -1.5]])).item()
        2.0
    """
    return A.abs().sum()
