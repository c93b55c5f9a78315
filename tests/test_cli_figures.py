"""The verbs figures, transfer and report: what they write from a study's folder, and exit code 2 for bad input."""

import json
import shutil

import pytest

from lofit_lens.cli import common
from lofit_lens.experiments.store.store import Store
from tests import studies
from tests.test_cli import run as run_cli


@pytest.fixture
def shell(capsys, monkeypatch):
    monkeypatch.setattr(common.console, "stderr", False)
    return lambda *args: run_cli(capsys, monkeypatch, *args)


def test_figures_of_a_study(shell, study_folder, tmp_path):
    """All files stand in the folder; the shell says how many of each kind."""
    code, said, _ = shell("figures", study_folder, "--out", tmp_path / "figures", "--formats", "html")
    assert code == 0
    assert {"fig2_transfer.html", "fig2_transfer.csv", "table1.md"} <= {
        p.name for p in (tmp_path / "figures").iterdir()
    }
    assert f"{len(list((tmp_path / 'figures').glob('*.html')))} html" in said


@pytest.mark.data
def test_figures_of_official_heads_alone(shell, data_dir, tmp_path):
    """No study is needed for the official code's head files."""
    heads = data_dir / "official_heads"
    code, _, _ = shell("figures", "--heads", heads, "--out", tmp_path / "figures", "--formats", "html")
    assert code == 0
    assert len(list((tmp_path / "figures").glob("official_*.html"))) == 6


def test_bad_input(shell, study_folder, tmp_path):
    """One line on stderr that says what to do, exit code 2, nothing written."""
    for args, message in (
        (("figures",), "give the folder of a study"),
        (("figures", tmp_path), "holds no study"),
        (("figures", study_folder, "--formats", "gif"), "unknown format 'gif'"),
        (("figures", "--heads", tmp_path), "holds no official head files"),
        (("figures", tmp_path / "s", "--run", "--part", "heads"), "unknown part 'heads'"),
        (("report", tmp_path), "holds no study"),
        (("figures", tmp_path / "s", "--run", "--formats", "gif"), "unknown format 'gif'"),
        (("figures", tmp_path / "s", "--run", "--heads", tmp_path), "holds no official head files"),
        (("transfer", "--task", "organism/truth", "--out", tmp_path / "t"), "needs two or more"),
        (("transfer", "--task", "organism/truth", "--task", "nix", "--out", tmp_path / "t"), "unknown task 'nix'"),
    ):
        code, said, error = shell(
            *args, *(() if "--out" in args or args[0] != "figures" else ("--out", tmp_path / "out"))
        )
        assert code == 2, said
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_report_is_written_once(shell, study_folder, tmp_path):
    """One page under 2 MB with every head set of the study; a second time only with --overwrite."""
    page = tmp_path / "report.html"
    assert shell("report", study_folder, "-o", page)[0] == 0
    assert page.stat().st_size < 2e6
    text = page.read_text()
    assert "kin, A-norm, seed 1" in text
    assert "place, probe accuracy, seed 0" in text
    code, _, error = shell("report", study_folder, "-o", page)
    assert code == 2
    assert "--overwrite" in error
    assert shell("report", study_folder, "-o", page, "--overwrite")[0] == 0


def test_transfer_prints_the_matrix(shell, study_folder, checkpoint, tmp_path, monkeypatch):
    """The runs that are there are read: a row a source of heads, random ones last, and the matrix as JSON."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    Store(copy).write_grid("transfer fig2", Store(copy).grids()["small"])
    monkeypatch.setattr("lofit_lens.cli.studies.run", lambda asked, name: None)
    code, said, _ = shell("transfer", "--out", copy, "--json")
    assert code == 0
    found = json.loads(said)
    assert {(c["task"], c["source"]) for c in found["cells"]} == {
        (t.name, s) for t in studies.TASKS for s in ("kin", "place", "random")
    }
    assert (copy / "transfer.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["fig3", "stability"])
def test_parts_without_runs_are_drawn(shell, tmp_path, part):
    """Head scores alone have no adapter to read; their figures stand all the same, and so does the report."""
    asked = ("--run", "--task", "organism/kinship", "--part", part, "--seeds", 1, "--formats", "html", "--quiet")
    code, _, error = shell("figures", tmp_path / "s", *asked, "--out", tmp_path / "figures")
    assert code == 0, error
    drawn = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"head_grid.html", "fig3_layers.html"} <= drawn
    assert ("stability.html" in drawn) == (part == "stability")
    assert shell("report", tmp_path / "s", "-o", tmp_path / "report.html")[0] == 0
