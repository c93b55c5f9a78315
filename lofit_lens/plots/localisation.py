"""Chosen heads against random sets with as many heads in each layer, the equivalence margin, and the controls."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.checks import check_is
from lofit_lens.evaluation.stats import p_in_words
from lofit_lens.experiments.localisation import CHOSEN_SET, Localisation
from lofit_lens.plots.curves import GRAY, faded, metric_name
from lofit_lens.plots.layout import finish, panel_title
from lofit_lens.plots.style import COLORS

FIRST: dict[str, Any] = {"row": 1, "col": 1}
SECOND: dict[str, Any] = {"row": 1, "col": 2}


def localisation_figure(found: Localisation, *, title: str = "Chosen heads and random sets") -> go.Figure:
    """Draw the mean of the chosen set and of each random set, from the best to the worst, with 95 % intervals.

    The dashed line is the mean of the random sets, the band around it the equivalence margin, the dotted line the unmodified
    model. A second panel has the controls that were run: the chosen heads and the mean of the random sets.

    Args:
        found: what `localisation` returns.
        title: of the figure.

    Raises:
        InputError: `found` is not a result of `localisation`.
    """
    check_is(found, Localisation, "found", "what localisation returns")
    listed = found.controls
    fig = make_subplots(rows=1, cols=1 + (len(listed) > 0))
    test, table = found.test, found.table.sort_values("value", ascending=False, kind="stable")
    chosen = table["set"] == CHOSEN_SET
    middle, margin = 100 * test.random, 100 * test.margin
    for name, rows, color in (("chosen heads", table[chosen], COLORS[1]), ("random sets", table[~chosen], COLORS[0])):
        value, low, high = (100 * rows[column] for column in ("value", "low", "high"))
        texts = [
            [100 * r["low"], 100 * r["high"], r["settings"], r["heads"]] for r in pd.DataFrame(rows).to_dict("records")
        ]
        fig.add_trace(go.Scatter(
            x=rows["set"].tolist(), y=value.tolist(), mode="markers", name=name, marker={"size": 9, "color": color},
            error_y={
                "type": "data", "symmetric": False, "array": (high - value).tolist(), "arrayminus": (value - low).tolist(),
                "color": color, "thickness": 1.5,
            },
            customdata=texts,
            hovertemplate="%{x}: %{y:.1f} % [%{customdata[0]:.1f}, %{customdata[1]:.1f}]<br>%{customdata[2]}<br>%{customdata[3]}"
            "<extra></extra>",
        ), **FIRST)  # fmt: skip
    # After the traces: an empty subplot takes no lines.
    fig.add_hrect(y0=middle - margin, y1=middle + margin, fillcolor=faded(GRAY), line_width=0, layer="below", **FIRST)
    fig.add_hline(y=100 * found.unmodified, line={"color": GRAY, "dash": "dot", "width": 1.5}, layer="below", **FIRST)
    fig.add_hline(y=middle, line={"color": GRAY, "dash": "dash", "width": 1.5}, layer="below", **FIRST)
    if len(listed):
        _controls(fig, listed, metric_name(found.metric))
    note = (
        f"{found.title()}: {found.verdict}; dashed: mean of the random sets; band: margin of {margin:g} points; "
        "dotted: unmodified model; bars: 95% intervals over seeds and items; orange: chosen heads; blue: random sets"
    )
    fig.update_yaxes(title_text=metric_name(found.metric), ticksuffix="%", **FIRST)
    if len(listed):
        panel_title(fig, "tuned on each set", 1)
        panel_title(fig, "controls", 2)
    wide = max(480, 42 * len(table))
    weights = [0.62, 0.38] if len(listed) else []
    finish(
        fig, title, note, panel=(wide if not len(listed) else (wide + 300) / 2, 280), cols=1 + (len(listed) > 0), narrow=280,
        weights=weights, legend=99,
    )  # fmt: skip
    return fig


def _controls(fig: go.Figure, controls: pd.DataFrame, metric: str) -> None:
    """Draw chosen and random heads of each control, joined by a line; hovering shows the test."""
    names = controls["control"].tolist()
    for row in controls.to_dict("records"):
        ends = [100 * row["chosen"], 100 * row["random"]]
        fig.add_trace(
            go.Scatter(x=ends, y=[row["control"]] * 2, mode="lines", line={"color": GRAY}, hoverinfo="skip"), **SECOND
        )
    texts = [
        [100 * r["difference"], p_in_words(r["p"]), r["n_sets"], r["n_items"]] for r in controls.to_dict("records")
    ]
    for name, column, color in (("chosen heads", "chosen", COLORS[1]), ("random sets", "random", COLORS[0])):
        fig.add_trace(go.Scatter(
            x=(100 * controls[column]).tolist(), y=names, mode="markers", name=name, marker={"size": 9, "color": color},
            customdata=texts,
            hovertemplate="%{y}: " + name + " %{x:.1f} %<br>difference %{customdata[0]:+.1f}, %{customdata[1]}<br>"
            "%{customdata[2]} random sets, %{customdata[3]} rows<extra></extra>",
        ), **SECOND)  # fmt: skip
    fig.update_yaxes(autorange="reversed", **SECOND)
    fig.update_xaxes(title_text=metric, ticksuffix="%", **SECOND)
