"""Trackers read the steps of training, every one once, and change nothing: not a byte, and nobody's failure stops a run."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lofit_lens import cli
from lofit_lens.errors import InputError
from lofit_lens.heads import HeadSet
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.tasks import load_task
from lofit_lens.training import TRACKERS, TrainConfig, select_heads, tracked, tracker, tune_offsets, tune_scalings
from tests.task_rows import words_task

CONFIG = TrainConfig(lr=1e-2, epochs=2, batch_size=4, l1=1e-3)
HEADS = HeadSet(["L0H1", "L2H3"])


class Notes:
    """A tracker that writes down what it is told, and fails where asked."""

    def __init__(self, fails=()):
        self.told, self.fails = [], fails

    def _note(self, *what):
        self.told.append(what)
        if what[0] in self.fails:
            raise ConnectionError("no network")

    def start(self, name, config):
        self._note("start", name, config)

    def step(self, record):
        self._note("step", record)

    def finish(self, metrics):
        self._note("finish", metrics)

    @property
    def steps(self):
        return [t[1] for t in self.told if t[0] == "step"]


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    """Twelve rows: 3 steps an epoch in batches of 4."""
    return words_task(tmp_path_factory.mktemp("task") / "caps")


@pytest.fixture(scope="module")
def task(own_task):
    return load_task(str(own_task))


def tune(model, task, **options):
    return tune_offsets(model, task, HEADS, config=CONFIG, progress=False, **options)


@pytest.mark.parametrize("by", [select_heads, tune_scalings, tune_offsets])
def test_every_step_reaches_it_once_and_in_order(bridge_llama, task, by):
    """Its records are those of the training's own history; start comes first, finish with the metrics last."""
    notes = Notes()
    heads = {"heads": HEADS} if by is tune_offsets else {}
    with tracked(notes, "mine", {"lr": 1}) as run:
        made = by(bridge_llama, task, config=CONFIG, progress=False, on_step=run, **heads)
        run.metrics["em"] = 0.5
    history = made.meta["history"] if by is select_heads else made.meta.history
    assert notes.steps == history
    assert [r["step"] for r in history] == [1, 2, 3, 4, 5, 6]
    assert notes.told[0] == ("start", "mine", {"lr": 1})
    assert notes.told[-1] == ("finish", {"em": 0.5})
    assert len(notes.told) == 8


def test_a_tracker_changes_no_byte(bridge_llama, task, tmp_path):
    """Adapter files with and without one, also with one that spoils the records it is given."""

    class Spoiler(Notes):
        def step(self, record):
            record.clear()
            torch.manual_seed(0)

    def saved(name, reader):
        with tracked(reader, "mine", {}) as run:
            tune(bridge_llama, task, on_step=run).save_pretrained(tmp_path / name)
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    assert saved("without", None) == saved("with", Notes()) == saved("spoiled", Spoiler())


def test_stop_and_resume(bridge_llama, task, tmp_path):
    """A run stopped at step 4 is finished without metrics; resumed, it tells the steps that follow, and each was told once."""

    class Stops(Notes):
        def step(self, record):
            super().step(record)
            if record["step"] == 4:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        first, second = Stops(), Notes()
        with pytest.raises(KeyboardInterrupt), tracked(first, "mine", {}) as run:
            tune(bridge_llama, task, on_step=run, checkpoint=tmp_path / "state")
    finally:
        signal.signal(signal.SIGINT, before)
    with tracked(second, "mine", {}) as run:
        tune(bridge_llama, task, on_step=run, checkpoint=tmp_path / "state")
    assert first.told[-1] == ("finish", None)
    assert [r["step"] for r in first.steps] == [1, 2, 3, 4]
    assert first.steps + second.steps == tune(bridge_llama, task).meta.history


@pytest.mark.parametrize("what", ["start", "step", "finish"])
def test_one_that_fails_is_dropped_with_one_warning(bridge_llama, task, caplog, what):
    """Training goes on to the same numbers; the tracker is asked to end its run and hears no more."""
    notes = Notes(fails=(what, "finish"))
    with caplog.at_level(logging.WARNING, logger="lofit_lens"), tracked(notes, "mine", {}) as run:
        made = tune(bridge_llama, task, on_step=run)
    assert made.meta.history == tune(bridge_llama, task).meta.history
    assert [r.getMessage() for r in caplog.records] == [
        "the tracker Notes failed (ConnectionError: no network); the run continues without it"
    ]
    assert len(notes.steps) == {"start": 0, "step": 1, "finish": 6}[what]
    assert [t[0] for t in notes.told].count("finish") == 1


def test_a_run_that_fails_is_not_finished_with_metrics():
    """The error is the run's own, and the tracker hears that it was stopped."""
    notes = Notes()

    def fails():
        with tracked(notes, "run", {}) as run:
            run.metrics["em"] = 1.0
            raise InputError("mine")

    with pytest.raises(InputError, match="mine"):
        fails()
    assert notes.told[-1] == ("finish", None)


def test_unknown_and_missing_trackers(tmp_path, monkeypatch):
    """The name is corrected; a package that is not there is named with the way to get it."""
    with pytest.raises(
        InputError, match=r"unknown tracker 'tensorbord'; allowed: wandb, tensorboard. Did you mean 'tensorboard'"
    ):
        tracker("tensorbord", tmp_path)
    for kind in TRACKERS:
        for module in (kind, "torch.utils.tensorboard"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=rf'pip install "lofit-lens\[{kind}\]"'):
            tracker(kind, tmp_path)


@pytest.mark.slow
def test_nothing_is_imported_by_default(own_task, checkpoint):
    """A training run in a new process leaves both packages alone."""
    script = f"""
import sys
import lofit_lens as ll
model = ll.load_model({str(checkpoint("llama"))!r}, backend="bridge", device="cpu")
task = ll.load_task({str(own_task)!r})
ll.tune_offsets(model, task, ["L0H1"], config=ll.TrainConfig(lr=0.1, epochs=1, max_steps=1), progress=False)
import lofit_lens.training.trackers, lofit_lens.cli.tune
print(sorted({{m.split(".")[0] for m in sys.modules}} & {{"wandb", "tensorboard", "tensorboardX", "tensorflow"}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == "[]", done.stderr


# ----------------------------------------------------------------------------------------------- the two packages


def events(folder):
    """Scalars of TensorBoard's event files: tag -> {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_back(bridge_llama, task, tmp_path):
    """Every number of every step, to float32, and the metrics at the last step, under folder/name."""
    pytest.importorskip("tensorboard")
    with tracked(tracker("tensorboard", tmp_path / "logs"), "my/run", {"lr": 0.01}) as run:
        history = tune(bridge_llama, task, on_step=run).meta.history
        run.metrics["em"] = 0.25
    found = events(tmp_path / "logs" / "my-run")
    assert set(found) == {"metrics/em", *(f"train/{n}" for n in ("epoch", "loss", "l1", "grad_norm", "lr"))}
    assert found["metrics/em"] == {6: 0.25}
    assert list(found["train/loss"]) == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "lr"):
        assert list(found[f"train/{name}"].values()) == pytest.approx([r[name] for r in history], rel=1e-6)


def test_tensorboard_hides_what_a_killed_run_had_beyond_its_checkpoint(tmp_path):
    """Steps 1-5, killed, resumed after step 3: 4 and 5 are shown as told the second time, and no step twice."""
    pytest.importorskip("tensorboard")
    for steps, loss in (((1, 2, 3, 4, 5), 1.0), ((4, 5, 6), 2.0)):
        with tracked(tracker("tensorboard", tmp_path), "run", {}) as run:
            for step in steps:
                run({"step": step, "loss": loss})
    assert events(tmp_path / "run")["train/loss"] == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 2.0}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(EventAccumulator(str(tmp_path / "run")).Reload().Scalars("train/loss")) == 6


class FakeWandb:
    """What of wandb is used, and how."""

    def __init__(self):
        self.told, self.summary = [], {}

    def Settings(self, **options):
        return options

    def init(self, **options):
        self.told.append(options)
        return self

    def log(self, record, *, step):
        self.told.append((step, record))

    def finish(self, *, exit_code):
        self.told.append(exit_code)


def test_wandb_goes_on_in_the_same_chart(tmp_path, monkeypatch):
    """The run's id is its name as wandb takes it, resume="allow", steps are wandb's own; a stopped run ends with code 1."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with tracked(tracker("wandb", tmp_path / "w"), "a b/c", {"lr": 1}) as run:
        run({"step": 3, "loss": 0.5})
        run.metrics["em"] = 0.75
    with pytest.raises(KeyboardInterrupt), tracked(tracker("wandb", tmp_path / "w"), "a b/c", {}):
        raise KeyboardInterrupt
    first, step, code, again, stopped = fake.told
    assert (first["id"], first["name"], first["resume"], first["project"]) == ("a-b-c", "a b/c", "allow", "lofit-lens")
    assert (first["config"], first["dir"]) == ({"lr": 1}, str(tmp_path / "w"))
    assert (step, code, stopped) == ((3, {"loss": 0.5}), 0, 1)
    assert again["id"] == first["id"]
    assert fake.summary == {"em": 0.75}


@pytest.mark.slow
def test_wandb_offline_writes_its_run(bridge_llama, task, tmp_path, monkeypatch, capfd):
    """Without a network: the run's file is there, and nothing is said on the terminal."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "other"))
    with tracked(tracker("wandb", tmp_path / "logs"), "mine", {"lr": 0.01}) as run:
        tune(bridge_llama, task, on_step=run)
        run.metrics["em"] = 0.25
        assert run.reader is not None
    assert run.reader is not None
    (file,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/run-mine.wandb")
    for _ in range(200):  # with a time limit for its end, wandb's own process may still be writing
        if file.stat().st_size > 100:
            break
        time.sleep(0.1)
    assert file.stat().st_size > 100
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ the shell


def shell(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["lofit-lens", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capsys.readouterr().err


def test_track_on_the_shell(capsys, monkeypatch, checkpoint, own_task, tmp_path):
    """`select` and `tune` hand every step on; event files lie beside --out; the result is the same without."""
    pytest.importorskip("tensorboard")
    common = ("-m", checkpoint("llama"), "-t", own_task, "--device", "cpu", "-q", "--backend", "bridge", "--epochs", 2)
    track = ("--track", "tensorboard")
    code, err = shell(capsys, monkeypatch, "select", *common, "--out", tmp_path / "h", "--k", 2, *track)
    assert code == 0, err
    for out, more in (("a", track), ("b", ())):
        code, err = shell(
            capsys, monkeypatch, "tune", *common, "--heads", tmp_path / "h", "--out", tmp_path / out, *more
        )
        assert code == 0, err
    for out, history in (
        ("h", json.loads((tmp_path / "h" / "scores.json").read_text())["meta"]["history"]),
        ("a", Lofit.from_pretrained(tmp_path / "a").meta.history),
    ):
        (folder,) = (tmp_path / f"{out}.track").iterdir()
        assert folder.name.startswith(f"{out}-")
        assert list(events(folder)["train/loss"]) == [int(r["step"]) for r in history]
    assert not (tmp_path / "b.track").exists()
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in "ab")
    assert a == b


def test_track_is_refused_before_the_work(capsys, monkeypatch, own_task, tmp_path):
    """An unknown tracker, and one for a score that is not trained."""
    common = ("-t", own_task, "--out", tmp_path / "h")
    code, err = shell(capsys, monkeypatch, "select", *common, "-m", "no/such", "--track", "tensorbored")
    assert (code, "unknown tracker 'tensorbored'" in err) == (2, True)
    code, err = shell(capsys, monkeypatch, "select", *common, "--by", "random", "--track", "tensorboard")
    assert (code, "--track is a setting of A-norm" in err) == (2, True)
    code, err = shell(capsys, monkeypatch, "tune", *common, "-m", "no/such", "--heads", "L0H0", "--track", "wand")
    assert (code, "unknown tracker 'wand'" in err) == (2, True)
