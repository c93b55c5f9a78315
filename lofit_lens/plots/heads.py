"""Layer x head grids."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.errors import InputError
from lofit_lens.heads import HeadScores, HeadSet, Scores, Sets, named_scores, named_sets
from lofit_lens.plots.style import HEAT, style

BAR = 110  # pixels of a colour bar with its numbers and title


def head_grid(
    scores: Scores, chosen: Sets | None = None, *,
    marked: Sets | None = None, marked_label: str = "planted", title: str = "Head scores",
) -> go.Figure:  # fmt: skip
    """One panel a task: every head's score, chosen heads as filled circles, `marked` heads as open squares.

    Panels of one kind of score share a colour scale; scores of several kinds (norms beside accuracies) have one each.

    Args:
        scores: panel title -> scores `[n_layers, n_heads]`, all of one model; or one table of scores, or a list of them.
        chosen: panel title -> heads to mark as chosen; for one panel, a head set.
        marked: panel title -> a second set to mark, e.g. known truth.
        marked_label: what the second set is.
        title: of the figure.

    Raises:
        InputError: no scores, panels of different shapes, or a head set for no panel.

    Examples:
        >>> figure = head_grid(HeadScores([[0.1, 0.9], [0.7, 0.2]], kind="A-norm"))
        >>> figure.layout.xaxis.title.text
        'head'
    """
    scores = named_scores(scores)
    if not scores:
        raise InputError("no head scores to draw; give at least one, e.g. {'MQuAKE': select_heads(...)}")
    shapes = {s.shape for s in scores.values()}
    if len(shapes) > 1:
        raise InputError(f"head grids of different models in one figure: {sorted(shapes)}; draw one figure a model")
    n_layers, n_heads = shape = shapes.pop()
    chosen, marked = (_in_panels(sets, scores, shape) for sets in (chosen, marked))
    kinds = [s.kind for s in scores.values()]
    own_bars = len(set(kinds)) > 1  # one scale for norms and accuracies would leave one of them a single colour
    panel, gap = max(170, min(18 * n_heads, 620)), BAR if own_bars else 0  # pixels
    room = len(scores) * panel + (len(scores) - 1) * gap
    spacing = gap / room if own_bars else 0.03
    fig = make_subplots(cols=len(scores), shared_yaxes=True, subplot_titles=list(scores), horizontal_spacing=spacing)
    layout: Any = fig.layout
    for i, (name, s) in enumerate(scores.items(), start=1):
        alike = [other.at_heads for other in scores.values() if other.kind == s.kind]
        bar = {"x": layout[f"xaxis{i}"].domain[1], "xanchor": "left"} if own_bars else {}
        fig.add_trace(
            go.Heatmap(
                z=s.values.tolist(), zmin=min(v.min().item() for v in alike), zmax=max(v.max().item() for v in alike),
                colorscale=HEAT, showscale=own_bars or i == len(scores), xgap=1, ygap=1,
                colorbar={"title": {"text": s.kind, "side": "right"}, "thickness": 12, "len": 0.9, **bar},
                hovertemplate="L%{y}H%{x}: %{z:.4g}<extra>" + name + "</extra>", name=name,
            ), row=1, col=i,
        )  # fmt: skip
        _mark(fig, i, chosen.get(name), "chosen", {"symbol": "circle", "size": 8, "color": "#D55E00",
              "line": {"color": "white", "width": 1.5}})  # fmt: skip
        _mark(fig, i, marked.get(name), marked_label, {"symbol": "square-open", "size": 14, "color": "#56B4E9",
              "line": {"color": "#56B4E9", "width": 3}})  # fmt: skip
    height = 230 + max(100, min(26 * n_layers, 620))
    style(fig, title=title, width=130 + room, height=height)
    fig.update_xaxes(title_text="head", range=[-0.5, n_heads - 0.5], showgrid=False, constrain="domain")
    fig.update_yaxes(range=[-0.5, n_layers - 0.5], showgrid=False, dtick=max(1, n_layers // 8))
    fig.update_yaxes(title_text="layer", col=1)
    # Below the axis titles: never on one of them, nor under the buttons that a page shows at the top right.
    fig.update_layout(
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 8 / height, "yref": "container", "yanchor": "bottom",
                "bgcolor": "#D8D8D8"}, margin={"t": 84, "b": 104},
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


def _mark(fig: go.Figure, col: int, heads: HeadSet | None, label: str, marker: dict[str, object]) -> None:
    if heads is None:
        return
    shown = any(True for _ in fig.select_traces({"name": label, "showlegend": True}))
    fig.add_trace(
        go.Scatter(
            x=[h.head for h in heads], y=[h.layer for h in heads], mode="markers", marker=marker, name=label,
            legendgroup=label, showlegend=not shown, hoverinfo="skip",
        ), row=1, col=col,
    )  # fmt: skip
