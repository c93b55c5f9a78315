"""Where in the model the chosen heads are: heads of each layer and mean layer (LoFiT paper, Figure 3)."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lofit_lens.checks import check_seed, check_share, check_whole, given
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import RESAMPLES, bootstrap_interval, holm
from lofit_lens.heads import HeadSet, Sets, joint_grid, named_sets


def layer_shares(sets: Sets, n_layers: int | None = None, *, level: float = 0.95) -> pd.DataFrame:
    """Share of each head set that lies in each layer, and the share expected by chance.

    The chosen heads are not a sample, so their shares have no interval. They can be compared with chance: of K heads drawn
    uniformly from the model, the number in one layer is hypergeometric.

    Args:
        sets: name -> heads, or head sets without names; see `overlap`.
        n_layers: number of layers of the model; None = read from the head sets.
        level: level of the chance range of one layer; of L layers about (1 - level) L fall outside by chance.

    Returns:
        One row per set and layer: set, layer, count (heads), share (of the set, 0 to 1), expected = 1 / layers with heads,
        low and high (quantiles of the share by chance; NaN for a set that does not know its model).

    Raises:
        InputError: no head set, an empty one, an unknown number of layers, or a head outside the model.

    Examples:
        >>> layer_shares({"a": HeadSet(["L0H0", "L1H2", "L1H3", "L1H0"], shape=(2, 4))})["share"].tolist()
        [0.25, 0.75]
    """
    check_share("level", level)
    sets = _some(sets)
    n = _n_layers(sets, n_layers)
    known = [heads.shape for heads in sets.values() if heads.shape]
    layers = joint_grid(known).layers if known else range(n)
    rows = []
    for name, heads in sets.items():
        low = high = float("nan")
        if heads.shape:
            chance = stats.hypergeom(len(layers) * heads.shape[1], heads.shape[1], len(heads))
            low, high = (float(chance.ppf(q)) / len(heads) for q in ((1 - level) / 2, (1 + level) / 2))
        for layer, count in enumerate(heads.layer_counts(n).tolist()):
            drawn = (1 / len(layers), low, high) if layer in layers else (0.0, 0.0, 0.0)  # a layer without heads
            rows.append({"set": name, "layer": layer, "count": count, "share": count / len(heads)})
            rows[-1] |= dict(zip(("expected", "low", "high"), drawn, strict=True))
    return pd.DataFrame(rows)


def mean_layers(sets: Sets, *, seed: int = 0, level: float = 0.95) -> pd.DataFrame:
    """Mean layer of each head set, layers counted from 0.

    Args:
        sets: name -> heads.
        seed: seed of the bootstrap.
        level: confidence level of the interval.

    Returns:
        One row per set: set, k, mean_layer, sd (over heads, divisor k - 1), low and high (percentile bootstrap over heads: how
        far the mean depends on single heads, not how it would vary over seeds). sd, low and high are NaN for one head.

    Raises:
        InputError: no head set, or an empty one.

    Examples:
        >>> found = mean_layers({"a": HeadSet(["L0H0", "L1H2", "L1H3"], shape=(2, 4))})
        >>> round(float(found["mean_layer"].iloc[0]), 3)
        0.667
    """
    sets, rows = _some(sets), []
    for name, heads in sets.items():
        layers = [float(h.layer) for h in heads]
        low, high = bootstrap_interval(layers, seed=seed, level=level) or (float("nan"), float("nan"))
        sd = float(np.std(layers, ddof=1)) if len(layers) > 1 else float("nan")
        rows.append({"set": name, "k": len(heads), "mean_layer": heads.mean_layer, "sd": sd, "low": low, "high": high})
    return pd.DataFrame(rows)


def mean_layer_differences(sets: Sets, *, permutations: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Test for each pair whether one set lies deeper in the model than the other, by permutation.

    Heads of only one of the two sets are reassigned at random, with sizes kept; shared heads stay in both. All assignments are
    enumerated if there are at most `permutations`. p is twice the smaller one-sided p.

    Args:
        sets: name -> heads of one model.
        permutations: number of draws.
        seed: seed of the draws.

    Returns:
        One row per pair: a, b, difference (mean layer of a minus that of b), p (two-sided; 1 if no heads can be reassigned),
        p_holm over all pairs.

    Raises:
        InputError: fewer than two head sets, or an empty one.
    """
    sets = _some(sets)
    check_whole(1, permutations=permutations)
    check_seed(seed)
    if len(sets) < 2:
        raise InputError("one head set given; a difference needs at least two")
    rows = [
        {"a": a, "b": b, "difference": sets[a].mean_layer - sets[b].mean_layer}
        | {"p": _p_of_difference(sets[a], sets[b], permutations, seed)}
        for a, b in combinations(sets, 2)
    ]
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"])
    return frame


def _p_of_difference(a: HeadSet, b: HeadSet, permutations: int, seed: int) -> float:
    only_a, only_b = ([float(h.layer) for h in s] for s in (a - b, b - a))
    if not only_a or not only_b:
        return 1.0

    def sum_of_first(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
        """Increases with the difference of means, as the sum over both is fixed; integers, so that ties are exact."""
        return np.sum(x, axis)

    found = stats.permutation_test(
        (only_a, only_b), sum_of_first, vectorized=True, n_resamples=permutations, rng=np.random.default_rng(seed)
    )
    return float(found.pvalue)


def _some(sets: Sets) -> dict[str, HeadSet]:
    sets = named_sets(sets)
    if not sets:
        raise InputError("no head sets given; give at least one, e.g. {'MQuAKE': scores.top(32)}")
    for name, heads in sets.items():
        if not len(heads):
            raise InputError(f"head set {name!r} is empty; give at least one head")
    return sets


def _n_layers(sets: Mapping[str, HeadSet], n_layers: int | None) -> int:
    check_whole(1, **given(n_layers=n_layers))
    known = {s.shape[0] for s in sets.values() if s.shape} | ({n_layers} if n_layers is not None else set())
    if len(known) != 1:
        found = f"{sorted(known)} layers" if known else "none"
        raise InputError(f"give n_layers and sets of one model: these head sets name {found}")
    n = known.pop()
    for name, heads in sets.items():
        deepest = max(heads.layers)
        if deepest >= n:
            raise InputError(f"head set {name!r} has a head in layer {deepest}; this model has layers 0 to {n - 1}")
    return n
