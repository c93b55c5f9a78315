"""lofit-lens report: write one interactive page from a study."""

from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c
from lofit_lens.cli import studies as s


def report(
    results: Annotated[Path, typer.Argument(help="Folder of a study (lofit-lens figures RESULTS --run creates one).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    grid: s.Grids = None,
    overwrite: c.Overwrite = False,
) -> None:  # fmt: skip
    """Write a page that anyone can open without Python: tables, head sets compared, tokens, attention patterns.

    Example: lofit-lens report runs/study -o report.html
    """
    c.check_new(out, overwrite=overwrite, folder=False)
    from lofit_lens.experiments.tables.load import load_results
    from lofit_lens.report.page import write_report

    write_report(load_results(results, grids=grid), out)
    c.console.print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser")
