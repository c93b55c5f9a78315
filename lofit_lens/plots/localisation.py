"""Chosen heads beside random sets of the same layers, with the margin in which differences do not matter."""

import pandas as pd
import plotly.graph_objects as go

from lofit_lens.checks import check_is
from lofit_lens.experiments.localisation import CHOSEN_SET, Localisation
from lofit_lens.plots.curves import GREY, faded, finish
from lofit_lens.plots.style import COLORS


def localisation_figure(found: Localisation, *, title: str = "Chosen heads and random sets") -> go.Figure:
    """Each random set's mean with its 95 % interval, from the best to the worst, and the chosen set's in front of them.

    The dashed line is the mean of the random sets, and the band around it the margin; the dotted line is the unmodified model.

    Args:
        found: what `localisation` returns.
        title: of the figure.

    Raises:
        InputError: something else.
    """
    check_is(found, Localisation, "found", "what localisation returns")
    test, table = found.test, found.table.sort_values("value", ascending=False, kind="stable")
    chosen = table["set"] == CHOSEN_SET
    fig, middle, margin = go.Figure(), 100 * test.random, 100 * test.margin
    fig.add_hrect(y0=middle - margin, y1=middle + margin, fillcolor=faded(GREY), line_width=0, layer="below")
    fig.add_hline(y=100 * found.unmodified, line={"color": GREY, "dash": "dot", "width": 1.5}, layer="below")
    fig.add_hline(y=middle, line={"color": GREY, "dash": "dash", "width": 1.5}, layer="below")
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
        ))  # fmt: skip
    note = (
        f"{found.title()}: {found.verdict}<br>dashed and band: mean of the random sets, margin of {margin:g} points<br>"
        "dotted: unmodified model; bars: 95 % interval over seeds and items"
    )
    finish(fig, title, note, width=max(620, 160 + 42 * len(table)), height=280)
    fig.update_xaxes(tickangle=-40)
    fig.update_yaxes(title_text=f"{found.metric.upper()}, %")
    fig.update_layout(showlegend=False)
    return fig
