"""Corrected benchmarks: TruthfulQA's binary form, truth beside information, and MQuAKE without the rows an audit changed."""

import csv
import json
from dataclasses import replace

import pytest

from lofit_lens import Task, evaluate, load_task
from lofit_lens.errors import DataError, InputError
from lofit_lens.tasks import OptionExample, truthfulqa

COLUMNS = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
FLY = ("Animals", "Can pigs fly?", "No", "No; Never", "Yes; They can")
OLD = ("Times", "What time is it right now?", "I have no comment", "I have no comment", "Noon; Midnight")
NEWER = {"Question": FLY[1], "Best Answer": "No", "Best Incorrect Answer": "They can"}


def write_csv(path, names, *rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([names, *rows])


@pytest.fixture
def folds(tmp_path):
    """Fold 0 with one question in each split, and a second one for testing that the newer file no longer has."""
    for split in ("train", "val"):
        write_csv(tmp_path / f"fold_0_{split}_seed_42.csv", COLUMNS, FLY)
    write_csv(tmp_path / "fold_0_test_seed_42.csv", COLUMNS, OLD, FLY)
    return tmp_path


def test_the_binary_form_asks_best_answer_against_best_incorrect_answer(folds):
    """The wrong answer is the authors' ("They can"), not the fold's first one ("Yes"); the prompt is multiple choice's."""
    write_csv(folds / "TruthfulQA.csv", NEWER, NEWER.values())
    task = load_task("truthfulqa", data_dir=folds, form="binary")
    (asked,) = task.examples("test")
    assert isinstance(asked, OptionExample)
    assert (asked.prompt, asked.options, asked.right, asked.group) == (
        f"{truthfulqa.primer()}\n\nQ: Can pigs fly?\nA:", (" No.", " They can."), 0, "Animals",
    )  # fmt: skip
    assert task.metric == "accuracy"
    assert task.counted == {"test: questions without a binary form, left out of it": 1}
    assert len(task.in_form("choices").examples("test")) == 2


def test_the_binary_form_is_part_of_the_hash(folds):
    """Another wrong answer is other data, although the fold's files are the same."""
    write_csv(folds / "TruthfulQA.csv", NEWER, NEWER.values())
    first = load_task("truthfulqa", data_dir=folds, form="binary").data_hash
    write_csv(folds / "TruthfulQA.csv", NEWER, (FLY[1], "No", "Yes"))
    second = load_task("truthfulqa", data_dir=folds, form="binary").data_hash
    assert len({first, second, load_task("truthfulqa", data_dir=folds).data_hash}) == 3


def test_no_binary_form_is_guessed(folds):
    """Without the authors' file, with the older one that lacks the column, or with a question asked twice, an error says so."""
    with pytest.raises(DataError, match=r"no file TruthfulQA.csv.*d71c110897"):
        load_task("truthfulqa", data_dir=folds, form="binary")
    write_csv(folds / "TruthfulQA.csv", COLUMNS, FLY)
    with pytest.raises(DataError, match=r"TruthfulQA.csv:2.*Best Incorrect Answer"):
        load_task("truthfulqa", data_dir=folds, form="binary")
    assert "binary" not in load_task("truthfulqa", data_dir=folds).forms
    write_csv(folds / "TruthfulQA.csv", NEWER, NEWER.values(), NEWER.values())
    with pytest.raises(DataError, match=r"TruthfulQA.csv:3.*twice"):
        load_task("truthfulqa", data_dir=folds, form="binary")


def answered(generated, example):
    """Of four answers the last says nothing."""
    return {"answered": float(example.question != "Q3")}


@pytest.fixture
def found(bridge_llama):
    """Metrics of four questions under judges: verdicts of truth .9 .9 .2 .8, of information .6 .4 .9 .1."""
    rows = [{"prompt": f"who is Ann {i}?", "answer": " a mother"} for i in range(4)]
    task = Task.from_records("open", train=rows, test=rows, grade=answered, metric="answered", max_new_tokens=2)
    examples = tuple(replace(e, question=f"Q{i}") for i, e in enumerate(task.examples("test")))
    task = replace(task, test={"test": examples})
    verdicts = {"truth": [0.9, 0.9, 0.2, 0.8], "info": [0.6, 0.4, 0.9, 0.1]}

    def of(*names):
        judges = {n: lambda questions, answers, n=n: verdicts[n] for n in names}
        result = evaluate(bridge_llama, task, judges=judges, progress=False)
        return {name: metric.mean for name, metric in result.metrics.items()}

    return of


def test_truth_stands_beside_information(found):
    """Only the first answer is true and informative: 1/4, not the product of the two rates (3/4 * 2/4)."""
    assert found("truth", "info")["truth and info"] == 0.25


def test_without_a_judge_of_information_non_answers_are_counted(found):
    """Three answers are true, one of them by saying nothing: 2/4."""
    metrics = found("truth")
    assert (metrics["answered"], metrics["truth and answered"]) == (0.75, 0.5)
    assert found("info").keys() == {"answered", "info"}


CASES = [
    {
        "case_id": i, "questions": [f"Who governs {i}?"], "answer": "old", "new_answer": "new",
        "requested_rewrite": [{"prompt": "The head of {} is", "subject": str(i), "target_new": {"str": "new"}}],
    }
    for i in (1, 2, 3, 4)
]  # fmt: skip
FILE = "MQuAKE-Remastered-CF-3k.json"


@pytest.fixture
def mquake(tmp_path):
    """Four test cases, of which the audit changed the second's answer, lacks the third, and keeps the others."""
    for split, cases in (("train", CASES[:1]), ("val", CASES[:1]), ("test", CASES)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cases))
    hub = [{"subject": "4", "target_new_str": "new"}]  # as on the hub
    audited = [CASES[0], {**CASES[1], "new_answer": "newer"}, {**CASES[3], "requested_rewrite": hub}]
    (tmp_path / FILE).write_text(json.dumps(audited))
    return tmp_path


def test_flagged_rows_are_left_out(mquake):
    """Cases 1 and 4 stay, and name, hash and count tell the task from the one with all rows."""
    task, whole = load_task("mquake", data_dir=mquake, source="unflagged"), load_task("mquake", data_dir=mquake)
    assert [e.prompt for e in task.examples("test")] == [whole.examples("test")[i].prompt for i in (0, 3)]
    assert len(task.training["train"]) == 1
    assert task.counted == {"test: rows that MQuAKE-Remastered changed, left out": 2}
    assert task.name == "mquake:unflagged"
    assert task.data_hash != whole.data_hash
    assert not whole.counted


def test_flagged_rows_are_a_group_of_their_own(mquake, bridge_llama):
    """All rows are asked, and `by_group` gives the means of each kind."""
    task = load_task("mquake", data_dir=mquake, source="flagged-apart")
    assert [e.group for e in task.examples("test")] == ["unflagged", "flagged", "flagged", "unflagged"]
    groups = evaluate(bridge_llama, task, progress=False).by_group()
    assert dict(zip(groups["group"], groups["n"], strict=True)) == {"flagged": 2, "unflagged": 2}


@pytest.mark.parametrize(
    ("audited", "says"),
    [
        ([{**c, "case_id": c["case_id"] + 1} for c in CASES], "their case ids differ"),
        ([CASES[0], CASES[0]], "row 2: case_id 1 is given twice"),
        ([{**CASES[0], "case_id": "1"}], "'case_id' is '1'"),
        ([{**CASES[0], "requested_rewrite": None}], "list of edits"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(mquake, audited, says):
    """Other numbering, a case given twice, and fields of another kind never flag rows in silence."""
    (mquake / FILE).write_text(json.dumps(audited))
    with pytest.raises(DataError, match=says):
        load_task("mquake", data_dir=mquake, source="unflagged")


def test_flags_need_their_file(mquake):
    """A missing file and an unknown source name what is allowed."""
    (mquake / FILE).unlink()
    with pytest.raises(DataError, match=f"no file {FILE}"):
        load_task("mquake", data_dir=mquake, source="flagged-apart")
    with pytest.raises(InputError, match="flagged-apart"):
        load_task("mquake", data_dir=mquake, source="dropped")
    assert len(load_task("mquake", data_dir=mquake).examples("test")) == 4
