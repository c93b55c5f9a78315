"""The theme of all figures: readable at column width, safe for color-blind readers, perceptually uniform heat maps."""

import plotly.graph_objects as go

# Okabe and Ito's palette, without yellow (too pale on white).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEAT = "Cividis"
FONT = {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": "#222222"}


def style(fig: go.Figure, *, title: str) -> None:
    """Apply the theme in place; `layout.lay_out` says where things stand and how large they are."""
    fig.update_layout(
        template="plotly_white", font=FONT, colorway=list(COLORS), title={"text": title, "xanchor": "left"}
    )
    fig.update_xaxes(ticks="outside", showline=True, linecolor="#888888")
    fig.update_yaxes(ticks="outside", showline=True, linecolor="#888888")
