"""A step of one run, or of several side by side: its rows in passes of near lengths, forward and backward."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lofit_lens.errors import ModelError
from lofit_lens.models import attention_window, device_of, gaps_are_exact, is_watched
from lofit_lens.tasks.grouping import near_lengths
from lofit_lens.training.loop import Share
from lofit_lens.training.objective import Objective
from lofit_lens.training.passes import Forms, Passes, Tokens, log_probs, shared_log_probs

WASTE = 128  # padded tokens that one pass may hold; a further pass over a small model on a CPU costs about as much
LAUNCHES = 10**9  # on a GPU: parameters below which a pass costs what launching it costs, whatever its tokens

logger = logging.getLogger(__name__)


class Steps:
    """Rows -> losses, with gradients: what `training.loop` calls in every step.

    Args:
        model: with nothing attached yet.
        objectives: of each run.
        passes: how.
        owned: whether several adapters are attached side by side, so that each pass says whose its rows are.

    Attributes:
        tokens: what was run so far.
    """

    def __init__(self, model: Any, objectives: Sequence[Objective], passes: Passes, *, owned: bool) -> None:
        self.model, self.objectives, self.passes, self.owned = model, objectives, passes, owned
        self.tokens = Tokens()
        self.waste = _waste(model) if passes.near_lengths else None
        pairs = any(o.reference is not None for o in objectives)
        # A hook of the user's own may count places, which a pass over the answers alone would shift.
        wanted = pairs and passes.share_prompts and not passes.checkpointing and not is_watched(model)
        self.sharing = wanted and _cache_is_exact(model)

    def __call__(self, shares: Sequence[Share]) -> list[Tensor]:
        """Task loss of each run on its rows; gradients are added to its parameters."""
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
        """One pass (or two, with shared prompts) forward and backward; what it adds to each run's loss."""
        owner = torch.tensor([i for i, _ in units]) if self.owned else None
        if self.sharing and _sharing_pays(forms, self.waste or 0):
            sums = shared_log_probs(self.model, forms, owner, self.tokens)
        else:
            sums = log_probs(self.model, forms, owner, self.passes, self.tokens)
        found, at = {}, 0
        for i in dict.fromkeys(i for i, _ in units):
            rows = [row for run, row in units if run == i]
            n = sum(len(self.objectives[i].rows[row]) for row in rows)
            found[i] = self.objectives[i].total(rows, sums[at : at + n].view(len(rows), -1)) / parts[i]
            at += n
        torch.stack(list(found.values())).sum().backward()
        return {i: loss.detach() for i, loss in found.items()}


def _waste(model: Any) -> int:
    if device_of(model).type == "cpu":
        return WASTE
    return WASTE * max(1, LAUNCHES // sum(p.numel() for p in model.parameters()))


def _cache_is_exact(model: Any) -> bool:
    """Whether going on behind left-padded prompts gives what one pass gives."""
    try:
        return attention_window(model) is None and gaps_are_exact(model)
    except ModelError as e:
        logger.info("prompts are not shared in training: %s", e)
        return False


def _sharing_pays(forms: Sequence[Forms], waste: int) -> bool:
    """Whether the prompts' second pass is saved more than the tokens that a pass may waste; pairs behind one prompt only."""
    if not all(len(f) == 2 and f[0].start == f[1].start and min(e.n_labels for e in f) > 1 for f in forms):
        return False
    both = 2 * max(len(e.ids) for f in forms for e in f)
    apart = max(f[0].start for f in forms) + 2 * max(e.n_labels - 1 for f in forms for e in f)
    return len(forms) * (both - apart) > waste
