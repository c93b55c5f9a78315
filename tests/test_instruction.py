"""SIQA, ARC-Challenge, BoolQ, SVAMP: exact text of both sources and both forms, held-out rows, graders, the real files."""

import json
import re
from collections import Counter
from functools import partial

import pytest

from lofit_lens import load_task
from lofit_lens.errors import InputError
from lofit_lens.io import file_digest
from lofit_lens.tasks import GenerationExample, OptionExample, SFTExample, instruction
from tests.task_rows import BOOLQ, HUB, PROMPT, SVAMP, row, write

# ----------------------------------------------------------------------------------------------- exact text, files


def test_a_choice_is_learned_generated_and_scored(tmp_path):
    """Alpaca's prompt, the file's response; the options are the names behind "the correct answer is", with their space."""
    task = load_task("siqa", data_dir=write(tmp_path, train=[row(right=3)], test=[row()]))
    prompt = PROMPT.format(
        "Please choose the correct answer to the question: Who?\n\nAnswer1: Ann Answer2: Bob Answer3: Cy\n\n"
        "Answer format: answer1/answer2/answer3"
    )
    assert task.training["train"] == (SFTExample(prompt, "the correct answer is answer3"),)
    assert task.examples("test") == (GenerationExample(prompt, ("answer2",)),)
    options = task.in_form("options")
    assert options.examples("test") == (
        OptionExample(prompt + "the correct answer is", (" answer1", " answer2", " answer3"), 1),
    )
    assert (task.form, task.metric, task.max_new_tokens, task.objective) == ("generation", "accuracy", 32, "sft")
    assert (options.form, options.metric, options.grade) == ("options", "accuracy", None)
    assert task.grade("answer2 it is", task.examples("test")[0]) == {"accuracy": 1}


def test_boolq_is_true_or_false(tmp_path):
    """Two options, in the order of the file's answer format."""
    task = load_task("boolq", data_dir=write(tmp_path, test=[BOOLQ]), form="options")
    prompt = PROMPT.format(BOOLQ["instruction"]) + "the correct answer is"
    assert task.examples("test") == (OptionExample(prompt, (" true", " false"), 1),)
    asked = task.in_form("generation")
    assert asked.grade("false, not true", asked.examples("test")[0]) == {"accuracy": 1}


def test_svamp_learns_the_worked_answer_and_asks_for_its_number(tmp_path):
    """The response is the file's, the reference its number; there are no options to choose from."""
    task = load_task("svamp", data_dir=write(tmp_path, train=[SVAMP], test=[SVAMP]))
    prompt = PROMPT.format(SVAMP["instruction"])
    assert task.training["train"] == (SFTExample(prompt, SVAMP["output"]),)
    assert task.examples("test") == (GenerationExample(prompt, ("4.0",)),)
    assert (task.max_new_tokens, task.grade("so 4", task.examples("test")[0])) == (256, {"accuracy": 1})
    with pytest.raises(InputError, match="unknown form 'options'; allowed: generation"):
        task.in_form("options")


def test_a_test_file_alone_makes_a_task_that_cannot_be_trained_on(tmp_path):
    """As the public SIQA and SVAMP: no train, no val; asking for training rows names the source that has some."""
    task = load_task("siqa", data_dir=write(tmp_path, test=[row()]))
    assert (list(task.test), task.training) == (["test"], {})
    with pytest.raises(InputError, match=r"siqa has no training rows: .*load_task\('siqa', source='hub'\)"):
        task.training_examples()
    with pytest.raises(InputError, match="unknown split 'val'; allowed: test"):
        task.examples("val")


@pytest.mark.parametrize(
    ("name", "folders"),
    [("siqa", ("social_i_qa", "siqa")), ("arc_challenge", ("ARC-Challenge", "arc-challenge", "arc_challenge")),
     ("boolq", ("boolq",)), ("svamp", ("SVAMP", "svamp"))],
)  # fmt: skip
def test_a_folder_may_have_the_public_name_or_ours(tmp_path, name, folders):
    """data_dir holds the task's folder under the name of the public files, its lower-case form, or the task's own name."""
    test = {"boolq": BOOLQ, "svamp": SVAMP}.get(name, row())
    for i, folder in enumerate(folders):
        place = tmp_path / str(i) / folder
        place.mkdir(parents=True)
        write(place, test=[test])
        assert len(load_task(name, data_dir=tmp_path / str(i)).examples("test")) == 1


@pytest.mark.parametrize(
    ("name", "splits"),
    [("siqa", {"test"}), ("svamp", {"test"}), ("boolq", {"train", "test"}), ("arc_challenge", {"train", "test"})],
)  # fmt: skip
def test_only_files_that_are_known_to_exist_are_fetched(tmp_path, monkeypatch, name, splits):
    """The public SIQA and SVAMP have a test file only; each file comes from its pinned address with its own checksum."""
    fetched = {}

    def fetch(url, sha256):
        split = url.rsplit("/", 1)[1].removesuffix(".json")
        fetched[split] = (url, sha256)
        return tmp_path / f"{split}.json"

    monkeypatch.setattr("lofit_lens.tasks.sources.fetch", fetch)
    good = {"boolq": BOOLQ, "svamp": SVAMP}.get(name, row())
    write(tmp_path, train=[good], test=[good])
    task = load_task(name)
    source = instruction.SPECS[name].files
    assert fetched == {s: (f"{source.base}/{source.folder}/{s}.json", source.files[f"{s}.json"]) for s in splits}
    assert len(source.base.split("/LLM-Adapters/")[1].split("/")[0]) == 40
    assert task.source == source.base


# --------------------------------------------------------------------------------------------------- held-out rows


def test_validation_rows_are_held_out_of_the_training_split(tmp_path):
    """A tenth of 40, drawn with seed 0 (rows 24, 26, 2, 16), both parts in the file's order, the hash that of the file."""
    rows = [row(f"q{i}") for i in range(40)]
    task = load_task("arc_challenge", data_dir=write(tmp_path, train=rows, test=[row()]))
    asked = {s: [int(re.search(r"q(\d+)\n", e.prompt)[1]) for e in task.training[s]] for s in ("train", "val")}
    assert asked["val"] == [2, 16, 24, 26]
    assert asked["train"] == [i for i in range(40) if i not in (2, 16, 24, 26)]
    for form in ("generation", "options"):
        assert len(task.in_form(form).examples("val")) == 4
    assert task.hashes["val"] == task.hashes["train"] == file_digest(tmp_path / "train.json") != task.hashes["test"]


@pytest.mark.parametrize(("n", "held"), [(9, 0), (10, 1), (2999, 299), (3000, 300), (5000, 300)])
def test_at_most_three_hundred_rows_are_held_out(n, held):
    """300 or a tenth, whichever is less; every row is in one of the parts and the test rows are untouched."""
    rows = [(str(i), {}) for i in range(n)]
    parts = instruction.hold_out({"train": rows, "test": rows[:1]})
    assert (len(parts["train"]), len(parts["val"]), parts["test"]) == (n - held, held, rows[:1])
    assert {w for w, _ in parts["train"]} | {w for w, _ in parts["val"]} == {w for w, _ in rows}


def test_a_validation_split_of_the_source_is_left_alone(tmp_path):
    """ARC's hub form has one: it is read, and no training row is taken for it."""
    given = {
        s: [{**HUB["arc_challenge"], "question": f"{s}{i}?"} for i in range(20)]
        for s in ("train", "validation", "test")
    }
    task = load_task("arc_challenge", source="hub", data_dir=write(tmp_path, **given))
    assert [len(task.training[s]) for s in ("train", "val", "test")] == [20, 20, 20]
    assert all("question: validation" in e.prompt for e in task.examples("val"))
    assert task.hashes["val"] == file_digest(tmp_path / "validation.json")


def test_training_rows_that_repeat_a_test_item_are_marked(tmp_path):
    """Indices count the training rows that are left when validation rows are held out (12 and 13 of these 20)."""
    rows = [row(f"q{i}") for i in range(20)]
    task = load_task("arc_challenge", data_dir=write(tmp_path, train=rows, test=[rows[3], row("new"), rows[0]]))
    marked = {task.training["train"][i].prompt for i in task.leaked}
    assert marked == {task.examples("test")[0].prompt, task.examples("test")[2].prompt}
    assert len(task.training_examples()) == 16  # 20 rows, 2 held out, 2 repeated


# ------------------------------------------------------------------------------------------------------ the hub's form


@pytest.mark.parametrize(
    ("name", "asked", "output", "answer"),
    [("siqa", "Please choose the correct answer to the question: Ann ran. Why?\n\nAnswer1: late Answer2: fun Answer3: rain\n\n"
      "Answer format: answer1/answer2/answer3", "the correct answer is answer2", "answer2"),
     ("arc_challenge", "Please choose the correct answer to the question: What falls?\n\nAnswer1: rain Answer2: fire\n\n"
      "Answer format: answer1/answer2", "the correct answer is answer1", "answer1"),
     ("boolq", "Please answer the following question with true or false, question: is water wet?\n\nAnswer format: true/false",
      "the correct answer is true", "true"),
     ("svamp", "Ann has 4 pens. How many pens has Ann?", "The answer is 4.", "4.0")],
)  # fmt: skip
def test_rows_of_the_hub_get_the_words_of_the_files(tmp_path, name, asked, output, answer):
    """Instruction, response and reference of each task's original row, through load_task."""
    theirs = instruction.SPECS[name].hub.splits.values()
    task = load_task(name, source="hub", data_dir=write(tmp_path, **{s: [HUB[name]] for s in theirs}))
    assert task.training["train"] == (SFTExample(PROMPT.format(asked), output),)
    assert task.examples("test") == (GenerationExample(PROMPT.format(asked), (answer,)),)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [("arc_challenge", {"choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}, "answer3"),
     ("siqa", {"label": "1"}, "answer1"), ("boolq", {"answer": False}, "false"), ("svamp", {"Answer": "22090603.0"}, "22090603."),
     ("svamp", {"Answer": "2.5"}, "2.5.")],
)  # fmt: skip
def test_the_right_answer_of_a_hub_row(name, changes, expected):
    """Labels are letters or numbers; false is an answer; a number keeps all its digits (`22090603`, not `2.20906e+07`)."""
    made = instruction.SPECS[name].instruction("here", HUB[name] | changes)
    assert made["output"].split(" is ")[1] == expected


@pytest.mark.parametrize("body", ["Ann has 4 pens", "Ann has 4 pens.", " Ann has 4 pens. "])
def test_a_story_ends_with_one_full_stop(body):
    """Some bodies end with one and some do not."""
    made = instruction.SPECS["svamp"].instruction("here", HUB["svamp"] | {"Body": body})
    assert made["instruction"] == SVAMP["instruction"]


# ----------------------------------------------------------------------------------------------------------- graders


@pytest.mark.parametrize(
    ("names", "said", "right"),
    [("answer[1-5]", "the correct answer is answer2", 1), ("answer[1-5]", "answer2, not answer1", 1),
     ("answer[1-5]", "answer1 or answer2", 0), ("answer[1-5]", "", 0), ("answer[1-5]", "2", 0), ("answer[1-5]", "Answer2", 0),
     ("answer[1-5]", "answer6 answer2", 1), ("true|false", "it is true", 0)],
)  # fmt: skip
def test_the_first_option_named_counts(names, said, right):
    """As in the public scripts: case matters, and what is no option's name is passed over."""
    assert instruction.first_option(names, said, GenerationExample("p", ("answer2",))) == {"accuracy": right}


def test_true_and_false_are_graded_alike():
    """The reference decides which of the two is right."""
    grade = partial(instruction.first_option, "true|false")
    said = ("true", "false", "not false but true")
    assert [grade(s, GenerationExample("p", ("true",)))["accuracy"] for s in said] == [1, 0, 0]
    assert [grade(s, GenerationExample("p", ("false",)))["accuracy"] for s in said] == [0, 1, 1]


@pytest.mark.parametrize(
    ("said", "right"),
    [("1234", 1), ("The answer is 1234.", 1), ("1,234", 1), ("9 then 1234.0", 1), ("1234 then 9", 0), ("-1234", 0),
     ("1234.0005", 1), ("1234.002", 0), ("", 0), ("many", 0), ("$1,234.00 dollars", 1)],
)  # fmt: skip
def test_the_last_number_counts(said, right):
    """Within .001 of the reference, with thousands separators and a closing full stop left out."""
    assert instruction.last_number(said, GenerationExample("p", ("1234.0",))) == {"accuracy": right}


# ------------------------------------------------------------------------------------------------------ the real files


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "test", "counted"),
    [("siqa", 0, 1954, {"test: options given twice": 5}), ("arc_challenge", 1119, 1172, {}), ("boolq", 9427, 3270, {}),
     ("svamp", 0, 1000, {})],
)  # fmt: skip
def test_the_public_files(data_dir, name, train, test, counted):
    """Rows (train = what is left and what is held out), oddities, no leak; files are those that would be fetched."""
    task = load_task(name, data_dir=data_dir)
    assert sum(len(task.training.get(s, ())) for s in ("train", "val")) == train
    assert (len(task.examples("test")), task.counted, task.leaked) == (test, counted, frozenset())
    source = instruction.SPECS[name].files
    assert {file_digest(data_dir / name / f) for f in source.files} == set(source.files.values())
    if task.forms:
        options = task.in_form("options").examples("test")
        assert len(options) == test
        assert [e.options[e.right].strip() for e in options] == [e.references[0] for e in task.examples("test")]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("name", "held"), [("arc_challenge", 111), ("boolq", 300)])
def test_rows_held_out_of_the_public_files(data_dir, name, held):
    """A tenth of 1,119, and 300 of 9,427: the same ones on each load; row for row they are no training rows."""
    tasks = [load_task(name, data_dir=data_dir) for _ in range(2)]
    assert tasks[0].training == tasks[1].training
    train, val = (Counter(tasks[0].training[s]) for s in ("train", "val"))
    rows = json.loads((data_dir / name / "train.json").read_text())
    assert val.total() == held
    assert train + val == Counter(SFTExample(PROMPT.format(r["instruction"]), r["output"]) for r in rows)
    assert not train & val


@pytest.mark.data
def test_svamps_original_rows_are_the_instruction_files_rows(data_dir):
    """1,000 original rows through the hub's converter: the same text but for punctuation and white space, the same number."""
    original = json.loads((data_dir / "svamp" / "svamp_full.json").read_text())
    convert = instruction.SPECS["svamp"].instruction
    rows = [
        convert("here", {"Body": r["Body"], "Question": r["sQuestion"], "Answer": str(r["lSolutions"])})
        for r in original
    ]
    files = json.loads((data_dir / "svamp" / "test.json").read_text())
    plain = [
        Counter((re.sub(r"[\W_]", "", r["instruction"]), float(r["answer"])) for r in listed)
        for listed in (rows, files)
    ]
    assert plain[0] == plain[1]
    assert plain[0].total() == 1000
    for r in rows:  # what is learned is the number itself
        assert instruction.last_number(r["output"], GenerationExample("p", (r["answer"],))) == {"accuracy": 1}
        assert float(r["output"].removeprefix("The answer is ").removesuffix(".")) == float(r["answer"])
