"""What all prompts begin with, run once: a six-shot primer, an instruction, a template's first line.

Sharing goes by token ids, so it never changes how a text is tokenised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lofit_lens.models import (
    Borders,
    KVState,
    attention_window,
    device_of,
    gaps_are_exact,
    marks_of_rows,
    positions_of,
    remember,
    tokenizer_of,
)
from lofit_lens.tasks.collate import common_length, pad, pad_id

LEAST = 8  # tokens; a shorter front costs more to keep than to run again


@dataclass(frozen=True)
class SharedFront:
    """Ids that several prompts begin with, and their keys and values (batch of one)."""

    ids: tuple[int, ...]
    state: KVState | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def rows(self, n: int) -> KVState | None:
        """The state for `n` rows; None for an empty front."""
        return None if self.state is None else self.state.select(torch.zeros(n, dtype=torch.long))


NO_FRONT = SharedFront(())


@torch.no_grad()
def shared_front(
    model: Any, rows: Sequence[Sequence[int]], *, longest: int, marks: Sequence[Sequence[bool] | None] = ()
) -> SharedFront:
    """Run what all rows begin with, once, and leave each row a token of its own; interventions that are attached act on it.

    Rows keep more tokens of their own where something attached treats the end of a prompt apart. Also tries the model's cache
    (see `gaps_are_exact`). Empty where it would be shorter than `LEAST`, for a single row, and where padding between front and
    rest would count: in models that do not count positions over real tokens, and where `longest` (places, new ones included)
    exceeds a window that the model attends over.

    Args:
        model: any HookedTransformer or TransformerBridge.
        rows: ids of all prompts.
        marks: which of these each row names (`marks_of`); where something acts on those, rows share what they mark alike.
        longest: places in the cache of the longest sequence that will be run, padding included.

    Raises:
        ModelError: logits that are NaN.
    """
    window, exact = attention_window(model), gaps_are_exact(model)
    if not exact or len(rows) < 2 or (window is not None and longest > window):
        return NO_FRONT
    own = max([1, *(p.tail for p in positions_of(model))])
    shortest = min(map(len, rows))
    n = min(common_length(rows), shortest - own)
    if any(p.by_row for p in positions_of(model)):
        n = min(n, common_length([named or () for named in marks or [()]]))
    if n < LEAST:
        return NO_FRONT
    ids = tuple(rows[0][:n])
    tokens, mask = pad([ids], side="left", pad_id=pad_id(tokenizer_of(model)), device=device_of(model))
    borders = Borders(torch.tensor([shortest]), torch.tensor([shortest + 1]), marks=marks_of_rows([*marks][:1]))
    return SharedFront(ids, remember(model, None, tokens, mask, borders)[1])
