"""The explorer where no widget can be (nbviewer, GitHub, nbconvert): HTML without scripts, marks as characters."""

import html

from lofit_lens.explorer import panel
from lofit_lens.explorer.source import Entry
from lofit_lens.explorer.state import State
from lofit_lens.heads import Head, HeadSet

SHARED, OWN = "\u25c6", "\u25cb"  # a filled diamond, an open circle


def page(state: State) -> str:
    """Both grids with the top K and shared heads marked, the overlap, the sets, and the marked heads; ASCII only."""
    rows = "".join(
        f'<tr><th style="text-align:left;font-weight:normal" title="{_esc(why)}">{_esc(label)}</th>'
        f'<td style="text-align:left"><b>{_esc(value)}</b></td></tr>'
        for label, value, why in panel.overlap_items(state.overlap.to_dict())
    )
    shared = state.shared
    cell = "vertical-align:top;text-align:left;padding:0 24px 8px 0"
    grids = "".join(
        f'<td style="{cell}">{_grid(entry, top, shared, state.source.shape)}</td>'
        for entry, top in zip(state.shown, state.tops, strict=True)
    )
    said = [f"Shared heads: {shared or 'none'}."]
    if len(state.selection):
        said.append(f"Marked by the reader: {state.selection}.")
    text = (
        '<div style="background:#fff;color:#222;padding:8px;overflow-x:auto;font:13px Helvetica,Arial,sans-serif">'
        f"<p>{_esc(panel.summary(state))}.</p>"
        f'<table style="border-collapse:collapse"><tr>{grids}</tr></table>'
        f"<p>{SHARED} in the top K of both sets, {OWN} of this one alone. Darker blue: larger score, or earlier place. "
        f"{_esc(' '.join(said))}</p>"
        f'<table style="font-size:13px">{rows}</table>'
        "<p><small>This is a still picture. In a running notebook, ll.explore(...) shows it live: other sets, K, single heads."
        "</small></p></div>"
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _grid(entry: Entry, top: HeadSet, shared: HeadSet, shape: tuple[int, int]) -> str:
    n_layers, n_heads = shape
    chosen, both = set(top), set(shared)
    rows = []
    for layer in reversed(range(n_layers)):
        cells = []
        for head in (Head(layer, i) for i in range(n_heads)):
            mark = SHARED if head in both else OWN if head in chosen else ""
            title = f' title="{head}, rank {entry.ranks[head]}"' if mark else ""
            cells.append(
                f'<td width="15" height="15" style="padding:0" bgcolor="{_blue(entry.shades.get(head, 0.0))}"{title}>{mark}</td>'
            )
        rows.append(f'<tr><th style="padding:0 4px;font-weight:normal">{layer}</th>{"".join(cells)}</tr>')
    name = f"{entry.name}: {entry.kind}, top {len(top)}"
    axis = f'<tr><th></th><td colspan="{n_heads}">head 0 to {n_heads - 1} (rows: layer)</td></tr>'
    style = "border-collapse:collapse;font-size:11px;line-height:14px;text-align:center"
    return f'<table style="{style}"><caption>{_esc(name)}</caption>{"".join(rows)}{axis}</table>'


def _blue(level: float) -> str:
    """From nearly white to a blue on which a black mark can still be read."""
    pale, deep = (245, 247, 250), (86, 160, 211)
    return "#" + "".join(f"{round(p + (d - p) * level):02x}" for p, d in zip(pale, deep, strict=True))


def _esc(text: object) -> str:
    return html.escape(str(text))
