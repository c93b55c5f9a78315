"""Figures from the official code's head files: where its heads lie, and which of them tasks share."""

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lofit_lens.analysis.layers import layer_shares, mean_layers
from lofit_lens.analysis.overlap import agreement_by_k, overlap
from lofit_lens.errors import DataError
from lofit_lens.heads import HeadSet
from lofit_lens.plots.layers import layer_distribution
from lofit_lens.plots.overlap import agreement_curves, overlap_heatmap
from lofit_lens.report.drawn import Drawn

# Front of the file name -> (layers, heads) and the paper's K at 3 %.
MODELS = {"gemma-7b": ((28, 16), 16), "llama2-7b": ((32, 32), 32), "llama2-13b": ((40, 40), 48)}
TASKS = {"truthfulqa": "TruthfulQA", "mquake": "MQuAKE", "clutrr": "CLUTRR"}


def official_sets(folder: str | Path) -> dict[str, dict[str, HeadSet]]:
    """Model -> task -> the official code's ranking, from its head files `{model}-base_{task}_Aonly_top{k}heads_{seed}.npy`.

    Raises:
        DataError: no such file in the folder, two for one model and task, or a damaged one.
    """
    found: dict[str, dict[str, HeadSet]] = {}
    named = re.compile(rf"({'|'.join(MODELS)})-base_({'|'.join(TASKS)})_Aonly_top\d+heads_\d+\.npy")
    for path in sorted(Path(folder).glob("*.npy")):
        match = named.fullmatch(path.name)
        if match is None:
            continue
        model, task = match.groups()
        sets = found.setdefault(model, {})
        if TASKS[task] in sets:
            raise DataError(
                f"{folder} holds several head files of {model} on {task} ({path.name} is one); keep one of them"
            )
        sets[TASKS[task]] = HeadSet.from_npy(path, shape=MODELS[model][0], label=task)
    if not found:
        raise DataError(
            f"{folder} holds no official head files; they are named like llama2-7b-base_mquake_Aonly_top160heads_42.npy"
        )
    return {m: {t: sets[t] for t in TASKS.values() if t in sets} for m, sets in found.items()}


def official_figures(folder: str | Path) -> Iterator[Drawn]:
    """Figure 3, the overlap table and the overlap by K for each model with official head files, at the paper's K (3 %).

    Raises:
        DataError: as `official_sets`.
    """
    for model, ranked in official_sets(folder).items():
        shape, k = MODELS[model]
        sets = {t: s.top(min(k, len(s))) for t, s in ranked.items()}
        shares = layer_shares(sets, shape[0]).merge(mean_layers(sets)[["set", "mean_layer"]], on="set")
        fig = layer_distribution(sets, n_layers=shape[0], title=f"Official heads of {model} by layer")
        yield Drawn(f"official_{model}_fig3_layers", fig, shares)
        if len(sets) < 2:
            continue
        frame, title = overlap(sets), f"Official heads of {model}: shared by tasks"
        yield Drawn(f"official_{model}_overlap", overlap_heatmap(frame, "shared", title=title), frame)
        pairs = list(ranked.items())
        curves = pd.concat([
            agreement_by_k(a, b).assign(pair=f"{x} and {y}") for i, (x, a) in enumerate(pairs) for y, b in pairs[i + 1 :]
        ], ignore_index=True)  # fmt: skip
        yield Drawn(f"official_{model}_agreement", agreement_curves(curves, title=title), curves)
