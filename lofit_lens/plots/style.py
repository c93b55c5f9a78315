"""One look for every figure: readable at column width, safe for colour-blind readers, perceptually even heat maps."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lofit_lens import io
from lofit_lens.checks import check_is, check_one_of, texts_of
from lofit_lens.errors import InputError

log = logging.getLogger(__name__)

# Okabe and Ito's palette, without yellow (too pale on white).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEAT = "Cividis"
FORMATS = ("html", "png", "svg", "pdf")
FONT = {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": "#222222"}


def style(fig: go.Figure, *, title: str, width: int, height: int) -> go.Figure:
    """Apply the theme in place and return the figure; sizes in pixels."""
    fig.update_layout(
        template="plotly_white", font=FONT, colorway=list(COLORS), width=width, height=height,
        title={"text": title, "font": {"size": 15}, "x": 0.0, "xref": "paper", "xanchor": "left"},
        margin={"l": 60, "r": 24, "t": 64, "b": 56},
    )  # fmt: skip
    fig.update_xaxes(ticks="outside", showline=True, linecolor="#888888")
    fig.update_yaxes(ticks="outside", showline=True, linecolor="#888888")
    return fig


def save_figure(
    fig: go.Figure, path: str | Path, *, data: pd.DataFrame | None = None, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write a figure and the data behind it.

    A name that ends in `.html` (one self-contained page, plotly.js inside, opens offline), `.png` (two pixels a unit: 300 dpi at
    column width), `.svg` or `.pdf` is that one file. Any other name is the front of all of `formats`; its page takes plotly.js
    from the file `plotly.min.js` beside it, which a folder's figures share. Where this machine has no Chrome for the last three,
    the page is written all the same and a warning says how to get the rest. The data stand beside it: `data` as `.csv`, else
    the traces as `.json`.

    Args:
        fig: the figure.
        path: file name, or its front.
        data: the table that the figure was drawn from.
        formats: endings without the dot, of `FORMATS`; for the front of a name only.

    Returns:
        The files, figures first.

    Raises:
        InputError: an unknown ending or format; a file that cannot be written; kaleido or Chrome missing where one static file
            was asked for by name (how to get them is said).
    """
    check_is(fig, go.Figure, "fig", "a figure of plotly, e.g. plots.head_grid(scores)")
    check_is(path, (str, Path), "path", "the name of a file")
    check_is(data, (pd.DataFrame, type(None)), "data", "a table of pandas, or None")
    path = Path(path)
    check_formats(formats)
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
    """Static figures cannot be drawn on this machine."""


def _image(fig: go.Figure, path: Path) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The kopts argument is ignored")
            return fig.to_image(format=path.suffix[1:], scale=2)
    except Exception as e:
        raise NoChrome(
            f"cannot draw {path} ({str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}): static figures need "
            "kaleido (pip install 'lofit-lens[figures]') and Chrome or Chromium; .html needs neither"
        ) from e


def check_static() -> None:
    """Raise NoChrome unless static figures can be drawn here; seen by drawing an empty one."""
    _image(go.Figure(), Path("a static figure.svg"))


@contextlib.contextmanager
def many_figures(formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Keep one browser open for all static figures inside the block: half a second each instead of several.

    Nothing is opened where `formats` are pages alone.

    The first one is drawn apart, to see that there is a browser: without one kaleido's server would wait for ever.
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
