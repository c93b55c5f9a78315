"""MQuAKE (Zhong et al. 2023): answer a multi-hop question under one imagined edit (LoFiT's split 134/95/864).

SFT on `prompt + new_answer`; greedy generation of 16 tokens; exact match of the first line behind the last `A:` with
the new answer or an alias. The official scorer does not strip white space, which counts " sweden" as wrong:
`em` strips, `em_official` does not.
"""

from pathlib import Path
from typing import Any

from lofit_lens.errors import DataError
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import SPLITS, GenerationExample, SFTExample, contains
from lofit_lens.tasks.fields import fields, file_hashes, texts
from lofit_lens.tasks.sources import Source, locate, read_rows

SOURCE = Source("MQuAKE", {
    "train.jsonl": "5db931bd09457245d1a133fe8df86a45985d28767ba6f032d1b7dcc737e22498",
    "val.jsonl": "3cbf9245ba671458d0979c5bba569e838d54fce860e8d0c5af0bc2ce54d41e83",
    "test.jsonl": "3090ef350f4322878968466881de9ec988b5b71daf55d5d9b04fb894a5ebac87",
})  # fmt: skip


def load(data_dir: str | Path | None) -> Task:
    """Read the three splits."""
    paths = locate(SOURCE, {s: f"{s}.jsonl" for s in SPLITS}, data_dir)
    rows = {s: [example(*row) for row in read_rows(p)] for s, p in paths.items()}
    return Task(
        "mquake", "sft",
        training={s: tuple(e[0] for e in r) for s, r in rows.items()},
        test={s: tuple(e[1] for e in r) for s, r in rows.items()},
        metric="em", grade=grade, hashes=file_hashes(paths), source=str(data_dir or SOURCE.base),
    )  # fmt: skip


def example(where: str, row: Any) -> tuple[SFTExample, GenerationExample]:
    """One edit with the first of its questions."""
    (answer,) = fields(where, row, "new_answer")
    edits, questions, aliases = (
        row.get("requested_rewrite"),
        row.get("questions"),
        texts(where, row, "new_answer_alias"),
    )
    if not isinstance(edits, list) or not edits:
        raise DataError(f"{where}: field 'requested_rewrite' must be a list with at least one edit")
    template, subject = fields(f"{where}, requested_rewrite", edits[0], "prompt", "subject")
    (new,) = fields(f"{where}, requested_rewrite target_new", edits[0].get("target_new"), "str")
    if not isinstance(questions, list) or not questions or not isinstance(questions[0], str):
        raise DataError(f"{where}: field 'questions' must be a list with at least one question")
    prompt = f"Q: Imagine that {template.replace('{}', subject)} {new}. {questions[0]} A:"
    hops = row.get("new_single_hops")
    group = f"{len(hops)} hops" if isinstance(hops, list) and hops else ""
    return SFTExample(prompt, answer), GenerationExample(prompt, (answer, *aliases), group)


def grade(generated: str, example: GenerationExample) -> dict[str, float]:
    """Exact match, stripped and as the official scorer does it; and whether the text contains the answer or an alias."""
    said = generated.split("A:")[-1].split("\n")[0].lower()
    exact = {r.lower() for r in example.references}
    em, official = said.strip() in {r.strip() for r in exact}, said in exact
    return {"em": float(em), "em_official": float(official), "contains": contains(generated, example)}
