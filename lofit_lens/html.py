"""What objects show of themselves: lines of text, and small HTML for Jupyter without script and network."""

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

HEAT = "Cividis"  # that of figures (plots/style.py): light is much
WIDTH = 100  # columns
ROOM, LARGE, SMALL = 250, 14, 5  # pixels: height of a grid where cells of these sizes allow it
NO_LEVEL = "#8884"


def first_of(names: Sequence[object], most: int = 12) -> str:
    """The first names in one line, with dots if there are more."""
    return " ".join(map(str, names[:most])) + (" ..." if len(names) > most else "")


def wrapped(text: str, indent: str = "    ") -> str:
    """A text for `print` in lines of at most 100 columns; words stay whole, further lines begin with `indent`."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def grid_html(
    shape: tuple[int, int],
    level: Mapping[tuple[int, int], float],
    hover: Mapping[tuple[int, int], str],
    caption: str,
    listed: str = "",
    mark: Mapping[tuple[int, int], str] | None = None,
) -> str:
    """A layer x head grid as one small HTML table and a line below; needs no script and no network.

    The longer axis lies across; the last layer, or the last head, is on top. Each row says its own background, since Jupyter
    gives rows of tables one by turns, and another below the pointer.

    Args:
        shape: `(n_layers, n_heads)`.
        level: head -> 0 (dark) to 1 (light); others are gray.
        hover: head -> what a pointer shows; others show their name.
        caption: above it.
        listed: below it.
        mark: head -> a character in its cell.
    """
    from plotly.colors import sample_colorscale

    mark, (n_layers, n_heads) = mark or {}, shape
    across = n_layers > n_heads
    (down, n_down), (along, n_along) = (("head", n_heads), ("layer", n_layers))[:: 1 if across else -1]
    side = max(SMALL, min(LARGE, ROOM // n_down - 1))
    box = f"width:{side}px;height:{side}px;padding:0;border:1px solid #8884"
    colors: dict[Any, Any] = dict(
        zip(level, sample_colorscale(HEAT, [min(1.0, max(0.0, x)) for x in level.values()]), strict=True)
    )
    step = next(n for n in (1, 2, 4, 8, 10, 20, 50) if n * side >= 12)
    rows = []
    for y in reversed(range(n_down)):
        heads = [(x, y) if across else (y, x) for x in range(n_along)]
        cells = "".join(
            f'<td title="{html.escape(hover.get(h, f"L{h[0]}H{h[1]}"))}" '
            f'style="{box};background:{colors.get(h, NO_LEVEL).replace(" ", "")}{_ink(level.get(h)) if h in mark else ""}">'
            f"{mark.get(h, '')}</td>"
            for h in heads
        )
        name = "" if y % step else y
        rows.append(
            f'<tr style="background:none;line-height:0"><th style="font-weight:normal;text-align:right;padding:0 4px">{name}</th>'
            f"{cells}</tr>"
        )
    axis = (
        f'<tr style="background:none"><th></th><td colspan="{n_along}" style="text-align:center;padding:0">{along} 0 to '
        f"{n_along - 1}</td></tr>"
    )
    return (
        '<table style="border-collapse:collapse;border:0;table-layout:auto;font-size:11px;line-height:1">'
        f'<caption style="text-align:left;white-space:nowrap">{html.escape(caption)} (rows: {down})</caption>'
        f"{''.join(rows)}{axis}</table>"
        + (f'<div style="font-size:12px">{html.escape(listed)}</div>' if listed else "")
    )


def _ink(level: float | None) -> str:
    """A mark in the middle of a cell: dark on light, light on dark."""
    return f";text-align:center;color:{'inherit' if level is None else '#000' if level > 0.5 else '#fff'}"
