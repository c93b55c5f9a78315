"""SIQA, ARC-Challenge, BoolQ, SVAMP: defects of both sources are named with file and row, counted, or left out."""

import pytest

from lofit_lens import load_task
from lofit_lens.errors import DataError, InputError
from lofit_lens.tasks import instruction
from tests.task_rows import BOOLQ, HUB, SVAMP, row, write

TEXT = row()["instruction"]


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [("siqa", "text", "expected a record with instruction, output, answer"),
     ("siqa", {"instruction": "x", "output": "y"}, "no field 'answer'; a row needs instruction, output, answer and has"),
     ("siqa", row(answer=""), "field 'answer' is ''; it must be non-empty"), ("siqa", row(output=None), "field 'output' is null"),
     ("siqa", row(answer="answer4"), r"the answer 'answer4' is not among the options \['answer1', 'answer2', 'answer3'\]"),
     ("siqa", row(instruction="Who?"), "field 'instruction' has no line 'Answer format: option/option'"),
     ("siqa", row(options=("Ann",), right=1), r"1 option\(s\) \['answer1'\]; a choice needs two or more"),
     ("siqa", row(options=("Ann", " ", "Cy")), "Answer2 is empty"),
     ("siqa", row(instruction=TEXT.replace(" Answer3: Cy", "")), "2 answers are given, but the answer format names 3"),
     ("siqa", row(instruction=TEXT + "/answer3"), "option 'answer3' is given twice"),
     ("siqa", row(instruction=TEXT + "/"), "option 4 is empty"),
     ("siqa", BOOLQ, r"option 'true' is invalid for this task \(answer\[1-5\]\); is it another task's file"),
     ("boolq", row(), r"option 'answer1' is invalid for this task \(true\|false\)"),
     ("arc_challenge", row(options="abcdef"), "option 'answer6' is invalid for this task"),
     *[("svamp", {**SVAMP, "answer": a}, f"'answer' is '{a}'; it must be a number") for a in ("four", "nan", "inf", "4 pens")],
     ("svamp", {**SVAMP, "answer": 4.0}, "field 'answer' is 4.0; it must be non-empty text")],
)  # fmt: skip
def test_a_bad_row_of_a_file_is_named(tmp_path, name, bad, message):
    """File, row, what is wrong and what is allowed; the good row in front of it is not blamed."""
    good = {"boolq": BOOLQ, "svamp": SVAMP}.get(name, row())
    with pytest.raises(DataError, match=rf"test\.json: row 2: .*{message}"):
        load_task(name, data_dir=write(tmp_path, test=[good, bad]))


def test_options_given_twice_are_counted(tmp_path):
    """The public SIQA has some: two answers with the same text are let pass, in both forms, and counted a split."""
    twice = row(options=("Ann", "Bob", "Ann "))
    rows = {"train": [row(), twice], "test": [twice, row("new"), twice]}
    task = load_task("siqa", data_dir=write(tmp_path, **rows))
    assert task.counted == {"train: options given twice": 1, "test: options given twice": 2}
    assert len(task.in_form("options").examples("test")) == 3
    assert "test: options given twice 2" in repr(task)
    assert load_task("siqa", data_dir=write(tmp_path, train=[row()], test=[row()])).counted == {}


BAD_HUB = [
    ("siqa", {"label": ""}, "field 'label' is ''"), ("siqa", {"label": "4"}, "field 'label' is '4'; allowed: 1, 2, 3"),
    ("siqa", {"answerB": " "}, "field 'answerB' is ' '"), ("siqa", {"context": None}, "field 'context' is null"),
    ("arc_challenge", {"answerKey": "E"}, r"answer 'E' is not among the labels \['A', 'B'\] of 2 options"),
    ("arc_challenge", {"choices": ["a", "b"]}, "field 'choices' must hold 'label' and 'text'"),
    ("arc_challenge", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "of 1 options"),
    ("arc_challenge", {"choices": {"text": ["rain"], "label": ["A"]}}, r"1 option\(s\)"),
    ("arc_challenge", {"choices": {"text": ["rain", ""], "label": ["A", "B"]}}, "Answer2 is empty"),
    ("arc_challenge", {"choices": {"text": ["rain", 3], "label": ["A", "B"]}}, "field 'text' must be a list of texts"),
    ("arc_challenge", {"choices": {"text": list("abcdef"), "label": list("ABCDEF")}}, "option 'answer6' is invalid for this"),
    ("boolq", {"answer": "yes"}, "field 'answer' is 'yes'; allowed: true, false"),
    ("boolq", {"answer": None}, "field 'answer' is None; allowed: true, false"), ("boolq", {"question": ""}, "'question' is ''"),
    ("svamp", {"Answer": "four"}, "field 'answer' is 'four'; it must be a number"), ("svamp", {"Body": ""}, "'Body' is ''"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), BAD_HUB)
def test_a_bad_row_of_the_hub_is_refused_in_test_and_left_out_of_training(tmp_path, name, changes, message):
    """One bad row of two: the test split names file and row; the training split goes on without it and counts it."""
    good, bad = HUB[name], HUB[name] | changes
    splits = instruction.SPECS[name].hub.splits
    given = {theirs: [good, bad if ours == "test" else good] for ours, theirs in splits.items()}
    with pytest.raises(DataError, match=rf"{splits['test']}\.json: row 2: .*{message}"):
        load_task(name, source="hub", data_dir=write(tmp_path, **given))
    given = {theirs: [bad, good] if ours == "train" else [good] for ours, theirs in splits.items()}
    task = load_task(name, source="hub", data_dir=write(tmp_path, **given))
    assert (len(task.training["train"]), task.counted) == (1, {"train: unusable rows left out": 1})
    assert task.training["train"] == task.training["test"]


@pytest.mark.parametrize(("name", "changes", "message"), BAD_HUB[::4])
def test_training_rows_of_which_none_can_be_used_are_refused(tmp_path, name, changes, message):
    """Another data set, most likely: their number, the data set and the first row's defect are named."""
    spec = instruction.SPECS[name].hub
    bad = HUB[name] | changes
    given = {theirs: [bad, bad] if ours == "train" else [HUB[name]] for ours, theirs in spec.splits.items()}
    with pytest.raises(DataError, match=rf"none of the 2 training rows of {spec}.*train\.json: row 1: .*{message}"):
        load_task(name, source="hub", data_dir=write(tmp_path, **given))


def test_unknown_sources_and_forms_are_refused(tmp_path):
    """What is allowed is listed; a task of one source or one form takes none."""
    write(tmp_path, test=[row()])
    with pytest.raises(InputError, match=r"unknown source 'hubs'; allowed: files, hub\. Did you mean 'hub'"):
        load_task("siqa", source="hubs", data_dir=tmp_path)
    with pytest.raises(InputError, match="unknown form 'choices'; allowed: generation, options"):
        load_task("siqa", form="choices", data_dir=tmp_path)
    with pytest.raises(InputError, match="siqa has no folds"):
        load_task("siqa", fold=0, data_dir=tmp_path)
    with pytest.raises(InputError, match="unknown source 'hub'; allowed: files, unflagged, flagged-apart"):
        load_task("mquake", source="hub")
    for name in ("truthfulqa", "mmlu"):
        with pytest.raises(InputError, match=rf"{name} has only one source; leave source out \(got 'hub'\)"):
            load_task(name, source="hub")


def test_files_of_another_source_are_refused(tmp_path):
    """Hub rows read as instruction files, and the other way round: a missing field, with file and row."""
    write(tmp_path, train=[HUB["boolq"]], validation=[BOOLQ], test=[HUB["boolq"]])
    with pytest.raises(DataError, match=r"train\.json: row 1: no field 'instruction'"):
        load_task("boolq", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"validation\.json: row 1: no field 'question'"):
        load_task("boolq", source="hub", data_dir=tmp_path)
