"""Cells that are computed together: who with whom, what failures and kills leave, and the same bytes whatever happened."""

import logging
import shutil
import signal
from collections import Counter

import pytest
import torch

from lofit_lens import io
from lofit_lens.errors import TrainingDiverged
from lofit_lens.experiments.executors import runner
from lofit_lens.experiments.executors.attempt import attempt
from lofit_lens.experiments.executors.runner import run_cells
from lofit_lens.experiments.executors.schedule import Group, Schedule, grouped
from lofit_lens.experiments.grid import compute as computing
from lofit_lens.experiments.grid.run import plan_grid, run_grid
from lofit_lens.experiments.grid.specs import Grid, Run
from lofit_lens.experiments.store.checks import collect_garbage
from lofit_lens.experiments.store.store import Store
from lofit_lens.heads import HeadScores
from lofit_lens.interventions import Lofit
from lofit_lens.tasks import Task
from tests.fake_work import cell, computed, work
from tests.studies import NAMES, TASKS
from tests.test_runner import alone, start

KIN = TASKS[0]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Cells of other runners are looked at again without a pause; Ctrl-C is Ctrl-C, however the tests were started."""
    monkeypatch.setattr(runner, "LOOK_AGAIN", 0.0)
    monkeypatch.setattr(runner, "TICK", 0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def sharing(folder, n, **more):
    """Cells c0, c1, ... that share a pass; what is given of one goes by its label."""
    return [cell(f"c{i}", folder, shares="m", **more.get(f"c{i}", {})) for i in range(n)]


def by_name(*cells):
    return {c.name: c for c in cells}


def labels(*groups):
    return [" ".join(c.label for c in group.cells) for group in groups]


def contents(root):
    """Every file of every run but its timing."""
    runs = root / "runs"
    return {
        str(p.relative_to(runs)): p.read_bytes() for p in runs.rglob("*") if p.is_file() and p.name != "timing.json"
    }


def states(outcomes):
    return " ".join(outcome.state for outcome in outcomes)


# ------------------------------------------------------------------------------------------------- who with whom


@pytest.mark.parametrize(
    ("n", "together", "sizes"),
    [(1, 8, [1]), (5, 8, [5]), (6, 8, [3, 3]), (8, 8, [4, 4]), (9, 8, [4, 5]), (15, 8, [7, 8]), (16, 8, [8, 8]),
     (18, 8, [4, 5, 4, 5]), (24, 8, [6] * 4), (5, 1, [1] * 5), (5, 2, [1, 2, 2]), (4, 3, [2, 2])],
)  # fmt: skip
def test_a_step_is_split_evenly(tmp_path, n, together, sizes):
    """At most `together` in each; an even number of groups where they have three or more; in order."""
    cells = sharing(tmp_path, n)
    groups = grouped(by_name(*cells), together)
    assert [len(g.cells) for g in groups] == sizes
    assert [c for g in groups for c in g.cells] == cells


def test_cells_share_that_can(tmp_path):
    """Of one kind and model, on one step of the graph; others stay alone, in the grid's order."""
    a, b = (cell(n, tmp_path, shares="m") for n in "ab")
    x, y = (cell(n, tmp_path, shares="m", model="X") for n in "xy")
    other, plain = cell("other", tmp_path, shares="other"), cell("plain", tmp_path)
    c, d = (cell(n, tmp_path, shares="m", needs=[need.name]) for n, need in (("c", a), ("d", plain)))
    far = cell("far", tmp_path, shares="m", needs=[c.name, "in-the-store"])
    groups = grouped(by_name(a, x, plain, c, other, b, y, far, d))
    assert labels(*groups) == ["a b", "x y", "plain", "c d", "other", "far"]
    assert groups[3].needs == {a.name, plain.name}
    assert (groups[0].cost, groups[1].model) == (2.0, "X")


def test_a_group_is_named_by_its_members(tmp_path):
    """Alone as its cell; of several by the last one and all names, so that other members are another name."""
    a, b, c = sharing(tmp_path, 3)
    assert (alone(a).name, alone(a).label) == (a.name, "c0")
    assert Group((a, b)).name.startswith(f"{b.name}+")
    assert Group((a, b, c)).label == "c0 and 2 more"
    assert len({Group(g).name for g in ((a, b), (c, b), (a, b, c))}) == 3


def test_what_lofit_trains_is_grouped(bridge_llama):
    """Scores by A, scores by v, and offsets on any heads; probes, other methods and further tests stay alone; tasks mix."""
    pairs = Task.from_records("pairs", train=[{"prompt": n, "chosen": " a", "rejected": " b"} for n in NAMES], test=[])
    grid = Grid(name="g", model="in memory", tasks=("kin", "pairs"), seeds=(0, 1), texts="t", runs=(
        Run(k=(1, 2), damage=True), Run(heads="bias norm"), Run(heads="probe accuracy"), Run(heads="all"),
        Run(heads="random", draws=2), Run(method=("RED", "zero-shot")),
    ))  # fmt: skip
    planned = plan_grid(grid, model=bridge_llama, tasks=[KIN, pairs], texts=["x"])
    groups = grouped(by_name(*planned.cells))
    kinds = Counter((c.row["kind"], c.row.get("heads_from")) for g in groups if len(g.cells) > 1 for c in g.cells)
    assert kinds == {
        ("scores", "A-norm"): 4, ("scores", "bias norm"): 4, ("fit", "A-norm"): 8, ("fit", "bias norm"): 4,
        ("fit", "probe accuracy"): 4, ("fit", "all"): 4, ("fit", "random"): 4,
    }  # fmt: skip
    for group in groups:
        assert len({(c.row["kind"], c.spec.get("by")) for c in group.cells}) == 1
        assert len({c.spec["task"]["objective"] for c in group.cells if "task" in c.spec}) <= 2
    assert any(len({c.row["task"] for c in g.cells}) == 2 for g in groups)
    again = plan_grid(grid, model=bridge_llama, tasks=[KIN, pairs], texts=["x"])
    assert grouped(by_name(*again.cells)) == groups


# ----------------------------------------------------------------------------------------------------- the order


def taken(plan):
    found = []
    while (one := plan.take(0.0, [])) is not None:
        found.append(one)
    return labels(*found)


def ended(plan, *cells, failed=False):
    """A group came back: done, or failed for good."""
    for one in () if failed else cells:
        plan.done(one.name)
    plan.finish(Group(cells), {one.name: "error" for one in cells if failed}, may_pass=False)


def test_a_group_waits_for_what_any_member_needs(tmp_path):
    """Members that are there too are handed out; a group that is there as a whole is not."""
    a, b = cell("a", tmp_path), cell("b", tmp_path)
    c, d = (cell(n, tmp_path, shares="m", needs=[need.name]) for n, need in (("c", a), ("d", b)))
    groups = grouped(by_name(a, b, c, d))
    plan = Schedule(groups, [b.name, d.name])
    assert taken(plan) == ["a"]
    ended(plan, a)
    assert taken(plan) == ["c d"]
    ended(plan, c, d)
    assert plan.idle
    assert taken(Schedule(groups, [c.name, d.name])) == ["a", "b"]


def test_who_needs_what_always_fails_leaves_its_group(tmp_path):
    """Directly or not; after a failure that may pass, the whole group is blocked, since its numbers would be others."""
    a, b = cell("a", tmp_path), cell("b", tmp_path)
    c, d, e = (cell(n, tmp_path, shares="m", needs=[need.name]) for n, need in (("c", a), ("d", b), ("e", b)))
    f, g = (cell(n, tmp_path, shares="m", needs=[need.name]) for n, need in (("f", c), ("g", d)))
    groups = grouped(by_name(a, b, c, d, e, f, g))
    assert labels(*groups) == ["a", "b", "c d e", "f g"]
    plan = Schedule(groups, [])
    assert taken(plan) == ["a", "b"]
    ended(plan, b)
    ended(plan, a, failed=True)
    assert plan.blocked == {c.name: a.name, d.name: a.name, e.name: a.name, f.name: a.name, g.name: a.name}
    assert plan.idle
    plan.lose(a.name)
    assert plan.blocked == {c.name: a.name, f.name: a.name}
    assert taken(plan) == ["d e"]
    ended(plan, d, e)
    assert taken(plan) == ["g"]
    plan = Schedule(groups, [b.name, d.name])
    assert taken(plan) == ["a"]
    ended(plan, a, failed=True)
    plan.lose(a.name)
    assert taken(plan) == ["d e", "g"], "a member that is there is trained along in what is left of its group"


# ----------------------------------------------------------------------------------------------------- one try


@pytest.mark.filterwarnings("ignore:a warning")
def test_a_try_at_a_group(tmp_path, store):
    """All are written, with one log; the checkpoint goes; then all are there."""
    group = Group(tuple(sharing(tmp_path, 2, c1={"does": "talk"})))
    io.write_text(store.state_file(group.name), "checkpoint")
    outcomes = attempt(store, group, work, 1, None)
    assert (states(outcomes), [o.name for o in outcomes]) == ("done done", [c.name for c in group.cells])
    assert not store.state_file(group.name).exists()
    said = store.log_file(group.name).read_text()
    assert "start: c0, c1" in said
    assert "a print\n" in said
    assert states(attempt(store, group, work, 1, None)) == "there there"
    assert computed(tmp_path) == ["c0", "c1"]


def test_a_group_of_which_another_holds_a_cell_is_busy(tmp_path, store):
    """Whatever the cell; nothing is computed and no lock is kept, so that groups that overlap do not block each other."""
    group = Group(tuple(sharing(tmp_path, 3)))
    for held in group.cells:
        with store.claim(held.name):
            assert states(attempt(store, group, work, 1, None)) == "busy busy busy"
            assert [store.held(c.name) for c in group.cells] == [c == held for c in group.cells]
    assert computed(tmp_path) == []
    asked = []

    class Watched(Store):
        def claim(self, name):
            asked.append(name)
            return super().claim(name)

    attempt(Watched(store.root), Group(group.cells[::-1]), work, 1, None)
    assert asked == sorted(asked)


@pytest.mark.parametrize(
    ("does", "error", "again"),
    [("diverge", "TrainingDiverged: loss is nan", False), ("fail", "RuntimeError: try 1 failed", True)],
)
def test_a_failure_of_one_member_is_its_own(tmp_path, store, does, error, again):
    """Those after it are written; its traceback is in the log; the checkpoint stays."""
    group = Group(tuple(sharing(tmp_path, 3, c1={"does": does})))
    io.write_text(store.state_file(group.name), "checkpoint")
    outcomes = attempt(store, group, work, 1, None)
    assert states(outcomes) == "done failed done"
    assert (outcomes[1].error, outcomes[1].again) == (error, again)
    said = store.log_file(group.name).read_text()
    assert error in said
    assert "in work" in said, "the traceback"
    assert store.state_file(group.name).exists()


@pytest.mark.parametrize(("shared", "state"), [("fail", "failed failed"), ("stop", "stopped stopped")])
def test_what_ends_the_shared_part_ends_all(tmp_path, store, shared, state):
    """An error, or Ctrl-C; nothing is written and the checkpoint stays."""
    group = Group(tuple(sharing(tmp_path, 2, c1={"shared": shared})))
    io.write_text(store.state_file(group.name), "checkpoint")
    assert states(attempt(store, group, work, 1, None)) == state
    assert computed(tmp_path) == []
    assert store.state_file(group.name).exists()


def test_a_ctrl_c_between_two_members(tmp_path, store):
    """What is written stays; the next try writes the others, with the same bytes as if nothing had happened."""
    group = Group(tuple(sharing(tmp_path, 3, c1={"does": "hang", "times": 0})))

    def stops(store, group, context, device, each):
        def once(cell):
            if cell.label == "c1":
                raise KeyboardInterrupt
            return each(cell)

        work(store, group, context, device, once)

    assert states(attempt(store, group, stops, 1, None)) == "done stopped stopped"
    assert states(attempt(store, group, work, 1, None)) == "there done done"
    whole = Store(tmp_path / "whole")
    attempt(whole, group, work, 1, None)
    assert contents(store.root) == contents(whole.root)


def test_work_that_forgets_a_member_failed(tmp_path, store):
    """The others are done."""
    group = Group(tuple(sharing(tmp_path, 2)))
    outcomes = attempt(store, group, lambda s, g, *rest: work(s, Group(g.cells[:1]), *rest), 1, None)
    assert states(outcomes) == "done failed"
    assert "the work of c1 ended without writing its run" in outcomes[1].error


# ------------------------------------------------------------------------------------------------------- the loop


def test_groups_follow_from_the_grid_alone(tmp_path, store, caplog):
    """Runs say with whom they were computed: the same bytes after any part was done, removed or failed before."""
    scores = cell("scores", tmp_path)
    cells = [scores, *sharing(tmp_path, 6, c1={"does": "fail", "times": 1}, c4={"needs": [scores.name]})]
    report = run_cells(store, cells, work, "c", progress=False)
    assert report.computed == tuple(c.name for c in cells)
    with_whom = {" ".join(store.read(c.name)["with"]) for c in cells[1:] if "with" in store.read(c.name)}
    assert with_whom == {"c0 c1 c2 c3 c5"}
    before = contents(store.root)
    for gone in (cells[1:3], cells[1:], cells[:1], cells[3:]):
        for one in gone:
            shutil.rmtree(store.folder(one.name))
        with caplog.at_level(logging.INFO):
            assert run_cells(store, cells, work, "c", progress=False).computed == tuple(c.name for c in gone)
        assert caplog.messages[-1] == "7 of 7 cells are done"
        assert contents(store.root) == before
    assert run_cells(store, cells, work, "c", progress=False).computed == ()


def test_a_failed_member_is_tried_again_with_all(tmp_path, store, caplog):
    """What is written is not written again; failures are reported by cell, and what needs them leaves its group or is blocked."""
    first = sharing(tmp_path, 3, c0={"does": "fail", "times": 1}, c1={"does": "diverge"})
    behind = [cell(f"d{i}", tmp_path, shares="m", needs=[c.name]) for i, c in enumerate(first)]
    report = run_cells(store, [*first, *behind], work, "c", retries=1, progress=False)
    assert report.computed == tuple(c.name for c in (first[0], first[2], behind[0], behind[2]))
    assert report.failed == {first[1].name: "TrainingDiverged: loss is nan"}
    assert report.blocked == {behind[1].name: first[1].name}
    assert Counter(computed(tmp_path)) == {"c0": 2, "c1": 2, "c2": 1, "d0": 1, "d2": 1}
    assert store.read(behind[2].name)["with"] == ["d0", "d2"]
    assert (
        f"c1 failed: TrainingDiverged: loss is nan (see {store.log_file(Group(tuple(first)).name)})" in caplog.messages
    )
    before = contents(store.root)
    again = run_cells(store, [*first, *behind], work, "c", progress=False)
    assert (again.failed, again.blocked) == (report.failed, report.blocked)
    assert contents(store.root) == before


def test_a_failure_that_may_pass_blocks_the_group(tmp_path, store):
    """Else its numbers would depend on the failure; the next call, where it passes, computes all together."""
    bad, fine = cell("bad", tmp_path, does="fail", times=1), cell("fine", tmp_path)
    behind = [cell(f"d{i}", tmp_path, shares="m", needs=[c.name]) for i, c in enumerate((bad, fine))]
    report = run_cells(store, [bad, fine, *behind], work, "c", retries=0, progress=False)
    assert (report.computed, report.blocked) == ((fine.name,), dict.fromkeys((c.name for c in behind), bad.name))
    assert len(run_cells(store, [bad, fine, *behind], work, "c", progress=False).computed) == 3
    assert store.read(behind[0].name)["with"] == ["d0", "d1"]


# -------------------------------------------------------------------------------------------------------- garbage


def test_garbage_and_the_checkpoints_of_groups(tmp_path, store):
    """That of a group in the making and one to come stay; one whose last member is done goes, and (unused) nobody's."""
    cells = sharing(tmp_path, 3)
    held, waits, over = Group(tuple(cells[:2])), Group(tuple(cells[1:])), Group((cells[1], cells[0]))
    nobodys = Group((cells[0], cell("x", tmp_path)))
    attempt(store, alone(cells[0]), work, 1, None)
    store.write_grid("g", {"cells": [c.name for c in cells]})
    for group in (held, waits, over, nobodys):
        io.write_text(store.state_file(group.name), "checkpoint")
        io.write_text(store.log_file(group.name), "log")
    with store.claim(cells[1].name):
        assert collect_garbage(store, dry_run=False) == [store.state_file(over.name)]
        removed = collect_garbage(store, dry_run=False, unused=True)
    assert removed == [store.state_file(nobodys.name), store.log_file(nobodys.name)]
    assert collect_garbage(store, dry_run=False, unused=True) == []
    store.write_grid("g", {"cells": []})
    assert {store.state_file(held.name), store.state_file(waits.name)} <= set(
        collect_garbage(store, dry_run=False, unused=True)
    )


# -------------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_workers_and_runners_change_nothing(tmp_path):
    """One worker, two, two runners on one store, and a worker that dies in what cells share: the same bytes, each cell once."""
    asked = [{"label": f"c{i}", "shares": "m", "seconds": 0.05} for i in range(12)]
    asked[3] |= {"shared": "die", "times": 0}
    for name, runners, workers, dies in (("one", 1, 1, 0), ("two", 1, 2, 1), ("both", 2, 1, 0)):
        folder = tmp_path / name
        folder.mkdir()
        asked[3]["times"] = dies
        cells = [{**c, "times": 0} if "times" in c and not dies else c for c in asked]
        for process in [start(folder, cells, workers=workers, runners=runners) for _ in range(runners)]:
            process.communicate(timeout=120)
        assert sorted(computed(folder)) == sorted(c["label"] for c in asked), name
        assert computed(folder, ".shared") == ["c3"] * (1 + dies)
    results = [
        {r["label"]: r["with"] for r in map(Store(tmp_path / n / "store").read, Store(tmp_path / n / "store").names())}
        for n in ("one", "two", "both")
    ]
    assert results[0] == results[1] == results[2]
    assert {len(w) for w in results[0].values()} == {6}


# ---------------------------------------------------------------------------------------------- what is computed


@pytest.fixture(scope="module")
def grid():
    return Grid(
        name="g", model="in memory", tasks=tuple(t.name for t in TASKS), seeds=0, limit=4,
        runs=(Run(k=2), Run(heads="random", draws=2)),
    )  # fmt: skip


def run(store, model, grid, **options):
    return run_grid(grid, store, model=model, tasks=TASKS, progress=False, **options)


@pytest.fixture(scope="module")
def whole(loaded, grid, tmp_path_factory):
    """The grid, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    run(folder, loaded("llama", "bridge"), grid)
    return folder


def test_results_are_those_of_separate_training(bridge_llama, grid, whole, tmp_path):
    """The same runs by name and row; heads are identical, scores and offsets equal to 1e-5; only timing.json names the others."""
    run(tmp_path, bridge_llama, grid, together=1)
    ours, apart = Store(whole), Store(tmp_path)
    assert ours.names() == apart.names()
    shared = 0
    for name in ours.names():
        one, two = ours.read(name), apart.read(name)
        assert one.keys() == two.keys()
        assert one["row"] == two["row"]
        timing = ours.timing(name)
        shared += name in timing["together"]
        assert "together" not in apart.timing(name)
        assert timing["seconds"] > 0
        if one["row"]["kind"] == "scores":
            kept = [HeadScores.load(s.folder(name) / "scores.json") for s in (ours, apart)]
            torch.testing.assert_close(kept[0].values, kept[1].values, atol=1e-5, rtol=1e-5)
            assert list(kept[0].top(3)) == list(kept[1].top(3))
        else:
            assert one["run"] == two["run"]
            assert 0 < timing["fit_seconds"] < timing["seconds"]
            kept = [Lofit.from_pretrained(s.folder(name) / "adapter", model=bridge_llama) for s in (ours, apart)]
            torch.testing.assert_close(kept[0].v, kept[1].v, atol=1e-5, rtol=1e-5)
    assert shared == len(ours.names())


def test_what_is_there_does_not_change_the_others(bridge_llama, grid, whole, tmp_path, monkeypatch):
    """Some members are there: they are trained along, and the others have the same bytes. Nothing is trained for nobody."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    store = Store(copy)
    fits = [n for n in store.names() if store.read(n)["row"]["kind"] == "fit"]
    for name in fits[::2]:
        shutil.rmtree(store.folder(name))
    assert set(run(copy, bridge_llama, grid).computed) == set(fits[::2])
    assert contents(copy) == contents(whole)
    monkeypatch.setattr(computing, "tune_many", lambda *_, **__: 1 / 0)
    assert run(copy, bridge_llama, grid).computed == ()


def test_a_member_that_diverges(bridge_llama, grid, whole, tmp_path, monkeypatch):
    """It fails as it would alone, and the others are written; where it no longer does, it is written beside them."""
    inner = computing.tune_many

    def first_diverges(model, runs, **options):
        found = inner(model, runs, **options)
        return [TrainingDiverged("loss is nan at step 2; x"), *found[1:]] if runs[0].component == "v" else found

    monkeypatch.setattr(computing, "tune_many", first_diverges)
    report = run(tmp_path, bridge_llama, grid)
    planned = plan_grid(grid, model=bridge_llama, tasks=TASKS).cells
    n_groups = sum(group.cells[0].row["kind"] == "fit" for group in grouped(by_name(*planned)))
    assert set(report.failed.values()) == {"TrainingDiverged: loss is nan at step 2; x"}
    assert len(report.failed) == n_groups
    made = contents(tmp_path)
    assert made == {k: v for k, v in contents(whole).items() if k.split("/")[0] not in report.failed}
    monkeypatch.setattr(computing, "tune_many", inner)
    assert len(run(tmp_path, bridge_llama, grid).computed) == n_groups
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_an_evaluation_that_fails_is_one_cells(bridge_llama, grid, whole, tmp_path, monkeypatch):
    """The next call trains all of its group again, from the checkpoint that stayed, to the same bytes."""
    inner, seen = computing.evaluate, []

    def fails_once(*args, **options):
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return inner(*args, **options)

    monkeypatch.setattr(computing, "evaluate", fails_once)
    report = run(tmp_path, bridge_llama, grid, retries=0)
    assert list(report.failed.values()) == ["RuntimeError: out of memory"]
    assert len(list((tmp_path / "states").iterdir())) == 1
    assert set(run(tmp_path, bridge_llama, grid).computed) == set(report.failed)
    assert contents(tmp_path) == contents(whole)
    assert not any((tmp_path / "states").iterdir())
