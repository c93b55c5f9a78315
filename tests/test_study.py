"""A study: what is planned, what is kept and not run again, and what is read back from its folder."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from lofit_lens.errors import DataError, InputError, TrainingDiverged
from lofit_lens.evaluation.compare import compare, over_seeds
from lofit_lens.evaluation.stats import holm, paired_permutation_test
from lofit_lens.experiments import study
from lofit_lens.experiments.paper_tables import paper_tables
from lofit_lens.experiments.plan import Fit, Plan, plan_fits, usual_ks
from lofit_lens.experiments.results import load_results
from lofit_lens.experiments.study import run_study
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.models import model_info
from tests import studies
from tests.studies import OTHER, PLAN, TASKS

KIN, PLACE = (t.name for t in TASKS)


@pytest.fixture
def model(bridge_llama):
    return bridge_llama


@pytest.fixture
def folder(study_folder):
    return study_folder


@pytest.fixture
def results(folder):
    return load_results(folder)


def plan_of(plan, scores=None):
    info = type("Info", (), {"n_layers": 2, "n_heads": 4})()
    found = scores or {
        (t, by, s): HeadScores(np.arange(8).reshape(2, 4) * (1 if t == "a" else -1) + s * 0.0)
        for t in "ab" for by in ("A-norm", "probe accuracy") for s in (0, 1)
    }  # fmt: skip
    return plan_fits(plan, ("a", "b"), ("c",), info, {"a": 2, "b": 3}, found)


def tops(task, k):
    order = range(7, -1, -1) if task == "a" else range(8)
    return tuple(divmod(i, 4) for i in list(order)[:k])


def test_the_bare_plan_has_own_heads_random_heads_and_zero_shot(unchecked):
    """Own heads once a seed, random heads once a draw (which is the seed too), the unmodified model once."""
    fits = plan_of(Plan(parts=(), draws=3))
    for task, k in (("a", 2), ("b", 3)):
        assert [f for f in fits if f.task == task and f.heads_from == "A-norm"] == [
            Fit(task, "LoFiT", s, "A-norm", task, k, heads=tops(task, k)) for s in (0, 1)
        ]
        drawn = [f for f in fits if f.task == task and f.heads_from == "random"]
        assert [(f.seed, f.draw, f.k) for f in drawn] == [(0, 0, k), (1, 1, k), (2, 2, k)]
        assert [f.heads for f in drawn] == [tuple(HeadSet.random((2, 4), k, seed=d)) for d in range(3)]
        assert [f for f in fits if f.task == task and f.method == "zero-shot"] == [Fit(task, "zero-shot", 0)]
    assert len(fits) == len(set(fits)) == 2 * (2 + 3 + 1)
    assert not any(f.also for f in fits), "other tasks are a part of their own"


def test_each_part_adds_its_fits(unchecked):
    """Transfer: the other task's heads, as many as this task's K. K: from one to 20 %. Data: heads chosen anew from few rows."""
    bare = set(plan_of(Plan(parts=())))

    def added(*parts, **options):
        return set(plan_of(Plan(parts=parts, **options))) - bare

    assert added("transfer") == {Fit("a", "LoFiT", s, "A-norm", "b", 2, heads=tops("b", 2)) for s in (0, 1)} | {
        Fit("b", "LoFiT", s, "A-norm", "a", 3, heads=tops("a", 3)) for s in (0, 1)
    }
    assert {(f.task, f.k) for f in added("k")} == {("a", 1), ("a", 6), ("b", 1), ("b", 2), ("b", 8)}
    assert {(f.task, f.k) for f in added("k", ks=(4,))} == {("a", 4), ("b", 4)}
    chosen = added("selectors", selectors=("probe accuracy", "random"))
    assert {(f.task, f.heads_from, f.k) for f in chosen} == {("a", "probe accuracy", 2), ("b", "probe accuracy", 3)}
    few = added("data", sizes=(5,), trained=("RED",))
    assert {(f.task, f.method, f.n_train, f.heads) for f in few} == {
        (t, m, 5, None) for t in "ab" for m in ("LoFiT", "RED")
    }
    methods = added("methods")
    assert {f.method for f in methods} == {"LoRA", "RED", "LoReFT", "ITI", "RepE", "LoFiT"}
    assert {(f.task, f.k) for f in methods if f.method == "LoFiT"} == {("a", 6), ("b", 8)}, "10 %, at most all"
    also = [f for f in plan_of(Plan(parts=("other tasks",))) if f.also]
    assert {(f.task, f.method, f.also) for f in also} == {
        ("a", "LoFiT", ("c",)), ("b", "LoFiT", ("c",)), ("a", "zero-shot", ("c",))
    }  # fmt: skip


def test_usual_numbers_of_heads():
    """Llama-2-7B: 1, 3 % (32), three times as many, 20 %; never more than there are."""
    assert usual_ks(32, 1024) == (1, 32, 96, 205)
    assert usual_ks(3, 4) == (1, 3, 4)


def test_wrong_plans_are_refused():
    """Names and numbers outside what is allowed, named."""
    for options, message in (
        ({"parts": ("heads",)}, "unknown part 'heads'"),
        ({"selectors": ("norm",)}, "unknown selector 'norm'"),
        ({"trained": ("ITI",)}, "unknown method 'ITI'"),
        ({"seeds": ()}, "0 seeds"),
        ({"draws": 0}, "0 draws"),
        ({"sizes": (0,)}, "start at 1"),
        ({"ks": (0, 3)}, "start at 1"),
    ):
        with pytest.raises(InputError, match=message):
            Plan(**options)
    with pytest.raises(InputError, match="each once"):
        run_study("organism", [], out="nowhere")
    with pytest.raises(InputError, match="each once"):
        run_study("organism", [TASKS[0], TASKS[0]], out="nowhere")


def test_what_cannot_be_done_is_said_before_the_first_fit(model, tmp_path, monkeypatch):
    """No validation rows for ITI's strength, more examples than there are, a task that is an other task as well."""
    monkeypatch.setattr(study, "_score", lambda *job: pytest.fail("work was begun"))
    blind = replace(TASKS[0], test={k: v for k, v in TASKS[0].test.items() if k != "val"})
    for tasks, options, message in (
        ([blind], {"plan": PLAN}, "kin has no validation rows"),
        (TASKS, {"plan": replace(PLAN, sizes=(4, 9))}, "9 training examples asked for; kin has 8"),
        (TASKS, {"plan": PLAN, "other_tasks": [TASKS[1]]}, "place is a task and an other task"),
    ):
        with pytest.raises(InputError, match=message):
            run_study(model, tasks, out=tmp_path / "s", progress=False, **options)
    assert not (tmp_path / "s").exists()


def test_a_fit_that_diverges_is_left_out_and_the_others_are_made(model, tmp_path, monkeypatch, caplog):
    """The log says which; the study is there without it."""
    inner = study.tune_offsets

    def diverge(model, task, heads, *, seed, **options):
        if task.name == "place" and seed == 1:
            raise TrainingDiverged("loss is nan")
        return inner(model, task, heads, seed=seed, **options)

    monkeypatch.setattr(study, "tune_offsets", diverge)
    studies.run(model, tmp_path / "s", plan=replace(PLAN, parts=(), extra_seeds=(), draws=1), other_tasks=[], texts=[])
    found = load_results(tmp_path / "s")
    assert list(found.lofit(KIN)["seed"]) == [0, 1]
    assert list(found.lofit(PLACE)["seed"]) == [0]
    assert any("LoFiT on place (seed 1) is left out: loss is nan" in m for m in caplog.messages)


def test_earlier_seeds_and_draws_do_not_mix_in(study_folder, model, tmp_path):
    """A later call with fewer of both reads only those."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    studies.run(model, copy, plan=replace(PLAN, seeds=(0,), draws=1))
    found = load_results(copy)
    assert list(found.lofit(KIN)["seed"]) == [0]
    assert list(found.by_chance(KIN)["draw"]) == [0]


def test_fits_on_selected_heads_count_the_selection(results):
    """Seconds of step 1 are in LoFiT's, as probing is in ITI's."""
    scores = results.scores[KIN, "A-norm", 0]
    row = results.lofit(KIN, seed=0).iloc[0]
    assert row["fit_seconds"] > scores.meta["seconds"] > 0


def test_workers_need_a_name(model):
    """A model in memory cannot be sent to other processes."""
    with pytest.raises(InputError, match="by name"):
        run_study(model, TASKS, out="nowhere", workers=2)


def test_all_that_was_planned_is_there(results, model):
    """One row a fit and tested task, with the task's metric; scores of every seed."""
    info = model_info(model)
    fits = plan_fits(PLAN, (KIN, PLACE), (OTHER.name,), info, {t: results.k(t) for t in results.tasks}, results.scores)
    assert len(results.runs) == sum(1 + len(f.also) for f in fits)
    assert set(results.runs["metric"]) == {"em"}
    assert set(results.runs["n_items"]) == {5}, "the plan's limit"
    assert {s for t, by, s in results.scores if (t, by) == (KIN, "A-norm")} == {0, 1, 2}
    assert {s for t, by, s in results.scores if (t, by) == (PLACE, "probe accuracy")} == {0, 1}
    assert results.tasks == (KIN, PLACE)
    assert results.model.name == info.name


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
    assert results.damage(KIN).shape == (2, 2)
    assert results.damage(KIN).min() > 0


def test_what_is_there_is_not_run_again(folder, model, monkeypatch, tmp_path):
    """A second call runs nothing; where a run and a score file are gone, exactly these are made again, to the same numbers."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    ran = []
    for name in ("_fit", "_score"):
        inner = getattr(study, name)
        monkeypatch.setattr(study, name, lambda setting, job, inner=inner: (ran.append(job), inner(setting, job)))
    studies.run(model, copy)
    assert ran == []
    before = load_results(copy)
    row = before.lofit(KIN, seed=1).index[0]
    kept = before.evaluations[row].items["em"].tolist()
    shutil.rmtree(before.folders[row])
    (copy / "scores" / "place--A-norm--seed2.json").unlink()
    studies.run(model, copy)
    assert [j if isinstance(j, tuple) else (j.task, j.method, j.seed) for j in ran] == [
        (PLACE, "A-norm", 2), (KIN, "LoFiT", 1)
    ]  # fmt: skip
    after = load_results(copy)
    assert len(after.runs) == len(before.runs)
    assert after.evaluations[after.lofit(KIN, seed=1).index[0]].items["em"].tolist() == kept
    assert after.scores[PLACE, "A-norm", 2].values.equal(before.scores[PLACE, "A-norm", 2].values)


def test_another_study_in_the_folder_is_refused(folder, model):
    """Its tasks differ; nothing is written."""
    text = (folder / "study.json").read_text()
    with pytest.raises(InputError, match="study of other tasks"):
        run_study(model, TASKS[:1], out=folder, plan=replace(PLAN, parts=()), progress=False)
    with pytest.raises(InputError, match=r"study of another limit \(5, not 4\)"):
        studies.run(model, folder, plan=replace(PLAN, limit=4))
    assert (folder / "study.json").read_text() == text


def test_a_further_part_keeps_what_was_asked_before(study_folder, model, tmp_path):
    """Another call without the other tasks leaves them in the record, so that their table is still drawn."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    studies.run(model, copy, plan=replace(PLAN, parts=("transfer",)), other_tasks=[])
    assert list(load_results(copy).record["other_tasks"]) == [OTHER.name]


def test_a_folder_without_a_study_says_what_to_do(tmp_path):
    """No study.json, or one without a run."""
    with pytest.raises(DataError, match="holds no study"):
        load_results(tmp_path)


def test_asking_for_what_is_not_there(results):
    """Runs, scores, columns and tasks that the study lacks are named."""
    with pytest.raises(InputError, match="no such run"):
        results.values(results.lofit(KIN, k=77))
    with pytest.raises(InputError, match="no head scores of kin by bias norm with seed 0"):
        results.heads(KIN, "bias norm")
    with pytest.raises(InputError, match="unknown column 'colour'"):
        results.rows(colour="red")
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
    assert "chosen on the validation split, 4 points a method" in notes
    assert "given or taken over: random heads: lr" in notes


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
    assert last.columns[-1] == "text: KL, nats a token"
    kl = last.frame[last.frame["metric"] == "kl"].set_index("tuned_on").loc[KIN, "mean"]
    assert kl == pytest.approx(results.damage(KIN).mean())
    few = [t.name for t in paper_tables(replace_methods(results, ("LoFiT", "zero-shot")))]
    assert few == ["table2", "table5"], "no table of methods that were not run"
    text = tables["table1"].to_latex()
    assert text.count("\\\\") == 1 + len(tables["table1"].cells)
    assert "| method | parameters |" in tables["table1"].to_markdown()


def replace_methods(results, kept):
    """The same results without the runs of other methods."""
    rows = [i for i, m in enumerate(results.runs["method"]) if m in kept]
    return replace(
        results, runs=results.runs.iloc[rows].reset_index(drop=True), folders=tuple(results.folders[i] for i in rows),
        evaluations=tuple(results.evaluations[i] for i in rows),
    )  # fmt: skip
