"""Figures of what an adapter's offsets promote, and of which of its heads are needed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lofit_lens.analysis.logit_lens import TOTAL, HeadTokens
from lofit_lens.analysis.needed import BEST, KeepOnly, LeaveOneOut, Removal
from lofit_lens.checks import check_is, check_whole, given
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import mark
from lofit_lens.models import visible
from lofit_lens.plots.curves import add_curve, faded, metric_name, need, percent, ticks_at
from lofit_lens.plots.layout import finish, panel_title
from lofit_lens.plots.style import COLORS

PANELS = 9  # heads in one figure of tokens
LONGEST = 16  # letters of a token that are shown
MANY_HEADS = 64  # in one figure of heads side by side
BLUE, RED, GRAY = COLORS[0], COLORS[1], "#777777"
COSINES = {"cos_mass_mean": "ITI mass mean", "cos_probe": "ITI probe", "cos_reading": "RepE reading vector"}
CHANCE = {"cos_mass_mean": "chance_sd_head", "cos_probe": "chance_sd_head", "cos_reading": "chance_sd_model"}


def promoted_figure(
    tokens: HeadTokens, *, top: int | None = None, title: str = "Tokens that each head's offset promotes"
) -> go.Figure:
    """Draw the logits that each head's offset adds to its strongest tokens, one panel per head, most promoted on top.

    Args:
        tokens: of `analysis.logit_lens.promoted_tokens`. The first 9 heads are shown; of 2 to 8 heads, their total too.
        top: number of promoted and of suppressed tokens; None = all that were kept.
        title: of the figure.

    Raises:
        InputError: `top` below 1.
    """
    check_is(tokens, HeadTokens, "tokens", "what analysis.promoted_tokens gives")
    check_whole(1, **given(top=top))
    names = [str(h) for h in tokens.heads][:PANELS]
    panels = [*names, TOTAL] if 1 < len(tokens.heads) < PANELS else names
    cols = 2 if len(panels) in (2, 4) else min(3, len(panels))
    n_rows = -(-len(panels) // cols)
    listed = [_strongest(tokens.of(name), top) for name in panels]
    n = max(len(rows) for rows in listed)
    shown = ["all heads" if p == TOTAL else p for p in panels]
    weak = {p: tokens.no_better_than_chance(p) for p in panels}
    titles = [f"{s} ({', '.join(weak[p])}: n.s.)" if weak[p] else s for p, s in zip(panels, shown, strict=True)]
    fig = make_subplots(rows=n_rows, cols=cols, shared_xaxes="all")  # pyright: ignore[reportArgumentType]
    for i, rows in enumerate(listed):
        panel_title(fig, titles[i], i + 1)
        place: Any = {"row": i // cols + 1, "col": i % cols + 1}
        y = list(range(len(rows)))
        fig.add_trace(go.Bar(
            x=rows["logit"].tolist(), y=y, orientation="h", name=shown[i], showlegend=False,
            marker={"color": [BLUE if k == "promoted" else RED for k in rows["kind"]]},
            customdata=[[_plain(t), k, r] for t, k, r in zip(rows["token"], rows["kind"], rows["rank"], strict=True)],
            hovertemplate="%{customdata[0]}: %{x:.3g} (%{customdata[1]}, rank %{customdata[2]})<extra>" + shown[i] + "</extra>",
        ), **place)  # fmt: skip
        fig.update_yaxes(
            tickvals=y, ticktext=[_plain(t) for t in rows["token"]], range=[n - 0.5, -0.5], showgrid=False, zeroline=False,
            ticks="", **place,
        )  # fmt: skip
    scale = (
        f"scale of the final norm from {tokens.n_prompts} prompts"
        if tokens.scale is not None
        else "scale of the final norm taken as 1"
    )
    more = f"; first {len(names)} of {len(tokens.heads)} heads" if len(tokens.heads) > len(names) else ""
    note = (
        f"direct effect of v through W_O, final norm and W_U, centered over the vocabulary; {scale}{more}; "
        "blue: promoted, orange: suppressed"
    )
    if any(weak.values()):
        note += "; n.s.: no stronger than the top tokens of random offsets of equal norm (p > 0.05)"
    fig.update_xaxes(
        zeroline=True, zerolinecolor="#888888", title_text="logits" if tokens.scale is not None else "logits (relative)"
    )
    fig.update_layout(bargap=0.2)
    finish(fig, title, note, panel=(170, 14 + 17 * n), cols=cols, share="x", narrow=90)
    return fig


def cosine_figure(frame: pd.DataFrame, *, title: str = "Offsets and the directions of ITI and RepE") -> go.Figure:
    """Draw the cosine of each head's offset with ITI's and RepE's directions.

    The bands hold 95 % of the cosines with a random direction, 1.96 / sqrt(d).

    Args:
        frame: of `analysis.geometry.geometry`, with probes or reading vectors.
        title: of the figure.

    Raises:
        InputError: no rows, no cosines, or more heads than can be read.
    """
    need(frame, ("head",), "analysis.geometry.geometry")
    kinds = [k for k in COSINES if k in frame.columns]
    if not kinds:
        raise InputError("this table has no cosines; give geometry(...) probes=... or reading=...")
    heads = _few(frame["head"].tolist())
    fig, entries, bands = go.Figure(), [], []
    for chance in dict.fromkeys(CHANCE[k] for k in kinds):
        reach, space = (
            1.96 * float(frame[chance].iloc[0]),
            "a head" if chance.endswith("head") else "the residual stream",
        )
        bands.append(f"in {space}, d = {round(float(frame[chance].iloc[0]) ** -2)}")
        fig.add_trace(go.Scatter(
            x=[-0.5, len(heads) - 0.5, len(heads) - 0.5, -0.5], y=[reach, reach, -reach, -reach], fill="toself", mode="lines",
            line={"width": 0}, fillcolor=faded("#000000", 0.1), name=bands[-1], hoverinfo="skip",
            showlegend=False,
        ))  # fmt: skip
    for i, kind in enumerate(kinds):
        entries.append(COSINES[kind])
        y = [None if np.isnan(c) else float(c) for c in frame[kind]]
        fig.add_trace(go.Scatter(
            x=[j + 0.18 * (i - (len(kinds) - 1) / 2) for j in range(len(heads))], y=y, mode="markers", name=COSINES[kind],
            marker={"color": COLORS[i], "size": 9, "symbol": ("circle", "diamond", "square")[i]}, customdata=heads,
            hovertemplate="%{customdata}: %{y:.3f}<extra>" + COSINES[kind] + "</extra>",
        ))  # fmt: skip
    note = f"{len(heads)} heads; gray: 95% of random directions ({'; darker: '.join(bands)})"
    _heads_axis(fig, heads)
    fig.update_yaxes(title_text="cosine", range=[-1.05, 1.05], zeroline=True, zerolinecolor="#888888")
    finish(fig, title, note, panel=(max(440, min(1120, 26 * len(heads))), 260))
    return fig


def leave_one_out_figure(found: LeaveOneOut, *, title: str = "What the adapter loses without each head") -> go.Figure:
    """Draw how much of the task's metric is lost when one head's edit is left out, with 95 % intervals over items.

    Args:
        found: of `analysis.needed.leave_one_out`.
        title: of the figure.

    Raises:
        InputError: more heads than can be read.
    """
    check_is(found, LeaveOneOut, "found", "what analysis.leave_one_out gives")
    frame, heads = found.frame, _few(found.frame["head"].tolist())
    marks = [mark(p) for p in frame["p_holm"]]
    fig = go.Figure(go.Bar(
        x=list(range(len(heads))), y=frame["loss"].tolist(), error_y=_bars(frame, "loss", "low", "high"), name="loss",
        marker={"color": BLUE}, customdata=[[h, w, p] for h, w, p in zip(heads, frame["without"], frame["p_holm"], strict=True)],
        hovertemplate="%{customdata[0]}: loss %{y:.1%}, without it %{customdata[1]:.1%}, Holm p %{customdata[2]:.3g}"
        "<extra></extra>",
    ))  # fmt: skip
    for i, text in enumerate(marks):
        if text:
            top = max(float(frame["high"].iloc[i]), 0.0)
            fig.add_annotation(x=i, y=top, text=text, showarrow=False, yanchor="bottom", font={"size": 16})
    n = int(frame["n"].iloc[0])
    note = (
        f"{found.task} {found.split}, n={n} items; all heads: {float(frame['full'].iloc[0]):.1%}; "
        "bars: 95% intervals over items; * p < 0.05, + p < 0.1 (paired test, Holm over heads)"
    )
    _heads_axis(fig, heads)
    fig.update_yaxes(title_text=f"loss in {metric_name(found.metric)}", zeroline=True, zerolinecolor="#888888")
    percent(fig)
    finish(fig, title, note, panel=(max(440, min(1120, 30 * len(heads))), 240))
    return fig


def keep_figure(found: KeepOnly, *, title: str = "Are a few heads enough?") -> go.Figure:
    """Draw the task's metric with the edits of only k heads: best first, and in random orders, with 95 % bands.

    Args:
        found: of `analysis.needed.keep_only`.
        title: of the figure.
    """
    check_is(found, KeepOnly, "found", "what analysis.keep_only gives")
    best = pd.DataFrame(found.frame[found.frame["order"] == BEST])
    names = ("best first", f"random order (mean of {found.draws} draws)")
    hover = "k = %{x}: %{y:.1%}"
    fig = go.Figure()
    add_curve(fig, best, "k", "value", ("low", "high"), name=names[0], place=0, hover=hover)
    add_curve(fig, found.curve, "k", "random", ("random_low", "random_high"), name=names[1], place=1, hover=hover)
    note = (
        f"{found.task} {found.split}, n={int(found.curve['n'].iloc[0])} items; "
        "bands: 95% intervals over items, for random orders over draws too"
    )
    fig.update_xaxes(zeroline=False, title_text="k (heads whose edits are kept)")
    ticks_at(fig, [float(k) for k in found.curve["k"]])
    fig.update_yaxes(title_text=metric_name(found.metric), range=[-0.03, 1.03])
    percent(fig)
    finish(fig, title, note, panel=(450, 260))
    return fig


def removal_figure(found: Removal, *, title: str = "Does the task need the chosen heads?") -> go.Figure:
    """Draw the task's metric without the first k chosen heads, and without k random ones, with 95 % bands.

    Args:
        found: of `analysis.needed.removal` or `drop_edits`.
        title: of the figure.
    """
    check_is(found, Removal, "found", "what analysis.removal gives")
    fig, curve = go.Figure(), found.curve
    names = ("chosen heads", f"random heads (mean of {found.draws} draws)")
    for i, side in enumerate(("chosen", "random")):
        band = (f"{side}_low", f"{side}_high")
        add_curve(fig, curve, "k", side, band, name=names[i], place=1 - i, hover="k = %{x}: %{y:.1%}")
    fig.add_hline(y=float(curve["none"].iloc[0]), line={"color": GRAY, "dash": "dash", "width": 1.5})
    last = curve.to_dict("records")[-1]
    note = (
        f"{found.task} {found.split}, n={int(last['n'])} items; dashed: nothing removed; "
        "bands: 95% intervals over items, for random heads over draws too; "
        f"k = {int(last['k'])}: chosen - random {_difference(last)} points ({_how(found.how)})"
    )
    fig.update_xaxes(title_text="k (heads removed)")
    ticks_at(fig, [float(k) for k in curve["k"]])
    fig.update_yaxes(title_text=metric_name(found.metric), range=[-0.03, 1.03])
    percent(fig)
    finish(fig, title, note, panel=(450, 260))
    return fig


def removal_bars(
    found: Mapping[str, Removal] | Removal, *, title: str = "Removing the chosen heads or as many random ones"
) -> go.Figure:
    """Draw several removals side by side, each at its largest k: nothing, chosen or random heads removed, with 95 % intervals.

    Args:
        found: label -> result of `analysis.needed.removal` or `drop_edits`; or a single result.
        title: of the figure.

    Raises:
        InputError: nothing to draw.
    """
    if isinstance(found, Removal):
        found = {found.task: found}
    check_is(found, Mapping, "found", "what analysis.removal gives, by name")
    for name, one in found.items():
        check_is(one, Removal, f"{name!r}", "what analysis.removal gives")
    if not found:
        raise InputError("no removals to draw; give at least one, e.g. {'kinship': removal(...)}")
    rows = pd.DataFrame([r.curve.to_dict("records")[-1] for r in found.values()])
    nothing = pd.DataFrame([r.frame.to_dict("records")[0] for r in found.values()])
    at = zip(found.items(), rows["n"].tolist(), rows["k"].tolist(), strict=True)
    names = [f"{name}<br>({metric_name(r.metric)}, n={n:g}, k={k:g})" for (name, r), n, k in at]
    sides = {
        "nothing removed": (nothing["value"], _bars(nothing, "value", "low", "high"), GRAY),
        "chosen heads": (rows["chosen"], _bars(rows, "chosen", "chosen_low", "chosen_high"), RED),
        "random heads": (rows["random"], _bars(rows, "random", "random_low", "random_high"), BLUE),
    }
    fig = go.Figure()
    for label, (y, errors, color) in sides.items():
        fig.add_trace(go.Bar(
            x=names, y=y.tolist(), error_y=errors, name=label, marker={"color": color},
            hovertemplate="%{y:.1%}<extra>" + label + "</extra>",
        ))  # fmt: skip
    for name, row in zip(names, rows.to_dict("records"), strict=True):
        fig.add_annotation(
            x=name,
            y=1.04,
            yref="y",
            text=_difference(row),
            name="over",
            showarrow=False,
            yanchor="bottom",
            font={"size": 11},
        )
    draws = "/".join(dict.fromkeys(str(r.draws) for r in found.values()))
    note = (
        f"bars: 95% intervals over items, for random heads over {draws} draws too; "
        f"above: chosen - random in percentage points{' [95% interval]' if any(pd.notna(low) for low in rows['low']) else ''}"
    )
    fig.update_yaxes(title_text="accuracy", range=[-0.02, 1.3], tickvals=[0, 0.25, 0.5, 0.75, 1])
    percent(fig)
    fig.update_xaxes(showgrid=False)
    fig.update_layout(barmode="group", bargap=0.25)
    finish(fig, title, note, panel=(max(440, 170 * len(names)), 280))
    return fig


def _strongest(rows: pd.DataFrame, top: int | None) -> pd.DataFrame:
    """Sort promoted tokens from the strongest down, then suppressed ones up to the strongest."""
    kept = rows if top is None else rows[rows["rank"] <= top]
    return pd.DataFrame(kept).sort_values("logit", ascending=False, kind="stable").reset_index(drop=True)


def _plain(token: str) -> str:
    """Return a token as a label: as it is shown everywhere, shortened, without markup."""
    shown = visible(token)
    shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "\u2026"
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _few(heads: list[str]) -> list[str]:
    if len(heads) > MANY_HEADS:
        raise InputError(
            f"{len(heads)} heads, of which {MANY_HEADS} can be read side by side; give the first rows of the table"
        )
    return heads


def _heads_axis(fig: Any, heads: list[str]) -> None:
    fig.update_xaxes(
        tickvals=list(range(len(heads))), ticktext=heads, showgrid=False, zeroline=False, range=[-0.6, len(heads) - 0.4],
        title_text="head",
    )  # fmt: skip


def _bars(frame: pd.DataFrame, y: str, low: str, high: str) -> dict[str, object]:
    """Return error bars from a value to its bounds."""
    return {
        "type": "data", "symmetric": False, "array": (frame[high] - frame[y]).tolist(), "thickness": 1.3, "width": 4,
        "arrayminus": (frame[y] - frame[low]).tolist(), "color": "#222222",
    }  # fmt: skip


def _difference(row: Mapping[Any, Any]) -> str:
    """Return the difference in percentage points, with its interval if there is one (few draws are not tested)."""
    between = f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" if pd.notna(row["low"]) else ""
    return f"{100 * row['difference']:+.0f}{between}"


def _how(how: str) -> str:
    return {"mean": "z at its mean", "zero": "z at 0"}.get(how, "edits left out")
