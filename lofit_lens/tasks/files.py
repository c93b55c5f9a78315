"""A task from one file of your own: which columns are read, and which rows are for training and which for testing.

    load_task("capitals.csv", columns={"prompt": "Q: {question}\\nA:", "answer": " {label}", "aliases": ["also_1", "also_2"]})

Rows hold what `Task.from_records` takes, and optionally a `split`.
"""

import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.checks import shown
from lofit_lens.errors import DataError, InputError, unknown
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import SPLITS, PairExample
from lofit_lens.tasks.fields import Row
from lofit_lens.tasks.rows import READ, fields_of_task, hashes_of
from lofit_lens.tasks.sources import FORMATS, read_rows

Columns = Mapping[str, str | Sequence[str]]

SPLIT = "split"
SPLIT_NAMES = {s: s for s in SPLITS} | {"validation": "val", "valid": "val", "dev": "val"}
SEVERAL = ("aliases", "options", "chosen", "rejected")  # fields that may hold several texts
LISTS = ("aliases", "options")  # fields that are lists even if they hold one text
NESTED = ("messages", "positions")  # fields that hold lists
SEED = 0  # for the division into splits
_NAMED = re.compile(r"\{([^{}]+)\}")

log = logging.getLogger(__name__)


def is_task_file(name: str | Path) -> bool:
    """Whether a name means a file: it has a file's ending, or such a file exists."""
    return Path(name).suffix in FORMATS or Path(name).is_file()


def task_of_file(path: str | Path, columns: Columns | None = None) -> Task:
    """Read a task from one file; its name is the file's name without the ending.

    A .json file may also hold the splits by name, `{"train": [...], "val": [...], "test": [...]}`. Rows without a split are
    divided by prompt: a tenth for testing, a tenth for validation, the others for training, drawn with seed 0. Rows with the
    same prompt stay together. `counted` reports the division, and `data_hash` covers the rows of each split.

    Args:
        path: a .jsonl, .json, .csv (with a header line) or .parquet file.
        columns: field -> the column that holds it, or a text with columns in braces, e.g. `"Q: {question}"`. For `aliases`,
            `options`, `chosen` and `rejected` it may be a list of these, whose empty cells are skipped. A field that is not
            named is read from the column of its own name. A list in one CSV cell is written as JSON.

    Raises:
        InputError: an unknown field, or invalid `columns`.
        DataError: a file that is unreadable, not UTF-8, empty or damaged, bad rows, a missing column, an unknown split, or no
            training or test rows. Names file, row and column.
    """
    path, columns = Path(path), _checked(columns)
    by_split = _by_split(path)
    mapped = {s: [(where, _read(where, row, columns, path)) for where, row in rows] for s, rows in by_split.items()}
    _check_fields(path, next(row for rows in mapped.values() for _, row in rows))
    rows, counted = _divided(path, mapped[""]) if "" in mapped else (mapped, {})
    if missing := [s for s in ("train", "test") if not rows.get(s)]:
        have = ", ".join(s for s in SPLITS if rows.get(s))
        raise DataError(
            f"{path} has rows for {have} and none for {missing[0]}; a task needs train and test. Mark rows as {missing[0]}, or "
            "omit the split to have them divided"
        )
    made = fields_of_task(path.stem, {s: rows[s] for s in SPLITS if s in rows}, source=str(path), hashes={})
    hashes = hashes_of({s: [row for _, row in listed] for s, listed in rows.items()})
    task = Task(**made | {"hashes": hashes, "counted": counted | made["counted"]})
    _warn_of_missing_space(path, task)
    return task


def _checked(columns: Columns | None) -> dict[str, tuple[str, ...]]:
    """Field -> its columns."""
    if not isinstance(columns, Mapping | None):
        raise InputError(f"columns is {shown(columns)}; give field -> column, e.g. {{'prompt': 'question'}}")
    found = {}
    for field, named in (columns or {}).items():
        if field not in (*READ, SPLIT):
            raise unknown("field", field, (*READ, SPLIT))
        several = (named,) if isinstance(named, str) else tuple(named) if isinstance(named, list | tuple) else ()
        if not several or not all(isinstance(n, str) and n for n in several):
            raise InputError(f"columns: {field} is {shown(named)}; give the name of a column")
        if len(several) > 1 and field not in SEVERAL:
            raise InputError(
                f"columns: {field} takes one column, got {', '.join(several)}; {', '.join(SEVERAL)} take several"
            )
        found[field] = several
    return found


def _by_split(path: Path) -> dict[str, list[Row]]:
    """Rows of each split; under "" if the file does not hold them by split."""
    found = io.read_json(path) if path.suffix == ".json" else None
    if not isinstance(found, Mapping):
        return {"": read_rows(path)}
    by_split: dict[str, list[Row]] = {}
    for name, listed in found.items():
        split = SPLIT_NAMES.get(name)
        if split is None or split in by_split:
            raise DataError(
                f"{path} holds {', '.join(map(repr, found))}; give a list of rows, or {', '.join(SPLITS)}, each once"
            )
        if not isinstance(listed, list):
            raise DataError(f"{path}: {name!r} is a {type(listed).__name__}; it must be a list of rows")
        by_split[split] = [(f"{path}: {name} row {i + 1}", row) for i, row in enumerate(listed)]
    if not any(by_split.values()):
        raise DataError(f"{path} is empty; it needs at least one row")
    return by_split


def _read(where: str, row: Any, columns: Mapping[str, tuple[str, ...]], path: Path) -> dict[str, Any]:
    """A row as field -> value."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a record, got {type(row).__name__}")
    given = dict(row)
    if path.suffix == ".csv":
        named = {m for f in (*SEVERAL, *NESTED) for n in columns.get(f, (f,)) for m in (n, *_NAMED.findall(n))}
        given |= {n: _cell(where, n, given[n]) for n in named if n in given}
        columns = {field: (field,) for field in LISTS if field in given} | {**columns}
    made = {k: v for k, v in given.items() if k not in columns}
    for field, several in columns.items():
        found = [_value(where, given, field, name) for name in several]
        if len(found) > 1 or field in LISTS:
            each = [text for one in found for text in (one if isinstance(one, list) else [one])]
            made[field] = [text for text in each if not _is_empty(text)]
        else:
            made[field] = found[0]
        if field != "aliases" and _is_empty(made[field]):
            raise DataError(
                f"{where}: column {', '.join(map(repr, several))} ({field}) is empty; fill it, or remove the row"
            )
    return made


def _cell(where: str, column: str, cell: Any) -> Any:
    """A cell of CSV that may be a list, written as JSON."""
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except ValueError as e:
        raise DataError(
            f"{where}: column {column!r} begins as a list but is not JSON ({e}): {cell[:60]!r}; write a list as "
            '["one", "two"], or in several columns'
        ) from e


def _value(where: str, row: Mapping[str, Any], field: str, column: str) -> Any:
    """The value of a column, or of a text with columns in braces."""
    if column in row:
        return row[column]
    names = _NAMED.findall(column)
    if missing := [n for n in names or [column] if n not in row]:
        raise DataError(f"{where}: no column {missing[0]!r} ({field}); the columns are {', '.join(map(str, row))}")
    values = {n: row[n] for n in names}
    for name, value in values.items():
        if _is_empty(value):
            return None
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str | int) and not isinstance(v, bool) for v in listed):
            raise DataError(
                f"{where}: column {name!r} ({field}) is {shown(value)}; only texts and whole numbers can be inserted"
            )
    lists = [n for n in values if isinstance(values[n], list)]
    if len(lists) > 1:
        raise DataError(f"{where}: {', '.join(lists)} are lists ({field}); a text can contain only one list")
    each = [values | {lists[0]: v} for v in values[lists[0]]] if lists else [values]
    texts = [_filled(column, one) for one in each]
    return texts if lists else texts[0]


def _filled(text: str, values: Mapping[str, Any]) -> str:
    return _NAMED.sub(lambda found: str(values[found[1]]), text)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or value == [] or (isinstance(value, str) and not value.strip())


def _check_fields(path: Path, row: Mapping[str, Any]) -> None:
    """Raise DataError for a file without a required field, and tell how to name its column."""
    needed = ["chosen", "rejected"] if {"chosen", "rejected"} & row.keys() else ["answer"]
    missing = [] if {"prompt", "messages"} & row.keys() else ["prompt"]
    if "messages" not in row:  # whose last one may be the answer
        missing += [field for field in needed if field not in row]
    if missing:
        raise DataError(
            f"{path} has no column {missing[0]!r}; its first row has {', '.join(map(str, row))}. Say which one stands for it: "
            f"columns={{{missing[0]!r}: ...}}, on the shell --column {missing[0]}=..."
        )


def _divided(path: Path, rows: Sequence[Row]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Rows by the split that they name, or by a draw; and how many were drawn."""
    if any(SPLIT in row for _, row in rows):
        named: dict[str, list[Row]] = {}
        for where, row in rows:
            split = SPLIT_NAMES.get(str(row.get(SPLIT)).strip().lower())
            if split is None:
                raise DataError(f"{where}: split is {shown(row.get(SPLIT))}; allowed: {', '.join(SPLIT_NAMES)}")
            named.setdefault(split, []).append((where, row))
        return named, {}
    prompts = [" ".join(str(row.get("prompt", row.get("messages"))).split()) for _, row in rows]
    once = list(dict.fromkeys(prompts))
    if len(once) < len(SPLITS):
        raise DataError(
            f"{path} has {len(once)} different prompt(s), too few to be divided into train, val and test; give at least three, "
            "or a column split"
        )
    tenth = max(1, round(len(once) / 10))
    drawn = random.Random(SEED).sample(once, 2 * tenth)
    of = dict.fromkeys(once, "train") | dict.fromkeys(drawn[:tenth], "test") | dict.fromkeys(drawn[tenth:], "val")
    divided = {s: [row for prompt, row in zip(prompts, rows, strict=True) if of[prompt] == s] for s in SPLITS}
    return divided, {f"rows without a split, divided 80/10/10 by prompt with seed {SEED}": len(rows)}


def _warn_of_missing_space(path: Path, task: Task) -> None:
    """Warn if no answer is separated from its prompt: tables mostly lack the space between them."""
    rows = [(e.prompt, e.chosen if isinstance(e, PairExample) else e.answer) for e in task.training["train"]]
    joined = [(p, a) for p, a in rows if re.match(r"[A-Za-z0-9.:?!,][A-Za-z0-9]", p[-1:] + a[:1])]
    if task.chat is None and len(joined) == len(rows):
        prompt, answer = joined[0]
        log.warning(
            "%s: every answer follows its prompt without a space, as in %r; unless they go through a chat template, add "
            "the space as columns={'answer': ' {answer}'} (--column 'answer= {answer}')", path, prompt[-20:] + answer[:20],
        )  # fmt: skip
