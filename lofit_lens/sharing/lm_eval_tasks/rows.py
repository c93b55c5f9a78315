"""Rows and grading for the task files of this folder: the same rows, prompts and graders as in `load_task`."""

from dataclasses import asdict
from typing import Any

from datasets import Dataset

from lofit_lens.evaluation.multiple_choice import mc_metrics
from lofit_lens.organism import tasks as organism
from lofit_lens.tasks import clutrr, load_task, mquake
from lofit_lens.tasks.examples import GenerationExample

GRADERS = {"mquake": mquake.grade, "clutrr": clutrr.grade, "organism/kinship": organism.grade}
KEPT = ("em", "contains")  # `em_official` depends on a leading space, which lm_eval's decoding may drop


def rows(name: str, data_dir: str | None = None, fold: int | None = None, **_: Any) -> dict[str, Dataset]:
    """All splits of a task; `data_dir` and `fold` are passed by `--metadata`. Other entries of the metadata are lm_eval's own."""
    embedded = name.startswith("organism/")
    task = load_task(name, data_dir=None if embedded else data_dir, fold=fold if name == "truthfulqa" else None)
    return {
        split: Dataset.from_list([{**asdict(example), "task": name} for example in examples])
        for split, examples in task.test.items()
    }


def graded(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Grade one generated answer as the task's own grader does."""
    found = GRADERS[doc["task"]](results[0], GenerationExample(doc["prompt"], tuple(doc["references"])))
    return {name: found[name] for name in KEPT}


def answers(doc: dict[str, Any]) -> list[str]:
    """All answers of a question, without duplicates."""
    return list(dict.fromkeys((doc["best"], *doc["true"], *doc["false"])))


def chosen(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """MC1, MC2 and MC3 of one question, from summed log-probs (nats)."""
    score = dict(zip(answers(doc), (s for s, _ in results), strict=True))
    return mc_metrics(score[doc["best"]], [score[a] for a in doc["true"]], [score[a] for a in doc["false"]])
