"""The organism's three tasks in the library's form, under `load_task("organism/truth")` and so on.

The prompt's cue is neutral; 150 of the training rows are drawn by seed. Truth trains by DPO (true value against the popular
false one) and is tested by multiple choice; kinship and edits train by SFT and are tested by exact match. `organism/truth-cued`
and so on ask the same with a good cue: what the unmodified model can do.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lofit_lens.errors import InputError
from lofit_lens.io import digest
from lofit_lens.organism.words import TASKS, TaskName
from lofit_lens.organism.world import SPLITS, Row, rows, with_cue
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import ChoiceExample, GenerationExample, PairExample, SFTExample, contains
from lofit_lens.tasks.registry import register

N_TRAIN = 150
MAX_NEW_TOKENS = 4


def load(task: TaskName, data_dir: str | Path | None = None) -> Task:
    """Load one of the three tasks; it is generated, so a data folder is refused."""
    if data_dir is not None:
        raise InputError(f"organism/{task} is generated from its world and reads no files; leave data_dir out")
    made = {split: [_forms(row) for row in rows(task, split)] for split in SPLITS}
    training: dict[str, Any] = {split: tuple(f[0] for f in forms) for split, forms in made.items()}
    test: dict[str, Any] = {split: tuple(f[1] for f in forms) for split, forms in made.items()}
    return Task(
        f"organism/{task}", "dpo" if task == "truth" else "sft", training, test, "mc1" if task == "truth" else "em",
        grade=None if task == "truth" else grade, max_new_tokens=MAX_NEW_TOKENS, n_train=N_TRAIN,
        hashes={split: digest(rows(task, split)) for split in SPLITS}, source="lofit_lens.organism.world",
    )  # fmt: skip


def load_cued(task: TaskName, data_dir: str | Path | None = None) -> Task:
    """Load the same questions with the good cue, which the unmodified model answers correctly: for evaluation only."""
    plain = load(task, data_dir)
    asked = {split: [with_cue(task, row, "good") for row in rows(task, split)] for split in SPLITS}
    return replace(
        plain, name=f"{plain.name}-cued", training={}, test={s: tuple(_forms(r)[1] for r in found) for s, found in asked.items()},
        hashes={split: digest(found) for split, found in asked.items()}, n_train=None,
        no_training=f"the answer stands in the cue; train on {plain.name}",
    )  # fmt: skip


def _forms(row: Row) -> tuple[SFTExample | PairExample, GenerationExample | ChoiceExample]:
    prompt = row["prompt"]
    if "answer" in row:
        return SFTExample(prompt, " " + row["answer"]), GenerationExample(prompt, (row["answer"],))
    true, false = tuple(" " + a for a in row["true"]), tuple(" " + a for a in row["false"])
    return PairExample(prompt, " " + row["best"], false[0]), ChoiceExample(prompt, " " + row["best"], true, false)


def grade(generated: str, example: GenerationExample) -> dict[str, float]:
    """Exact match of the text up to the first full stop, stripped; and whether the text contains the answer."""
    em = generated.split(".")[0].strip() == example.references[0]
    return {"em": float(em), "contains": contains(generated, example)}


for _task in TASKS:
    register(f"organism/{_task}", partial(load, _task))
    register(f"organism/{_task}-cued", partial(load_cued, _task))
