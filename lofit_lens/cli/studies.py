"""Shared by the verbs that run a study: its options, and running it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lofit_lens.cli import common as c

Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", "-t", help="Tasks of the study; repeat it. organism/all: the embedded model's three."),
]
Seeds = Annotated[int, typer.Option("--seeds", help="Number of seeds (0, 1, ...).", min=1)]
Draws = Annotated[int, typer.Option("--draws", help="Draws of random heads.", min=1)]
Limit = Annotated[int | None, typer.Option("--limit", help="Use only the first test rows.", min=1)]
Grids = Annotated[
    list[str] | None,
    typer.Option("--grid", help="Use only this grid of RESULTS (lofit-lens store list shows them); may be repeated."),
]
Workers = Annotated[
    int, typer.Option("--workers", help="Processes; 0 = one per core (embedded model on the CPU).", min=0)
]


@dataclass(frozen=True)
class Study:
    """Settings of a study; see the verb's options."""

    results: Path
    how: c.ModelOptions
    tasks: Sequence[str]
    seeds: int
    draws: int
    limit: int | None
    parts: Sequence[str] | None
    texts: str | None
    data_dir: Path | None
    column: Sequence[str] | None
    chat: bool
    system: str | None
    workers: int
    quiet: bool
    tune: bool = False
    others: Sequence[str] | None = None
    readings: bool = False


def run(asked: Study, name: str) -> None:
    """Run the missing parts of the study, a grid of that name (and of its parts), and the readings of its adapters."""
    c.quiet_libraries()
    from lofit_lens.cli.grids import report
    from lofit_lens.cli.methods import task_names, workers_for
    from lofit_lens.experiments.grid.paper import paper_grid
    from lofit_lens.experiments.grid.run import run_grid
    from lofit_lens.organism.words import TASKS
    from lofit_lens.tasks.files import is_task_file

    names = task_names(asked.tasks)
    parts = asked.parts or ["all"]
    embedded = [n for n in names if n.removeprefix("organism/") in TASKS]
    others = (asked.others or [f"{n}-cued" for n in embedded]) if {"table5", "all"} & set(parts) else []
    columns = c.columns_by_task([*names, *others], asked.column)
    tasks, rest = (
        [
            c.TaskOptions(
                n,
                data_dir=None if n in embedded or is_task_file(n) else asked.data_dir,
                chat=asked.chat,
                system=asked.system,
                column=columns[n],
            ).opened()
            for n in listed
        ]
        for listed in (names, others)
    )
    c.say_template_of([(asked.how.model, asked.how.revision)], used=any(task.chat is not None for task in tasks))
    source = asked.texts or ("organism" if embedded else "none")
    # LoRA needs the bridge: all parts run on that class, so that runs are shared.
    how = asked.how if asked.how.backend != "auto" else replace(asked.how, backend="bridge")
    grid = paper_grid(
        parts, name=" ".join([name, *(asked.parts or ())]), model=how.spec(), tasks=[_spec(t) for t in tasks],
        other_tasks=[_spec(t) for t in rest], texts=None if source == "none" else source, seeds=range(asked.seeds),
        draws=asked.draws, limit=asked.limit, tune=asked.tune, readings=asked.readings,
    )  # fmt: skip
    workers = workers_for(asked.workers, how.model, how.device)
    with c.progress_lines(asked.quiet):
        found = run_grid(
            grid, asked.results, tasks=tasks, other_tasks=rest, workers=workers, device=how.device, progress=not asked.quiet
        )  # fmt: skip
    report(found, asked.results)


def _spec(task: Any) -> Any:
    """A task as a grid's spec."""
    from lofit_lens.experiments.grid.specs import TaskSpec

    chat = task.chat
    return TaskSpec(
        name=task.name.partition(":chat")[0], chat=chat is not None, system=None if chat is None else chat.system
    )


def print_files(files: Sequence[Path], out: Path) -> None:
    """Print which files were written, by kind."""
    kinds: dict[str, int] = {}
    for f in files:
        kinds[f.suffix[1:]] = kinds.get(f.suffix[1:], 0) + 1
    c.console.print(f"wrote {', '.join(f'{n} {kind}' for kind, n in kinds.items())} into {out}")


def print_table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> None:
    """Print a table."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(str(column), justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*map(str, row))
    c.console.print(shown)
    for note in notes:
        c.console.print(note, style="dim")
