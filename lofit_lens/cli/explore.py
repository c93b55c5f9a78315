"""lofit-lens explore: the explorer as a page, opened in the browser."""

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lofit_lens.cli import common as c
from lofit_lens.cli import studies as s
from lofit_lens.errors import InputError

if TYPE_CHECKING:
    from lofit_lens.heads import HeadScores, HeadSet


def explore(
    sources: Annotated[list[Path], typer.Argument(
        help="Folders that select or probe wrote, or head files (.json, .npy), to compare; or one folder of results.",
        metavar="SOURCE...",
    )],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("explorer.html"),
    grid: s.Grids = None,
    shown: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    overwrite: c.Overwrite = False,
) -> None:  # fmt: skip
    """Write a page that compares head sets as layer x head grids, and open it: shared heads, chance, details of each head.

    Example: lofit-lens explore out/heads out/probes -o heads.html
    """
    c.check_new(out, overwrite=overwrite, folder=False)
    from lofit_lens.experiments.tables.load import load_results
    from lofit_lens.explorer.explorer import Explorer
    from lofit_lens.explorer.source import read_source

    found: Any = {str(path): _heads(path) for path in sources}
    if None in found.values():
        if len(sources) > 1:
            wrong = next(path for path, heads in found.items() if heads is None)
            raise InputError(f"{wrong} is not a head file; give either one folder of results, or only head files")
        found = load_results(sources[0], grids=grid)
    elif grid:
        raise InputError("--grid names a grid in a folder of results, but these are head files; leave it out")
    Explorer(read_source(found)).save(out)
    c.console.print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    if shown and not webbrowser.open(out.resolve().as_uri()):
        c.console.print("no browser was found; open the page in a browser yourself")


def _heads(path: Path) -> "HeadScores | HeadSet | None":
    """Read a head file, or a folder with one; None for a folder without one.

    Raises:
        InputError: no such file or folder.
        DataError: a file that holds no heads.
    """
    from lofit_lens import io
    from lofit_lens.cli.tune import is_scores
    from lofit_lens.heads import HeadScores, HeadSet

    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder of lofit-lens select, probe or grid, or a head file")
    if path.is_dir():
        path = next((path / name for name in ("scores.json", "heads.json") if (path / name).is_file()), path)
        if path.is_dir():
            return None
    scored = path.suffix == ".json" and is_scores(io.read_json(path))
    return HeadScores.load(path) if scored else HeadSet.load(path)
