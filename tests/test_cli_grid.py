"""The verb grid: what it computes, what it says, and exit codes 1 and 2."""

import json

import pytest

from lofit_lens.cli import common
from lofit_lens.experiments.executors.ray import _device
from lofit_lens.experiments.grid import compute
from lofit_lens.experiments.store.store import Store
from tests.test_cli import run as run_cli
from tests.test_kills import grid_in

GRID = "name: small\nmodel: {name: MODEL, backend: bridge}\ntasks: TASK\nlimit: 4\nseeds: 0\n"


@pytest.fixture
def shell(capsys, monkeypatch):
    monkeypatch.setattr(common.console, "stderr", False)

    def run(*args):
        code, said, error = run_cli(capsys, monkeypatch, "grid", *args)
        return code, " ".join(said.split()), error  # without the line breaks of a narrow screen

    return run


@pytest.fixture
def yaml(tmp_path, checkpoint):
    """A file with these runs on a tiny model and a task folder."""
    grid_in(tmp_path)

    def write(runs, name="g.yaml"):
        text = GRID.replace("MODEL", str(checkpoint("llama"))).replace("TASK", str(tmp_path / "places"))
        (tmp_path / name).write_text(text + runs)
        return tmp_path / name

    return write


def test_a_grid_runs_once(shell, yaml, tmp_path):
    """The first call computes, the second finds all; --dry-run before says what will be; --json what was."""
    grid, store = yaml("runs: [{method: zero-shot}, {k: 2}]"), tmp_path / "s"
    code, said, _ = shell(grid, "--store", store, "--dry-run")
    assert code == 0
    assert "3 cells: 0 in" in said
    assert not store.exists()
    code, said, _ = shell(grid, "--store", store, "--quiet")
    assert code == 0
    assert "3 computed, 0 there before" in said
    code, said, _ = shell(grid, "--store", store, "--json", "--quiet")
    assert code == 0
    found = json.loads(said)
    assert (found["computed"], len(found["there"]), found["failed"]) == ([], 3, {})
    assert set(found["there"]) == set(Store(store).names())
    assert "3 cells: 3 in" in shell(grid, "--store", store, "--dry-run")[1]


def test_options_take_the_place_of_the_grids(shell, yaml, tmp_path):
    """Seeds, test rows, task and model."""
    grid = yaml("runs: [{heads: random, draws: 1}, {method: RED}]")
    code, said, _ = shell(grid, "--store", tmp_path / "s", "--dry-run", "--seeds", "3", "--json")
    assert code == 0
    assert len([n for n in json.loads(said)["to_compute"] if "RED" in n]) == 3
    said = shell(
        grid, "--store", tmp_path / "s", "--dry-run", "--task", "organism/all", "--model", "organism", "--json"
    )[1]
    names = json.loads(said)["to_compute"]
    assert len(names) == 6
    assert all(n.startswith("organism_") for n in names)
    first = json.loads(shell(grid, "--store", tmp_path / "s", "--dry-run", "--json")[1])["to_compute"]
    limited = json.loads(shell(grid, "--store", tmp_path / "s", "--dry-run", "--json", "--limit", "2")[1])["to_compute"]
    assert len(first) == len(limited)
    assert not set(first) & set(limited)


def test_a_failed_cell_is_exit_code_1(shell, yaml, tmp_path, monkeypatch):
    """The rest is computed; the shell says which and where its log is."""

    def broken(*args, **options):
        raise ValueError("out of luck")

    monkeypatch.setattr(compute, "tune_many", broken)
    code, said, _ = shell(
        yaml("runs: [{method: zero-shot}, {heads: random, draws: 1}]"), "--store", tmp_path / "s", "--quiet"
    )
    assert code == 1
    assert "1 computed, 0 there before, 1 failed" in said
    assert "ValueError: out of luck" in said
    assert (tmp_path / "s" / "logs").is_dir()


@pytest.mark.slow
def test_fits_are_trained_together_or_each_alone(shell, yaml, tmp_path):
    """Together by themselves; --together says how many at most."""
    grid = yaml("runs: [{heads: random, draws: 3}]")
    for options, sizes in (((), [3, 3, 3]), (("--together", 1), [1, 1, 1]), (("--together", 2), [1, 2, 2])):
        assert shell(grid, "--store", tmp_path / f"s{len(sizes)}{options}", "--quiet", *options)[0] == 0
        store = Store(tmp_path / f"s{len(sizes)}{options}")
        assert sorted(len(store.timing(name).get("together", [name])) for name in store.names()) == sizes


def test_bad_input(shell, yaml, tmp_path, hub):
    """One line on stderr that says what to do, exit code 2, no store."""
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "store.json").write_text('{"kind": "lofit_lens.store", "schema": 99}')
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    good = yaml("runs: [{method: zero-shot}]", "good.yaml")
    for args, message in (
        ((), "give a grid's name"),
        (("organism/fig7",), "unknown grid 'organism/fig7'"),
        ((tmp_path / "no.yaml",), "cannot read"),
        ((yaml("runs: [{settings: {lrr: 1}}]", "a.yaml"),), "no field 'lrr'; did you mean 'lr'?"),
        (
            (yaml("runs: [{}]\nselections: {a: {by: A-norm, among: b}, b: {by: A-norm, among: a}}", "b.yaml"),),
            "a among b among a",
        ),
        ((yaml("runs: [{n_train: 99}]", "c.yaml"),), "99 training examples asked for"),
        ((yaml("runs: [{k: 99}]", "d.yaml"),), "99"),
        ((good, "--executor", "slurm"), "unknown executor 'slurm'; allowed: local, ray"),
        ((good, "--devices", "cuda:7"), "no device cuda:7"),
        ((good, "--track", "mlflow"), "unknown tracker 'mlflow'"),
        ((good, "--store", newer), "schema 99; this version reads 1 to 1: update lofit-lens"),
        ((good, "--store", full), "no store.json"),
        ((good, "--model", "nobody/nothing"), "unknown model 'nobody/nothing'"),
        ((good, "--task", "nix"), "unknown task 'nix'"),
    ):
        code, said, error = shell(*args, *(() if "--store" in args else ("--store", tmp_path / "s")))
        assert code == 2, (args, said)
        assert message in error, (args, error)
        assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()
    assert [p.name for p in full.iterdir()] == ["thesis.tex"]


def test_known_grids_are_listed(shell):
    """Names of the paper's and of the embedded model's."""
    said = shell("--list")[1]
    assert "paper/fig2" in said
    assert "organism/all" in said


def test_a_ray_task_takes_the_gpu_that_it_is_given():
    """By its place among those that the process sees; the CPU without one."""
    assert _device([], "0,1") == "cpu"
    assert _device([2], None) == "cuda:2"
    assert _device(["5"], "4,5,6") == "cuda:1"
    assert _device([3], "3") == "cuda:0"
