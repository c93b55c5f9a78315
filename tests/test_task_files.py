"""Tasks from one file: columns by name, splits, several wrong answers in a row, and what is said of a file that is not right."""

import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from lofit_lens import Task, load_task
from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments.grid.run import plan_grid, run_grid
from lofit_lens.tasks import ChoiceExample, OptionExample, PairExample, SFTExample
from tests.test_cli import run

ROWS = [{"prompt": f"p{i}", "answer": f" a{i}"} for i in range(40)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


# -------------------------------------------------------------------------------------------------------- splits


def test_every_format_gives_the_same_task(tmp_path):
    """The same rows as .jsonl, .json, .csv and .parquet: the same examples and hash; named after the file."""
    files = [
        jsonl(tmp_path / "mine.jsonl", ROWS), tmp_path / "mine.json", tmp_path / "mine.parquet",
        csv(tmp_path / "mine.csv", "prompt,answer", *(f"{r['prompt']},{r['answer']}" for r in ROWS)),
    ]  # fmt: skip
    files[1].write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[2])
    tasks = [load_task(str(f)) for f in files]
    assert {t.name for t in tasks} == {"mine"}
    assert len({t.data_hash for t in tasks}) == 1
    assert all(t.training == tasks[0].training and t.test == tasks[0].test for t in tasks)
    assert tasks[0].source == str(files[0])


def test_rows_without_a_split_are_divided_the_same_way_every_time(tmp_path):
    """A tenth of 40 for testing and for validation; all rows once, in the file's order; the division is said."""
    task = load_task(jsonl(tmp_path / "t.jsonl", ROWS))
    prompts = {s: [e.prompt for e in task.examples(s)] for s in ("train", "val", "test")}
    assert [len(p) for p in prompts.values()] == [32, 4, 4]
    assert sorted(itertools.chain(*prompts.values())) == sorted(r["prompt"] for r in ROWS)
    assert all(p == sorted(p, key=lambda x: int(x[1:])) for p in prompts.values())
    assert task.counted == {"rows without a split, divided 80/10/10 by prompt with seed 0": 40}
    again = load_task(tmp_path / "t.jsonl")
    assert (again.test, again.data_hash) == (task.test, task.data_hash)
    other = load_task(jsonl(tmp_path / "t.jsonl", [*ROWS[1:], ROWS[0]]))
    assert other.data_hash != task.data_hash


def test_rows_of_one_prompt_stay_together(tmp_path):
    """Ten prompts of four rows each, two of which differ in white space: no prompt stands in two splits."""
    rows = [{"prompt": f"p {i}" + " " * (n % 2), "answer": f" {n}"} for i in range(10) for n in range(4)]
    task = load_task(jsonl(tmp_path / "t.jsonl", rows))
    splits = [{e.prompt.strip() for e in task.examples(s)} for s in ("train", "val", "test")]
    assert [len(s) for s in splits] == [8, 1, 1]
    assert len(set.union(*splits)) == 10
    assert not any(s.startswith("test:") for s in task.counted)


def test_a_split_column_decides(tmp_path):
    """Its names are train, val or validation or dev, test, in any case; a file without val is taken; another name is refused."""
    named = ["train", "Train", "validation", "dev", "test"]
    rows = [{**r, "split": s} for r, s in zip(ROWS, named, strict=False)]
    task = load_task(jsonl(tmp_path / "t.jsonl", rows))
    assert {s: [e.prompt for e in listed] for s, listed in task.test.items()} == {
        "train": ["p0", "p1"], "val": ["p2", "p3"], "test": ["p4"]
    }  # fmt: skip
    assert task.counted == {}
    assert "val" not in load_task(jsonl(tmp_path / "t.jsonl", [rows[0], rows[4]])).test
    part = load_task(
        csv(tmp_path / "t.csv", "prompt,answer,part", "a, b,train", "c, d,test"), columns={"split": "part"}
    )
    assert part.training["train"] == (SFTExample("a", " b"),)
    for bad, said in (({**rows[0], "split": "tests"}, "split is 'tests'; allowed: train"), (ROWS[0], "split is None")):
        with pytest.raises(DataError, match=rf"t\.jsonl:2: {said}"):
            load_task(jsonl(tmp_path / "t.jsonl", [rows[0], bad]))
    with pytest.raises(DataError, match=r"t\.jsonl has rows for train and none for test"):
        load_task(jsonl(tmp_path / "t.jsonl", rows[:2]))


def test_a_json_file_by_split(tmp_path):
    """Lists under the splits' names; other names, no lists, and nothing at all are refused."""
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"train": ROWS[:3], "validation": ROWS[3:4], "test": ROWS[4:6]}))
    task = load_task(path)
    assert [len(task.test[s]) for s in ("train", "val", "test")] == [3, 1, 2]
    for held, said in (
        ({"train": ROWS, "tests": ROWS}, r"holds 'train', 'tests'; give a list of rows, or train, val, test"),
        ({"train": ROWS, "test": {}}, "'test' is a dict; it must be a list of rows"),
        ({"train": [], "test": []}, "is empty"), ({"train": ROWS, "test": []}, "none for test"),
        ({"train": [*ROWS, {"prompt": "p"}], "test": ROWS}, "train row 41: no field 'answer'"),
    ):  # fmt: skip
        path.write_text(json.dumps(held))
        with pytest.raises(DataError, match=rf"t\.json.*{said}"):
            load_task(path)


def test_too_few_rows_are_not_divided(tmp_path):
    """Two prompts make no three splits."""
    with pytest.raises(DataError, match=r"2 different prompt\(s\).*at least three, or a column split"):
        load_task(jsonl(tmp_path / "t.jsonl", [*ROWS[:2], ROWS[0]]))
    assert [len(r) for r in load_task(jsonl(tmp_path / "t.jsonl", ROWS[:3])).test.values()] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------- columns


def test_columns_are_named(tmp_path):
    """A column in place of a field, and texts with columns in braces; other columns are not read."""
    path = csv(tmp_path / "t.csv", "question,label,n", *(f"q{i},l{i},{i}" for i in range(10)))
    plain = load_task(path, columns={"prompt": "question", "answer": "label"})
    assert {(e.prompt, e.answer) for e in plain.training["train"]} < {(f"q{i}", f"l{i}") for i in range(10)}
    made = load_task(path, columns={"prompt": "Q {n}: {question}\nA:", "answer": " {label}"})
    assert {(e.prompt, e.answer) for e in made.training["train"]} < {(f"Q {i}: q{i}\nA:", f" l{i}") for i in range(10)}
    assert plain.data_hash != made.data_hash


def test_several_answers_in_one_row(tmp_path):
    """Right and wrong ones as lists in JSON, in CSV as JSON or in several columns whose empty cells are left out."""
    rows = [
        {"prompt": f"p{i}", "right": ["a", "b"], "wrong": ["c", "d", "e"], "split": s}
        for i, s in enumerate(("train", "test"))
    ]
    columns = {"chosen": " {right}", "rejected": " {wrong}"}
    task = load_task(jsonl(tmp_path / "t.jsonl", rows), columns=columns)
    assert task.training["train"] == (PairExample("p0", " a", " c"),)
    assert task.examples("test") == (ChoiceExample("p1", " a", (" a", " b"), (" c", " d", " e")),)
    lists = [f'p{i},"[""a"", ""b""]","[""c"",""d"",""e""]",{s}' for i, s in enumerate(("train", "test"))]
    assert load_task(csv(tmp_path / "t.csv", "prompt,right,wrong,split", *lists), columns=columns).test == task.test
    wide = [f"p{i},a,b,c,d,e,,{s}" for i, s in enumerate(("train", "test"))]
    columns = {"chosen": [" {r1}", " {r2}"], "rejected": [" {w1}", " {w2}", " {w3}", " {w4}"]}
    path = csv(tmp_path / "t.csv", "prompt,r1,r2,w1,w2,w3,w4,split", *wide)
    assert load_task(path, columns=columns).test == task.test


def test_options_and_aliases_in_csv(tmp_path):
    """Options in several columns, the answer among them; one alias is a list of one, an empty cell none."""
    lines = ("q,a,b,label,split", "p0,x,y,x,train", "p1,x,z,z,test")
    task = load_task(csv(tmp_path / "t.csv", *lines), columns={"prompt": "q", "options": ["a", "b"], "answer": "label"})
    assert task.examples("test") == (OptionExample("p1", ("x", "z"), 1),)
    lines = ("prompt,answer,aliases,split", "p0,x,,train", "p1,x,y,test", 'p2,x,"[""y"", ""z""]",test')
    task = load_task(csv(tmp_path / "t.csv", *lines))
    assert [e.references for e in task.examples("test")] == [("x", "y"), ("x", "y", "z")]


@pytest.mark.usefixtures("unchecked")
def test_columns_of_another_form_are_refused(tmp_path):
    """An unknown field, no text, several for one; and for a task that is no file."""
    path = jsonl(tmp_path / "t.jsonl", ROWS)
    for columns, said in (
        ({"promt": "p"}, "unknown field 'promt'; allowed: prompt.*Did you mean 'prompt'"), ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, r"prompt is \[\]"), ({"prompt": ["a", "b"]}, "prompt takes one column, got a, b"),
        ("p", "columns is 'p'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            load_task(path, columns=columns)
    with pytest.raises(InputError, match="columns are for a task in one file, and organism/truth is not a file"):
        load_task("organism/truth", columns={"prompt": "p"})
    with pytest.raises(InputError, match="takes no fold, no data_dir and no source"):
        load_task(path, fold=0)


# ------------------------------------------------------------------------------------------------ what is not right


@pytest.mark.parametrize(
    ("name", "text", "columns", "said"),
    [("t.csv", "", {}, "is empty"), ("t.csv", "prompt,answer\n", {}, "is empty"), ("t.json", "{}", {}, "is empty"),
     ("t.csv", "q,label\na,b\n", {}, r"no column 'prompt'; its first row has q, label.*--column prompt=\.\.\."),
     ("t.jsonl", '{"prompt": "a", "chosen": "b"}', {}, r"no column 'rejected'"),
     ("t.csv", "q,label\na,b\n", {"prompt": "question"}, r":2: no column 'question' \(prompt\); the columns are q, label"),
     ("t.csv", "q,label\na,b\n", {"prompt": "{q} {x}"}, r":2: no column 'x' \(prompt\)"),
     ("t.csv", "prompt,label\na,b\nc,\n", {"answer": "label"}, r":3: column 'label' \(answer\) is empty"),
     ("t.csv", "prompt,label\na,b\nc,\n", {"answer": " {label}"}, r":3: column ' \{label\}' \(answer\) is empty"),
     ("t.csv", "prompt,a,w1,w2\np,a,,\n", {"chosen": "a", "rejected": ["w1", "w2"]}, r":2: column 'w1', 'w2' \(rejected\) is"),
     ("t.csv", "prompt,answer,split\na,b,train\nc,,test\n", {}, r":3: field 'answer' is ''"),
     ("t.csv", "prompt,answer,prompt\na,b,c\n", {}, r":1: two columns are called 'prompt'"),
     ("t.csv", "prompt,answer\na,b\nc\n", {}, r":3: 1 cells under 2 columns"),
     ("t.csv", "prompt,answer\na,b,c\n", {}, r":2: 3 cells under 2 columns"),
     ("t.csv", "prompt,answer\na,b\nc,\"d\n", {}, r":\d: not CSV"),
     ("t.csv", "prompt,chosen,rejected\np,a,\"['b', 'c']\"\n", {}, r":2: column 'rejected' begins as a list but is not JSON"),
     ("t.jsonl", '{"prompt": "a", "answer": NaN}\n' * 3, {}, "too few|answer.*nan"),
     ("t.jsonl", '{"prompt": "a", "l": NaN}\n', {"answer": "l"}, r":1: column 'l' \(answer\) is empty"),
     ("t.jsonl", '{"prompt": "a", "l": 1.5}\n', {"answer": "{l}"}, r":1: column 'l' \(answer\) is 1\.5"),
     ("t.jsonl", '{"prompt": "a", "answer": "b"}\n[1]\n', {}, r":2: expected a record, got list"),
     ("t.txt", "a", {}, r"unknown format '\.txt'; give \.csv, \.json, \.jsonl, \.parquet")],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, text, columns, said):
    """File, line or row, column, and what to do."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=rf"{path}.*({said})"):
        load_task(path, columns=columns)


def test_a_missing_file_and_another_encoding(tmp_path):
    """Each is said with the file."""
    with pytest.raises(DataError, match=r"cannot read .*none\.csv"):
        load_task(str(tmp_path / "none.csv"))
    (tmp_path / "t.csv").write_bytes(b"prompt,answer\ncaf\xe9,b\n")
    with pytest.raises(DataError, match=r"t\.csv:2: not UTF-8"):
        load_task(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("row", "said"),
    [({"chosen": ["a"], "rejected": []}, "'rejected' is an empty list"),
     ({"chosen": ["a", "a"], "rejected": "b"}, "holds 'a' twice"),
     ({"chosen": ["a", " "], "rejected": "b"}, "holds ' '"), ({"chosen": "a", "rejected": ["b", "a"]}, "are the same text, 'a'"),
     ({"chosen": "a", "rejected": ["b", 3]}, "must be a list of texts")],
)  # fmt: skip
def test_lists_of_answers_are_checked(row, said):
    """No answer is empty, given twice, or right and wrong."""
    with pytest.raises(DataError, match=rf"row 1.*{said}"):
        Task.from_records("t", train=[{"prompt": "p", **row}], test=[{"prompt": "p", **row}])


def test_a_missing_space_is_said(tmp_path, caplog):
    """A table's prompt and answer run into each other unless one has the space; said where all do."""
    path = csv(tmp_path / "t.csv", "prompt,answer", *(f"What is {i}?,It" for i in range(5)))
    load_task(path)
    assert "without a space, as in 'What is 0?It'" in caplog.text
    caplog.clear()
    load_task(path, columns={"answer": " {answer}"})
    assert not caplog.messages


# --------------------------------------------------------------------------------------------- on the shell, in grids


def rows_of_truth(n=12):
    """Rows in the embedded model's words."""
    listed = load_task("organism/truth").test["test"][:n]
    return [{"q": e.prompt, "right": e.best.strip(), "wrong": [f.strip() for f in e.false][:3]} for e in listed]


COLUMNS = {"prompt": "q", "chosen": " {right}", "rejected": " {wrong}"}
OPTIONS = tuple(word for field, column in COLUMNS.items() for word in ("--column", f"{field}={column}"))


def test_on_the_shell(capsys, monkeypatch, tmp_path):
    """tune takes a file and its columns, and repeats them in the command that it suggests; bad ones end with exit code 2."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "mine.jsonl", rows_of_truth())
    asked = ("tune", "--task", "mine.jsonl", "--heads", "L1H2", "--max-steps", 1, "--quiet")
    code, out, err = run(capsys, monkeypatch, *asked, *OPTIONS, "--out", "a")
    assert code == 0, err
    assert "mine: 10 train / 1 val / 1 test, DPO, metric mc1" in out
    assert "divided 80/10/10 by prompt with seed 0: 12" in out
    assert "--column prompt=q --column 'chosen= {right}' --column 'rejected= {wrong}'" in out
    for words, said in (
        (("--column", "prompt"), "--column 'prompt' is not FIELD=COLUMN"), ((), "has no column 'prompt'"),
        (("--column", "prompt=q", "--column", "promt=q"), "unknown field 'promt'"),
    ):  # fmt: skip
        code, _, err = run(capsys, monkeypatch, *asked, *words, "--out", "b")
        assert (code, said in err) == (2, True), err


def test_columns_are_for_the_files_among_several_tasks(capsys, monkeypatch, tmp_path):
    """grid --dry-run and compare; --column without a file is refused."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "mine.jsonl", rows_of_truth())
    (tmp_path / "g.yaml").write_text(
        "name: g\nmodel: organism\ntasks: organism/truth\nseeds: [0]\nruns: [{method: zero-shot}]\n"
    )
    both = ("--task", "mine.jsonl", "--task", "organism/truth")
    code, out, err = run(capsys, monkeypatch, "grid", "g.yaml", *both, *OPTIONS, "--dry-run")
    assert (code, "2 cells" in out) == (0, True), err
    for verb in (("grid", "g.yaml", "--dry-run"), ("compare", "--out", "c")):
        code, _, err = run(capsys, monkeypatch, *verb, "--task", "organism/truth", *OPTIONS)
        assert (code, "--column is for tasks in one file, but none of organism/truth is a file" in err) == (2, True), (
            err
        )


def test_in_a_grid(tmp_path, monkeypatch):
    """Found from the grid's file, wherever the shell stands; other rows make other runs; a missing file is named."""
    (tmp_path / "there").mkdir()
    mine = jsonl(tmp_path / "there" / "mine.jsonl", rows_of_truth(30))
    grid = tmp_path / "there" / "grid.yaml"
    grid.write_text(
        "name: mine\nmodel: organism\nseeds: [0]\nruns: [{method: zero-shot}]\n"
        "tasks:\n  - name: mine.jsonl\n    columns: {prompt: q, chosen: ' {right}', rejected: [' {wrong}']}\n"
    )
    monkeypatch.chdir(tmp_path)
    report = run_grid(grid, tmp_path / "store", progress=False)
    assert (len(report.computed), report.failed) == (1, {})
    first = {cell.name for cell in plan_grid(grid).cells}
    assert first == set(report.computed)
    (tmp_path / "mine.yaml").write_text(grid.read_text().replace("mine.jsonl", "there/mine.jsonl"))
    assert first == {cell.name for cell in plan_grid(tmp_path / "mine.yaml").cells}
    jsonl(mine, [*rows_of_truth(30)[1:], {"q": "new", "right": "a", "wrong": ["b"]}])
    assert first.isdisjoint(cell.name for cell in plan_grid(grid).cells)
    mine.unlink()
    with pytest.raises(DataError, match=r"there/mine\.jsonl"):
        plan_grid(grid)
