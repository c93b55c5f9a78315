"""lofit-lens figures: draw all figures and tables of a study."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c
from lofit_lens.cli import studies as s


def figures(
    how: c.ModelOptions,
    results: Annotated[Path | None, typer.Argument(help="Folder of a study (--run creates it).")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for figures and tables.")] = Path("figures"),
    run: Annotated[bool, typer.Option("--run", help="First run the parts of the study that RESULTS lacks.")] = False,
    heads: Annotated[Path | None, typer.Option("--heads", help="Folder with the official code's head files (.npy).")] = None,
    formats: Annotated[str | None, typer.Option(
        "--formats", help="Formats of the figures, with commas: html, png, svg, pdf; default: html,png, for a paper pdf."
    )] = None,
    paper: Annotated[str | None, typer.Option("--paper", help="Draw at the true size of neurips, icml or acl.")] = None,
    width: Annotated[str | None, typer.Option("--width", help="column or text of the paper, or points.")] = None,
    font_size: Annotated[float | None, typer.Option("--font-size", help="Of axis titles, in points.")] = None,
    title: Annotated[bool, typer.Option("--title/--no-title", help="Keep titles; papers say them in the caption.")] = True,
    transpose: Annotated[bool, typer.Option("--transpose", help="Mirror figures at their diagonal: layers across.")] = False,
    task: s.Tasks = None,
    seeds: s.Seeds = 2,
    draws: s.Draws = 5,
    limit: s.Limit = None,
    part: Annotated[list[str] | None, typer.Option(
        "--part", help="Only for this: fig2, fig3, fig4, fig5, table1, table2, table3, table5, stability; may be repeated."
    )] = None,
    tune: Annotated[bool, typer.Option(
        "--tune", help="Choose every method's settings on the validation rows, not only those of ITI and RepE (slower)."
    )] = False,
    other_task: Annotated[list[str] | None, typer.Option(
        "--other-task",
        help="Also test LoFiT's adapters on this task (Table 5); may be repeated. Default: the embedded tasks with good cues.",
    )] = None,
    texts: Annotated[str | None, typer.Option(
        "--texts",
        help="Ordinary text for damage and long contexts: wikitext, organism, a file, none. Default: the embedded model's own.",
    )] = None,
    grid: s.Grids = None,
    data_dir: c.DataDir = None,
    column: c.Column = None,
    chat: c.IsChat = False,
    system: c.System = None,
    workers: s.Workers = 0,
    quiet: c.Quiet = False,
) -> None:  # fmt: skip
    """Draw the paper's figures and tables from a study's folder; with --run, run the study first.

    Example: lofit-lens figures runs/study --run --task organism/all --out figures
    """
    from lofit_lens.errors import InputError

    if results is None and (heads is None or run):
        raise InputError(
            "give the folder of a study (lofit-lens figures RESULTS), or official head files (--heads FOLDER)"
        )
    start = time.perf_counter()
    c.quiet_libraries()
    from lofit_lens.plots.paper import check_paper, for_paper
    from lofit_lens.plots.saving import check_formats
    from lofit_lens.report.figures import draw_all, save_all
    from lofit_lens.report.official import official_figures, official_sets

    points = width if width is None or width in ("column", "text") else _points(width)
    restyle = partial(for_paper, paper=paper, width=points, font_size=font_size, title=title, transpose=transpose)
    on_paper = check_paper(paper, points, font_size) is not None
    formats = formats or ("pdf" if on_paper else "html,png")
    wanted = tuple(f.strip() for f in formats.split(",") if f.strip())
    check_formats(wanted)
    if heads is not None:
        official_sets(heads)  # fails now rather than after the study
    c.check_writable(out)
    if results is None:
        assert heads is not None
        files = save_all(official_figures(heads), out, formats=wanted, restyle=restyle)
    else:
        if run:
            study = s.Study(
                results=results, how=how, tasks=task or ["organism/all"], seeds=seeds, draws=draws, limit=limit, parts=part,
                tune=tune, others=other_task, texts=texts, data_dir=data_dir, column=column, chat=chat, system=system,
                workers=workers, readings=True, quiet=quiet,
            )  # fmt: skip
            s.run(study, "figures")
            c.console.print(f"study in {results}: {time.perf_counter() - start:.0f} s")
        from lofit_lens.experiments.tables.load import load_results

        files = draw_all(load_results(results, grids=grid), out, formats=wanted, heads=heads, restyle=restyle)
    s.print_files(files, out)
    c.console.print(f"{time.perf_counter() - start:.0f} s")


def _points(width: str) -> float:
    from lofit_lens.errors import InputError

    try:
        return float(width)
    except ValueError:
        raise InputError(f"--width is {width!r}; give column, text, or a number of points (72 an inch)") from None
