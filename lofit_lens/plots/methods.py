"""Methods side by side on each task (the paper's Tables 1 and 3 as a figure)."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.checks import check_is
from lofit_lens.errors import InputError
from lofit_lens.evaluation.result import how_many
from lofit_lens.plots.curves import metric_name
from lofit_lens.plots.layout import finish, panel_title
from lofit_lens.plots.style import COLORS

NEEDED = ("task", "metric", "method", "mean", "low", "high", "n_items", "seeds", "n_parameters")


def method_bars(frame: pd.DataFrame, *, title: str = "Methods on the test split") -> go.Figure:
    """Draw one panel per task: each method's mean with its 95 % interval; LoFiT has a color of its own.

    Args:
        frame: one row per task and method: task, metric, method, mean, low, high (in [0, 1]), n_items, seeds, n_parameters.
        title: of the figure.

    Raises:
        InputError: no row, a missing column, or fewer than two methods.
    """
    check_is(frame, pd.DataFrame, "this table", "one row per task and method")
    if missing := [c for c in NEEDED if c not in frame]:
        raise InputError(f"the table lacks the column {missing[0]!r}; it needs {', '.join(NEEDED)}")
    methods = list(dict.fromkeys(frame["method"]))
    if len(methods) < 2:
        raise InputError(f"{len(methods)} methods to draw ({', '.join(methods) or 'none'}); give two or more")
    tasks = list(dict.fromkeys(frame["task"]))
    fig = make_subplots(cols=len(tasks), shared_yaxes=True)
    for i, task in enumerate(tasks, start=1):
        rows = frame.loc[frame["task"] == task]
        fig.add_trace(
            go.Scatter(
                x=(100 * rows["mean"]).tolist(), y=rows["method"].tolist(), mode="markers", name=task, showlegend=False,
                marker={"size": 9, "color": [COLORS[1] if m.startswith("LoFiT") else COLORS[0] for m in rows["method"]]},
                error_x={
                    "type": "data", "symmetric": False, "array": (100 * (rows["high"] - rows["mean"])).tolist(),
                    "arrayminus": (100 * (rows["mean"] - rows["low"])).tolist(), "color": "#555555", "thickness": 1.5,
                },
                customdata=[[r[c] for c in ("low", "high", "seeds", "n_parameters")] for r in rows.to_dict("records")],
                hovertemplate="%{y}: %{x:.1f} % [%{customdata[0]:.2f}, %{customdata[1]:.2f}], %{customdata[2]} runs, "
                "%{customdata[3]:,} parameters<extra>" + task + "</extra>",
            ), row=1, col=i,
        )  # fmt: skip
        panel_title(fig, f"{task} ({metric_name(_of(frame, task, 'metric'))}, n={_of(frame, task, 'n_items')})", i)
    runs = how_many(zip(frame["method"], frame["seeds"], strict=True), "run")
    note = f"dots: mean over runs and items; bars: 95% interval; per method: {runs}; orange: LoFiT"
    fig.update_xaxes(title_text="accuracy", ticksuffix="%", range=[-6, 106])
    fig.update_yaxes(categoryorder="array", categoryarray=methods, autorange="reversed")
    finish(fig, title, note, panel=(190, 26 * len(methods)), cols=len(tasks), share="xy", narrow=100)
    return fig


def _of(frame: pd.DataFrame, task: str, column: str) -> str:
    return str(frame.loc[frame["task"] == task, column].iloc[0])
