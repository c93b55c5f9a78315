"""Run the notebooks, and write what they show or compare it with what is there.

    python notebooks/execute.py                  # run all, put their outputs into the files
    python notebooks/execute.py 01 05            # only these, by the front of their names
    python notebooks/execute.py --check          # run, change nothing, tell every difference; exit code 1 if there is one
    python notebooks/execute.py --run            # run, change nothing, compare nothing: do they run here at all?

A notebook runs in the environment of this command, on the CPU, on one thread, in an empty folder `notebooks` beside links to the
repository's `results` and `figures`. Figures are PNG where there is a Chrome or Chromium. A cell may take ten minutes and a
notebook fifteen; a kernel that dies and a Chrome that does not answer end the run with an error that names the cell. Out of the
outputs go: widgets' state, progress bars, execution metadata and the folder's name. On one machine a second run gives the same
file, byte for byte. Another processor rounds otherwise, so that `--check` lets pass

- a number with decimals that is off by at most 0.02, or by 2 % of itself where that is more; whole numbers and words have to be
  the same;
- a figure of the same size in which at most 5 % of the pixels differ by more than an eighth of the scale. Where letters are drawn
  otherwise (other fonts, another Chrome), the size alone counts; without Chrome or Pillow figures are not compared.
"""

import argparse
import base64
import hashlib
import io as streams
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode

from lofit_lens import io

HERE = Path(__file__).parent
CELL_SECONDS, NOTEBOOK_SECONDS = 600, 900
CHROME_SECONDS = 120  # until a first figure is drawn
TOLERANCE = 0.02
PIXEL_LEVELS, PIXEL_SHARE = 32, 0.05
COMMITTED = ("results", "figures")  # what notebooks read of the repository
NOT_KEPT = ("application/vnd.jupyter.widget-view+json", "application/vnd.plotly.v1+json", "application/javascript")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}  # fmt: skip
# Run before the first cell, and kept out of the file. One browser serves all figures. Kaleido waits without end for one that does
# not start, so that a first figure is drawn here, where the time is short.
QUIET = """
import logging
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns on some processors only
"""
WITH_CHROME = """
import warnings, kaleido, plotly.graph_objects, plotly.io
warnings.filterwarnings("ignore", message="The kopts argument is ignored")
plotly.io.renderers["png"].scale = 1.25
kaleido.start_sync_server(silence_warnings=True)
plotly.graph_objects.Figure().to_image(format="png")
"""
WITHOUT_CHROME = "import plotly.io; plotly.io.renderers.default = 'plotly_mimetype'"
# A number with decimals that is no part of a word: the 2 and the 5 of L2H5 are not.
NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?(?![\w])|(?<![\w.])[-+]?\d+e[-+]?\d+(?![\w])")


DRAW = """
import pathlib, sys
import plotly.graph_objects as go
drawn = go.Figure(layout={"title": "Heads 0123456789", "width": 320, "height": 160}).to_image(format="png")
pathlib.Path(sys.argv[1]).write_bytes(drawn)
"""


class NotebookFailed(RuntimeError):
    """A cell raised or took too long, or Chrome did; the message names notebook and cell."""


def find(names: Sequence[str] = (), folder: Path = HERE) -> list[Path]:
    """Notebooks whose names begin so, in order; all of them where no name is given.

    Raises:
        SystemExit: a name that no notebook, or more than one, begins with.
    """
    every = sorted(folder.glob("[0-9]*.ipynb"))
    found = []
    for name in names:
        fitting = [p for p in every if p.name.startswith(Path(name).name)]
        if len(fitting) != 1:
            raise SystemExit(
                f"{len(fitting)} notebooks begin with {name!r}; there are {', '.join(p.name for p in every)}"
            )
        found += fitting
    return found or every


def letters() -> str:
    """Checksum of how letters are drawn here, with this Chrome and these fonts; empty where no figure can be drawn as PNG.

    Raises:
        NotebookFailed: Chrome drew nothing in two minutes.
    """
    with tempfile.TemporaryDirectory(prefix="letters-") as folder:
        # Another process, because a wait for Chrome cannot be ended in this one; no pipe, which a Chrome left over would hold.
        drawing = subprocess.Popen(
            [sys.executable, "-c", DRAW, f"{folder}/drawn.png"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            failed = drawing.wait(CHROME_SECONDS)
        except subprocess.TimeoutExpired:
            drawing.kill()
            drawing.wait()
            raise NotebookFailed(
                f"Chrome drew no figure in {CHROME_SECONDS} seconds: end Chrome processes that are left over, or name another"
                " Chrome in the environment variable BROWSER_PATH"
            ) from None
        if failed:  # no kaleido, no Chrome, or one that does not start
            return ""
        return hashlib.sha256(Path(folder, "drawn.png").read_bytes()).hexdigest()[:16]


def run(path: Path, *, drawn: str) -> NotebookNode:
    """The notebook with new outputs, cleaned; its file is left alone.

    Args:
        path: of the notebook.
        drawn: `letters()`: kept in the notebook; empty: figures are not drawn as PNG.

    Raises:
        NotebookFailed: a cell raised an error or took too long, or the kernel died.
    """
    notebook = nbformat.read(path, as_version=4)
    setup = nbformat.v4.new_code_cell(QUIET + (WITH_CHROME if drawn else WITHOUT_CHROME))
    env = {
        **os.environ, "PLOTLY_RENDERER": "png", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }  # fmt: skip
    until, started = time.monotonic() + NOTEBOOK_SECONDS, [0]

    def seconds_for(cell: NotebookNode) -> int:
        return max(1, min(CHROME_SECONDS if cell.id == setup.id else CELL_SECONDS, round(until - time.monotonic())))

    with tempfile.TemporaryDirectory(prefix="notebook-") as root:
        folder = str(Path(root, HERE.name))
        Path(folder).mkdir()
        for name in COMMITTED:
            Path(root, name).symlink_to(HERE.parent / name)
        whole = nbformat.from_dict({**notebook, "cells": [setup, *notebook.cells]})
        client = NotebookClient(
            whole, timeout_func=seconds_for, kernel_name="python3", record_timing=False, store_widget_state=False,
            extra_arguments=["--IPKernelApp.log_level=40"], resources={"metadata": {"path": folder}},
            on_cell_start=lambda cell, cell_index: started.append(cell_index),
        )  # fmt: skip
        try:
            client.execute(env=env)
        except Exception as e:
            at = started[-1]
            place = f"cell {at} ({whole.cells[at].id})" if at else "before its first cell, where Chrome starts"
            raise NotebookFailed(f"{path.name}, {place}: {e}") from e
        for cell, ran in zip(notebook.cells, whole.cells[1:], strict=True):
            if cell.cell_type == "code":
                cell.outputs = ran.outputs
        notebook.metadata["lofit_lens"] = {"letters": drawn}
        return clean(notebook, folder)


def clean(notebook: NotebookNode, folder: str = "") -> NotebookNode:
    """What is kept of a notebook that ran: see the top of this file. Changes the notebook that it returns.

    Args:
        notebook: with outputs.
        folder: in which it ran; taken out of all texts.
    """
    count = 0
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count, kept = count, []
        for output in cell.outputs:
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                if not _clean_data(output.data, folder):
                    continue
                output.metadata = NotebookNode()
                if output.output_type == "execute_result":
                    output.execution_count = count
            elif output.output_type == "stream":
                output.text = "".join(line for line in _lines(output.text, folder) if not _is_progress(line))
                # How a stream is cut into pieces is chance.
                if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                    kept[-1].text += output.text
                    continue
                if not output.text.strip():
                    continue
            kept.append(output)
        cell.outputs = kept
    ours = {key: notebook.metadata[key] for key in ("lofit_lens",) if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict({**METADATA, **ours})
    return notebook


def _clean_data(data: NotebookNode, folder: str) -> bool:
    """Whether anything is left to see; a widget without another form, such as a progress bar, leaves nothing."""
    gone = [kind for kind in NOT_KEPT if data.pop(kind, None) is not None]
    if gone and not set(data) - {"text/plain"}:
        return False
    for kind, value in data.items():
        if isinstance(value, str) and kind.startswith("text/"):
            data[kind] = "".join(_lines(value, folder))
        elif kind == "image/png":
            data[kind] = value.strip() + "\n"
    return True


def _lines(text: str, folder: str) -> list[str]:
    if folder:
        for name in {os.path.realpath(folder), folder}:
            text = text.replace(name + os.sep, "").replace(name, ".")
    return text.splitlines(keepends=True)


def _is_progress(line: str) -> bool:
    return "\r" in line or bool(re.search(r"\d%\||\b(it|s|rows?|steps?|texts?)/s\b|s/it\b", line))


def text_of(notebook: NotebookNode) -> str:
    """The file's content."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


# ------------------------------------------------------------------------------------------------- comparison


def differences(old: NotebookNode, new: NotebookNode, *, name: str = "notebook", images: bool = True) -> list[str]:
    """Every difference of two notebooks' outputs that is more than rounding, each with notebook and cell.

    Where the notebooks say that letters were drawn otherwise, only the sizes of figures are compared.

    Args:
        old: as it was.
        new: as it ran now.
        name: of the notebook, for the texts.
        images: compare figures.
    """
    found, pixels = [], old.metadata.get("lofit_lens") == new.metadata.get("lofit_lens")
    if len(old.cells) != len(new.cells):
        return [f"{name}: {len(old.cells)} cells before, {len(new.cells)} now"]
    for i, (a, b) in enumerate(zip(old.cells, new.cells, strict=True), start=1):
        place = f"{name}, cell {i} ({a.id})"
        if a.source != b.source or a.cell_type != b.cell_type or a.id != b.id:
            found.append(f"{place}: the cell itself is another one")
        elif a.cell_type == "code":
            found += [f"{place}: {said}" for said in _outputs_differ(a.outputs, b.outputs, images, pixels)]
    return found


def _outputs_differ(old: list[Any], new: list[Any], images: bool, pixels: bool) -> list[str]:
    if not images:  # without Chrome a figure leaves no output
        old, new = ([o for o in outputs if set(o.get("data", ("text",))) != {"image/png"}] for outputs in (old, new))
    kinds = [[(o.output_type, *sorted(o.get("data", ()))) for o in outputs] for outputs in (old, new)]
    if kinds[0] != kinds[1]:
        return [f"outputs {kinds[0]} before, {kinds[1]} now"]
    found = []
    for a, b in zip(old, new, strict=True):
        if a.output_type == "stream":
            found += text_differs(a.text, b.text)
        for kind in a.get("data", ()):
            if kind == "image/png":
                found += image_differs(a.data[kind], b.data[kind], pixels=pixels)
            else:
                found += text_differs(str(a.data[kind]), str(b.data[kind]))
    return found


def text_differs(old: str, new: str) -> list[str]:
    """At most one line: the first place where words, whole numbers or, beyond the tolerance, decimal numbers differ."""
    words, others = (NUMBER.sub("#", text).split() for text in (old, new))
    if words != others:
        at = next(
            (i for i, (a, b) in enumerate(zip(words, others, strict=False)) if a != b), min(len(words), len(others))
        )
        return [f"{_around(words, at)!r} before, {_around(others, at)!r} now"]
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        x, y = (float(n.replace("−", "-")) for n in (a, b))
        if abs(x - y) > TOLERANCE * max(1.0, abs(x), abs(y)) + 1e-12:
            return [f"number {a} before, {b} now (allowed: {TOLERANCE} or {TOLERANCE:.0%})"]
    return []


def _around(words: list[str], at: int) -> str:
    return " ".join(words[max(0, at - 3) : at + 4])


def image_differs(old: str, new: str, *, pixels: bool = True) -> list[str]:
    """At most one line: another size, or too many pixels that differ (`pixels`). Base64 PNG; nothing without Pillow."""
    if old == new:
        return []
    try:
        from PIL import Image
    except ImportError:
        return []
    a, b = (
        np.asarray(Image.open(streams.BytesIO(base64.b64decode(text))).convert("RGB")).astype(np.int16)
        for text in (old, new)
    )
    if a.shape != b.shape:
        return [f"a figure of {a.shape[1]}x{a.shape[0]} pixels before, {b.shape[1]}x{b.shape[0]} now"]
    share = float((np.abs(a - b).max(axis=2) > PIXEL_LEVELS).mean()) if pixels else 0.0
    return (
        [f"a figure differs in {share:.1%} of its pixels (allowed: {PIXEL_SHARE:.0%})"] if share > PIXEL_SHARE else []
    )


# ---------------------------------------------------------------------------------------------------- command


def check(path: Path, *, drawn: str) -> list[str]:
    """Run a notebook and compare; see `run` and `differences`."""
    return differences(nbformat.read(path, as_version=4), run(path, drawn=drawn), name=path.name, images=bool(drawn))


def main(given: Sequence[str] | None = None) -> int:
    """The command; 1 where a notebook failed or differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks by the front of their names, e.g. 01; default: all")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="compare with what is there; write nothing")
    how.add_argument("--run", action="store_true", help="run only; write and compare nothing")
    asked = parser.parse_args(given)
    try:
        drawn, failed = letters(), 0
    except NotebookFailed as e:
        print(e)
        return 1
    if not drawn:
        if not (asked.check or asked.run):
            print(
                "figures are part of the notebooks and need Chrome or Chromium, which is not here; --check and --run do without"
            )
            return 1
        print("no Chrome or Chromium here: figures are not compared")
    for path in find(asked.names):
        try:
            if asked.check:
                said = check(path, drawn=drawn)
            else:
                notebook, said = run(path, drawn=drawn), []
                if not asked.run:
                    io.write_text(path, text_of(notebook))
        except NotebookFailed as e:
            said = [str(e)]
        print(
            *(said or [f"{path.name}: {'the same' if asked.check else 'ran' if asked.run else 'written'}"]),
            sep="\n",
            flush=True,
        )
        failed += bool(said)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
