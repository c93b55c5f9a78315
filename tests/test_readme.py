"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), re.DOTALL
)


def test_there_are_examples():
    """A first use, measuring, other methods, head sets, a task of one's own."""
    assert len(BLOCKS) == 5


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split("\n")[2][:30])
def test_readme_example_runs(block, tmp_path, monkeypatch, capsys):
    """No line is left out, nothing is assumed."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    if "save_pretrained" in block:
        printed = capsys.readouterr().out
        before, after = (float(m) for m in re.findall(r"em (\d\.\d+)", printed))
        assert after > before + 0.5
        assert (tmp_path / "out/kinship/adapter_model.safetensors").exists()
