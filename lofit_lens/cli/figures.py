"""lofit-lens figures: draw all figures and tables of a study."""

import time
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
    formats: Annotated[
        str, typer.Option("--formats", help="Formats of the figures, with commas: html, png, svg, pdf. Fewer is faster.")
    ] = "html,png",
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
    from lofit_lens.plots.style import check_formats
    from lofit_lens.report.figures import draw_all, save_all
    from lofit_lens.report.official import official_figures, official_sets

    wanted = tuple(f.strip() for f in formats.split(",") if f.strip())
    check_formats(wanted)
    if heads is not None:
        official_sets(heads)  # fails now rather than after the study
    c.check_writable(out)
    if results is None:
        assert heads is not None
        files = save_all(official_figures(heads), out, formats=wanted)
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

        files = draw_all(load_results(results, grids=grid), out, formats=wanted, heads=heads)
    s.print_files(files, out)
    c.console.print(f"{time.perf_counter() - start:.0f} s")
