"""One folder a run, named by the hash of its spec (all that was asked for); done means that the folder exists.

run.json      spec, result, heads, versions
items.jsonl   one line an evaluated item
result.json   the evaluation alone
scores.json   head scores, where heads were selected
adapter/      the adapter, where one was trained
"""

import re
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.evaluation.result import EvalResult
from lofit_lens.heads import HeadScores
from lofit_lens.interventions import Intervention

KIND, SCHEMA = "lofit_lens.run", 1


def run_folder(root: str | Path, spec: dict[str, Any]) -> Path:
    """Folder of a run: readable front, hash of the whole spec behind."""
    front = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(spec[k])) for k in ("task", "method", "seed") if k in spec)
    return Path(root) / f"{front}-{io.digest(spec)[:12]}"


def save_run(
    root: str | Path, spec: dict[str, Any], result: EvalResult, *, adapter: Intervention | None = None,
    scores: HeadScores | None = None, seconds: float | None = None, more: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a run's folder, whole or not at all; a run that is there already is replaced. `more` joins run.json."""
    folder = run_folder(root, spec)
    heads = getattr(adapter, "heads", None)
    record = {
        "kind": KIND, "schema": SCHEMA, "spec": spec, "result": result.to_dict(), "seconds": seconds,
        "heads": None if heads is None else heads.to_dict(), "versions": io.environment(), **(more or {}),
    }  # fmt: skip
    with io.new_folder(folder, overwrite=True) as temporary:
        result.write_into(temporary)
        if scores is not None:
            scores.save(temporary / "scores.json")
        if adapter is not None:
            adapter.save_pretrained(temporary / "adapter")
        io.write_json(temporary / "run.json", record)
    return folder


def load_run(root: str | Path, spec: dict[str, Any]) -> tuple[EvalResult, dict[str, Any]] | None:
    """Evaluation and run.json of a run that is there; None where it is not.

    Raises:
        DataError: its folder is there and damaged.
    """
    folder = run_folder(root, spec)
    if not folder.is_dir():
        return None
    record = io.read_json(folder / "run.json")
    io.check_record(record, KIND, SCHEMA, ("spec", "result"), str(folder / "run.json"))
    return EvalResult.load(folder), record
