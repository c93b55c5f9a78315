"""What is read back from a store for figures and tables."""

import json
import shutil
from dataclasses import replace

import pytest

from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.compare import compare, over_seeds
from lofit_lens.evaluation.stats import holm, paired_permutation_test
from lofit_lens.experiments.grid.specs import Run
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.experiments.tables.paper_tables import paper_tables
from tests import studies
from tests.studies import GRID, OTHER, TASKS

KIN, PLACE = (t.name for t in TASKS)


@pytest.fixture
def model(bridge_llama):
    return bridge_llama


@pytest.fixture
def results(study_folder):
    return load_results(study_folder)


def test_earlier_seeds_and_draws_do_not_mix_in(study_folder, model, tmp_path):
    """A later call with fewer of both reads only those."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    fewer = tuple(
        r.model_copy(update={"draws": 1} if "random" in r.heads else {"readings": False} if r.readings else {})
        for r in GRID.runs
    )  # readings are named by their draws, too
    assert studies.run(model, copy, grid=studies.with_changes(seeds=0, runs=fewer)).computed == ()
    found = load_results(copy)
    assert list(found.lofit(KIN)["seed"]) == [0]
    assert list(found.by_chance(KIN)["draw"]) == [0]


def test_seconds_of_the_selection_count(results):
    """Seconds of step 1 are in LoFiT's, as probing is in ITI's; a run on another task has its own seconds of the test."""
    store = Store(results.folder)
    row = results.lofit(KIN, seed=0).iloc[0]
    name = results.folders[results.lofit(KIN, seed=0).index[0]].name
    scores = store.read(name)["spec"]["heads"]["cell"]
    seconds = store.timing(name)["fit_seconds"] + store.timing(scores)["seconds"]
    assert row["fit_seconds"] == pytest.approx(seconds)
    other = results.rows(task=KIN, method="LoFiT", tested=OTHER.name, seed=0).iloc[0]
    assert other["fit_seconds"] == row["fit_seconds"]
    assert other["eval_seconds"] != row["eval_seconds"]


def test_all_that_was_asked_is_there(results, study_folder):
    """One row a run and tested task, with the task's metric; scores of every seed."""
    cells = Store(study_folder).grids()["small"]["cells"]
    assert len(results.runs) == sum(row["kind"] in ("fit", "test") for row in cells.values())
    assert set(results.runs["metric"]) == {"em"}
    assert set(results.runs["n_items"]) == {5}, "the grid's limit"
    assert {s for t, by, s in results.scores if (t, by) == (KIN, "A-norm")} == {0, 1, 2}
    assert {s for t, by, s in results.scores if (t, by) == (PLACE, "probe accuracy")} == {0, 1}
    assert results.tasks == (KIN, PLACE)
    assert results.seeds == (0, 1)
    assert list(results.record["other_tasks"]) == [OTHER.name]


def test_runs_are_what_they_say(results):
    """Other tasks' heads are the other task's best; few rows are few; values are the items'."""
    crossed = results.lofit(KIN, source=PLACE)
    assert list(crossed["seed"]) == [0, 1]
    for i, seed in zip(crossed.index, (0, 1), strict=True):
        assert crossed.loc[i, "heads"] == str(results.heads(PLACE, seed=seed, k=results.k(KIN)))
        assert results.evaluations[i].task == KIN
    few = results.lofit(KIN, n_train=4)
    config = json.loads((results.folders[few.index[0]] / "adapter" / "adapter_config.json").read_text())
    assert config["n_train"] == 4
    values = results.values(results.by_chance(KIN))
    assert values.shape == (2, 5)
    assert values[1].tolist() == results.evaluations[results.by_chance(KIN).index[1]].items["em"].tolist()
    assert list(results.by_chance(KIN)["draw"]) == [0, 1]
    other = results.rows(task=KIN, method="LoFiT", tested=OTHER.name)
    assert {results.evaluations[i].task for i in other.index} == {OTHER.name}
    assert len(results.zero_shot(KIN)) == 1
    assert results.adapter(KIN, seed=1).meta.seed == 1
    assert results.damage(KIN).shape == (2, len(studies.TEXTS))
    assert results.damage(KIN).min() > 0


def test_grids_of_one_store_are_read_together_or_apart(study_folder, model, tmp_path):
    """Another grid's runs join those that are there; what cannot be drawn together is named, and can be left out."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    options = {"selections": {}, "scores": (), "other_tasks": ()}
    wide = studies.with_changes(name="wide", runs=[Run(k=4)], **options)
    assert len(studies.run(model, copy, grid=wide, other_tasks=[]).computed) == 4
    found = load_results(copy)
    assert list(found.lofit(KIN, k=4)["seed"]) == [0, 1]
    assert list(found.record["other_tasks"]) == [OTHER.name]
    alone = load_results(copy, grids=["wide"])
    assert len(alone.runs) == 4
    assert (found.k(KIN), alone.k(KIN)) == (1, 4), "the preset's number, unless no run has it"
    assert alone.adapter(KIN).k == 4
    short = studies.with_changes(name="short", runs=[Run(method="zero-shot")], limit=4, **options)
    studies.run(model, copy, grid=short, other_tasks=[])
    with pytest.raises(InputError, match=r"the grid small has another limit \(5, not 4\); read the grids separately"):
        load_results(copy)
    assert len(load_results(copy, grids=["small", "wide"]).runs) == len(found.runs)
    slow = studies.with_changes(name="slow", runs=[Run(method="RED", settings={"lr": 1e-4})], **options)
    studies.run(model, copy, grid=slow, other_tasks=[])
    with pytest.raises(InputError, match=r"RED on kin \(seed 0\) with several settings"):
        load_results(copy, grids=["small", "slow"])
    with pytest.raises(InputError, match=r"unknown grid 'smal'.*Did you mean 'small'"):
        load_results(copy, grids=["smal"])
    with pytest.raises(InputError, match="unknown model 'x'"):
        load_results(copy, model="x")


def test_a_folder_without_a_study_says_what_to_do(tmp_path):
    """No store, one without a grid, a grid without a run; nothing is written."""
    with pytest.raises(DataError, match="holds no study"):
        load_results(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store = Store(tmp_path / "s")
    with pytest.raises(DataError, match="holds no grid"):
        load_results(store.root)


def test_asking_for_what_is_not_there(results):
    """Runs, scores, columns and tasks that the study lacks are named."""
    with pytest.raises(InputError, match="no such run"):
        results.values(results.lofit(KIN, k=77))
    with pytest.raises(InputError, match="no head scores of kin by bias norm with seed 0"):
        results.heads(KIN, "bias norm")
    with pytest.raises(InputError, match="unknown column 'color'"):
        results.rows(color="red")
    with pytest.raises(InputError, match="unknown task 'nix'"):
        results.k("nix")
    with pytest.raises(InputError, match="different items"):
        results.values(results.runs[results.runs["tested"].isin([KIN, PLACE])])


def test_method_table_has_all_methods_and_what_was_chosen(results):
    """Rows in the paper's order; ITI's and RepE's settings were chosen on validation rows, the others' are the presets'."""
    table = results.method_table(KIN)
    names = ["zero-shot", "ITI", "RepE", "random heads", "LoFiT 3 %", "LoFiT 10 %", "LoRA", "RED", "LoReFT"]
    assert [r.method for r in table.rows] == names
    assert {r.method for r in table.rows if r.tried > 1} == {"ITI", "RepE"}
    runs = [results.evaluations[i] for i in results.lofit(KIN).index]
    assert table["LoFiT 3 %"].metrics == over_seeds(runs)
    notes = " ".join(table.notes())
    assert "chosen on the validation split, 4 settings per method" in notes
    assert "given or reused: random heads: lr" in notes


def test_paper_tables_repeat_the_runs(results):
    """Tables 1, 2, 3 and 5: cells are the runs' means; marks come from Holm's p."""
    tables = {t.name: t for t in paper_tables(results)}
    assert list(tables) == ["table1", "table2", "table3", "table5"]
    frame = tables["table3"].frame.set_index(["method", "task"])
    red = [results.evaluations[i] for i in results.rows(task=PLACE, method="RED", n_train=None).index]
    assert frame.loc[("RED", PLACE), "mean"] == over_seeds(red)["em"].mean
    assert frame.loc[("RED", PLACE), "n_parameters"] == 2 * 3 * 32
    assert [row[0] for row in tables["table2"].cells] == [
        "heads by A-norm",
        "heads by probe accuracy",
        "heads by random",
    ]
    last = tables["table5"]
    assert [row[0] for row in last.cells] == ["unmodified", KIN, PLACE]
    base = [results.evaluations[results.rows(tested=OTHER.name, method="zero-shot").index[0]]]
    p = []
    for task in (KIN, PLACE):
        runs = [results.evaluations[i] for i in results.rows(task=task, method="LoFiT", tested=OTHER.name).index]
        assert len(runs) == 2
        p.append(compare(runs, base, test=paired_permutation_test)["em"].p)
    found = last.frame[last.frame["metric"] == "em"].set_index("tuned_on").loc[[KIN, PLACE], "p_holm"].tolist()
    assert found == pytest.approx(holm(p))
    assert last.columns[-1] == "text: KL, nats per token"
    kl = last.frame[last.frame["metric"] == "kl"].set_index("tuned_on").loc[KIN, "mean"]
    assert kl == pytest.approx(results.damage(KIN).mean())
    few = paper_tables(replace_methods(results, ("LoFiT", "zero-shot")))
    assert [t.name for t in few] == ["table1", "table2", "table5"], "no table of methods that were not run"
    assert "random heads" in few[0].title
    assert "ITI" not in few[0].title, "it names what ran"
    trial = results.method_table(KIN).methods[1].tuned.trials["n_items"].iloc[0]
    assert f"settings (chosen on {trial} validation rows): ITI: alpha" in tables["table1"].to_markdown()
    usual = kept_rows(results, ~results.runs["heads_from"].isin(["probe accuracy"]))
    assert "table2" not in [t.name for t in paper_tables(usual)], "it would repeat rows of Table 1"
    text = tables["table1"].to_latex()
    assert text.count("\\\\") == 1 + len(tables["table1"].cells)
    assert "| method | parameters |" in tables["table1"].to_markdown()


def replace_methods(results, kept):
    """The same results without the runs of other methods."""
    return kept_rows(results, results.runs["method"].isin(kept))


def kept_rows(results, which):
    rows = [i for i, kept in enumerate(which) if kept]
    return replace(
        results, runs=results.runs.iloc[rows].reset_index(drop=True), folders=tuple(results.folders[i] for i in rows),
        evaluations=tuple(results.evaluations[i] for i in rows),
    )  # fmt: skip
