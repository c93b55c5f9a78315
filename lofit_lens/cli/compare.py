"""lofit-lens compare: two evaluations with a paired test, or several methods on a task."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lofit_lens.cli import common as c

if TYPE_CHECKING:
    from lofit_lens.evaluation import EvalResult

TESTS = ("bootstrap", "permutation")


def compare(
    how: c.ModelOptions,
    first: Annotated[str | None, typer.Argument(help="Folder that eval --out wrote; several seeds: FOLDER,FOLDER.")] = None,
    second: Annotated[str | None, typer.Argument(help="Folder to compare with, of the same task and rows.")] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="Folders: only this metric; may be repeated.")] = None,
    test: Annotated[str, typer.Option("--test", help="Folders: bootstrap (the paper's) or permutation.")] = "bootstrap",
    alternative: Annotated[
        str, typer.Option("--alternative", help="Folders: two-sided, greater (first above second) or less.")
    ] = "two-sided",
    seed: Annotated[int, typer.Option(
        "--seed", help="Folders: seed of the resampling.", min=0, max=c.LARGEST_SEED
    )] = 0,
    task: Annotated[list[str] | None, typer.Option(
        "--task", "-t", help="Compare methods on this task instead; may be repeated. organism/all: the embedded model's three."
    )] = None,
    method: Annotated[list[str] | None, typer.Option(
        "--method", help="Methods: only this one (and LoFiT 3 %), or with --selectors this selector; may be repeated."
    )] = None,
    selectors: Annotated[bool, typer.Option("--selectors", help="Compare head selectors instead of methods.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", help="Methods: number of seeds (0, 1, ...).", min=1)] = 2,
    texts: Annotated[str | None, typer.Option(
        "--texts", help="Methods: ordinary text for damage: wikitext, organism, a file, or none; default: the model's own."
    )] = None,
    n_texts: Annotated[int, typer.Option("--n-texts", help="Methods: number of texts.", min=1)] = 100,
    limit: Annotated[int | None, typer.Option("--limit", help="Methods: use only the first test rows.")] = None,
    n_train: c.NTrain = None,
    fold: c.Fold = None,
    data_dir: c.DataDir = None,
    source: c.Source = None,
    column: c.Column = None,
    form: c.Form = None,
    chat: c.IsChat = False,
    system: c.System = None,
    workers: Annotated[int, typer.Option("--workers", help="Methods: processes; 0 = one per core (embedded model).", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="Folders: JSON file. Methods: folder (default: runs/compare); finished runs in it are reused."
    )] = None,
    overwrite: c.Overwrite = False,
    quiet: c.Quiet = False,
    as_json: c.AsJson = False,
) -> None:  # fmt: skip
    """Test whether two evaluations of the same rows differ; or, with --task, LoFiT against the other methods.

    Examples: lofit-lens compare out/lofit out/bare
    and: lofit-lens compare --task organism/all --seeds 2
    """
    from lofit_lens.errors import InputError

    c.console.stderr = as_json
    if task:
        if first is not None:
            raise InputError(f"got the folder {first!r} and --task {task[0]}; give two folders, or --task")
        from lofit_lens.cli.methods import Comparison, compare_on_tasks, ordinary_texts, task_names
        from lofit_lens.models import planned_tokenizer

        columns = c.columns_by_task(task_names(task), column)
        opened = [c.TaskOptions(n, fold, data_dir, source, chat, system, of).opened(form) for n, of in columns.items()]
        if any(one.chat is not None for one in opened):
            opened = [one.asked_of(planned_tokenizer(how.model, revision=how.revision)) for one in opened]
        tables = compare_on_tasks(Comparison(
            model=how.spec(), device=how.device, tasks=opened, methods=method, selectors=selectors, seeds=seeds,
            texts=[] if selectors else ordinary_texts(texts, how.model, n_texts), limit=limit, n_train=n_train,
            workers=workers, out=out or Path("runs/compare"), quiet=quiet,
        ))  # fmt: skip
        if as_json:
            c.print_json({name: table.to_dict() for name, table in tables.items()})
        return
    if first is None or second is None:
        raise InputError(
            "nothing to compare: give two folders that eval --out wrote, or a task (--task organism/all) to compare methods on"
        )
    _compare_folders(first, second, metric, test, alternative, seed, out, overwrite, as_json)


def _compare_folders(
    first: str, second: str, metric: list[str] | None, test: str, alternative: str, seed: int, out: Path | None, overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    if out is not None:
        c.check_new(out, overwrite=overwrite, folder=False)
    from rich.table import Table

    from lofit_lens import io
    from lofit_lens.errors import unknown
    from lofit_lens.evaluation import compare as run
    from lofit_lens.evaluation.stats import paired_bootstrap_test, paired_permutation_test

    if test not in TESTS:
        raise unknown("test", test, TESTS)
    found = run(
        _read(first), _read(second), metrics=metric, alternative=alternative, seed=seed,
        test=paired_bootstrap_test if test == "bootstrap" else paired_permutation_test,
    )  # fmt: skip
    if out is not None:
        io.write_json(out, found.to_dict())
    table = Table(title=f"{found.labels[0]} against {found.labels[1]}: {found.task}", title_justify="left")
    for column in found.columns():
        table.add_column(column, overflow="fold", min_width=10 if column == "detectable" else None)
    for row in found.rows():
        table.add_row(*row)
    c.console.print(table)
    for note in found.notes():
        c.console.print(note, style="dim")
    if out is not None:
        c.console.print(f"wrote {out}")
    if as_json:
        c.print_json(found.to_dict())


def _read(folders: str) -> "list[EvalResult]":
    from lofit_lens.evaluation import EvalResult

    return [EvalResult.load(part.strip()) for part in folders.split(",") if part.strip()]
