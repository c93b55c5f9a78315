"""Agreement of head sets and scores: a matrix of pairs, curves over K, and two scores against each other."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy import stats

from lofit_lens.checks import check_is, check_one_of
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import mark
from lofit_lens.heads import HeadScores, HeadSet, joint_grid
from lofit_lens.plots.curves import GRAY, MANY_TICKS, add_curve, faded, need, rows_where, ticks_at
from lofit_lens.plots.layout import finish
from lofit_lens.plots.style import COLORS, HEAT
from lofit_lens.plots.ticks import STEPS

VALUES = {
    "jaccard": ("Jaccard index", "{:.2f}"),
    "shared": ("shared heads", "{:.0f}"),
    "rbo": ("rank-biased overlap", "{:.2f}"),
}


def overlap_heatmap(frame: pd.DataFrame, value: str = "jaccard", *, title: str = "Overlap of head sets") -> go.Figure:
    """Draw each pair of head sets as a cell, with its value and significance; the diagonal says how many heads a set has.

    The marks `*` and `+` are of the layer-matched test: sets that only prefer the same layers get none. `°` marks pairs with
    p < 0.05 only by the plain hypergeometric test.

    Args:
        frame: of `analysis.overlap.overlap`.
        value: `"jaccard"`, `"shared"` or `"rbo"`.
        title: of the figure.

    Raises:
        InputError: an empty table or one of another kind, or an unknown value.
    """
    check_one_of("value", value, VALUES)
    need(frame, ("a", "b", value, "expected", "p_holm", "p_layer_holm"), "analysis.overlap.overlap")
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    size = {**dict(zip(frame["b"], frame["k_b"], strict=True)), **dict(zip(frame["a"], frame["k_a"], strict=True))}
    label, form = VALUES[value]
    z, text, hover = (np.full((len(names), len(names)), fill, dtype=object) for fill in (None, "", ""))
    for i, name in enumerate(names):
        text[i, i], hover[i, i] = f"K={size[name]}", f"{name}: {size[name]} heads"
    for row in frame.to_dict("records"):
        said = (
            f"{row['a']} & {row['b']}<br>shared {row['shared']} of {row['k_a']} and {row['k_b']}, Jaccard "
            f"{row['jaccard']:.3f}, RBO {row['rbo']:.3f}<br>by chance {row['expected']:.2f} shared (Jaccard "
            f"{row['expected_jaccard']:.3f}): p {row['p_hypergeometric']:.2g}, Holm {row['p_holm']:.2g}<br>layer-matched "
            f"{row['expected_layer']:.2f} shared: p {row['p_layer']:.2g}, Holm {row['p_layer_holm']:.2g}"
        )
        for i, j in ((names.index(row["a"]), names.index(row["b"])), (names.index(row["b"]), names.index(row["a"]))):
            z[i, j], hover[i, j] = row[value], said
            text[i, j] = f"{form.format(row[value])}{_mark(row)}"
    top = max(frame[value].tolist()) or 1.0
    step = next((s for s in STEPS if s >= top / 5), STEPS[-1])
    side = max(64, min(100, 560 // len(names)))
    fig = go.Figure(
        go.Heatmap(
            z=z.tolist(), x=names, y=names, text=text.tolist(), customdata=hover.tolist(), texttemplate="%{text}",
            hovertemplate="%{customdata}<extra></extra>", colorscale=HEAT, zmin=0, zmax=top, meta=2,
            colorbar={"title": {"text": label}, **({"dtick": step, "tick0": 0} if value == "shared" else {})},
        )
    )  # fmt: skip
    note = "* p < 0.05, + p < 0.1: more shared heads than random sets with the same number of heads in each layer"
    if any(_mark(row) == "°" for row in frame.to_dict("records")):
        note += "; ° p < 0.05 only against random sets over all layers (hypergeometric test)"
    n, wide = len(names), side * len(names)
    fig.update_yaxes(autorange="reversed", showgrid=False)
    fig.update_xaxes(showgrid=False)
    ks = " or ".join(dict.fromkeys(str(k) for k in size.values()))
    finish(fig, title, f"{note}; Holm over pairs; K={ks} heads per set", panel=(wide, wide), cells=(n, n))
    return fig


def _mark(row: Mapping[Any, Any]) -> str:
    """Return the mark of the layer-matched test, or `°` where only the plain one is significant."""
    return mark(row["p_layer_holm"]) or ("°" if row["p_holm"] < 0.05 else "")


def agreement_curves(
    frame: pd.DataFrame, value: str = "shared", *, title: str = "Agreement of the top K heads"
) -> go.Figure:
    """Draw the shared heads (or Jaccard index) of two rankings against K, with the band that chance gives.

    Args:
        frame: of `analysis.overlap.agreement_by_k`, or `agreement` with a column `pair`.
        value: `"shared"` or `"jaccard"`.
        title: of the figure.

    Raises:
        InputError: an empty table or one of another kind, or an unknown value.
    """
    check_one_of("value", value, ("shared", "jaccard"))
    columns = ("k", "shared", "jaccard", "expected", "expected_jaccard", "low", "high", "p")
    need(frame, columns, "analysis.overlap.agreement_by_k")
    if "pair" not in frame.columns:
        frame = frame.assign(pair="both rankings")
    fig, pairs = go.Figure(), list(dict.fromkeys(frame["pair"]))
    chance = (
        pd.DataFrame(frame[["k", "expected", "expected_jaccard", "low", "high"]]).drop_duplicates().sort_values("k")
    )
    if not chance["k"].is_unique:
        raise InputError("these pairs belong to models of different size, so chance differs; draw one figure a model")
    low, high, middle = chance["low"], chance["high"], chance["expected"]
    if value == "jaccard":
        low, high, middle = (*(x / (2 * chance["k"] - x) for x in (low, high)), chance["expected_jaccard"])
    x = chance["k"].tolist()
    if len(x) > 1:
        fig.add_trace(go.Scatter(
            x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", mode="lines", line={"width": 0},
            fillcolor=faded(GRAY, 0.2), hoverinfo="skip", name="chance range", showlegend=False,
        ))  # fmt: skip
    fig.add_trace(go.Scatter(
        x=x, y=middle.tolist(), mode="lines" if len(x) > 1 else "markers", line={"color": GRAY, "dash": "dash", "width": 1.5},
        name="by chance", hovertemplate="K=%{x}: %{y:.3g}<extra>by chance</extra>", marker={"color": GRAY},
    ))  # fmt: skip
    if len(x) == 1:
        fig.data[-1].error_y = {
            "type": "data", "symmetric": False, "array": (high - middle).tolist(), "arrayminus": (middle - low).tolist(),
        }  # fmt: skip
    hover = "K=%{x}: %{customdata[0]} shared, Jaccard %{customdata[1]:.3f}, p %{customdata[2]:.2g}"
    for i, pair in enumerate(pairs):
        part = rows_where(frame, "pair", pair, by="k")
        add_curve(fig, part, "k", value, name=pair, place=i, hover=hover, more=("shared", "jaccard", "p"))
    fig.update_xaxes(title_text="K (heads of each ranking)")
    fig.update_yaxes(title_text="shared heads" if value == "shared" else "Jaccard index", rangemode="tozero")
    if value == "shared":
        most = max([1.0, *frame["shared"].tolist(), *high.tolist()])
        fig.update_yaxes(range=[-0.03 * most, 1.05 * most])
    many = len(x) > MANY_TICKS
    if many:
        fig.update_xaxes(range=[x[0], x[-1]])
    else:
        ticks_at(fig, x)
    note = "gray: mean and 95% range of random heads"
    finish(fig, title, note, panel=(480, 255), whole=("y" if value == "shared" else "") + ("x" if many else ""))
    return fig


def score_scatter(
    a: HeadScores, b: HeadScores, k: int | None = None, labels: tuple[str, str] | None = None, *,
    title: str = "Two scores of the same heads",
) -> go.Figure:  # fmt: skip
    """Draw each head as a dot, one score against the other; with `k`, the top K heads of each in color.

    Args:
        a: scores on the x axis.
        b: scores on the y axis, of the same model.
        k: heads of each top to mark; None = none.
        labels: names of a and b; None = their task and kind.
        title: of the figure.

    Raises:
        InputError: scores of different models, or a K that the model does not have.
    """
    for name, scores in (("a", a), ("b", b)):
        check_is(scores, HeadScores, name, "head scores (select_heads)")
    check_is(labels, (tuple, list, type(None)), "labels", "a pair of texts")
    if a.shape != b.shape:
        raise InputError(f"scores of different models: {a.shape} and {b.shape} heads; draw two scores of one model")
    names = labels or tuple(" ".join(filter(None, (s.task, s.kind))) for s in (a, b))
    listed = HeadSet.all(joint_grid((a.shape, b.shape)))
    x, y = (np.array([s[head] for head in listed]) for s in (a, b))
    tops = [set() if k is None else set(s.top(k)) for s in (a, b)]
    of = [np.array([head in top for head in listed]) for top in tops]
    heads = np.array([str(head) for head in listed])
    groups = (
        ("other heads" if k else "heads", ~of[0] & ~of[1], "#AAAAAA" if k else COLORS[0], "circle", 5),
        (f"only {names[0]}", of[0] & ~of[1], COLORS[0], "square", 8),
        (f"only {names[1]}", of[1] & ~of[0], COLORS[1], "diamond", 8),
        ("both", of[0] & of[1], COLORS[2], "star", 11),
    )
    fig, entries = go.Figure(), []
    for name, chosen, color, symbol, size in groups:
        if chosen.any():
            entries.append(f"{name} ({int(chosen.sum())})")
            fig.add_trace(go.Scatter(
                x=x[chosen].tolist(), y=y[chosen].tolist(), mode="markers", name=entries[-1], text=heads[chosen].tolist(),
                marker={"color": color, "symbol": symbol, "size": size, "line": {"color": "white", "width": 0.5}},
                hovertemplate="%{text}: %{x:.4g}, %{y:.4g}<extra>" + name + "</extra>",
            ))  # fmt: skip
    rho = "not defined" if np.ptp(x) == 0 or np.ptp(y) == 0 else f"{stats.spearmanr(x, y)[0]:.2f}"
    top = f"; marked: top K={k} of each" if k else ""
    fig.update_xaxes(title_text=names[0])
    fig.update_yaxes(title_text=names[1])
    finish(fig, title, f"Spearman's rho {rho}, n={x.size} heads{top}", panel=(400, 320))
    return fig
