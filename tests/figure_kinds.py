"""One figure of every kind, and head grids of real sizes, from made-up numbers: what must fit a column."""

from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from lofit_lens import plots
from lofit_lens.analysis.attention import AttentionPatterns
from lofit_lens.analysis.drift import Drift
from lofit_lens.analysis.interference import Interference, LongContext
from lofit_lens.analysis.needed import KeepOnly, LeaveOneOut, Removal
from lofit_lens.analysis.overlap import agreement, overlap
from lofit_lens.analysis.stability import stability
from lofit_lens.analysis.sweeps import sweep
from lofit_lens.analysis.transfer import transfer_matrix
from lofit_lens.heads import HeadScores, HeadSet
from tests.test_localisation import found_of
from tests.test_plots_readings import tokens

SIZES = ((6, 16), (30, 9), (32, 32))
TASKS = ("organism/truth", "organism/kinship", "organism/edits")
METHODS = ("zero-shot", "ITI", "RepE", "random heads", "LoFiT 3 %", "LoFiT 10 %", "LoRA", "RED", "LoReFT")


def scores(shape: tuple[int, int], seed: int) -> HeadScores:
    """Random scores; the second task's are much lower."""
    values = np.random.default_rng(seed).gamma(2.0, 1.0, shape) * (1.0, 0.15, 0.6)[seed % 3]
    return HeadScores(values, "A-norm", task=TASKS[seed % 3], model="m")


def grid(shape: tuple[int, int], scale: str = "panel") -> go.Figure:
    """Three tasks with chosen and marked heads."""
    by = {t: scores(shape, i) for i, t in enumerate(TASKS)}
    k = max(3, round(0.03 * shape[0] * shape[1]))
    chosen = {t: s.top(k) for t, s in by.items()}
    marked = {t: HeadSet.random(shape, 3, seed=1) for t in by}
    return plots.head_grid(by, chosen, marked=marked, scale=scale, title="Which heads each task uses (seed 0)")


def _bars(n: int, seed: int) -> pd.DataFrame:
    value = np.random.default_rng(seed).uniform(0.05, 1.0, n)
    return pd.DataFrame({"value": value, "low": np.maximum(0, value - 0.06), "high": np.minimum(1, value + 0.06)})


def kinds(shape: tuple[int, int] = (30, 9)) -> dict[str, go.Figure]:
    """Name -> figure."""
    draw = np.random.default_rng(0)
    by = {t: scores(shape, i) for i, t in enumerate(TASKS)}
    k = max(3, round(0.03 * shape[0] * shape[1]))
    sets = {t: s.top(k) for t, s in by.items()}
    many = {
        f"{t.split('/')[1]}: {m}": HeadSet.random(shape, k, seed=7 * i + j)
        for i, t in enumerate(TASKS)
        for j, m in enumerate(("A-norm", "bias norm", "gradient attribution", "probe accuracy"))
    }
    made = {f"head_grid {a}x{b}": grid((a, b)) for a, b in SIZES}
    made |= {f"head_grid {s}": grid(shape, s) for s in ("kind", "rank")}
    made["layers"] = plots.layer_distribution(sets)
    near = {
        "one": sets[TASKS[0]],
        "two": HeadSet([*sets[TASKS[0]].heads[: k - 1], *sets[TASKS[1]].heads[:1]], shape=shape),
    }
    made["overlap"] = plots.overlap_heatmap(overlap(sets | near), "shared")
    made["overlap many"] = plots.overlap_heatmap(overlap(many))
    made["agreement"] = plots.agreement_curves(agreement(by, [4, 8, 16, 32, 64]))
    made["scatter"] = plots.score_scatter(by[TASKS[0]], by[TASKS[1]], k)
    made["stability"] = plots.stability_curves(
        {t: stability([scores(shape, i + 3 * j) for j in range(3)], [2, 8, 20, 64]) for i, t in enumerate(TASKS)}
    )
    runs = {(t, s): (draw.random((2, 60)) < (0.9 if s == t else 0.4)).astype(float) for t in TASKS for s in TASKS}
    random = {t: (draw.random((5, 60)) < 0.3).astype(float) for t in TASKS}
    made["transfer"] = plots.transfer_heatmap(
        transfer_matrix(runs, random=random, metrics=dict(zip(TASKS, ("mc1", "em", "em"), strict=True)))
    )
    values = {
        f"{t} ({m})": {x: (draw.random((2, 60)) < 0.1 * i + 0.02 * x).astype(float) for x in (1, 3, 9, 19, 27)}
        for i, (t, m) in enumerate(zip(TASKS, ("MC1", "EM", "EM"), strict=True))
    }
    made["k_sweep"] = plots.k_sweep(sweep(values), n_heads_total=shape[0] * shape[1])
    few = {
        m: {x: (draw.random((2, 60)) < 0.5).astype(float) for x in (50, 100, 200, 300, 400, 500, 1000, 2000)}
        for m in ("LoFiT", "RED")
    }
    made["data"] = plots.data_efficiency(
        sweep({"zero-shot": {0: (draw.random((1, 60)) < 0.2).astype(float)}} | few), metric="EM"
    )
    rows = [
        {
            "task": t,
            "metric": "em",
            "method": m,
            "mean": v,
            "low": max(0, v - 0.05),
            "high": min(1, v + 0.05),
            "n_items": 216,
            "seeds": 2,
            "n_parameters": 24,
        }
        for t in TASKS
        for m, v in zip(METHODS, draw.uniform(0, 1, 9), strict=True)
    ]
    made["methods"] = plots.method_bars(pd.DataFrame(rows))
    found = found_of((80, 82), (50, 51, 49, 50, 52, 48, 50, 51, 49, 50), 20)
    controls = pd.DataFrame(
        {
            "control": ["other wordings", "half of the edits", "heads silenced"],
            "chosen": [0.8, 0.6, 0.3],
            "random": [0.5, 0.4, 0.6],
            "difference": [0.3, 0.2, -0.3],
            "p": 0.01,
            "n_sets": 10,
            "n_items": 100,
        }
    )
    made["localisation"] = plots.localisation_figure(found)
    made["localisation controls"] = plots.localisation_figure(replace(found, controls=controls))
    made |= _readings(draw)
    return made


def _readings(draw: np.random.Generator) -> dict[str, go.Figure]:
    made, heads = {}, [f"L{i}H{(7 * i) % 16}" for i in range(16)]
    made["tokens"] = plots.promoted_figure(tokens(9, top=5))
    made["cosines"] = plots.cosine_figure(pd.DataFrame({
        "head": heads, "cos_mass_mean": draw.uniform(-1, 1, 16), "cos_probe": draw.uniform(-1, 1, 16),
        "chance_sd_head": [0.25] * 16, "cos_reading": draw.uniform(-1, 1, 16), "chance_sd_model": [0.125] * 16,
    }))  # fmt: skip
    loss = pd.DataFrame({"head": heads, "full": 0.9, "without": 0.5, "loss": draw.uniform(0, 0.5, 16), "n": 20})
    loss["low"], loss["high"], loss["p_holm"] = (
        loss["loss"] - 0.1,
        loss["loss"] + 0.1,
        np.where(loss["loss"] > 0.3, 0.01, 1.0),
    )
    made["leave_one_out"] = plots.leave_one_out_figure(LeaveOneOut(loss, (), (), (), "kin", "em", "test"))
    ks = [0, 1, 2, 3, 4, 8, 16]
    curve = pd.DataFrame(
        {
            "k": ks,
            "random": np.linspace(0, 1, 7),
            "random_low": np.linspace(0, 0.9, 7),
            "n": 20,
            "random_high": np.linspace(0.1, 1, 7),
        }
    )
    best = pd.DataFrame(
        {
            "order": "best first",
            "k": ks,
            "value": np.linspace(0.1, 1, 7),
            "low": np.linspace(0, 0.9, 7),
            "high": np.linspace(0.2, 1, 7),
        }
    )
    made["keep_only"] = plots.keep_figure(KeepOnly(best, (), curve, "kin", "em", "test", 4, 0))
    none = pd.DataFrame({"which": ["none"], "value": [0.95], "low": [0.9], "high": [1.0]})
    gone = pd.DataFrame({"k": [1, 3], "none": 0.95, "chosen": [0.5, 0.1], "chosen_low": [0.4, 0.05], "chosen_high": [0.6, 0.2],
                         "random": 0.9, "random_low": 0.85, "random_high": 0.94, "difference": [-0.4, -0.8], "low": [-0.5, -0.9],
                         "high": [-0.3, -0.7], "draws": 5, "n": 20})  # fmt: skip
    removal = Removal(none, (), gone, "kin", "em", "test", "mean", 5, 0)
    made["removal"] = plots.removal_figure(removal)
    names = (
        "heads of the<br>unmodified model,<br>good cue",
        "heads, with<br>the adapter",
        "edits of an<br>adapter of 3 K",
    )
    made["removal_bars"] = plots.removal_bars(dict.fromkeys(names, removal))
    measures = ("cosine", "change", "ratio")
    layers = pd.DataFrame([{"where": w, "layer": n, **dict.fromkeys(measures, 0.5 + 0.01 * n),
                            **{f"{m}_low": 0.45 + 0.01 * n for m in measures}, **{f"{m}_high": 0.55 + 0.01 * n for m in measures}}
                           for w in ("z", "resid") for n in range(30)])  # fmt: skip
    places = pd.DataFrame([{"where": w, "layer": n, "position": p, "n": 3, **dict.fromkeys(measures, draw.random())}
                           for w in ("z", "resid") for n in range(30) for p in (*range(16), *range(-16, 0))])  # fmt: skip
    drift = Drift(layers, pd.DataFrame(), places, 3, 40, 0, "SmolLM2-135M-Instruct", ("LoFiT on organism/truth",))
    made["drift"], made["drift_positions"] = plots.drift_layers(drift), plots.drift_positions(drift)
    conditions = ("no adapter", "own adapter", *(f"adapter of {t}" for t in TASKS), "all together", "sum")
    rows = [
        {"task": t, "metric": "em", "condition": c, "n": 216, **b}
        for i, t in enumerate(TASKS)
        for c, b in zip(conditions, _bars(7, i).to_dict("records"), strict=True)
    ]
    tests = pd.DataFrame(
        {"task": TASKS, "first": ["all together"] * 3, "second": ["own adapter"] * 3, "p_holm": [0.01, 0.06, 0.5]}
    )
    made["interference"] = plots.interference_figure(Interference(pd.DataFrame(rows), (), tests, TASKS, "test"))
    long = [{"length": n, "tokens": 0.9 * n, "adapter": on, "value": 0.4 + 0.4 * on, "low": 0.3 + 0.4 * on,
             "high": 0.5 + 0.4 * on, "n": 9} for n in (0, 64, 256, 1024) for on in (False, True)]  # fmt: skip
    made["long_context"] = plots.long_context_figure(
        LongContext(pd.DataFrame(long), (), pd.DataFrame(), "kin", "em", "test", 0)
    )
    words = ["<bos>", *(f" word{i}" for i in range(17))]
    pattern = torch.softmax(torch.randn(1, 18, 18, generator=torch.Generator().manual_seed(0)), -1).tril()
    made["attention"] = plots.attention_figure(
        AttentionPatterns(HeadSet(["L1H1"]), ("a prompt",), (tuple(words),), (pattern,), "m"), "L1H1"
    )
    return made
