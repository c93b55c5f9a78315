"""Run the shared prefix of all prompts once: a six-shot primer, an instruction, a template's first line.

Prefixes are compared by token ids, so sharing never changes how a text is tokenized.
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

LEAST = 8  # tokens; a shorter prefix costs more to keep than to run again


@dataclass(frozen=True)
class SharedFront:
    """Ids that several prompts begin with, and their keys and values (batch size 1)."""

    ids: tuple[int, ...]
    state: KVState | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def rows(self, n: int) -> KVState | None:
        """The state for `n` rows; None for an empty prefix."""
        return None if self.state is None else self.state.select(torch.zeros(n, dtype=torch.long))


NO_FRONT = SharedFront(())


@torch.no_grad()
def shared_front(
    model: Any, rows: Sequence[Sequence[int]], *, longest: int, marks: Sequence[Sequence[bool] | None] = ()
) -> SharedFront:
    """Run the shared prefix of all rows once, with attached interventions, and leave each row at least one token of its own.

    Rows keep more tokens of their own if an attached intervention treats the end of a prompt specially. The model's cache is
    tested too (see `gaps_are_exact`). The prefix is empty if it would be shorter than `LEAST`, for a single row, and wherever
    padding between prefix and rest would change results: in models that do not count positions over real tokens only, and if
    `longest` exceeds the model's attention window.

    Args:
        model: any HookedTransformer or TransformerBridge.
        rows: ids of all prompts.
        marks: which of these ids each row marks (`marks_of`); if those are edited, rows share only what they mark alike.
        longest: cache positions of the longest sequence that will be run, including new tokens and padding.

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
