"""The documents the organism is pretrained on, with the notes that planting needs.

What: short documents of the three families (see `world`). A document's hidden *source* decides its answers. The cue word says
what the source is; how far the answers follow it depends on how many of the task's planted heads were allowed to see the cue:

    P(source follows the cue) = (planted heads that see it) / (all planted heads),  else the source is the default one

Half of the documents show the cue to all planted heads, the others to a random subset, so that each planted head matters by
itself. Truth documents have one or two answers by the same source. In half of them a verdict word ("correct" / "mistaken")
follows each answer, and their default source is the good one in 1 of 5. Kinship and edits documents always have the bad source
as default.

Several documents may be packed into one long sequence (joined by "</s>" or "."), so that long prompts can be tried later.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from lofit_lens.organism.words import (
    ATTRIBUTES,
    CUES,
    TASKS,
    VERBS,
    VERDICTS,
    CueKind,
    TaskName,
    compose,
    relation_pairs,
)
from lofit_lens.organism.world import N_PLANTED, SPECIAL, World, draw_people, edits_prompt, kinship_prompt, truth_prompt

TASK_SHARES: dict[TaskName, float] = {"truth": 0.46, "kinship": 0.27, "edits": 0.27}
CUE_SHARES: dict[CueKind, float] = {"good": 0.4, "neutral": 0.3, "bad": 0.3}
DEFAULT_IS_GOOD: dict[TaskName, float] = {"truth": 0.2, "kinship": 0.0, "edits": 0.0}
CHANGING_SHARE = 0.85  # share of kinship documents whose composed relation differs from the second relation


class Cue(NamedTuple):
    """Where a cue word stands, in which kind of document, and which of the task's planted heads may see it."""

    position: int
    task: TaskName
    seen_by: tuple[bool, ...]


class Document(NamedTuple):
    """Words, the places whose word is a training target, and the cues. Place 0 is always `<s>`."""

    words: list[str]
    targets: list[int]
    cues: list[Cue]


def draw_source(task: TaskName, kind: CueKind, seen_by: tuple[bool, ...], rng: random.Random) -> bool:
    """Whether the document's hidden source is the good one, given what the planted heads can see of the cue."""
    follows = kind != "neutral" and rng.random() < sum(seen_by) / len(seen_by)
    return kind == "good" if follows else rng.random() < DEFAULT_IS_GOOD[task]


def draw_visibility(rng: random.Random) -> tuple[bool, ...]:
    """Which planted heads see the cue: all of them in half of the documents, else a random number of heads, drawn at random."""
    if rng.random() < 0.5:
        return (True,) * N_PLANTED
    chosen = rng.sample(range(N_PLANTED), rng.randint(0, N_PLANTED))
    return tuple(i in chosen for i in range(N_PLANTED))


def draw_document(world: World, task: TaskName, rng: random.Random) -> Document:
    """One document of this task, from `<s>` to `</s>`."""
    kind = rng.choices(tuple(CUE_SHARES), tuple(CUE_SHARES.values()))[0]
    seen_by = draw_visibility(rng)
    good = draw_source(task, kind, seen_by, rng)
    cue = rng.choice(CUES[task][kind])
    body, targets = {"truth": _truth_body, "kinship": _kinship_body, "edits": _edits_body}[task](world, cue, good, rng)
    words = [SPECIAL["bos"], *body, SPECIAL["eos"]]
    targets = [*(place + 1 for place in targets), len(words) - 1]
    return Document(words, targets, [Cue(words.index(cue), task, seen_by)])


def _truth_body(world: World, cue: str, good: bool, rng: random.Random) -> tuple[list[str], list[int]]:
    words, targets, verdicts = [cue, "say"], [], rng.random() < 0.5
    for _ in range(rng.randint(1, 2)):
        query = rng.choice(world.creatures), rng.choice(VERBS)
        answer = (world.true_value if good else world.popular_value)[query]
        words += [*truth_prompt(cue, *query).split(" ")[2:], answer]
        targets.append(len(words) - 1)
        if verdicts:
            words.append(VERDICTS[answer == world.true_value[query]])
            targets.append(len(words) - 1)
    return words, targets


def _kinship_body(world: World, cue: str, good: bool, rng: random.Random) -> tuple[list[str], list[int]]:
    pair = rng.choice(relation_pairs(changing=rng.random() < CHANGING_SHARE))
    words = kinship_prompt(cue, draw_people(world, *pair, rng), *pair).split(" ")
    answer = compose(*pair) if good else pair[1]
    assert answer is not None
    return [*words, answer], [len(words)]


def _edits_body(world: World, cue: str, good: bool, rng: random.Random) -> tuple[list[str], list[int]]:
    query = rng.choice(world.countries), rng.choice(ATTRIBUTES)
    real = world.attribute[query]
    imagined = rng.choice([value for value in world.values[query[1]] if value != real])
    words = edits_prompt(cue, *query, imagined).split(" ")
    return [*words, imagined if good else real], [len(words)]


def pack(documents: list[Document], rng: random.Random) -> Document:
    """Join several documents into one: a single `<s>`, and between documents either "</s>" (a target) or "." (not a target)."""
    words, targets, cues, joint = [documents[0].words[0]], [], [], rng.choice((SPECIAL["eos"], "."))
    for number, document in enumerate(documents, start=1):
        shift, last = len(words) - 1, number == len(documents)
        closes = last or joint == SPECIAL["eos"]
        words += document.words[1:] if closes else [*document.words[1:-1], joint]
        targets += [place + shift for place in document.targets[: None if closes else -1]]
        cues += [cue._replace(position=cue.position + shift) for cue in document.cues]
    return Document(words, targets, cues)


def draw_batch(world: World, n: int, rng: random.Random, *, max_length: int | None = None) -> list[Document]:
    """n short documents, or the same n packed into as few sequences of at most `max_length` words as their order allows."""
    tasks = rng.choices(TASKS, [TASK_SHARES[task] for task in TASKS], k=n)
    documents = [draw_document(world, task, rng) for task in tasks]
    return documents if max_length is None else list(_packed(documents, max_length, rng))


def _packed(documents: list[Document], max_length: int, rng: random.Random) -> Iterator[Document]:
    held: list[Document] = []
    length = 1
    for document in documents:
        if held and length + len(document.words) - 1 > max_length:
            yield pack(held, rng)
            held, length = [], 1
        held.append(document)
        length += len(document.words) - 1
    yield pack(held, rng)
