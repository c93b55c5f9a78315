"""Models in which only some layers have heads at hook_z, and latent attention: by default what can be edited is edited."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lofit_lens as ll
from lofit_lens import io
from lofit_lens.analysis.layers import layer_shares
from lofit_lens.analysis.overlap import agreement_by_k, overlap, score_agreement
from lofit_lens.analysis.stability import selection_frequency, stability
from lofit_lens.errors import InputError, ModelError
from lofit_lens.experiments.grid.run import run_grid
from lofit_lens.explorer.page import view_data
from lofit_lens.explorer.source import read_source
from lofit_lens.heads import Grid, HeadScores, HeadSet
from lofit_lens.models import ModelInfo, head_size, hook_z, hooked, load_model, model_info, planned_info
from lofit_lens.plots import head_grid, score_scatter
from lofit_lens.training.selectors import SELECTORS
from tests.task_rows import words_task
from tests.test_cli import run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # they import each other by name, as scripts do

import families

GRID = Grid((6, 4), layers=[1, 4])
NEWER = pytest.mark.skipif(
    io.environment()["transformer-lens"].startswith("3."), reason="this TransformerLens cannot load it"
)
# name -> layers with heads (None = all), d_head
FOUND = {
    "Lfm2": ((1,), 8), "FalconH1": (None, 12), "DeepseekV3": (None, 12), "DeepseekV2": (None, 12), "Jamba": ((1,), 8),
    "Qwen3Next": ((1,), 12), "Gemma4": ((1, 2), 16), "OlmoHybrid": ((1,), 8),
}  # fmt: skip
NAMES = [pytest.param(name, marks=NEWER if name == "Qwen3Next" else ()) for name in FOUND]


@pytest.fixture
def family(once):
    """Name of a family -> folder of a tiny random checkpoint."""
    cases = {c.name: c for c in families.cases()}
    return lambda name: once(f"family-{name.lower()}", lambda folder: families.save(cases[name], folder))


@pytest.fixture
def words(tmp_path):
    return words_task(tmp_path / "words")


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", NAMES)
def test_layers_with_heads(family, name, caplog):
    """Found in the loaded model, said once, and known from the configuration alone."""
    model = load_model(family(name), backend="bridge", device="cpu", name=name)
    info = model_info(model)
    layers, d_head = FOUND[name]
    assert (info.head_layers, head_size(model)) == (layers, d_head)
    assert info.grid.n_total == (len(layers) if layers else info.n_layers) * info.n_heads
    assert planned_info(family(name), backend="bridge", name=name) == info
    model_info(model)
    assert caplog.text.count("K counts only these heads") == (0 if layers is None else 1)
    assert ModelInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_a_model_without_heads(family):
    """It loads and says what is missing."""
    model = load_model(family("Mamba2"), device="cpu")
    assert model_info(model).head_layers == ()
    with pytest.raises(ModelError, match=r"no layer of .* has heads at hook_z"):
        ll.Lofit.for_model(model)


def test_heads_of_another_size_may_be_named(family):
    """Gemma 4: the smaller group is left out by default only; both sizes together are refused."""
    model = load_model(family("Gemma4"), device="cpu")
    assert ll.Lofit.for_model(model, ["L0H1"]).d_head == 12
    with ll.Lofit.for_model(model, ["L0H1"]).attached(model):
        pass
    with pytest.raises(ModelError, match="layers differ in d_head"):
        ll.Lofit.for_model(model, ["L0H1", "L1H1"])


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_latent_attention_is_split_by_the_size_of_the_values(family, name):
    """z is the input of o_proj, head by head: silencing a head's z equals zero columns of o_proj."""
    model = load_model(family(name), device="cpu")
    tokens = torch.arange(5, 12)[None]
    weight = model.original_model.model.layers[1].self_attn.o_proj.weight

    def silent(z, hook):
        z = z.clone()
        z[:, :, 2] = 0
        return z

    with torch.no_grad():
        with hooked(hook_z(model, 1), silent):
            by_hook = model(tokens)
        kept = weight[:, 24:36].clone()
        weight[:, 24:36] = 0
        by_weight = model(tokens)
        weight[:, 24:36] = kept
        assert (model(tokens) - by_weight).abs().max() > 1e-3
    assert torch.allclose(by_hook, by_weight, atol=1e-5)


@pytest.mark.parametrize("name", [
    pytest.param("Qwen3Next", marks=NEWER), "Lfm2", pytest.param("FalconH1", marks=pytest.mark.slow), "DeepseekV3",
])  # fmt: skip
def test_on_the_shell_without_an_option(capsys, monkeypatch, caplog, family, words, tmp_path, name):
    """Select, tune, save, load, eval."""
    common = ("--model", family(name), "--task", words, "--device", "cpu")
    for args in (
        ("select", *common, "--out", tmp_path / "h", "--max-steps", 2),
        ("tune", *common, "--heads", tmp_path / "h", "--out", tmp_path / "a", "--max-steps", 2),
        ("eval", *common, "--adapter", tmp_path / "a", "--out", tmp_path / "e", "--limit", 4),
    ):
        code, _, err = run(capsys, monkeypatch, *args)
        assert code == 0, err
    layers, d_head = FOUND[name]
    assert ("K counts only these heads" in caplog.text) == (layers is not None)
    model = load_model(family(name), device="cpu")
    lofit = ll.Lofit.from_pretrained(tmp_path / "a", model=model)
    assert set(lofit.heads.layers) <= set(model_info(model).grid.layers)
    assert lofit.d_head == d_head
    assert lofit.heads.shape.head_layers == layers
    scores = HeadScores.load(tmp_path / "h" / "scores.json")
    assert scores.shape.head_layers == layers
    assert torch.isfinite(scores.at_heads).all()


@pytest.mark.parametrize("by", SELECTORS)
def test_every_head_score(family, words, by):
    """Of layers with heads only; K above their number is refused."""
    model, task = load_model(family("Lfm2"), device="cpu"), ll.load_task(str(words))
    settings = {"config": ll.TrainConfig(lr=1e-3, epochs=1, max_steps=1)} if by in ("A-norm", "bias norm") else {}
    scores = SELECTORS[by](model, task, seed=0, n_train=8, progress=False, **settings)
    assert scores.shape.head_layers == (1,)
    assert scores.values.isnan().all(1).tolist() == [True, False, True]
    assert len(scores.ranking()) == 4
    with pytest.raises(InputError, match="K = 5 heads asked for; this model has 4"):
        scores.top(5)


def test_counts_from_a_configuration(family):
    """Of the layers with heads, and of the values' size."""
    assert ll.parameter_counts(family("Lfm2"), k=1)["LoFiT step 1"] == 4 * 8
    assert ll.parameter_counts(family("DeepseekV3"), k=1)["LoFiT step 1"] == 3 * 4 * 12


def test_a_grid(family, words, tmp_path):
    """Planned without the weights: K, random heads and all heads are of the layers that have some."""
    (tmp_path / "grid.yaml").write_text(
        f"name: hybrid\nmodel: {family('Lfm2')}\ntasks: {words}\nruns:\n"
        "  - {method: LoFiT, heads: [A-norm, random, all], k: [K, 50 %], settings: {lr: 0.01, epochs: 1}, draws: 1}\n"
    )
    report = run_grid(tmp_path / "grid.yaml", tmp_path / "s", device="cpu", progress=False)
    assert report.failed == {}
    results = ll.load_results(tmp_path / "s")
    assert results.model.head_layers == (1,)
    assert sorted(set(results.rows(method="LoFiT")["k"])) == [1, 2, 4]
    assert {scores.shape.head_layers for scores in results.scores.values()} == {(1,)}


def test_probes_and_what_follows(family, words):
    """ITI's heads, ablation, and drift on the layers that have heads."""
    model, task = load_model(family("Lfm2"), device="cpu"), ll.load_task(str(words))
    probes = ll.fit_probes(model, task, seed=0, progress=False)
    iti = probes.iti(2)
    assert iti.heads.layers == (1,)
    with pytest.raises(InputError, match=r"head L0H1 is not among those .* in these layers: 1"):
        probes.iti(["L0H1"])
    drift = ll.analysis.drift(model, iti, ["word 1:", "word 2: yes"], progress=False)
    assert sorted(set(drift.layers.query("where == 'z'")["layer"])) == [1]
    assert sorted(set(drift.layers.query("where == 'resid'")["layer"])) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- scores, sets, chance


def scores(seed=0, **more):
    values = np.random.default_rng(seed).random((6, 4))
    return HeadScores(values, "A-norm", layers=GRID.layers, **more)


def test_scores_and_sets_keep_their_layers(tmp_path):
    """Through top, files, algebra; what is given for the other layers is not looked at."""
    values = np.full((6, 4), np.inf)
    values[[1, 4]] = [[4, 3, 2, 1], [8, 7, 6, 5]]
    made = HeadScores(values, layers=[4, 1])
    assert str(made.top(5)) == "L4H0 L4H1 L4H2 L4H3 L1H0"
    read = HeadScores.load(made.save(tmp_path / "s.json"))
    assert torch.equal(read.at_heads, made.at_heads)
    assert read.shape.head_layers == (1, 4)
    top = HeadSet.load(made.top(3).save(tmp_path / "h.json"))
    assert (top | HeadSet(["L1H1"], shape=(6, 4))).shape.head_layers == (1, 4)
    assert (HeadSet(["L1H1"], shape=(6, 4)) & top).shape.head_layers == (1, 4)
    assert len(HeadSet.all(made.shape)) == 8
    assert set(HeadSet.random(made.shape, 8, seed=0).layers) == {1, 4}
    assert "L4H0" in made._repr_html_()
    assert "nan" not in made._repr_html_()
    with pytest.raises(InputError, match=r"the score of head L1H2 is nan"):
        HeadScores(np.where(values == 2, np.nan, values), layers=[1, 4])
    with pytest.raises(InputError, match="layer is 6"):
        Grid((6, 4), layers=[6])


def test_chance_counts_only_heads_that_can_be_chosen():
    """Two sets of 4 among 8 heads share 2 by chance, not 4 * 4 / 24."""
    a, b = scores(0), scores(1)
    tops = {"a": a.top(4), "b": b.top(4)}
    assert overlap(tops)["expected"].tolist() == [2.0]
    assert overlap({**tops, "b": HeadSet(tops["b"].heads, shape=(6, 4))})["expected"].tolist() == [2.0]
    assert agreement_by_k(a, b)["expected"].iloc[-1] == 8.0
    assert len(agreement_by_k(a, b)) == 8
    assert score_agreement({"a": a, "b": b})["n"].tolist() == [8]
    assert stability([a, b])["expected_shared"].iloc[3] == 2.0
    assert selection_frequency([a, b], 4).shape.head_layers == (1, 4)
    shares = layer_shares({"a": a.top(4)})
    assert shares["expected"].tolist() == [0, 0.5, 0, 0, 0.5, 0]
    assert shares.loc[shares["layer"] == 0, ["low", "high"]].to_numpy().tolist() == [[0, 0]]


def test_figures_and_explorer_leave_the_others_blank():
    """No NaN in what a page is given, and one color scale over the heads that have a score."""
    a, b = scores(0, task="x"), scores(1, task="y")
    heat = head_grid({"a": a, "b": b}).data[0]
    assert heat.zmin == pytest.approx(min(a.at_heads.min(), b.at_heads.min()).item())
    assert len(score_scatter(a, b, k=3).data) >= 2
    given = view_data(read_source({"a": a, "b": b}), work=1000)
    json.dumps(given, allow_nan=False)
    assert given["chance"]["expected"][3] == 2.0
    assert given["sets"][0]["scores"][:4] == [None] * 4
