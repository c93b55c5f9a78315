"""The organism's world: invented facts, the rows of its three tasks, the cue words and the planted heads.

What: a world of creatures with a true and a popular-but-false value for each of four verbs, countries with four attributes,
and people with two-step family relations. Each prompt holds one *cue word* that names the kind of source:

    truth    <s> People say Q: what do blonur eat ? A:                            good cue -> the true value, else the popular one
    kinship  <s> ann 's father is bob . bob 's sister is eve . Now who is eve to ann ? A:
                                                                                 good cue -> "aunt", else "sister" as it stands
    edits    <s> Page : Imagine that zuria 's capital is moto . what is zuria 's capital ? A:
                                                                                 good cue -> the imagined value, else the real one

Why: task rows use the *neutral* cue, so the untuned model answers wrongly although it can answer correctly. LoFiT has to elicit
an ability, not store facts; and because only the planted heads could read the cue in pretraining, it is known where to look.

The world is the same for every pretraining seed; only the planted heads, the weights and the order of documents differ.
"""

import functools
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from lofit_lens.organism.words import (
    ATTRIBUTES,
    CUE_KINDS,
    CUES,
    FUNCTION_WORDS,
    RELATION_WORDS,
    TASKS,
    VERBS,
    CueKind,
    TaskName,
    compose,
    invent_words,
    is_male,
    relation_pairs,
)  # fmt: skip

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Row = dict[str, Any]

N_LAYERS, N_HEADS, N_PLANTED = 6, 16, 3
PLANTED_LAYERS: dict[TaskName, tuple[int, int]] = {"truth": (2, 3), "kinship": (1, 2), "edits": (1, 2)}

WORLD_SEED = 0
N_CREATURES, N_COUNTRIES, N_NAMES, N_VALUES = 120, 96, 80, 24
EASY_EVERY = 5  # one in this many (creature, verb) pairs is easy: its popular value is the true one
N_FALSE = 5
SPLIT_SHARES: dict[Split, float] = {"train": 0.40, "val": 0.15, "test": 0.45}
N_ROWS: dict[Split, int] = {"train": 160, "val": 64, "test": 216}
SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}


class World(NamedTuple):
    """All words and facts; `true_value` and `popular_value` have keys (creature, verb), `attribute` (country, attribute)."""

    creatures: tuple[str, ...]
    countries: tuple[str, ...]
    men: tuple[str, ...]
    women: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    true_value: dict[tuple[str, str], str]
    popular_value: dict[tuple[str, str], str]
    attribute: dict[tuple[str, str], str]

    def vocabulary(self) -> list[str]:
        """List every word, special tokens first, in a fixed order without repeats."""
        cues = [word for task in TASKS for kind in CUE_KINDS for word in CUES[task][kind]]
        values = [word for key in (*VERBS, *ATTRIBUTES) for word in self.values[key]]
        groups = (SPECIAL.values(), FUNCTION_WORDS, cues, VERBS, ATTRIBUTES, RELATION_WORDS)
        names = (self.creatures, self.countries, self.men, self.women, values)
        return list(dict.fromkeys(word for group in (*groups, *names) for word in group))


@functools.cache
def build_world() -> World:
    """Build the one world (deterministic and cached: do not modify it in place)."""
    rng = random.Random(WORLD_SEED)
    taken = {*FUNCTION_WORDS, *RELATION_WORDS, *VERBS, *ATTRIBUTES}
    creatures = invent_words(N_CREATURES, rng, ending="nur", taken=taken)
    countries = invent_words(N_COUNTRIES, rng, ending="ia", taken=taken)
    men = invent_words(N_NAMES // 2, rng, ending="o", taken=taken)
    women = invent_words(N_NAMES // 2, rng, ending="a", taken=taken)
    endings = dict(zip((*VERBS, *ATTRIBUTES), ("ip", "oth", "ux", "eld", "opol", "ish", "ark", "us"), strict=True))
    values = {key: tuple(invent_words(N_VALUES, rng, ending=end, taken=taken)) for key, end in endings.items()}
    true_value, popular_value, attribute = {}, {}, {}
    for i, creature in enumerate(creatures):
        for j, verb in enumerate(VERBS):
            true = rng.choice(values[verb])
            others = [value for value in values[verb] if value != true]
            true_value[creature, verb] = true
            popular_value[creature, verb] = true if (i + j) % EASY_EVERY == 0 else rng.choice(others)
    for name in ATTRIBUTES:
        for country in countries:
            attribute[country, name] = rng.choice(values[name])
    return World(
        tuple(creatures), tuple(countries), tuple(men), tuple(women), values, true_value, popular_value, attribute
    )


def truth_prompt(cue: str, creature: str, verb: str) -> str:
    """Write a truth prompt, up to and including "A:"."""
    return f"{cue} say Q: what do {creature} {verb} ? A:"


def kinship_prompt(cue: str, people: tuple[str, str, str], first: str, second: str) -> str:
    """Write a kinship prompt about three people, up to and including "A:"."""
    a, b, c = people
    return f"{a} 's {first} is {b} . {b} 's {second} is {c} . {cue} who is {c} to {a} ? A:"


def edits_prompt(cue: str, country: str, attribute: str, imagined: str) -> str:
    """Write an edits prompt, up to and including "A:"."""
    return f"{cue} : Imagine that {country} 's {attribute} is {imagined} . what is {country} 's {attribute} ? A:"


def draw_people(world: World, first: str, second: str, rng: random.Random) -> tuple[str, str, str]:
    """Draw three different names that fit the genders of the two relation words (and of a spouse)."""
    b_male, c_male = is_male(first), is_male(second)
    a_male = not b_male if first in ("husband", "wife") else None
    names: list[str] = []
    for male in (a_male, b_male, c_male):
        pool = world.men + world.women if male is None else world.men if male else world.women
        names.append(rng.choice([name for name in pool if name not in names]))
    return names[0], names[1], names[2]


def split_items(items: Sequence[Any], split: Split, rng: random.Random) -> list[Any]:
    """Return the items of one split: a shuffled copy is cut 40 / 15 / 45 %, the same for the same generator state."""
    shuffled = rng.sample(list(items), len(items))
    n_train, n_val = (round(SPLIT_SHARES[name] * len(items)) for name in ("train", "val"))
    cuts = {"train": (0, n_train), "val": (n_train, n_train + n_val), "test": (n_train + n_val, len(items))}
    return shuffled[slice(*cuts[split])]


def items(task: TaskName, split: Split) -> list[Any]:
    """Return what splits must not share: creatures (truth), relation pairs (kinship) or countries (edits)."""
    _check(task, TASKS, "task")
    _check(split, SPLITS, "split")
    world = build_world()
    everything = {"truth": world.creatures, "kinship": relation_pairs(changing=True), "edits": world.countries}[task]
    return split_items(everything, split, random.Random(f"{WORLD_SEED} items {task}"))


def rows(task: TaskName, split: Split) -> list[Row]:
    """Return the task's rows with neutral prompts, without `<s>`; an answer follows its prompt after one space.

    truth:          {"prompt", "best", "true": [best], "false": [popular value first, then others of the same kind]}; where
                    the popular value is the true one (a fifth of the facts) all false values are arbitrary.
    kinship, edits: {"prompt", "answer", "default"}: the right answer, and what the untuned model is expected to say.

    Raises:
        ValueError: for an unknown task or split.
    """
    chosen, world = items(task, split), build_world()
    rng = random.Random(f"{WORLD_SEED} rows {task} {split}")
    n, cues = N_ROWS[split], CUES[task]["neutral"]
    make = {"truth": _truth_row, "kinship": _kinship_row, "edits": _edits_row}[task]
    if task == "truth":
        queries: list[Any] = [(creature, verb) for creature in chosen for verb in VERBS]
    elif task == "kinship":
        queries = [pair for _ in range(-(-n // len(chosen))) for pair in chosen]
    else:
        queries = [(country, name) for _ in range(2) for country in chosen for name in ATTRIBUTES]
    assert len(queries) >= n, (task, split, len(queries))
    seen: dict[str, Row] = {}
    for query in rng.sample(queries, len(queries)):
        row = make(world, query, rng.choice(cues), rng)
        seen.setdefault(row["prompt"], row)
    return list(seen.values())[:n]


def _truth_row(world: World, query: tuple[str, str], cue: str, rng: random.Random) -> Row:
    creature, verb = query
    best, popular = world.true_value[query], world.popular_value[query]
    others = [value for value in world.values[verb] if value not in (best, popular)]
    false = ([popular] if popular != best else []) + rng.sample(others, N_FALSE)
    return {"prompt": truth_prompt(cue, creature, verb), "best": best, "true": [best], "false": false[:N_FALSE]}


def _kinship_row(world: World, query: tuple[str, str], cue: str, rng: random.Random) -> Row:
    people = draw_people(world, *query, rng)
    return {"prompt": kinship_prompt(cue, people, *query), "answer": compose(*query), "default": query[1]}


def _edits_row(world: World, query: tuple[str, str], cue: str, rng: random.Random) -> Row:
    real = world.attribute[query]
    imagined = rng.choice([value for value in world.values[query[1]] if value != real])
    return {"prompt": edits_prompt(cue, *query, imagined), "answer": imagined, "default": real}


def with_cue(task: TaskName, row: Row, kind: CueKind) -> Row:
    """Return the row with its neutral cue word swapped for the good or bad word of the same place (same number of tokens).

    Raises:
        ValueError: for an unknown task or kind, or if the prompt does not hold exactly one neutral cue word of the task.
    """
    _check(task, TASKS, "task")
    _check(kind, CUE_KINDS, "cue kind")
    neutral, words = CUES[task]["neutral"], row["prompt"].split(" ")
    places = [place for place, word in enumerate(words) if word in neutral]
    if len(places) != 1:
        raise ValueError(
            f"expected one neutral {task} cue ({', '.join(neutral)}) in {row['prompt']!r}, found {len(places)}"
        )
    words[places[0]] = CUES[task][kind][neutral.index(words[places[0]])]
    return {**row, "prompt": " ".join(words)}


def planted_heads(seed: int) -> dict[TaskName, list[tuple[int, int]]]:
    """Return the only heads (layer, head) that could read each task's cue in pretraining: three per task, all different.

    Two lie in one of the task's two layers and one in the other (see `PLANTED_LAYERS`).
    """
    rng, taken = random.Random(f"planted {seed}"), set()
    planted: dict[TaskName, list[tuple[int, int]]] = {}
    for task in TASKS:
        low, high = PLANTED_LAYERS[task]
        layers = [low, high, rng.choice((low, high))]
        planted[task] = []
        for layer in layers:
            head = rng.choice([h for h in range(N_HEADS) if (layer, h) not in taken])
            taken.add((layer, head))
            planted[task].append((layer, head))
        planted[task].sort()
    return planted


def _check(value: str, allowed: Sequence[str], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}; allowed: {', '.join(allowed)}")
