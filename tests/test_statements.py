"""A task's rows as true and false statements: every kind of task, wrong answers drawn where none are named, pairs."""

import csv
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lofit_lens import Task, load_task
from lofit_lens.errors import DataError, InputError
from lofit_lens.tasks import ChoiceExample, GenerationExample, SFTExample
from lofit_lens.tasks.statements import Statement, pairs, statements
from tests.task_rows import BOOLQ, PROMPT, SVAMP, row, write
from tests.test_tasks import PIGS, SPLITS


def told(listed):
    """(prompt, answer, right, row) of each."""
    return [(s.prompt, s.answer, s.right, s.row) for s in listed]


def answers_task(answers, *, aliases=None, **splits):
    """A generation task with these answers."""
    rows = [
        {"prompt": f"p{i}", "answer": a, **({"aliases": aliases[i]} if aliases and i in aliases else {})}
        for i, a in enumerate(answers)
    ]
    return Task.from_records("words", train=rows, test=rows, **splits)


# ---------------------------------------------------------------------------------------- answers that rows name


def test_truthfulqa_is_itis_form(tmp_path):
    """The training prompt without the primer, every true answer (the best first, each once), then every false one."""
    for split in SPLITS:
        with open(tmp_path / f"fold_0_{split}_seed_42.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, PIGS)
            writer.writeheader()
            writer.writerow({**PIGS, "Best Answer": "Pigs can fly by plane", "Question": f"Can pigs fly? {split}"})
    task = load_task("truthfulqa", data_dir=tmp_path)
    for form in ("choices", "generation"):
        for split in ("train", "val"):
            prompt = f"Q: Can pigs fly? {split} A:"
            assert told(statements(task.in_form(form), split)) == [
                (prompt, " Pigs can fly by plane.", True, 0), (prompt, " No, pigs cannot fly.", True, 0),
                (prompt, " Yes, pigs can.", False, 0), (prompt, " Yes.", False, 0), (prompt, " They fly.", False, 0),
            ]  # fmt: skip


def test_full_stops_can_be_had_or_left_out():
    """ITI's end with one, those of LoFiT's files do not; an abbreviation keeps its own; texts that are then alike are one."""
    row = {
        "prompt": "q", "answer": " In the U.S.", "aliases": [" At 9 p.m. in Rome. "],
        "options": [" In the U.S.", " Rome.", " Rome", " No"],
    }  # fmt: skip
    task = Task.from_records("ends", train=[row], test=[row])
    asked = replace(
        task, form="choices", training={"train": (SFTExample("q", " In the U.S."),)},
        test={"train": (ChoiceExample("q", " In the U.S.", (" At 9 p.m. in Rome. ",), (" Rome.", " Rome", " No")),)},
    )  # fmt: skip
    expected = {
        None: [" In the U.S.", " At 9 p.m. in Rome. ", " Rome.", " Rome", " No"],
        True: [" In the U.S.", " At 9 p.m. in Rome.", " Rome.", " No."],
        False: [" In the U.S.", " At 9 p.m. in Rome", " Rome", " No"],
    }
    assert {end: [s.answer for s in statements(asked, full_stop=end)] for end in expected} == expected


def test_options_are_right_or_wrong_whichever_form_is_asked(tmp_path):
    """Instruction tasks: the option behind "the correct answer is" that is right, then the others in their order."""
    task = load_task("siqa", data_dir=write(tmp_path, train=[row(right=3), row("Why?", right=1)], test=[row("When?")]))
    instruction = "Please choose the correct answer to the question: {}\n\nAnswer1: Ann Answer2: Bob Answer3: Cy\n\n"
    prompts = [
        PROMPT.format(instruction.format(q) + "Answer format: answer1/answer2/answer3") + "the correct answer is"
        for q in ("Who?", "Why?")
    ]
    expected = [
        (prompts[0], " answer3", True, 0), (prompts[0], " answer1", False, 0), (prompts[0], " answer2", False, 0),
        (prompts[1], " answer1", True, 1), (prompts[1], " answer2", False, 1), (prompts[1], " answer3", False, 1),
    ]  # fmt: skip
    for form in ("generation", "options"):
        assert told(statements(task.in_form(form))) == expected


def test_boolq_and_svamp(tmp_path):
    """True or false; a worked answer against that of another row."""
    boolq = load_task(
        "boolq",
        data_dir=write(
            tmp_path, train=[BOOLQ], test=[{**BOOLQ, "instruction": BOOLQ["instruction"].replace("is it", "was it")}]
        ),
    )
    assert [(s.answer, s.right) for s in statements(boolq)] == [(" false", True), (" true", False)]
    five = {"instruction": "Bob has 5.", "output": "The answer is 5.", "answer": "5.0"}
    svamp = load_task(
        "svamp", data_dir=write(tmp_path, train=[SVAMP, five], test=[{**SVAMP, "instruction": "Cy has 4."}])
    )
    said = {s.right: s.answer for s in statements(svamp) if s.row == 0}
    assert said == {True: SVAMP["output"], False: "The answer is 5."}


def test_records_of_pairs_and_options():
    """One's own tasks: chosen against rejected; the right option against the others, in their order."""
    pair = [{"prompt": "p", "chosen": " yes", "rejected": " no"}]
    choice = [{"prompt": "q", "answer": " b", "options": [" a", " b", " c"]}]
    made = statements(Task.from_records("pairs", train=pair, test=pair))
    assert told(made) == [("p", " yes", True, 0), ("p", " no", False, 0)]
    assert made[0] == Statement("p", " yes", True, 0)
    made = statements(Task.from_records("options", train=choice, test=choice))
    assert told(made) == [("q", " b", True, 0), ("q", " a", False, 0), ("q", " c", False, 0)]


def test_pairs_without_a_test_form_of_the_same_rows_are_their_own_sides():
    """Training rows of pairs, and choices of other rows: nothing is taken from those."""
    pair = [{"prompt": "p", "chosen": " yes", "rejected": " no"}]
    task = Task.from_records("pairs", train=pair, test=pair)
    other = ChoiceExample("z", " z", (" z",), (" y",))
    for test in ({"train": (other, other)}, {"test": (other,)}, {"train": ()}):
        assert told(statements(replace(task, test=test))) == [("p", " yes", True, 0), ("p", " no", False, 0)]


@pytest.mark.parametrize("name", ["truth", "kinship", "edits"])
def test_the_organisms_tasks(name):
    """Truth has its false values; kinship and edits take another row's answer, never one that is right."""
    task = load_task(f"organism/{name}")
    made = statements(task, n=40, seed=3)
    assert [s.prompt for s in dict.fromkeys(replace(s, answer="", right=True) for s in made)] == [
        e.prompt for e in task.training_examples(n=40, seed=3)
    ]
    for i in {s.row for s in made}:
        right, wrong = ([s.answer for s in made if s.row == i and s.right is side] for side in (True, False))
        asked = task.test["train"][i]
        if name == "truth":
            assert (set(right), wrong) == ({asked.best, *asked.true}, list(asked.false))
        else:
            assert right == [task.training["train"][i].answer]
            assert len(wrong) == 1
            assert wrong[0].strip() not in asked.references
            assert wrong[0] in {e.answer for e in task.training_examples(n=40, seed=3)}


# ------------------------------------------------------------------------------------- wrong answers that are drawn

WORDS = [" aunt", " uncle", " son", " aunt", " wife", " Aunt ", " son"]


def test_a_wrong_answer_is_another_rows():
    """One a row, from the rows that are drawn, told apart without case and outer space; the same again by the same seed."""
    task = answers_task(WORDS)
    made = statements(task, seed=5)
    assert [s.answer for s in made if s.right] == WORDS
    assert [s.right for s in made] == [True, False] * 7
    assert [s.row for s in made] == [i for i in range(7) for _ in "tf"]
    for right, wrong in pairs(made):
        assert right.prompt == wrong.prompt == f"p{right.row}"
        assert wrong.answer in WORDS
        assert wrong.answer.strip().lower() != right.answer.strip().lower()
    assert statements(task, seed=5) == made
    assert any(statements(task, seed=s) != made for s in (6, 7))


def test_every_other_answer_is_as_likely():
    """Each text counts once, however many rows have it: for `a`, 300 draws of `b`, `c` and `d` are 100 each, within 4 sigma."""
    task = answers_task(["a", "b", "b", "b", "b", "c", "d"])
    said = Counter(statements(task, seed=s)[1].answer for s in range(300))
    assert set(said) == set("bcd")
    assert all(abs(n - 100) < 4 * (300 * 2 / 9) ** 0.5 for n in said.values())


def test_only_drawn_rows_give_wrong_answers():
    """Of 40 different answers, 3 rows are drawn: a wrong answer is one of theirs."""
    task = answers_task([f" a{i}" for i in range(40)])
    made = statements(task, n=3, seed=8)
    drawn = random.Random(8).sample(range(40), 3)
    assert [s.row for s in made if s.right] == drawn
    assert {s.answer for s in made} <= {f" a{i}" for i in drawn}
    assert [s.prompt for s in made if s.right] == [e.prompt for e in task.training_examples(n=3, seed=8)]


def test_an_alias_is_no_wrong_answer():
    """Row 0 is also right with `USA`, which another row learns: only `Peru` is left, whatever the seed."""
    task = answers_task(["America", " usa", "Peru"], aliases={0: ["USA"]})
    assert {statements(task, seed=s)[1].answer for s in range(20)} == {"Peru"}
    with pytest.raises(DataError, match="no drawn row has another answer than ' usa', 'America'"):
        statements(answers_task(["America", " usa"], aliases={0: ["USA"]}))
    # References of other rows are not looked at.
    other = replace(task, test={"train": (GenerationExample("z", ("Peru",)),) * 2})
    assert {statements(other, seed=s)[1].answer for s in range(20)} == {" usa", "Peru"}


def test_all_rows_with_one_answer_are_refused():
    """Also where they differ in case or outer space; the task and the answers are named."""
    with pytest.raises(
        DataError, match=r"words: no drawn row has another answer than ' aunt', 'Aunt', so no wrong answer is available"
    ):
        statements(answers_task([" aunt", "Aunt", " aunt"]))
    with pytest.raises(DataError, match="no wrong answer is available"):
        statements(answers_task([" aunt", " uncle"]), n=1)


# ------------------------------------------------------------------------------------------------ draws and splits


def test_validation_rows_come_as_they_are():
    """All of them, or the first n; wrong answers come from the split itself."""
    val = [{"prompt": f"v{i}", "answer": f"w{i}"} for i in range(4)]
    task = answers_task(WORDS, val=val)
    made = statements(task, "val", n=3, seed=1)
    assert [s.prompt for s in made if s.right] == ["v0", "v1", "v2"]
    assert {s.answer for s in made} <= {"w0", "w1", "w2"}
    assert len(statements(task, "val")) == 8


def test_leaked_rows_and_the_tasks_own_number():
    """As `training_examples`: leaked rows never come, and n_train is the default."""
    task = replace(answers_task([f"a{i}" for i in range(20)]), leaked=frozenset(range(0, 20, 2)), n_train=4)
    for seed in range(5):
        made = statements(task, seed=seed)
        assert [s.prompt for s in made if s.right] == [e.prompt for e in task.training_examples(seed=seed)]
        assert len({s.row for s in made}) == 4
        assert all(s.row % 2 for s in made)
    assert [s.row for s in made if s.right] == list(task.drawn(seed=seed))
    with pytest.raises(InputError, match=r"no training rows to draw from: each of its 2 repeats a test item"):
        statements(replace(answers_task(["a", "b"]), leaked=frozenset({0, 1})))


def test_what_cannot_be_drawn_is_refused():
    """A split without rows, an unknown one, a task without training rows, too many."""
    task = answers_task(WORDS)
    with pytest.raises(InputError, match="words has no val rows"):
        statements(task, "val")
    with pytest.raises(InputError, match="unknown split 'tests'"):
        statements(task, "tests")
    with pytest.raises(InputError, match="8 training examples"):
        statements(task, n=8)
    with pytest.raises(InputError, match="evaluation only"):
        statements(replace(task, training={}))


def test_a_draw_of_rows_is_that_of_training_examples():
    """`drawn` gives the indices of what `training_examples` gives, for every split, seed and number."""
    val = [{"prompt": f"v{i}", "answer": "w"} for i in range(4)]
    task = answers_task([f"a{i}" for i in range(12)], val=val)
    for split, n in (("train", None), ("train", 5), ("val", None), ("val", 2)):
        for seed in (0, 1):
            rows = [task.training[split][i] for i in task.drawn(split, n=n, seed=seed)]
            assert tuple(rows) == task.training_examples(split, n=n, seed=seed)
            assert all(isinstance(r, SFTExample) for r in rows)


# ----------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_the_first_of_each_side():
    """By row, in the order in which rows come; a row with one side only has none."""
    t = lambda answer, right, row: Statement("p", answer, right, row)
    listed = (
        t("a", True, 7), t("b", True, 7), t("c", False, 7), t("d", False, 7), t("e", True, 2), t("f", False, 5), t("g", True, 5),
    )  # fmt: skip
    assert pairs(listed) == ((listed[0], listed[2]), (listed[6], listed[5]))
    assert pairs(()) == ()


# ------------------------------------------------------------------------------------------------------- real files


@pytest.mark.data
def test_the_real_truthfulqa(data_dir):
    """Fold 0: 326 training questions; each starts with its best answer, none is both right and wrong, no primer."""
    task = load_task("truthfulqa", data_dir=data_dir)
    made = statements(task)
    assert len({s.row for s in made}) == len(pairs(made)) == len(task.training["train"])
    for right, wrong in pairs(made):
        asked = task.test["train"][right.row]
        assert right.answer == asked.best
        assert wrong.answer == asked.false[0]
        assert right.prompt == task.training["train"][right.row].prompt
        assert right.prompt.startswith("Q: ")
    assert not {(s.prompt, s.answer) for s in made if s.right} & {(s.prompt, s.answer) for s in made if not s.right}


@pytest.mark.data
def test_the_real_truthfulqa_in_either_reading(data_dir):
    """With full stops it is the default; without, all but 3 of 2,474 answers are as LoFiT's code reads them in the file."""
    task = load_task("truthfulqa", data_dir=data_dir)
    made = {end: statements(task, full_stop=end) for end in (None, True, False)}
    assert made[True] == made[None]
    assert all(s.answer.endswith(".") for s in made[None])
    with open(Path(data_dir) / "truthfulqa" / "fold_0_train_seed_42.csv", newline="", encoding="utf-8") as f:
        cells = [row[c] for row in csv.DictReader(f) for c in ("Best Answer", "Correct Answers", "Incorrect Answers")]
    known = {part.strip() for cell in cells for part in cell.split(";")}
    other = [s.answer for s in made[False] if s.answer[1:] not in known]
    assert (len(other), len(made[False])) == (3, 2474)


@pytest.mark.data
@pytest.mark.parametrize(("name", "n"), [("mquake", 134), ("clutrr", 300)])
def test_the_real_generation_tasks(data_dir, name, n):
    """Every training row gives two statements; no wrong answer is a reference of its row, over several seeds."""
    task = load_task(name, data_dir=data_dir)
    for seed in range(6):
        made = statements(task, seed=seed)
        assert len(made) == 2 * n
        for _, wrong in pairs(made):
            right = {r.strip().lower() for r in task.test["train"][wrong.row].references}
            assert wrong.answer.strip().lower() not in right


@pytest.mark.data
@pytest.mark.parametrize(("name", "options"), [("arc_challenge", (3, 4, 5)), ("boolq", (2,))])
def test_the_real_instruction_tasks(data_dir, name, options):
    """One right statement a row and as many as there are options."""
    made = statements(load_task(name, data_dir=data_dir), n=200, seed=1)
    by_row = Counter(s.row for s in made)
    assert len(by_row) == 200 == sum(s.right for s in made)
    assert set(by_row.values()) <= set(options)
    assert all(s.prompt.endswith("the correct answer is") for s in made)
