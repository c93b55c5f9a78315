"""Small HTML for Jupyter: no script, no network."""

import html
from collections.abc import Mapping, Sequence


def first_of(names: Sequence[object], most: int = 12) -> str:
    """The first names in one line, with dots if there are more."""
    return " ".join(map(str, names[:most])) + (" ..." if len(names) > most else "")


def grid_html(
    shape: tuple[int, int],
    level: Mapping[tuple[int, int], float],
    hover: Mapping[tuple[int, int], str],
    caption: str,
    listed: str = "",
    mark: Mapping[tuple[int, int], str] | None = None,
) -> str:
    """A layer x head grid as one small HTML table, last layer on top, and a line below; needs no script and no network.

    Args:
        shape: `(n_layers, n_heads)`.
        level: head -> 0 (no colour) to 1.
        hover: head -> what a pointer shows; others show their name.
        caption: above it.
        listed: below it.
        mark: head -> a character in its cell.
    """
    n_layers, n_heads = shape
    cell = "width:14px;height:14px;border:1px solid rgba(128,128,128,.25);padding:0"
    rows = []
    for layer in reversed(range(n_layers)):
        cells = "".join(
            f'<td title="{html.escape(hover.get(h, f"L{h[0]}H{h[1]}"))}" '
            f'style="{cell};background:rgba(0,114,178,{level.get(h, 0.0):.3f})">{(mark or {}).get(h, "")}</td>'
            for h in ((layer, i) for i in range(n_heads))
        )
        rows.append(f'<tr><th style="font-weight:normal;text-align:right;padding:0 4px">{layer}</th>{cells}</tr>')
    axis = f'<tr><th></th><td colspan="{n_heads}" style="text-align:center">head 0 to {n_heads - 1}</td></tr>'
    return (
        '<table style="border-collapse:collapse;font-size:11px;line-height:1">'
        f'<caption style="text-align:left;white-space:nowrap">{html.escape(caption)} (rows: layer)</caption>'
        f"{''.join(rows)}{axis}</table>"
        + (f'<div style="font-size:12px">{html.escape(listed)}</div>' if listed else "")
    )
