"""Figures at the true size of a paper's column; one function serves all of them.

Sizes are points of 1/72 inch, as in PDF and SVG. The widths are those of the official LaTeX styles: NeurIPS has one column of
5.5 in, ICML columns of 3.25 in on a text of 6.75 in, ACL columns of 7.7 cm on a text of 16 cm.
"""

import math
import re
from typing import Any

import plotly.graph_objects as go

from lofit_lens.checks import check_is, check_one_of
from lofit_lens.errors import InputError
from lofit_lens.plots.layout import Sizes, lay_out, plan_of

PIXELS = 96 / 72  # a point
LEAST = 6.0  # points of the smallest font
FONT_SIZE = 8.0  # points of an axis title
# The first width is the usual one. NeurIPS has no narrow column: half of its text is two figures side by side.
PAPERS = {
    "neurips": {"text": 396.0, "column": 192.0},
    "icml": {"column": 234.0, "text": 486.0},
    "acl": {"column": 7.7 / 2.54 * 72, "text": 16 / 2.54 * 72},
}
# Keys of a figure whose numbers are pixels (or, below "font", a font's).
IN_PIXELS = {
    "size", "width", "height", "thickness", "xgap", "ygap", "xshift", "yshift", "standoff", "ticklen", "tickwidth", "xpad",
    "ypad", "entrywidth", "itemwidth", "linewidth", "gridwidth", "zerolinewidth", "tracegroupgap", "l", "r", "t", "b",
}  # fmt: skip
TURNED = str.maketrans("\u25bc\u25c0", "\u25c0\u25bc")  # the mark of a mean layer points at its axis
MIRRORED = {"bottom": "left", "top": "right", "middle": "center", "left": "bottom", "right": "top", "center": "middle"}


def for_paper(
    fig: go.Figure, paper: str | None = None, *, width: float | str | None = None, font_size: float | None = None,
    title: bool = True, note: bool = True, transpose: bool = False,
) -> go.Figure:  # fmt: skip
    """Return a figure at the true size that it has in a paper: panels, labels, legend and fonts are laid out for its width.

    No text is smaller than 6 points. Ticks that would overlap are left out, labels are wrapped or rotated, panels that get too
    narrow are stacked, and where numbers do not fit into the cells of a heat map, only their marks stay.

    Args:
        fig: of any plot of this library; it stays as it is.
        paper: `"neurips"`, `"icml"` or `"acl"`; None = the width that is given, or the figure's own.
        width: `"column"` or `"text"` of the paper, or points. None = the paper's usual width: the column, for NeurIPS the text.
        font_size: of axis titles, in points; ticks and the small line are a little smaller, the title a little larger.
        title: keep the title; in papers the caption says it.
        note: keep the small line.
        transpose: swap x and y, so that layers run from left to right; panels that were side by side are then stacked.

    Raises:
        InputError: an unknown paper or width, a width or font size that leaves no room, or a figure that this
            library did not make.

    Examples:
        >>> from lofit_lens import HeadScores
        >>> from lofit_lens.plots import head_grid
        >>> figure = for_paper(head_grid(HeadScores([[0.1, 0.9], [0.7, 0.2]])), "icml", title=False)
        >>> figure.layout.width * 72 / 96
        234.0
    """
    check_is(fig, go.Figure, "fig", "a figure of plotly, e.g. plots.head_grid(scores)")
    points = check_paper(paper, width, font_size)
    plan = plan_of(fig)
    if plan is None:
        raise InputError(
            "this figure was not made by lofit_lens.plots; set the width and fonts of your own figures with plotly"
        )
    spec = _scaled(fig.to_plotly_json(), 1 / plan["scale"])
    if transpose:
        spec = _transposed(spec)
    if not note:
        spec["layout"]["annotations"] = [a for a in spec["layout"].get("annotations", []) if a.get("name") != "note"]
    if not title:
        spec["layout"]["title"]["text"] = ""
    on_paper = points is not None or font_size is not None
    scale = (font_size or FONT_SIZE) * PIXELS / Sizes().axis if on_paper else 1.0
    made = go.Figure(spec)
    lay_out(made, points * PIXELS / scale if points else None, least=LEAST * PIXELS / scale if on_paper else 0)
    spec = _scaled(made.to_plotly_json(), scale)
    spec["layout"]["meta"]["lofit_lens"]["scale"] = scale
    if points:
        spec["layout"]["width"] = points * PIXELS
    spec["layout"]["height"] = math.ceil(spec["layout"]["height"])
    return go.Figure(spec)


def check_paper(paper: str | None, width: float | str | None = None, font_size: float | None = None) -> float | None:
    """Return the width in points (None = the figure's own); raise InputError for an unknown paper, width or font."""
    if font_size is not None and not (isinstance(font_size, int | float) and LEAST <= font_size <= 24):
        raise InputError(f"font_size is {font_size!r}; give points from {LEAST:g} to 24")
    if paper is not None:
        check_one_of("paper", paper, PAPERS)
    if isinstance(width, str):
        if paper is None:
            raise InputError(f"width is {width!r}, which only a paper has; give paper= ({', '.join(PAPERS)}) or points")
        check_one_of("width", width, PAPERS[paper])
        return PAPERS[paper][width]
    if width is None:
        return next(iter(PAPERS[paper].values())) if paper is not None else None
    if isinstance(width, bool) or not isinstance(width, int | float) or not 120 <= width <= 2000:
        raise InputError(
            f"width is {width!r}; give points from 120 to 2000 (72 an inch), or 'column' or 'text' of a paper"
        )
    return float(width)


def _scaled(spec: dict[str, Any], scale: float) -> dict[str, Any]:
    """Multiply every size in pixels by `scale`; data, domains and ranges stay."""

    def walk(part: Any, inside: str) -> Any:
        if isinstance(part, dict):
            return {k: _times(v, scale) if k in IN_PIXELS else walk(v, k) for k, v in part.items()}
        if isinstance(part, list) and inside in ("data", "annotations", "shapes"):
            return [walk(p, "one") for p in part]
        return part

    kept = {k: spec["layout"][k] for k in ("meta", "template")}
    return {"data": walk(spec["data"], "data"), "layout": walk(spec["layout"], "") | kept}


def _times(value: Any, scale: float) -> Any:
    if isinstance(value, list | tuple):
        return [_times(v, scale) for v in value]
    return value if value is None else round(float(value) * scale, 4)


# ------------------------------------------------------------------------------------------------- mirrored


def _transposed(spec: dict[str, Any]) -> dict[str, Any]:
    """Swap x and y in traces, axes, lines and texts."""
    layout = {_other(k): v for k, v in spec["layout"].items()}
    for name in (k for k in layout if re.fullmatch(r"[xy]axis\d*", k)):
        layout[name] = _mirrored_axis(name, layout[name])
    texts = [{**a, "text": a["text"].translate(TURNED)} for a in layout.get("annotations", [])]
    layout["annotations"] = [a if a.get("name") in ("note", "panel") else _mirrored_text(a) for a in texts]
    layout["shapes"] = [{_other(k): _refs(v) for k, v in s.items()} for s in layout.get("shapes", [])]
    plan = dict(layout["meta"]["lofit_lens"])
    n = sum(k.startswith("xaxis") for k in layout)
    plan.update(
        panel=plan["panel"][::-1], cells=plan["cells"][::-1] if plan["cells"] else None, cols=math.ceil(n / plan["cols"]),
        share=_letters(plan["share"]), whole=_letters(plan["whole"]), weights=[],
        titles={_other(k): v for k, v in plan["titles"].items()},
    )  # fmt: skip
    if plan["cells"]:
        plan["narrow"] = 0.5 * plan["narrow"] * max(1.0, plan["cells"][0] / plan["cells"][1])
    layout["meta"] = {**layout["meta"], "lofit_lens": plan}
    return {"data": [_mirrored_trace(t) for t in spec["data"]], "layout": layout}


def _letters(text: str) -> str:
    return text.translate(str.maketrans("xy", "yx"))


def _other(key: str) -> str:
    """Return `x0`, `yaxis2` and the like with the other letter; other keys stay."""
    found = re.fullmatch(r"(error_)?([xy])(|0|1|ref|shift|anchor|gap|axis\d*)", key)
    return (found[1] or "") + _letters(found[2]) + found[3] if found else key


def _refs(value: Any) -> Any:
    """Return a reference to an axis (`x2`, `y domain`) with the other letter."""
    return (
        _letters(value[0]) + value[1:]
        if isinstance(value, str) and re.fullmatch(r"[xy]\d*( domain)?", value)
        else value
    )


def _mirrored_trace(trace: dict[str, Any]) -> dict[str, Any]:
    swapped = {_other(k): _refs(v) if k in ("xaxis", "yaxis") else v for k, v in trace.items()}
    swapped.setdefault("xaxis", "x")
    if trace["type"] == "bar":
        swapped["orientation"] = "v" if trace.get("orientation") == "h" else "h"
    if trace["type"] == "heatmap":
        for key in ("z", "text", "customdata"):
            if trace.get(key) is not None:
                swapped[key] = [list(row) for row in zip(*trace[key], strict=True)]
    if isinstance(swapped.get("fill"), str):
        swapped["fill"] = swapped["fill"].replace("nexty", "nextx").replace("zeroy", "zerox")
    if isinstance(swapped.get("hovertemplate"), str):
        swapped["hovertemplate"] = re.sub(r"%\{([xy])", lambda m: "%{" + _letters(m[1]), swapped["hovertemplate"])
    return swapped


def _mirrored_axis(name: str, axis: dict[str, Any]) -> dict[str, Any]:
    axis = {k: _refs(v) for k, v in axis.items() if k not in ("tickangle", "domain", "side")}
    # Names read from the top down and from left to right, whichever axis they are on; numbers grow upwards and to the right.
    ends = list(axis["range"]) if "range" in axis else []
    down = axis.get("autorange") == "reversed" or (ends and ends[0] > ends[1])
    named = "ticktext" in axis and not all(str(t)[:1].isdigit() for t in axis["ticktext"])
    if bool(down) != (named and name.startswith("y")):
        if ends:
            axis["range"] = ends[::-1]
        else:
            axis["autorange"] = True if down else "reversed"
    return axis


def _mirrored_text(a: dict[str, Any]) -> dict[str, Any]:
    return {_other(k): MIRRORED.get(v, v) if k in ("xanchor", "yanchor") else _refs(v) for k, v in a.items()}
