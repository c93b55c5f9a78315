"""What the verbs share that run a study: its options, and running it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
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
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first test rows.", min=1)]
N_TEXTS = 50  # ordinary texts
Workers = Annotated[
    int, typer.Option("--workers", help="Processes; 0 = one a core (embedded model on the CPU).", min=0)
]


@dataclass(frozen=True)
class Request:
    """What a verb was asked for; see its options."""

    results: Path
    model: str
    tasks: Sequence[str]
    seeds: int
    draws: int
    limit: int | None
    parts: Sequence[str] | None
    tune: bool
    others: Sequence[str] | None
    texts: str | None
    data_dir: Path | None
    backend: str
    dtype: str
    device: str | None
    revision: str | None
    workers: int
    readings: bool
    quiet: bool


def run(asked: Request) -> None:
    """Run what is missing of the study, and what is read from its adapters."""
    c.quiet_libraries()
    os.environ["PYTHONWARNINGS"] = "ignore"  # for the worker processes
    from lofit_lens.analysis.readings import run_readings
    from lofit_lens.cli.methods import task_names, workers_for
    from lofit_lens.evaluation.texts import load_texts
    from lofit_lens.experiments.plan import PARTS, Plan
    from lofit_lens.experiments.study import run_study
    from lofit_lens.organism.words import TASKS

    plan = Plan(
        seeds=tuple(range(asked.seeds)), extra_seeds=tuple(range(asked.seeds, max(4, asked.seeds))), draws=asked.draws,
        limit=asked.limit, parts=tuple(asked.parts or PARTS), tune=asked.tune,
    )  # fmt: skip
    names = task_names(asked.tasks)
    embedded = [n for n in names if n.removeprefix("organism/") in TASKS]
    others = (asked.others or [f"{n}-cued" for n in embedded]) if "other tasks" in plan.parts else []
    tasks, rest = ([c.open_task(n, fold=None, data_dir=asked.data_dir if n not in embedded else None) for n in listed]
                   for listed in (names, others))  # fmt: skip
    source = asked.texts or ("organism" if embedded else "none")
    texts = [] if source == "none" else list(islice(load_texts(source), N_TEXTS))
    workers = workers_for(asked.workers, asked.model, asked.device)
    # LoRA needs the bridge: with it in the study, every method runs on that class.
    backend = "bridge" if asked.backend == "auto" and "methods" in plan.parts else asked.backend
    run_study(
        asked.model, tasks, out=asked.results, plan=plan, texts=texts, other_tasks=rest, batch_size=64 if embedded else 16,
        workers=workers, backend=backend, dtype=asked.dtype, device=asked.device, revision=asked.revision,
        progress=not asked.quiet,
    )  # fmt: skip
    if asked.readings:
        run_readings(
            asked.model, tasks, out=asked.results, other_tasks=rest, texts=texts, draws=asked.draws, workers=workers,
            backend=backend, dtype=asked.dtype, device=asked.device, revision=asked.revision, progress=not asked.quiet,
        )  # fmt: skip


def print_files(files: Sequence[Path], out: Path) -> None:
    """Say what was written, by kind."""
    kinds: dict[str, int] = {}
    for f in files:
        kinds[f.suffix[1:]] = kinds.get(f.suffix[1:], 0) + 1
    c.console.print(f"wrote {', '.join(f'{n} {kind}' for kind, n in kinds.items())} into {out}")


def print_table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> None:
    """A table on the screen."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(str(column), justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*map(str, row))
    c.console.print(shown)
    for note in notes:
        c.console.print(note, style="dim")
