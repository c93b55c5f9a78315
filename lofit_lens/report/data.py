"""What the report shows, as plain JSON-able data, checked before a page is built from it.

Every error names the place in the data (`sets[1].scores[0][3]`), what stands there, and what is allowed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lofit_lens.errors import InputError, unknown
from lofit_lens.heads import Head

Item = Callable[[Any, str], Any]
TOP = ("title", "model", "versions", "notes", "sets", "tables", "transfer", "heads", "attention")
# Scores are coloured and read, never ranked again: six digits keep the page small.
SCORE_DIGITS = 6
# Attention weights are drawn, not computed with: four decimals keep the page small.
ATTENTION_DECIMALS = 4


def checked(data: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of the report's data with every optional part filled in.

    Args:
        data: a mapping with these keys (only `title`, `model` and `sets` must be there):

            - `title`: text.
            - `model`: `name`, `class_name`, `n_layers`, `n_heads`, `revision` (or None).
            - `versions`: package -> version; `notes`: texts.
            - `sets`: head sets, each `id` (unique), `task`, `method`, `seed` (or None), `kind` (what the score is),
              `scores` `[n_layers][n_heads]` or None, `ranking` `[[layer, head], ...]` best first (may be only the best
              ones), `k` (usual K).
            - `tables`: each `title`, `columns`, `rows` (texts), `notes`.
            - `transfer`: None, or `tasks`, `sources` (whose heads; one row each), and one table `[sources][tasks]` each
              of `relative` (a ratio: 1.0 = as good as the task's own heads), `accuracy` (the task's metric, 0 to 1),
              `low` and `high` (interval of `accuracy`), `mark` (text, e.g. `"*"`), `p`; further `metric` and `n_items`
              by task, `n_seeds`. Numbers in the tables may be None (not measured).
            - `heads`: task -> head (`"L2H5"`) -> `norm_v` (or None), `promoted` and `suppressed` `[[token, logit], ...]`,
              `cosines` (name -> cosine), `without` (None, or `value`, `low`, `high`: change of the task's metric when
              the head is left out).
            - `attention`: task -> list of `prompt`, `tokens`, `heads` (`"L2H5"` -> weights `[destination][source]`).

    Raises:
        InputError: a missing or unknown key, a value of another type, shape or range, a number that is not finite, a head
            outside the model, two sets of one id, or no head set at all.
    """
    record = _record(data, "report data")
    for key in record:
        if key not in TOP:
            raise unknown("key of the report's data", key, TOP)
    model = _model(_get(record, "model", "report data"))
    shape = (model["n_layers"], model["n_heads"])
    sets = _list(_get(record, "sets", "report data"), "sets", lambda s, at: _head_set(s, at, shape))
    if not sets:
        raise InputError(
            "this report has no head set to show; select heads first (lofit-lens select, lofit-lens compare), then build it again"
        )
    for i, s in enumerate(sets):
        if s["id"] in [other["id"] for other in sets[:i]]:
            raise InputError(f"sets[{i}].id = {s['id']!r} is taken by another set; give every set its own id")
    transfer = record.get("transfer")
    return {
        "title": _text(_get(record, "title", "report data"), "title"),
        "model": model,
        "versions": _table_of(record.get("versions"), "versions", _text),
        "notes": _list(record.get("notes"), "notes", _text),
        "sets": sets,
        "tables": _list(record.get("tables"), "tables", _table),
        "transfer": None if transfer is None else _transfer(transfer),
        "heads": _table_of(
            record.get("heads"), "heads", lambda by_head, at: _by_head(by_head, at, shape, _reading)
        ),
        "attention": _table_of(
            record.get("attention"), "attention", lambda prompts, at: _list(prompts, at, lambda p, a: _prompt(p, a, shape))
        ),
    }  # fmt: skip


def _record(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{at} must be a mapping of names to values, got {type(value).__name__}")
    return value


def _get(record: Mapping[str, Any], key: str, at: str) -> Any:
    if key not in record:
        raise InputError(f"{at} lacks {key!r}; it has: {', '.join(map(str, record)) or 'nothing'}")
    return record[key]


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{at} = {value!r} must be text")
    return value


def _number(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{at} = {value!r} must be a number")
    if not math.isfinite(value):
        raise InputError(f"{at} is {value}; numbers in a report must be finite (leave out what was not measured)")
    return float(value)


def _or_none(item: Item) -> Item:
    return lambda value, at: None if value is None else item(value, at)


def _whole(value: Any, at: str, low: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise InputError(f"{at} = {value!r} must be a whole number from {low}")
    return int(value)


def _list(value: Any, at: str, item: Item, length: int | None = None) -> list[Any]:
    value = [] if value is None and length is None else value
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise InputError(f"{at} must be a list, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise InputError(f"{at} has {len(value)} entries where {length} belong")
    return [item(v, f"{at}[{i}]") for i, v in enumerate(value)]


def _grid(value: Any, at: str, item: Item, rows: int, columns: int) -> list[list[Any]]:
    return _list(value, at, lambda row, where: _list(row, where, item, columns), rows)


def _table_of(value: Any, at: str, item: Item) -> dict[str, Any]:
    found = _record({} if value is None else value, at)
    return {_text(name, f"a name in {at}"): item(v, f"{at}[{name!r}]") for name, v in found.items()}


def _model(value: Any) -> dict[str, Any]:
    record = _record(value, "model")
    return {
        "name": _text(_get(record, "name", "model"), "model.name"),
        "class_name": _text(_get(record, "class_name", "model"), "model.class_name"),
        "n_layers": _whole(_get(record, "n_layers", "model"), "model.n_layers", 1),
        "n_heads": _whole(_get(record, "n_heads", "model"), "model.n_heads", 1),
        "revision": _or_none(_text)(record.get("revision"), "model.revision"),
    }


def _head(value: Any, at: str, shape: tuple[int, int]) -> Head:
    try:
        head = Head.parse(value)
    except InputError as e:
        raise InputError(f"{at}: {e}") from e
    if head.layer >= shape[0] or head.head >= shape[1]:
        raise InputError(f"{at} = {head} is outside this model ({shape[0]} layers of {shape[1]} heads, both from 0)")
    return head


def _head_set(value: Any, at: str, shape: tuple[int, int]) -> dict[str, Any]:
    record = _record(value, at)
    ranking = _list(_get(record, "ranking", at), f"{at}.ranking", lambda h, where: list(_head(h, where, shape)))
    if not ranking:
        raise InputError(f"{at}.ranking is empty; leave this set out, or give its heads, best first")
    seen: set[tuple[int, ...]] = set()
    for head in map(tuple, ranking):
        if head in seen:
            raise InputError(f"{at}.ranking holds {Head(*head)} twice; a ranking holds each head once")
        seen.add(head)
    k = _whole(_get(record, "k", at), f"{at}.k", 1)
    if k > len(ranking):
        raise InputError(f"{at}.k = {k} is more than the {len(ranking)} heads of its ranking")
    scores = record.get("scores")
    return {
        "id": _text(_get(record, "id", at), f"{at}.id"),
        "task": _text(_get(record, "task", at), f"{at}.task"),
        "method": _text(_get(record, "method", at), f"{at}.method"),
        "seed": None if record.get("seed") is None else _whole(record["seed"], f"{at}.seed"),
        "kind": _text(_get(record, "kind", at), f"{at}.kind"),
        "scores": None if scores is None else _grid(scores, f"{at}.scores", _score, *shape),
        "ranking": ranking,
        "k": k,
    }


def _table(value: Any, at: str) -> dict[str, Any]:
    record = _record(value, at)
    columns = _list(_get(record, "columns", at), f"{at}.columns", _text)
    return {
        "title": _text(_get(record, "title", at), f"{at}.title"),
        "columns": columns,
        "rows": _list(
            _get(record, "rows", at), f"{at}.rows", lambda row, where: _list(row, where, _text, len(columns))
        ),
        "notes": _list(record.get("notes"), f"{at}.notes", _text),
    }  # fmt: skip


def _transfer(value: Any) -> dict[str, Any]:
    record, at = _record(value, "transfer"), "transfer"
    tasks = _list(_get(record, "tasks", at), "transfer.tasks", _text)
    sources = _list(_get(record, "sources", at), "transfer.sources", _text)
    if not tasks or not sources:
        raise InputError("transfer has no task or no source; give None when no transfer was measured")
    out: dict[str, Any] = {"tasks": tasks, "sources": sources}
    for key in ("relative", "accuracy", "low", "high", "mark", "p"):
        item: Item = _text if key == "mark" else _or_none(_number)
        out[key] = _grid(_get(record, key, at), f"transfer.{key}", item, len(sources), len(tasks))
    for task in set(tasks) & set(sources):
        own = out["relative"][sources.index(task)][tasks.index(task)]
        if own is not None and own > 10:
            raise InputError(f"transfer.relative of {task!r} on itself is {own}; give ratios (1.0), not percentages")
    for key, item in (("metric", _text), ("n_items", _whole)):
        found = _record(_get(record, key, at), f"transfer.{key}")
        out[key] = {t: item(_get(found, t, f"transfer.{key}"), f"transfer.{key}[{t!r}]") for t in tasks}
    out["n_seeds"] = _whole(_get(record, "n_seeds", at), "transfer.n_seeds", 1)
    return out


def _by_head(value: Any, at: str, shape: tuple[int, int], item: Item) -> dict[str, Any]:
    found = _table_of(value, at, lambda v, where: (v, where))
    return {str(_head(name, f"a head in {at}", shape)): item(v, where) for name, (v, where) in found.items()}


def _token(value: Any, at: str) -> list[Any]:
    pair = _list(value, at, lambda v, _: v, 2)
    return [_text(pair[0], f"{at}[0]"), _number(pair[1], f"{at}[1]")]


def _reading(value: Any, at: str) -> dict[str, Any]:
    record = _record(value, at)
    without = record.get("without")
    if without is not None:
        without = {
            key: _number(_get(_record(without, f"{at}.without"), key, f"{at}.without"), f"{at}.without.{key}")
            for key in ("value", "low", "high")
        }
    return {
        "norm_v": _or_none(_number)(record.get("norm_v"), f"{at}.norm_v"),
        "promoted": _list(record.get("promoted"), f"{at}.promoted", _token),
        "suppressed": _list(record.get("suppressed"), f"{at}.suppressed", _token),
        "cosines": _table_of(record.get("cosines"), f"{at}.cosines", _number),
        "without": without,
    }


def _prompt(value: Any, at: str, shape: tuple[int, int]) -> dict[str, Any]:
    record = _record(value, at)
    tokens = _list(_get(record, "tokens", at), f"{at}.tokens", _text)
    n = len(tokens)
    return {
        "prompt": _text(_get(record, "prompt", at), f"{at}.prompt"),
        "tokens": tokens,
        "heads": _by_head(
            _get(record, "heads", at), f"{at}.heads", shape, lambda m, where: _grid(m, where, _weight, n, n)
        ),
    }  # fmt: skip


def _score(value: Any, at: str) -> float:
    return float(f"{_number(value, at):.{SCORE_DIGITS}g}")


def _weight(value: Any, at: str) -> float | int:
    short = round(_number(value, at), ATTENTION_DECIMALS)
    return int(short) if short in (0, 1) else short
