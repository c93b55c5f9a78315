"""Text to batches: the tokenizer's prefix once, EOS after a learned answer, padding with a mask that is always passed.

Prompt and answer are tokenized as one text, as the model would read it. The answer starts where the joined ids
differ from the prompt's own ids (if a tokenizer merges across the border, at the merged token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lofit_lens.errors import DataError, InputError
from lofit_lens.models import ChatText, check_ids, rules_of
from lofit_lens.tasks.chat import Conversation, Turn, turn_of
from lofit_lens.tasks.examples import PairExample, SFTExample, TrainingExample


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with what the tokenizer itself prepends (mostly BOS or nothing), once; see `TokenRules`.

    A conversation goes through the tokenizer's chat template, and nothing is prepended.

    Raises:
        InputError: a conversation for which the tokenizer has no chat template, or one that does not accept it.
        DataError: a token that the model's embedding does not have.
    """
    if isinstance(text, Conversation):
        text = turn_of(tokenizer, text).prompt
    rules, ids = rules_of(tokenizer), list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
    check_ids(tokenizer, ids, rules)
    front = () if isinstance(text, ChatText) else rules.front
    return ids if tuple(ids[: len(front)]) == front else [*front, *ids]


@dataclass(frozen=True)
class Encoded:
    """Ids of a prompt with its continuation; `ids[start:]` is the continuation.

    `merged` is True if the tokenizer merged the end of the prompt and the start of the continuation into one token, so that
    `ids[start:]` begins with a part of the prompt. `marks` says for each id of the prompt whether the row marks it (`marks_of`).
    """

    ids: tuple[int, ...]
    start: int
    merged: bool = False
    marks: tuple[bool, ...] | None = None

    @property
    def n_labels(self) -> int:
        """Number of continuation tokens."""
        return len(self.ids) - self.start


def encode_continuations(
    tokenizer: Any, prompt: str, continuations: Sequence[str], *, eos: bool = False
) -> tuple[Encoded, ...]:
    """Tokenize prompt + continuation as one text, for each continuation; with `eos`, the end token belongs to the continuation.

    After a conversation, a continuation is the assistant's turn: the white space around it is stripped, and the template's own
    end token ends it.

    Raises:
        DataError: a prompt or continuation without tokens, or a marked character in the continuation's first token.
    """
    turn = turn_of(tokenizer, prompt)
    before = encode(tokenizer, turn.prompt)
    marks = marks_of(tokenizer, turn, before)
    found = []
    for continuation in continuations:
        whole = encode(tokenizer, turn.prompt + turn.answer(continuation))
        start = common_length([before, whole])
        if eos and turn.end is not None:
            whole.append(turn.end)
            check_ids(tokenizer, (turn.end,), rules_of(tokenizer))
        if start == 0 or start >= len(whole):
            what = "the prompt has no token" if start == 0 else "the answer has no token"
            raise DataError(f"{what}: prompt {prompt[-60:]!r}, answer {continuation[:60]!r}")
        if marks and any(marks[start:]):
            raise DataError(
                f"the tokenizer merges the marked end of {prompt[-60:]!r} and the answer {continuation[:60]!r} into one token; "
                "mark less, or put white space between them"
            )
        found.append(Encoded(tuple(whole), start, start < len(before), marks and marks[:start]))
    return tuple(found)


def marks_of(tokenizer: Any, turn: Turn, ids: Sequence[int]) -> tuple[bool, ...] | None:
    """Which ids of a prompt overlap its marked characters (`tasks.Marked`); None if it marks none.

    Args:
        tokenizer: a tokenizer that gives offsets.
        turn: the prompt's turn.
        ids: `encode(tokenizer, turn.prompt)`.

    Raises:
        InputError: a tokenizer that does not say which characters a token covers.
        DataError: marked characters that no token covers.
    """
    if not turn.spans:
        return None
    if not tokenizer.is_fast:
        raise InputError(
            "this tokenizer does not say which characters a token covers (it is not a fast tokenizer), so positions by row "
            "cannot be found; load the model with a fast tokenizer, or edit other positions"
        )
    offsets = tokenizer(str(turn.prompt), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for start, end in turn.spans:
        if not any(first < end and last > start for first, last in offsets):
            raise DataError(
                f"no token covers the characters {start} to {end} of {turn.prompt[:60]!r}; mark more than a space"
            )
    named = [any(first < end and last > start for start, end in turn.spans) for first, last in offsets]
    return (*[False] * (len(ids) - len(named)), *named)


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Number of ids that all rows begin with."""
    ids = [tuple(row) for row in rows]
    low, high = min(ids), max(ids)  # a prefix of both is a prefix of every row sorted between them
    n = 0
    while n < min(len(low), len(high)) and low[n] == high[n]:
        n += 1
    return n


def encode_training(tokenizer: Any, example: TrainingExample) -> tuple[Encoded, ...]:
    """One sequence for SFT; chosen and rejected for DPO."""
    if isinstance(example, SFTExample):
        return encode_continuations(tokenizer, example.prompt, [example.answer], eos=True)
    assert isinstance(example, PairExample)
    return encode_continuations(tokenizer, example.prompt, [example.chosen, example.rejected], eos=True)


@dataclass(frozen=True)
class Batch:
    """Padded sequences.

    Attributes:
        tokens: `[batch, pos]` ids.
        mask: `[batch, pos]`, 1 = token, 0 = padding.
        labels: `[batch, pos]`, True where the token is to be predicted (from the position before it).
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    labels: Bool[Tensor, "batch pos"]


def pad(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], pad_id: int, device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Pad rows of ids to the longest; returns ids and mask."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = 1
    return tokens.to(device), mask.to(device)


def collate(rows: Sequence[Encoded], *, pad_id: int, device: torch.device | str) -> Batch:
    """Right-padded batch with the continuation tokens as labels."""
    tokens, mask = pad([r.ids for r in rows], side="right", pad_id=pad_id, device=device)
    labels = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        labels[i, row.start : len(row.ids)] = True
    return Batch(tokens, mask, labels.to(device))


def pad_id(tokenizer: Any) -> int:
    """An id for padding; the mask hides it, so any id will do if the tokenizer names none."""
    rows = rules_of(tokenizer).n_vocab
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None and (rows is None or found < rows):  # TransformerLens may add one beyond the embedding
            return int(found)
    return 0
