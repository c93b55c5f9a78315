"""Rows of your own data, in the plain forms (see `Task.from_records`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lofit_lens import io
from lofit_lens.errors import DataError, InputError
from lofit_lens.tasks.chat import Conversation, parsed
from lofit_lens.tasks.examples import (
    SPLITS,
    Chat,
    ChoiceExample,
    GenerationExample,
    Grader,
    OptionExample,
    PairExample,
    SFTExample,
    TestExample,
    TrainingExample,
    grade_first_line,
)
from lofit_lens.tasks.fields import Row, check_options, fields, one_or_more, texts
from lofit_lens.tasks.marked import Marked

# Fields of a record that are read.
READ = ("prompt", "messages", "answer", "aliases", "options", "chosen", "rejected", "positions")


def fields_of_task(
    name: str, rows: Mapping[str, Sequence[Row]], *, grade: Grader = grade_first_line, max_new_tokens: int = 16,
    source: str, hashes: Mapping[str, str], metric: str | None = None, n_train: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a `Task`, from rows of the plain forms (see `Task.from_records`), each with its place."""
    first = next((row for split in SPLITS for row in rows.get(split, ())), None)
    if first is None or not rows.get("train"):
        raise DataError(f"{name} has no training rows in {source}; give records with prompt (or messages) and answer")
    has = first[1] if isinstance(first[1], Mapping) else {}
    chat = "messages" in has
    rows = {
        split: [(where, _with_marks(where, _with_prompt(where, row, chat))) for where, row in listed]
        for split, listed in rows.items()
    }
    read = _read_pair if "chosen" in has else _read_options if "options" in has else _read_answer
    default = {_read_pair: "mc1", _read_options: "accuracy", _read_answer: "em"}[read]
    made = {split: [read(where, row) for where, row in listed] for split, listed in rows.items()}
    training: dict[str, tuple[TrainingExample, ...]] = {s: tuple(m[0] for m in listed) for s, listed in made.items()}
    test: dict[str, tuple[TestExample, ...]] = {s: tuple(m[1] for m in listed) for s, listed in made.items()}
    return {
        "name": name, "objective": "dpo" if read is _read_pair else "sft", "training": training, "test": test,
        "metric": metric or default, "grade": grade if read is _read_answer else None, "max_new_tokens": max_new_tokens,
        "hashes": hashes, "source": source, "n_train": n_train, "chat": Chat() if chat else None, "counted": _repeats(test),
    }  # fmt: skip


def hashes_of(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Split -> SHA-256 of the fields read from its rows, whatever their source; a NaN cell counts as empty."""
    return {
        split: io.digest([{k: None if _is_nan(r[k]) else r[k] for k in READ if k in r} for r in listed])
        for split, listed in rows.items()
    }


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _repeats(test: Mapping[str, Sequence[TestExample]]) -> dict[str, int]:
    """Number of rows of each other split that repeat a training row's question (white space aside): they test memory."""

    def question(example: TestExample) -> str:
        return " ".join("\n".join((example.prompt, *sorted(getattr(example, "options", ())))).split())

    asked = {question(e) for e in test["train"]}
    found = {s: sum(question(e) in asked for e in rows) for s, rows in test.items() if s != "train"}
    return {f"{split}: rows that repeat a training row's prompt": n for split, n in found.items() if n}


def _with_prompt(where: str, row: Any, chat: bool) -> Any:
    """Turn a row of `messages` into one of `prompt` and `answer`; other rows are unchanged."""
    if not isinstance(row, Mapping):
        return row
    if ("messages" in row) != chat or (chat and "prompt" in row):
        raise DataError(
            f"{where} has {', '.join(map(str, row))}; either all rows of a task have a prompt, or all have messages"
        )
    if not chat:
        return row
    messages, rest = row["messages"], {k: v for k, v in row.items() if k != "messages"}
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        if answers := [k for k in ("answer", "chosen") if k in row]:
            raise DataError(f"{where}: the assistant's last message and {answers[0]!r} are both an answer; remove one")
        messages, rest["answer"] = messages[:-1], last.get("content")
    return {**rest, "prompt": parsed(messages, where)}


def _with_marks(where: str, row: Any) -> Any:
    """Mark the positions of a row's prompt, if it names some."""
    if not isinstance(row, Mapping) or row.get("positions") is None or _is_nan(row["positions"]):
        return row
    (prompt,) = fields(where, row, "prompt")
    try:
        if isinstance(prompt, Conversation):
            return {**row, "prompt": prompt.with_asked(Marked(prompt.asked, row["positions"]))}
        return {**row, "prompt": Marked(prompt, row["positions"])}
    except InputError as e:
        raise DataError(f"{where}: {e}") from e


def _read_answer(where: str, row: Any) -> tuple[SFTExample, GenerationExample]:
    prompt, answer = fields(where, row, "prompt", "answer")
    if row.get("options") is not None:
        raise DataError(
            f"{where} has options, but the task's first row has none; give options to all rows or to no row"
        )
    return SFTExample(prompt, answer), GenerationExample(prompt, (answer, *texts(where, row, "aliases")))


def _read_options(where: str, row: Any) -> tuple[SFTExample, OptionExample]:
    prompt, answer = fields(where, row, "prompt", "answer")
    options = texts(where, row, "options")
    check_options(where, options)
    if answer not in options:
        raise DataError(f"{where}: the answer {answer!r} is not among the options {list(options)}")
    return SFTExample(prompt, answer), OptionExample(prompt, options, options.index(answer))


def _read_pair(where: str, row: Any) -> tuple[PairExample, ChoiceExample]:
    (prompt,) = fields(where, row, "prompt")
    right, wrong = one_or_more(where, row, "chosen"), one_or_more(where, row, "rejected")
    if both := [text for text in right if text in wrong]:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same text, {both[0]!r}; an answer is right or wrong")
    return PairExample(prompt, right[0], wrong[0]), ChoiceExample(prompt, right[0], right, wrong)
