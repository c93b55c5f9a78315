"""Tasks as data: what to train on, what to ask, how to grade.

Each split of a task has a *training form* (answers for SFT, or pairs for DPO) and a *test form* (prompts to generate
from, or answer choices to score). Prompts and answers are exact text: any space or line break between them belongs
to one of the two.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lofit_lens import io
from lofit_lens.checks import check_is, check_one_of, check_seed, check_whole, given, records_of, shown
from lofit_lens.errors import InputError, unknown
from lofit_lens.html import wrapped
from lofit_lens.tasks.chat import as_conversation, asked, template_digest, turn_of
from lofit_lens.tasks.examples import (
    SPLITS,
    Chat,
    Grader,
    SFTExample,
    TestExample,
    TrainingExample,
    grade_first_line,
)
from lofit_lens.tasks.rows import fields_of_task, hashes_of

Objective = Literal["sft", "dpo"]


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
        name: as in `load_task`, with the fold if there is one.
        objective: `"sft"` or `"dpo"`.
        training: training form of each split.
        test: test form of each split.
        grade: text generated after the prompt -> metrics in [0, 1]; generation tasks only.
        metric: the metric reported for the task in tables.
        max_new_tokens: length limit of greedy generation, in tokens.
        n_train: number of training examples drawn by default; None = all.
        leaked: indices of training rows that repeat a test item; never drawn.
        hashes: split -> SHA-256 of the file or the records it was read from.
        source: folder or URL of the data.
        form: name of the form that `test` holds; empty if there is only one.
        forms: the other forms, by name; `task.in_form(name)` asks in one of them.
        counted: irregularities that were found in the rows and accepted, e.g. `{"test: options given twice": 5}`.
        no_training: for a task without training rows, why it has none and where to find some.
        chat: how prompts go through the chat template (see `as_chat`); None = prompts are plain text.
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
    chat: Chat | None = None

    @property
    def data_hash(self) -> str:
        """SHA-256 of the splits' hashes, in order, and of a chat's template and system prompt; empty if they are unknown."""
        chat = [] if self.chat is None else [asdict(self.chat)]
        return io.digest([*self.hashes.values(), *chat]) if self.hashes else ""

    def as_chat(self, model: Any = None, *, system: str | None = None) -> "Task":
        """This task with each prompt as the user's turn of a chat, and each answer as the assistant's.

        The model's tokenizer turns the chat into text whenever it is used. An answer's leading space is dropped, since the
        template determines what precedes an answer.

        Args:
            model: a model or its tokenizer, whose template is checked now and enters `data_hash`; None = once a model is known.
            system: the system prompt.

        Raises:
            InputError: no chat template, one that takes no system prompt, or two system prompts.
        """
        if self.chat is None or system is not None:
            made = self.with_prompts(lambda prompt: as_conversation(prompt, system))
            by = "" if system is None else f"-{io.digest(system)[:6]}"
            return replace(made, name=f"{self.name}:chat{by}", chat=Chat(system)).asked_of(model)
        return self.asked_of(model)

    def asked_of(self, model: Any) -> "Task":
        """This task as it is put to a model (or tokenizer; None = not known yet): a chat records the model's template.

        Raises:
            InputError: the model has no chat template, or its template does not accept the first prompt.
        """
        if self.chat is None or model is None:
            return self
        if isinstance(model, str):
            raise InputError(
                f"{model!r} is not a model; give a loaded model or its tokenizer, and a system prompt as system=..."
            )
        tokenizer = getattr(model, "tokenizer", model)
        digest = template_digest(tokenizer)
        first = next((e for listed in (*self.test.values(), *self.training.values()) for e in listed), None)
        if first is not None:
            turn_of(tokenizer, first.prompt)
        return replace(self, chat=replace(self.chat, template=digest))

    def few_shot(self, n: int, *, seed: int = 42, separator: str = "\n\n") -> "Task":
        """This task with the same n solved training examples prepended to each prompt of its test form.

        They are drawn from its own training rows, as `training_examples` draws them. In a chat they go into the user's turn.

        Raises:
            InputError: no training rows, or fewer than n.
        """
        shots = self.training_examples("train", n=n, seed=seed)
        front = "".join(
            f"{asked(s.prompt)}{s.answer if isinstance(s, SFTExample) else s.chosen}{separator}" for s in shots
        )
        hashes = {split: io.digest([found, front]) for split, found in self.hashes.items()}
        made = self.with_prompts(lambda prompt: front + prompt, training=False)
        return replace(made, name=f"{self.name}:{n}-shot", hashes=hashes)

    def subset(
        self, *, train: Sequence[int] | None = None, val: Sequence[int] | None = None, test: Sequence[int] | None = None
    ) -> "Task":
        """This task with only these rows, given by index and in this order, in its current form.

        By default all the remaining training rows are drawn. Name and `data_hash` distinguish it from the whole task.

        Args:
            train: training rows, counted as `drawn` counts them; None = all.
            val: questions of the validation split, counted as `examples` counts them; None = all.
            test: questions of the test split; None = all.

        Raises:
            InputError: no rows, a row that does not exist or is given twice, or a training row that repeats a test item.
        """
        chosen = given(train=train, val=val, test=test)
        if not chosen:
            raise InputError("no rows given; give train, val or test, e.g. subset(train=range(100))")
        training, asked, hashes = dict(self.training), dict(self.test), dict(self.hashes)
        for split, listed in chosen.items():
            rows = self._split(training if split == "train" else asked, split)
            if (
                isinstance(listed, str)
                or not isinstance(listed, Sequence)
                or not listed
                or len({*listed}) < len(listed)
            ):
                raise InputError(f"{split} is {shown(listed)}; give indices of rows, each once, e.g. range(100)")
            for i in listed:
                check_whole(0, len(rows) - 1, **{f"a row of {split}": i})
            if split == "train" and (repeats := self.leaked.intersection(listed)):
                raise InputError(f"training row {min(repeats)} repeats a test item and is never drawn; leave it out")
            for form in (training, asked):
                known = form.pop(split, ())
                if len(known) == len(rows):  # otherwise it is unknown which rows belong together
                    form[split] = tuple(known[i] for i in listed)
            if hashes:
                hashes[split] = io.digest([hashes.get(split, ""), [int(i) for i in listed]])
        told = io.digest({split: [int(i) for i in listed] for split, listed in chosen.items()})[:6]
        return replace(
            self, name=f"{self.name}:subset-{told}", training=training, test=asked, hashes=hashes, forms={}, counted={},
            leaked=self.leaked if train is None else frozenset(), n_train=self.n_train if train is None else None,
        )  # fmt: skip

    def with_prompts(self, change: Callable[[str], str], *, training: bool = True) -> "Task":
        """This task with changed prompts; those of the training form too unless `training` is False."""

        def of(splits: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
            return {s: tuple(replace(e, prompt=change(e.prompt)) for e in listed) for s, listed in splits.items()}

        forms = {name: replace(form, test=of(form.test)) for name, form in self.forms.items()}
        return replace(self, test=of(self.test), forms=forms, training=of(self.training) if training else self.training)

    def in_form(self, form: str) -> "Task":
        """This task with its questions asked in another form, e.g. `task.in_form("options")`.

        Raises:
            InputError: no such form.
        """
        if form == self.form:
            return self
        if not self.form:
            raise InputError(f"{self.name} has only one form; omit form (got {form!r})")
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
        """Name without the fold; presets are looked up by it."""
        return self.name.split(":")[0]

    def examples(self, split: str, *, limit: int | None = None) -> tuple[TestExample, ...]:
        """Test form of a split; `limit` keeps the first rows only.

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
            InputError: unknown split, no training rows, none that may be drawn, or `n` outside 1..rows.
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
        return wrapped(
            f"Task({self.name}: {self.objective}, {counts} train/val/test, metric {self.metric}{form}{found})"
        )

    @classmethod
    def from_records(
        cls,
        name: str,
        *,
        train: Sequence[Mapping[str, Any]],
        test: Sequence[Mapping[str, Any]],
        val: Sequence[Mapping[str, Any]] = (),
        grade: Grader = grade_first_line,
        metric: str | None = None,
        max_new_tokens: int = 16,
        n_train: int | None = None,
    ) -> "Task":
        """Make a task of your own from plain records.

        Records with `prompt` and `answer` (optional `aliases`) train by SFT and are graded by exact match. If they also have
        `options` (a list that holds the answer), they are graded by the option with the highest log-prob. Records with `prompt`,
        `chosen` and `rejected` train by DPO and are graded by multiple choice. `chosen` and `rejected` may be lists of texts: the
        pair takes the first of each, MC1 the first right one, and MC2 and MC3 all. All records have the same form.
        `task.counted` says how many rows of `val` and `test` repeat a training row's prompt.

        A record may name `positions` of its prompt, for adapters at `positions="row"`: see `tasks.Marked`.

        Instead of `prompt`, all records may have `messages`, a list of `{"role": "user", "content": "..."}` (also system and
        assistant): the model's chat template turns them into the prompt. An assistant's last message is the `answer`.

        `grade` may be any function of the generated text and the example; `metric` names the score reported for the task
        (default `em`). `n_train` examples are drawn by seed (default all).

        Raises:
            DataError: no records, a missing or empty field, an option given twice, or an answer that is not an option; names
                the row.

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
        made = fields_of_task(
            name, {s: [(f"{name} {s} row {i + 1}", r) for i, r in enumerate(rows)] for s, rows in splits.items()},
            grade=grade, metric=metric, max_new_tokens=max_new_tokens, n_train=n_train, source="records", hashes={},
        )  # fmt: skip
        made["hashes"] = hashes_of(splits)
        return cls(**made)
