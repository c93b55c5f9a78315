"""All figures and tables of a study: which are drawn, from which runs, what is written, and what a lacking part leads to."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from lofit_lens import HeadSet
from lofit_lens.analysis.overlap import overlap
from lofit_lens.analysis.resampling import paired_test_of_means
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.stats import bootstrap_interval_over_seeds
from lofit_lens.experiments.grid.paper import PARTS, SCORES_ALONE, paper_grid
from lofit_lens.experiments.grid.run import run_grid
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.experiments.tables.paper_tables import paper_tables
from lofit_lens.plots import methods as method_plots
from lofit_lens.plots import saving
from lofit_lens.plots.methods import method_bars
from lofit_lens.plots.saving import save_figure
from lofit_lens.report.figures import draw_all, figures, transfer
from lofit_lens.report.official import official_figures, official_sets
from lofit_lens.report.page import render
from lofit_lens.tasks import Task
from tests import studies

KIN, PLACE = (t.name for t in studies.TASKS)
READ = (
    "tokens",
    "cosines",
    "leave_one_out",
    "keep_only",
    "removal",
    "drift",
    "drift_positions",
    "attention",
    "long_context",
)


@pytest.fixture(scope="module")
def results(study_folder):
    return load_results(study_folder)


@pytest.fixture(scope="module")
def drawn(results):
    return {d.name: d for d in figures(results)}


def test_every_part_has_its_figure(drawn):
    """Nothing is left out of a study of all parts."""
    assert {
        "head_grid", "fig3_layers", "overlap_tasks", "overlap_selectors", "agreement_probe_accuracy", "stability",
        "fig2_transfer", "fig5_heads", "fig4_data_kin", "fig4_data_place", "methods", "interference", "learned_in_turn",
        *(f"{name}_{t}" for t in (KIN, PLACE) for name in READ),
    } <= set(drawn)  # fmt: skip
    small = {n: " ".join(a.text for a in drawn[n].figure.layout.annotations).replace("<br>", " ") for n in drawn}
    for name in ("head_grid", "fig3_layers", "overlap_tasks", "agreement_probe_accuracy"):
        assert "seed 0" in small[name], name
    for name in ("head_grid", "fig3_layers", "fig2_transfer", "fig4_data_kin"):
        assert "K=" in small[name], name
    for name in (f"{part}_{t}" for part in READ for t in (KIN, PLACE)):
        assert "seed 0" in small[name], name
        assert "K=" in small[name] or name.startswith("attention"), name
    assert "LoFiT: K=" in small["interference"]
    for d in drawn.values():
        assert len(d.data), d.name
        assert d.figure.layout.title.text, d.name


def test_transfer_is_of_the_right_runs(results):
    """Cell (kin, heads of place) holds kin's runs with place's heads, relative to kin's own; the last row the random heads."""
    found = transfer(results)
    cells = found.frame.set_index(["task", "source"])
    own = results.values(results.lofit(KIN)).mean()
    crossed = results.values(results.lofit(KIN, source=PLACE)).mean()
    assert cells.loc[(KIN, PLACE), "accuracy"] == pytest.approx(crossed)
    assert cells.loc[(KIN, KIN), "accuracy"] == pytest.approx(own)
    if own:
        assert cells.loc[(KIN, PLACE), "relative"] == pytest.approx(100 * crossed / own)
    assert cells.loc[(PLACE, "random"), "accuracy"] == pytest.approx(results.values(results.by_chance(PLACE)).mean())
    assert list(cells.loc[KIN].index)[-1] == "random"
    assert cells.loc[(KIN, PLACE), "n_seeds"] == 2


def test_sweeps_are_of_the_right_runs(results, drawn):
    """K: one point a number of heads with its interval over seeds and items. Data: all rows stand at their own number."""
    k = drawn["fig5_heads"].data
    rows = k[k["series"] == f"{KIN} (EM)"].set_index("x")
    assert set(rows.index) == {1.0, 2.0, 3.0}, "the plan's 1 and 2, K = 1, three times K"
    values = results.values(results.lofit(KIN, k=2))
    assert rows.loc[2.0, "mean"] == pytest.approx(values.mean())
    low, high = bootstrap_interval_over_seeds(values, binary=True)
    assert (rows.loc[2.0, "low"], rows.loc[2.0, "high"]) == (low, high)
    most = results.values(results.lofit(KIN, k=3))
    assert rows.loc[2.0, "difference"] == pytest.approx(values.mean() - most.mean())
    assert rows.loc[2.0, "p"] == paired_test_of_means(values, most).p
    assert np.isnan(rows.loc[3.0, "difference"]), "the reference itself"
    data = drawn["fig4_data_kin"].data
    assert {(r.series, r.x) for r in data.itertuples()} == {
        ("zero-shot", 0.0), ("LoFiT", 4.0), ("LoFiT", 8.0), ("RED", 4.0), ("RED", 8.0)
    }  # fmt: skip
    red = results.values(results.rows(task=KIN, method="RED", n_train=4.0))
    at = data.set_index(["series", "x"])
    assert at.loc[("RED", 4.0), "mean"] == pytest.approx(red.mean())


def test_tables_hold_the_differences_they_mark(results):
    """The numbers of Table 1 beside its marks: a row minus the reference with interval and adjusted p, as the method table's."""
    frame = next(t for t in paper_tables(results) if t.name == "table1").frame.set_index(["task", "method"])
    table = results.method_table(KIN)
    assert table is not None
    for row in table.rows:
        if (KIN, row.method) in frame.index:
            found = frame.loc[(KIN, row.method)]
            if row.against is None:
                assert np.isnan(found["difference"])
                continue
            test = row.against[table.metric]
            assert (found["difference"], found["p_holm"]) == (test.difference, row.p_holm)
            assert (found["low_of_difference"], found["high_of_difference"]) == test.interval


def test_head_sets_are_those_of_the_first_seed(results, drawn):
    """Overlap and layers are of the heads that step 1 chose with seed 0."""
    sets = {t: results.scores[t, "A-norm", 0].top(results.k(t)) for t in results.tasks}
    pd.testing.assert_frame_equal(drawn["overlap_tasks"].data, overlap(sets))
    grid = drawn["head_grid"].data
    chosen = grid[grid["chosen"] & (grid["task"] == KIN)]
    assert list(zip(chosen["layer"], chosen["head"], strict=True)) == [tuple(h) for h in sets[KIN]]
    assert len(grid) == 2 * 12
    stability = drawn["stability"].data
    assert set(stability["task"]) == {KIN, PLACE}
    assert set(stability["n_runs"]) == {3}, "two seeds and the extra one"


@pytest.mark.slow
def test_files_are_the_same_every_time(results, tmp_path):
    """Figures as HTML, data as CSV, tables as Markdown, LaTeX and CSV; a second drawing gives the same data, byte for byte."""
    first = draw_all(results, tmp_path / "a", formats=["html"])
    again = draw_all(load_results(results.folder), tmp_path / "b", formats=["html"])
    assert [p.name for p in first] == [p.name for p in again]
    names = {p.name for p in first}
    assert {"table1.md", "table1.tex", "table1.csv", "fig2_transfer.html", "fig2_transfer.csv", "methods.csv"} <= names
    assert all(p.is_file() for p in first)
    for one, other in zip(first, again, strict=True):
        if one.suffix != ".html":
            assert one.read_bytes() == other.read_bytes(), one.name
    page = (tmp_path / "a" / "fig2_transfer.html").read_text()
    assert "https://" not in page.replace("https://plotly.com", "")
    assert 'src="plotly.min.js"' in page
    assert (tmp_path / "a" / "plotly.min.js").stat().st_size > 1_000_000
    assert len(page) < 1_000_000, "the folder's pages share plotly.js"


def test_a_lacking_part_is_said_and_the_rest_is_drawn(study_folder, tmp_path, caplog):
    """Without the transfer runs there is no Figure 2; the log says why, and the other figures stand."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    results = load_results(copy)
    for i in results.lofit(KIN, source=PLACE).index:
        shutil.rmtree(results.folders[i])
    names = {d.name for d in figures(load_results(copy))}
    assert "fig2_transfer" not in names
    assert {"fig3_layers", "fig5_heads", "methods"} <= names
    assert any(
        m.startswith("Figure 2 (transfer of heads between tasks): left out, ") and "no such run" in m
        for m in caplog.messages
    )


def test_damaged_results_stop_it(study_folder, tmp_path):
    """A run whose items are cut off is named; no figure is drawn without it."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    folder = load_results(copy).folders[0]
    items = folder / "items.jsonl"
    items.write_text("\n".join(items.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(DataError, match=r"items\.jsonl"):
        load_results(copy)
    (folder / "run.json").write_text(json.dumps({"kind": "something else"}))
    with pytest.raises(DataError, match=r"not a lofit_lens\.run record"):
        load_results(copy)


@pytest.mark.data
def test_official_heads(data_dir):
    """Llama-2-7B at K = 32 and Gemma-7B at K = 16: the overlaps and mean layers of the facts, and three figures a model."""
    sets = official_sets(data_dir / "official_heads")
    assert {m: list(s) for m, s in sets.items()} == {m: ["TruthfulQA", "MQuAKE", "CLUTRR"] for m in sets}
    drawn = {d.name: d for d in official_figures(data_dir / "official_heads")}
    assert len(drawn) == 6
    for model, shared, layers in (
        ("llama2-7b", (6, 4, 5), (12.6, 9.0, 10.3)), ("gemma-7b", (4, 7, 8), (15.6, 10.5, 10.8))
    ):  # fmt: skip
        assert tuple(drawn[f"official_{model}_overlap"].data["shared"]) == shared
        means = drawn[f"official_{model}_fig3_layers"].data.drop_duplicates("set")["mean_layer"]
        assert tuple(round(x, 1) for x in means) == layers


def test_official_heads_elsewhere(tmp_path):
    """A folder without such files says how they are named; others' files are passed over."""
    with pytest.raises(DataError, match="holds no official head files"):
        official_sets(tmp_path)
    np.save(tmp_path / "mistral_mquake_Aonly_top2heads_42.npy", np.array([[0, 1], [1, 0]]))
    with pytest.raises(DataError, match="holds no official head files"):
        official_sets(tmp_path)
    np.save(tmp_path / "llama2-7b-chat_mquake_Aonly_top2heads_42.npy", np.array([[0, 1], [1, 0]]))
    with pytest.raises(DataError, match="holds no official head files"):
        official_sets(tmp_path)
    np.save(tmp_path / "llama2-7b-base_mquake_Aonly_top2heads_42.npy", np.array([[0, 1], [31, 0]]))
    assert official_sets(tmp_path) == {
        "llama2-7b": {"MQuAKE": HeadSet(["L0H1", "L31H0"], shape=(32, 32), label="mquake")}
    }
    np.save(tmp_path / "llama2-7b-base_mquake_Aonly_top2heads_7.npy", np.array([[0, 1], [1, 0]]))
    with pytest.raises(DataError, match="several head files of llama2-7b on mquake"):
        official_sets(tmp_path)


# ----------------------------------------------------------------------------------------------------- methods


def rows(**changes):
    row = {"task": "a", "metric": "em", "method": "LoFiT 3 %", "mean": 0.5, "low": 0.4, "high": 0.7, "n_items": 9, "seeds": 2,
           "n_parameters": 24}  # fmt: skip
    return {**row, **changes}


def test_method_bars_draw_means_and_intervals():
    """One panel a task, first method on top; error bars reach from low to high; axes say unit and n."""
    frame = pd.DataFrame(
        [rows(), rows(method="ITI", mean=0.25, low=0.25, high=0.5), rows(task="b"), rows(task="b", method="ITI")]
    )
    fig = method_bars(frame)
    first = fig.data[0]
    assert list(first.x) == [50.0, 25.0]
    assert list(first.y) == ["LoFiT 3 %", "ITI"]
    assert list(first.error_x.array) == pytest.approx([20.0, 25.0])
    assert list(first.error_x.arrayminus) == pytest.approx([10.0, 0.0])
    assert list(fig.layout.yaxis.categoryarray) == ["LoFiT 3 %", "ITI"]
    assert fig.layout.yaxis.autorange == "reversed", "from the top down"
    assert [a.text for a in fig.layout.annotations][:2] == ["a (EM, n=9)", "b (EM, n=9)"]
    assert "95% interval" in fig.layout.annotations[-1].text
    assert "per method: 2 runs;" in fig.layout.annotations[-1].text
    assert first.marker.color[0] != first.marker.color[1], "LoFiT stands out"
    with pytest.raises(InputError, match="1 methods to draw"):
        method_bars(frame[frame["method"] == "ITI"])
    with pytest.raises(InputError, match="lacks the column 'low'"):
        method_bars(frame.drop(columns="low"))
    assert method_plots.NEEDED[0] == "task"


# ------------------------------------------------------------------------------------------------- save_figure


def test_without_chrome_the_page_is_written_and_the_rest_is_said(tmp_path, monkeypatch, caplog):
    """The front of a name: HTML and data stand, a warning says how to get PNG. A PNG by name: an error."""

    def nothing(*args, **options):
        raise RuntimeError("Kaleido requires Google Chrome")

    monkeypatch.setattr(saving.go.Figure, "to_image", nothing)
    fig = saving.go.Figure(saving.go.Scatter(x=[1, 2], y=[3, 4]))
    files = save_figure(fig, tmp_path / "fig")
    assert [f.name for f in files] == ["fig.html", "fig.json"]
    assert json.loads(files[1].read_text())[0]["y"] == [3, 4]
    assert any("Chrome or Chromium" in m for m in caplog.messages)
    with pytest.raises(InputError, match="Chrome or Chromium"):
        save_figure(fig, tmp_path / "fig.png")


def test_formats_and_data_beside_a_figure(tmp_path, monkeypatch):
    """Only the formats asked for, the table as CSV; unknown ones are refused before anything is written."""

    def drawn(self, format, scale=1):
        return b'<svg width="96" height="48">' if format == "svg" else f"{format} {scale}".encode()

    monkeypatch.setattr(saving.go.Figure, "to_image", drawn)
    monkeypatch.setattr(saving, "_printed", lambda svg: b"%PDF")
    fig, data = saving.go.Figure(saving.go.Scatter(x=[1], y=[2])), pd.DataFrame({"x": [1], "y": [2.5]})
    files = save_figure(fig, tmp_path / "fig", data=data, formats=["svg", "png"])
    assert [f.name for f in files] == ["fig.png", "fig.svg", "fig.csv"]
    assert files[0].read_bytes() == b"png 2"
    assert files[2].read_text() == "x,y\n1,2.5\n"
    with pytest.raises(InputError, match="unknown format 'gif'"):
        save_figure(fig, tmp_path / "new" / "fig", formats=["html", "gif"])
    assert not (tmp_path / "new").exists()
    assert [f.name for f in save_figure(fig, tmp_path / "one.pdf", data=data)] == ["one.pdf", "one.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_alone_can_be_drawn(bridge_llama, tmp_path, part):
    """What `figures --run --part` does: the part's grid, what is read of its adapters (where it has any), figures and report."""
    rows = [{"prompt": f"kin of {i} is", "answer": (" son", " aunt")[i % 2]} for i in range(44)]
    kin = Task.from_records("kin", train=rows, val=rows[:4], test=rows[:4], max_new_tokens=1)  # figure 4 draws 40 rows
    others = [studies.OTHER] if part == "table5" else []
    grid = paper_grid(
        [part], name=part, model="in memory", tasks=[kin.name], other_tasks=[t.name for t in others], seeds=(0,), draws=1,
        limit=2, readings=True,
    )  # fmt: skip
    run_grid(grid, tmp_path, model=bridge_llama, tasks=[kin], other_tasks=others, progress=False)
    results = load_results(tmp_path)
    assert set(results.readings()) == (set() if part in SCORES_ALONE else {"kin"})
    drawn = {p.name for p in draw_all(results, tmp_path / "figures", formats=["html"])}
    wanted = {
        "fig3": "fig3_layers.html", "fig4": "fig4_data_kin.html", "fig5": "fig5_heads.html", "stability": "stability.html",
        "fig2": "head_grid.html",  # one task: no matrix
    }  # fmt: skip
    assert {"head_grid.html", wanted.get(part, f"{part}.md")} <= drawn
    assert 'id="heads"' in render(results)
