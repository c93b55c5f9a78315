"""A task's questions as true or false statements, on which probes and reading vectors are fitted.

A statement is a prompt with one answer, labeled right or wrong:

- multiple choice: the prompt of the training form with every true and every false answer (on TruthfulQA ITI's form,
  `Q: {question} A: {answer}`, without the six-shot primer),
- options: the right option, and every other one,
- generation, if the task has no other form: the learned answer, and as a wrong one the answer of another drawn row that is
  not among this row's references, drawn by seed. (Neither ITI nor RepE defines wrong answers for such tasks; this is our
  choice.)

An answer ends as the task's form writes it. On TruthfulQA that is a full stop, as in ITI's own data (`mc_task.json`); in the
files that come with LoFiT the same answers have none. This matters if activations are read at the last token (see
`probing.fit_probes`): it is the full stop for all statements, or the last word of each. `full_stop` selects either.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lofit_lens.checks import check_is
from lofit_lens.errors import DataError, InputError
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import (
    ChoiceExample,
    GenerationExample,
    OptionExample,
    PairExample,
    SFTExample,
    TestExample,
    TrainingExample,
)


@dataclass(frozen=True)
class Statement:
    """A prompt, an answer as it continues the prompt, whether it is right, and the row it comes from."""

    prompt: str
    answer: str
    right: bool
    row: int


def statements(
    task: Task, split: str = "train", *, n: int | None = None, seed: int = 42, full_stop: bool | None = None
) -> tuple[Statement, ...]:
    """Statements of the rows that `task.training_examples(split, n=n, seed=seed)` gives, row by row, right ones first.

    Args:
        task: a task with training rows, and with a test form of the same rows if it asks for choices or options.
        split: `"train"` or `"val"`.
        n: number of rows, as in `training_examples`.
        seed: seed of the draw of rows and of wrong answers.
        full_stop: True = every answer ends with a full stop, False = no answer does (except abbreviations such as `U.S.`);
            None = as the task writes them. Answers of a row that become equal count once.

    Raises:
        InputError: as in `training_examples`, no rows in the split, or a `full_stop` of another type.
        DataError: no drawn row has a different answer that could serve as a wrong one.
    """
    check_is(full_stop, (bool, type(None)), "full_stop", "True, False or None")
    drawn, draw, found = task.drawn(split, n=n, seed=seed), random.Random(seed), []
    if not drawn:
        raise InputError(f"{task.name} has no {split} rows; take statements of another split")
    training, asked = task.training[split], _choices(task, split)
    answers = sorted({_answer(training[i]) for i in drawn})
    for i in drawn:
        prompt, right, wrong = _sides(training[i], asked[i] if asked else None)
        if not wrong:
            wrong = (_other_answer(answers, _right(task, split, i), draw, task.name),)
        found += [Statement(prompt, a, True, i) for a in _ended(right, full_stop)]
        found += [Statement(prompt, a, False, i) for a in _ended(wrong, full_stop)]
    return tuple(found)


def pairs(listed: Sequence[Statement]) -> tuple[tuple[Statement, Statement], ...]:
    """The first right and the first wrong statement of each row."""
    first: dict[tuple[int, bool], Statement] = {}
    for s in listed:
        first.setdefault((s.row, s.right), s)
    rows = dict.fromkeys(s.row for s in listed)
    return tuple((first[r, True], first[r, False]) for r in rows if (r, True) in first and (r, False) in first)


def _ended(answers: Iterable[str], full_stop: bool | None) -> tuple[str, ...]:
    """Answers with or without a full stop at their end, each text once."""
    if full_stop is None:
        return tuple(answers)
    bare = (a[:-1] if a.endswith(".") and "." not in a.split()[-1][:-1] else a for a in map(str.rstrip, answers))
    return tuple(dict.fromkeys(a if not full_stop or a.endswith(".") else a + "." for a in bare))


def _choices(task: Task, split: str) -> Sequence[TestExample]:
    """The split's rows in a form that names wrong answers, if the task has such a form of the same rows."""
    for rows in (task.test.get(split, ()), *(form.test.get(split, ()) for form in task.forms.values())):
        if rows and isinstance(rows[0], ChoiceExample | OptionExample) and len(rows) == len(task.training[split]):
            return rows
    return ()


def _sides(trained: TrainingExample, asked: TestExample | None) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The row's own prompt, right answers and wrong answers."""
    if isinstance(asked, ChoiceExample):
        return trained.prompt, tuple(dict.fromkeys((asked.best, *asked.true))), tuple(dict.fromkeys(asked.false))
    if isinstance(asked, OptionExample):
        wrong = tuple(o for i, o in enumerate(asked.options) if i != asked.right)
        return asked.prompt, (asked.options[asked.right],), wrong
    if isinstance(trained, PairExample):
        return trained.prompt, (trained.chosen,), (trained.rejected,)
    return trained.prompt, (trained.answer,), ()


def _right(task: Task, split: str, row: int) -> set[str]:
    """All right answers of a row, in comparable form: the learned one, and the references of a test form of the same rows."""
    rows = task.test.get(split, ())
    asked = rows[row] if len(rows) == len(task.training[split]) else None
    references = asked.references if isinstance(asked, GenerationExample) else ()
    return {_plain(a) for a in (_answer(task.training[split][row]), *references)}


def _other_answer(answers: Sequence[str], right: set[str], draw: random.Random, name: str) -> str:
    """Draw one of the answers that are not right, uniformly."""
    if all(_plain(a) in right for a in answers):
        raise DataError(
            f"{name}: no drawn row has another answer than {', '.join(map(repr, answers))}, so no wrong answer is available"
        )
    while _plain(answer := draw.choice(answers)) in right:
        pass
    return answer


def _plain(answer: str) -> str:
    return answer.strip().lower()


def _answer(example: TrainingExample) -> str:
    return example.answer if isinstance(example, SFTExample) else example.chosen
