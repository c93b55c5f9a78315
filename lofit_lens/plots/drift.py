"""Figures of how far an adapter moves representations, by layer and by position."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.analysis.drift import MEASURES, WHERE, Drift
from lofit_lens.checks import check_is, check_one_of
from lofit_lens.plots.curves import SYMBOLS, faded, rows_where
from lofit_lens.plots.layout import finish
from lofit_lens.plots.style import COLORS, HEAT

LABELS = {
    "cosine": "cosine of e and b",
    "change": "relative change (|e - b| / |b|)",
    "ratio": "relative norm (|e| / |b|)",
}
LETTERS = "b: activation without the adapter, e: with it"
NAMES = {"z": "z (mean over heads)", "resid": "residual stream"}


def drift_layers(drift: Drift, *, title: str = "How far the adapter moves activations") -> go.Figure:
    """Draw cosine, relative change and relative norm by layer, for z and the residual stream; bands: 95 % intervals over texts.

    Args:
        drift: of `analysis.drift.drift`.
        title: of the figure.
    """
    check_is(drift, Drift, "drift", "what analysis.drift gives")
    fig = make_subplots(rows=1, cols=len(MEASURES))
    for col, measure in enumerate(MEASURES, start=1):
        for i, where in enumerate(WHERE):
            rows = rows_where(drift.layers, "where", where, by="layer")
            x, color, known = rows["layer"].tolist(), COLORS[i], rows.dropna(subset=[f"{measure}_low"])
            if len(known):
                at, low, high = (known[c].tolist() for c in ("layer", f"{measure}_low", f"{measure}_high"))
                fig.add_trace(go.Scatter(
                    x=[*at, *at[::-1]], y=[*high, *low[::-1]], fill="toself", mode="lines", line={"width": 0},
                    fillcolor=faded(color), legendgroup=where, showlegend=False, hoverinfo="skip", name=NAMES[where],
                ), row=1, col=col)  # fmt: skip
            fig.add_trace(go.Scatter(
                x=x, y=rows[measure].tolist(), mode="lines+markers" if len(x) <= 20 else "lines", name=NAMES[where],
                legendgroup=where, showlegend=col == 1, line={"color": color, "width": 2},
                marker={"color": color, "size": 6, "symbol": SYMBOLS[i]},
                hovertemplate="layer %{x}: %{y:.4f}<extra>" + NAMES[where] + "</extra>",
            ), row=1, col=col)  # fmt: skip
        fig.update_yaxes(title_text=LABELS[measure], row=1, col=col)
    note = (
        f"{_what(drift)}; n={drift.n_texts} texts, {drift.n_tokens} tokens; bands: 95% intervals over texts; {LETTERS}"
    )
    n_layers = max(drift.layers["layer"].tolist()) + 1
    fig.update_xaxes(title_text="layer", zeroline=False, range=[-0.5, n_layers - 0.5])
    finish(fig, title, note, panel=(235, 240), cols=len(MEASURES), narrow=110, whole="x")
    return fig


def drift_positions(
    drift: Drift,
    *,
    where: str = "resid",
    measure: str = "change",
    title: str = "Where in the text the adapter moves activations",
) -> go.Figure:
    """Draw a heat map of layers by positions, counted from the start and from the end of each text.

    Args:
        drift: of `analysis.drift.drift`.
        where: `"z"` or `"resid"`.
        measure: `"cosine"`, `"change"` or `"ratio"`.
        title: of the figure.

    Raises:
        InputError: an unknown place or measure.
    """
    check_is(drift, Drift, "drift", "what analysis.drift gives")
    check_one_of("place", where, WHERE)
    check_one_of("measure", measure, MEASURES)
    rows = rows_where(drift.positions, "where", where, by="layer")
    cells = rows.pivot(index="layer", columns="position", values=measure)
    starts = sorted(p for p in cells.columns if p >= 0)
    ends = sorted(p for p in cells.columns if p < 0)
    fig = make_subplots(cols=2, shared_yaxes=True)
    low, high = min(rows[measure].tolist()), max(rows[measure].tolist())
    counts = rows.pivot(index="layer", columns="position", values="n")
    for col, (places, text) in enumerate(
        ((starts, "position from the start"), (ends, "position from the end")), start=1
    ):
        fig.add_trace(go.Heatmap(
            z=cells[places].to_numpy().tolist(), x=places, y=cells.index.tolist(), zmin=low, zmax=high, colorscale=HEAT,
            showscale=col == 2, customdata=counts[places].to_numpy().tolist(), name=text,
            colorbar={"title": {"text": LABELS[measure]}},
            hovertemplate="layer %{y}, position %{x}: %{z:.4f} (%{customdata} texts)<extra></extra>",
        ), row=1, col=col)  # fmt: skip
        fig.update_xaxes(
            title_text=text,
            showgrid=False,
            zeroline=False,
            range=[min(places) - 0.5, max(places) + 0.5],
            row=1,
            col=col,
        )
    note = (
        f"{NAMES[where]}; {_what(drift)}; {LETTERS}; mean over at most n={drift.n_texts} texts; position 0: first token"
    )
    n_layers = len(cells.index)
    fig.update_yaxes(showgrid=False, zeroline=False, title_text="layer", range=[-0.5, n_layers - 0.5])
    widths = [len(starts), len(ends)]
    panel = max(360, min(34 * sum(widths), 900)) / 2, max(150, min(26 * n_layers, 620))
    finish(
        fig, title, note, panel=panel, cols=2, share="y", narrow=110, whole="xy", weights=widths,
        cells=(max(widths), n_layers),
    )  # fmt: skip
    return fig


def _what(drift: Drift) -> str:
    return f"{' then '.join(drift.adapters)} on {drift.model}"
