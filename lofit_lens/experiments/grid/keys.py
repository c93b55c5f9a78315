"""Keys that name a run: everything that can change its result, of model, task, head score and versions."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.experiments.methods import method_of
from lofit_lens.experiments.methods.source import digest_of, in_library
from lofit_lens.models import ModelInfo
from lofit_lens.tasks.base import Task
from lofit_lens.training.selectors import SELECTORS

# Version of lofit-lens from which on results are the same: stored runs of it are taken over. A release that changes a
# result moves it.
RESULTS_SINCE = "0.1"


def model_key(info: ModelInfo, files: str = "") -> dict[str, Any]:
    """What of a model can change a result: weights, configuration and tokenizer, class, dtype, BOS; not their location.

    Args:
        info: description of the model.
        files: digest of a local folder's configuration and tokenizer (`models.folder_digest`), or of a model in memory.
    """
    weights = info.revision if (info.revision or "").startswith("sha256:") else f"{info.name}@{info.revision}"
    return {
        "weights": weights, "files": files, "backend": info.backend, "processed": info.processed, "dtype": info.dtype,
        "heads": [info.n_layers, info.n_heads], "prepend_bos": info.prepend_bos,
        **({"head_layers": list(info.head_layers)} if info.head_layers else {}),
    }  # fmt: skip


def task_key(task: Task) -> dict[str, Any]:
    """What of a task can change a result: its rows in training and test form, and how answers are graded.

    Raises:
        InputError: a grader without a name and code.
    """
    rows = {
        name: {split: [repr(e) for e in listed] for split, listed in form.items()}
        for name, form in (("training", task.training), ("test", task.test))
    }
    return {
        "name": task.name, "form": task.form, "objective": task.objective, "metric": task.metric,
        "max_new_tokens": task.max_new_tokens, "data": io.digest([rows, sorted(task.leaked), task.n_train]),
        "grade": _grader(task), **({} if task.chat is None else {"chat": asdict(task.chat)}),
    }  # fmt: skip


def _grader(task: Task) -> str:
    """A grader's name; if it is not the library's, with a digest of its code, which may change under the same name."""
    grade: Any = task.grade
    if grade is None:
        return ""
    name = f"{getattr(grade, '__module__', '')}.{getattr(grade, '__qualname__', '')}"
    return name if in_library(grade) else f"{name}:{digest_of([grade], f'the grader of {task.name}')}"


def selector_source(name: str) -> dict[str, str]:
    """Digest of the code of a selector from outside the library."""
    select: Any = SELECTORS[name]
    return {} if in_library(select) else {"source": digest_of([select], f"the selector {name}")}


def check_code(spec: Mapping[str, Any], tasks: Mapping[str, Task]) -> None:
    """Check that a user's code in this process is the code that named a cell: its file may change before a worker imports it.

    Args:
        spec: spec of the cell.
        tasks: digest of a task's key -> task.

    Raises:
        InputError: the code of a method, head score or grader (named) has changed.
    """
    found = {}
    if "method" in spec:
        found[spec["method"]] = method_of(spec["method"]).source, spec.get("source", "")
    elif spec["kind"] == "scores":
        found[spec["by"]] = selector_source(spec["by"]).get("source", ""), spec.get("source", "")
    if "task" in spec:
        task = tasks[io.digest(spec["task"])]
        found[f"the grader of {task.name}"] = _grader(task), spec["task"]["grade"]
    for name, (here, planned) in found.items():
        if here != planned:
            raise InputError(f"the code of {name} has changed since this grid was planned; run the grid again")


def versions_key() -> dict[str, str]:
    """Major versions (for 0.x also the minor one) of the packages that compute; of lofit-lens the last that changed results."""
    found = {**io.environment(), "lofit-lens": RESULTS_SINCE}
    return {
        name: _cut(found[name]) for name in ("lofit-lens", "torch", "transformers", "transformer-lens") if name in found
    }


def _cut(version: str) -> str:
    return ".".join(version.split(".")[: 2 if version.startswith("0.") else 1])
