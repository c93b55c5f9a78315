"""Accuracy against the number of heads (the paper's Figure 5) and of training examples (Figure 4)."""

import pandas as pd
import plotly.graph_objects as go

from lofit_lens.checks import check_whole, given
from lofit_lens.errors import InputError
from lofit_lens.evaluation.result import how_many
from lofit_lens.plots.curves import GRAY, add_curve, faded, need, percent, rows_where, ticks_at
from lofit_lens.plots.layout import finish

UNTUNED = ("zero-shot", "0-shot", "zero shot", "unmodified", "untuned")


def k_sweep(
    frame: pd.DataFrame, *, metric: str = "accuracy", n_heads_total: int | None = None,
    title: str = "Accuracy by number of heads",
) -> go.Figure:  # fmt: skip
    """Score against the number of tuned heads K.

    Args:
        frame: of `analysis.sweeps.sweep`, x = K. A series called "zero-shot" becomes a dashed line.
        metric: title of the y axis.
        n_heads_total: heads of the model; ticks then also say what share of them K is.
        title: of the figure.

    Raises:
        InputError: an empty table, one of another kind, or fewer heads in the model than in a point.
    """
    x_title = "K (tuned heads)" + (f", and share of all {n_heads_total}" if n_heads_total else "")
    check_whole(1, **given(n_heads_total=n_heads_total))
    fig = _curves(frame, metric, x_title, "K")
    x = _tuned(frame)["x"].tolist()
    if n_heads_total is not None and max(x) > n_heads_total:
        raise InputError(
            f"n_heads_total is {n_heads_total}, but a point has K = {max(x):g}; give all heads of the model"
        )
    share = {k: f"{k:g}<br>{100 * k / n_heads_total:.1f}%" for k in x} if n_heads_total else None
    ticks_at(fig, x, text=share)
    _finish(fig, frame, title)
    return fig


def data_efficiency(
    frame: pd.DataFrame, *, metric: str = "accuracy", title: str = "Accuracy by training examples"
) -> go.Figure:
    """Score against the number of training examples, one curve per method.

    Args:
        frame: of `analysis.sweeps.sweep`, x = training examples. A series called "zero-shot" becomes a dashed line.
        metric: title of the y axis.
        title: of the figure.

    Raises:
        InputError: an empty table, or one of another kind.
    """
    fig = _curves(frame, metric, "training examples", "n")
    ticks_at(fig, _tuned(frame)["x"].tolist())
    _finish(fig, frame, title)
    return fig


def _tuned(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the points of tuned models; if there are none, all points."""
    tuned = pd.DataFrame(frame[~frame["series"].str.lower().isin(UNTUNED)])
    return tuned if len(tuned) else frame


def _finish(fig: go.Figure, frame: pd.DataFrame, title: str) -> None:
    tuned = _tuned(frame)
    seeds, items = (how_many(zip(tuned["series"], tuned[f"n_{what}s"], strict=True), what) for what in ("seed", "item"))
    note = f"bands and bars: 95% intervals over seeds and items; per point: {seeds}, n={items}"
    finish(fig, title, note, panel=(480, 250))


def _curves(frame: pd.DataFrame, metric: str, x_title: str, letter: str) -> go.Figure:
    need(
        frame,
        ("series", "x", "mean", "low", "high", "lowest", "highest", "n_seeds", "n_items"),
        "analysis.sweeps.sweep",
    )
    fig, tuned = go.Figure(), _tuned(frame)
    names = list(dict.fromkeys(frame["series"]))
    lines = [n for n in names if n not in set(tuned["series"])]
    ends = [float(f(tuned["x"].tolist())) for f in (min, max)]
    ends = ends if ends[0] < ends[1] else [0.8 * ends[0] - 0.1, 1.2 * ends[1] + 0.1]
    for name in lines:
        point = frame[frame["series"] == name].iloc[0]
        for y, fill in (("low", None), ("high", "tonexty")):
            fig.add_trace(go.Scatter(
                x=ends, y=[float(point[y])] * 2, mode="lines", line={"width": 0}, fill=fill, fillcolor=faded(GRAY),
                hoverinfo="skip", showlegend=False, legendgroup=name, name=f"{name} {y}",
            ))  # fmt: skip
        fig.add_trace(go.Scatter(
            x=ends, y=[float(point["mean"])] * 2, mode="lines", line={"color": GRAY, "dash": "dash", "width": 2}, name=name,
            legendgroup=name, hovertemplate="%{y:.1%}<extra>" + name + "</extra>",
        ))  # fmt: skip
    hover = (
        letter + "=%{x}: %{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]<br>seeds %{customdata[2]:.1%} to "
        "%{customdata[3]:.1%}<br>%{customdata[4]} seeds, %{customdata[5]} items"
    )
    more = ("low", "high", "lowest", "highest", "n_seeds", "n_items")
    for i, name in enumerate(n for n in names if n not in lines):
        part = rows_where(tuned, "series", name, by="x")
        add_curve(fig, part, "x", "mean", ("low", "high"), name=name, place=i, hover=hover, more=more)
    fig.update_xaxes(title_text=x_title)
    fig.update_yaxes(title_text=metric)
    percent(fig)
    return fig
