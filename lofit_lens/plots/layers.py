"""Where in the model the chosen heads sit (the paper's Figure 3)."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.checks import check_whole, given
from lofit_lens.errors import InputError
from lofit_lens.heads import Sets, named_sets
from lofit_lens.plots.curves import GREY, finish
from lofit_lens.plots.style import COLORS


def layer_distribution(sets: Sets, *, n_layers: int | None = None, title: str = "Chosen heads by layer") -> go.Figure:
    """Share of each head set that lies in each layer: one panel a set, on one scale.

    The dotted line is an even spread over layers, the triangle the mean layer.

    Args:
        sets: panel name -> heads; or one head set, or a list of them.
        n_layers: of the model; None = read from the head sets.
        title: of the figure.

    Raises:
        InputError: no head set, an empty one, or none that knows its model.

    Examples:
        >>> from lofit_lens import HeadSet
        >>> figure = layer_distribution({"a": HeadSet(["L0H0", "L1H2"], shape=(2, 4))})
        >>> figure.layout.xaxis.title.text
        'layer'
    """
    sets = named_sets(sets)
    check_whole(1, **given(n_layers=n_layers))
    if not sets:
        raise InputError("no head sets to draw; give at least one, e.g. {'MQuAKE': scores.top(32)}")
    for name, heads in sets.items():
        if len(heads) == 0:
            raise InputError(f"head set {name!r} is empty; there is nothing to draw")
    if n_layers is not None and (deepest := max(h.layer for s in sets.values() for h in s)) >= n_layers:
        raise InputError(f"n_layers is {n_layers}, and there is a head in layer {deepest}, layers counted from 0")
    known = {s.shape[0] for s in sets.values() if s.shape}
    if n_layers is None and len(known) != 1:
        raise InputError("give n_layers: these head sets do not name one model")
    n = n_layers if n_layers is not None else known.pop()
    panels, panel, gap = len(sets), 92 if len(sets) > 1 else 210, 26
    inner = panels * panel + (panels - 1) * gap
    fig = make_subplots(rows=panels, shared_xaxes=True, start_cell="bottom-left", vertical_spacing=gap / inner)
    top = max(100 * heads.layer_counts(n).max() / len(heads) for heads in sets.values())
    for i, (name, heads) in enumerate(sets.items()):
        row, counts = panels - i, heads.layer_counts(n)
        color = COLORS[i % len(COLORS)]
        fig.add_trace(
            go.Bar(
                x=list(range(n)), y=(100 * counts / len(heads)).tolist(), name=f"{name} (K={len(heads)})",
                marker={"color": color}, customdata=counts.tolist(),
                hovertemplate="layer %{x}: %{customdata} heads, %{y:.1f} %<extra>" + name + "</extra>",
            ), row=row, col=1,
        )  # fmt: skip
        fig.add_annotation(
            text=f"<b>{name}</b> (K={len(heads)}, mean layer {heads.mean_layer:.1f})", x=0, xref="x domain", xanchor="left",
            y=1, yref="y domain", yanchor="bottom", showarrow=False, font={"size": 12, "color": color}, row=row, col=1,
        )  # fmt: skip
        fig.add_hline(y=100 / n, line={"color": GREY, "dash": "dot", "width": 1}, row=row, col=1)  # pyright: ignore[reportArgumentType]
        fig.add_annotation(
            text="▼", x=heads.mean_layer, y=1, yref="y domain", yanchor="bottom", yshift=-9, showarrow=False,
            font={"size": 11, "color": color}, hovertext=f"mean layer {heads.mean_layer:.2f}", row=row, col=1,
        )  # fmt: skip
    note = "dotted: even spread over layers; ▼ mean layer"
    finish(fig, title, note, width=max(460, min(820, 200 + 18 * n)), height=inner, lift=18)
    fig.update_layout(bargap=0.2, showlegend=False)
    fig.update_xaxes(dtick=max(1, n // 16), range=[-0.6, n - 0.4])
    fig.update_xaxes(title_text="layer", row=1, col=1)
    fig.update_yaxes(title_text="heads (%)", range=[0, 1.08 * top])
    return fig
