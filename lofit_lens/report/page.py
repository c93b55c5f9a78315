"""The page itself: template, style, scripts and data put into one file that asks no server for anything.

Parts, each a file of this package: `page.html` (the frame), `page.css`, and the scripts in `SCRIPTS`, put one behind the other.
From elsewhere: plotly.js (once, from the plotly package) and, if there are attention patterns, circuitsvis' bundle. The page's
own content policy forbids every request, so that a mistake here cannot become one.
"""

import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.offline
from plotly.colors import get_colorscale

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.plots.attention import attention_script
from lofit_lens.plots.style import COLORS, FONT, HEAT
from lofit_lens.report.data import checked

SCRIPTS = ("chance.js", "dom.js", "grid.js", "figures.js", "panel.js", "page.js")
MAX_BYTES = 10_000_000


def render(data: Mapping[str, Any]) -> str:
    """The report as one HTML page; the same data gives the same text.

    Args:
        data: what to show; `lofit_lens.report.data.checked` lists the keys.

    Raises:
        InputError: data that cannot be shown (see `checked`), or a page of 10 MB or more.
    """
    content = checked(data)
    theme = {"colors": COLORS, "heat": get_colorscale(HEAT), "font": FONT}
    parts = {
        "title": html.escape(content["title"]),
        "style": _asset("page.css"),
        "data": script_json({**content, "theme": theme}),
        "plotly": script_text(plotly.offline.get_plotlyjs()),
        "circuitsvis": _circuitsvis() if any(content["attention"].values()) else "",
        "scripts": script_text("\n".join(map(_asset, SCRIPTS))),
    }
    # One pass: what was put in is never searched for marks again.
    page = re.sub(r"<!--@(\w+)-->|/\*@(\w+)\*/", lambda m: parts[m[1] or m[2]], _asset("page.html"))
    size = len(page.encode())
    if size >= MAX_BYTES:
        raise InputError(
            f"the report would be {size / 1e6:.1f} MB ({len(parts['data']) / 1e6:.1f} MB of it data); it must stay under "
            f"{MAX_BYTES / 1e6:.0f} MB, so give fewer head sets, or fewer or shorter prompts in 'attention'"
        )
    return page


def write_report(data: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report, whole or not at all, and return its path.

    Raises:
        InputError: see `render`; the file cannot be written.
    """
    return io.write_text(path, render(data))


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<`, `>` or `&`, and ASCII only."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def script_text(source: str) -> str:
    """JavaScript that may stand inside a script element: nothing in it ends the element or asks for a source map."""
    source = re.sub(r"</(script)", r"<\\/\1", source, flags=re.IGNORECASE)
    return re.sub(r"^//# sourceMappingURL=.*$", "", source.replace("<!--", "<\\!--"), flags=re.MULTILINE)


def _circuitsvis() -> str:
    """CircuitsVis' script without its element: the page runs it when the first pattern is asked for."""
    return script_text(attention_script().removeprefix("<script>").removesuffix("</script>"))


def _asset(name: str) -> str:
    return (importlib.resources.files("lofit_lens.report") / name).read_text(encoding="utf-8")
