"""MQuAKE (Zhong et al. 2023): answer a multi-hop question under one imagined edit (LoFiT's split 134/95/864).

SFT on `prompt + new_answer`; greedy generation of 16 tokens; exact match of the first line after the last `A:` with
the new answer or an alias. The official scorer does not strip white space, which counts " sweden" as wrong:
`em` strips, `em_official` does not.

MQuAKE-Remastered (Zhong et al. 2025) audits MQuAKE and corrects it. A row is *flagged* here if its questions, its answers
before or after the edit, or its edits differ in the Remastered file, or if that file lacks the case.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.checks import check_one_of
from lofit_lens.errors import DataError
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.examples import SPLITS, GenerationExample, SFTExample, contains
from lofit_lens.tasks.fields import Row, fields, file_hashes, texts
from lofit_lens.tasks.sources import Source, locate, read_rows

SOURCE = Source("MQuAKE", {
    "train.jsonl": "5db931bd09457245d1a133fe8df86a45985d28767ba6f032d1b7dcc737e22498",
    "val.jsonl": "3cbf9245ba671458d0979c5bba569e838d54fce860e8d0c5af0bc2ce54d41e83",
    "test.jsonl": "3090ef350f4322878968466881de9ec988b5b71daf55d5d9b04fb894a5ebac87",
})  # fmt: skip


SOURCES = ("files", "unflagged", "flagged-apart")
REMASTERED = "MQuAKE-Remastered-CF-3k.json"


def load(data_dir: str | Path | None, source: str = "files") -> Task:
    """Read the three splits; `source` says how flagged rows are treated (see `load_task`).

    Raises:
        InputError: unknown source.
        DataError: a file is missing or has bad rows, or the Remastered file holds other cases.
    """
    check_one_of("source", source, SOURCES)
    paths = locate(SOURCE, {s: f"{s}.jsonl" for s in SPLITS}, data_dir)
    read = {s: read_rows(p) for s, p in paths.items()}
    if source == "files":
        return _task(read, file_hashes(paths), data_dir)
    path = _remastered(data_dir)
    flags = flagged(read, read_rows(path))
    counted = {f"{s}: rows that MQuAKE-Remastered changed": sum(f) for s, f in flags.items() if any(f)}
    hashes = {s: io.digest([h, io.file_digest(path), source]) for s, h in file_hashes(paths).items()}
    if source == "unflagged":
        read = {s: [row for row, f in zip(rows, flags[s], strict=True) if not f] for s, rows in read.items()}
        made = _task(read, hashes, data_dir)
        return replace(made, name="mquake:unflagged", counted={f"{k}, left out": n for k, n in counted.items()})
    made = _task(read, hashes, data_dir)
    test = {
        s: tuple(replace(e, group="flagged" if f else "unflagged") for e, f in zip(rows, flags[s], strict=True))
        for s, rows in made.test.items()
    }
    return replace(made, name="mquake:flagged-apart", test=test, counted=counted)


def _remastered(data_dir: str | Path | None) -> Path:
    where = [] if data_dir is None else [Path(data_dir), *(Path(data_dir) / f for f in ("mquake", "MQuAKE"))]
    for place in where:
        if (place / REMASTERED).is_file():
            return place / REMASTERED
    raise DataError(
        f"no file {REMASTERED} in {data_dir}; put it beside MQuAKE's files (data_dir, --data-dir). "
        "https://github.com/henryzhongsc/MQuAKE-Remastered (folder datasets) is its source"
    )


def flagged(read: Mapping[str, list[Row]], remastered: list[Row]) -> dict[str, list[bool]]:
    """Whether MQuAKE-Remastered changed each row, by split; cases are joined by `case_id`.

    Raises:
        DataError: a row without a whole number as `case_id`, a case given twice, or no row that is the same in both files.
    """
    audited: dict[int, Any] = {}
    for where, row in remastered:
        case = _case(where, row)
        if case in audited:
            raise DataError(f"{where}: case_id {case} is given twice; remove one")
        audited[case] = _content(where, row)
    flags = {
        s: [audited.get(_case(where, row)) != _content(where, row) for where, row in rows] for s, rows in read.items()
    }
    if all(f for listed in flags.values() for f in listed):
        raise DataError(
            f"no row is the same in {REMASTERED} and in MQuAKE's files: their case ids differ; give the file of CF-3k"
        )
    return flags


def _case(where: str, row: Any) -> int:
    case = row.get("case_id") if isinstance(row, Mapping) else None
    if not isinstance(case, int) or isinstance(case, bool):
        raise DataError(
            f"{where}: field 'case_id' is {case!r}; it must be a whole number, by which flagged rows are found"
        )
    return case


def _content(where: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The content of a row: questions, answers before and after the edit, and each edit's subject and new target."""
    edits = row.get("requested_rewrite")
    if not isinstance(edits, list) or not all(isinstance(e, Mapping) for e in edits):
        raise DataError(f"{where}: field 'requested_rewrite' must be a list of edits")
    targets = [
        (e.get("subject"), e["target_new_str"] if "target_new_str" in e else (e.get("target_new") or {}).get("str"))
        for e in edits
    ]
    return texts(where, row, "questions"), *fields(where, row, "answer", "new_answer"), targets


def _task(read: Mapping[str, list[Row]], hashes: dict[str, str], data_dir: str | Path | None) -> Task:
    rows = {s: [example(*row) for row in listed] for s, listed in read.items()}
    return Task(
        "mquake", "sft",
        training={s: tuple(e[0] for e in r) for s, r in rows.items()},
        test={s: tuple(e[1] for e in r) for s, r in rows.items()},
        metric="em", grade=grade, hashes=hashes, source=str(data_dir or SOURCE.base),
    )  # fmt: skip


def example(where: str, row: Any) -> tuple[SFTExample, GenerationExample]:
    """One edit with its first question."""
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
    """Exact match, stripped and as in the official scorer; and whether the text contains the answer or an alias."""
    said = generated.split("A:")[-1].split("\n")[0].lower()
    exact = {r.lower() for r in example.references}
    em, official = said.strip() in {r.strip() for r in exact}, said in exact
    return {"em": float(em), "em_official": float(official), "contains": contains(generated, example)}
