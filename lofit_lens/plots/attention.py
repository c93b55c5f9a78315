"""Attention patterns: CircuitsVis' interactive view as a page that works offline, and a heat map for papers.

CircuitsVis' Python front end looks for a connection and loads its script from a server. Here only the script is used: it is read
from the installed package and written into the page.
"""

import functools
import html
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from lofit_lens.analysis.attention import AttentionPatterns
from lofit_lens.checks import check_is
from lofit_lens.errors import InputError
from lofit_lens.heads import Head, Heads, HeadSet
from lofit_lens.models import visible
from lofit_lens.plots.layout import finish
from lofit_lens.plots.style import HEAT

MOST_TOKENS = 60  # in a figure; more cannot be read
# Nothing may be fetched from anywhere: the browser itself refuses.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)


@functools.cache
def attention_script() -> str:
    """Return CircuitsVis' script (1.3 MB), to be put once into a page, before its `attention_block`s.

    Raises:
        InputError: CircuitsVis is not installed, or its script is not where it should be.
    """
    spec = importlib.util.find_spec("circuitsvis")
    places = [Path(p) / "dist" / "cdn" / "iife.js" for p in (spec.submodule_search_locations or [])] if spec else []
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise InputError("attention pages need CircuitsVis and its script: pip install 'circuitsvis>=1.43'")
    text = found.read_text(encoding="utf-8")
    text = text.rsplit("//# sourceMappingURL", 1)[0]  # names a file that the page does not have
    return "<script>" + text.replace("</script", "<\\/script") + "</script>"


def attention_block(
    patterns: AttentionPatterns, prompt: int = 0, heads: Heads | None = None, *, name: str = "attention"
) -> str:  # fmt: skip
    """Return the view of one prompt as HTML, for a page that holds `attention_script`.

    Args:
        patterns: what `attention_patterns` gave.
        prompt: number of the prompt.
        heads: the heads to show; None = all.
        name: id of the element; each block of a page needs another.

    Raises:
        InputError: an unknown prompt or head, or no head.
    """
    check_is(patterns, AttentionPatterns, "patterns", "what analysis.attention_patterns gives")
    chosen = _chosen(patterns, heads)
    patterns.check_prompt(prompt)
    props = {
        "tokens": [visible(t) for t in patterns.tokens[prompt]],
        "attention": [[[round(x, 4) for x in row] for row in patterns.of(h, prompt).tolist()] for h in chosen],
        "attentionHeadNames": [str(h) for h in chosen], "minValue": 0.0, "maxValue": 1.0,
    }  # fmt: skip
    # Inside a script nothing is HTML but the end of the script, which no token may spell.
    return (
        f'<div id="{html.escape(name)}"></div>'
        f"<script>CircuitsVis.render({_js(name)}, CircuitsVis.AttentionHeads, {_js(props)})</script>"
    )


def attention_html(
    patterns: AttentionPatterns, prompt: int = 0, heads: Heads | None = None, *, title: str = ""
) -> str:  # fmt: skip
    """Return a self-contained page of the heads' attention in one prompt; it fetches nothing.

    Args:
        patterns: what `attention_patterns` gave.
        prompt: number of the prompt.
        heads: the heads to show; None = all.
        title: of the page; empty = the model and the prompt.

    Raises:
        InputError: an unknown prompt or head, no head, or CircuitsVis is not installed.
    """
    block = attention_block(patterns, prompt, heads)
    shown = title or f"Attention in {patterns.model}: {patterns.prompts[prompt]}"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(shown)}</title></head>"
        '<body style="font-family: Helvetica, Arial, sans-serif; color: #222222; margin: 24px">'
        f'<h1 style="font-size: 18px">{html.escape(shown)}</h1>'
        "<p>Row: query token. Column: key token (attended to). Darker: more attention (0 to 1). "
        "Point at a head to enlarge it, click to keep it.</p>"
        f"{attention_script()}{block}</body></html>"
    )


def attention_figure(
    patterns: AttentionPatterns, head: Head | str | Sequence[int], prompt: int = 0, *, title: str = ""
) -> go.Figure:  # fmt: skip
    """Draw one head's pattern on one prompt as a heat map from 0 to 100 %.

    Args:
        patterns: what `attention_patterns` gave.
        head: the head.
        prompt: number of the prompt.
        title: of the figure; empty = the head and the model.

    Raises:
        InputError: an unknown prompt or head, or more tokens than can be read.
    """
    check_is(patterns, AttentionPatterns, "patterns", "what analysis.attention_patterns gives")
    pattern, tokens = patterns.of(head, prompt), [visible(t) for t in patterns.tokens[prompt]]
    n = len(tokens)
    if n > MOST_TOKENS:
        raise InputError(
            f"prompt {prompt} has {n} tokens, of which {MOST_TOKENS} can be read in a figure; use attention_html"
        )
    # A token cannot attend to later ones: left white.
    z = [[pattern[i, j].item() if j <= i else None for j in range(n)] for i in range(n)]
    fig = go.Figure(
        go.Heatmap(
            z=z, zmin=0, zmax=1, colorscale=HEAT, hoverongaps=False, name=str(Head.parse(head)),
            colorbar={"title": {"text": "attention"}, "tickformat": "~%"},
            customdata=[[[tokens[i], tokens[j]] for j in range(n)] for i in range(n)],
            hovertemplate="%{customdata[0]} attends to %{customdata[1]}: %{z:.3f}<extra></extra>",
        )
    )  # fmt: skip
    texts = [html.escape(t) for t in tokens]
    names = {"tickmode": "array", "tickvals": list(range(n)), "ticktext": texts, "showgrid": False, "zeroline": False}
    fig.update_xaxes(**names, title_text="key token (attended to)", range=[-0.5, n - 0.5])
    fig.update_yaxes(**names, title_text="query token", range=[n - 0.5, -0.5])
    side = max(220, 22 * n)
    note = f"prompt of {n} tokens; each row sums to 100%"
    finish(
        fig,
        title or f"Attention of {Head.parse(head)} in {patterns.model}",
        note,
        panel=(side, side),
        cells=(n, n),
    )
    return fig


def _chosen(patterns: AttentionPatterns, heads: Heads | None) -> tuple[Head, ...]:
    chosen = patterns.heads if heads is None else HeadSet.of(heads)
    if not chosen:
        raise InputError(f"no head to show; give some of {patterns.heads}")
    return chosen.heads


def _js(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
