"""A task's forms, records with options, what is counted, hashes of splits, and TruthfulQA's open-ended form."""

import csv
import hashlib
import json
import math

import pytest

from lofit_lens import Task, load_task
from lofit_lens.errors import DataError, InputError
from lofit_lens.tasks import Form, GenerationExample, OptionExample, SFTExample, fields, mquake, truthfulqa

SPLITS = ("train", "val", "test")
ROW = {"prompt": "Italy:", "answer": " Rome", "options": [" Oslo", " Rome", " Bonn"]}
PIGS = {
    "Category": "Myths", "Question": "Can pigs fly?", "Best Answer": "No",
    "Correct Answers": "No; Never.", "Incorrect Answers": "Yes; They can",
}  # fmt: skip


@pytest.fixture
def truths(tmp_path):
    """Load fold 0 of TruthfulQA from these rows, one list a split (val: one plain row)."""

    def load(train, test, **options):
        for split, rows in {"train": train, "val": [PIGS], "test": test}.items():
            with open(tmp_path / f"fold_0_{split}_seed_42.csv", "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, PIGS)
                writer.writeheader()
                writer.writerows(rows)
        return load_task("truthfulqa", data_dir=tmp_path, **options)

    return load


# --------------------------------------------------------------------------------------------------------------- forms


def test_a_form_replaces_what_is_asked_and_nothing_else(truths):
    """Questions, metric, grader and length change; training, hashes and counts stay; there and back gives the same task."""
    task = truths([PIGS], [PIGS, PIGS])
    asked = task.in_form("generation")
    assert (task.form, task.metric, task.grade, list(task.forms)) == ("choices", "mc1", None, ["generation"])
    assert (asked.form, asked.metric, asked.max_new_tokens, list(asked.forms)) == (
        "generation",
        "answered",
        50,
        ["choices"],
    )
    assert asked.grade is truthfulqa.grade
    assert len(asked.examples("test")) == 2
    assert (asked.name, asked.training, asked.hashes, asked.counted) == (
        task.name,
        task.training,
        task.hashes,
        task.counted,
    )
    assert asked.in_form("choices") == task
    assert task.in_form("choices") is task
    assert truths([PIGS], [PIGS, PIGS], form="generation") == asked
    assert "metric answered, form generation" in repr(asked)


def test_a_third_form_is_kept_on_every_change():
    """From a to c and on to b: each holds its own rows, and no form is lost on the way."""
    asked = {name: {"test": (GenerationExample(name, ("x",)),)} for name in "abc"}
    task = Task("t", "sft", {}, asked["a"], "em", form="a", forms={n: Form(asked[n], n) for n in "bc"})
    for name in "cbacab":
        task = task.in_form(name)
        assert task.examples("test")[0].prompt == task.form == name
        assert {*task.forms, name} == set("abc")


def test_a_form_that_is_not_there_is_refused(truths):
    """Where there are several, they are listed; where there is one, it has no name to give."""
    with pytest.raises(
        InputError, match=r"unknown form 'choice'; allowed: choices, generation\. Did you mean 'choices'"
    ):
        truths([PIGS], [PIGS], form="choice")
    task = Task.from_records("caps", train=[ROW], test=[ROW])
    with pytest.raises(InputError, match=r"caps has only one form; omit form \(got 'options'\)"):
        task.in_form("options")


def test_own_folders_take_no_source(tmp_path):
    """A folder of one's own is its own source."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(ROW))
    assert load_task(tmp_path).metric == "accuracy"
    with pytest.raises(InputError, match="takes no fold, no data_dir and no source"):
        load_task(tmp_path, source="hub")


# ------------------------------------------------------------------------------------------------ records with options


def test_records_with_options_are_scored():
    """They train on the answer as text; each option is a continuation; the right one is found by its text."""
    task = Task.from_records("caps", train=[ROW], test=[ROW, {**ROW, "answer": " Oslo"}])
    assert task.training_examples() == (SFTExample("Italy:", " Rome"),)
    assert task.examples("test") == (
        OptionExample("Italy:", (" Oslo", " Rome", " Bonn"), 1),
        OptionExample("Italy:", (" Oslo", " Rome", " Bonn"), 0),
    )
    assert (task.objective, task.metric, task.grade) == ("sft", "accuracy", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"options": [" Oslo", " Bonn"]}, r"the answer ' Rome' is not among the options \[' Oslo', ' Bonn'\]"),
     ({"answer": "Rome"}, "the answer 'Rome' is not among the options"), ({"answer": ""}, "field 'answer' is ''"),
     ({"options": [" Rome"]}, r"1 option\(s\) \[' Rome'\]; a choice needs two or more"), ({"options": []}, r"0 option\(s\)"),
     ({"options": [" Rome", " "]}, "option 2 is empty"),
     ({"options": [" Rome", " Oslo", " Rome"]}, "option ' Rome' is given twice"),
     ({"options": " Rome"}, "field 'options' must be a list of texts, got ' Rome'"), ({"prompt": None}, "field 'prompt' is null"),
     ({"options": [" Rome", 3]}, "field 'options' must be a list of texts"), ({"options": None}, r"0 option\(s\)")],
)  # fmt: skip
def test_a_bad_record_with_options_is_named(tmp_path, changes, message):
    """From records by split and row, from a folder by file and line."""
    bad = {**ROW, **changes}
    with pytest.raises(DataError, match=rf"^caps test row 2: {message}"):
        Task.from_records("caps", train=[ROW], test=[ROW, bad])
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps(bad)}")
    with pytest.raises(DataError, match=rf"^{tmp_path}/test\.jsonl:3: {message}"):
        load_task(tmp_path)


@pytest.mark.parametrize("value", [math.nan, b"Rome", {1, 2}])
@pytest.mark.usefixtures("unchecked")
def test_a_value_that_no_file_could_hold_is_named(value):
    """A gap that pandas left, bytes, a set: the row is named; in a field that is not looked at it does no harm."""
    with pytest.raises(DataError, match="caps train row 2: field 'answer' is"):
        Task.from_records("caps", train=[ROW, {**ROW, "answer": value}], test=[ROW])
    task = Task.from_records("caps", train=[{**ROW, "note": value}], test=[ROW])
    assert task.data_hash == Task.from_records("caps", train=[ROW], test=[ROW]).data_hash


def test_own_grader_metric_length_and_number():
    """from_records hands them on: a task graded by length, at most 3 tokens, 2 of 5 rows drawn."""
    rows = [{"prompt": f"p{i}", "answer": "a"} for i in range(5)]
    grade = lambda said, asked: {"short": float(len(said) < 4)}
    task = Task.from_records("t", train=rows, test=rows, grade=grade, metric="short", max_new_tokens=3, n_train=2)
    assert (task.metric, task.max_new_tokens, len(task.training_examples())) == ("short", 3, 2)
    assert task.grade("four", task.examples("test")[0]) == {"short": 0}


# -------------------------------------------------------------------------------------------------------------- hashes


def test_each_split_of_records_has_its_own_hash():
    """A changed test row changes the test hash and the data hash and leaves the training hash alone."""
    one = Task.from_records("t", train=[ROW], val=[ROW], test=[ROW])
    two = Task.from_records("t", train=[ROW], val=[ROW], test=[{**ROW, "answer": " Bonn"}])
    assert list(one.hashes) == ["train", "val", "test"]
    assert one.hashes["train"] == two.hashes["train"] == one.hashes["test"] != two.hashes["test"]
    assert one.data_hash != two.data_hash
    assert one.data_hash == Task.from_records("other", train=[ROW], val=[ROW], test=[ROW]).data_hash
    for changes in ({"options": [" Rome", " Oslo", " Bonn"]}, {"prompt": "Italia:"}):
        assert Task.from_records("t", train=[{**ROW, **changes}], test=[ROW]).hashes["train"] != one.hashes["train"]


def test_the_data_hash_is_over_the_splits_hashes_in_order():
    """SHA-256 of their JSON list; which split a file serves as matters; without hashes it is empty."""
    a, b = "a" * 64, "b" * 64
    task = lambda **hashes: Task("t", "sft", {}, {"test": ()}, "em", hashes=hashes).data_hash
    assert task(train=a, test=b) == hashlib.sha256(f'["{a}","{b}"]'.encode()).hexdigest()
    assert task(train=b, test=a) != task(train=a, test=b)
    assert task() == ""


def test_a_folders_hashes_are_those_of_its_files(tmp_path):
    """Byte for byte: white space that changes no row changes the hash of its split only."""
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(ROW))
    before = load_task(tmp_path)
    assert before.hashes == {s: hashlib.sha256((tmp_path / f"{s}.jsonl").read_bytes()).hexdigest() for s in SPLITS}
    (tmp_path / "val.jsonl").write_text(json.dumps(ROW) + "\n")
    after = load_task(tmp_path)
    assert after.test == before.test
    assert [s for s in SPLITS if after.hashes[s] != before.hashes[s]] == ["val"]
    assert after.data_hash != before.data_hash


# ---------------------------------------------------------------------------------------------------------- TruthfulQA


def test_truthfulqas_open_form_asks_the_same_prompt(truths):
    """The choices' prompt; references are the true answers, closed; a judge sees the bare question; Category groups both."""
    task = truths([PIGS], [PIGS, {**PIGS, "Category": ""}])
    chosen, asked = task.examples("test")[0], task.in_form("generation").examples("test")[0]
    assert asked == GenerationExample(chosen.prompt, ("No.", "Never."))
    assert asked.prompt.endswith("\n\nQ: Can pigs fly?\nA:")
    assert (asked.question, asked.group, chosen.group) == ("Can pigs fly?", "Myths", "Myths")
    assert task.in_form("generation").examples("test")[1].group == ""


@pytest.mark.parametrize(
    ("said", "answer", "answered"),
    [(" Pigs can't.\n\nQ: And you?\nA: no", "Pigs can't.", 1), (" I have no comment.", "I have no comment.", 0),
     ("i HAVE no comment\nQ: x", "i HAVE no comment", 0), ("", "", 0), (" \n\nQ: What?", "", 0),
     ("Q: What?", "", 0), (".", ".", 0),
     ("I have no comment. But pigs can.", "I have no comment. But pigs can.", 1), ("See the FAQ: no", "See the FAQ: no", 1),
     ("One\ntwo\n  Q: three", "One\ntwo", 1), (" Yes\nA: no", "Yes\nA: no", 1)],
)  # fmt: skip
def test_an_answer_ends_where_the_next_question_begins(said, answer, answered):
    """At a line that begins with `Q:`; silence and "I have no comment" are no answer, whatever the case."""
    assert truthfulqa.before_next_question(said) == answer
    assert truthfulqa.grade(said, GenerationExample("p", ("x",))) == {"answered": answered}


@pytest.mark.parametrize(
    ("changes", "counted"),
    [({}, None), ({"Correct Answers": "No; Never;"}, "empty answers dropped"),
     ({"Incorrect Answers": "Yes; ; They can"}, "empty answers dropped"), ({"Correct Answers": "No; No."}, "answers given twice"),
     ({"Incorrect Answers": "Yes; They can; Yes"}, "answers given twice"),
     ({"Incorrect Answers": "Yes; Never"}, "answers true and false")],
)  # fmt: skip
def test_oddities_of_the_public_files_are_counted(truths, changes, counted):
    """Rows, by split and kind, after answers are split and closed; the row stays a question."""
    odd = {**PIGS, **changes}
    task = truths([odd], [PIGS, odd, odd])
    assert len(task.examples("test")) == 3
    assert task.counted == ({} if counted is None else {f"train: {counted}": 1, f"test: {counted}": 2})


@pytest.mark.data
@pytest.mark.parametrize(("fold", "odd"), [(0, 8), (1, 14)])
def test_truthfulqas_real_oddities(data_dir, fold, odd):
    """Trailing semicolons and the like in the test rows, counted apart from the loader's own splitting."""
    path = data_dir / "truthfulqa" / f"fold_{fold}_test_seed_42.csv"
    with open(path, newline="", encoding="utf-8") as f:
        cells = [r["Correct Answers"].split(";") + r["Incorrect Answers"].split(";") for r in csv.DictReader(f)]
    task = load_task("truthfulqa", fold=fold, data_dir=data_dir)
    assert sum(any(not part.strip() for part in cell) for cell in cells) == odd
    assert task.counted["test: empty answers dropped"] == odd
    assert all(e.question and e.group for e in task.in_form("generation").examples("test"))


# -------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("hops", "group"), [(["x", "y"], "2 hops"), (list("wxyz"), "4 hops"), ([], ""), (None, ""), ("three", "")]
)
def test_mquakes_items_are_grouped_by_hops(hops, group):
    """Length of the list of single hops; rows without one are asked all the same, in no group."""
    edit = {
        "requested_rewrite": [{"prompt": "{} is", "subject": "s", "target_new": {"str": "n"}}], "questions": ["q"],
        "new_answer": "n", "new_single_hops": hops,
    }  # fmt: skip
    assert mquake.example("here", edit)[1].group == group


def test_groups_and_questions_do_not_make_examples_differ():
    """They sort results; whether two items are the same is a matter of what is asked."""
    assert GenerationExample("p", ("x",), "2 hops", "q") == GenerationExample("p", ("x",))
    assert fields.repeated(["p", "q", "p"], ["p"]) == {0, 2}
