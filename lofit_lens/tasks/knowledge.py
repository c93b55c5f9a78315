"""Out-of-domain tasks: TriviaQA, Natural Questions (open) and MMLU, zero-shot; tuning for another task should not harm them.

TriviaQA (Joshi et al. 2017) and NQ (Lee et al. 2019): `Q: {question}` + line break + `A:`, greedy, first line graded. `em` is
exact match with any reference after TriviaQA's public normalization (case, punctuation, articles, white space);
`contains` only requires a reference in the line, as whole words, since base models often answer in sentences.
MMLU (Hendrycks et al. 2021): the public prompt (with single spaces), log-prob of each letter. All three are for evaluation
only; the public test sets of TriviaQA and NQ have no answers, so their validation sets are the test split here.
"""

import re
import string
from pathlib import Path
from typing import Any

from lofit_lens.errors import DataError
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import GenerationExample, OptionExample
from lofit_lens.tasks.fields import fields, texts
from lofit_lens.tasks.hub import HubSource, hub_rows

TRIVIAQA = HubSource(
    "mandarjoshi/trivia_qa", "rc.nocontext", "0f7faf33a3908546c6fd5b73a660e0f8ff173c2f", {"test": "validation"}
)
NQ = HubSource(
    "google-research-datasets/nq_open", None, "5dd9790a83002ad084ddeb7c420dc716852c6f28", {"test": "validation"}
)
MMLU = HubSource("cais/mmlu", "all", "c30699e8356da336a370243923dbaf21066bb9fe", {"val": "validation", "test": "test"})
LETTERS = "ABCD"
MAX_NEW_TOKENS = 24


def load_triviaqa(data_dir: str | Path | None) -> Task:
    """TriviaQA without its documents."""
    return _open(TRIVIAQA, "triviaqa", data_dir)


def load_nq(data_dir: str | Path | None) -> Task:
    """Natural Questions, open form."""
    return _open(NQ, "nq", data_dir)


def load_mmlu(data_dir: str | Path | None) -> Task:
    """MMLU, all 57 subjects; items are grouped by subject."""
    rows, hashes = hub_rows(MMLU, data_dir)
    test = {s: tuple(letter_choice(*row) for row in r) for s, r in rows.items()}
    odd = {
        f"{s}: options given twice": sum(len(set(row["choices"])) < len(LETTERS) for _, row in r)
        for s, r in rows.items()
    }
    odd |= {
        f"{s}: empty options": sum(not all(map(str.strip, row["choices"])) for _, row in r) for s, r in rows.items()
    }
    return Task(
        "mmlu", "sft", {}, test, "accuracy", form="options", hashes=hashes, source=str(data_dir or MMLU),
        counted={kind: n for kind, n in odd.items() if n},
    )  # fmt: skip


def _open(source: HubSource, name: str, data_dir: str | Path | None) -> Task:
    rows, hashes = hub_rows(source, data_dir)
    read = open_triviaqa if name == "triviaqa" else open_nq
    return Task(
        name, "sft", {}, {s: tuple(read(*row) for row in r) for s, r in rows.items()}, "em", grade=grade,
        max_new_tokens=MAX_NEW_TOKENS, hashes=hashes, source=str(data_dir or source),
    )  # fmt: skip


def open_triviaqa(where: str, row: Any) -> GenerationExample:
    """One question with its answer and that answer's aliases."""
    (question,) = fields(where, row, "question")
    (value,) = fields(f"{where}, answer", row.get("answer"), "value")
    return GenerationExample(f"Q: {question}\nA:", (value, *texts(where, row["answer"], "aliases")), question=question)


def open_nq(where: str, row: Any) -> GenerationExample:
    """One question with every accepted answer."""
    (question,) = fields(where, row, "question")
    answers = texts(where, row, "answer")
    if not any(map(normalized, answers)):
        raise DataError(f"{where}: field 'answer' is {list(answers)}; it must hold at least one non-empty answer")
    asked = question if question.endswith("?") else question + "?"
    return GenerationExample(f"Q: {asked}\nA:", answers, question=asked)


def letter_choice(where: str, row: Any) -> OptionExample:
    """One question, preceded by its subject; the options are the letters.

    `load_mmlu` counts an option that is empty or given twice instead of refusing it: the public files have some.
    """
    question, subject = fields(where, row, "question", "subject")
    options, right = texts(where, row, "choices"), row.get("answer")
    if len(options) != len(LETTERS):
        raise DataError(f"{where}: {len(options)} options; a question has {len(LETTERS)}")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(LETTERS):
        raise DataError(f"{where}: field 'answer' is {right!r}; it must be an option's number, 0 to {len(LETTERS) - 1}")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    about = subject.replace("_", " ")
    return OptionExample(
        f"The following are multiple choice questions (with answers) about {about}.\n\n{question.strip()}\n{listed}\nAnswer:",
        tuple(f" {letter}" for letter in LETTERS), right, about,
    )  # fmt: skip


def normalized(text: str) -> str:
    """TriviaQA's public normalization: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(" " if c in string.punctuation or c in "‘’´`" else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def grade(generated: str, example: GenerationExample) -> dict[str, float]:
    """Exact match of the first line, and whether it contains a reference."""
    said = normalized(generated.strip().split("\n")[0])
    references = {r for r in map(normalized, example.references) if r}
    return {
        "em": float(said in references),
        "contains": float(any(f" {r} " in f" {said} " for r in references)),
    }
