"""Layer x head grids."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.checks import check_one_of
from lofit_lens.errors import InputError
from lofit_lens.heads import Head, HeadScores, HeadSet, Scores, Sets, named_scores, named_sets
from lofit_lens.plots.layout import finish, panel_title
from lofit_lens.plots.style import HEAT

SCALES = ("kind", "panel", "rank")


def head_grid(
    scores: Scores, chosen: Sets | None = None, *,
    marked: Sets | None = None, marked_label: str = "planted", scale: str = "kind", title: str = "Head scores",
) -> go.Figure:  # fmt: skip
    """Draw one panel per task: each head's score, chosen heads as filled circles, `marked` heads as open squares.

    For a model of many layers, `for_paper(figure, transpose=True)` puts layers from left to right.

    Args:
        scores: panel title -> scores `[n_layers, n_heads]`, all of one model; or one table of scores, or a list of them.
        chosen: panel title -> heads to mark as chosen; for one panel, a head set.
        marked: panel title -> a second set to mark, e.g. known truth.
        marked_label: name of the second set in the legend.
        scale: of the colors. `"kind"`: panels of one kind of score share one, so that they can be compared; different kinds
            (norms and accuracies) have one each. `"panel"`: each panel has its own, so that low scores of one task stay visible
            next to high scores of another. `"rank"`: the rank within the panel, 1 = the highest score.
        title: of the figure.

    Raises:
        InputError: no scores, panels of different shapes, a head set without a panel, or an unknown scale.

    Examples:
        >>> figure = head_grid(HeadScores([[0.1, 0.9], [0.7, 0.2]], kind="A-norm"))
        >>> figure.layout.xaxis.title.text
        'head'
    """
    check_one_of("scale", scale, SCALES)
    scores = named_scores(scores)
    if not scores:
        raise InputError("no head scores to draw; give at least one, e.g. {'MQuAKE': select_heads(...)}")
    shapes = {s.shape for s in scores.values()}
    if len(shapes) > 1:
        raise InputError(f"head grids of different models in one figure: {sorted(shapes)}; draw one figure per model")
    n_layers, n_heads = shape = shapes.pop()
    chosen, marked = (_in_panels(sets, scores, shape) for sets in (chosen, marked))
    # One scale for norms and accuracies would leave one of them a single color.
    own_bars = scale == "panel" or (scale == "kind" and len({s.kind for s in scores.values()}) > 1)
    fig = make_subplots(cols=len(scores), shared_yaxes=True)
    for i, (name, s) in enumerate(scores.items(), start=1):
        bar: dict[str, object] = {"title": {"text": s.kind}}
        z = values = s.values.tolist()
        ranked: list[list[Any]] | None = None
        hover = ""
        if scale == "rank":  # as negative numbers: the first is the brightest, and on top of the bar
            ranks = {head: rank for rank, head in enumerate(s.ranking(), start=1)}
            ticks = [1, *(round(part * len(ranks)) for part in (0.25, 0.5, 0.75, 1) if round(part * len(ranks)) > 1)]
            bar = {"title": {"text": "rank"}, "tickvals": [-t for t in ticks], "ticktext": [str(t) for t in ticks]}
            ranked = [[ranks.get(Head(layer, n), "") for n in range(n_heads)] for layer in range(n_layers)]
            z = [[-r if r else None for r in row] for row in ranked]
            low, high, hover = -len(ranks), -1, ", rank %{text}"
        else:
            alike = [s.at_heads] if scale == "panel" else [o.at_heads for o in scores.values() if o.kind == s.kind]
            low, high = min(v.min().item() for v in alike), max(v.max().item() for v in alike)
        fig.add_trace(
            go.Heatmap(
                z=z, zmin=low, zmax=high, colorscale=HEAT, showscale=own_bars or i == len(scores), colorbar=bar, name=name,
                customdata=values, text=ranked,
                hovertemplate="L%{y}H%{x}: %{customdata:.4g}" + hover + "<extra>" + name + "</extra>",
            ), row=1, col=i,
        )  # fmt: skip
        _mark(fig, i, chosen.get(name), "chosen", {"symbol": "circle", "color": "#D55E00", "line": {"color": "white"}},
              {"cell": 0.6, "most": 8, "line": 1.5})  # fmt: skip
        _mark(fig, i, marked.get(name), marked_label, {"symbol": "square-open", "color": "#56B4E9",
              "line": {"color": "#56B4E9"}}, {"cell": 0.9, "most": 14, "line": 3})  # fmt: skip
        panel_title(fig, name, i)
    fig.update_xaxes(title_text="head", range=[-0.5, n_heads - 0.5], showgrid=False, zeroline=False)
    fig.update_yaxes(title_text="layer", range=[-0.5, n_layers - 0.5], showgrid=False, zeroline=False)
    fig.update_layout(legend={"bgcolor": "#D8D8D8"})
    counts = dict.fromkeys(len(heads) for heads in chosen.values())
    note = f"dots: chosen heads, K={' or '.join(map(str, counts))}" if counts else ""
    wide = max(170, min(18 * n_heads, 620))
    finish(
        fig, title, note, panel=(wide, 100), cols=len(scores), share="xy", narrow=max(100, 5 * n_heads),
        cells=(n_heads, n_layers), whole="xy", legend=1,
    )  # fmt: skip
    return fig


def _in_panels(sets: Sets | None, panels: Mapping[str, HeadScores], shape: tuple[int, int]) -> dict[str, HeadSet]:
    """The head set of each panel that has one."""
    if sets is None:
        return {}
    if len(panels) == 1 and isinstance(sets, HeadSet | str):
        sets = dict.fromkeys(panels, sets)
    found = named_sets(sets)
    if set(found) - set(panels):
        names = ", ".join(sorted(set(found) - set(panels)))
        raise InputError(f"head sets without scores: {names}; name them as the panels: {', '.join(panels)}")
    for heads in found.values():
        heads.check(shape)
    return found


def _mark(
    fig: go.Figure, col: int, heads: HeadSet | None, label: str, marker: dict[str, object], size: dict[str, float],
) -> None:  # fmt: skip
    if heads is None:
        return
    shown = any(True for _ in fig.select_traces({"name": label, "showlegend": True}))
    fig.add_trace(
        go.Scatter(
            x=[h.head for h in heads], y=[h.layer for h in heads], mode="markers", marker=marker, name=label,
            legendgroup=label, showlegend=not shown, hoverinfo="skip", meta=size,
        ), row=1, col=col,
    )  # fmt: skip
