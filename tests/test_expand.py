"""A grid as cells: each piece of work once, with what it builds on, named by all that can change its result."""

from dataclasses import replace
from functools import partial

import pytest

from lofit_lens.errors import InputError
from lofit_lens.experiments.grid import expand as expansion
from lofit_lens.experiments.grid import keys
from lofit_lens.experiments.grid.expand import Setting, expand
from lofit_lens.experiments.grid.keys import model_key, task_key
from lofit_lens.experiments.grid.specs import Grid, Run, Selection
from lofit_lens.models import ModelInfo
from tests.studies import OTHER, TASKS

INFO = ModelInfo("org/model", "abc", "bridge", False, "float32", 10, 10, 64, 100)  # K = 3
KIN, PLACE = TASKS


def cells_of(*runs, info=INFO, tasks=TASKS, texts="", others=(), **fields):
    grid = Grid(**{"name": "g", "model": "x", "tasks": [t.name for t in tasks], "runs": runs, **fields})
    return expand(Setting(grid, info, {t.name: t for t in tasks}, {t.name: t for t in others}, texts))


def rows(cells, kind, *columns):
    return [tuple(c.row.get(x) for x in columns) for c in cells if c.row["kind"] == kind]


def only(cells, kind):
    found = [c for c in cells if c.row["kind"] == kind]
    assert len(found) == 1
    return found[0]


def test_own_heads_share_one_selection():
    """Two numbers of heads, two seeds, two tasks: eight fits on four selections, each after the one it needs."""
    cells = cells_of(Run(k=(1, "3K")))
    assert rows(cells, "scores", "task", "heads_from", "seed") == [
        (t, "A-norm", s) for t in ("kin", "place") for s in (0, 1)
    ]  # fmt: skip
    assert rows(cells, "fit", "task", "source", "k", "seed") == [
        (t, t, k, s) for t in ("kin", "place") for k in (1, 9) for s in (0, 1)
    ]  # fmt: skip
    seen = set()
    for cell in cells:
        assert set(cell.needs) <= seen, "needs come first"
        seen.add(cell.name)
        if cell.row["kind"] == "fit":
            (scores,) = cell.needs
            source = next(c for c in cells if c.name == scores)
            assert (source.row["task"], source.row["seed"]) == (cell.row["task"], cell.row["seed"])
            assert cell.spec["heads"] == {"cell": scores, "k": cell.row["k"]}
    assert len({c.name for c in cells}) == len(cells) == 12


def test_whose_heads():
    """Others' heads with this task's K; `every` is own and others; a task outside the grid is refused."""
    cells = cells_of(Run(of="others"), seeds=0)
    assert rows(cells, "fit", "task", "source", "k") == [("kin", "place", 3), ("place", "kin", 3)]
    assert {
        (r["task"], r["source"]) for r in (c.row for c in cells_of(Run(of="every"), seeds=0)) if r["kind"] == "fit"
    } == {(t, s) for t in ("kin", "place") for s in ("kin", "place")}
    assert rows(cells_of(Run(of="kin"), seeds=0), "fit", "task", "source") == [("kin", "kin"), ("place", "kin")]
    with pytest.raises(
        InputError, match=r"unknown task 'kim'; allowed: own, others, every, kin, place. Did you mean 'kin'"
    ):
        cells_of(Run(of="kim"))


def test_random_and_all_heads():
    """A draw of random heads is the seed too; all heads are K of all."""
    cells = cells_of(Run(heads=("random", "all"), k=(2, 3), draws=2), tasks=[KIN])
    assert rows(cells, "fit", "heads_from", "k", "seed", "draw") == [
        ("random", 2, 0, 0), ("random", 2, 1, 1), ("random", 3, 0, 0), ("random", 3, 1, 1), ("all", 100, 0, 0), ("all", 100, 1, 0)
    ]  # fmt: skip
    assert cells[1].spec["heads"] == {"random": 1, "k": 2}
    assert not any(c.needs for c in cells)


def test_settings_given_preset_and_chosen():
    """What is chosen comes from trials on the validation rows; ITI has no preset; LoFiT's other heads take over."""
    given = only(cells_of(Run(settings={"lr": 0.5, "epochs": 2}), tasks=[KIN], seeds=0), "fit")
    assert (given.spec["config"]["lr"], given.spec["config"]["epochs"]) == (0.5, 2)
    preset = only(cells_of(Run(), tasks=[KIN], seeds=0), "fit")
    assert preset.spec["settings"] == {"lr": preset.spec["config"]["lr"]} == {"lr": 0.01}
    cells = cells_of(Run(method="ITI"), tasks=[KIN], seeds=(0, 1))
    assert rows(cells, "trial", "set_alpha", "seed") == [(5.0, 0), (15.0, 0), (45.0, 0), (135.0, 0)]
    for fit in cells[-2:]:
        assert fit.spec["chosen"] == [[c.name] for c in cells[:4]]
        assert list(fit.needs) == [c.name for c in cells[:4]]
    more = cells_of(Run(method="ITI", k=(1, "K", 10)), tasks=[KIN], seeds=0)
    assert rows(more, "fit", "method", "k") == [("ITI", 1), ("ITI", 3), ("ITI", 10)]
    assert [c.spec["k"] for c in more] == [1] * 5 + [3] * 5 + [10] * 5, "four trials, then the fit"
    cells = cells_of(
        Run(settings="chosen", heads=("A-norm", "random"), k=1, draws=1), tasks=[KIN], seeds=0, tuning_seeds=(0, 7)
    )
    trials = [c for c in cells if c.row["kind"] == "trial"]
    assert rows(cells, "trial", "seed") == [(0,), (7,)] * 4
    assert all(c.spec["split"] == "val" and c.spec["heads"]["k"] == 3 for c in trials)
    fits = [c for c in cells if c.row["kind"] == "fit"]
    assert [c.spec["chosen"] for c in fits] == [
        [[a.name, b.name] for a, b in zip(trials[::2], trials[1::2], strict=True)]
    ] * 2
    blind = replace(KIN, test={k: v for k, v in KIN.test.items() if k != "val"})
    with pytest.raises(InputError, match="kin has no validation rows, on which the settings of ITI are chosen"):
        cells_of(Run(method="ITI"), tasks=[blind])
    with pytest.raises(InputError, match="epochs is -1"):
        cells_of(Run(settings={"epochs": -1}))


def test_few_examples_reach_the_selection_too():
    """n examples for step 1 and step 2; more than there are is known before anything runs."""
    cells = cells_of(Run(n_train=(4, None)), tasks=[KIN], seeds=0)
    assert rows(cells, "scores", "n_train") == [(4,), (None,)]
    assert rows(cells, "fit", "n_train") == [(4,), (None,)]
    with pytest.raises(InputError, match="9 training examples asked for; kin has 8"):
        cells_of(Run(n_train=9))
    drawn = replace(KIN, n_train=4)
    usual, four = (cells_of(Run(n_train=n), tasks=[drawn], seeds=0) for n in (None, 4))
    assert [c.name for c in usual] == [c.name for c in four], "the task's own number is a number"
    assert rows(four, "fit", "n_train") == [(None,)]
    fixed = cells_of(
        Run(heads="few", n_train=8), tasks=[KIN], seeds=0, selections={"few": Selection(by="A-norm", n_train=2)}
    )
    assert [c.spec["n_train"] for c in fixed if c.row["kind"] == "scores"] == [2]
    assert rows(fixed, "scores", "n_train") == [(None,)], "it is the selection's own"


def test_selections_build_on_others():
    """A selection among another's best heads needs that one; extra seeds are scored though nothing asks for them."""
    cells = cells_of(
        Run(heads="narrow", k=2), tasks=[KIN], seeds=0,
        selections={"wide": Selection(by="A-norm", seeds=(5,)), "narrow": Selection(by="bias norm", among="wide", among_k=7)},
    )  # fmt: skip
    assert rows(cells, "scores", "heads_from", "seed") == [("wide", 5), ("wide", 0), ("narrow", 0)]
    assert cells[2].spec["among"] == {"cell": cells[1].name, "k": 7}
    assert cells[2].needs == (cells[1].name,)
    assert cells[3].needs == (cells[2].name,)
    with pytest.raises(
        InputError, match="9 heads are requested from the selection narrow, which scores 7; raise its among_k"
    ):
        cells_of(
            Run(heads="narrow", k=9),
            selections={"narrow": Selection(by="A-norm", among="A-norm", among_k=7)},
            tasks=[KIN],
        )


def test_tests_and_damage_need_the_fit():
    """Adapters are asked other tasks; the unmodified model once for all; damage where there are texts."""
    cells = cells_of(
        Run(method="zero-shot", tested=True), Run(tested=True, damage=True), seeds=0, others=[OTHER], texts="d" * 64
    )
    assert rows(cells, "test", "task", "method", "tested") == [
        ("kin", "zero-shot", "other"), ("kin", "LoFiT", "other"), ("place", "LoFiT", "other")
    ]  # fmt: skip
    by_name = {c.name: c for c in cells}
    for cell in cells:
        if cell.row["kind"] in ("test", "damage"):
            assert by_name[cell.needs[0]].row["kind"] == "fit"
            assert cell.spec["fit"] == cell.needs[0]
    assert len(rows(cells, "damage", "task")) == 2
    assert not rows(cells_of(Run(damage=True), seeds=0), "damage", "task")
    assert rows(cells_of(Run(method="zero-shot"), seeds=(3, 4)), "fit", "seed") == [(0,), (0,)], "no seed matters"


def test_names_follow_all_that_can_change_a_result(monkeypatch):
    """Any of it gives another name; names of the grid, of a selection and of a folder do not."""
    run = {"runs": [Run()], "tasks": [KIN], "seeds": 0}

    def names(**changes):
        options = {**run, **changes}
        return [c.name for c in cells_of(*options.pop("runs"), **options)]

    base = names()
    assert base == names(name="another")
    assert base == names(seeds=(0, 1))[:2]
    local = replace(INFO, name="/here/m", revision="sha256:1")
    assert names(info=local) == names(info=replace(local, name="/there/m"))
    same = {"selections": {"mine": Selection(by="A-norm")}, "runs": [Run(heads="mine")]}
    assert base == names(**same)
    first = replace(KIN.test["test"][0], prompt="another")
    asked = replace(KIN, test={**KIN.test, "test": (first, *KIN.test["test"][1:])})
    for changes in (
        {"info": replace(INFO, revision="abd")}, {"info": replace(INFO, revision=None)}, {"info": replace(INFO, dtype="fp16")},
        {"info": replace(INFO, backend="hooked")}, {"info": replace(INFO, name="org/other")}, {"seeds": 1},
        {"info": replace(INFO, processed=True)}, {"tasks": [asked]},
        {"tasks": [replace(KIN, form="options")]}, {"tasks": [replace(KIN, max_new_tokens=2)]},
        {"runs": [Run(n_train=4)]}, {"selections": {"A-norm": Selection(by="A-norm", settings={"l1": 1.0})}},
    ):  # fmt: skip
        other = names(**changes)
        assert not set(other) & set(base), changes
    for changes in (  # the selection is the same, the fit is not
        {"runs": [Run(k=2)]}, {"runs": [Run(settings={"lr": 1.0})]}, {"limit": 3}, {"batch_size": 4},
    ):  # fmt: skip
        other = names(**changes)
        assert other[0] == base[0]
        assert other[1] != base[1], changes
    versions = keys.versions_key()
    assert set(versions) == {"lofit-lens", "torch", "transformers", "transformer-lens"}
    monkeypatch.setattr(expansion, "versions_key", lambda: {**versions, "torch": "99"})
    assert not set(names()) & set(base)


def test_versions_are_cut_to_what_may_change_a_result(monkeypatch):
    """1.2.3 counts as 1; 0.1.2 as 0.1, since a 0.x may change anything with the minor; a release keeps stored runs."""
    found = {
        "python": "3.11",
        "lofit-lens": "7.8.9",
        "torch": "2.13.0+cpu",
        "transformers": "5.9",
        "transformer-lens": "4.3.0",
    }
    monkeypatch.setattr(keys.io, "environment", lambda: found)
    monkeypatch.setattr(keys, "RESULTS_SINCE", "0.1.2")
    assert keys.versions_key() == {"lofit-lens": "0.1", "torch": "2", "transformers": "5", "transformer-lens": "4"}


def test_keys_hold_no_path():
    """A folder with known weights is its weights; a task is its data and how it is graded."""
    local = replace(INFO, name="/home/me/model", revision="sha256:12")
    assert "/home" not in str(model_key(local))
    assert model_key(local)["weights"] == "sha256:12"
    assert model_key(INFO)["weights"] == "org/model@abc"
    assert model_key(INFO, "a") != model_key(INFO, "b")


def yes(text, example):
    """A grader."""
    return {"em": 1.0}


def graded_by(mark):
    """A grader that takes a value from around it."""

    def grade(text, example):
        return {"em": mark}

    return grade


def test_a_grader_is_its_source():
    """A function by its name, its source and what that refers to; what cannot be written down is refused."""
    yes_key = task_key(replace(KIN, grade=yes))
    assert yes_key != task_key(KIN)
    assert yes_key == task_key(replace(KIN, grade=yes))

    def plain(text, example):
        return {"em": 0.5}

    def defaults(text, example, mark=0.5):
        return {"em": mark}

    def calls(text, example):
        return yes(text, example)

    keys = [
        task_key(replace(KIN, grade=g))["grade"] for g in (yes, plain, defaults, calls, graded_by(0.5), graded_by(1.0))
    ]
    assert len(set(keys)) == len(keys)
    assert task_key(replace(KIN, grade=graded_by(1.0)))["grade"] == keys[-1]
    for grade, message in (
        (partial(defaults, mark=1.0), "the grader of kin is .*give a function"),
        (Grader(), "the grader of kin is .*give a function"),
        (graded_by(object()), "the grader of kin takes 'mark' from around it, a object"),
    ):
        with pytest.raises(InputError, match=message):
            task_key(replace(KIN, grade=grade))


class Grader:
    """A grader with a state."""

    def __call__(self, text, example):
        return {"em": 1.0}


def test_matched_heads_build_on_the_own_of_each_seed():
    """Every draw with every seed, on the profile of that seed's own heads; `random` keeps a seed for each draw."""
    cells = cells_of(Run(heads=("matched", "random"), k=2, draws=2), tasks=[KIN], seeds=(0, 1))
    scores = [c.name for c in cells if c.row["kind"] == "scores"]
    assert rows(cells, "scores", "heads_from", "seed") == [("A-norm", 0), ("A-norm", 1)]
    assert rows(cells, "fit", "heads_from", "draw", "seed") == [
        ("matched", 0, 0), ("matched", 0, 1), ("matched", 1, 0), ("matched", 1, 1), ("random", 0, 0), ("random", 1, 1)
    ]  # fmt: skip
    fits = [c for c in cells if c.row["heads_from"] == "matched"]
    assert [c.spec["heads"] for c in fits] == [
        {"matched": d, "cell": cell, "k": 2} for d in (0, 1) for cell in scores
    ]  # fmt: skip
    assert all(list(c.needs) == [c.spec["heads"]["cell"]] for c in fits)


def test_trials_on_the_very_heads():
    """Every head set has as many trials as the method has points, on the heads that its fit edits; the own keep their names."""
    asked = {"settings": "chosen", "trials_on": "heads"}
    cells = cells_of(
        Run(**asked), Run(heads="matched", draws=2, **asked), Run(heads="random", draws=1, **asked), tasks=[KIN], seeds=(0, 1)
    )  # fmt: skip
    by_name = {c.name: c for c in cells}
    fits = [c for c in cells if c.row["kind"] == "fit"]
    assert len(fits) == 2 + 4 + 1
    for fit in fits:
        trials = [by_name[name] for (name,) in fit.spec["chosen"]]
        assert [t.spec["heads"] for t in trials] == [fit.spec["heads"]] * 4
        assert [t.spec["split"] for t in trials] == ["val"] * 4
        assert {t.spec["seed"] for t in trials} == {0}, "the tuning seed"
        assert set(fit.needs) == {t.name for t in trials} | ({fit.spec["heads"].get("cell")} - {None})
    assert len({name for fit in fits for (name,) in fit.spec["chosen"]}) == 4 * 7
    usual = cells_of(Run(settings="chosen"), tasks=[KIN], seeds=0)
    assert {c.name for c in usual} < set(by_name), "on the own heads of the tuning seed they are the usual trials"
    with pytest.raises(InputError, match="trials_on is 'heads' and there are no trials; give settings: chosen"):
        Run(trials_on="heads")
    with pytest.raises(InputError, match="trials_on is 'all': input should be 'own' or 'heads'"):
        Run(settings="chosen", trials_on="all")
    with pytest.raises(InputError, match="'trials_on' is not for RED"):
        Run(method="RED", **asked)
