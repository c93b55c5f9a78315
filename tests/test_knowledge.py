"""TriviaQA, NQ, MMLU: exact prompts, references and groups, the public normalization, graders, bad rows."""

import json

import pytest

from lofit_lens import load_task
from lofit_lens.errors import DataError, InputError
from lofit_lens.tasks import GenerationExample, OptionExample, knowledge
from tests.task_rows import KNOWLEDGE as ROWS


@pytest.fixture
def read(tmp_path):
    """Load a task from a folder with these rows as its test split (and MMLU's validation split)."""

    def load(name, *rows, val=(), **options):
        (tmp_path / "validation.json").write_text(json.dumps(list((val or rows) if name == "mmlu" else rows)))
        (tmp_path / "test.json").write_text(json.dumps(rows))
        return load_task(name, data_dir=tmp_path, **options)

    return load


# ------------------------------------------------------------------------------------------------------ what is asked


def test_triviaqa_asks_one_question_and_knows_other_names(read):
    """`Q: ...` + line break + `A:`; the answer first, then its aliases; a judge would see the bare question."""
    task = read("triviaqa", ROWS["triviaqa"], {**ROWS["triviaqa"], "answer": {"value": "Bo"}})
    assert task.examples("test") == (
        GenerationExample("Q: Who wrote it?\nA:", ("Bo Diddley", "Ellas Otha Bates")),
        GenerationExample("Q: Who wrote it?\nA:", ("Bo",)),
    )
    assert task.examples("test")[0].question == "Who wrote it?"
    assert (task.metric, task.max_new_tokens, list(task.test)) == ("em", 24, ["test"])


@pytest.mark.parametrize("question", ["who wrote it", "who wrote it?"])
def test_nq_gets_its_question_mark(read, question):
    """The public questions have none; one that has is left alone. Every answer counts."""
    (asked,) = read("nq", {**ROWS["nq"], "question": question}).examples("test")
    assert asked == GenerationExample("Q: who wrote it?\nA:", ("Bo Diddley", "Bates"))
    assert asked.question == "who wrote it?"


def test_mmlu_lists_the_options_and_scores_the_letters(read):
    """The public zero-shot prompt: subject in words, question stripped, lettered options; grouped by subject."""
    task = read("mmlu", ROWS["mmlu"], {**ROWS["mmlu"], "answer": 3, "subject": "anatomy"})
    prompt = (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "What falls?\nA. rain\nB. fire\nC. air\nD. no\nAnswer:"
    )
    first, second = task.examples("test")
    assert first == OptionExample(prompt, (" A", " B", " C", " D"), 0)
    assert (second.right, first.group, second.group) == (3, "high school physics", "anatomy")
    assert (task.form, task.metric, list(task.test), task.counted) == ("options", "accuracy", ["val", "test"], {})


def test_mmlus_oddities_are_counted_a_split(read):
    """An option that is empty or given twice: the public files have some, so they are scored and counted."""
    twice, empty = ({**ROWS["mmlu"], "choices": c} for c in (["x", "x", "y", "z"], ["x", "", "y", "z"]))
    task = read("mmlu", twice, empty, twice, val=[ROWS["mmlu"], empty])
    assert len(task.examples("test")) == 3
    assert task.counted == {"test: options given twice": 2, "val: empty options": 1, "test: empty options": 1}


@pytest.mark.parametrize("name", ROWS)
def test_they_are_for_evaluation_only(read, name):
    """No training rows, one source, no folds; and the only form may be named where it has a name."""
    task = read(name, ROWS[name])
    with pytest.raises(InputError, match=f"{name} has no training rows: it is for evaluation only"):
        task.training_examples()
    with pytest.raises(InputError, match=f"{name} has no folds"):
        read(name, ROWS[name], fold=0)
    message = "unknown form 'x'; allowed: options" if name == "mmlu" else f"{name} has only one form; omit form"
    with pytest.raises(InputError, match=message):
        read(name, ROWS[name], form="x")
    assert read("mmlu", ROWS["mmlu"], form="options").form == "options"


# ------------------------------------------------------------------------------------------------------------- graders


@pytest.mark.parametrize(
    ("text", "plain"),
    [("The  Beatles!", "beatles"), ("a cat, an owl & the dog", "cat owl dog"), ("Rock'n'Roll", "rock n roll"), ("them", "them"),
     ("snake_case", "snake case"), ("‘Hey´", "hey"), ("The", ""), ("", ""), ("Zoë 9-1", "zoë 9 1"), ("A.\nB", "b")],
)  # fmt: skip
def test_the_public_normalization(text, plain):
    """Lower case; punctuation to spaces; a, an, the left out as whole words; single spaces. Accents stay."""
    assert knowledge.normalized(text) == plain


@pytest.mark.parametrize(
    ("said", "em", "contains"),
    [("Bo Diddley", 1, 1), (" the bo  diddley.\nQ: next", 1, 1), ("It was Bo Diddley, I think", 0, 1), ("Bates", 1, 1),
     ("Batesville", 0, 0), ("Diddley", 0, 0), ("He\nBo Diddley", 0, 0), ("\n\nBates", 1, 1), ("", 0, 0), ("The", 0, 0),
     ("bo and diddley", 0, 0)],
)  # fmt: skip
def test_the_first_line_is_graded(said, em, contains):
    """`em`: the whole line is a reference; `contains`: one stands in it as whole words. An empty reference is none."""
    asked = GenerationExample("p", ("Bo Diddley", "Bates", "The", ""))
    assert knowledge.grade(said, asked) == {"em": em, "contains": contains}


# ------------------------------------------------------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [("triviaqa", {"question": None}, "'question' is null"), ("triviaqa", {"answer": "Bo"}, "answer: expected a record with"),
     ("triviaqa", {"answer": {"aliases": ["x"]}}, "answer: no field 'value'; a row needs value and has aliases"),
     ("triviaqa", {"answer": {"value": ""}}, "field 'value' is ''"), ("triviaqa", {"answer": None}, "answer: expected a record"),
     ("triviaqa", {"answer": {"value": "x", "aliases": "y"}}, "field 'aliases' must be a list of texts, got 'y'"),
     ("nq", {"question": " "}, "field 'question' is ' '"), ("nq", {"answer": []}, r"\[\]; it must hold at least one non-empty"),
     ("nq", {"answer": ["", " ?"]}, "at least one non-empty answer"), ("nq", {"answer": "Bo"}, "a list of texts, got 'Bo'"),
     ("nq", {"answer": [3]}, "must be a list of texts"), ("mmlu", {"subject": ""}, "field 'subject' is ''"),
     ("mmlu", {"choices": ["x", "y", "z"]}, "3 options; a question has 4"), ("mmlu", {"choices": "abcd"}, "a list of texts"),
     ("mmlu", {"answer": 4}, "field 'answer' is 4; it must be an option's number, 0 to 3"), ("mmlu", {"answer": -1}, "is -1"),
     ("mmlu", {"answer": "A"}, "field 'answer' is 'A'; it must be an option's number"), ("mmlu", {"answer": None}, "is None")],
)  # fmt: skip
def test_a_bad_row_is_named(read, name, changes, message):
    """File, row, field and what it must hold; no row is left out in silence."""
    with pytest.raises(DataError, match=rf"(validation|test)\.json: row 2(: |, ).*{message}"):
        read(name, ROWS[name], {**ROWS[name], **changes})


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_no_record_or_another_tasks_is_named(read, name):
    """A bare text, and a row of the next task."""
    with pytest.raises(DataError, match=r"row 1: expected a record with question.*got str"):
        read(name, "text")
    other = dict(zip(ROWS, [*list(ROWS.values())[1:], ROWS["triviaqa"]], strict=True))[name]
    with pytest.raises(DataError, match=r"\.json: row 1"):
        read(name, other)
