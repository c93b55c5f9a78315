"""SIQA, ARC-Challenge, BoolQ and SVAMP in the instruction form of LLM-Adapters (Hu et al. 2023), the paper's other four tasks.

SFT on the response. Test form "generation" (default): greedy response, accuracy by the first option it names (SVAMP: by its
last number, within .001). Test form "options" (not SVAMP): log-prob of each option after "the correct answer is".

Two sources: "files", the pinned instruction files (SIQA and SVAMP have a test file only), and "hub", the original data sets
put into the same words, with training rows for all four. If a source has no validation split, rows of the training split
are held out for it, always the same ones. The prompt is Alpaca's, for which those files were made, without the
public scripts' indentation inside it. BoolQ has no passages here, as in those files.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lofit_lens.errors import DataError, unknown
from lofit_lens.tasks.base import Form, Task
from lofit_lens.tasks.examples import GenerationExample, OptionExample, SFTExample, TestExample
from lofit_lens.tasks.fields import Row, check_options, fields, file_hashes, repeated, texts
from lofit_lens.tasks.hub import HubSource, hub_rows
from lofit_lens.tasks.sources import Source, locate, read_rows

BASE = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a/dataset"
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
RESPONSE = "the correct answer is"
HELD_OUT = 300  # validation rows taken from the training split, or a tenth of it if that is less
TOLERANCE = 1e-3  # SVAMP, as in the public scripts


@dataclass(frozen=True)
class Spec:
    """One of the four tasks.

    Attributes:
        files: the instruction files.
        hub: the original data set.
        instruction: a row of the hub -> the same row in instruction form.
        names: pattern that matches the names of options in a response.
        max_new_tokens: length limit of a response, in tokens.
    """

    files: Source
    hub: HubSource
    instruction: Callable[[str, Any], dict[str, str]]
    names: str | None
    max_new_tokens: int


def load(name: str, data_dir: str | Path | None, source: str = "files") -> Task:
    """Read one of the four tasks.

    Raises:
        InputError: unknown source.
        DataError: a missing file, a row without its fields, an empty or missing option, or an answer that is not an option.
    """
    spec = SPECS[name]
    if source == "hub":
        rows, hashes = hub_rows(spec.hub, data_dir)
        listed, counted = _in_instruction_form(spec, rows)
        where = str(data_dir or spec.hub)
    elif source == "files":
        paths = locate(spec.files, {"train": "train.json", "test": "test.json"}, data_dir, optional=("train",))
        listed, hashes, counted = {s: read_rows(p) for s, p in paths.items()}, file_hashes(paths), {}
        where = str(data_dir or spec.files.base)
    else:
        raise unknown("source", source, ("files", "hub"))
    if "train" in listed and "val" not in listed:
        listed = hold_out(listed)
        hashes = {s: hashes["test" if s == "test" else "train"] for s in listed}
    read = {s: [example(spec, *row) for row in r] for s, r in listed.items()}
    asked: dict[str, tuple[TestExample, ...]] = {s: tuple(e[1] for e in r) for s, r in read.items()}
    options: dict[str, tuple[TestExample, ...]] = {s: tuple(e[2] for e in r if e[2]) for s, r in read.items()}
    grade = last_number if spec.names is None else partial(first_option, spec.names)
    return Task(
        name, "sft", {s: tuple(e[0] for e in r) for s, r in read.items() if "train" in listed}, asked, "accuracy",
        grade=grade, max_new_tokens=spec.max_new_tokens, form="generation",
        forms={} if spec.names is None else {"options": Form(options, "accuracy")},
        leaked=repeated([e[0].prompt for e in read.get("train", [])], [e[1].prompt for e in read["test"]]),
        hashes=hashes, source=where, counted=counted | _given_twice(listed),
        no_training=f"the public instruction files have none; load_task({name!r}, source='hub') (--source hub) has some",
    )  # fmt: skip


def _in_instruction_form(spec: Spec, rows: Mapping[str, Sequence[Row]]) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Rows of the hub in instruction form; unusable training rows are left out and counted, other ones raise DataError."""
    listed: dict[str, list[Row]] = {split: [] for split in rows}
    left_out: list[DataError] = []
    for split, given in rows.items():
        for where, row in given:
            try:
                made = spec.instruction(where, row)
                example(spec, where, made)
            except DataError as e:
                if split != "train":
                    raise
                left_out.append(e)
            else:
                listed[split].append((where, made))
    if left_out and not listed["train"]:
        raise DataError(
            f"none of the {len(left_out)} training rows of {spec.hub} is valid for this task; the first: {left_out[0]}"
        )
    return listed, {"train: unusable rows left out": len(left_out)} if left_out else {}


def hold_out(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Take validation rows from the training split: 300 or a tenth, drawn with seed 0, both kept in their order."""
    train = rows["train"]
    n = min(HELD_OUT, len(train) // 10)
    held = set(random.Random(0).sample(range(len(train)), n))
    return {
        "train": [row for i, row in enumerate(train) if i not in held],
        "val": [train[i] for i in sorted(held)],
        "test": list(rows["test"]),
    }


def example(spec: Spec, where: str, row: Any) -> tuple[SFTExample, GenerationExample, OptionExample | None]:
    """One instruction: to learn its response, to generate it, or to choose the option that completes it."""
    instruction, output, answer = fields(where, row, "instruction", "output", "answer")
    prompt = PROMPT.format(instruction=instruction)
    trained, asked = SFTExample(prompt, output), GenerationExample(prompt, (answer,))
    if spec.names is None:
        _number(where, answer)
        return trained, asked, None
    options = names_of(where, instruction)
    if answer not in options:
        raise DataError(f"{where}: the answer {answer!r} is not among the options {list(options)}")
    if bad := [o for o in options if not re.fullmatch(spec.names, o)]:
        raise DataError(
            f"{where}: option {bad[0]!r} is invalid for this task ({spec.names}); is it another task's file?"
        )
    chosen = OptionExample(prompt + RESPONSE, tuple(" " + o for o in options), options.index(answer))
    return trained, asked, chosen


def names_of(where: str, instruction: str) -> tuple[str, ...]:
    """The options' names, from the line "Answer format: a/b/c"; each `AnswerN:` must have a text."""
    _, found, names = instruction.rpartition("Answer format: ")
    if not found:
        raise DataError(f"{where}: field 'instruction' has no line 'Answer format: option/option'")
    options = tuple(names.strip().split("/"))
    check_options(where, options)
    said = _said(instruction)
    if said and len(said) != len(options):
        raise DataError(f"{where}: {len(said)} answers are given, but the answer format names {len(options)} options")
    if "" in said:
        raise DataError(f"{where}: Answer{said.index('') + 1} is empty")
    return options


def _said(instruction: str) -> list[str]:
    """The text of each `AnswerN:` of an instruction."""
    body = instruction.rpartition("\n\nAnswer format: ")[0]
    return [part.strip() for part in re.split(r"Answer\d+:", body)[1:]]


def _given_twice(rows: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    found = {}
    for split, listed in rows.items():
        said = (_said(row["instruction"]) for _, row in listed)
        if n := sum(len(set(options)) < len(options) for options in said):
            found[f"{split}: options given twice"] = n
    return found


def first_option(names: str, generated: str, example: GenerationExample) -> dict[str, float]:
    """1 if the first option that the response names is the right one."""
    found = re.search(names, generated)
    return {"accuracy": float(found is not None and found[0] == example.references[0])}


def last_number(generated: str, example: GenerationExample) -> dict[str, float]:
    """1 if the last number of the response is the right one; thousands separators are ignored."""
    found = re.findall(r"-?\d+\.?\d*", generated.replace(",", ""))
    return {"accuracy": float(bool(found) and abs(float(found[-1]) - float(example.references[0])) <= TOLERANCE)}


def _number(where: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: field 'answer' is {text!r}; it must be a number")
    return number


def _choice(question: str, options: Sequence[str], right: int) -> dict[str, str]:
    names = [f"answer{i + 1}" for i in range(len(options))]
    said = " ".join(f"{name.capitalize()}: {option}" for name, option in zip(names, options, strict=True))
    return _row(
        f"Please choose the correct answer to the question: {question}\n\n{said}\n\nAnswer format: {'/'.join(names)}",
        names[right],
    )


def _row(instruction: str, answer: str) -> dict[str, str]:
    return {"instruction": instruction, "output": f"{RESPONSE} {answer}", "answer": answer}


def _siqa(where: str, row: Any) -> dict[str, str]:
    context, question, label, *options = fields(
        where, row, "context", "question", "label", "answerA", "answerB", "answerC"
    )
    if label not in ("1", "2", "3"):
        raise DataError(f"{where}: field 'label' is {label!r}; allowed: 1, 2, 3")
    return _choice(f"{context} {question}", options, int(label) - 1)


def _arc(where: str, row: Any) -> dict[str, str]:
    question, key = fields(where, row, "question", "answerKey")
    choices = row.get("choices")
    if not isinstance(choices, Mapping):
        raise DataError(f"{where}: field 'choices' must hold 'label' and 'text', got {choices!r}")
    labels, options = texts(where, choices, "label"), texts(where, choices, "text")
    if len(labels) != len(options) or key not in labels:
        raise DataError(f"{where}: answer {key!r} is not among the labels {list(labels)} of {len(options)} options")
    return _choice(question, options, labels.index(key))


def _boolq(where: str, row: Any) -> dict[str, str]:
    (question,) = fields(where, row, "question")
    answer = str(row.get("answer")).lower()  # a bool, or its text in a .csv file
    if answer not in ("true", "false"):
        raise DataError(f"{where}: field 'answer' is {row.get('answer')!r}; allowed: true, false")
    return _row(
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false",
        answer,
    )


def _svamp(where: str, row: Any) -> dict[str, str]:
    body, question, answer = fields(where, row, "Body", "Question", "Answer")
    number = f"{_number(where, answer):.15g}"  # digits in full: some answers have eight
    return {
        "instruction": f"{body.strip().rstrip('.')}. {question.strip()}",
        "output": f"The answer is {number}.", "answer": answer,
    }  # fmt: skip


ANSWERS = "answer[1-5]"
SPECS = {
    "siqa": Spec(
        Source("social_i_qa", {"test.json": "71543f41127451945379d106ffedaef502f1c8770dff6d2f543aca85e3080b1d"}, BASE, ("siqa",)),
        HubSource(
            "allenai/social_i_qa", None, "537a2ec8ec565adc0b70b70752893e59e024df26", {"train": "train", "test": "validation"}
        ),
        _siqa, ANSWERS, 32,
    ),
    "arc_challenge": Spec(
        Source("ARC-Challenge", {
            "train.json": "a9debff28aafed86a08211dc3584a3b6cb38edca8c56bb34cd5002ed54aeebfb",
            "test.json": "4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7",
        }, BASE, ("arc_challenge",)),
        HubSource(
            "allenai/ai2_arc", "ARC-Challenge", "210d026faf9955653af8916fad021475a3f00453",
            {"train": "train", "val": "validation", "test": "test"},
        ),
        _arc, ANSWERS, 32,
    ),
    "boolq": Spec(
        Source("boolq", {
            "train.json": "5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83",
            "test.json": "89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9",
        }, BASE),
        HubSource(
            "google/boolq", None, "35b264d03638db9f4ce671b711558bf7ff0f80d5", {"train": "train", "test": "validation"}
        ),
        _boolq, "true|false", 32,
    ),
    "svamp": Spec(
        Source("SVAMP", {"test.json": "ffed015784f738f317c5603177861d044c4fc94e09211d78b25e96d46c656e2c"}, BASE),
        HubSource("ChilleD/SVAMP", None, "5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef", {"train": "train", "test": "test"}),
        _svamp, None, 256,
    ),
}  # fmt: skip
