"""Where an edit acts: at every position, or at certain positions of prompt and answer.

A pass of the scorer or of the decoder runs only a part of each sequence (the rest is cached), so z does not tell an edit
which tokens it holds. Whoever runs a pass states the `Borders` of its sequences; the pass knows its `Layout`;
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
    """Where each sequence and its prompt end, and which adapter edits it.

    Attributes:
        prompt: number of prompt tokens (BOS included); the answer follows.
        length: number of all tokens; None while the answer is being decoded.
        owner: which of several adapters attached side by side edits the sequence; None if there is only one.
        marks: prompt tokens that each row names itself (see `marks_of_rows`); None if no row does.
    """

    prompt: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"] | None = None
    owner: Int[Tensor, " batch"] | None = None
    marks: Int[Tensor, "batch place"] | None = None

    def select(self, rows: Int[Tensor, " n"]) -> "Borders":
        """Return the borders of some rows."""
        at = rows.to(self.prompt.device)
        length, owner, marks = (None if x is None else x[at] for x in (self.length, self.owner, self.marks))
        return Borders(self.prompt[at], length, owner, marks)

    @classmethod
    def together(cls, parts: "Sequence[Borders]") -> "Borders":
        """Concatenate the borders of several batches."""
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
    """Build marks for `Borders`: 1 = the row names this prompt token, 0 = it does not; -1 throughout = it names no positions.

    Args:
        rows: for each prompt, one value per token, BOS included; None = it names no positions. If all are None, returns None.
    """
    if all(row is None for row in rows):
        return None
    width = max(len(row) for row in rows if row is not None)
    return torch.tensor([[-1] * width if row is None else [*map(int, row), *[0] * (width - len(row))] for row in rows])


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens that one pass runs, and their positions.

    Attributes:
        place: position of each token in its own sequence, from 0 (BOS included), padding not counted; -1 = padding.
        tokens: ids of the whole sequences so far, those of this pass last; padding where `mask` is 0.
        mask: 1 = token, 0 = padding, for `tokens`.
        borders: of the sequences; None for plain text, which has no prompt.
        found: results cached for this pass, since every edited layer asks for them.
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
        """Build the layout of a pass over the last `n_new` columns."""
        place = torch.where(mask.bool(), mask.cumsum(dim=1) - 1, -1)[:, mask.shape[1] - n_new :]
        return cls(place, tokens, mask, borders)

    @property
    def end(self) -> Int[Tensor, "batch 1"]:
        """Number of tokens of each sequence, as far as known."""
        known = self.borders.length if self.borders is not None else None
        return (self.mask.sum(dim=1) if known is None else known.to(self.place.device))[:, None]


@dataclass(frozen=True)
class Positions:
    """The positions on which an edit acts. Made by `Positions.parse`.

    - `all`: every token, prompt included.
    - `answer`: the answer's tokens (ITI's multiple choice). The first of them is predicted from the prompt's last token,
      which is not edited. While decoding: from the prompt's last token on, as in ITI's generation.
    - `second`: the answer's tokens except the first, as in ITI's public code when it scores answers. While decoding: as
      `answer`.
    - `predicting`: from the prompt's last token on: all positions that predict a token of the answer.
    - `last`: the last token of the sequence; while decoding, the newest one of each step.
    - `f7+l7` (any numbers): the prompt's first 7 and last 7 tokens (ReFT); the answer is not edited.
    - `row`: the prompt tokens that each row names itself (`tasks.Marked`, or a field `positions` of your own rows); the
      answer is not edited, and a text that names no positions is refused.

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
            InputError: an unknown name, or `f0+l0`, which edits nothing.
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
        """Whether each row names its own positions."""
        return self.name == "row"

    @property
    def tail(self) -> int:
        """Number of last prompt tokens that may be treated differently from those before them."""
        return self.final or (0 if self.everywhere else 1)

    def mask(self, layout: Layout) -> Bool[Tensor, "batch new"]:
        """Return True where the edit acts; padding is False."""
        if self not in layout.found:
            layout.found[self] = self._mask(layout)
        return layout.found[self]

    def acts(self, layout: Layout) -> bool:
        """Return whether the edit acts anywhere in this pass."""
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
    "names no positions, and what is attached acts at positions 'row', which each row names; give it as "
    "tasks.Marked(text, positions), or its row a field 'positions'; or act elsewhere (e.g. positions='all')"
)


def check_marked(positions: "Iterable[Positions]", marks: Sequence[Sequence[bool] | None], what: str) -> None:
    """Check that each row names its positions, if any edit acts on those.

    Args:
        positions: of all edits.
        marks: of each row.
        what: name for a row, e.g. `"training example"`.

    Raises:
        InputError: a row does not; gives its number, from 1.
    """
    if None in marks and any(p.by_row for p in positions):
        raise InputError(f"{what} {list(marks).index(None) + 1} {NAMES_NONE}")


_running: "weakref.WeakKeyDictionary[nn.Module, Layout]" = weakref.WeakKeyDictionary()
_declared: "weakref.WeakKeyDictionary[nn.Module, list[tuple[Positions, str]]]" = weakref.WeakKeyDictionary()
_before: "weakref.WeakKeyDictionary[nn.Module, list[Callable[[Layout], None]]]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def laid_out(model: Any, layout: Layout) -> Iterator[None]:
    """State the layout of the pass inside the block; functions registered with `before_each_pass` are called first."""
    for tell in _before.get(model, ()):
        tell(layout)
    with resumed(model, layout):
        yield


def stated_layout(model: Any) -> Layout | None:
    """Return the layout that `laid_out` states now; None outside of it."""
    return _running.get(model)


@contextlib.contextmanager
def resumed(model: Any, layout: Layout | None) -> Iterator[None]:
    """State a layout again, for a recomputed part of a pass; registered functions are not called."""
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
    """Return the current pass's layout; a call that stated none counts as text without padding or cache."""
    found = _running.get(model)
    if found is not None:
        return found
    whole = torch.ones(batch, pos, dtype=torch.long, device=device)
    return Layout.of(torch.zeros_like(whole), whole, pos, None)


@contextlib.contextmanager
def declared(model: Any, positions: Positions, name: str) -> Iterator[None]:
    """Declare, within the block, that something attached acts on these positions, and its name."""
    listed = _declared.setdefault(model, [])
    listed.append((positions, name))
    try:
        yield
    finally:
        listed.remove((positions, name))


def positions_of(model: Any) -> tuple[Positions, ...]:
    """Return the positions of everything attached that declared them."""
    return tuple(positions for positions, _ in _declared.get(model, ()))


def names_of(model: Any) -> tuple[str, ...]:
    """Return the names of everything attached that declared itself."""
    return tuple(name for _, name in _declared.get(model, ()))


@contextlib.contextmanager
def before_each_pass(model: Any, tell: Callable[[Layout], None]) -> Iterator[None]:
    """Call a function with the layout of each pass before it runs, within the block."""
    listed = _before.setdefault(model, [])
    listed.append(tell)
    try:
        yield
    finally:
        listed.remove(tell)
