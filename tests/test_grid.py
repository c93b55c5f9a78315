"""A grid that is run: what its cells hold, that nothing is computed twice, that a stop at any moment changes nothing."""

import gc
import json
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from lofit_lens.errors import DataError, InputError, ModelError, TrainingDiverged
from lofit_lens.evaluation.evaluate import evaluate
from lofit_lens.experiments.executors import process as pool
from lofit_lens.experiments.executors.schedule import Group
from lofit_lens.experiments.grid import compute as computing
from lofit_lens.experiments.grid.run import open_grid, plan_grid, run_grid
from lofit_lens.experiments.grid.specs import Grid, Run, Selection
from lofit_lens.experiments.methods import METHODS, Fit
from lofit_lens.experiments.store.store import Store
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Lofit, load_adapter
from lofit_lens.models import load_model, model_info
from lofit_lens.training import preset, select_heads, tune_offsets
from lofit_lens.training.selectors import bias_scores
from lofit_lens.training.trackers import Tracked
from tests.studies import OTHER, TASKS

KIN = TASKS[0]


def grid_of(*runs, **fields):
    return Grid(**{"name": "g", "model": "in memory", "tasks": "kin", "runs": runs, "seeds": 0, **fields})


def run(store, model, grid, **options):
    given = {"tasks": [KIN], "other_tasks": [OTHER] if grid.other_tasks else [], "progress": False, **options}
    return run_grid(grid, store, model=model, **given)


def cell(store, model, grid, kind="fit", **columns):
    """Folder and record of the one cell of a grid that fits."""
    planned = plan_grid(grid, model=model, tasks=[KIN], other_tasks=[OTHER] if grid.other_tasks else [])
    (found,) = [
        c.name for c in planned.cells if c.row["kind"] == kind and all(c.row.get(k) == v for k, v in columns.items())
    ]  # fmt: skip
    return Store(store).folder(found), Store(store).read(found)


def contents(store):
    """Every file of every run but its timing."""
    runs = Store(store).root / "runs"
    return {
        str(p.relative_to(runs)): p.read_bytes() for p in runs.rglob("*") if p.is_file() and p.name != "timing.json"
    }


def test_a_fit_is_what_the_library_gives(llama, tmp_path):
    """The cell's adapter, heads and result are those of the two steps called by hand, to the bit."""
    grid = grid_of(Run(k=2, n_train=4), limit=5)
    assert len(run(tmp_path, llama, grid).computed) == 2
    folder, record = cell(tmp_path, llama, grid)
    scores = select_heads(llama, KIN, seed=0, n_train=4, progress=False)
    lofit = tune_offsets(llama, KIN, scores.top(2), seed=0, n_train=4, progress=False)
    assert record["run"] == {"n_parameters": 16, "heads": str(scores.top(2))}
    kept = Lofit.from_pretrained(folder / "adapter", model=llama)
    assert torch.equal(kept.v, lofit.v)
    with lofit.attached(llama):
        result = evaluate(llama, KIN, limit=5, progress=False)
    assert record["result"]["metrics"] == json.loads(json.dumps(result.to_dict()["metrics"]))
    folder, record = cell(tmp_path, llama, grid, "scores")
    assert HeadScores.load(folder / "scores.json").values.equal(scores.values)
    assert record["row"]["heads_from"] == "A-norm"


def test_settings_reach_the_fit(bridge_llama, tmp_path):
    """Given settings of LoFiT, RED and ITI; a selection among another's best heads by its own settings."""
    model, settings = bridge_llama, {"alpha": 3.0, "answer_from": 2, "full_stop": 0}
    grid = grid_of(
        Run(heads="narrow", k=1, settings={"lr": 0.2, "epochs": 1}),
        Run(method="RED", settings={"lr": 0.2, "epochs": 1}),
        Run(method="ITI", settings={"alpha": 3.0}),
        Run(method="ITI", settings=settings),
        Run(method="ITI", settings={"alpha": 3.0, "answer_from": 3}),
        selections={
            "wide": Selection(by="A-norm", settings={"epochs": 1}),
            "narrow": Selection(by="bias norm", among="wide", among_k=3, settings={"epochs": 2}),
        },
    )
    (failed,) = run(tmp_path, model, grid).failed.values()
    assert "answer_from of ITI is 3; give 1 or 2" in str(failed)
    steps = preset(model_info(model), KIN.family, KIN.objective)
    wide = select_heads(model, KIN, seed=0, config=steps.select.with_changes(epochs=1), progress=False).top(3)
    narrow = bias_scores(model, KIN, heads=wide, seed=0, config=steps.tune.with_changes(epochs=2), progress=False)
    config = steps.tune.with_changes(epochs=1, lr=0.2)
    lofit = tune_offsets(model, KIN, narrow.top(1), seed=0, config=config, progress=False)
    folder, _ = cell(tmp_path, model, grid, method="LoFiT")
    assert torch.equal(Lofit.from_pretrained(folder / "adapter").v, lofit.v)
    folder, _ = cell(tmp_path, model, grid, method="RED")
    assert load_adapter(folder / "adapter", model=model).meta.config["lr"] == 0.2
    folder, record = cell(tmp_path, model, grid_of(Run(method="ITI", settings={"alpha": 3.0})), method="ITI")
    usual = load_adapter(folder / "adapter")
    assert (usual.alpha, str(usual.positions), "full_stop" in usual.meta.config) == (3.0, "all", False)
    assert record["settings"] == {"alpha": 3.0}
    folder, record = cell(tmp_path, model, grid_of(Run(method="ITI", settings=settings)), method="ITI")
    other = load_adapter(folder / "adapter")
    assert (other.alpha, str(other.positions), other.meta.config["full_stop"]) == (3.0, "second", False)


def test_the_best_point_is_chosen(bridge_llama, tmp_path, monkeypatch):
    """Of the trials on the validation rows the best is fitted; one that diverged is a result and is not chosen."""
    tried = []
    values = {5.0: 0.25, 15.0: None, 45.0: 0.75, 135.0: 0.5}
    inner = METHODS["ITI"]

    def fit(bench, asked: Fit):
        tried.append(asked.settings["alpha"])
        if values[tried[-1]] is None:
            raise TrainingDiverged("loss is nan at step 3; the last good state is in /somewhere/else")
        return inner.fit(bench, asked)

    def graded(model, task, *, split, **options):
        found = evaluate(model, task, split=split, **options)
        if split == "val":
            mean = found.metrics["em"].__class__(values[tried[-1]], None, 4)
            object.__setattr__(found, "metrics", {"em": mean})
        return found

    fit.__module__ = "lofit_lens.tests"  # as a method of the library, which its version names
    monkeypatch.setitem(METHODS, "ITI", replace(inner, fit=fit))
    monkeypatch.setattr(computing, "evaluate", graded)
    grid = grid_of(Run(method="ITI"))
    assert not run(tmp_path, bridge_llama, grid).failed
    assert tried == [5.0, 15.0, 45.0, 135.0, 45.0]
    _, record = cell(tmp_path, bridge_llama, grid)
    assert record["settings"] == {"alpha": 45.0}
    _, trial = cell(tmp_path, bridge_llama, grid, "trial", set_alpha=15.0)
    assert trial["note"] == "loss is nan at step 3"
    assert "result" not in trial
    monkeypatch.setitem(values, 5.0, None)
    monkeypatch.setitem(values, 45.0, None)
    monkeypatch.setitem(values, 135.0, None)
    found = run(tmp_path / "none", bridge_llama, grid)
    assert ["ITI diverged at every point" in e for e in found.failed.values()] == [True]


def test_a_fit_that_diverges_is_reported_and_the_others_are_made(llama, tmp_path, monkeypatch):
    """What needs it is not begun; the same call tries it again."""

    def diverge(model, runs, **options):
        return [TrainingDiverged("loss is nan") for _ in runs]

    monkeypatch.setattr(computing, "tune_many", diverge)
    grid = grid_of(Run(heads="random", draws=2, tested=True), Run(method="zero-shot"), other_tasks="other")
    found = run(tmp_path, llama, grid)
    assert len(found.computed) == 1
    assert all("loss is nan" in e for e in found.failed.values())
    assert len(found.failed) == 2
    assert set(found.blocked.values()) == set(found.failed)
    assert len(Store(tmp_path).failures()) == 2
    again = run(tmp_path, llama, grid)
    assert set(again.failed) == set(found.failed)
    assert len(again.there) == 1
    monkeypatch.undo()
    assert len(run(tmp_path, llama, grid).computed) == 4
    assert Store(tmp_path).failures() == {}


def test_what_is_there_is_not_computed_again(llama, tmp_path, monkeypatch):
    """A second call computes nothing; a run that is gone is made anew, to the same bytes; another grid shares what it can."""
    grid = grid_of(Run(k=(1, 2)), Run(heads="random", draws=1))
    first = run(tmp_path, llama, grid)
    assert len(first.computed) == 4
    before = contents(tmp_path)
    monkeypatch.setattr(computing, "KINDS", {})
    assert run(tmp_path, llama, grid).computed == ()
    monkeypatch.undo()
    folder, _ = cell(tmp_path, llama, grid, k=2)
    shutil.rmtree(folder)
    assert run(tmp_path, llama, grid).computed == (folder.name,)
    assert contents(tmp_path) == before
    wider = run(tmp_path, llama, grid_of(Run(k=(2, 3)), name="wider"))
    assert (len(wider.computed), len(wider.there)) == (1, 2)
    assert set(Store(tmp_path).grids()) == {"g", "wider"}


@pytest.mark.parametrize("draws", [1, 3])
def test_training_resumes_inside_a_run(llama, tmp_path, draws):
    """Ctrl-C in the middle of a fit, or of three together: one state lies in the store, and the next call goes on from there
    to the same bytes."""
    grid = grid_of(Run(heads="random", draws=draws))
    run(tmp_path / "whole", llama, grid)
    seen = []

    def interrupt(record):
        seen.append(record["step"])
        if len(seen) == 3:
            raise KeyboardInterrupt

    tuned = computing.tune_many

    def stopped(model, runs, **options):
        return tuned(model, [replace(runs[0], on_step=interrupt), *runs[1:]], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computing, "tune_many", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", llama, grid)
    assert len(list((tmp_path / "cut" / "states").iterdir())) == 1
    assert Store(tmp_path / "cut").names() == []
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracked, "__call__", lambda self, record: steps.append(record["step"]))
        run(tmp_path / "cut", llama, grid)
    assert set(steps[:draws]) == {3}, "an epoch has one step here; two were done and kept"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert not any((tmp_path / "cut" / "states").iterdir())


def test_another_model_than_planned_is_refused(llama, loaded, backend, tmp_path):
    """The class or weights that were planned are those that are run."""
    planned = plan_grid(grid_of(Run(method="zero-shot")), model=llama, tasks=[KIN])
    context = replace(planned.context, loaded=loaded("gpt2", backend))
    with pytest.raises(ModelError, match="is not the one that was planned"):
        computing.compute(Store(tmp_path), Group((planned.cells[0],)), context, None, nullcontext)
    assert Store(tmp_path).names() == []


def grades_one(text, example):
    """Everything is right."""
    return {"em": 1.0}


def test_another_grader_or_other_rows_are_another_run(bridge_llama, tmp_path):
    """The same name and the same hashes of files: neither the store nor what a process keeps takes one for the other."""
    grid = grid_of(Run(method="zero-shot"))
    first = run(tmp_path, bridge_llama, grid)
    graded = run(tmp_path, bridge_llama, grid, tasks=[replace(KIN, grade=grades_one)])
    assert first.computed != graded.computed
    assert Store(tmp_path).read(graded.computed[0])["result"]["metrics"]["em"]["mean"] == 1.0
    few = run(tmp_path, bridge_llama, grid, tasks=[replace(KIN, test={**KIN.test, "test": KIN.test["test"][:2]})])
    assert Store(tmp_path).read(few.computed[0])["result"]["metrics"]["em"]["n"] == 2


@torch.no_grad()
def test_a_model_in_memory_is_its_weights(checkpoint, tmp_path, backend):
    """Edited weights are another model, whatever it was loaded from."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    grid = grid_of(Run(method="zero-shot"))
    assert len(run(tmp_path, model, grid).computed) == 1
    assert len(run(tmp_path, model, grid).there) == 1
    next(p for p in model.parameters() if p.numel() > 100)[..., 3] += 0.1
    assert len(run(tmp_path, model, grid).computed) == 1


def test_models_of_one_name_have_records_of_their_own(checkpoint, tmp_path):
    """Two classes of one checkpoint, and its configuration changed: other cells, another record for each."""
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "m")
    models = [{"name": str(folder), "backend": "bridge", "dtype": d} for d in ("float32", "bfloat16")]
    planned = plan_grid(grid_of(Run(method="zero-shot"), model=models), tasks=[KIN])
    assert len(planned.records) == len(planned.cells) == 2
    assert len({c.model for c in planned.cells}) == 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    again = plan_grid(grid_of(Run(method="zero-shot"), model=models), tasks=[KIN])
    assert not {c.name for c in again.cells} & {c.name for c in planned.cells}


@pytest.mark.slow
def test_models_are_freed(checkpoint, tmp_path):
    """A worker holds one model at a time: its benches go with it."""
    grid = grid_of(Run(method="zero-shot"), model=[str(checkpoint("llama")), str(checkpoint("gpt2"))])
    alive = []
    inner = pool.load_model

    def load(*args, **options):
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        model = inner(*args, **options)
        made.append(weakref.ref(model))
        return model

    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "load_model", load)
        patch.setattr(pool, "_loaded", {})
        run_grid(grid, tmp_path, tasks=[KIN], device="cpu", progress=False)
    assert alive == [0, 0]


def test_bad_grids_are_refused_before_anything_is_made(llama, tmp_path):
    """No store appears."""
    own = grid_of(Run(n_train=9))
    for grid, options, message in (
        (own, {}, "9 training examples asked for; kin has 8"),
        (grid_of(Run(), other_tasks="kin"), {"other_tasks": [KIN]}, "kin is both a task and an other task"),
        (grid_of(Run(tested=True)), {}, "says 'tested', and the grid has no other_tasks; add them"),
        (grid_of(Run(damage=True)), {}, "says 'damage', and the grid has no texts; add them"),
        (grid_of(Run(), tasks=["kin", "kin"]), {"tasks": [KIN, KIN]}, "each once"),
        (grid_of(Run()), {"workers": 2}, "by name"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "s", llama, grid, **options)
    with pytest.raises(InputError, match="unknown grid 'organism/al'"):
        run_grid("organism/al", tmp_path / "s")
    with pytest.raises(DataError, match="cannot read"):
        run_grid(tmp_path / "no.yaml", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_grids_open_by_name_file_or_as_they_are(tmp_path):
    """A file wins over nothing but an unknown name."""
    (tmp_path / "g.yaml").write_text(
        "name: mine\nmodel: organism\ntasks: organism/truth\nruns: [{method: zero-shot}]\n"
    )
    assert open_grid(tmp_path / "g.yaml").name == "mine"
    assert open_grid("organism/fig2").name == "organism/fig2"
    grid = open_grid("organism/fig2")
    assert open_grid(grid) is grid


def test_models_are_planned_by_name(checkpoint, tmp_path):
    """Two models in one grid: cells of both, each loaded once; a folder's weights name it, not its path."""
    folders = [checkpoint("llama"), checkpoint("gpt2")]
    grid = grid_of(Run(method="zero-shot"), Run(heads="random", draws=1), model=[str(f) for f in folders])
    planned = plan_grid(grid, tasks=[KIN])
    assert len(planned.cells) == 4
    assert len(planned.records) == 2
    found = run_grid(grid, tmp_path / "s", tasks=[KIN], progress=False, device="cpu")
    assert len(found.computed) == 4
    moved = shutil.copytree(folders[0], tmp_path / "elsewhere")
    again = plan_grid(grid.model_copy(update={"model": grid_of(Run(), model=str(moved)).model}), tasks=[KIN])
    assert [c.name for c in again.cells] == [c.name for c in planned.cells[:2]]


def test_a_folder_given_from_here_is_found_from_elsewhere(checkpoint, tmp_path, monkeypatch):
    """Workers may start in another folder; the embedded model's name means no folder."""
    shutil.copytree(checkpoint("llama"), tmp_path / "mine")
    (tmp_path / "organism").mkdir()
    monkeypatch.chdir(tmp_path)
    planned = plan_grid(grid_of(Run(method="zero-shot"), model=["mine", "organism"]), tasks=[KIN])
    assert [load["name_or_path"] for load in planned.context.load.values()] == [str(tmp_path / "mine"), "organism"]


def test_lora_puts_the_grid_on_the_bridge(checkpoint):
    """All methods run on one class."""
    plain = plan_grid(grid_of(Run(method="RED"), model=str(checkpoint("llama"))), tasks=[KIN])
    lora = plan_grid(grid_of(Run(method=("RED", "LoRA")), model=str(checkpoint("llama"))), tasks=[KIN])
    assert {c.row["backend"] for c in lora.cells} == {"bridge"}
    assert {c.row["backend"] for c in plain.cells} <= {"hooked", "bridge"}


def test_random_heads_are_the_draws(llama, tmp_path):
    """Draw d of K heads is HeadSet.random with seed d; the fit's seed is d too."""
    grid = grid_of(Run(heads="random", k=3, draws=2))
    run(tmp_path, llama, grid, together=1)
    for d in range(2):
        folder, record = cell(tmp_path, llama, grid, draw=d)
        heads = HeadSet.random((3, 4), 3, seed=d)
        assert record["run"]["heads"] == str(heads)
        expected = tune_offsets(llama, KIN, heads, seed=d, progress=False)
        assert torch.equal(Lofit.from_pretrained(folder / "adapter", model=llama).v, expected.v)


class Reader:
    """A tracker that notes what it is told; it may fail at every step."""

    started: ClassVar[list[str]] = []

    def __init__(self, broken):
        self.broken, self.steps, self.metrics = broken, 0, None

    def start(self, name, config):
        type(self).started.append(name)

    def step(self, record):
        self.steps += 1
        if self.broken:
            raise OSError("no network")

    def finish(self, metrics):
        self.metrics = metrics


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("broken", [False, True])
def test_trackers_read_what_trains(bridge_llama, tmp_path, monkeypatch, broken, together):
    """Runs with steps alone are read, with their metrics at the end; a tracker that failed is not waited for again."""
    made = []
    monkeypatch.setattr(Reader, "started", [])
    monkeypatch.setattr(computing, "_silent", set())
    # whether it is installed or not
    monkeypatch.setattr("lofit_lens.experiments.grid.run.tracker", lambda kind, folder: None)
    monkeypatch.setattr(computing, "tracker", lambda kind, folder: made.append(Reader(broken)) or made[-1])
    grid = grid_of(Run(method="zero-shot"), Run(heads="random", draws=3), Run(method="ITI", settings={"alpha": 1}))
    found = run(tmp_path, bridge_llama, grid, track="tensorboard", together=together)
    assert len(found.computed) == 5
    assert len(Reader.started) == (1 if broken and together == 1 else 3)
    assert all("LoFiT" in name for name in Reader.started)
    if not broken:
        assert all(reader.steps > 0 and set(reader.metrics) == {"em", "contains"} for reader in made)
