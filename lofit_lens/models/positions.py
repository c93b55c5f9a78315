"""Where an edit acts: at every position, or at certain places of prompt and answer.

A pass of the scorer or of the decoder runs only a part of each sequence (the rest is cached), so an edit cannot see from z
alone which tokens it has before it. Whoever runs a pass states the `Borders` of its sequences; the pass knows its `Layout`;
`Positions` turn that into the positions to edit.
"""

import contextlib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lofit_lens.errors import InputError, unknown

NAMES = ("all", "answer", "second", "predicting", "last", "row")


@dataclass(frozen=True, eq=False)
class Borders:
    """Where the prompt of each sequence ends, and the sequence itself; and whose it is.

    Attributes:
        prompt: number of prompt tokens (BOS included); the answer follows.
        length: number of all tokens; None where the answer is still being decoded.
        owner: which of several adapters that are attached side by side edits the sequence; None where there is one alone.
        marks: prompt tokens that each row names itself (see `marks_of_rows`); None where no row does.
    """

    prompt: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"] | None = None
    owner: Int[Tensor, " batch"] | None = None
    marks: Int[Tensor, "batch place"] | None = None

    def select(self, rows: Int[Tensor, " n"]) -> "Borders":
        """Those of some rows."""
        at = rows.to(self.prompt.device)
        length, owner, marks = (None if x is None else x[at] for x in (self.length, self.owner, self.marks))
        return Borders(self.prompt[at], length, owner, marks)

    @classmethod
    def together(cls, parts: "Sequence[Borders]") -> "Borders":
        """Those of several batches, one after the other."""
        length, owner = (
            None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
            for name in ("length", "owner")
        )
        return Borders(torch.cat([part.prompt for part in parts]), length, owner, _marks_together(parts))


def _marks_together(parts: Sequence[Borders]) -> Int[Tensor, "batch place"] | None:
    width = max(0 if part.marks is None else part.marks.shape[1] for part in parts)
    if not width:
        return None
    none = [torch.full((len(part.prompt), width), -1) for part in parts]
    padded = [
        n if part.marks is None else nn.functional.pad(part.marks, (0, width - part.marks.shape[1]))
        for n, part in zip(none, parts, strict=True)
    ]
    return torch.cat(padded)


def marks_of_rows(rows: Sequence[Sequence[bool] | None]) -> Int[Tensor, "batch place"] | None:
    """Marks for `Borders`: 1 = the row names this token of its prompt, 0 = it does not; -1 throughout = it names none at all.

    Args:
        rows: of each prompt one value a token, BOS included; None = it says nothing. All None gives None.
    """
    if all(row is None for row in rows):
        return None
    width = max(len(row) for row in rows if row is not None)
    return torch.tensor([[-1] * width if row is None else [*map(int, row), *[0] * (width - len(row))] for row in rows])


@dataclass(frozen=True, eq=False)
class Layout:
    """What one pass runs.

    Attributes:
        place: place of each token in its own sequence, from 0 (BOS included), padding not counted; -1 = padding.
        tokens: ids of the whole sequences so far, those of this pass last; padding where `mask` is 0.
        mask: 1 = token, 0 = padding, for `tokens`.
        borders: of the sequences; None for plain text, which has no prompt.
        found: what was worked out for this pass already, since every edited layer asks for it.
    """

    place: Int[Tensor, "batch new"]
    tokens: Int[Tensor, "batch whole"]
    mask: Int[Tensor, "batch whole"]
    borders: Borders | None = None
    found: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, tokens: Int[Tensor, "batch whole"], mask: Int[Tensor, "batch whole"], n_new: int, borders: Borders | None
    ) -> "Layout":
        """The layout of a pass over the last `n_new` columns."""
        place = torch.where(mask.bool(), mask.cumsum(dim=1) - 1, -1)[:, mask.shape[1] - n_new :]
        return cls(place, tokens, mask, borders)

    @property
    def end(self) -> Int[Tensor, "batch 1"]:
        """Number of tokens of each sequence, as far as it is known."""
        known = self.borders.length if self.borders is not None else None
        return (self.mask.sum(dim=1) if known is None else known.to(self.place.device))[:, None]


@dataclass(frozen=True)
class Positions:
    """Which positions an edit acts on. Made by `Positions.parse`.

    - `all`: every token, prompt included.
    - `answer`: the answer's tokens (ITI's multiple choice). The first of them is predicted from the prompt's last token,
      which stays as it is. While decoding: from the prompt's last token on, as in ITI's generation.
    - `second`: the answer's tokens but its first, where ITI's public code begins when it scores answers. While decoding: as
      `answer`.
    - `predicting`: from the prompt's last token on: all places that an answer's token is predicted from.
    - `last`: the last token of the sequence; while decoding, the newest one of each step.
    - `f7+l7` (any numbers): the prompt's first 7 and last 7 tokens (ReFT); the answer is not edited.
    - `row`: the tokens of the prompt that each row names itself (`tasks.Marked`, or a field `positions` of one's own rows); the
      answer is not edited, and a text that names none is refused.

    Plain text has no prompt: `answer`, `second` and `predicting` then mean every token, `f7+l7` the text's
    first and last ones, `last` its last one.
    """

    name: str
    first: int = 0
    final: int = 0

    @classmethod
    def parse(cls, text: "str | Positions") -> "Positions":
        """Read a name.

        Raises:
            InputError: an unknown name, or first and last prompt tokens that are none.
        """
        if isinstance(text, Positions):
            return text
        found = re.fullmatch(r"f(\d+)\+l(\d+)", text) if isinstance(text, str) else None
        if found and (int(found[1]) or int(found[2])):
            return cls(text, int(found[1]), int(found[2]))
        if text not in NAMES:
            raise unknown("positions", text, (*NAMES, "f7+l7"), hint="f7+l7: the prompt's first 7 and last 7 tokens.")
        return cls(text)

    @property
    def everywhere(self) -> bool:
        """Whether every token is edited, so that nothing needs to be known about the sequence."""
        return self.name == "all"

    @property
    def by_row(self) -> bool:
        """Whether each row names its own."""
        return self.name == "row"

    @property
    def tail(self) -> int:
        """Prompt tokens, counted from the prompt's end, that may be treated otherwise than those in front of them."""
        return self.final or (0 if self.everywhere else 1)

    def mask(self, layout: Layout) -> Bool[Tensor, "batch new"]:
        """True where the edit acts; padding is False."""
        if self not in layout.found:
            layout.found[self] = self._mask(layout)
        return layout.found[self]

    def acts(self, layout: Layout) -> bool:
        """Whether the edit acts anywhere in this pass."""
        if (self, "acts") not in layout.found:
            layout.found[self, "acts"] = bool(self.mask(layout).any())
        return layout.found[self, "acts"]

    def _mask(self, layout: Layout) -> Bool[Tensor, "batch new"]:
        place, borders = layout.place, layout.borders
        real = place >= 0
        prompt = None if borders is None else borders.prompt.to(place.device)[:, None]
        decoding = borders is not None and borders.length is None
        if self.first or self.final:
            end = layout.end if prompt is None else prompt
            return real & (place < end) & ((place < self.first) | (place >= end - self.final))
        if self.by_row:
            marks = None if borders is None else borders.marks
            if prompt is None or marks is None or bool((marks < 0).any()):
                raise InputError(f"a text {NAMES_NONE}")
            marks = marks.to(place.device)
            named = marks.gather(1, place.clamp(0, marks.shape[1] - 1)) == 1
            return real & (place < prompt.clamp(max=marks.shape[1])) & named
        if self.name == "last" and not decoding:
            return real & (place == layout.end - 1)
        if self.everywhere or prompt is None:
            return real
        before = 1 if decoding else {"answer": 0, "second": -1}.get(self.name, 1)
        return real & (place >= prompt - before)

    def __str__(self) -> str:
        return self.name


ALL = Positions("all")
NAMES_NONE = (
    "names no positions, and what is attached acts at positions 'row', those that each row names; give it as "
    "tasks.Marked(text, positions), or its row a field 'positions'; or act elsewhere (e.g. positions='all')"
)


def check_marked(positions: "Iterable[Positions]", marks: Sequence[Sequence[bool] | None], what: str) -> None:
    """Check that each row names its positions, where something acts on those.

    Args:
        positions: of all that acts.
        marks: of each row.
        what: a row is called, e.g. `"training example"`.

    Raises:
        InputError: one does not; names its number, from 1.
    """
    if None in marks and any(p.by_row for p in positions):
        raise InputError(f"{what} {list(marks).index(None) + 1} {NAMES_NONE}")


_running: "weakref.WeakKeyDictionary[nn.Module, Layout]" = weakref.WeakKeyDictionary()
_declared: "weakref.WeakKeyDictionary[nn.Module, list[tuple[Positions, str]]]" = weakref.WeakKeyDictionary()
_before: "weakref.WeakKeyDictionary[nn.Module, list[Callable[[Layout], None]]]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def laid_out(model: Any, layout: Layout) -> Iterator[None]:
    """State what the pass inside the block runs; everything registered with `before_each_pass` is told first."""
    for tell in _before.get(model, ()):
        tell(layout)
    with resumed(model, layout):
        yield


def stated_layout(model: Any) -> Layout | None:
    """What `laid_out` states now; None outside of it."""
    return _running.get(model)


@contextlib.contextmanager
def resumed(model: Any, layout: Layout | None) -> Iterator[None]:
    """State again what was stated, for a part of a pass that is run once more; nobody is told."""
    outer = _running.get(model)
    _state(model, layout)
    try:
        yield
    finally:
        _state(model, outer)


def _state(model: Any, layout: Layout | None) -> None:
    if layout is None:
        _running.pop(model, None)
    else:
        _running[model] = layout


def layout_of(model: Any, batch: int, pos: int, device: torch.device) -> Layout:
    """Layout of the pass that runs now; a call that stated none is taken as text without padding and cache."""
    found = _running.get(model)
    if found is not None:
        return found
    whole = torch.ones(batch, pos, dtype=torch.long, device=device)
    return Layout.of(torch.zeros_like(whole), whole, pos, None)


@contextlib.contextmanager
def declared(model: Any, positions: Positions, name: str) -> Iterator[None]:
    """Make known, for the length of the block, that something attached acts on these positions, and what it is called."""
    listed = _declared.setdefault(model, [])
    listed.append((positions, name))
    try:
        yield
    finally:
        listed.remove((positions, name))


def positions_of(model: Any) -> tuple[Positions, ...]:
    """Positions of everything attached that declared them."""
    return tuple(positions for positions, _ in _declared.get(model, ()))


def names_of(model: Any) -> tuple[str, ...]:
    """Names of everything attached that declared itself."""
    return tuple(name for _, name in _declared.get(model, ()))


@contextlib.contextmanager
def before_each_pass(model: Any, tell: Callable[[Layout], None]) -> Iterator[None]:
    """Have a function called with the layout of each pass before it runs."""
    listed = _before.setdefault(model, [])
    listed.append(tell)
    try:
        yield
    finally:
        listed.remove(tell)
