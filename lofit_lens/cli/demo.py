"""lofit-lens demo: the whole workflow on the embedded model, offline; with --real, on a small language model."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lofit_lens.cli import common as c
from lofit_lens.cli import studies as s

if TYPE_CHECKING:
    from lofit_lens.experiments.grid.specs import Grid
    from lofit_lens.experiments.tables.results import Results
    from lofit_lens.heads import HeadSet

N_QUESTIONS = 5


def demo(
    real: Annotated[bool, typer.Option("--real", help="Use a real model and MQuAKE (twelve minutes on two cores).")] = False,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="Folder for runs, tables and figures; default: runs/demo, or runs/real."
    )] = None,
    model: Annotated[str | None, typer.Option(
        "--model", "-m", help="A folder from the embedded model's training; with --real, any model. Default: organism, smollm2."
    )] = None,
    data_dir: Annotated[Path | None, typer.Option(
        "--data-dir", help="With --real: folder with MQuAKE's files; default: fetched."
    )] = None,
    backend: c.Backend = "auto",
    device: c.Device = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds; default: 2, with --real 1.", min=1)] = None,
    draws: Annotated[int | None, typer.Option("--draws", help="Draws of random heads; default: 5, with --real 1.", min=1)] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="With --real: number of test rows; default: 200.", min=1)] = None,
    full: Annotated[bool, typer.Option(
        "--full", help="Embedded model: add the transfer matrix and activation patching (minutes)."
    )] = False,
    workers: Annotated[int, typer.Option("--workers", help="Processes; 0 = one per core, at most 4 (one on a GPU).", min=0)] = 0,
    png: Annotated[bool, typer.Option("--png", help="Write the figures as PNG too (needs kaleido and Chrome).")] = False,
    quiet: c.Quiet = False,
) -> None:  # fmt: skip
    """Select heads, tune offsets, evaluate, and compare with other heads: on the embedded model's tasks, or on a real model.

    Ctrl-C stops; the same command resumes. The folder is a study that report, figures and ll.explore accept.

    Example: lofit-lens demo
    """
    start = time.perf_counter()
    form, takes = ("demo --real", ("data_dir", "limit")) if real else ("demo without --real", ("full",))
    c.check_options(form, {"data_dir": data_dir, "limit": limit, "full": full}, takes)
    out = out or Path("runs") / ("real" if real else "demo")
    c.check_writable(out)
    c.quiet_libraries()
    from lofit_lens.experiments.demo import REAL_MODEL, embedded_grid, real_grid
    from lofit_lens.experiments.tables.load import load_results
    from lofit_lens.plots.style import check_formats, check_static

    formats = ("html", "png") if png else ("html",)
    check_formats(formats)
    if png:
        check_static()
    given: dict[str, Any] = {"seeds": seeds and tuple(range(seeds)), "draws": draws, "limit": limit}
    given = {name: value for name, value in given.items() if value is not None}
    if real:
        folder = None if data_dir is None else str(data_dir.absolute())
        grid = real_grid(model or REAL_MODEL, backend=backend, data_dir=folder, **given)
        _announce_real(grid)
    else:
        grid = embedded_grid(model or "organism", backend=backend, full=full, **given)
    _run(grid, out, device, workers, quiet)
    results = load_results(out, grids=[grid.name])
    known = {} if real else _planted(grid.model[0].name)
    files = [*_write_table(results, out), *_draw(results, known, out, formats)]
    if real:
        _print_shared(results)
        _print_questions(results)
    else:
        files.append(_write_ranks(results, known, out, grid, full))
    shown = [f.name for f in files if f.suffix in (".html", ".png", ".csv")]
    c.console.print(f"\n{time.perf_counter() - start:.0f} s. In {out}: the runs, {', '.join(shown)}")
    _print_next(real, out, grid)


# ------------------------------------------------------------------------------------------------------- the runs


def _announce_real(grid: "Grid") -> None:
    from lofit_lens.experiments.demo import PARTS_OF_REAL

    given, task = grid.model[0].name, grid.tasks[0].name
    name = Path(given).name if Path(given).exists() else given
    c.console.print(
        f"[bold]LoFiT on {name} and {task}[/bold]: {PARTS_OF_REAL}; the first {grid.limit} test rows. "
        f"ITI's strength is chosen on the first {grid.tuning_limit} validation rows.", soft_wrap=True,
    )  # fmt: skip


def _run(grid: "Grid", out: Path, device: str | None, workers: int, quiet: bool) -> None:
    """Run the missing cells of the grid; failures are printed and end the command."""
    from lofit_lens.cli.grids import report
    from lofit_lens.experiments.grid.run import run_grid
    from lofit_lens.models import parse_device

    if not workers:
        workers = min(4, os.cpu_count() or 1) if parse_device(device).type == "cpu" else 1
    with c.progress_lines(quiet):
        found = run_grid(grid, out, workers=workers, device=device, progress=not quiet)
    report(found, out)
    if found.failed:
        raise SystemExit(1)


# ------------------------------------------------------------------------------------------------ what they found


def _planted(model: str) -> "dict[str, HeadSet]":
    from lofit_lens.experiments.organism import planted
    from lofit_lens.models import ORGANISM

    return planted(ORGANISM if model == "organism" else Path(model))


def _write_table(results: "Results", out: Path) -> list[Path]:
    """Print the table, and write it and the individual runs."""
    from lofit_lens import io
    from lofit_lens.experiments.demo import run_table
    from lofit_lens.experiments.tables.paper_tables import paper_tables

    table = next(t for t in paper_tables(results) if t.name == "table1")
    c.console.print(f"{results.model.name} as {results.model.class_name}")
    s.print_table(table.title, table.columns, table.cells, table.notes)
    return [*table.save(out), io.write_text(out / "runs.csv", run_table(results).to_csv(index=False))]


def _draw(results: "Results", known: "dict[str, HeadSet]", out: Path, formats: tuple[str, ...]) -> list[Path]:
    from lofit_lens.report.figures import head_grids, layers, save_all

    return save_all([*head_grids(results, known), *layers(results)], out, formats=formats)


def _write_ranks(results: "Results", known: "dict[str, HeadSet]", out: Path, grid: "Grid", full: bool) -> Path:
    """Print and write the ranks of the planted heads; with `full`, also by patching."""
    from lofit_lens import io
    from lofit_lens.experiments.demo import ranks
    from lofit_lens.experiments.executors.process import kept_model, one_thread
    from lofit_lens.experiments.organism import cue_patching

    patching = {}
    if full:
        model = kept_model(grid.model[0].name, backend=grid.model[0].backend)
        with one_thread():
            patching = {short: cue_patching(model, short) for short in known}  # pyright: ignore[reportArgumentType]
    frame = ranks(results, known, patching)
    rows = frame.to_numpy().tolist()
    s.print_table("Planted heads: rank among all heads, best 1", list(frame.columns), rows, ())
    return io.write_text(out / "planted_ranks.csv", frame.to_csv(index=False))


def _print_shared(results: "Results") -> None:
    """Print LoFiT's heads and ITI's, and their overlap by chance."""
    from lofit_lens.analysis.overlap import overlap
    from lofit_lens.experiments.demo import PROBES

    task = results.tasks[0]
    sets = {"LoFiT": results.heads(task), "ITI": results.heads(task, PROBES)}
    row = overlap(sets).iloc[0]
    for name, heads in sets.items():
        c.console.print(f"{name}'s heads: {heads}", soft_wrap=True)
    c.console.print(
        f"They share {row['shared']} of {row['k_a']}: {' '.join(map(str, sets['LoFiT'] & sets['ITI'])) or 'none'}. By chance "
        f"{row['expected']:.1f} (p = {row['p_hypergeometric']:.3f}), with each set's heads shuffled within their layers "
        f"{row['expected_layer']:.1f} (p = {row['p_layer']:.3f}).", soft_wrap=True,
    )  # fmt: skip


def _print_questions(results: "Results") -> None:
    """Print the first test questions with the bare model's answer and LoFiT's."""
    from lofit_lens.experiments.demo import questions

    c.console.print(f"\nThe first {N_QUESTIONS} test questions; + right, - wrong:")
    for q in questions(results, N_QUESTIONS):
        lines = [q["prompt"], f"  wanted  {q['wanted']}"]
        for side in ("before", "after"):
            said = " ".join(q[side].split())
            lines.append(f"  {side:7} {'+' if q[f'{side}_right'] else '-'} {said}")
        c.console.print("\n".join(lines), markup=False, soft_wrap=True)


def _print_next(real: bool, out: Path, grid: "Grid") -> None:
    model = grid.model[0].name
    c.console.print(
        "Try next:\n"
        f"  lofit-lens report {out} -o {out / 'report.html'}\n"
        f"  lofit-lens figures {out} --out {out / 'figures'} --formats html\n"
        f"  jupyter lab notebooks/01_quickstart.ipynb     and in a cell: ll.explore({str(out)!r}, ll.load_model({model!r}))",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if not real:
        c.console.print("  lofit-lens demo --real     the same on a small language model, SmolLM2, and MQuAKE")
