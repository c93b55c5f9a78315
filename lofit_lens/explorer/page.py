"""The explorer saved with its data: a piece of HTML for a notebook, or a whole page that asks no server for anything.

A picture of the two sets stands in it as HTML tables; where scripts may run, the front-end (`SCRIPTS`, put one behind the other)
takes its place. A page's own content policy forbids every request, so that a mistake here cannot become one.
"""

import html
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from plotly.colors import get_colorscale

from lofit_lens.analysis.chance import (
    at_least,
    chance_range,
    shared_by_chance,
    shared_by_chance_in_layers,
    shared_by_depth,
)
from lofit_lens.errors import InputError
from lofit_lens.explorer.readings import stored_title
from lofit_lens.explorer.source import Entry, Source
from lofit_lens.explorer.state import State
from lofit_lens.heads import Grid, HeadSet
from lofit_lens.html import grid_html
from lofit_lens.plots.style import COLORS, HEAT

SCRIPTS = ("dom.js", "grid.js", "panel.js", "plots.js", "explorer.js")
SHARED, OWN = "\u25c6", "\u25cb"  # a filled diamond, an open circle
MAX_BYTES = 10_000_000
# Most convolutions (layers x pairs of sets x K) for the chance that a page holds; with more to do, K moves in steps.
IN_PAGE, IN_NOTEBOOK = 600_000, 60_000
DRAWN = 200  # K at which the band of chance is drawn where nothing else needs more
SCORE_DIGITS = 6
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def asset(name: str) -> str:
    """Read a file of this package."""
    return (importlib.resources.files("lofit_lens.explorer") / name).read_text(encoding="utf-8")


def script() -> str:
    """Return the front-end, which defines `render` (for a widget) and `open` (for a saved page)."""
    return "\n".join(map(asset, SCRIPTS))


# ---------------------------------------------------------------------------------------------------------- data


def view_data(
    source: Source, edited: Mapping[str, Sequence[str] | None] | None = None, *, work: int = 0
) -> dict[str, Any]:
    """Return what the front-end is given once: shape, sets, stored readings, and chance.

    Args:
        source: what can be shown.
        edited: adapter's name -> the heads that it edits; None: it edits no single heads.
        work: for a page without Python: convolutions to spend on chance for all pairs of sets (`IN_PAGE`, `IN_NOTEBOOK`).

    Returns:
        `shape`, `heat` and `colors` (of the left, the right and both sets), `edited` (that given, and what `readings` say),
        `sets` (`name`, `task`, `kind`, `ranking` and `scores` by layer-major number), `readings` (head -> list), `attention`, and
        `chance`: `ks`, by K `expected`, `low`, `high` (shared heads by chance, mean and 95 %) and, with `work`, `pairs`: "i,j"
        (places of sets) -> by K, p over all heads and p within layers, in thousandths.
    """
    entries, (n_layers, n_heads), total = list(source.entries.values()), source.shape, source.shape.n_total
    pairs = [(i, j) for j in range(len(entries)) for i in range(j)] if work else []
    room = work // (len(pairs) * n_layers) if pairs else DRAWN
    ks = _steps(max(len(e.ranking) for e in entries), [e.k for e in entries], room)
    bands = [chance_range(shared_by_chance(k, k, total)) for k in ks]
    chance: dict[str, Any] = {
        "ks": ks, "expected": [round(k * k / total, 2) for k in ks],
        "low": [low for low, _ in bands], "high": [high for _, high in bands],
    }  # fmt: skip
    if work:
        chance["pairs"] = {f"{i},{j}": _chances(entries[i], entries[j], ks, source.shape) for i, j in pairs}
    known: dict[str, Any] = {}
    for head, found in source.readings.items():
        for r in found:
            known.setdefault(r["title"], []).append(head)
    return {
        "shape": [n_layers, n_heads], "heat": [color for _, color in get_colorscale(HEAT)], "colors": list(COLORS[:3]),
        "edited": {**known, **{name: heads for name, heads in (edited or {}).items() if stored_title(name) not in known}},
        "sets": [_set(e, n_heads) for e in entries], "readings": source.readings, "attention": source.attention, "chance": chance,
    }  # fmt: skip


def thousandths(p: float) -> int:
    """Return a probability in thousandths, as the view shows it; 0 means below 0.0005."""
    return 0 if p < 0.0005 else max(1, round(1000 * p))


def _set(entry: Entry, n_heads: int) -> dict[str, Any]:
    scores = None if entry.scores is None else entry.scores.values.flatten().tolist()
    return {
        "name": entry.name, "task": entry.task, "kind": entry.kind,
        "ranking": [h.layer * n_heads + h.head for h in entry.ranking],
        "scores": scores and [None if math.isnan(x) else float(f"{x:.{SCORE_DIGITS}g}") for x in scores],
    }  # fmt: skip


def _steps(most: int, usual: Sequence[int], room: int) -> list[int]:
    """Return every K from 1 to `most`, or about `room` of them: denser for small K, with the usual ones."""
    if room >= most:
        return list(range(1, most + 1))
    spaced = np.geomspace(1, most, max(2, room)).round().astype(int).tolist()
    return sorted({*spaced, *usual})


def _chances(a: Entry, b: Entry, ks: Sequence[int], shape: Grid) -> list[list[int]]:
    """Compute, per K that both rankings reach, p over all heads and p within layers, in thousandths."""
    n_layers, n_heads = shape
    shared = shared_by_depth(a.ranking.heads, b.ranking.heads)
    layers = [np.array([h.layer for h in e.ranking]) for e in (a, b)]
    anywhere, in_layers = [], []
    for k in (k for k in ks if k <= min(len(a.ranking), len(b.ranking))):
        counts_a, counts_b = (np.bincount(listed[:k], minlength=n_layers) for listed in layers)
        x = int(shared[k - 1])
        anywhere.append(thousandths(at_least(shared_by_chance(k, k, shape.n_total), x)))
        in_layers.append(thousandths(at_least(shared_by_chance_in_layers(counts_a, counts_b, n_heads), x)))
    return [anywhere, in_layers]


# ---------------------------------------------------------------------------------------------------------- HTML


def fragment(values: dict[str, Any], state: State) -> str:
    """Return the explorer as HTML for a notebook: the picture, and the script that replaces it. ASCII only.

    Args:
        values: `data`, `state` and `said`, as the widget has them.
        state: what the picture shows.
    """
    run = f"(() => {{\n{script()}\nopen(document.currentScript.parentElement);\n}})();"
    return _ascii(
        f'<div>{picture(state)}<script type="application/json">{script_json(values)}</script>'
        f"<style>{asset('explorer.css')}</style><script>{run}</script></div>"
    )


def document(title: str, *parts: str) -> str:
    """Join these pieces of HTML into a whole page.

    Raises:
        InputError: it would be 10 MB or more.
    """
    page = _ascii(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{asset('page.css')}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )
    if len(page) >= MAX_BYTES:
        raise InputError(
            f"the page would be {len(page) / 1e6:.1f} MB; it must stay under {MAX_BYTES / 1e6:.0f} MB, so give fewer head "
            "sets, or fewer tasks"
        )
    return page


def script_json(value: Any) -> str:
    """Write JSON that may stand inside a script element: no `<`, `>` or `&`, and ASCII only."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def picture(state: State) -> str:
    """Draw both grids with the top K and shared heads marked, and the overlap, without script and style sheet."""
    cell = "vertical-align:top;text-align:left;padding:0 24px 8px 0"
    shared = HeadSet([], shape=state.source.shape) if state.is_single else state.shared
    key = f"{OWN} in the top K" if state.is_single else f"{SHARED} in the top K of both sets, {OWN} of this one only"
    grids = ""
    for entry, top in list(zip(state.shown, state.tops, strict=True))[: 1 if state.is_single else 2]:
        hover: dict[tuple[int, int], str] = {head: f"{head}, rank {entry.ranks[head]}" for head in top}
        level: dict[tuple[int, int], float] = {**entry.shades}
        mark: dict[tuple[int, int], str] = {head: SHARED if head in shared else OWN for head in top}
        kind = "" if entry.kind in entry.name else f"{entry.kind}, "
        grid = grid_html(state.source.shape, level, hover, f"{entry.name}: {kind}top {len(top)}", mark=mark)
        grids += f'<td style="{cell}">{grid}</td>'
    both = "" if state.is_single else f" Shared heads: {shared or 'none'}."
    marked = f" Marked by the reader: {state.selection}." if len(state.selection) else ""
    return (
        '<div style="background:#fff;color:#222;padding:8px;overflow-x:auto;font:13px Helvetica,Arial,sans-serif">'
        f"<p>{html.escape(state.summary())}.</p><table><tr>{grids}</tr></table>"
        f"<p>{key}. Lighter: larger score, or better rank.{both}{marked}</p>"
        "<p><small>This is a still picture, because scripts do not run here.</small></p></div>"
    )


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")
