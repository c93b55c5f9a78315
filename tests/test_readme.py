"""The README's Python blocks run as they stand."""

import re
from collections import Counter
from pathlib import Path

import pytest

from lofit_lens.experiments.grid import plan_grid

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    """A first use, measuring, other methods, head sets, a grid, many runs, sharing, a task of one's own."""
    assert len(BLOCKS) == 8


def test_readme_grid_is_one(tmp_path):
    """The YAML file can be planned: its runs, and the selections and trials that they share."""
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "grid.yaml").write_text(text)
    cells = plan_grid(tmp_path / "grid.yaml").cells
    kinds = Counter(cell.row["kind"] for cell in cells)
    assert kinds == {"scores": 8, "trial": 8, "fit": 2 + 2 * 2 * 2 * 3 + 2 * 2 + 2 * 5 + 2 * 2 * 2 + 2 * 2}


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split("\n")[2][:30])
def test_readme_example_runs(block, tmp_path, monkeypatch, capsys):
    """No line is left out, nothing is assumed."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    if "after = " in block:
        printed = capsys.readouterr().out
        before, after = (float(m) for m in re.findall(r"em (\d\.\d+)", printed))
        assert after > before + 0.5
        assert (tmp_path / "out/kinship/adapter_model.safetensors").exists()
