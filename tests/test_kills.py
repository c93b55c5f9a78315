"""SIGKILL at random moments: the finished grid is the same bytes as an undisturbed one (`benchmarks/kills.py`: 50 of them)."""

import json

import pytest

from benchmarks.kills import files_of, kill_often, run_once
from lofit_lens.experiments.store.checks import collect_garbage, verify
from lofit_lens.experiments.store.store import Store
from tests import tiny
from tests.studies import NAMES

pytest.importorskip("psutil")


def grid_in(folder):
    """A grid of 20 cells on a tiny model, as files, and as many test rows as make a cell last a while."""
    model = tiny.save(folder / "model", "llama")
    task = folder / "places"
    task.mkdir()
    rows = [{"prompt": f"the place of {n} is", "answer": (" Rome", " France")[i % 2]} for i, n in enumerate(NAMES)]
    for split, repeats in (("train", 4), ("val", 1), ("test", 10)):
        (task / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows * repeats))
    path = folder / "grid.yaml"
    path.write_text(
        f"name: kills\nmodel: {{name: {model}, backend: bridge}}\ntasks: {task}\nscores: [gradient attribution]\n"
        "runs: [{method: zero-shot}, {k: [1, 2, 3]}, {heads: random, draws: 4}, {method: [RED, LoReFT, ITI]}]\n"
    )
    return path


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
    """Three lives that end by SIGKILL, then one to the end; no half-written folder is ever read as done."""
    grid = grid_in(tmp_path)
    assert run_once(str(grid), tmp_path / "whole", ["--workers", "1"]).wait() == 0
    found = kill_often(str(grid), tmp_path / "killed", kills=3, life=1.5, options=["--workers", "2"])
    assert found["kills"] >= 2
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    store = Store(tmp_path / "killed")
    assert verify(store) == []
    assert store.names() == Store(tmp_path / "whole").names()
    collect_garbage(store, dry_run=False)
    assert not any((store.root / "drafts").iterdir())
    assert all(p.suffix == ".tmp" for p in (store.root / "states").iterdir()), "a checkpoint of a finished run"
