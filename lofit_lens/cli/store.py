"""lofit-lens store: list, verify and clean a store of runs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lofit_lens.cli import common as c

if TYPE_CHECKING:
    from lofit_lens.experiments.store.store import Store

app = typer.Typer(
    name="store", no_args_is_help=True,
    help="Inspect a store of runs (a grid's --store folder): list, verify, gc, index. Example: lofit-lens store list runs/grid",
)  # fmt: skip
Folder = Annotated[Path, typer.Argument(help="The store: the folder that a grid was run into.", metavar="STORE")]


def list_runs(store: Folder, as_json: c.AsJson = False) -> None:
    """List runs, one row each, and grids: how much of each is done, and what failed.

    Example: lofit-lens store list runs/grid
    """
    c.console.stderr = as_json
    kept = _opened(store)
    table, grids, failures = kept.index(), kept.grids(), kept.failures()
    done = set(table["name"])
    progress = {name: (sum(n in done for n in record["cells"]), len(record["cells"])) for name, record in grids.items()}
    if as_json:
        c.print_json({
            "runs": _records(table), "grids": {g: {"done": d, "cells": n} for g, (d, n) in progress.items()}, "failed": failures,
        })  # fmt: skip
        return
    from rich.table import Table

    shown = Table(title=f"{len(table)} runs in {kept.root}", title_justify="left")
    for column in ("run", "metric", "mean [95 % interval]", "items", "seconds"):
        shown.add_column(column, justify="left" if column in ("run", "metric") else "right")
    for row in _records(table):
        metric = next((k.removesuffix("_low") for k in table.columns if k.endswith("_low") and row[k] is not None), "")
        value = f"{row[metric]:.3f} [{row[f'{metric}_low']:.3f}, {row[f'{metric}_high']:.3f}]" if metric else ""
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        items = "" if row.get("n_items") is None else str(row["n_items"])
        shown.add_row(*map(_plain, (row["label"], metric, value, items, seconds)))
    c.console.print(shown)
    for name, (d, n) in progress.items():
        _say(f"grid {name}: {d} of {n} runs are done")
    for name, error in failures.items():
        _say(f"failed: {name}: {error}")


def verify(
    store: Folder,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove damaged runs, so that the grid runs them again.")
    ] = False,
    as_json: c.AsJson = False,
) -> None:
    """Check every file of every run against its recorded checksum; exit code 1 if something is wrong.

    Example: lofit-lens store verify runs/grid --remove
    """
    from lofit_lens.experiments.store import checks

    c.console.stderr = as_json
    kept = _opened(store)
    problems = checks.verify(kept)
    gone = [str(path.relative_to(kept.root)) for path in checks.remove_damaged(kept, problems if remove else [])]
    left = [p for p in problems if not any(p.path == g or p.path.startswith(f"{g}/") for g in gone)]
    for problem in problems:
        _say(f"{problem.kind}: {problem}")
    for path in gone:
        _say(f"removed {path}")
    runs = len({p.run for p in left if p.kind == "damaged" and p.run})
    _say(
        f"{len(kept.names())} runs, {len(problems)} problems"
        + (f", {len(problems) - len(left)} of them removed" if remove else "")
    )
    if gone:
        _say("run the same grid again: it computes only what is missing")
    elif runs:
        _say(
            f"lofit-lens store verify {store} --remove    removes the {runs} damaged runs, so that they are computed again"
        )
    if as_json:
        c.print_json({"problems": [vars(p) for p in problems], "removed": gone, "runs": len(kept.names())})
    if left:
        raise typer.Exit(1)


def gc(
    store: Folder,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Remove the files; default: only show what would be removed.")
    ] = False,
    unused: Annotated[
        bool, typer.Option("--unused", help="Also remove runs that no grid of this store names.")
    ] = False,
    as_json: c.AsJson = False,
) -> None:
    """Remove leftovers of killed processes: drafts, stale locks, old checkpoints and logs. Finished runs stay (see --unused).

    Example: lofit-lens store gc runs/grid --yes
    """
    from lofit_lens.experiments.store.checks import collect_garbage

    c.console.stderr = as_json
    kept = _opened(store)
    paths = [str(p.relative_to(kept.root)) for p in collect_garbage(kept, dry_run=not yes, unused=unused)]
    for path in paths:
        _say(f"{'removed' if yes else 'would remove'} {path}")
    _say(
        f"{len(paths)} {'removed' if yes else 'to remove'}"
        + ("; add --yes to remove them" if paths and not yes else "")
    )
    if as_json:
        c.print_json({"removed" if yes else "would_remove": paths})


def index(store: Folder, as_json: c.AsJson = False) -> None:
    """Rebuild the table of runs from their folders: STORE/index.parquet, for pandas and others.

    Example: lofit-lens store index runs/grid
    """
    c.console.stderr = as_json
    kept = _opened(store)
    table = kept.index()
    _say(f"wrote {kept.root / 'index.parquet'}: {len(table)} runs, columns {', '.join(table.columns)}")
    if as_json:
        c.print_json(_records(table))


VERBS: dict[str, Callable[..., None]] = {"list": list_runs, "verify": verify, "gc": gc, "index": index}
for _name, _verb in VERBS.items():
    app.command(_name)(c.guarded(_verb))


def _opened(folder: Path) -> "Store":
    from lofit_lens.experiments.store.store import Store

    return Store(folder, create=False)


def _records(table: Any) -> list[dict[str, Any]]:
    """One dict per run, with None for missing values."""
    import json

    return json.loads(table.to_json(orient="records", double_precision=15))


def _plain(text: Any) -> str:
    from rich.markup import escape

    return escape(str(text))


def _say(line: str) -> None:
    c.console.print(line, markup=False, soft_wrap=True)
