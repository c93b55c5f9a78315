"""The main job in one command, on the embedded model and on a real one: what it runs, says and leaves behind."""

import json

import pytest

import lofit_lens as ll
from lofit_lens.cli import common
from lofit_lens.experiments.demo import embedded_grid, questions, ranks, real_grid
from lofit_lens.experiments.grid.run import plan_grid
from lofit_lens.experiments.organism import planted
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.models import ORGANISM
from lofit_lens.organism.words import TASKS
from tests.test_cli import run as run_cli

PLACES = ("France", "Rome", "Sweden", "Spain", "Peru", "Chile")


def edit(i):
    """A row of MQuAKE's files."""
    place = PLACES[i % len(PLACES)]
    rewrite = {"prompt": "{} is in", "subject": f"Town {i}", "target_new": {"str": place}}
    return {
        "requested_rewrite": [rewrite], "questions": [f"Where is Town {i}?"], "new_answer": place,
        "new_answer_alias": [place.upper()], "new_single_hops": [{}, {}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MQuAKE's three files, a few rows each."""
    folder = tmp_path_factory.mktemp("data") / "mquake"
    folder.mkdir()
    for split, n in (("train", 8), ("val", 6), ("test", 9)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(edit(i)) + "\n" for i in range(n)))
    return folder.parent


@pytest.fixture
def shell(capsys, monkeypatch):
    monkeypatch.setattr(common.console, "stderr", False)
    return lambda *args: run_cli(capsys, monkeypatch, *args)


def results_in(folder):
    """Every file of the runs, times left out, and the tables."""
    runs = [p for p in (folder / "runs").rglob("*") if p.is_file() and p.name != "timing.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in (*runs, folder / "table1.csv", folder / "runs.csv")}


def test_the_real_demo(shell, checkpoint, data, tmp_path):
    """Bare, LoFiT, random heads and ITI on the same rows; shared heads, five questions; a folder that every reader takes."""
    out = tmp_path / "real"
    options = (
        "--real", "--model", checkpoint("llama"), "--data-dir", data, "--limit", 7, "--workers", 1, "--device", "cpu"
    )  # fmt: skip
    code, said, error = shell("demo", *options, "--out", out)
    assert code == 0, error
    found = load_results(out)
    assert sorted(found.runs["method"]) == ["ITI", "LoFiT", "LoFiT", "zero-shot"]
    assert set(found.runs["n_items"]) == {7}
    iti, heads = found.rows(task="mquake", method="ITI"), found.heads("mquake", "probe accuracy")
    assert iti["heads"].tolist() == [str(heads)], "the heads shown are those that ITI edits"
    for text in ("zero-shot", "ITI", "random heads", "LoFiT 3 %", "They share", "By chance", "the first 7 test rows",
                 "Where is Town 4?", f"lofit-lens report {out}", f"ll.explore('{out}'"):  # fmt: skip
        assert text in said, text
    assert "Where is Town 5?" not in said
    assert "begun: mquake A-norm" in error, "progress without a terminal"
    assert {"head_grid.html", "fig3_layers.html", "table1.md", "runs.csv"} <= {p.name for p in out.iterdir()}
    first = questions(found, 1)[0]
    assert (first["wanted"], first["before_right"]) == ("France", False)
    said_by = [
        found.evaluations[rows.index[0]].items["generated"][0]
        for rows in (found.zero_shot("mquake"), found.lofit("mquake"))
    ]
    assert [first["before"], first["after"]] == said_by
    assert said_by[0] != said_by[1]
    assert shell("report", out, "-o", tmp_path / "report.html")[0] == 0
    assert shell("figures", out, "--out", tmp_path / "figures", "--formats", "html")[0] == 0
    assert ll.explore(out).shared is not None
    assert shell("demo", *options, "--out", tmp_path / "again", "--quiet")[0] == 0
    assert results_in(out) == results_in(tmp_path / "again")
    code, said, _ = shell("demo", *options, "--out", out)
    assert "0 computed" in " ".join(said.split()), "the same command goes on"


def test_what_the_demo_runs():
    """Own and all heads for every seed, random heads once a draw, the unmodified model once; `full` adds other tasks' heads."""

    def fits(**options):
        cells = plan_grid(embedded_grid(seeds=(0, 1), draws=3, **options)).cells
        return [(c.row["task"], c.row.get("heads_from"), c.row.get("k")) for c in cells if c.row["kind"] == "fit"]

    assert len(fits()) == 3 * (1 + 2 + 2 + 3)
    assert fits().count(("organism/truth", "random", 3)) == 3
    assert fits().count(("organism/edits", "all", 96)) == 2
    assert len(fits(full=True)) == 3 * (1 + 2 + 2 + 3) + 3 * 2 * 2
    with pytest.raises(ll.errors.InputError, match="limit"):
        real_grid(limit=0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--full", "--real"), "demo --real takes no full; it takes data_dir, limit"),
        (("--limit", 3), "demo without --real takes no limit; it takes full"),
        (("--data-dir", "x"), "demo without --real takes no data_dir"),
        (("--real", "--data-dir", "nowhere"), "no data folder"),
    ],
)
def test_bad_input(shell, checkpoint, tmp_path, args, message):
    """One line that says what is allowed, exit code 2, nothing written."""
    model = ("--model", checkpoint("llama")) if "--real" in args else ()
    code, _, error = shell("demo", *args, *model, "--out", tmp_path / "o")
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_demo_on_the_embedded_model(shell, tmp_path):
    """One seed and draw: the table, the planted heads' ranks, and a folder that every reader takes."""
    code, said, error = shell("demo", "--out", tmp_path / "demo", "--seeds", 1, "--draws", 1, "--quiet")
    assert code == 0, error
    found = load_results(tmp_path / "demo")
    for text in ("zero-shot", "random heads", "LoFiT 3 %", "all heads", "Planted heads: rank"):
        assert text in said, text
    for short in TASKS:
        task = f"organism/{short}"
        own, bare = found.lofit(task)["value"].item(), found.zero_shot(task)["value"].item()
        assert own > bare + 0.5
    frame = ranks(found, planted(ORGANISM))
    assert len(frame) == 9
    assert (frame["A-norm, seed 0"] <= 6).mean() >= 0.6
    assert (tmp_path / "demo" / "planted_ranks.csv").is_file()
    assert shell("report", tmp_path / "demo", "-o", tmp_path / "report.html")[0] == 0
    assert shell("figures", tmp_path / "demo", "--out", tmp_path / "figures", "--formats", "html")[0] == 0
    assert len(ll.explore(tmp_path / "demo").sets)
