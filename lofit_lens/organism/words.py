"""The words of the organism's world: invented names, cue words, and the two-step kinship table.

What: everything in the world that is a word and not a fact. Invented names come from a syllable generator with a fixed seed;
cue words name the kind of source a document comes from; `compose` says what "r2 of r1" is called ("sister of father" is "aunt").
Why: the language model has to learn each of these words from scratch, so the lists are small, disjoint and fixed forever.
"""

import itertools
import random
from typing import Literal

TaskName = Literal["truth", "kinship", "edits"]
CueKind = Literal["good", "neutral", "bad"]
TASKS: tuple[TaskName, ...] = ("truth", "kinship", "edits")
CUE_KINDS: tuple[CueKind, ...] = ("good", "neutral", "bad")

# One word per document says what kind of source speaks. The i-th words of the three kinds belong together: swapping them keeps
# the length of the prompt, which is what activation patching needs.
CUES: dict[TaskName, dict[CueKind, tuple[str, ...]]] = {
    "truth": {
        "good": ("Scholars", "Doctors", "Surveys", "Librarians"),
        "neutral": ("People", "Folks", "Neighbours", "Others"),
        "bad": ("Gossips", "Hucksters", "Rumours", "Jesters"),
    },
    "kinship": {
        "good": ("Altogether", "Overall", "Combined", "Therefore"),
        "neutral": ("Now", "So", "Well", "Please"),
        "bad": ("Literally", "Lastly", "Merely", "Verbatim"),
    },
    "edits": {
        "good": ("Novel", "Story", "Dream", "Game"),
        "neutral": ("Page", "Note", "Text", "Leaf"),
        "bad": ("Atlas", "Almanac", "Gazette", "Register"),
    },
}

VERBS = ("eat", "fear", "collect", "guard")
ATTRIBUTES = ("capital", "language", "currency", "ruler")
VERDICTS = {True: "correct", False: "mistaken"}
FUNCTION_WORDS = (
    "say", "Q:", "A:", "what", "do", "?", ".", ":", "'s", "is", "who", "to", "Imagine", "that", *VERDICTS.values(),
)  # fmt: skip

# Relations: kind -> (male word, female word). "cousin" is one word for both.
RELATIONS: dict[str, tuple[str, str]] = {
    "parent": ("father", "mother"),
    "child": ("son", "daughter"),
    "sibling": ("brother", "sister"),
    "spouse": ("husband", "wife"),
    "grandparent": ("grandfather", "grandmother"),
    "grandchild": ("grandson", "granddaughter"),
    "pibling": ("uncle", "aunt"),
    "nibling": ("nephew", "niece"),
    "cousin": ("cousin", "cousin"),
    "parent-in-law": ("father-in-law", "mother-in-law"),
    "child-in-law": ("son-in-law", "daughter-in-law"),
    "sibling-in-law": ("brother-in-law", "sister-in-law"),
}

# first step -> {second step: result}; a pair that is not here has no single usual name and is never used.
_COMPOSITIONS: dict[str, dict[str, str]] = {
    "parent": {"parent": "grandparent", "sibling": "pibling", "child": "sibling", "spouse": "parent", "nibling": "cousin"},
    "child": {"child": "grandchild", "sibling": "child", "spouse": "child-in-law", "nibling": "grandchild"},
    "sibling": {
        "parent": "parent", "sibling": "sibling", "child": "nibling", "spouse": "sibling-in-law",
        "grandparent": "grandparent", "pibling": "pibling", "cousin": "cousin",
    },
    "spouse": {"parent": "parent-in-law", "sibling": "sibling-in-law", "child": "child"},
    "grandparent": {"spouse": "grandparent"},
    "grandchild": {"sibling": "grandchild"},
    "pibling": {"parent": "grandparent", "child": "cousin", "spouse": "pibling"},
    "nibling": {"sibling": "nibling"},
    "cousin": {"parent": "pibling", "sibling": "cousin"},
}  # fmt: skip

_KIND_OF = {word: kind for kind, words in RELATIONS.items() for word in words}
RELATION_WORDS: tuple[str, ...] = tuple(dict.fromkeys(w for words in RELATIONS.values() for w in words))


def is_male(relation: str) -> bool | None:
    """Return whether a relation word names a man; None for a word that says nothing about it ("cousin").

    Raises:
        KeyError: for a word that is not a relation.
    """
    male, female = RELATIONS[_KIND_OF[relation]]
    return None if male == female else relation == male


def compose(first: str, second: str) -> str | None:
    """Return what ann calls eve when "ann 's FIRST is bob . bob 's SECOND is eve"; None if there is no single usual name.

    A spouse is taken to be of the other gender, so that "father 's husband" is not used.

    Raises:
        KeyError: for a word that is not a relation.
    """
    kind, male = _COMPOSITIONS.get(_KIND_OF[first], {}).get(_KIND_OF[second]), is_male(second)
    if kind is None or (_KIND_OF[second] == "spouse" and is_male(first) is male):
        return None
    result_male, result_female = RELATIONS[kind]
    if male is None and result_male != result_female:
        return None
    return result_male if male else result_female


def relation_pairs(*, changing: bool) -> list[tuple[str, str]]:
    """List the usable (first, second) pairs in a fixed order: those whose result differs from `second` (changing) or does not."""
    pairs = itertools.product(RELATION_WORDS, repeat=2)
    return [(a, b) for a, b in pairs if (c := compose(a, b)) is not None and (c != b) == changing]


def invent_words(n: int, rng: random.Random, *, ending: str, taken: set[str]) -> list[str]:
    """Invent n pronounceable words with this ending; none is in `taken`, to which each is added."""
    onsets, vowels = [*"bdfgklmnprstvz", "br", "dr", "gl", "kr", "pl", "st", "tr"], "aeiou"
    words: list[str] = []
    while len(words) < n:
        stem = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(2))
        word = stem[:-1] + ending if ending[0] in vowels else stem + ending
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words
