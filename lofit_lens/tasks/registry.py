"""Names of tasks, and the loader of each."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lofit_lens.checks import check_is
from lofit_lens.errors import InputError, unknown
from lofit_lens.tasks import clutrr, instruction, knowledge, mquake, truthfulqa
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import SPLITS
from lofit_lens.tasks.fields import file_hashes
from lofit_lens.tasks.files import Columns, is_task_file, task_of_file
from lofit_lens.tasks.rows import fields_of_task
from lofit_lens.tasks.sources import read_rows

NEEDED = {"train", "test"}  # splits of a task folder

log = logging.getLogger(__name__)


Loader = Callable[[int | None, str | Path | None, str | None], Task]  # fold, data_dir and source, as in `load_task`


def _plain(name: str, load: Callable[[str | Path | None], Task]) -> Loader:
    """A task without folds and with one source."""

    def loader(fold: int | None, data_dir: str | Path | None, source: str | None) -> Task:
        _none_given(name, fold, source)
        return load(data_dir)

    return loader


def _instruction(name: str) -> Loader:
    def loader(fold: int | None, data_dir: str | Path | None, source: str | None) -> Task:
        _none_given(name, fold, None)
        return instruction.load(name, data_dir, source or "files")

    return loader


def _truthfulqa(fold: int | None, data_dir: str | Path | None, source: str | None) -> Task:
    _none_given("truthfulqa", None, source)
    return truthfulqa.load(fold, data_dir)


def _mquake(fold: int | None, data_dir: str | Path | None, source: str | None) -> Task:
    _none_given("mquake", fold, None)
    return mquake.load(data_dir, source or "files")


def _none_given(name: str, fold: int | None, source: str | None) -> None:
    """Refuse a fold or a source for a task that offers no choice."""
    if fold is not None:
        raise InputError(f"{name} has no folds; leave fold out (got {fold})")
    if source is not None:
        raise InputError(f"{name} has only one source; leave source out (got {source!r})")


def _embedded(name: str) -> Loader:
    """A task of the embedded model; its module imports this one and registers the task when it is imported."""

    def loader(fold: int | None, data_dir: str | Path | None, source: str | None) -> Task:
        importlib.import_module("lofit_lens.organism.tasks")
        return TASKS[name](fold, data_dir, source)

    return loader


TASKS: dict[str, Loader] = {
    "truthfulqa": _truthfulqa,
    "mquake": _mquake,
    "clutrr": _plain("clutrr", clutrr.load),
    **{name: _instruction(name) for name in instruction.SPECS},
    "triviaqa": _plain("triviaqa", knowledge.load_triviaqa),
    "nq": _plain("nq", knowledge.load_nq),
    "mmlu": _plain("mmlu", knowledge.load_mmlu),
    **{
        f"organism/{t}{cued}": _embedded(f"organism/{t}{cued}")
        for t in ("truth", "kinship", "edits")
        for cued in ("", "-cued")
    },
}


def register(name: str, load: Callable[[str | Path | None], Task]) -> None:
    """Register a task without folds, so that `load_task` finds it under a name."""
    TASKS[name] = _plain(name, load)


def load_task(
    name: str | Path,
    *,
    fold: int | None = None,
    data_dir: str | Path | None = None,
    source: str | None = None,
    form: str | None = None,
    columns: Columns | None = None,
) -> Task:
    """Read a task.

    Args:
        name: `"truthfulqa"`, `"mquake"`, `"clutrr"`, `"siqa"`, `"arc_challenge"`, `"boolq"`, `"svamp"`; for evaluation only
            `"triviaqa"`, `"nq"`, `"mmlu"`; embedded `"organism/truth"`, `"organism/kinship"`, `"organism/edits"`; or your own
            data, whose rows hold what `Task.from_records` takes: a folder with `train.jsonl`, `test.jsonl` and optionally
            `val.jsonl`, or one file (.jsonl, .json, .csv or .parquet). Without a column `split`, a tenth of a file's prompts is
            for testing, a tenth for validation, and the others for training, drawn with seed 0. For a folder with the name of a
            built-in task, give a `Path` or `"./mquake"`.
        fold: 0 or 1, TruthfulQA only (also written `"truthfulqa:1"`).
        data_dir: folder with the files; None fetches the pinned public files.
        source: `"files"` (instruction files, the default) or `"hub"` (the original data set): SIQA, ARC-Challenge, BoolQ, SVAMP.
            MQuAKE takes `"files"` (all rows), `"unflagged"` (without rows that MQuAKE-Remastered changed) or `"flagged-apart"`
            (these rows as a separate group); the last two need `MQuAKE-Remastered-CF-3k.json` in `data_dir`.
        form: how questions are asked, if there are several ways: `"choices"`, `"generation"` or `"binary"` (TruthfulQA),
            `"generation"` or `"options"` (SIQA, ARC-Challenge, BoolQ). None = the first.
        columns: for a task in one file: field -> its column, e.g. `{"prompt": "question", "answer": "label"}`, or a text with
            columns in braces, `"Q: {question}"`. For `aliases`, `options`, `chosen` and `rejected` it may be a list of these. A
            field that is not named is read from the column of its own name.

    Raises:
        InputError: unknown task, fold, source, form or field.
        DataError: missing or empty files, or bad rows; names file, row and column.

    Examples:
        >>> load_task("organism/truth").metric
        'mc1'
    """
    check_is(name, (str, Path), "name", "the name of a task, or a folder")
    text, folder = str(name), Path(name)
    if text.startswith("truthfulqa:"):
        text, _, number = text.partition(":")
        if fold is not None and str(fold) != number:
            raise InputError(f"two folds given: {name} and fold={fold}; give one")
        fold = int(number) if number.isdigit() else -1
    if folder.is_dir() and (text not in TASKS or isinstance(name, Path)):
        if fold is not None or data_dir is not None or source is not None:
            raise InputError(f"{text} is your own task folder: it takes no fold, no data_dir and no source")
        _no_columns(text, columns)
        task = _from_folder(folder)
    elif is_task_file(name) and (text not in TASKS or isinstance(name, Path)):
        if fold is not None or data_dir is not None or source is not None:
            raise InputError(f"{text} is your own task file: it takes no fold, no data_dir and no source")
        task = task_of_file(name, columns)
    elif text not in TASKS:
        raise unknown("task", text, TASKS, hint="Or give a folder, or a .jsonl, .json or .csv file.")
    else:
        _no_columns(text, columns)
        if fold is None and data_dir is None and source is None and _rows_in(folder).keys() >= NEEDED:
            log.warning(
                "%s is the built-in task, and the folder ./%s is not read; give ./%s for your own task in it, or data_dir "
                "(--data-dir) if it holds the built-in task's files", text, text, text,
            )  # fmt: skip
        task = TASKS[text](fold, data_dir, source)
    if form == truthfulqa.BINARY and task.family == "truthfulqa" and text in TASKS:
        task = truthfulqa.with_binary(task, data_dir)
    return task if form is None else task.in_form(form)


def _no_columns(name: str, columns: Columns | None) -> None:
    if columns:
        raise InputError(
            f"columns are for a task in one file, and {name} is not a file; omit them, or give a .jsonl, .json or .csv file"
        )


def task_of(task: Any) -> Task:
    """Return a task unchanged, or load the one of that name (see `load_task`).

    Raises:
        InputError: neither a task nor the name of a task.
        DataError: as in `load_task`.
    """
    if isinstance(task, Task):
        return task
    check_is(task, (str, Path), "task", "a task (load_task, Task.from_records) or the name of one, e.g. 'mquake'")
    return load_task(task)


def _rows_in(folder: Path) -> dict[str, Path]:
    return {s: folder / f"{s}.jsonl" for s in SPLITS if (folder / f"{s}.jsonl").is_file()}


def _from_folder(folder: Path) -> Task:
    paths = _rows_in(folder)
    if not paths.keys() >= NEEDED:
        raise InputError(f"{folder} is not a task folder: it needs train.jsonl and test.jsonl")
    rows = {s: read_rows(p) for s, p in paths.items()}
    return Task(**fields_of_task(folder.name, rows, source=str(folder), hashes=file_hashes(paths)))
