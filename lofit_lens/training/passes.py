"""How a step's rows go through the model: which of them together, and which computations are skipped.

Nothing here changes what is learned. The loss of a step is the mean over all its label tokens (SFT) or pairs (DPO), however many
passes compute it; values differ from the plain path (`PLAIN`) only by rounding.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from lofit_lens.checks import check_is, check_whole, given
from lofit_lens.errors import ModelError
from lofit_lens.models import (
    Borders,
    attention_window,
    checkpointed,
    device_of,
    fused_attention,
    gaps_are_exact,
    logits_of,
    marks_of_rows,
    peek,
    read_at,
    remember,
    tokenizer_of,
)
from lofit_lens.tasks.collate import Batch, Encoded, collate, pad, pad_id
from lofit_lens.training.losses import NO_LABEL, sum_by_row, summed_log_probs, token_log_probs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Passes:
    """How the forward and backward passes of a step run; each switch is a shortcut that does not change the numbers.

    Args:
        token_budget: most padded tokens in one forward and backward pass, which bounds its memory; a step with more runs in
            several passes. A single example may exceed it. None = no bound.
        near_lengths: run rows of similar lengths together if that saves more padding than a further pass costs.
        fused: use fused attention if it is proven for the model (see `models.fused_attention`). On a GPU its backward
            pass may differ in the last bits between two equal runs; False gives the class's own attention.
        scored_only: compute logits only at the scored positions.
        share_prompts: run the prompt of a DPO pair once if that saves more tokens than a further pass costs. It keeps the
            prompts' KV cache: at most as many bytes as a pass over both sequences would keep.
        checkpointing: keep only each block's input for the backward pass and recompute the block: less memory, about a third
            more time. Prompts are not shared then.

    Raises:
        InputError: a budget below 1.
    """

    token_budget: int | None = 8192
    near_lengths: bool = True
    fused: bool = True
    scored_only: bool = True
    share_prompts: bool = True
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_whole(1, **given(token_budget=self.token_budget))
        for name in ("near_lengths", "fused", "scored_only", "share_prompts", "checkpointing"):
            check_is(getattr(self, name), bool, name, "True or False")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return asdict(self)

    @contextlib.contextmanager
    def ready(self, model: Any) -> Iterator[None]:
        """Have the model run this way within the block."""
        with contextlib.ExitStack() as stack:
            if self.fused:
                stack.enter_context(fused_attention(model))
            if self.checkpointing:
                stack.enter_context(checkpointed(model))
            yield


FAST = Passes()
"""All shortcuts."""
PLAIN = Passes(None, near_lengths=False, fused=False, scored_only=False, share_prompts=False)
"""One padded batch per step, logits everywhere, the class's own attention."""

WASTE = 128  # padding tokens that one pass may hold; a further pass over a small model on a CPU costs about as much
LAUNCHES = 10**9  # parameters below which a pass on a GPU costs only its kernel launches, whatever its tokens
Forms = tuple[Encoded, ...]  # of one row: a sequence (SFT), or chosen and rejected (DPO)


def log_probs_of(model: Any, rows: Sequence[Forms], passes: Passes) -> Float[Tensor, "rows forms"]:
    """Return summed log-probs (nats) of rows with equally many sequences, in one pass."""
    return rearrange(log_probs(model, rows, None, passes), "(row form) -> row form", row=len(rows))


def log_probs(model: Any, forms: Sequence[Forms], owner: Tensor | None, passes: Passes) -> Float[Tensor, " sequences"]:
    """Return the summed log-prob (nats) of each sequence's labels, row by row, in one padded pass."""
    sequences = [e for f in forms for e in f]
    batch = collate(sequences, pad_id=pad_id(tokenizer_of(model)), device="cpu")
    borders = Borders(
        torch.tensor([e.start for e in sequences]), torch.tensor([len(e.ids) for e in sequences]),
        None if owner is None else owner[torch.tensor([u for u, f in enumerate(forms) for _ in f])],
        marks_of_rows([e.marks for e in sequences]),
    )  # fmt: skip
    if not passes.scored_only:
        tokens, mask, labels = (x.to(device_of(model)) for x in (batch.tokens, batch.mask, batch.labels))
        return summed_log_probs(logits_of(model, tokens, mask, borders), tokens, labels)
    return _summed(model, batch, borders)


def _summed(model: Any, batch: Batch, borders: Borders) -> Float[Tensor, " sequences"]:
    """Sum log-probs for a batch on the CPU, where the scored places are known without waiting for a device."""
    device, scored = device_of(model), batch.labels[:, 1:]
    at: Bool[Tensor, "batch pos"] = torch.zeros_like(batch.labels)
    at[:, :-1] = scored
    wanted = batch.tokens[:, 1:][scored].to(device)
    values = read_at(
        model,
        batch.tokens.to(device),
        batch.mask.to(device),
        at,
        lambda logits, part: token_log_probs(logits, wanted[part].to(logits.device)),
        borders,
    )
    return sum_by_row(values.to(device), scored)


def shared_log_probs(model: Any, forms: Sequence[Forms], owner: Tensor | None) -> Float[Tensor, " sequences"]:
    """Return the same for rows whose sequences share a prompt, which runs once; answers have two tokens or more."""
    fill, device = pad_id(tokenizer_of(model)), device_of(model)
    prompts = [f[0].ids[: f[0].start] for f in forms]
    ends = torch.tensor([len(p) for p in prompts])
    ids, mask = pad(prompts, side="left", pad_id=fill, device=device)
    marks = marks_of_rows([f[0].marks for f in forms])
    last, state = remember(model, None, ids, mask, Borders(ends, ends + 1, owner, marks))
    rows = torch.tensor([u for u, f in enumerate(forms) for _ in f])
    answers = [e.ids[e.start :] for f in forms for e in f]
    sums = token_log_probs(last[rows.to(device)], torch.tensor([a[0] for a in answers], device=device))
    batch = collate([Encoded(a[:-1], 0) for a in answers], pad_id=fill, device=device)
    lengths = torch.tensor([len(e.ids) for f in forms for e in f])
    borders = Borders(ends[rows], lengths, *(None if x is None else x[rows] for x in (owner, marks)))
    logits = peek(model, state, rows, batch.tokens, batch.mask, borders)
    wanted = torch.full(batch.tokens.shape, NO_LABEL, dtype=torch.long)
    for i, answer in enumerate(answers):
        wanted[i, : len(answer) - 1] = torch.tensor(answer[1:])
    later = token_log_probs(rearrange(logits, "row pos vocab -> (row pos) vocab"), wanted.to(device).flatten())
    return sums + reduce(later, "(row pos) -> row", "sum", row=len(wanted))


def waste_of(model: Any) -> int:
    """Return how many padding tokens a pass over this model may hold: the cost of a further pass."""
    if device_of(model).type == "cpu":
        return WASTE
    return WASTE * max(1, LAUNCHES // sum(p.numel() for p in model.parameters()))


def cache_is_exact(model: Any) -> bool:
    """Return whether continuing from left-padded prompts gives the same as one pass."""
    try:
        return attention_window(model) is None and gaps_are_exact(model)
    except ModelError as e:
        logger.info("prompts are not shared in training: %s", e)
        return False


def sharing_pays(forms: Sequence[Forms], waste: int) -> bool:
    """Return whether sharing saves more prompt tokens than a pass may waste; only for pairs with one prompt."""
    if not all(len(f) == 2 and f[0].start == f[1].start and min(e.n_labels for e in f) > 1 for f in forms):
        return False
    both = 2 * max(len(e.ids) for f in forms for e in f)
    apart = max(f[0].start for f in forms) + 2 * max(e.n_labels - 1 for f in forms for e in f)
    return len(forms) * (both - apart) > waste
