"""The README's Python blocks run as they stand, and what it says of the first one is what it prints."""

import re
from pathlib import Path

import pytest

from tests.fences import blocks, plain

README = Path(__file__).parents[1] / "README.md"
BLOCKS = [b.text for b in blocks(README) if b.language == "python"]


def test_the_table_is_what_the_figures_say():
    """Each row of methods stands so in the tables that `make figures` draws."""
    root = README.parent
    drawn = [line for n in (1, 3) for line in (root / f"figures/table{n}.md").read_text(encoding="utf-8").splitlines()]
    rows = plain(README).split("| method | parameters |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) == 9
    assert set(rows) <= set(drawn)


def test_the_first_example_is_short():
    """Twelve lines, an empty one after the import aside."""
    assert sum(bool(line) for line in BLOCKS[0].splitlines()) <= 12


def test_the_first_example_shows_what_is_said(tmp_path, monkeypatch, capsys):
    """No line is left out, nothing is assumed: exact match before and after, and no head that the probes choose."""
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), said := {})
    printed = capsys.readouterr().out
    text = " ".join(plain(README).split())
    before, after = map(float, re.search(r"rises from (\d\.\d+) to (\d\.\d+)", text).groups())
    assert said["before"].main == pytest.approx(before, abs=0.02)
    assert said["after"].main == pytest.approx(after, abs=0.02)
    assert f"on {said['after'].metrics['em'].n} test rows" in text
    assert f"with {said['lofit'].n_parameters} learned numbers" in text
    assert not said["heads"] & said["iti"]
    assert re.search(r"^shared +0$", printed, re.MULTILINE)


@pytest.mark.slow
def test_the_explorer_example_runs(tmp_path, monkeypatch, capsys):
    """Shared heads of three are in both sets."""
    pytest.importorskip("anywidget", reason="the explorer's view needs anywidget")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[1], "README.md", "exec"), said := {})
    capsys.readouterr()
    assert [len(heads) for heads in said["ex"].sets.values()] == [3, 3]
