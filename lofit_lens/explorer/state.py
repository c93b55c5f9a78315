"""What the reader has chosen (the two rankings shown, K of each, the open head, the marked heads), and the numbers that follow.

No widget and no model here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from lofit_lens.analysis.overlap import overlap
from lofit_lens.checks import check_is, check_one_of
from lofit_lens.errors import InputError, unknown
from lofit_lens.explorer.source import PARTS, Entry, Source
from lofit_lens.heads import Head, HeadSet, check_k

SIDES = ("left", "right")


class State:
    """The reader's choices over a source.

    Args:
        source: what can be shown.
        k: heads of each side: one number, a pair, or None for the usual ones.

    Raises:
        InputError: a K that a ranking does not have.
    """

    def __init__(self, source: Source, k: int | Sequence[int] | None = None) -> None:
        self.source = source
        entries = list(source.entries.values())
        self.shown: list[Entry] = [entries[0], _second(entries)]
        self._k = [entry.k for entry in self.shown]
        self.linked = self._k[0] == self._k[1]
        self.head: Head | None = None
        self._selection: list[Head] = []
        self._grids: dict[str, dict[str, Any]] = {}
        self._overlaps: dict[tuple[Any, ...], pd.Series] = {}
        if k is not None:
            self.set_k(k)

    # ------------------------------------------------------------------------------------------------ choosing

    def show(self, side: str, name: str | Sequence[Any]) -> None:
        """Show another ranking on a side; K stays, as far as the ranking has so many heads.

        Raises:
            InputError: no such ranking.
        """
        self._show(_side(side), self.source.entry(name))

    def choose(self, side: str, part: str, value: Any) -> None:
        """Change one part of a side's name (`"name"`, or `"task"`, `"method"`, `"seed"`), the others kept where that exists.

        Raises:
            InputError: nothing of that value.
        """
        i = _side(side)
        if part == "name":
            self._show(i, self.source.entry(value))
            return
        check_one_of("part of a head set's name", part, ("name", *PARTS))
        found = [e for e in self.source.entries.values() if getattr(e, part) == value]
        if not found:
            raise unknown(part, value, self._values(part, self.source.entries.values()))
        now = self.shown[i]
        # The earlier a part stands in PARTS, the more it counts; of equals the first entry.
        self._show(i, max(found, key=lambda e: [getattr(e, p) == getattr(now, p) for p in PARTS if p != part]))

    def _show(self, i: int, entry: Entry) -> None:
        self.shown[i] = entry
        self._k[i] = min(self._k[i], len(entry.ranking))

    @property
    def k(self) -> tuple[int, int]:
        """Heads of the left and the right set."""
        return (self._k[0], self._k[1])

    def set_k(self, k: int | Sequence[int]) -> None:
        """Set K of both sides, by one number or a pair.

        Raises:
            InputError: no whole number, or more heads than a ranking has.
        """
        pair: list[Any] = list(k) if isinstance(k, Sequence) and not isinstance(k, str) else [k, k]
        if len(pair) != 2:
            raise InputError(f"k = {k!r}; give one number of heads for both sides, or a pair (left, right)")
        for number, entry in zip(pair, self.shown, strict=True):
            check_k(number, len(entry.ranking), entry.name)
        self._k, self.linked = [int(n) for n in pair], pair[0] == pair[1]

    def move_k(self, side: str, k: int) -> None:
        """Set K of one side; where both are linked, the other side follows as far as it can.

        Raises:
            InputError: more heads than the ranking has.
        """
        i = _side(side)
        check_k(k, len(self.shown[i].ranking), self.shown[i].name)
        self._k[i] = k
        if self.linked:
            self._k[1 - i] = min(k, len(self.shown[1 - i].ranking))

    def link(self, linked: bool) -> None:
        """Move both K together, or each alone. Linking takes the left one for both."""
        check_is(linked, bool, "linked", "True or False")
        self.linked = linked
        if linked:
            self.move_k("left", self._k[0])

    def open(self, head: Head | str | Sequence[int] | None) -> None:
        """Open a head; None closes it.

        Raises:
            InputError: not a head of this model.
        """
        self.head = None if head is None else self._checked([head])[0]

    def click(self, head: Head | str | Sequence[int]) -> None:
        """What a click does: open the head, and mark it, or take its mark away.

        Raises:
            InputError: not a head of this model.
        """
        self.open(head)
        assert self.head is not None
        if self.head in self._selection:
            self._selection.remove(self.head)
        else:
            self._selection.append(self.head)

    @property
    def selection(self) -> HeadSet:
        """The marked heads, in the order of clicking."""
        return HeadSet(self._selection, shape=self.source.shape, label="selection")

    def select(self, heads: HeadSet | Iterable[Any]) -> None:
        """Mark these heads and no others.

        Raises:
            InputError: a head that is not of this model, or one twice.
        """
        self._selection = self._checked(heads)

    def _checked(self, heads: Iterable[Any]) -> list[Head]:
        return list(HeadSet(heads, shape=self.source.shape))

    # ------------------------------------------------------------------------------------------------- numbers

    @property
    def tops(self) -> tuple[HeadSet, HeadSet]:
        """The best K heads of the left and the right ranking."""
        left, right = (e.ranking.top(k) for e, k in zip(self.shown, self._k, strict=True))
        return (left, right)

    @property
    def sets(self) -> dict[str, HeadSet]:
        """Name -> its best K heads; one entry where both sides show the same ranking with the same K."""
        left, right = self.tops
        names = [e.name for e in self.shown]
        if names[0] == names[1] and self._k[0] != self._k[1]:
            names = [f"{names[0]} ({side})" for side in SIDES]
        return {names[0]: left, names[1]: right}

    @property
    def shared(self) -> HeadSet:
        """Heads of both sets, in the left one's order."""
        left, right = self.tops
        return left & right

    @property
    def overlap(self) -> pd.Series:
        """How many heads both sets share, beside chance: the row of `analysis.overlap`, a = left, b = right."""
        at = (*(e.name for e in self.shown), *self._k)
        if at not in self._overlaps:
            left, right = self.tops
            row = overlap({"left": left, "right": right}, shape=self.source.shape).iloc[0].copy()
            row["a"], row["b"] = at[:2]
            self._overlaps = {at: row}  # the last one: a click on a head changes nothing here
        return self._overlaps[at].copy()

    def table(self, head: Head) -> pd.DataFrame:
        """A head in every ranking: set, task, method, seed, kind, score (NaN without), rank (NaN where it is not listed), of.

        One row a ranking, in the source's order; `of` is the number of heads ranked.
        """
        rows = []
        for e in self.source.entries.values():
            rows.append({
                "set": e.name, "task": e.task, "method": e.method, "seed": e.seed, "kind": e.kind,
                "score": float("nan") if e.scores is None else e.scores[head],
                "rank": float(e.ranks.get(head, float("nan"))), "of": len(e.ranking),
            })  # fmt: skip
        return pd.DataFrame(rows)

    # ---------------------------------------------------------------------------------------------- for a view

    def grids(self) -> list[dict[str, Any]]:
        """What changes with the shown rankings only: of each side name, kind, scores and ranks by head (layer-major)."""
        for entry in self.shown:
            if entry.name not in self._grids:
                self._grids[entry.name] = _grid(entry, self.source.shape)
        return [self._grids[entry.name] for entry in self.shown]

    def choosers(self, side: str) -> list[dict[str, Any]]:
        """Of a side: each part of the name that leaves a choice, with what is allowed and what is chosen."""
        now, entries = self.shown[_side(side)], list(self.source.entries.values())
        if not self.source.has_tasks:
            return [{"part": "name", "label": "set", "options": [e.name for e in entries], "value": now.name}]
        found = []
        for i, part in enumerate(PARTS):
            # A part's values are those that go with the parts in front of it.
            allowed = [e for e in entries if all(getattr(e, p) == getattr(now, p) for p in PARTS[:i])]
            options = self._values(part, allowed)
            if part != "seed" or (len(options) > 1 and None not in options):
                found.append({"part": part, "label": part, "options": options, "value": getattr(now, part)})
        return found

    @staticmethod
    def _values(part: str, entries: Iterable[Entry]) -> list[Any]:
        return list(dict.fromkeys(getattr(e, part) for e in entries))


def _side(side: str) -> int:
    check_one_of("side", side, SIDES)
    return SIDES.index(side)


def _second(entries: list[Entry]) -> Entry:
    """What stands on the right at first: another method on the first entry's task, else the next entry, else the same."""
    first = entries[0]
    others = [e for e in entries[1:] if e.task == first.task and e.method != first.method]
    return (others or entries[1:] or entries)[0]


def _grid(entry: Entry, shape: tuple[int, int]) -> dict[str, Any]:
    heads = [Head(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
    if entry.scores is not None:
        scores = [float(f"{x:.6g}") for x in entry.scores.values.flatten().tolist()]
        legend = [f"{x + 0.0:.4g}" for x in (min(scores), max(scores))]
    else:
        scores, legend = None, [f"rank {len(entry.ranking)}", "rank 1"]
    shade = [entry.shades.get(h) for h in heads]
    return {
        "name": entry.name, "kind": entry.kind, "scores": scores, "ranks": [entry.ranks.get(h, 0) for h in heads],
        "shade": [None if t is None else round(t, 3) for t in shade], "legend": legend, "k_max": len(entry.ranking),
    }  # fmt: skip
