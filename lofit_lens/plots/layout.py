"""Layout of a figure at any width: panels, labels, legend, color bars, title and the small line.

A plot draws its traces and calls `finish`; `lay_out` places everything. It serves the screen, at the figure's own width, and
paper, at a column's width, so that nothing is drawn twice. What it needs to know is kept in the figure (`layout.meta`).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from lofit_lens.plots.style import style
from lofit_lens.plots.text import LINE, lines_of, narrowed, text_width, wrapped
from lofit_lens.plots.ticks import all_numbers, apart, pixels, step

KEY = "lofit_lens"
EDGE = 8  # pixels between the figure's edge and what is next to it
PAGE = 600  # pixels that all panels under each other may take, where they can
NUMBER = "0.00"  # as wide as the numbers that plotly chooses by itself
PERCENT = "100%"
ENTRY_GAP = 16
CAPITAL = 0.7  # height of a capital letter as a share of the font size
MARKS = "*+°"


class Sizes(NamedTuple):
    """Font sizes in pixels; a heading is never smaller than an axis title."""

    title: float = 15
    panel: float = 13
    axis: float = 13
    tick: float = 12
    note: float = 11

    def at_least(self, least: float) -> "Sizes":
        """Return the same sizes, none below `least`."""
        return Sizes(*(max(size, least) for size in self))


def finish(
    fig: go.Figure, title: str, note: str, *, panel: tuple[float, float], cols: int = 1, share: str = "", narrow: float = 150,
    cells: tuple[int, int] | None = None, whole: str = "", weights: Sequence[float] = (), legend: int = 2,
) -> None:  # fmt: skip
    """Apply the theme, add the small line under the title, and place everything.

    Args:
        fig: has its traces and axis titles; titles of panels were added with `panel_title`.
        title: of the figure.
        note: the small line under the title; it is wrapped to the width.
        panel: width and height of one panel in pixels, without its labels.
        cols: panels side by side, if there is room.
        share: axes ("x", "y", "xy") that all panels share: only the outermost panels have labels and titles.
        narrow: width in pixels below which panels are stacked.
        cells: columns and rows of a heat map; its height follows from the width of a cell.
        whole: axes that count something; they have a range, and ticks at whole numbers.
        weights: relative widths of the panels in a row; empty = equal.
        legend: least number of entries for which a legend is drawn.
    """
    style(fig, title=title)
    titles = {name: fig.layout[name].title.text for axes in _axes(fig) for name in axes}  # pyright: ignore[reportIndexIssue]
    fig.update_layout(meta={KEY: {
        "panel": list(panel), "cols": cols, "share": share, "narrow": narrow, "cells": list(cells) if cells else None,
        "whole": whole, "weights": list(weights), "legend": legend, "titles": titles, "scale": 1.0,
    }})  # fmt: skip
    if note:
        fig.add_annotation(
            name="note", text=note, showarrow=False, align="left", font={"color": "#555555"}, borderwidth=0, borderpad=0, x=0,
            xref="paper", xanchor="left", y=1, yref="paper", yanchor="bottom",
        )  # fmt: skip
    lay_out(fig)


def panel_title(fig: go.Figure, text: str, number: int, *, color: str = "#222222") -> None:
    """Put a title above the panel with this number, counted from 1."""
    i = "" if number == 1 else number
    fig.add_annotation(
        name="panel", text=text, showarrow=False, align="left", font={"color": color}, borderwidth=0, borderpad=0, x=0,
        xref=f"x{i} domain", xanchor="left", y=1, yref=f"y{i} domain", yanchor="bottom", yshift=3,
    )  # fmt: skip


def say(fig: go.Figure, text: str) -> go.Figure:
    """Add what only the caller knows, such as the seed, to the small line; return the figure."""
    for a in fig.layout.annotations:  # pyright: ignore[reportAttributeAccessIssue]
        if a.name == "note":
            a.text = f"{a.text}; {text}"
    lay_out(fig)
    return fig


def plan_of(fig: go.Figure) -> dict[str, Any] | None:
    """Return what `finish` kept in the figure; None for a figure that this library did not make."""
    meta: Any = fig.layout.meta  # pyright: ignore[reportAttributeAccessIssue]
    return meta.get(KEY) if isinstance(meta, dict) else None


def lay_out(fig: go.Figure, width: float | None = None, *, least: float = 0) -> None:
    """Lay the figure out, in place.

    Args:
        fig: a figure that went through `finish`.
        width: of the figure in pixels; None = as its panels need.
        least: smallest font in pixels.
    """
    _Layout(fig, width, Sizes().at_least(least)).apply()


def traces(fig: go.Figure) -> list[Any]:
    """Return the traces; plotly's types do not say that `fig.data` holds them."""
    return list(fig.data)


def _axes(fig: go.Figure) -> list[tuple[str, str]]:
    """Names of each panel's two axes, in order of their numbers."""
    numbers = {str(t.xaxis or "x").removeprefix("x") for t in traces(fig)}
    return [(f"xaxis{i}", f"yaxis{i}") for i in sorted(numbers, key=lambda i: int(i or 1))]


class _Layout:
    """One figure at one width; the constructor decides how much room there is, `apply` writes it."""

    def __init__(self, fig: go.Figure, width: float | None, sizes: Sizes) -> None:
        plan = plan_of(fig)
        assert plan is not None, "a figure that did not go through finish"
        self.fig, self.plan, self.sizes = fig, plan, sizes
        self.layout: Any = fig.layout
        self.names = _axes(fig)
        self.axes = [(self.layout[x], self.layout[y]) for x, y in self.names]
        n = len(self.axes)
        self.bars: list[Any] = [t for t in traces(fig) if t.type == "heatmap" and t.showscale is not False]
        shown = [t for t in traces(fig) if t.name and t.type != "heatmap" and t.showlegend is not False]
        entries = list(dict.fromkeys(str(t.name) for t in shown))
        self.entries = entries if len(entries) >= plan["legend"] else []
        for names, axes in zip(self.names, self.axes, strict=True):
            for name, axis in zip(names, axes, strict=True):
                axis.title.text = plan["titles"].get(name) if axis.title.text is None else axis.title.text
        most = 0.34 * width if width else math.inf
        self.y_labels = [[narrowed(t, most, sizes.tick) for t in self._labels("y", i)] for i in range(n)]
        rooms = [self._y_room(i) for i in range(n)]
        self.left, self.right = EDGE + max(rooms), EDGE + (self._bar_room() if self.bars else 14)
        self.gap = (14 if "y" in plan["share"] else 14 + max(rooms)) + (
            self._bar_room(inner=True) if len(self.bars) > 1 else 0
        )
        self.cols = min(n, plan["cols"])
        if width is not None and self.bars and not self._numbers_fit(width):
            bars, right = self.bars, self.right
            self.right, self.bars = EDGE + 14, []  # the numbers say what the colors say
            if self._numbers_fit(width, bars):
                fig.update_traces(showscale=False, selector={"type": "heatmap"})
            else:  # only colors are left to say it
                self.right, self.bars = right, bars
        if width is None:
            self.wide = float(plan["panel"][0])
            width = self.left + self.right + self.cols * self.wide + (self.cols - 1) * self.gap
            width = max(width, 2 * EDGE + text_width(self.layout.title.text or "", sizes.title))
        while self.cols > 1 and self._panel_width(width) < plan["narrow"]:
            self.cols -= 1
        self.width, self.wide = width, max(40.0, self._panel_width(width))
        weights = plan["weights"] if len(plan["weights"]) == self.cols else [1.0] * self.cols
        self.widths = [self.wide * self.cols * w / sum(weights) for w in weights]
        self.rows = math.ceil(n / self.cols)
        self.tall = self._height()

    def _panel_width(self, width: float) -> float:
        return (width - self.left - self.right - (self.cols - 1) * self.gap) / self.cols

    def _height(self) -> float:
        """Height of a panel: its own, or as its cells ask for."""
        cells = self.plan["cells"]
        if cells is None:
            tall = float(self.plan["panel"][1])
            tall = max(90.0, min(tall, PAGE / self.rows)) if self.rows > 1 else tall
            # Each row keeps its name, even if the panels then take more than a page; numbers may be left out.
            named = [t for t in self.y_labels if not all_numbers(t)]
            return max([tall, *(len(t) * max(map(lines_of, t)) * LINE * self.sizes.tick for t in named)])
        across, down = cells
        least, most = max(6.0, 80 / down), 26.0 if down <= 8 else 20.0 if down <= 16 else 14.0
        if self.y_labels[0]:  # a name beside each row
            least = max(lines_of(t) for t in self.y_labels[0]) * LINE * self.sizes.tick
            most = max(least, self.plan["panel"][1] / down)
        elif self.rows > 1:
            most = max(least, min(most, PAGE / (down * self.rows)))
        return down * max(least, min(self.widths[0] / across, most))

    def _y_room(self, i: int) -> float:
        """Pixels for the labels and the title of a y axis."""
        y = self.axes[i][1]
        labels = self.y_labels[i] or [PERCENT if "%" in _format(y) else NUMBER]
        return (
            max(text_width(t, self.sizes.tick) for t in labels) + 14 + LINE * self.sizes.axis * self._y_title_lines(i)
        )

    def _y_title_lines(self, i: int) -> int:
        return lines_of(wrapped(self.axes[i][1].title.text or "", self._least_height(), self.sizes.axis))

    def _least_height(self) -> float:
        """Room along a title that stands upright, before the height is known."""
        return max(120.0, 0.9 * float(self.plan["panel"][1]))

    def _bar_room(self, *, inner: bool = False) -> float:
        """Pixels of a color bar with its numbers and title; bars that say the same have one title, at the last."""
        titles = [wrapped(t.colorbar.title.text or "", self._least_height(), self.sizes.axis) for t in self.bars]
        lines = 0 if inner and self._one_title() else max(map(lines_of, titles))
        wide = text_width(PERCENT if any("%" in _format(t.colorbar) for t in self.bars) else NUMBER, self.sizes.tick)
        return (32 if inner else 40) + wide + LINE * self.sizes.axis * lines

    def _one_title(self) -> bool:
        return len({t.colorbar.title.text for t in self.bars} - {None}) == 1

    def _numbers_fit(self, width: float, maps: Sequence[Any] | None = None) -> bool:
        """Whether the numbers in the cells of these maps (None = those with a color bar) can be read at this width."""
        texts = [str(s) for t in (self.bars if maps is None else maps) if t.texttemplate for row in t.text for s in row]
        wide = self._panel_width(width) / self.plan["cells"][0] if texts else 0
        return all(text_width(s, self.sizes.note) + 4 <= wide for s in texts)

    def apply(self) -> None:
        layout, sizes, plan = self.layout, self.sizes, self.plan
        panels = [a for a in layout.annotations or () if a.name == "panel"]
        for i, a in enumerate(panels):
            wide = self.widths[i % self.cols] - 6
            a.text, a.font.size = narrowed(wrapped(a.text, wide, sizes.panel), wide, sizes.panel), sizes.panel
        lift = max((lines_of(a.text) for a in panels), default=0) * LINE * sizes.panel + (8 if panels else 0)
        below = [self._x_axis(i) for i in range(len(self.axes))]
        for i in range(len(self.axes)):
            self._y_axis(i)
        between = lift + 10 + (8 if "x" in plan["share"] else max(below))
        top = 8 + self._heading() + lift
        entry = max((text_width(e, sizes.tick) for e in self.entries), default=0) + 44
        # Plotly breaks a legend at the width of the panels, with a gap after each entry that does not shrink on paper.
        per_row = max(1, int((self.width - self.left - self.right) // (entry + ENTRY_GAP)))
        legend = math.ceil(len(self.entries) / per_row) * (LINE * sizes.tick + 8) + 12 if self.entries else 0
        bottom, inner = max(below) + legend + 6, self.rows * self.tall + (self.rows - 1) * between
        height = math.ceil(top + inner + bottom)
        room = self.width - self.left - self.right
        for i, (x, y) in enumerate(self.axes):
            row, col = divmod(i, self.cols)
            start, high = sum(self.widths[:col]) + col * self.gap, 1 - row * (self.tall + between) / inner
            x.domain = [start / room, min(1.0, (start + self.widths[col]) / room)]
            y.domain = [max(0.0, high - self.tall / inner), high]
        self._place_bars(inner)
        self._fit_cells()
        layout.update(width=self.width, height=height, showlegend=bool(self.entries))
        layout.margin.update(l=self.left, r=self.right, t=top, b=bottom, pad=0)
        layout.legend.update(
            orientation="h", xref="container", x=EDGE / self.width, xanchor="left", yref="container", y=4 / height,
            yanchor="bottom", entrywidthmode="pixels", entrywidth=entry - 40, tracegroupgap=0, font={"size": sizes.tick},
        )  # fmt: skip
        # Plotly anchors the top of a title of one line, and the baseline of the first of several.
        at = EDGE + (CAPITAL * sizes.title if lines_of(layout.title.text or "") > 1 else 0)
        layout.title.update(
            x=EDGE / self.width, xref="container", xanchor="left", y=1 - at / height, yref="container", yanchor="top"
        )
        for a in layout.annotations or ():
            if a.name == "note":
                a.update(xshift=EDGE - self.left, yshift=lift + 4, font={"size": sizes.note})
            elif a.name != "panel":
                a.font.size = max(a.font.size or sizes.axis, sizes.note)
            if a.name == "over":  # one of several over the groups of a panel
                a.text = wrapped(a.text, self.wide / sum(b.name == "over" for b in layout.annotations) - 4, a.font.size)

    def _heading(self) -> float:
        """Break title and small line to the width; the height of both."""
        title, inner, height = self.layout.title, self.width - 2 * EDGE, 0.0
        title.font.size = self.sizes.title
        if title.text:
            title.text = wrapped(title.text, inner, self.sizes.title)
            height += lines_of(title.text) * LINE * self.sizes.title + 6
        for a in self.layout.annotations or ():
            if a.name == "note":
                a.text = wrapped(a.text, inner, self.sizes.note)
                height += lines_of(a.text) * LINE * self.sizes.note + 6
        return height

    # ------------------------------------------------------------------------------------------------ axes

    def _places(self, letter: str, i: int) -> list[Any]:
        """Values along an axis that have a name, [] for an axis of numbers."""
        axis = self.axes[i]["xy".index(letter)]
        if axis.ticktext is not None:
            return list(axis.tickvals)
        own, found = self.names[i]["xy".index(letter)].replace("axis", ""), {}
        for t in traces(self.fig):
            if (t[f"{letter}axis"] or letter) == own and t[letter] is not None:
                found |= dict.fromkeys(v for v in t[letter] if isinstance(v, str))
        return list(found)

    def _labels(self, letter: str, i: int) -> list[str]:
        axis = self.axes[i]["xy".index(letter)]
        return [str(t) for t in (self._places(letter, i) if axis.ticktext is None else axis.ticktext)]

    def _y_axis(self, i: int) -> None:
        y, sizes, labels = self.axes[i][1], self.sizes, self.y_labels[i]
        y.tickfont.size, y.title.font.size, y.title.standoff = sizes.tick, sizes.axis, 6
        y.title.text = wrapped(y.title.text or "", max(self._least_height(), self.tall), sizes.axis) or None
        y.showticklabels = i % self.cols == 0 or "y" not in self.plan["share"]
        if not y.showticklabels:
            y.title.text = None
        if labels:
            keep = max(1, math.ceil(LINE * sizes.tick * max(map(lines_of, labels)) * len(labels) / self.tall - 0.01))
            y.update(tickmode="array", tickvals=self._places("y", i)[::keep], ticktext=labels[::keep], tickangle=0)
        elif "y" in self.plan["whole"]:
            step(y, self.tall, 1.5 * sizes.tick)
        else:
            y.nticks = max(4, int(self.tall // 30))

    def _x_axis(self, i: int) -> float:
        """Write an x axis; the pixels that its labels and title take."""
        x, sizes, wide = self.axes[i][0], self.sizes, self.widths[i % self.cols]
        x.tickfont.size, x.title.font.size, x.title.standoff = sizes.tick, sizes.axis, 6
        x.title.text = wrapped(x.title.text or "", wide + 40, sizes.axis) or None
        x.showticklabels = i + self.cols >= len(self.axes) or "x" not in self.plan["share"]
        if not x.showticklabels:
            x.title.text = None
        title = lines_of(x.title.text or "") * LINE * sizes.axis + 19
        labels, places = self._labels("x", i), self._places("x", i)
        if not labels:
            if "x" in self.plan["whole"]:
                step(x, wide, max(text_width(str(round(end)), sizes.tick) for end in x.range) + 8)
            else:
                x.update(nticks=max(4, int(wide // 38)), tickangle=0)
            return LINE * sizes.tick + title
        at = pixels(x, places, wide)
        if all_numbers(labels):  # some may be left out
            kept = apart(at, [text_width(t, sizes.tick) + 6 for t in labels])
            labels, places, angle = [labels[k] for k in kept], [places[k] for k in kept], 0
        else:
            slot = min((abs(b - a) for a, b in itertools.pairwise(at)), default=wide)
            whole, labels = labels, [narrowed(t, slot - 8, sizes.tick) for t in labels]
            angle = 0
            if max(text_width(t, sizes.tick) for t in labels) > slot - 4 or max(map(lines_of, labels)) > 4:
                upright = max(map(lines_of, whole)) * LINE * sizes.tick < slot
                labels = [t if upright else t.replace("<br>", " ") for t in whole]
                angle = -90
                every = math.ceil(LINE * sizes.tick / slot - 0.05)
                labels, places = labels[::every], places[::every]
        x.update(tickmode="array", tickvals=places, ticktext=labels, tickangle=angle)
        if angle:
            return max(text_width(t, sizes.tick) for t in labels) + title
        return max(map(lines_of, labels)) * LINE * sizes.tick + title

    # ------------------------------------------------------------------------------------------------ maps

    def _place_bars(self, inner: float) -> None:
        for t in self.bars:
            bar, x0, y = t.colorbar, 1.0, (0.0, 1.0)
            if len(self.bars) > 1:  # beside its own panel
                name = str(t.xaxis or "x").removeprefix("x")
                x0, y = self.layout[f"xaxis{name}"].domain[1], self.layout[f"yaxis{name}"].domain
            length = min(1.0, 320 / inner, y[1] - y[0])
            bar.update(
                x=x0, xanchor="left", y=y[1], yanchor="top", len=length, lenmode="fraction", thickness=12, ypad=0,
                tickfont={"size": self.sizes.tick}, nticks=max(3, int(length * inner // 30)),
            )  # fmt: skip
            hidden = self._one_title() and t is not self.bars[-1]
            title = None if hidden else wrapped(bar.title.text or "", self._least_height(), self.sizes.axis) or None
            bar.title.update(text=title, side="right", font={"size": self.sizes.axis})

    def _fit_cells(self) -> None:
        """Marks and numbers no larger than the cells that they stand in; numbers too small to be read leave their mark."""
        cells = self.plan["cells"]
        if cells is None:
            return
        across, down = self.widths[0] / cells[0], self.tall / cells[1]
        for t in traces(self.fig):
            if t.type == "scatter" and isinstance(t.meta, dict) and "cell" in t.meta:
                t.marker.size = max(5.0, min(t.meta["most"], t.meta["cell"] * min(across, down)))
                t.marker.line.width = max(0.8, min(t.meta["line"], 0.12 * min(across, down)))
            elif t.type == "heatmap":
                t.xgap = t.ygap = min(t.meta or 1, 0.12 * min(across, down)) if min(across, down) > 8 else 0
                if t.texttemplate:
                    longest = max((text_width(str(s), 1) for row in t.text for s in row), default=1)
                    size = min(self.sizes.axis, (across - 4) / longest, down / LINE)
                    if size < self.sizes.note:
                        size = self.sizes.note
                        t.text = [["".join(c for c in str(s) if c in MARKS) for s in row] for row in t.text]
                    t.textfont.size = size


def _format(axis: Any) -> str:
    return (axis.tickformat or "") + (axis.ticksuffix or "")
