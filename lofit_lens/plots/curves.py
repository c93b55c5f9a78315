"""Curves with a band, shared by the figures that plot something against K, n or depth."""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from lofit_lens.checks import check_is
from lofit_lens.errors import InputError
from lofit_lens.plots.style import COLORS

GRAY = "#777777"
MANY_TICKS = 12
FEW_POINTS = 20  # a longer line has no dots
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")


def need(frame: pd.DataFrame, columns: Sequence[str], made_by: str) -> None:
    """Raise InputError unless the frame has rows and these columns."""
    check_is(frame, pd.DataFrame, "this table", f"what {made_by} returns")
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise InputError(f"this table has no column {', '.join(missing)}; give what {made_by} returns")
    if frame.empty:
        raise InputError(f"this table has no rows, so there is nothing to draw; give what {made_by} returns")


def metric_name(metric: str) -> str:
    """Return a metric's name for figures: short codes in capitals (`EM`, `MC1`), words as they are.

    >>> metric_name("mc1"), metric_name("accuracy")
    ('MC1', 'accuracy')
    """
    return metric.upper() if re.fullmatch(r"[a-z]{1,2}\d?", metric) else metric


def percent(fig: go.Figure, letter: str = "y", **where: int) -> None:
    """Label the ticks of an axis of shares in percent."""
    update: Any = fig.update_yaxes if letter == "y" else fig.update_xaxes
    update(tickformat="~%", **where)


def rows_where(frame: pd.DataFrame, column: str, value: object, *, by: str) -> pd.DataFrame:
    """Return the rows with this value, sorted by another column."""
    return pd.DataFrame(frame[frame[column] == value]).sort_values(by)


def add_curve(
    fig: go.Figure, points: pd.DataFrame, x: str, y: str, band: tuple[str, str] | None = None, *, name: str, place: int,
    hover: str, more: Sequence[str] = (),
) -> None:  # fmt: skip
    """Add a line through the points, with a band around it; a single point gets error bars instead.

    Args:
        fig: drawn on.
        points: one row per point, in order.
        x: column of the x values.
        y: column of the y values.
        band: columns of its lower and upper ends, NaN where there is none.
        name: in the legend.
        place: number of the series, for its color and symbol.
        hover: template; the columns `more` are its `customdata`.
        more: columns.
    """
    color = COLORS[place % len(COLORS)]
    single, error_y = len(points) == 1, None
    known = points.dropna(subset=list(band)) if band else points.iloc[:0]
    if band and len(known):
        low, high, at = (known[c].tolist() for c in (*band, x))
        if single:
            middle = known[y].tolist()[0]
            error_y = {"type": "data", "symmetric": False, "array": [high[0] - middle], "arrayminus": [middle - low[0]]}
        else:
            fig.add_trace(go.Scatter(
                x=[*at, *at[::-1]], y=[*high, *low[::-1]], fill="toself", mode="lines", line={"width": 0},
                fillcolor=faded(color), name=name, legendgroup=name, showlegend=False, hoverinfo="skip",
            ))  # fmt: skip
    fig.add_trace(go.Scatter(
        x=points[x].tolist(), y=points[y].tolist(), mode="lines+markers" if len(points) <= FEW_POINTS else "lines",
        name=name, legendgroup=name, line={"color": color, "width": 2}, error_y=error_y,
        marker={"color": color, "size": 7, "symbol": SYMBOLS[place % len(SYMBOLS)]},
        customdata=points[list(more)].to_numpy(), hovertemplate=hover + "<extra>" + name + "</extra>",
    ))  # fmt: skip


def rgba(color: str) -> tuple[float, ...]:
    """Return the color that `faded` gives as four numbers from 0 to 1.

    >>> rgba(faded("#0000FF", 0.5))
    (0.0, 0.0, 1.0, 0.5)
    """
    red, green, blue, alpha = map(float, re.findall(r"[0-9.]+", color))
    return red / 255, green / 255, blue / 255, alpha


def faded(color: str, alpha: float = 0.16) -> str:
    """Return `#RRGGBB` as a transparent color."""
    return f"rgba({int(color[1:3], 16)},{int(color[3:5], 16)},{int(color[5:7], 16)},{alpha})"


def ticks_at(fig: go.Figure, x: Sequence[float], *, text: dict[float, str] | None = None) -> None:
    """Put a tick at every value (at most 12); the axis is logarithmic if positive values span a factor of 6 or more."""
    values = sorted(set(x))
    ticks = values if len(values) <= MANY_TICKS else [values[round(i * (len(values) - 1) / 8)] for i in range(9)]
    if len(values) > 1 and values[0] > 0 and values[-1] >= 6 * values[0]:
        fig.update_xaxes(type="log")
    fig.update_xaxes(
        tickmode="array", tickangle=0, tickvals=ticks, ticktext=[(text or {}).get(t, f"{t:g}") for t in ticks]
    )
