"""Figures of adapters attached together, learned in turn, and after long contexts."""

import pandas as pd
import plotly.graph_objects as go

from lofit_lens.analysis.interference import SUM, TOGETHER, Interference, LongContext
from lofit_lens.checks import check_is
from lofit_lens.evaluation.stats import mark
from lofit_lens.plots.curves import add_curve, metric_name, percent
from lofit_lens.plots.layout import finish
from lofit_lens.plots.style import COLORS


def interference_figure(found: Interference, *, title: str = "") -> go.Figure:
    """Draw grouped bars: each task under each condition, with 95 % intervals over items and the marks of the tests.

    Args:
        found: of `analysis.interference.interference` or `learned_in_turn`.
        title: of the figure; empty = "Adapters of several tasks together" or "Adapters learned in turn".
    """
    check_is(found, Interference, "found", "what analysis.interference gives")
    frame = found.frame
    tasks, conditions = (list(dict.fromkeys(frame[c])) for c in ("task", "condition"))
    conditions.sort(key=lambda c: c in (TOGETHER, SUM))  # after each single adapter
    tested = {
        (t, f): p for t, f, p in zip(found.tests["task"], found.tests["first"], found.tests["p_holm"], strict=True)
    }
    first = frame.drop_duplicates("task").set_index("task")
    names = {t: f"{t}<br>({metric_name(str(first.loc[t, 'metric']))}, n={first.loc[t, 'n']})" for t in tasks}
    fig = go.Figure()
    for i, condition in enumerate(conditions):
        rows = pd.DataFrame(frame[frame["condition"] == condition])
        color = "#777777" if condition == "no adapter" else COLORS[(i - 1) % len(COLORS)]
        fig.add_trace(go.Bar(
            x=[names[t] for t in rows["task"]], y=rows["value"].tolist(), name=condition, marker={"color": color},
            error_y={
                "type": "data", "symmetric": False, "array": (rows["high"] - rows["value"]).tolist(), "thickness": 1.3,
                "arrayminus": (rows["value"] - rows["low"]).tolist(), "width": 3, "color": "#222222",
            },
            offsetgroup=condition,
            hovertemplate="%{y:.1%}<extra>" + condition + "</extra>",
        ))  # fmt: skip
        marks = [mark(tested[t, condition]) if (t, condition) in tested else "" for t in rows["task"]]
        if any(marks):  # above the error bars
            fig.add_trace(go.Bar(
                x=[names[t] for t in rows["task"]], y=[0.0] * len(rows), base=rows["high"].tolist(), text=marks,
                textposition="outside", textfont={"size": 14}, offsetgroup=condition, showlegend=False, hoverinfo="skip",
                marker={"color": "rgba(0,0,0,0)"}, name=f"marks of {condition}",
            ))  # fmt: skip
    after = any(c.startswith("after ") for c in conditions)
    against = (
        "against the step in which the task was learned"
        if after
        else f"against {' or '.join(dict.fromkeys(found.tests['second']))}"
    )
    note = (
        f"attached in the order {', '.join(found.order)}; bars: 95% intervals over items; "
        f"* p < 0.05, + p < 0.1 {against} (paired test, Holm)"
    )
    default = "Adapters learned in turn" if after else "Adapters of several tasks together"
    # Room for error bars that reach 100 % or 0 %, and for the marks above them.
    fig.update_yaxes(
        title_text="accuracy", range=[-0.02, 1.12], tick0=0, dtick=0.25, zeroline=True, zerolinecolor="#888888"
    )
    percent(fig)
    fig.update_xaxes(showgrid=False)
    fig.update_layout(barmode="group", bargap=0.2, bargroupgap=0.05)
    finish(fig, title or default, note, panel=(max(480, 34 * len(conditions) * len(tasks)), 280))
    return fig


def long_context_figure(found: LongContext, *, title: str = "After other documents in the context") -> go.Figure:
    """Draw the task's metric against the number of tokens before the prompt, with and without the adapter, with 95 % bands.

    Args:
        found: of `analysis.interference.long_context`.
        title: of the figure.
    """
    check_is(found, LongContext, "found", "what analysis.long_context gives")
    fig, names, most = go.Figure(), ("with the adapter", "no adapter"), max(found.frame["tokens"].tolist())
    for i, (name, on) in enumerate(zip(names, (True, False), strict=True)):
        points = pd.DataFrame(found.frame[found.frame["adapter"] == on]).sort_values("length")
        add_curve(
            fig, points, "tokens", "value", ("low", "high"), name=name, place=i, more=("length",),
            hover="%{x:.0f} tokens (at most %{customdata[0]}): %{y:.1%}",
        )  # fmt: skip
    note = f"{found.task} {found.split}, n={int(found.frame['n'].iloc[0])} items; bands: 95% intervals over items"
    fig.update_xaxes(
        title_text="tokens of other documents before the prompt (mean over items)",
        zeroline=False,
        range=[-0.04 * most, 1.04 * most],
    )
    fig.update_yaxes(title_text=metric_name(found.metric), range=[-0.03, 1.03])
    percent(fig)
    finish(fig, title, note, panel=(450, 260))
    return fig
