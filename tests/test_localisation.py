"""Chosen heads against random sets: what is run for it, what the store keeps, and what is said of the numbers."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import lofit_lens as ll
from lofit_lens.analysis.answers import answer_patching
from lofit_lens.analysis.controls import EQUIVALENT, LOCALISED, UNCLEAR, WORSE, chosen_against_random
from lofit_lens.analysis.needed import keep_only, removal
from lofit_lens.analysis.resampling import paired_test_of_means
from lofit_lens.analysis.stability import stability
from lofit_lens.errors import InputError
from lofit_lens.experiments.localisation import Localisation, localisation
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.models import model_info
from lofit_lens.plots import localisation_figure
from tests.studies import TASKS

KIN = TASKS[0]
POINTS = [{"lr": 0.02}, {"lr": 0.5}]


@pytest.fixture
def model(bridge_llama):
    return bridge_llama


def localise(model, **options):
    given = {"k": 2, "draws": 3, "seeds": (0, 1), "points": POINTS, "progress": False, **options}
    return localisation(model, given.pop("task", KIN), **given)


@pytest.fixture(scope="module")
def kept(loaded, once):
    """A store that a localisation was kept in, and what it found."""
    model = loaded("llama", "bridge")
    return once("localisation", lambda folder: localise(model, out=folder))


def test_every_set_chooses_on_its_own_heads(kept):
    """A random set has as many heads in each layer as the own of the seed; every fit takes the best of its own trials."""
    store = Store(kept)
    cells = store.grids()["localisation k2 kin"]["cells"]
    fits = {n: r for n, r in cells.items() if r["kind"] == "fit" and r["method"] == "LoFiT"}
    assert len(fits) == (1 + 3) * 2
    assert sum(row["kind"] == "trial" for row in cells.values()) == (1 + 3) * 2 * 2
    for name, row in fits.items():
        record = store.read(name)
        own = HeadScores.load(store.folder(record["spec"]["heads"]["cell"]) / "scores.json").top(2)
        drawn = own if row["heads_from"] == "A-norm" else HeadSet.matched(own, seed=row["draw"])
        assert record["run"]["heads"] == str(drawn)
        trials = [store.read(trial) for (trial,) in record["spec"]["chosen"]]
        assert [t["spec"]["heads"] for t in trials] == [record["spec"]["heads"]] * 2
        values = [t["result"]["metrics"]["em"]["mean"] for t in trials]
        assert record["settings"] == POINTS[values.index(max(values))]


def test_numbers_are_those_of_the_store(model, kept):
    """The table's means and the test are made from the fits' items, by set and seed; nothing is run again."""
    before = {p.name for p in (kept / "runs").iterdir()}
    found = localise(model, out=kept)
    assert {p.name for p in (kept / "runs").iterdir()} == before
    results = load_results(kept)
    own = results.values(results.rows(heads_from="A-norm"))
    random = np.stack([results.values(results.rows(heads_from="matched", draw=d)) for d in range(3)])
    assert own.shape == (2, 6)
    assert random.shape == (3, 2, 6)
    assert found.test == chosen_against_random(own, random)
    assert found.table["set"].tolist() == ["chosen", "random 0", "random 1", "random 2"]
    assert found.table["value"].tolist() == [own.mean(), *random.mean((1, 2))]
    assert found.unmodified == results.values(results.zero_shot("kin")).mean()
    assert (found.k, found.tried, found.metric) == (2, 2, "em")
    assert json.loads(json.dumps(found.to_dict()))["words"] == str(found)


def test_controls_are_read_from_the_store(model, tmp_path):
    """Other wordings test the same adapters; the other controls are those of the first seed's adapter on the chosen heads."""
    found = localise(
        model, draws=4, points=POINTS[1:], wordings={"longer": {"kin": "So kin"}}, limit=6, out=tmp_path / "store"
    )  # fmt: skip
    results = load_results(tmp_path / "store")  # as `figures` and `explore` read it
    assert results.tasks == ("kin", "kin:first half", "kin:second half")
    table = found.controls.set_index("control")
    assert table.index.tolist() == ["prompts longer", "edits of 1 head only", "heads silenced", "answer carried"]
    own = results.values(results.rows(heads_from="A-norm", tested="kin:longer"))
    drawn = np.stack(
        [results.values(results.rows(heads_from="matched", draw=d, tested="kin:longer")) for d in range(4)]
    )
    assert drawn.shape == (4, 2, 6)
    test = chosen_against_random(own, drawn)
    assert table.loc["prompts longer", ["chosen", "random", "p"]].tolist() == [test.chosen, test.random, test.p]

    lofit = results.adapter("kin", seed=0, model=model)
    gone = removal(
        model, KIN, lofit.heads, adapter=lofit, pool=HeadSet.all(model_info(model).grid).restrict(lofit.heads.layers), ks=[2],
        draws=4, progress=False,
    )  # fmt: skip
    row = gone.curve.iloc[0]
    columns = ["chosen", "random", "difference", "p"]
    assert table.loc["heads silenced", columns].tolist() == pytest.approx(row[columns].tolist(), nan_ok=True)
    half = keep_only(model, KIN, lofit, ks=[1], draws=4, progress=False).curve.set_index("k").loc[1]
    assert table.loc["edits of 1 head only", ["chosen", "random"]].tolist() == half[["best", "random"]].tolist()
    carried = answer_patching(model, KIN, lofit.heads, adapter=lofit, draws=4, progress=False).test()
    assert table.loc["answer carried", ["chosen", "random", "p"]].tolist() == [
        carried.chosen,
        carried.random,
        carried.p,
    ]

    again = found.again.set_index("over")
    seeds = [results.scores["kin", "A-norm", seed] for seed in (0, 1)]
    assert again.loc["2 seeds", "shared"] == stability(seeds, ks=[2])["shared"].item()
    rows = list(KIN.drawn("train", seed=0))
    random.Random(0).shuffle(rows)
    halves = [KIN.subset(train=sorted(part)) for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
    scores = [ll.select_heads(model, half, seed=0, progress=False) for half in halves]
    assert again.loc["two halves of the training rows", "shared"] == stability(scores, ks=[2])["shared"].item()
    assert "prompts longer: " in str(found)
    assert len(localisation_figure(found).data) == 2 + 4 + 2
    assert json.loads(json.dumps(found.to_dict()))["controls"][2]["control"] == "heads silenced"


def test_controls_can_be_left_out(model):
    """And of another split than test there are none; a wording needs the test split, and has to change each prompt."""
    options = {"draws": 1, "points": POINTS[1:], "seeds": (0,)}
    for left_out in ({"controls": False}, {"split": "val"}):
        found = localise(model, **options, **left_out)
        assert (len(found.controls), len(found.again)) == (0, 0)
    for given, message in (
        ({"wordings": {"a": {"kin": "So kin"}}, "split": "val"}, "wordings are of the test split"),
        ({"wordings": {"a": {"no such text": ""}}}, "the wording 'a' changes nothing in the prompt"),
        ({"wordings": {"a": {}}}, "replacements is {}"),
    ):
        with pytest.raises(InputError, match=message):
            localise(model, **options, **given)


def test_rows_of_matched_heads_stand_apart(kept):
    """Method and selector tables name them; random heads drawn from all layers are other rows."""
    results = load_results(kept)
    assert results.kinds("kin")["random heads, same layers"] == "matched"
    table = results.method_table("kin")
    assert len(table["random heads, same layers"].heads) == 6
    assert "random heads" not in results.kinds("kin")
    settings = table["random heads, same layers"].settings["lr"]
    assert settings in (0.02, 0.5, "0.02 / 0.5")
    assert [m.by_run for m in table.methods if m.method != "zero-shot"] == [True, True]
    assert all(m.tuned is None for m in table.methods), "no single choice stands for runs that each made their own"
    assert len(results.by_chance("kin")) == 0
    assert {row.method for row in results.selector_table("kin").rows} == {"heads by A-norm", "heads by matched"}


def test_another_number_of_heads_keeps_the_first(model, kept, tmp_path):
    """The folder of two numbers of heads holds the record of both."""
    shutil.copytree(kept, tmp_path / "both")
    localise(model, k=1, points=POINTS[:1], draws=2, seeds=(0,), controls=False, out=tmp_path / "both")
    grids = Store(tmp_path / "both").grids()
    assert grids["localisation k2 kin"] == Store(kept).grids()["localisation k2 kin"]
    assert "localisation k1 kin" in grids


def test_the_same_again_elsewhere(model, tmp_path):
    """Deterministic; one point needs no trials and no validation rows."""
    blind = replace(KIN, test={k: v for k, v in KIN.test.items() if k != "val"})
    first, second = (
        localise(model, task=blind, points=POINTS[:1], draws=2, seeds=(0,), out=tmp_path / name) for name in "ab"
    )  # fmt: skip
    assert first.to_dict() == second.to_dict()
    assert "with equal settings, with 1 seed" in str(first)
    assert not [
        r for r in Store(tmp_path / "a").grids()["localisation k2 kin"]["cells"].values() if r["kind"] == "trial"
    ]


def test_bad_arguments_are_refused_before_anything_runs(model, tmp_path):
    """Margin, draws, seeds, points."""
    for options, message in (
        ({"margin": 0.0}, "margin is 0.0; give the smallest difference that would matter"),
        ({"draws": 0}, "draws is 0"),
        ({"seeds": ()}, "seeds"),
        ({"points": []}, "settings is an empty list"),
        ({"points": [{"alpha": 1}, {"alpha": 2}]}, "settings of LoFiT: .*alpha"),
        ({"k": "many"}, "k is 'many'"),
    ):
        with pytest.raises(InputError, match=message):
            localise(model, out=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------- what is said


def right(*counts, n_items=100):
    return np.array([np.arange(n_items) < n for n in counts], dtype=float)


def found_of(chosen, random, bare, margin=0.05):
    """A result from hand-made counts of right answers of 100, by seed, and by set."""
    own, sets = right(*chosen), np.array([right(n, n) for n in random])
    table = pd.DataFrame([
        {"set": name, "value": of.mean(), "low": of.mean() - 0.1, "high": of.mean() + 0.1, "settings": "lr 0.01", "heads": "L0H0"}
        for name, of in [("chosen", own), *((f"random {d}", s) for d, s in enumerate(sets))]
    ])  # fmt: skip
    test = chosen_against_random(own, sets, margin=margin)
    return Localisation(
        "kin", "m", "test", "em", 3, 4, table, test, bare / 100, paired_test_of_means(own, right(bare))
    )  # fmt: skip


SPREAD = (50, 51, 49, 50, 52, 48, 50, 51, 49, 50)


@pytest.mark.parametrize(
    ("chosen", "random", "bare", "verdict", "words"),
    [
        ((80, 82), SPREAD, 20, LOCALISED, "The chosen heads do better than random ones: the edit is localised."),
        ((50, 51), SPREAD, 20, EQUIVALENT, "There is no evidence of localisation: chosen and random heads are equivalent"),
        ((30, 32), SPREAD, 20, WORSE, "The chosen heads do worse than random ones"),
        ((80, 82), SPREAD[:3], 20, UNCLEAR, "fewer than 4 random sets are not tested. These runs cannot tell"),
        ((56, 57), range(35, 65, 3), 20, UNCLEAR, "These runs cannot tell: they show neither"),
        ((50, 51), SPREAD, 50, UNCLEAR, "the chosen heads do not do better than the unmodified model"),
        ((50, 50), (20, 21, 19, 20, 22, 18), 50, UNCLEAR, "the chosen heads do not do better than the unmodified model"),
    ],
)  # fmt: skip
def test_verdicts_in_words(chosen, random, bare, verdict, words):
    """Better, equal, worse, too few, and a chosen set that learned nothing."""
    found = found_of(chosen, random, bare)
    assert found.verdict == verdict == found.to_dict()["verdict"]
    assert words in str(found)


def test_the_paragraph_holds_the_numbers():
    """Worked out by hand from 81 % against 50 % on average."""
    text = str(found_of((80, 82), SPREAD, 20))
    for part in (
        "On kin (EM, 100 rows of the test split), LoFiT on the 3 heads of m", "reaches 81.0 %",
        "10 random sets with as many heads in each layer have 50.0 % on average (from 48.0 to 52.0 %)",
        "the unmodified model 20.0 %", "at the best of 4 settings on the validation rows, with 2 seeds",
        "The difference is +31.0 points [+", "p < 0.001; equivalence within 5 points: p = 1.000; 0 of 10 random sets do as well",
    ):  # fmt: skip
        assert part in text
    one = str(found_of((60, 60), (50,), 20))
    assert "1 random set has 50.0 % on average, the unmodified" in one
    assert "The difference is +10.0 points; fewer than 4" in one


def test_figure_shows_every_set_and_the_margin(unchecked):
    """Points in percent, the chosen in front of random sets from best to worst; the band is mean of the random +- margin."""
    found = found_of((80, 82), SPREAD, 20, margin=0.04)
    fig = localisation_figure(found)
    own, random = fig.data
    assert (list(own.x), list(own.y)) == (["chosen"], [81.0])
    assert list(random.y) == pytest.approx(sorted(SPREAD, reverse=True))
    assert list(random.error_y.array) == pytest.approx([10.0] * 10)
    band, *lines = fig.layout.shapes
    assert (band.y0, band.y1) == pytest.approx((46.0, 54.0))
    assert [line.y0 for line in lines] == pytest.approx([20.0, 50.0])
    with pytest.raises(InputError, match="found is 3"):
        localisation_figure(3)


def test_shell_prints_and_writes(checkpoint, tmp_path, capsys):
    """Table, paragraph and four files; the same folder is read, not run again."""
    from typer.testing import CliRunner

    from lofit_lens.cli import app

    rows = [
        {"prompt": f"Ann {i} is", "answer": (" son", " aunt")[i % 2], "split": s}
        for s in ("train", "val", "test")
        for i in range(6)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(json.dumps(r) for r in rows))
    asked = [
        "localise", "--task", str(task), "--model", str(checkpoint("llama")), "--k", "2", "--draws", "2", "--seeds", "1", "--lr",
        "0.02", "--out", str(tmp_path / "out"), "--quiet", "--workers", "1", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["test"]["n_sets"] == 2
    files = {p.name for p in (tmp_path / "out").iterdir() if "localisation" in p.name}
    assert {f.rsplit(".", 1)[1] for f in files} == {"html", "csv", "json", "md"}
    assert found["words"] in next((tmp_path / "out").glob("*localisation.md")).read_text()


def test_public_name():
    assert ll.localisation is localisation
