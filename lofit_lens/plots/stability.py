"""Whether selection finds the same heads over seeds or folds."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from lofit_lens.errors import InputError
from lofit_lens.evaluation.result import how_many
from lofit_lens.plots.curves import GRAY, MANY_TICKS, add_curve, need, ticks_at
from lofit_lens.plots.layout import finish


def stability_curves(
    frames: Mapping[str, pd.DataFrame] | pd.DataFrame, *, title: str = "Agreement of head selection between runs"
) -> go.Figure:
    """Draw the mean Jaccard index of two runs' top K heads against K; bands are the range over pairs of runs, dashes chance.

    Args:
        frames: legend name -> table of `analysis.stability.stability`; or one table.
        title: of the figure.

    Raises:
        InputError: no table, an empty one, or one of another kind.
    """
    if isinstance(frames, pd.DataFrame):
        frames = {"runs": frames}
    if not frames:
        raise InputError("no tables to draw; give at least one, e.g. {'MQuAKE': stability(scores)}")
    fig, chance = go.Figure(), {}
    for i, (name, frame) in enumerate(frames.items()):
        need(frame, ("k", "jaccard", "lowest", "highest", "expected", "n_runs"), "analysis.stability.stability")
        part = frame.sort_values("k")
        chance.setdefault(tuple(zip(part["k"], part["expected"], strict=True)), []).append(name)
        hover = "K=%{x}: %{y:.3f}, pairs %{customdata[0]:.3f} to %{customdata[1]:.3f}<br>%{customdata[2]:.0f} runs"
        label = f"{name} ({how_many(((name, n) for n in part['n_runs']), 'run')})"
        add_curve(fig, part, "k", "jaccard", ("lowest", "highest"), name=label, place=i, hover=hover,
                  more=("lowest", "highest", "n_runs"))  # fmt: skip
    for points, names in chance.items():
        k, expected = zip(*points, strict=True)
        label = "by chance" if len(chance) == 1 else f"by chance ({', '.join(names)})"
        fig.add_trace(go.Scatter(
            x=list(k), y=list(expected), mode="lines" if len(k) > 1 else "markers", name=label,
            line={"color": GRAY, "dash": "dash", "width": 1.5}, marker={"color": GRAY, "symbol": "line-ew-open", "size": 16},
            hovertemplate="K=%{x}: %{y:.3f}<extra>" + label + "</extra>",
        ))  # fmt: skip
    fig.update_xaxes(title_text="K (heads)")
    fig.update_yaxes(title_text="Jaccard index of two runs' top K", range=[-0.03, 1.03])
    ks = {k for points in chance for k, _ in points}
    many = len(ks) > MANY_TICKS
    if many:
        fig.update_xaxes(range=[min(ks), max(ks)])
    else:
        ticks_at(fig, sorted(ks))
    finish(fig, title, "bands and bars: lowest to highest pair of runs", panel=(480, 255), whole="x" if many else "")
    return fig
