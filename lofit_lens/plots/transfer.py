"""How well one task's heads serve another (the paper's Figure 2)."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lofit_lens.analysis.transfer import RANDOM, Transfer
from lofit_lens.checks import check_is
from lofit_lens.evaluation.result import how_many
from lofit_lens.plots.curves import metric_name
from lofit_lens.plots.layout import finish
from lofit_lens.plots.style import HEAT

GAP = 0.35  # of a row, between the tasks' heads and random ones


def transfer_heatmap(transfer: Transfer, *, title: str = "Accuracy with another task's heads") -> go.Figure:
    """Draw relative accuracy as a heat map: rows are the tasks that heads were chosen for, columns the task tuned and tested.

    The number is the percentage of the accuracy with the task's own heads, with the mark of its test. Hovering shows accuracy and
    intervals. The last row, set apart, is of random heads.

    Args:
        transfer: of `analysis.transfer.transfer_matrix`.
        title: of the figure.
    """
    check_is(transfer, Transfer, "transfer", "what analysis.transfer_matrix gives")
    wide = transfer.matrix()
    tasks, sources = list(wide.columns), list(wide.index)
    cells = transfer.frame.set_index(["source", "task"])
    y = [float(i) + (GAP if s == RANDOM else 0) for i, s in enumerate(sources)]
    known = transfer.frame["relative"].dropna().tolist() or [0.0, 100.0]
    low, high = min(known), max(known)
    fig = go.Figure()
    for part in ([s for s in sources if s != RANDOM], [s for s in sources if s == RANDOM]):
        if not part:
            continue
        rows = [[cells.loc[(s, t)] for t in tasks] for s in part]
        edges = [y[sources.index(part[0])] - 0.5 + i for i in range(len(part) + 1)]
        fig.add_trace(go.Heatmap(
            z=[[None if np.isnan(c["relative"]) else float(c["relative"]) for c in r] for r in rows], x=tasks, y=edges,
            text=[[_text(c) for c in r] for r in rows], texttemplate="%{text}", textfont={"size": 13},
            customdata=[[_hover(s, t, cells.loc[(s, t)]) for t in tasks] for s in part], colorscale=HEAT, zmin=low,
            zmax=max(high, low + 1), xgap=2, ygap=2, showscale=RANDOM not in part, name=part[0],
            hovertemplate="%{customdata}<extra></extra>",
            colorbar={"title": {"text": "relative accuracy"}, "ticksuffix": "%"}, meta=2,
        ))  # fmt: skip
    first = transfer.frame.drop_duplicates("task").set_index("task")
    names = [f"{t}<br>({metric_name(str(first.loc[t, 'metric']))}, n={first.loc[t, 'n_items']})" for t in tasks]
    wide_cell = max(84, 8 * max(len(part) for n in names for part in n.split("<br>")))
    runs = {
        chance: how_many(zip(part["task"], part["n_seeds"], strict=True), "run")
        for chance, part in transfer.frame.groupby(transfer.frame["source"].eq(RANDOM))
    }
    note = f"* p < 0.05, + p < 0.1 against the task's own heads (paired test over items); {runs[False]} per cell"
    note += f", {runs[True]} with random heads" if True in runs else ""
    fig.update_yaxes(
        title_text="heads chosen for", tickvals=y, ticktext=["random heads" if s == RANDOM else s for s in sources],
        range=[y[-1] + 0.5, -0.5], showgrid=False, zeroline=False,
    )  # fmt: skip
    fig.update_xaxes(title_text="tuned and tested on", tickvals=tasks, ticktext=names, showgrid=False)
    panel = wide_cell * len(tasks), max(190, 62 * len(sources))
    finish(fig, title, note, panel=panel, cells=(len(tasks), len(sources)))
    return fig


def _text(cell: pd.Series) -> str:
    return "n/a" if np.isnan(cell["relative"]) else f"{cell['relative']:.1f}{cell['mark']}"


def _hover(source: str, task: str, cell: pd.Series) -> str:
    p = "" if np.isnan(cell["p"]) else f"<br>p {cell['p']:.3g}, Holm {cell['p_holm']:.3g}"
    return (
        f"heads of {source}, tuned on {task}<br>{cell['metric']} {cell['accuracy']:.3f} [{cell['accuracy_low']:.3f}, "
        f"{cell['accuracy_high']:.3f}]<br>relative {cell['relative']:.1f} % [{cell['low']:.1f}, {cell['high']:.1f}]{p}"
        f"<br>{cell['n_seeds']} seeds, {cell['n_items']} items"
    )
