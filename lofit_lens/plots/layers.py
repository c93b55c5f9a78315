"""The layers that chosen heads are in (the paper's Figure 3)."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.checks import check_whole, given
from lofit_lens.errors import InputError
from lofit_lens.heads import Sets, named_sets
from lofit_lens.plots.curves import GRAY
from lofit_lens.plots.layout import finish, panel_title
from lofit_lens.plots.style import COLORS


def layer_distribution(sets: Sets, *, n_layers: int | None = None, title: str = "Chosen heads by layer") -> go.Figure:
    """Draw the share of each head set that is in each layer: one panel per set, all on one scale.

    The dotted line is an even spread over layers, the triangle marks the mean layer.

    Args:
        sets: panel name -> heads; or one head set, or a list of them.
        n_layers: number of layers of the model; None = taken from the head sets.
        title: of the figure.

    Raises:
        InputError: no head set, an empty one, or head sets without a shape where `n_layers` is not given.

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
        raise InputError(f"n_layers is {n_layers}, and there is a head in layer {deepest}, counted from 0")
    known = {s.shape[0] for s in sets.values() if s.shape}
    if n_layers is None and len(known) != 1:
        raise InputError("give n_layers: these head sets do not have one common number of layers")
    n = n_layers if n_layers is not None else known.pop()
    fig = make_subplots(rows=len(sets), shared_xaxes=True)
    top = max(100 * heads.layer_counts(n).max() / len(heads) for heads in sets.values())
    for row, (name, heads) in enumerate(sets.items(), start=1):
        counts, color = heads.layer_counts(n), COLORS[(row - 1) % len(COLORS)]
        fig.add_trace(
            go.Bar(
                x=list(range(n)), y=(100 * counts / len(heads)).tolist(), name=f"{name} (K={len(heads)})",
                marker={"color": color}, customdata=counts.tolist(),
                hovertemplate="layer %{x}: %{customdata} heads, %{y:.1f} %<extra>" + name + "</extra>",
            ), row=row, col=1,
        )  # fmt: skip
        panel_title(fig, f"{name} (K={len(heads)}, mean layer {heads.mean_layer:.1f})", row, color=color)
        fig.add_hline(y=100 / n, line={"color": GRAY, "dash": "dot", "width": 1}, row=row, col=1)  # pyright: ignore[reportArgumentType]
        fig.add_annotation(
            text="▼", x=heads.mean_layer, y=1, yref="y domain", yanchor="bottom", yshift=-11, showarrow=False,
            font={"size": 11, "color": color}, hovertext=f"mean layer {heads.mean_layer:.2f}", row=row, col=1,
        )  # fmt: skip
    fig.update_xaxes(range=[-0.6, n - 0.4], title_text="layer")
    fig.update_yaxes(title_text="heads", ticksuffix="%", range=[0, 1.12 * top])
    fig.update_layout(bargap=0.2)
    note = "dotted: even spread over layers; ▼ mean layer"
    wide, tall = max(320, min(680, 60 + 18 * n)), 92 if len(sets) > 1 else 210
    finish(fig, title, note, panel=(wide, tall), share="x", narrow=80, whole="x", legend=len(sets) + 1)
    return fig
