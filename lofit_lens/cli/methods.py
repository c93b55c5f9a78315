"""The table of `lofit-lens compare --task`: methods or head selectors compared."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lofit_lens.cli import common as c

if TYPE_CHECKING:
    from lofit_lens.experiments.grid.specs import ModelSpec
    from lofit_lens.experiments.tables.table import MethodTable
    from lofit_lens.tasks import Task


@dataclass(frozen=True)
class Comparison:
    """Settings of a comparison; see the verb's options.

    Attributes:
        tasks: loaded tasks.
        methods: names of rows, or of selectors; None = all.
        selectors: whether to compare head selectors.
        texts: texts for damage; empty = not measured.
    """

    model: "ModelSpec"
    tasks: "Sequence[Task]"
    methods: Sequence[str] | None
    selectors: bool
    seeds: int
    texts: Sequence[str]
    limit: int | None
    n_train: int | None
    workers: int
    device: str | None
    out: Path
    quiet: bool


def compare_on_tasks(asked: Comparison) -> "dict[str, MethodTable]":
    """Run the comparison, print one table per task, and write the files."""
    c.quiet_libraries()
    from lofit_lens.experiments.comparison import compare_methods, compare_selectors

    start = time.perf_counter()
    names = _named(asked)
    c.check_writable(asked.out)
    shared: dict[str, Any] = {
        "seeds": range(asked.seeds), "limit": asked.limit, "n_train": asked.n_train, "device": asked.device, "out": asked.out,
        "workers": workers_for(asked.workers, asked.model.name, asked.device), "progress": not asked.quiet,
    }  # fmt: skip
    tables = {}
    for task in asked.tasks:
        with c.progress_lines(asked.quiet):
            if asked.selectors:
                table = compare_selectors(asked.model, task, selectors=names, **shared)
            else:
                table = compare_methods(asked.model, task, methods=names, texts=asked.texts, **shared)
        files = table.save(asked.out, stem=_stem(table, asked.selectors))
        _print(table)
        c.console.print(f"wrote {', '.join(f.name for f in files)} into {asked.out}\n")
        tables[task.name] = table
    c.console.print(f"{time.perf_counter() - start:.0f} s")
    return tables


def _named(asked: Comparison) -> list[str] | None:
    """Requested rows or selectors in the table's order, with LoFiT 3 % among the rows; None = all."""
    from lofit_lens.errors import unknown
    from lofit_lens.experiments.comparison import METHODS, REFERENCE, SELECTORS, rows_of

    if asked.methods is None:
        return None
    known = SELECTORS if asked.selectors else rows_of(METHODS.values())
    for name in asked.methods:
        if name not in known:
            raise unknown("selector" if asked.selectors else "method", name, known)
    return [name for name in known if name in {REFERENCE, *asked.methods}]


def workers_for(workers: int, model: str, device: str | None) -> int:
    """Number of workers; 0 = one per core on the CPU, but only one on a GPU or for a model that is not small."""
    import os

    from lofit_lens.models import parse_device

    if workers:
        return workers
    on_cpu = parse_device(device).type == "cpu"
    return (os.cpu_count() or 1) if on_cpu and model == "organism" else 1


def task_names(given: Sequence[str]) -> list[str]:
    """Task names; `organism/all` (or `organism/...`) stands for its three tasks."""
    from lofit_lens.organism.words import TASKS

    every = [f"organism/{t}" for t in TASKS]
    listed = [n for name in given for n in (every if name in ("organism/all", "organism/...") else [name])]
    return list(dict.fromkeys(listed))


def ordinary_texts(given: str | None, model: str, n: int) -> list[str]:
    """The first `n` of the named texts; by default the embedded model's own, else wikitext; `none` = no texts."""
    from lofit_lens.evaluation.texts import load_texts

    if given == "none":
        return []
    return list(islice(load_texts(given or ("organism" if model == "organism" else "wikitext")), n))


def _stem(table: "MethodTable", selectors: bool) -> str:
    return table.task.replace("/", "-").replace(":", "-") + ("-selectors" if selectors else "")


def _print(table: "MethodTable") -> None:
    """Print narrow tables: metrics, cost and damage of each method."""
    import re

    from rich.table import Table

    columns, cells = table.columns(), table.cells()
    n = 2 + len(table.metrics)
    parts = {table.title(): [0, 2, n, n + 1], "cost": [0, 1, n + 2, n + 3], "damage": [0, *range(n + 4, len(columns))]}
    for title, wanted in parts.items():
        if len(wanted) == 1:
            continue
        shown = Table(title=title, title_justify="left")
        for i in wanted:
            shown.add_column(columns[i], justify="left" if i == 0 else "right")
        for row in cells:
            shown.add_row(*(re.sub(r"(?<![\d.])0\.", ".", row[i]) for i in wanted))
        c.console.print(shown)
    for note in table.notes():
        c.console.print(note, style="dim")
