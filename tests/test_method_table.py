"""The comparison's table: means, intervals, paired tests and costs of runs whose items are written by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from lofit_lens.errors import InputError
from lofit_lens.evaluation.compare import compare
from lofit_lens.evaluation.result import EvalResult, Metric
from lofit_lens.evaluation.stats import bootstrap_interval_over_seeds, holm
from lofit_lens.experiments.methods.choice import Tuned
from lofit_lens.experiments.tables.runs import FitResult, MethodRuns
from lofit_lens.experiments.tables.table import MethodTable, Spread
from lofit_lens.tasks import Task

N = 60
TASK = Task.from_records("caps_%", train=[{"prompt": "a", "answer": " b"}], test=[{"prompt": "c", "answer": " d"}])


def result(values, label=""):
    items = pd.DataFrame({"item": range(1, N + 1), "group": "", "prompt": "p", "em": values, "correct": values == 1})
    return EvalResult(
        TASK.name, "test", {"em": Metric.of(values.tolist())}, items, label=label, data_hash=TASK.data_hash
    )


def scores(share, seed):
    return (np.random.default_rng(seed).random(N) < share).astype(float)


def run(seed, values, *, n=8, fit=1.0, took=0.5, kl=None, heads="L0H1"):
    hurt = None
    if kl is not None:
        hurt = {"kl": kl, "cross_entropy": [2.0 + k for k in kl], "cross_entropy_base": [1.5] * len(kl)}
    return FitResult(seed, {"lr": 0.01}, result(values), n, fit, took, hurt, heads)


GOOD = [scores(0.9, 1), scores(0.9, 2)]
BAD = [scores(0.4, 3), scores(0.4, 4)]
NONE = scores(0.1, 5)
TUNED = Tuned(
    "bad",
    "caps_%",
    "em",
    {"lr": 0.01},
    2,
    pd.DataFrame([{"lr": 0.01, "seed": 0, "value": 0.5}, {"lr": 0.02, "seed": 0}]),
)


@pytest.fixture
def table():
    return MethodTable.of(
        [
            MethodRuns("zero-shot", (run(0, NONE, n=0, heads=""),)),
            MethodRuns("bad", (run(0, BAD[0], fit=2.0, kl=[0.1, 0.3]), run(1, BAD[1], fit=4.0, kl=[0.2, 0.6])), TUNED),
            MethodRuns("good", (run(0, GOOD[0], n=1234), run(1, GOOD[1], n=1234))),
        ],
        "good",
    )


def test_means_and_intervals_are_over_seeds_and_items(table):
    """The mean of both seeds' means, and the two-way bootstrap's interval."""
    row = table["bad"]
    assert row.metrics["em"].mean == pytest.approx(np.mean(BAD))
    assert row.metrics["em"].interval == bootstrap_interval_over_seeds(np.array(BAD), binary=True)
    assert (row.metrics["em"].seeds, row.metrics["em"].n) == (2, N)
    assert table["zero-shot"].metrics["em"].seeds == 1


def test_each_method_is_tested_against_the_reference(table):
    """Method minus reference, items averaged over seeds; p adjusted over the methods; none for the reference."""
    tests = [compare([result(v) for v in side], [result(v) for v in GOOD])["em"] for side in ([NONE], BAD)]
    adjusted = holm([t.p for t in tests])
    for name, test, p in zip(("zero-shot", "bad"), tests, adjusted, strict=True):
        assert table[name].against["em"].difference == test.difference < 0
        assert table[name].against["em"].p == test.p
        assert table[name].p_holm == p
    assert table["good"].against is None
    assert table["good"].p_holm is None


def test_costs_and_damage(table):
    """Seconds with their range, parameters as they are, KL and cross-entropy increase over seeds and texts."""
    row = table["bad"]
    assert row.fit == Spread(3.0, 2.0, 4.0)
    assert str(row.fit) == "3.00 (2.00 to 4.00)"
    assert str(row.evaluation) == "0.50"
    assert row.kl.mean == pytest.approx(0.3)
    assert row.increase.mean == pytest.approx(0.8)  # 0.5 + mean KL here
    assert row.kl.interval[0] < 0.3 < row.kl.interval[1]
    assert table["good"].kl is None
    assert table["good"].n_parameters == 1234
    assert (row.tried, table["good"].tried) == (2, 0)
    assert row.heads == ("L0H1", "L0H1")


def test_cells_have_every_number_with_its_interval(table):
    """One cell a column; a dash only where nothing was measured."""
    columns, cells = table.columns(), table.cells()
    assert columns == (
        "method", "parameters", "em", "em - good", "p, Holm", "fit, s", "evaluation, s", "KL, nats", "CE increase, nats",
    )  # fmt: skip
    assert all(len(row) == len(columns) for row in cells)
    assert [row[0] for row in cells] == ["zero-shot", "bad", "good"]
    assert cells[2][1] == "1,234"
    assert cells[2][3:5] == ("-", "-")
    assert all("[" in row[2] for row in cells)
    assert all("[" in row[3] for row in cells[:2])
    assert cells[1][7].startswith("0.300 [")


def test_without_texts_there_is_no_damage_column():
    """Nothing measured, nothing shown."""
    table = MethodTable.of([MethodRuns("good", (run(0, GOOD[0]),))], "good")
    assert "KL, nats" not in table.columns()
    assert not any("KL" in note for note in table.notes())
    assert len(table.cells()[0]) == len(table.columns())


def test_markdown_is_a_table_of_equal_rows(table):
    """As many cells a line as the head has; the title in front, the notes behind."""
    lines = [line for line in table.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {line.count(" | ") for line in lines} == {len(table.columns()) - 1}
    assert table.to_markdown().startswith("**caps_%, test split, n=60")
    assert "2 settings per method" in table.to_markdown()


def test_latex_escapes_what_latex_would_eat(table):
    """% and _ of the task's name, and as many & a line as there are columns less one."""
    text = table.to_latex()
    assert r"caps\_\%" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 3
    assert all(line.count("&") == len(table.columns()) - 1 and line.endswith(r"\\") for line in body)
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert not [line for line in text.splitlines()[1:] if "%" in line.replace(r"\%", "")]


def test_files(table, tmp_path):
    """Six files; JSON without NaN; CSV with the same numbers; nothing else is left."""
    files = table.save(tmp_path / "new")
    assert {f.name for f in files} == {p.name for p in (tmp_path / "new").iterdir()}
    assert {f.name for f in files} == {
        f"caps_%{end}" for end in (".md", ".tex", ".csv", "-runs.csv", "-trials.csv", ".json")
    }
    record = json.loads((tmp_path / "new" / "caps_%.json").read_text(), parse_constant=lambda _: pytest.fail("NaN"))
    assert [r["method"] for r in record["rows"]] == ["zero-shot", "bad", "good"]
    assert record["rows"][1]["metrics"]["em"]["mean"] == table["bad"].metrics["em"].mean
    assert record["tuned"][0]["trials"][1]["value"] is None
    read = pd.read_csv(tmp_path / "new" / "caps_%.csv")
    assert read["em"].tolist() == pytest.approx([r.metrics["em"].mean for r in table.rows])
    assert len(pd.read_csv(tmp_path / "new" / "caps_%-runs.csv")) == 5
    assert len(pd.read_csv(tmp_path / "new" / "caps_%-trials.csv")) == 2


def test_notes_say_how_settings_came_about(table):
    """Seeds where they differ, points tried, the test and Holm."""
    notes = "\n".join(table.notes())
    assert "(per row: 2 runs (zero-shot: 1))" in notes
    assert "2 settings per method" in notes
    assert "Holm" in notes
    assert "paired bootstrap" in notes


def test_settings_of_runs_that_chose_for_themselves(table):
    """All values are named, and not as if they were given."""
    apart = [FitResult(s, {"lr": lr}, result(GOOD[s]), 8, 1.0, 0.5) for s, lr in ((0, 0.03), (1, 0.01))]
    rows = MethodTable.of([MethodRuns("good", tuple(apart), by_run=True), MethodRuns("one", (run(0, BAD[0]),))], "good")
    assert rows["good"].settings == {"lr": "0.01 / 0.03"}
    notes = "\n".join(rows.notes())
    assert "settings chosen for each run on the validation split: good: lr 0.01 / 0.03" in notes
    assert "settings given or reused: one: lr 0.01" in notes
    assert "run by run" not in "\n".join(table.notes())


def test_few_items_take_the_permutation_test():
    """Below 50 items the bootstrap finds too much."""
    few = [EvalResult(r.task, r.split, r.metrics, r.items.head(20)) for r in (result(GOOD[0]), result(BAD[0]))]
    runs = [FitResult(0, {}, r, 1, 1.0, 1.0) for r in few]
    table = MethodTable.of([MethodRuns("a", (runs[0],)), MethodRuns("b", (runs[1],))], "a")
    assert "permutation" in table["b"].against["em"].method


@pytest.mark.parametrize(("reference", "counts", "message"), [("best", (1, 1), "best"), ("a", (1, 2), r"\[1, 2\]")])
def test_bad_tables_are_refused(reference, counts, message):
    """A reference that is not there; one method with two numbers of parameters."""
    runs = tuple(run(i, GOOD[i], n=n) for i, n in enumerate(counts))
    with pytest.raises(InputError, match=message):
        MethodTable.of([MethodRuns("a", runs)], reference)


def test_unknown_method_names_those_there(table):
    """As everywhere."""
    with pytest.raises(InputError, match="zero-shot, bad, good"):
        table["lora"]


def test_notebook_view(table):
    """Escaped HTML with title and every method."""
    page = table._repr_html_()
    assert "<table>" in page
    assert all(name in page for name in ("zero-shot", "bad", "good", "caps_%"))
