"""docs/findings.md is what its script makes of the committed tables, and verdicts follow the rules that it states."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import findings_page as page  # noqa: E402

WRITTEN = (ROOT / "docs/findings.md").read_text(encoding="utf-8")


def test_the_page_is_made_from_the_tables():
    """Word for word, so that no number can be changed by hand."""
    assert page.page(ROOT) == WRITTEN


def test_a_changed_table_changes_the_page(tmp_path):
    """One number of a table, and the page made from it is another one."""
    for folder in page.STUDIES.values():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file in (ROOT / folder).glob("*.csv"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
        for file in (ROOT / folder).glob("*-localisation.json"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    assert page.page(tmp_path) == WRITTEN
    table = tmp_path / "figures/table1.csv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = [re.sub(r"(0\.\d+)", "0.123456", line, count=1) if line.startswith("ITI") else line for line in lines]
    table.write_text("".join(changed), encoding="utf-8")
    assert ".12 [" in page.page(tmp_path)
    assert page.page(tmp_path) != WRITTEN


@pytest.mark.parametrize(
    ("verdict", "difference", "low", "high", "p", "expected"),
    [
        (page.better, 0.2, 0.1, 0.3, 0.001, page.HOLDS),
        (page.better, 0.2, -0.1, 0.5, 0.2, page.OPEN),
        (page.better, -0.2, -0.3, -0.1, 0.001, page.FAILS),
        (page.better, 0.0, -0.04, 0.04, 0.9, page.FAILS),
        (page.as_well, 0.0, -0.04, 0.04, 0.9, page.HOLDS),
        (page.as_well, -0.02, -0.04, -0.01, 0.01, page.HOLDS),
        (page.as_well, -0.1, -0.2, 0.0, 0.04, page.FAILS),
        (page.as_well, -0.1, -0.2, 0.1, 0.3, page.OPEN),
    ],
)
def test_verdicts_follow_the_rules(verdict, difference, low, high, p, expected):
    """Each rule, on either side of its border."""
    assert verdict(difference, low, high, p) == expected
