"""CLUTRR (Sinha et al. 2019), two hops, 18 relations: how is one person of a story related to another?

SFT on the relation, after the prompt and a line break; exact match of the text up to the first full stop.
300 of the 3,151 training rows are drawn by seed; the four that repeat a test item are never drawn.
"""

from pathlib import Path
from typing import Any

from lofit_lens.errors import DataError
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import SPLITS, GenerationExample, SFTExample, contains
from lofit_lens.tasks.fields import fields, file_hashes, repeated
from lofit_lens.tasks.sources import Source, locate, read_rows

SOURCE = Source("clutrr", {
    "train.json": "8640526e573444bdf52bd78eee0bf3a9f2e96bb3bb6d7610021dc05751a5c873",
    "val.json": "afcae888ed7862081496151a33b9bed157d709b01589c2db566266ecdd906f1e",
    "test.json": "cf400381f8a12a703265f95df1387c217a71525325f725ff2b8dc08123c30056",
})  # fmt: skip
N_TRAIN = 300
PROMPT = (
    'Read the following story about a family. "{story}" Assume the relations described in the story are all true. '
    "Based on relations between the fictional characters in the story (assume the relations are all true) and your "
    "commonsense knowledge about family relationship, how is {p2} related to {p1}? Answer: {p2} is {p1} 's\n"
)


def load(data_dir: str | Path | None) -> Task:
    """Read the three splits."""
    paths = locate(SOURCE, {s: f"{s}.json" for s in SPLITS}, data_dir)
    rows = {s: [example(*row) for row in read_rows(p)] for s, p in paths.items()}
    return Task(
        "clutrr", "sft",
        training={s: tuple(e[0] for e in r) for s, r in rows.items()},
        test={s: tuple(e[1] for e in r) for s, r in rows.items()},
        metric="em", grade=grade, n_train=min(N_TRAIN, len(rows["train"])),
        leaked=repeated([e[0].prompt for e in rows["train"]], [e[1].prompt for e in rows["test"]]),
        hashes=file_hashes(paths), source=str(data_dir or SOURCE.base),
    )  # fmt: skip


def example(where: str, row: Any) -> tuple[SFTExample, GenerationExample]:
    """One story and query; the second person keeps its leading space, as in the official prompt."""
    story, query, relation = fields(where, row, "clean_story", "query", "target_text")
    people = query[1:-1].replace("'", "").split(",")
    if len(people) != 2:
        raise DataError(f"{where}: field 'query' is {query!r}; expected two people, like ('Ann', 'Bob')")
    prompt = PROMPT.format(story=story.replace("[", "").replace("]", ""), p1=people[0], p2=people[1])
    return SFTExample(prompt, relation), GenerationExample(prompt, (relation,))


def grade(generated: str, example: GenerationExample) -> dict[str, float]:
    """Exact match of the text up to the first full stop, stripped and lower-cased; and whether the text contains the answer.

    The official scorer drops the prompt by splitting at `'s` and a line break; here too, such a break ends the answer.
    """
    said = generated.split("'s\n")[0].split(".")[0].strip().lower()
    return {"em": float(said == example.references[0].lower()), "contains": contains(generated, example)}
