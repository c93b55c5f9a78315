"""One row of a task: what is trained on, or how it is asked and graded."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SFTExample:
    """Learn to continue `prompt` with `answer` (and the end-of-sequence token)."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class PairExample:
    """Learn to prefer `chosen` over `rejected` after `prompt`."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class GenerationExample:
    """Generate from `prompt`; the answer is right if the graded text is among `references`.

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
    """Exact match of the first line, stripped and lower-cased, with any reference; and whether the text contains one."""
    said = generated.strip().split("\n")[0].strip().lower()
    em = float(said in {r.strip().lower() for r in example.references})
    return {"em": em, "contains": contains(generated, example)}


def contains(generated: str, example: GenerationExample) -> float:
    """1 if the text contains a reference as whole words, in any case: a chatty model may know the answer too.

    A hyphen joins words: "mother-in-law" does not contain "mother".
    """
    wanted = "|".join(re.escape(r) for r in (r.strip().casefold() for r in example.references) if r)
    return float(bool(wanted) and re.search(rf"(?<!\w)(?<!\w-)({wanted})(?!\w|-\w)", generated.casefold()) is not None)


@dataclass(frozen=True)
class Chat:
    """Marks a task whose prompts go through the chat template.

    Attributes:
        system: the system prompt, or None.
        template: SHA-256 of the template; empty as long as the model is not known.
    """

    system: str | None = None
    template: str = ""
