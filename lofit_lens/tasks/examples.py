"""One row of a task: what is learned from it, or how it is asked."""

from dataclasses import dataclass, field


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
