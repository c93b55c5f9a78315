"""The reader's choices (the two rankings shown, K of each, the open head, the marked heads), and the numbers that follow.

No widget and no model here. In the browser `explorer.js` keeps the same choices and sends them here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from lofit_lens.analysis.overlap import overlap
from lofit_lens.checks import check_is
from lofit_lens.errors import InputError
from lofit_lens.explorer.source import Entry, Source
from lofit_lens.heads import Head, HeadScores, HeadSet, check_k
from lofit_lens.plots.heads import head_grid

SIDES = ("left", "right")
CHOSEN = ("shown", "_k", "linked", "_head", "_selection")  # attributes that hold what is chosen


class State:
    """The reader's choices over a source; read and set from code.

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
        self._head: Head | None = None
        self._selection: list[Head] = []
        self._set_k([entry.k for entry in self.shown] if k is None else k)

    def _changed(self) -> None:
        """Do nothing; a view overrides this to follow choices made from code."""

    # ------------------------------------------------------------------------------------------------ choosing

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all sets that can be shown."""
        return tuple(self.source.entries)

    @property
    def left(self) -> str:
        """Name of the set on the left; may be set to another name, or to (task, method) or (task, method, seed).

        K stays unless that set has fewer heads; linked K change together.
        """
        return self.shown[0].name

    @left.setter
    def left(self, name: str | Sequence[Any]) -> None:
        self._show(0, name)

    @property
    def right(self) -> str:
        """Name of the set on the right; may be set as `left`."""
        return self.shown[1].name

    @right.setter
    def right(self, name: str | Sequence[Any]) -> None:
        self._show(1, name)

    def _show(self, i: int, name: str | Sequence[Any]) -> None:
        self.shown[i] = self.source.entry(name)
        k = min(self._k[i], len(self.shown[i].ranking))
        self._k = [k, k] if self.linked else [k if j == i else old for j, old in enumerate(self._k)]
        self._changed()

    @property
    def k(self) -> tuple[int, int]:
        """Number of heads of the left and of the right set; may be set to one number or a pair. Equal numbers move together."""
        return (self._k[0], self._k[1])

    @k.setter
    def k(self, k: int | Sequence[int]) -> None:
        self._set_k(k)
        self._changed()

    def _set_k(self, k: int | Sequence[int]) -> None:
        pair: list[Any] = list(k) if isinstance(k, Sequence) and not isinstance(k, str) else [k, k]
        if len(pair) != 2:
            raise InputError(f"k = {k!r}; give one number of heads for both sides, or a pair (left, right)")
        for number, entry in zip(pair, self.shown, strict=True):
            check_k(number, len(entry.ranking), entry.name)
        self._k, self.linked = [int(n) for n in pair], pair[0] == pair[1]

    @property
    def head(self) -> Head | None:
        """The head that is open; may be set to a head, `"L2H5"` or None."""
        return self._head

    @head.setter
    def head(self, head: Head | str | Sequence[int] | None) -> None:
        self._head = None if head is None else self._checked([head])[0]
        self._changed()

    @property
    def selection(self) -> HeadSet:
        """The heads that the reader marked, in the order of clicking; may be set to any heads of the model."""
        return HeadSet(self._selection, shape=self.source.shape, label="selection")

    @selection.setter
    def selection(self, heads: HeadSet | Iterable[Any]) -> None:
        self._selection = self._checked(heads)
        self._changed()

    def _checked(self, heads: Iterable[Any]) -> list[Head]:
        return list(HeadSet(heads, shape=self.source.shape))

    def choices(self) -> dict[str, Any]:
        """Return all choices as the view keeps them: `left` and `right` (names), `k`, `linked`, `head`, `selection`."""
        return {
            "left": self.left, "right": self.right, "k": list(self._k), "linked": self.linked,
            "head": None if self.head is None else str(self.head), "selection": [str(h) for h in self._selection],
        }  # fmt: skip

    def take(self, choices: Mapping[str, Any]) -> None:
        """Take over all choices of the view, or none of them.

        Raises:
            InputError: an invalid choice.
        """
        made = State(self.source)
        made.shown = [self.source.entry(choices[side]) for side in SIDES]
        made.k, made.head, made.selection = choices["k"], choices["head"], choices["selection"]
        made.linked = choices["linked"]
        check_is(made.linked, bool, "linked", "True or False")
        for name in CHOSEN:
            setattr(self, name, getattr(made, name))

    # ------------------------------------------------------------------------------------------------- numbers

    @property
    def tops(self) -> tuple[HeadSet, HeadSet]:
        """The best K heads of the left and the right ranking."""
        left, right = (e.ranking.top(k) for e, k in zip(self.shown, self._k, strict=True))
        return (left, right)

    @property
    def sets(self) -> dict[str, HeadSet]:
        """Name -> top K heads, as shown; one entry where both sides show the same ranking with the same K."""
        left, right = self.tops
        names = [self.left, self.right]
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
        """The numbers shown, beside chance: the row of `analysis.overlap` with a = left and b = right."""
        left, right = self.tops
        row = overlap({"left": left, "right": right}, shape=self.source.shape).iloc[0].copy()
        row["a"], row["b"] = self.left, self.right
        return row

    def table(self, head: Head | str | Sequence[int] | None = None) -> pd.DataFrame:
        """List a head (None = the open one) in every ranking, one row per ranking, in the source's order.

        Returns:
            set, task, method, seed, kind, score (NaN without), rank (NaN where it is not listed), of (heads ranked).

        Raises:
            InputError: no head open and none given, or not a head of this model.
        """
        wanted = self.head if head is None else self._checked([head])[0]
        if wanted is None:
            raise InputError("no head is open; give one, e.g. ex.table('L2H5')")
        return pd.DataFrame([
            {
                "set": e.name, "task": e.task, "method": e.method, "seed": e.seed, "kind": e.kind,
                "score": float("nan") if e.scores is None else e.scores[wanted],
                "rank": float(e.ranks.get(wanted, float("nan"))), "of": len(e.ranking),
            }
            for e in self.source.entries.values()
        ])  # fmt: skip

    def figure(self) -> go.Figure:
        """Draw the two grids as a figure for a paper, with top K and shared heads marked.

        Raises:
            InputError: a set without scores of all heads.
        """
        scores: dict[str, HeadScores] = {}
        for entry in self.shown:
            if entry.scores is None:
                raise InputError(
                    f"{entry.name} has no scores of all heads to draw; ll.plots.layer_distribution takes head sets"
                )
            scores[entry.name] = entry.scores
        tops = dict(zip((self.left, self.right), self.tops, strict=True))
        shared = {} if self.is_single else dict.fromkeys(scores, self.shared)
        return head_grid(scores, tops, marked=shared, marked_label="shared", title=self.label)

    @property
    def label(self) -> str:
        """The names of the rankings shown."""
        return self.left if self.is_single else f"{self.left} vs {self.right}"

    @property
    def is_single(self) -> bool:
        """Whether there is one ranking only, so that nothing is compared."""
        return len(self.names) == 1

    def summary(self) -> str:
        """Describe the comparison in one line; for a single ranking, name it and its K."""
        row, (k_left, k_right), (n_layers, n_heads) = self.overlap.to_dict(), self.k, self.source.shape
        if self.is_single:
            return f"{self.left} (top {k_left} of {n_layers}x{n_heads} heads)"
        return (
            f"{self.left} (top {k_left}) and {self.right} (top {k_right}) of {n_layers}x{n_heads} heads: {row['shared']} "
            f"shared, {row['expected']:.2f} expected by chance, p = {p_text(row['p_hypergeometric'])} over all heads, "
            f"{p_text(row['p_layer'])} within layers"
        ).replace("p = <", "p <")


def p_text(p: float) -> str:
    """Format a p-value with three decimals, or `< 0.001`."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def _second(entries: list[Entry]) -> Entry:
    """Choose what the right side shows first: another method on the first entry's task, else the next entry, else the same."""
    first = entries[0]
    others = [e for e in entries[1:] if e.task == first.task and e.method != first.method]
    return (others or entries[1:] or entries)[0]
