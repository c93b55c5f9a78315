"""Tasks as data: what to train on, what to ask, how to grade.

A task has a *training form* (answers for SFT, or pairs for DPO) and a *test form* (prompts to generate
from, or answer choices to score) of each split. Prompts and answers are exact text: whatever space or line break
stands between them is part of one of the two.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lofit_lens import io
from lofit_lens.checks import check_is, check_one_of, check_seed, check_whole, given, records_of, shown
from lofit_lens.errors import DataError, InputError, unknown

SPLITS = ("train", "val", "test")
Objective = Literal["sft", "dpo"]


@dataclass(frozen=True)
class SFTExample:
    """Learn to continue `prompt` with `answer` (and the end-of-sequence token)."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class PairExample:
    """Learn to prefer `chosen` over `rejected` behind `prompt`."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class GenerationExample:
    """Generate from `prompt`; right if the graded text is among `references`.

    `group` sorts items in results (hops, subject); `question` is what a judge of open-ended answers sees.
    """

    prompt: str
    references: tuple[str, ...]
    group: str = field(default="", compare=False)
    question: str = field(default="", compare=False)


@dataclass(frozen=True)
class ChoiceExample:
    """Score each answer as a continuation of `prompt`; `best` is the one true answer that MC1 asks for."""

    prompt: str
    best: str
    true: tuple[str, ...]
    false: tuple[str, ...]
    group: str = field(default="", compare=False)


@dataclass(frozen=True)
class OptionExample:
    """Score each option as a continuation of `prompt`; `right` is the index of the one right option."""

    prompt: str
    options: tuple[str, ...]
    right: int
    group: str = field(default="", compare=False)


TrainingExample = SFTExample | PairExample
TestExample = GenerationExample | ChoiceExample | OptionExample
Grader = Callable[[str, GenerationExample], dict[str, float]]


def grade_first_line(generated: str, example: GenerationExample) -> dict[str, float]:
    """Exact match of the first line, stripped and lower-cased, with any reference."""
    said = generated.strip().split("\n")[0].strip().lower()
    return {"em": float(said in {r.strip().lower() for r in example.references})}


@dataclass(frozen=True)
class Form:
    """A way to ask a task's questions: the test form of each split, its metric, and for generation grader and length limit."""

    test: Mapping[str, tuple[TestExample, ...]]
    metric: str
    grade: Grader | None = None
    max_new_tokens: int = 16


@dataclass(frozen=True)
class Task:
    """One task, ready for `select_heads`, `tune_offsets` and `evaluate`.

    Args:
        name: as in `load_task`, fold included where there is one.
        objective: `"sft"` or `"dpo"`.
        training: training form of each split.
        test: test form of each split.
        grade: text generated behind the prompt -> metrics in [0, 1]; generation tasks only.
        metric: the metric that stands for the task in tables.
        max_new_tokens: length limit of greedy generation, tokens.
        n_train: training examples drawn when no number is asked for; None = all.
        leaked: indices of training rows that repeat a test item; never drawn.
        hashes: split -> SHA-256 of the file or the records it was read from.
        source: folder or address of the data.
        form: name of the form that `test` holds; empty where there is one only.
        forms: the other forms, by name; `task.in_form(name)` asks in one of them.
        counted: what was found in the rows and let pass, e.g. `{"test: options given twice": 5}`.
        no_training: why there are no training rows and where some are, where there are none.
    """

    name: str
    objective: Objective
    training: Mapping[str, tuple[TrainingExample, ...]]
    test: Mapping[str, tuple[TestExample, ...]]
    metric: str
    grade: Grader | None = None
    max_new_tokens: int = 16
    n_train: int | None = None
    leaked: frozenset[int] = field(default_factory=frozenset)
    hashes: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    form: str = ""
    forms: Mapping[str, Form] = field(default_factory=dict)
    counted: Mapping[str, int] = field(default_factory=dict)
    no_training: str = ""

    @property
    def data_hash(self) -> str:
        """SHA-256 over the splits' hashes, in order; empty where they are unknown."""
        return io.digest(list(self.hashes.values())) if self.hashes else ""

    def in_form(self, form: str) -> "Task":
        """This task with its questions asked in another form, e.g. `task.in_form("options")`.

        Raises:
            InputError: no such form.
        """
        if form == self.form:
            return self
        if not self.form:
            raise InputError(f"{self.name} has one form; leave form out (got {form!r})")
        if form not in self.forms:
            raise unknown("form", form, filter(None, (self.form, *self.forms)), hint=f"{self.name} has no other.")
        mine = Form(self.test, self.metric, self.grade, self.max_new_tokens)
        new = self.forms[form]
        rest = {name: f for name, f in self.forms.items() if name != form}
        return replace(
            self, test=new.test, metric=new.metric, grade=new.grade, max_new_tokens=new.max_new_tokens, form=form,
            forms={self.form: mine, **rest},
        )  # fmt: skip

    @property
    def family(self) -> str:
        """Name without the fold, by which presets are found."""
        return self.name.split(":")[0]

    def examples(self, split: str, *, limit: int | None = None) -> tuple[TestExample, ...]:
        """Test form of a split; `limit` takes the first rows.

        Raises:
            InputError: unknown split, or a limit below 1.
        """
        return self._limited(self._split(self.test, split), limit)

    def training_examples(
        self, split: str = "train", *, n: int | None = None, seed: int = 42
    ) -> tuple[TrainingExample, ...]:
        """Training form of a split.

        For `"train"`, `n` (default: the task's own) examples are drawn as the official code draws them,
        `random.Random(seed).sample`; rows that repeat a test item are replaced by further draws.

        Raises:
            InputError: unknown split, no training rows at all or none that may be drawn, or `n` outside 1..rows.
        """
        drawn = self.drawn(split, n=n, seed=seed)
        rows = self._split(self.training, split)
        return tuple(rows[i] for i in drawn)

    def drawn(self, split: str = "train", *, n: int | None = None, seed: int = 42) -> tuple[int, ...]:
        """Indices of the rows that `training_examples` gives; arguments and errors as there."""
        if not self.training:
            raise InputError(f"{self.name} has no training rows: {self.no_training or 'it is for evaluation only'}")
        rows = self._split(self.training, split)
        if split != "train":
            return self._limited(tuple(range(len(rows))), n)
        check_seed(seed)
        n = self.n_train if n is None else n
        usable = [i for i in range(len(rows)) if i not in self.leaked]
        if not usable:
            raise InputError(
                f"{self.name} has no training rows to draw from: each of its {len(rows)} repeats a test item"
            )
        if n is None:
            return tuple(usable)
        check_whole(1, n_train=n)
        if n > len(usable):
            raise InputError(
                f"{n} training examples asked for; {self.name} has {len(usable)}, so give 1 to {len(usable)}"
            )
        draw = random.Random(seed)
        drawn = draw.sample(range(len(rows)), n)
        kept = [i for i in drawn if i not in self.leaked]
        if len(kept) < n:
            left = [i for i in usable if i not in set(drawn)]
            kept += draw.sample(left, n - len(kept))
        return tuple(kept)

    def _split(self, splits: Mapping[str, tuple[Any, ...]], split: str) -> tuple[Any, ...]:
        check_one_of("split", split, splits, hint=f"{self.name} has no other.")
        return splits[split]

    def _limited(self, rows: tuple[Any, ...], limit: int | None) -> tuple[Any, ...]:
        if limit is None:
            return rows
        check_whole(1, limit=limit)
        return rows[:limit]

    def __repr__(self) -> str:
        counts = "/".join(str(len(self.test.get(s, ()))) for s in SPLITS)
        form = f", form {self.form}" if self.form else ""
        found = f", {', '.join(f'{k} {n}' for k, n in self.counted.items())}" if self.counted else ""
        return f"Task({self.name}: {self.objective}, {counts} train/val/test, metric {self.metric}{form}{found})"

    @classmethod
    def from_records(
        cls,
        name: str,
        *,
        train: Sequence[Mapping[str, str]],
        test: Sequence[Mapping[str, Any]],
        val: Sequence[Mapping[str, Any]] = (),
        grade: Grader = grade_first_line,
        metric: str | None = None,
        max_new_tokens: int = 16,
        n_train: int | None = None,
    ) -> "Task":
        """A task of one's own from plain records, in one call.

        Records with `prompt` and `answer` (optional `aliases`) train by SFT and are graded by exact match; with `options`
        beside them (a list that holds the answer), by the option with the highest log-prob. Records with `prompt`, `chosen` and
        `rejected` train by DPO and are graded by multiple choice. One form a task. `task.counted` says how many rows of `val`
        and `test` repeat a training row's prompt.

        `grade` may be any function of the generated text and the example; `metric` names the one of its scores that stands for
        the task (default `em`). `n_train` examples are drawn by seed (default all).

        Raises:
            DataError: no records, a record without its fields, an empty field, an option given twice, an answer that is no
                option; names the row.

        Examples:
            >>> task = Task.from_records("caps", train=[{"prompt": "France:", "answer": " Paris"}],
            ...                          test=[{"prompt": "Italy:", "answer": " Rome"}])
            >>> task
            Task(caps: sft, 1/0/1 train/val/test, metric em)
        """
        check_is(name, str, "name", "a text")
        check_is(metric, (str, type(None)), "metric", "the name of one of the grader's scores")
        check_whole(1, max_new_tokens=max_new_tokens, **given(n_train=n_train))
        if not callable(grade):
            raise InputError(f"grade is {shown(grade)}; give a function of the generated text and the example")
        splits = {s: records_of(f"{name} {s}", rows) for s, rows in (("train", train), ("val", val), ("test", test))}
        task = task_from_rows(
            name, {s: [(f"{name} {s} row {i + 1}", r) for i, r in enumerate(rows)] for s, rows in splits.items()},
            grade=grade, metric=metric, max_new_tokens=max_new_tokens, n_train=n_train, source="records",
            hashes={},
        )  # fmt: skip
        read = {s: [{k: r[k] for k in READ if k in r} for r in rows] for s, rows in splits.items()}
        return replace(task, hashes={s: io.digest(rows) for s, rows in read.items()})


READ = ("prompt", "answer", "aliases", "options", "chosen", "rejected")  # fields of a record; others are not looked at
Row = tuple[str, Any]  # where it stands ("file:line"), and its fields


def task_from_rows(
    name: str, rows: Mapping[str, Sequence[Row]], *, grade: Grader = grade_first_line, max_new_tokens: int = 16,
    source: str, hashes: Mapping[str, str], metric: str | None = None, n_train: int | None = None,
) -> Task:  # fmt: skip
    """Build a task from rows of the plain forms (see `Task.from_records`), each with its place."""
    first = next((row for split in SPLITS for row in rows.get(split, ())), None)
    if first is None or not rows.get("train"):
        raise DataError(f"{name} has no training rows in {source}; give records with prompt and answer")
    has = first[1] if isinstance(first[1], Mapping) else {}
    read = _read_pair if "chosen" in has else _read_options if "options" in has else _read_answer
    default = {_read_pair: "mc1", _read_options: "accuracy", _read_answer: "em"}[read]
    made = {split: [read(where, row) for where, row in listed] for split, listed in rows.items()}
    training: dict[str, tuple[TrainingExample, ...]] = {s: tuple(m[0] for m in listed) for s, listed in made.items()}
    test: dict[str, tuple[TestExample, ...]] = {s: tuple(m[1] for m in listed) for s, listed in made.items()}
    return Task(
        name, "dpo" if read is _read_pair else "sft", training, test, metric or default,
        grade=grade if read is _read_answer else None, max_new_tokens=max_new_tokens, hashes=hashes, source=source,
        n_train=n_train, counted=_repeats(test),
    )  # fmt: skip


def _repeats(test: Mapping[str, Sequence[TestExample]]) -> dict[str, int]:
    """How many rows of each other split ask what a training row asks, whatever the white space: they test memory."""

    def question(example: TestExample) -> str:
        return " ".join("\n".join((example.prompt, *sorted(getattr(example, "options", ())))).split())

    asked = {question(e) for e in test["train"]}
    found = {s: sum(question(e) in asked for e in rows) for s, rows in test.items() if s != "train"}
    return {f"{split}: rows that repeat a training row's prompt": n for split, n in found.items() if n}


def _read_answer(where: str, row: Any) -> tuple[SFTExample, GenerationExample]:
    prompt, answer = fields(where, row, "prompt", "answer")
    if row.get("options") is not None:
        raise DataError(f"{where} has options, and the task's first row has none; give all rows options, or none")
    return SFTExample(prompt, answer), GenerationExample(prompt, (answer, *texts(where, row, "aliases")))


def _read_options(where: str, row: Any) -> tuple[SFTExample, OptionExample]:
    prompt, answer = fields(where, row, "prompt", "answer")
    options = texts(where, row, "options")
    check_options(where, options)
    if answer not in options:
        raise DataError(f"{where}: the answer {answer!r} is not among the options {list(options)}")
    return SFTExample(prompt, answer), OptionExample(prompt, options, options.index(answer))


def check_options(where: str, options: Sequence[str]) -> None:
    """Check that there are at least two options, none empty and none given twice.

    Raises:
        DataError: names row and option.
    """
    if len(options) < 2:
        raise DataError(f"{where}: {len(options)} option(s) {list(options)}; a choice needs two or more")
    for i, option in enumerate(options):
        if not option.strip():
            raise DataError(f"{where}: option {i + 1} is empty")
        if option in options[:i]:
            raise DataError(f"{where}: option {option!r} is given twice; leave one")


def _read_pair(where: str, row: Any) -> tuple[PairExample, ChoiceExample]:
    prompt, chosen, rejected = fields(where, row, "prompt", "chosen", "rejected")
    if chosen == rejected:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same text; a pair must differ")
    return PairExample(prompt, chosen, rejected), ChoiceExample(prompt, chosen, (chosen,), (rejected,))


def texts(where: str, row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field that holds a list of texts; empty where it is missing or null.

    Raises:
        DataError: it holds something else; names row and field.
    """
    found = row.get(name)
    if found is None:
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(t, str) for t in found):
        raise DataError(f"{where}: field {name!r} must be a list of texts, got {found!r}")
    for text in found:
        _whole(where, name, text)
    return tuple(found)


def _whole(where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"{where}: field {name!r} has half a character ({text[e.start]!r} at {e.start}); write the text anew as UTF-8"
        ) from e


def fields(where: str, row: Any, *names: str) -> tuple[str, ...]:
    """The text fields of a row.

    Raises:
        DataError: the row is no record, lacks a field, or a field is empty or not text; names file, row and field.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a record with {', '.join(names)}, got {type(row).__name__}")
    for name in names:
        if name not in row:
            raise DataError(
                f"{where}: no field {name!r}; a row needs {', '.join(names)} and has {', '.join(map(str, row))}"
            )
        if row[name] is None:
            raise DataError(f"{where}: field {name!r} is null; it must be non-empty text")
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(f"{where}: field {name!r} is {row[name]!r}; it must be non-empty text")
        _whole(where, name, row[name])
    return tuple(row[name] for name in names)


def file_hashes(paths: Mapping[str, Path]) -> dict[str, str]:
    """Split -> SHA-256 of its file's bytes."""
    return {split: io.file_digest(path) for split, path in paths.items()}


def repeated(prompts: Sequence[str], tested: Iterable[str]) -> frozenset[int]:
    """Indices of training prompts that a test item repeats."""
    asked = set(tested)
    return frozenset(i for i, prompt in enumerate(prompts) if prompt in asked)
