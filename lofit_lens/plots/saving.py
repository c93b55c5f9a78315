"""Figures as files: pages that open offline, PNG, and vector graphics at their true size."""

import asyncio
import base64
import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lofit_lens import io
from lofit_lens.checks import check_is, check_one_of, texts_of
from lofit_lens.errors import InputError
from lofit_lens.plots.layout import plan_of
from lofit_lens.plots.paper import PIXELS, for_paper

log = logging.getLogger(__name__)

FORMATS = ("html", "png", "svg", "pdf")


def save_figure(
    fig: go.Figure, path: str | Path, *, data: pd.DataFrame | None = None, formats: Sequence[str] = FORMATS,
    paper: str | None = None, width: float | str | None = None, font_size: float | None = None, title: bool = True,
    note: bool = True, transpose: bool = False,
) -> list[Path]:  # fmt: skip
    """Write a figure and the data that it shows.

    A name that ends in `.html` (one self-contained page, plotly.js inside, opens offline), `.png`, `.svg` or `.pdf` is written
    as that one file. PDF and SVG have the figure's true size, in points, with text as text; a PDF embeds its fonts. Any other
    name gets one file per format; its page loads plotly.js from `plotly.min.js` in the same folder, which the folder shares.
    PNG, SVG and PDF need Chrome; without it the page is written all the same, and a warning says how to get the rest.
    The data are written too: `data` as `.csv`, otherwise the traces as `.json`.

    Args:
        fig: the figure.
        path: file name; without an ending, the common part of several names.
        data: the table that the figure was drawn from.
        formats: endings without the dot, of `FORMATS`; used where `path` has no ending.
        paper: as in `for_paper`, which is applied if this or any of the following is given.
        width: as in `for_paper`.
        font_size: as in `for_paper`.
        title: as in `for_paper`.
        note: as in `for_paper`.
        transpose: as in `for_paper`.

    Returns:
        The files, figures first.

    Raises:
        InputError: an unknown ending or format; a file that cannot be written; missing kaleido or Chrome where one static file
            was asked for by name (the error says how to get them); what `for_paper` refuses.
    """
    check_is(fig, go.Figure, "fig", "a figure of plotly, e.g. plots.head_grid(scores)")
    check_is(path, (str, Path), "path", "the name of a file")
    check_is(data, (pd.DataFrame, type(None)), "data", "a table of pandas, or None")
    path = Path(path)
    check_formats(formats)
    if (paper, width, font_size, title, note, transpose) != (None, None, None, True, True, False):
        fig = for_paper(
            fig, paper, width=width, font_size=font_size, title=title, note=note, transpose=transpose
        )  # fmt: skip
    if path.suffix:
        if path.suffix[1:] not in FORMATS:
            raise InputError(
                f"cannot save a figure as {path.suffix!r}; give a name that ends in .{', .'.join(FORMATS)}, or one without an "
                "ending for all of them"
            )
        files = [_write(fig, path)]
    else:
        files = _write_all(fig, path, formats)
    beside = path.with_suffix("") if path.suffix else path
    if data is not None:
        return [*files, io.write_text(f"{beside}.csv", data.to_csv(index=False, lineterminator="\n"))]
    if path.suffix:
        return files
    traces: Any = fig.to_json(engine="json")
    return [*files, io.write_text(f"{beside}.json", json.dumps(json.loads(traces)["data"], indent=1) + "\n")]


def check_formats(formats: Sequence[str]) -> None:
    """Raise InputError unless all are of `FORMATS`."""
    for ending in texts_of("formats", formats):
        check_one_of("format", ending, FORMATS)


def _write(fig: go.Figure, path: Path, *, script: bool | str = True) -> Path:
    if path.suffix == ".html":
        page: Any = fig.to_html(
            include_plotlyjs=script, full_html=True, div_id=path.stem, config={"displaylogo": False}
        )
        return io.write_text(path, page)
    return io.write_bytes(path, _image(fig, path))


def _write_all(fig: go.Figure, front: Path, formats: Sequence[str]) -> list[Path]:
    files, beside = [], front.parent / "plotly.min.js"
    if "html" in formats and not (beside.is_file() and beside.stat().st_size == len(get_plotlyjs().encode())):
        io.write_text(beside, get_plotlyjs())
    for ending in (f for f in FORMATS if f in formats):
        path = front.parent / f"{front.name}.{ending}"
        try:
            files.append(_write(fig, path, script="directory"))
        except NoChrome as e:
            log.warning("%s", e)
            break
    return files


class NoChrome(InputError):
    """This machine cannot draw static figures."""


def _image(fig: go.Figure, path: Path) -> bytes:
    ending = path.suffix[1:]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The kopts argument is ignored")
            if ending == "png":
                return fig.to_image(format="png", scale=_scale(fig))
            svg = _in_points(fig.to_image(format="svg").decode())
            return _printed(svg) if ending == "pdf" else svg.encode()
    except Exception as e:
        raise NoChrome(
            f"cannot draw {path} ({str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}): static figures need "
            "kaleido (pip install 'lofit-lens[figures]') and Chrome or Chromium; .html needs neither"
        ) from e


def _scale(fig: go.Figure) -> float:
    """Return the dots of a PNG per pixel: 2 for screens, for paper at least 300 per inch."""
    plan = plan_of(fig)
    return 4 if plan and plan["scale"] != 1 else 2


def _in_points(svg: str) -> str:
    """Return the drawing with its size in points, which LaTeX, Inkscape and browsers read alike."""
    for name in ("width", "height"):
        svg = re.sub(
            rf'(<svg[^>]*? {name}=")([0-9.]+)"', lambda m: f'{m[1]}{float(m[2]) / PIXELS:.10g}pt"', svg, count=1
        )
    return svg


def _printed(svg: str) -> bytes:
    """Return a drawing as a PDF of its size. Kaleido's own PDF shrinks it by a margin of 0.1 inch, and fonts with it."""
    import choreographer  # what kaleido drives Chrome with

    width, height = re.findall(r' (?:width|height)="([0-9.]+)pt"', svg)[:2]
    page = (
        f"<!DOCTYPE html><style>@page {{ size: {width}pt {height}pt; margin: 0 }} body {{ margin: 0 }} svg {{ display: block }}"
        f"</style>{svg}"
    )
    options = {"printBackground": True, "preferCSSPageSize": True, "pageRanges": "1"}

    async def ask() -> bytes:
        async with choreographer.Browser(headless=True) as browser:
            tab = await browser.create_tab("about:blank")
            tree = await tab.send_command("Page.getFrameTree")
            frame = tree["result"]["frameTree"]["frame"]["id"]
            await tab.send_command("Page.setDocumentContent", params={"frameId": frame, "html": page})
            answer = await tab.send_command("Page.printToPDF", params=options)
            return base64.b64decode(answer["result"]["data"])

    # In a thread of its own: Jupyter runs a loop in this one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(ask())).result()


def check_static() -> None:
    """Raise NoChrome unless static figures can be drawn here; tries an empty one."""
    _image(go.Figure(), Path("a static figure.svg"))


@contextlib.contextmanager
def many_figures(formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Keep one browser open for all static figures inside the block: half a second each instead of several.

    No browser is opened if `formats` has only pages.

    A first figure is drawn separately, to see that there is a browser: without one, kaleido's server would wait forever.
    """
    check_formats(formats)
    if set(formats) <= {"html"}:
        yield
        return
    try:
        import kaleido

        check_static()
    except Exception:  # no kaleido or no Chrome: `save_figure` says so
        yield
        return
    # It reports the last words of the browser that is closed as broken messages.
    pipe = logging.getLogger("choreographer.channels.pipe")
    before = pipe.level
    pipe.setLevel(logging.CRITICAL)
    kaleido.start_sync_server(silence_warnings=True)
    try:
        yield
    finally:
        kaleido.stop_sync_server(silence_warnings=True)
        pipe.setLevel(before)
