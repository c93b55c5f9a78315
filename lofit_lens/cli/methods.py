"""The table of `lofit-lens compare --task`: methods, or head selectors, side by side."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lofit_lens.cli import common as c

if TYPE_CHECKING:
    from lofit_lens.experiments.tables.table import MethodTable


@dataclass(frozen=True)
class Request:
    """What the verb was asked for; see its options."""

    tasks: Sequence[str]
    how: c.ModelOptions
    methods: Sequence[str] | None
    selectors: bool
    seeds: int
    texts: str | None
    n_texts: int
    limit: int | None
    n_train: int | None
    fold: int | None
    data_dir: Path | None
    source: str | None
    form: str | None
    chat: bool
    system: str | None
    workers: int
    out: Path
    quiet: bool


def compare_on_tasks(asked: Request) -> "dict[str, MethodTable]":
    """Run the comparison, print a table a task, and write the files."""
    c.quiet_libraries()
    from lofit_lens.experiments.comparison import compare_tasks, selector_names
    from lofit_lens.experiments.methods import LEARNED
    from lofit_lens.models import planned_tokenizer

    start = time.perf_counter()
    tasks = [_task(asked, name) for name in task_names(asked.tasks)]
    chat = any(task.chat is not None for task in tasks)
    c.say_template_of([(asked.how.model, asked.how.revision)], used=chat)
    if chat:
        tokenizer = planned_tokenizer(asked.how.model, revision=asked.how.revision)
        tasks = [task.asked_of(tokenizer) for task in tasks]
    names = selector_names(asked.methods) if asked.selectors else _methods(asked.methods)
    texts = [] if asked.selectors else list(islice(_texts(asked), asked.n_texts))
    c.check_writable(asked.out)
    tables = compare_tasks(
        asked.how.model, tasks, methods=names, settings={n: {} for n in names} if asked.selectors else None,
        seeds=range(asked.seeds), limit=asked.limit, n_train=asked.n_train, texts=texts,
        reference=names[0] if asked.selectors else LEARNED,
        workers=workers_for(asked.workers, asked.how.model, asked.how.device), out=asked.out, **asked.how.load(),
        progress=not asked.quiet,
    )  # fmt: skip
    saved = [table.save(asked.out, stem=_stem(table, asked.selectors)) for table in tables.values()]
    for table, files in zip(tables.values(), saved, strict=True):
        _print(table)
        c.console.print(f"wrote {', '.join(f.name for f in files)} into {asked.out}\n")
    c.console.print(f"{time.perf_counter() - start:.0f} s")
    return tables


def _methods(asked: Sequence[str] | None) -> list[str]:
    """Those asked for and LoFiT 3 %, in the table's order; None = all."""
    from lofit_lens.experiments.methods import LEARNED, METHODS, method_of

    if asked is None:
        return list(METHODS)
    wanted = {LEARNED, *(method_of(name).name for name in asked)}
    return [name for name in METHODS if name in wanted]


def workers_for(workers: int, model: str, device: str | None) -> int:
    """As asked; 0 = one a core on the CPU, one alone on a GPU or for a model that is not small."""
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


def _task(asked: Request, name: str) -> Any:
    return c.TaskOptions(name, asked.fold, asked.data_dir, asked.source, asked.chat, asked.system).opened(asked.form)


def _texts(asked: Request) -> Iterable[str]:
    from lofit_lens.evaluation.texts import load_texts

    if asked.texts == "none":
        return ()
    return load_texts(asked.texts or ("organism" if asked.how.model == "organism" else "wikitext"))


def _stem(table: "MethodTable", selectors: bool) -> str:
    return table.task.replace("/", "-").replace(":", "-") + ("-selectors" if selectors else "")


def _print(table: "MethodTable") -> None:
    """Narrow tables: what a method reaches, what it costs, what it harms."""
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
