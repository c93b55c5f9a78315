"""The same figures in matplotlib, for papers that keep one style for all figures.

`layout.py` has already decided where everything stands, so one function draws each trace again.
"""

import importlib
from typing import Any

import numpy as np
import plotly.graph_objects as go

from lofit_lens.checks import check_is
from lofit_lens.errors import InputError
from lofit_lens.plots.curves import rgba
from lofit_lens.plots.layout import plan_of, traces
from lofit_lens.plots.style import HEAT
from lofit_lens.plots.text import plain

INCH = 96  # pixels
POINT = 72 / 96
DASHES = {"dash": "--", "dot": ":", None: "-"}
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "x", "cross": "P", "star": "*", "square-open": "s",
    "line-ew-open": "_",
}  # fmt: skip


def to_matplotlib(fig: go.Figure) -> Any:
    """Return a figure as a matplotlib figure of the same size: lines, bands, bars, dots, heat maps, axes, legend, color bars.

    The figure is not registered with `pyplot`: save it with `made.savefig("grid.pdf")`, without `bbox_inches`, which
    changes its size.
    Set `rcParams` before the call: `pdf.fonttype = 42` for TrueType fonts, or the font family of your paper.

    Args:
        fig: made by a plot of this library, e.g. `for_paper(plots.head_grid(scores), "icml")`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InputError: matplotlib is not installed, or a figure that no plot of this library made.
    """
    check_is(fig, go.Figure, "fig", "a figure of plotly, e.g. plots.head_grid(scores)")
    if plan_of(fig) is None:
        raise InputError("this figure was not made by lofit_lens.plots; draw your own figures with matplotlib itself")
    layout: Any = fig.layout
    made = _part("figure").Figure(figsize=(layout.width / INCH, layout.height / INCH))
    margin = layout.margin
    wide, tall = layout.width - margin.l - margin.r, layout.height - margin.t - margin.b
    panels: dict[str, Any] = {}
    for number in sorted({str(t.xaxis or "x")[1:] for t in traces(fig)}, key=lambda i: int(i or 1)):
        x, y = layout[f"xaxis{number}"], layout[f"yaxis{number}"]
        (x0, x1), (y0, y1) = x.domain, y.domain
        panels[number] = made.add_axes((
            (margin.l + x0 * wide) / layout.width, (margin.b + y0 * tall) / layout.height,
            (x1 - x0) * wide / layout.width, (y1 - y0) * tall / layout.height,
        ))  # fmt: skip
    for place, t in enumerate(traces(fig)):
        ax = panels[str(t.xaxis or "x")[1:]]
        {"heatmap": _heatmap, "bar": _bar, "scatter": _scatter}[t.type](made, ax, t, fig, place)
    for number, ax in panels.items():
        _axis(ax, "x", layout[f"xaxis{number}"], _names(fig, "x", number))
        _axis(ax, "y", layout[f"yaxis{number}"], _names(fig, "y", number))
        ax.spines[["top", "right"]].set_visible(False)
    _texts(made, panels, fig)
    _family(made)
    return made


def _part(name: str) -> Any:
    """Import a module of matplotlib, which only this file needs."""
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ImportError as e:
        raise InputError("to_matplotlib needs matplotlib: pip install 'lofit-lens[matplotlib]'") from e


def _family(made: Any) -> None:
    """Set a font as wide as Arial, which the layout assumes; matplotlib's default is wider. A font that the user chose stays."""
    known = importlib.import_module("matplotlib")
    if any(known.rcParams[k] != known.rcParamsDefault[k] for k in ("font.family", "font.sans-serif")):
        return
    there = {f.name for f in _part("font_manager").fontManager.ttflist}
    family = [name for name in ("Arial", "Helvetica", "Liberation Sans", "DejaVu Sans") if name in there]
    for text in made.findobj(_part("text").Text):
        text.set_fontfamily(family)


def _names(fig: go.Figure, letter: str, number: str) -> list[str]:
    """Return the categories of an axis in order, over all of its traces; [] for numbers."""
    layout: Any = fig.layout
    given = layout[f"{letter}axis{number}"].categoryarray
    if given is not None:
        return list(given)
    own = [t for t in traces(fig) if str(t[f"{letter}axis"] or letter)[1:] == number and t[letter] is not None]
    return list(dict.fromkeys(v for t in own for v in t[letter] if isinstance(v, str)))


def _at(fig: go.Figure, t: Any, letter: str) -> list[Any]:
    """Return a trace's values along an axis as numbers."""
    names = _names(fig, letter, str(t[f"{letter}axis"] or letter)[1:])
    return [names.index(v) if isinstance(v, str) else v for v in t[letter]]


def _heatmap(made: Any, ax: Any, t: Any, fig: go.Figure, _: int) -> None:
    z = np.array([[np.nan if v is None else float(v) for v in row] for row in t.z])
    down, across = z.shape

    def edges(values: Any, n: int) -> Any:
        at = np.arange(n) if values is None or isinstance(values[0], str) else np.array(values, dtype=float)
        return at if len(at) == n + 1 else np.arange(n + 1) + at[0] - 0.5

    x, y = edges(t.x, across), edges(t.y, down)
    mesh = ax.pcolormesh(x, y, z, cmap=HEAT.lower(), vmin=t.zmin, vmax=t.zmax, rasterized=False, linewidth=0)
    if t.texttemplate:
        dark = (z - t.zmin) / ((t.zmax - t.zmin) or 1) < 0.5
        for i in range(down):
            for j in range(across):
                color = "white" if dark[i, j] and not np.isnan(z[i, j]) else "#222222"
                ax.text(
                    (x[j] + x[j + 1]) / 2, (y[i] + y[i + 1]) / 2, plain(str(t.text[i][j])), ha="center", va="center", color=color,
                    fontsize=t.textfont.size * POINT,
                )  # fmt: skip
    if t.showscale is not False:
        layout: Any = fig.layout
        bar, margin = t.colorbar, layout.margin
        wide, tall = layout.width - margin.l - margin.r, layout.height - margin.t - margin.b
        place = made.add_axes((
            (margin.l + bar.x * wide + 8) / layout.width, (margin.b + (bar.y - bar.len) * tall) / layout.height,
            bar.thickness / layout.width, bar.len * tall / layout.height,
        ))  # fmt: skip
        drawn = made.colorbar(mesh, cax=place)
        drawn.outline.set_visible(False)
        place.tick_params(labelsize=bar.tickfont.size * POINT)
        if bar.tickvals is not None:
            drawn.set_ticks(list(bar.tickvals), labels=list(bar.ticktext))
        elif bar.ticksuffix == "%" or bar.tickformat == "~%":
            drawn.ax.yaxis.set_major_formatter(_percent(100.0 if bar.ticksuffix else 1.0))
        drawn.set_label(plain(bar.title.text or ""), fontsize=(bar.title.font.size or 12) * POINT)


def _bar(_: Any, ax: Any, t: Any, fig: go.Figure, place: int) -> None:
    layout: Any = fig.layout
    lying = t.orientation == "h"
    at, values = (_at(fig, t, "y"), t.x) if lying else (_at(fig, t, "x"), t.y)
    groups = (
        list(dict.fromkeys(b.offsetgroup or b.name for b in traces(fig) if b.type == "bar"))
        if layout.barmode == "group"
        else []
    )
    size = 1 - (layout.bargap or 0.2)
    if groups:
        size /= len(groups)
        at = [a + (groups.index(t.offsetgroup or t.name) - (len(groups) - 1) / 2) * size for a in at]
    if t.text is not None:  # marks above other bars
        for a, base, text in zip(at, t.base, t.text, strict=True):
            ax.text(a, base, text, ha="center", va="bottom", fontsize=10)
        return
    error = t.error_x if lying else t.error_y
    bars = [list(error.arrayminus), list(error.array)] if error.array is not None else None
    draw, across = (ax.barh, {"xerr": bars}) if lying else (ax.bar, {"yerr": bars})
    label = None if t.showlegend is False else t.name
    draw(at, values, size, color=t.marker.color, label=label, error_kw={"elinewidth": 0.8, "capsize": 1.5}, **across)


def _scatter(_: Any, ax: Any, t: Any, fig: go.Figure, place: int) -> None:
    x, y = _at(fig, t, "x"), _at(fig, t, "y")
    if t.fill == "toself":
        ax.fill(x, y, color=rgba(t.fillcolor), linewidth=0)
        return
    if t.fill in ("tonexty", "tonextx"):  # between this line and the one before it
        before = traces(fig)[place - 1]
        ax.fill([*before.x, *x[::-1]], [*before.y, *y[::-1]], color=rgba(t.fillcolor), linewidth=0)
        return
    if t.line.width == 0:
        return
    mode, label = t.mode or "lines", None if t.showlegend is False else t.name
    if t.error_y.array is not None or t.error_x.array is not None:
        bars = {
            f"{letter}err": [list(e.arrayminus), list(e.array)]
            for letter, e in (("x", t.error_x), ("y", t.error_y)) if e.array is not None
        }  # fmt: skip
        ax.errorbar(x, y, fmt="none", ecolor="#555555", elinewidth=0.8, zorder=1, **bars)
    if "lines" in mode:
        style = {"color": t.line.color, "linestyle": DASHES[t.line.dash], "linewidth": (t.line.width or 1.5) * POINT}
        shown = (
            {"marker": MARKERS[t.marker.symbol or "circle"], "markersize": (t.marker.size or 6) * POINT}
            if "markers" in mode
            else {}
        )
        ax.plot(x, y, label=label, **style, **shown)
        return
    hollow = str(t.marker.symbol).endswith("-open")
    color = list(t.marker.color) if isinstance(t.marker.color, list | tuple) else t.marker.color
    edge = t.marker.line.color or color
    ax.scatter(
        x, y, s=((t.marker.size or 6) * POINT) ** 2, marker=MARKERS[t.marker.symbol or "circle"], label=label, zorder=3,
        facecolors="none" if hollow else color, edgecolors=edge, linewidths=(t.marker.line.width or 0.5) * POINT,
    )  # fmt: skip


def _axis(ax: Any, letter: str, axis: Any, names: list[str]) -> None:
    its = getattr(ax, f"{letter}axis")
    set_limits = getattr(ax, f"set_{letter}lim")
    getattr(ax, f"set_{letter}label")(plain(axis.title.text or ""), fontsize=axis.title.font.size * POINT)
    if axis.type == "log":
        getattr(ax, f"set_{letter}scale")("log")
        its.set_minor_locator(_part("ticker").NullLocator())
    if axis.ticktext is not None:
        at = [names.index(v) if isinstance(v, str) else v for v in axis.tickvals]
        turn = {"rotation": 90} if axis.tickangle else {}
        its.set_ticks(at, labels=[plain(t) for t in axis.ticktext], **turn)
    elif axis.dtick is not None and axis.range is not None:
        low, high = sorted(axis.range)
        first = -(-low // axis.dtick)
        count = int((high - first * axis.dtick) // axis.dtick) + 1
        its.set_ticks([(first + k) * axis.dtick for k in range(count)])
    if axis.ticktext is None and (axis.tickformat == "~%" or axis.ticksuffix == "%"):
        its.set_major_formatter(_percent(1.0 if axis.tickformat == "~%" else 100.0))
    if axis.range is not None and axis.type != "log":
        set_limits(*axis.range)
    elif axis.autorange == "reversed" or names:
        n = len(names) or 1
        set_limits(*((n - 0.5, -0.5) if axis.autorange == "reversed" else (-0.5, n - 0.5)))
    ax.tick_params(axis=letter, labelsize=axis.tickfont.size * POINT)
    if axis.showticklabels is False:
        ax.tick_params(axis=letter, **{"labelbottom" if letter == "x" else "labelleft": False})


def _percent(whole: float) -> Any:
    return _part("ticker").FuncFormatter(lambda value, _: f"{100 * value / whole:g}%")


def _texts(made: Any, panels: dict[str, Any], fig: go.Figure) -> None:
    """Draw title, small line, panel titles, lines and legend."""
    layout: Any = fig.layout
    edge = 8 / layout.width
    if layout.title.text:
        made.text(
            edge, 1 - 8 / layout.height, plain(layout.title.text), va="top", fontsize=layout.title.font.size * POINT
        )
    for a in layout.annotations:
        size = a.font.size * POINT
        if a.name == "note":
            y = 1 - (layout.margin.t - a.yshift) / layout.height
            made.text(edge, y, plain(a.text), va="bottom", fontsize=size, color=a.font.color)
            continue
        ax = panels[str(a.xref or "x").removesuffix(" domain")[1:]]
        frame = {("x domain", "y domain"): ax.transAxes}
        place = frame.get((_kind(a.xref), _kind(a.yref))) or (
            ax.get_xaxis_transform() if _kind(a.yref) == "y domain"
            else ax.get_yaxis_transform() if _kind(a.xref) == "x domain" else ax.transData
        )  # fmt: skip
        number = str(a.xref or "x").removesuffix(" domain")[1:]
        names = {letter: _names(fig, letter, number) for letter in "xy"}
        x, y = (names[letter].index(v) if isinstance(v, str) else v for letter, v in (("x", a.x), ("y", a.y)))
        anchor = {"left": "left", "right": "right"}.get(a.xanchor, "center")
        color = a.font.color or "#222222"
        ax.text(
            x, y, plain(a.text), transform=place, fontsize=size, color=color, ha=anchor,
            va="bottom" if a.yanchor == "bottom" else "center",
        )  # fmt: skip
    for s in layout.shapes:
        ax = panels[str(s.xref or "x").removesuffix(" domain")[1:]]
        style = {
            "color": s.line.color,
            "linestyle": DASHES[s.line.dash],
            "linewidth": (s.line.width or 1) * POINT,
            "zorder": 0,
        }
        if s.type == "line" and s.y0 == s.y1:
            ax.axhline(s.y0, **style)
        elif s.type == "line":
            ax.axvline(s.x0, **style)
        else:
            ax.axhspan(s.y0, s.y1, color="#777777", alpha=0.16, linewidth=0)
    if layout.showlegend:
        found: dict[str, Any] = {}
        for ax in panels.values():
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
        cols = max(1, int((layout.width - 16) // (layout.legend.entrywidth + 40)))
        made.legend(
            list(found.values()), list(found), loc="lower left", bbox_to_anchor=(edge, 4 / layout.height), ncols=cols,
            frameon=False, fontsize=layout.legend.font.size * POINT, borderaxespad=0, borderpad=0, handlelength=1.5,
        )  # fmt: skip


def _kind(ref: str | None) -> str:
    ref = ref or ""
    return ref[:1] + (" domain" if ref.endswith(" domain") else "")
