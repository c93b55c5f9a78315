"""The shell as a user meets it: what it writes, and one clear line and exit code 2 for bad input."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lofit_lens import cli
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Lofit
from tests import tiny
from tests.task_rows import words_task


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("shell") / "my-llama", "llama")


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    return words_task(tmp_path_factory.mktemp("task") / "caps")


def run(capsys, monkeypatch, *args) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["lofit-lens", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def test_select_tune_eval_generate(capsys, monkeypatch, llama, own_task, tmp_path):
    """The four verbs hand on to each other, and what they write is what they say."""
    common = ("--model", llama, "--task", own_task, "--device", "cpu")
    code, out, err = run(
        capsys, monkeypatch, "select", *common, "--out", tmp_path / "h", "--k", 3, "--max-steps", 2, "--circuit"
    )
    assert code == 0, err
    scores = HeadScores.load(tmp_path / "h" / "scores.json")
    assert json.loads((tmp_path / "h" / "circuit.json").read_text())["nodes"]["a1.h2"]["score"] == scores["L1H2"]
    heads = HeadSet.load(tmp_path / "h" / "heads.json")
    assert len(heads) == 3
    assert str(heads) in out
    assert "TransformerBridge" in out or "HookedTransformer" in out
    code, out, err = run(
        capsys, monkeypatch, "tune", *common, "--heads", tmp_path / "h", "--out", tmp_path / "a", "--epochs", 1
    )
    assert code == 0, err
    lofit = Lofit.from_pretrained(tmp_path / "a")
    assert lofit.heads.heads == heads.heads
    assert lofit.n_parameters == 3 * 8
    code, out, err = run(
        capsys, monkeypatch, "eval", *common, "--adapter", tmp_path / "a", "--out", tmp_path / "e", "--limit", 5
    )
    assert code == 0, err
    assert json.loads((tmp_path / "e" / "result.json").read_text())["metrics"]["em"]["n"] == 5
    assert len((tmp_path / "e" / "items.jsonl").read_text().splitlines()) == 5
    code, out, err = run(
        capsys, monkeypatch, "generate", "word 1:", "-m", llama, "-a", tmp_path / "a", "--max-new-tokens", 2
    )
    assert code == 0, err
    assert "with adapter" in out
    assert not list(tmp_path.glob(".*")), "a finished run leaves no state file"


def test_switches_for_memory_reach_training_and_change_nothing(capsys, monkeypatch, llama, own_task, tmp_path):
    """--token-budget and --checkpointing: as asked, and the same heads and offsets."""
    from lofit_lens.training import fitting

    seen, inner = [], fitting.Steps
    monkeypatch.setattr(fitting, "Steps", lambda m, o, p, **k: (seen.append(p), inner(m, o, p, **k))[1])
    common = ("--model", llama, "--task", own_task, "--device", "cpu", "--max-steps", 2)
    for name, options in (("a", ()), ("b", ("--token-budget", 9, "--checkpointing"))):
        for args in (("select", "--out", tmp_path / f"{name}h"), ("tune", "--heads", "L1H2", "--out", tmp_path / name)):
            code, _, err = run(capsys, monkeypatch, *args, *common, *options)
            assert code == 0, err
    assert [(p.token_budget, p.checkpointing) for p in seen] == [(8192, False)] * 2 + [(9, True)] * 2
    assert HeadSet.load(tmp_path / "ah" / "heads.json").heads == HeadSet.load(tmp_path / "bh" / "heads.json").heads
    one, other = (Lofit.from_pretrained(tmp_path / n) for n in ("a", "b"))
    assert (one.v - other.v).abs().max() < 1e-5
    asked = ("select", *common[:-2], "--by", "random", "--checkpointing", "--out", tmp_path / "c")
    code, _, err = run(capsys, monkeypatch, *asked)
    assert code == 2
    assert "--checkpointing is a setting of A-norm" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("select", "-t", "mquak"), "unknown task 'mquak'"),
        (("select", "-t", "truthfulqa", "--fold", "2"), "unknown fold '2'; allowed: 0, 1"),
        (("select", "-t", "mquake", "--fold", "1"), "mquake has no folds"),
        (("select", "-t", "TASK", "--k", "0"), "K = 0 heads asked for"),
        (("select", "-t", "TASK", "--k", "13"), "K = 13 heads asked for; MODEL has 12"),
        (("select", "-t", "TASK", "--dtype", "float99"), "unknown dtype 'float99'"),
        (("select", "-t", "TASK", "--device", "tpu7"), "unknown device 'tpu7'"),
        (("select", "-t", "TASK", "--device", "cuda:7"), "no device cuda:7 here"),
        (("select", "-t", "TASK", "--backend", "hook"), "unknown backend 'hook'"),
        (("select", "-t", "TASK", "--lr", "-1"), "lr is -1.0"),
        (("select", "-t", "TASK", "--n-train", "99"), "99 training examples asked for"),
        (("tune", "-t", "TASK", "--heads", "L9H0"), "head L9H0 is outside this model (3 layers of 4 heads"),
        (("tune", "-t", "TASK", "--heads", "L1"), "'L1' is not a head"),
        (("tune", "-t", "TASK", "--heads", "none.json"), "no head file none.json"),
        (("eval", "-t", "TASK", "--split", "dev"), "unknown split 'dev'"),
        (("eval", "-t", "TASK", "--limit", "0"), "limit is 0; give 1 or more"),
        (("eval", "-t", "TASK", "--adapter", "nowhere"), "nowhere is not an adapter folder"),
        (("select", "-t", "mquake", "--data-dir", "nowhere"), "no data folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, monkeypatch, llama, own_task, tmp_path, args, message):
    """Each wrong value is named, with what is allowed, and nothing is written."""
    out = tmp_path / "result"
    args = [own_task if a == "TASK" else a for a in args] + ["-m", llama]
    if args[0] != "eval":
        args += ["--out", out]
    if "--device" not in args:
        args += ["--device", "cpu"]
    code, _, err = run(capsys, monkeypatch, *args)
    assert code == 2, err
    assert f"error: {message.replace('MODEL', llama.name)}" in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_verb_leaves_the_warnings_of_its_process_as_they_were(capsys, monkeypatch, llama, own_task, tmp_path):
    """What it silences, for itself and its workers, is heard again after it, whether it ended well or not."""
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    before = list(warnings.filters)
    for k, ends in ((2, 0), (99, 2)):
        out = ("--out", tmp_path / str(k), "--max-steps", 1, "--device", "cpu")
        assert run(capsys, monkeypatch, "select", "-t", own_task, "-m", llama, "--k", k, *out)[0] == ends
        assert "PYTHONWARNINGS" not in os.environ
        assert warnings.filters == before
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    run(capsys, monkeypatch, "select", "-t", own_task, "-m", llama, "--k", 99, "--out", tmp_path / "o")
    assert os.environ["PYTHONWARNINGS"] == "error"


def test_unknown_model(capsys, monkeypatch, hub, own_task, tmp_path):
    """A model that is neither a folder nor on the hub: exit 2, and what can be given instead."""
    code, _, err = run(capsys, monkeypatch, "select", "-t", own_task, "-m", "no/such-model", "--out", tmp_path / "o")
    assert code == 2
    assert "unknown model 'no/such-model'" in err
    assert "organism" in err


def test_unwritable_output(capsys, monkeypatch, llama, own_task, tmp_path):
    """An output folder that cannot be made is refused before any work."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    args = ("select", "-t", own_task, "-m", llama, "--out", blocker / "o", "--device", "cpu")
    code, out, err = run(capsys, monkeypatch, *args)
    assert code == 2
    assert f"cannot write {blocker / 'o'}" in err
    assert "model" not in out


def test_output_that_exists_is_kept(capsys, monkeypatch, llama, own_task, tmp_path):
    """Without --overwrite nothing is replaced."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("precious")
    code, _, err = run(
        capsys, monkeypatch, "select", "-t", own_task, "-m", llama, "--out", tmp_path / "o", "--device", "cpu"
    )
    assert code == 2
    assert "exists; give another --out or --overwrite" in err
    assert (tmp_path / "o" / "mine").read_text() == "precious"


def test_missing_option_is_a_usage_error(capsys, monkeypatch):
    """The shell's own usage errors exit with 2 as well."""
    assert run(capsys, monkeypatch, "select")[0] == 2


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_that_resumes(llama, own_task, tmp_path):
    """SIGINT ends with 130 and a state file; the same command then finishes and equals an undisturbed run."""

    def command(out: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "lofit_lens.cli", "select", "-m", str(llama), "-t", str(own_task), "--device", "cpu",
                "--out", str(out), "--epochs", "40", "--batch-size", "1", *more]  # fmt: skip

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A suite that runs in the background of a shell hands down an ignored SIGINT.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command(tmp_path / "a"), stderr=subprocess.PIPE, text=True, env=env, preexec_fn=listen
    ) as first:
        assert first.stderr is not None
        seen = ""
        while "step/s, loss" not in seen:
            piece = first.stderr.read(1)
            assert piece, f"ended before the first step: {seen}"
            seen += piece
        first.send_signal(signal.SIGINT)
        rest = first.stderr.read()
    assert first.returncode == 130, rest
    assert "stopped after step" in rest
    state = tmp_path / ".a.state.safetensors"
    assert state.exists()
    again = subprocess.run(command(tmp_path / "a"), env=env, capture_output=True, text=True, check=True)
    assert "| 0/480" not in again.stderr, "it went on instead of starting anew"
    assert not state.exists()
    subprocess.run(command(tmp_path / "b"), env=env, capture_output=True, check=True)
    left, right = (json.loads((tmp_path / x / "scores.json").read_text()) for x in "ab")
    assert left["values"] == right["values"]
    assert left["meta"]["history"] == right["meta"]["history"]
