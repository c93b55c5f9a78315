"""lofit-lens demo: the main job on the embedded model, offline."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lofit_lens.cli import common as c

if TYPE_CHECKING:
    import pandas as pd

    from lofit_lens.experiments.organism import GridResult


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for runs, table and figures.")] = Path("runs/demo"),
    model: Annotated[str, typer.Option("--model", "-m", help="'organism', or a folder its training wrote.")] = "organism",
    backend: c.Backend = "auto",
    seeds: Annotated[int, typer.Option("--seeds", help="Number of LoFiT seeds (0, 1, ...).", min=1)] = 2,
    full: Annotated[bool, typer.Option("--full", help="Add the transfer matrix and activation patching (minutes).")] = False,
    workers: Annotated[int, typer.Option("--workers", help="Processes; 0 = one a core.", min=0)] = 0,
    png: Annotated[bool, typer.Option("--png", help="Write the figures as PNG too (needs kaleido and Chrome).")] = False,
    quiet: c.Quiet = False,
) -> None:  # fmt: skip
    """Select heads, tune offsets and evaluate on the embedded model's three tasks, and compare with random and all heads.

    Example: lofit-lens demo
    """
    c.quiet_libraries()
    from lofit_lens import io
    from lofit_lens.experiments.organism import run_demo
    from lofit_lens.plots import head_grid, layer_distribution, save_figure
    from lofit_lens.plots.style import check_static

    start = time.perf_counter()
    c.check_writable(out)
    if png:
        check_static()
    c.console.print(f"[bold]LoFiT on the embedded model[/bold]: 3 tasks, {seeds} seeds, runs in {out / 'runs'}")
    found = run_demo(
        model=model, backend=backend, seeds=range(seeds), out=out / "runs", full=full,
        workers=workers or min(4, os.cpu_count() or 1), progress=not quiet,
    )  # fmt: skip
    table = found.table()
    io.write_text(out / "table.csv", table.to_csv(index=False))
    io.write_text(out / "runs.csv", found.runs.to_csv(index=False))
    ranks = found.ranks()
    io.write_text(out / "planted_ranks.csv", ranks.to_csv(index=False))
    first = {t: s for (t, seed), s in found.scores.items() if seed == 0}
    chosen = {t: s.top(len(found.planted[t])) for t, s in first.items()}
    figures = {
        "head_grid": head_grid(
            first, chosen, marked=found.planted, title="Which heads each task uses (A-norm of step 1, seed 0)"
        ),
        "layer_distribution": layer_distribution(chosen, title="Layers of the chosen heads (seed 0)"),
    }
    for name, fig in figures.items():
        for ending in ("html", "png") if png else ("html",):
            save_figure(fig, out / f"{name}.{ending}")
    c.console.print(f"{found.model.name} as {found.model.class_name}")
    _print_table(found, table)
    _print_ranks(ranks)
    c.console.print(
        f"\n{time.perf_counter() - start:.0f} s. Figures: {out / 'head_grid.html'}, {out / 'layer_distribution.html'}"
    )
    c.console.print(
        "Try next:\n"
        "  lofit-lens select --task organism/kinship --out out/heads\n"
        "  lofit-lens tune --task organism/kinship --heads out/heads --out out/adapter\n"
        "  lofit-lens eval --task organism/kinship --adapter out/adapter\n"
        "  lofit-lens select --model meta-llama/Llama-2-7b-hf --task mquake --out out/llama   (needs the hub and a GPU)"
    )


def _print_table(found: "GridResult", table: "pd.DataFrame") -> None:
    from rich.table import Table

    first = {r["task"]: r for r in reversed(found.runs.to_dict("records"))}
    by_method: dict[str, dict[str, Any]] = {}
    for r in table.to_dict("records"):
        by_method.setdefault(r["method"], {})[r["task"]] = r
    tasks = list(reversed(first))
    shown = Table(title="Test accuracy: mean [95 % interval over runs and items]", title_justify="left")
    shown.add_column("heads edited")
    for t in tasks:
        shown.add_column(f"{t}, {first[t]['metric'].upper()} (n={first[t]['n_items']})")
    shown.add_column("runs", justify="right")
    for method, rows in by_method.items():
        shown.add_row(method, *(_cell(rows.get(t)) for t in tasks), str(max(r["count"] for r in rows.values())))
    c.console.print(shown)
    c.console.print(
        "Few runs: such intervals can be too narrow. Each run's own is in runs.csv, lowest and highest run in table.csv.",
        style="dim",
    )


def _cell(r: "dict[str, Any] | None") -> str:
    if r is None:
        return "-"
    return f"{_short(r['mean'])} [{_short(r['low'])}, {_short(r['high'])}]"


def _short(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")


def _print_ranks(ranks: "pd.DataFrame") -> None:
    from rich.table import Table

    shown = Table(title="Planted heads: rank among all heads, best 1", title_justify="left")
    for column in ranks.columns:
        shown.add_column(column, justify="left" if column in ("task", "head") else "right")
    for row in ranks.to_dict("records"):
        shown.add_row(*map(str, row.values()))
    c.console.print(shown)
