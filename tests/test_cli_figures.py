"""The verbs figures, transfer, report and explore: what they write from a study's folder, and exit code 2 for bad input."""

import json
import shutil

import numpy as np
import pytest

from lofit_lens.cli import common
from lofit_lens.experiments.store.store import Store
from lofit_lens.heads import HeadScores, HeadSet
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
        (("transfer", "--task", "organism/truth", "--out", tmp_path / "t"), "needs at least two"),
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


@pytest.fixture
def browser(monkeypatch):
    """Addresses that a browser has opened."""
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address))
    return opened


def head_files(folder):
    """Scores as `select` writes them, a head set of the same model, and an official file."""
    scores = HeadScores(np.arange(12.0).reshape(3, 4), "A-norm", "tiny", "kin")
    common.write_heads(folder / "heads", scores, 2, overwrite=False)
    HeadSet(["L0H1", "L2H3"], shape=(3, 4)).save(folder / "mine.json")
    np.save(folder / "theirs.npy", np.array([[2, 3], [1, 0]]))
    return [folder / name for name in ("heads", "mine.json", "theirs.npy")]


def test_explore_opens_a_page(shell, study_folder, tmp_path, browser, monkeypatch):
    """Of a folder of results, or of head files under the names given; the browser opens it, unless told not to."""
    page = tmp_path / "a b.html"
    assert shell("explore", study_folder, "-o", page)[0] == 0
    assert browser == [page.resolve().as_uri()]
    assert "kin, A-norm, seed 1" in page.read_text()
    files = head_files(tmp_path)
    code, said, _ = shell("explore", *files, "-o", tmp_path / "files.html", "--no-open")
    assert (code, len(browser)) == (0, 1)
    assert "no browser" not in said
    assert all(str(file) in (tmp_path / "files.html").read_text() for file in files)
    code, _, error = shell("explore", *files, "-o", page)
    assert (code, "--overwrite" in error) == (2, True)
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    code, said, _ = shell("explore", *files, "-o", page, "--overwrite")
    assert (code, "no browser was found" in said) == (0, True)


def test_what_cannot_be_explored(shell, study_folder, tmp_path, browser):
    """Nothing there, a folder of something else, a mixture, a file without heads, a grid of head files: one line each."""
    files = head_files(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for args, message in (
        (["nowhere"], "nowhere does not exist"), ([tmp_path / "empty"], "holds no"), ([tmp_path / "x.json"], "is not a"),
        ([study_folder, files[0]], "is not a head file; give either one folder of results"),
        ([*files, "--grid", "small"], "--grid names a grid in a folder of results"),
    ):  # fmt: skip
        code, _, error = shell("explore", *args, "-o", tmp_path / "page.html")
        assert code == 2, error
        assert message in error
        assert error.count("\n") == 1
    assert not browser
    assert not (tmp_path / "page.html").exists()


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
