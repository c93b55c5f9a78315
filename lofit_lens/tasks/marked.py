"""Prompts that say which of their characters an adapter at positions "row" edits."""

from collections.abc import Sequence
from typing import Any, TypeGuard

from lofit_lens.checks import shown
from lofit_lens.errors import InputError

Spans = tuple[tuple[int, int], ...]


class Marked(str):
    """A prompt with marked characters; marks stay on their characters when text is prepended or appended.

    An adapter at `positions="row"` edits the tokens that overlap a mark, whichever tokenizer makes them. Tokens that a tokenizer
    prepends (BOS) have no characters and are never marked.

    `Marked(text, positions)`: `text` is the prompt; `positions` are `[start, end]` in characters (end excluded), or a text that
    occurs once in the prompt, or a list of these.

    Attributes:
        spans: (start, end) of each mark, in characters.

    Raises:
        InputError: nothing is marked, a span is outside the text, or a text does not occur exactly once in it.

    Examples:
        >>> Marked("The capital of Peru is", "Peru").spans
        ((15, 19),)
    """

    spans: Spans

    def __new__(cls, text: str, positions: Any) -> "Marked":
        """See the class."""
        made = super().__new__(cls, text)
        listed = [positions] if isinstance(positions, str) or _is_span(positions) else positions
        if not isinstance(listed, Sequence) or not listed:
            raise InputError(
                f"positions are {shown(positions)}; give spans of characters, e.g. [[0, 5]], or texts of the prompt"
            )
        made.spans = tuple(_span(text, one) for one in listed)
        return made

    def __add__(self, other: str) -> "Marked":
        return Marked(str(self) + other, self.spans)

    def __radd__(self, other: str) -> "Marked":
        return Marked(other + str(self), [(start + len(other), end + len(other)) for start, end in self.spans])

    def __repr__(self) -> str:
        return f"Marked({str(self)!r}, {[list(span) for span in self.spans]})"

    def __getnewargs__(self) -> tuple[Any, ...]:  # for pickling, into worker processes
        return str(self), self.spans


def spans_of(prompt: str) -> Spans:
    """Marked characters of a prompt; empty if it marks none."""
    return prompt.spans if isinstance(prompt, Marked) else ()


def _is_span(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int for n in value)


def _span(text: str, wanted: Any) -> tuple[int, int]:
    if isinstance(wanted, str) and wanted:
        if (n := text.count(wanted)) != 1:
            raise InputError(
                f"{wanted!r} occurs {n} times in {text[:60]!r}; give a text that occurs once, or [start, end]"
            )
        return text.index(wanted), text.index(wanted) + len(wanted)
    if not _is_span(wanted) or not 0 <= wanted[0] < wanted[1] <= len(text):
        raise InputError(
            f"positions hold {shown(wanted)}; give [start, end] with 0 <= start < end <= {len(text)} (characters of the "
            "prompt), or a text of the prompt"
        )
    return wanted[0], wanted[1]
