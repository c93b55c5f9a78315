"""Do two tasks, methods or seeds use the same heads? Overlap of head sets, agreement of scores (LoFiT paper, section 6).

    overlap             sets of K heads: shared, Jaccard, rank-biased overlap, each with what chance would give
    score_agreement     scores of all heads: rank correlation
    agreement_by_k      two rankings, cut at every K

Chance is of two kinds. *Hypergeometric*: heads drawn uniformly from the whole model. *Layer-matched*: both sets keep their
number of heads in each layer, so two sets that merely favor the same layers do not count as similar. Both p-values
are exact and one-sided (at least as many shared heads); see `chance`.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from lofit_lens.analysis.chance import (
    at_least,
    chance_range,
    mean_jaccard,
    rank_biased_overlap,
    shared_by_chance,
    shared_by_chance_in_layers,
    shared_by_depth,
)
from lofit_lens.checks import check_share, shown
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import holm
from lofit_lens.heads import (
    Grid,
    HeadScores,
    HeadSet,
    Ranking,
    Rankings,
    Scores,
    Sets,
    check_k,
    check_shape,
    joint_grid,
    named_rankings,
    named_scores,
    named_sets,
)

PERSISTENCE = 0.9


def overlap(sets: Sets, *, shape: tuple[int, int] | None = None, p: float = PERSISTENCE) -> pd.DataFrame:
    """How many heads each pair of sets shares, and how many are expected by chance.

    Args:
        sets: name -> heads, best first (only `rbo` uses the order), or a list of head sets, named by their labels or indices.
            Sizes may differ.
        shape: `(n_layers, n_heads)` for sets that do not know their model.
        p: persistence of the rank-biased overlap.

    Returns:
        One row per pair: a, b, k_a, k_b; shared (heads), jaccard, rbo (`rank_biased_overlap`); expected = k_a k_b / N and
        expected_jaccard under even draws; p_hypergeometric = P(X >= shared); expected_layer and p_layer, the same with
        heads shuffled within layers (exact); p_holm and p_layer_holm, adjusted over all pairs of this call (Holm 1979).

    Raises:
        InputError: fewer than two sets, an empty one, sets of different models, no shape known, or p outside (0, 1).

    Examples:
        >>> a = HeadSet(["L0H0", "L0H1", "L1H2"], shape=(2, 4))
        >>> b = HeadSet(["L0H1", "L0H0", "L1H3"], shape=(2, 4))
        >>> overlap({"a": a, "b": b})[["shared", "expected", "p_hypergeometric", "p_layer"]].round(3).to_dict("records")
        [{'shared': 2, 'expected': 1.125, 'p_hypergeometric': 0.286, 'p_layer': 0.333}]
    """
    sets = named_sets(sets)
    _at_least_two(sets, "head sets", "{'MQuAKE': ..., 'CLUTRR': ...}")
    for name, heads in sets.items():
        if not len(heads):
            raise InputError(f"head set {name!r} is empty; give at least one head")
    n_layers, n_heads = grid = joint_shape(sets, shape)
    total = grid.n_total
    counts = {name: heads.layer_counts(n_layers) for name, heads in sets.items()}
    rows = []
    for a, b in combinations(sets, 2):
        k_a, k_b = len(sets[a]), len(sets[b])
        shared = len(sets[a] & sets[b])
        anywhere = shared_by_chance(k_a, k_b, total)
        in_layers = shared_by_chance_in_layers(counts[a], counts[b], n_heads)
        rows.append({
            "a": a, "b": b, "k_a": k_a, "k_b": k_b, "shared": shared, "jaccard": shared / (k_a + k_b - shared),
            "rbo": rank_biased_overlap(sets[a].heads, sets[b].heads, p=p), "expected": k_a * k_b / total,
            "expected_jaccard": mean_jaccard(anywhere, k_a, k_b), "p_hypergeometric": at_least(anywhere, shared),
            "expected_layer": float(counts[a] @ counts[b]) / n_heads, "p_layer": at_least(in_layers, shared),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["p_holm"], frame["p_layer_holm"] = holm(frame["p_hypergeometric"]), holm(frame["p_layer"])
    return frame


def score_agreement(scores: Scores) -> pd.DataFrame:
    """Rank correlation of each pair of scores over the heads of a model.

    Args:
        scores: name -> scores `[n_layers, n_heads]` of one model, or a list of scores.

    Returns:
        One row per pair: a, b, n (heads); rho and p, Spearman's rank correlation and its two-sided p (scipy; it takes heads
        as independent); p_holm over all pairs; rho_layer, the correlation of the ranks minus their layer's mean, i.e. the
        agreement that is left once both scores' preference for some layers is removed (NaN if layers have one head, or if
        ranks do not vary within layers).

    Raises:
        InputError: fewer than two scores, scores of different models, a model of fewer than three heads, or scores that are
            all equal.

    Examples:
        >>> a = HeadScores([[0.1, 0.9, 0.3], [0.7, 0.2, 0.4]])
        >>> b = HeadScores([[0.2, 0.8, 0.3], [0.9, 0.1, 0.4]])
        >>> round(float(score_agreement({"a": a, "b": b})["rho"].iloc[0]), 3)
        0.886
    """
    scores = named_scores(scores)
    _at_least_two(scores, "head scores", "{'LoFiT': ..., 'ITI': ...}")
    joint_shape(scores)
    ranks = {}
    for name, s in scores.items():
        table = s.at_heads.numpy()
        if table.size < 3:
            raise InputError(f"a model of {table.size} heads has no rank correlation; it takes at least 3 heads")
        if np.ptp(table) == 0:
            raise InputError(f"the scores of {name!r} are all {table.flat[0]:g}: they rank no head; leave them out")
        ranks[name] = stats.rankdata(table).reshape(table.shape)
    rows = []
    for a, b in combinations(scores, 2):
        rho, p = np.array(stats.spearmanr(ranks[a].ravel(), ranks[b].ravel())).tolist()
        rows.append({
            "a": a, "b": b, "n": ranks[a].size, "rho": rho, "p": min(1.0, p),
            "rho_layer": _within_layers(ranks[a], ranks[b]),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"])
    return frame


def agreement_by_k(
    a: Ranking,
    b: Ranking,
    ks: Sequence[int] | None = None,
    *,
    shape: tuple[int, int] | None = None,
    level: float = 0.95,
    p: float = PERSISTENCE,
) -> pd.DataFrame:
    """Count the shared heads among the top K of two rankings, for each K.

    Args:
        a: scores of all heads, or a ranking, e.g. an official file's 160 heads.
        b: the other one.
        ks: numbers of heads; None = every K up to the shorter ranking.
        shape: `(n_layers, n_heads)` for rankings that do not know their model.
        level: confidence level of the chance interval.
        p: persistence of the rank-biased overlap.

    Returns:
        One row per K: k; shared (heads), jaccard; expected, low and high (shared heads by chance: mean and quantiles of the
        hypergeometric distribution), expected_jaccard; p = P(X >= shared), not adjusted over K, as these tests are nested;
        rbo of the two top-K lists.

    Raises:
        InputError: an empty ranking, different models, no shape known, no K, or a K that a ranking does not have.

    Examples:
        >>> a = HeadScores([[0.1, 0.9, 0.3], [0.7, 0.2, 0.4]])
        >>> b = HeadScores([[0.2, 0.8, 0.3], [0.9, 0.1, 0.4]])
        >>> agreement_by_k(a, b, [1, 2, 3])["shared"].tolist()
        [0, 2, 3]
    """
    pair = named_rankings({"a": a, "b": b})
    total = joint_shape(pair, shape).n_total
    first, second = (r.ranking() if isinstance(r, HeadScores) else r for r in (a, b))
    shorter = min(len(first), len(second))
    if not shorter:
        raise InputError("a ranking is empty; give at least one head on both sides")
    wanted = list(range(1, shorter + 1)) if ks is None else list(ks) if isinstance(ks, Iterable) else []
    if not wanted:
        raise InputError(f"ks is {shown(ks)}; give numbers of heads from 1 to {shorter}, or None for all")
    check_share("p", p)
    rows = []
    shared = shared_by_depth(first.heads, second.heads)
    depth = np.arange(1, shared.size + 1)
    agreed = np.cumsum(shared / depth * p**depth) * (1 - p) / p + shared / depth * p**depth  # RBO_ext of each top K
    for k in wanted:
        check_k(k, shorter, "the shorter of these two rankings")
        x = int(shared[k - 1])
        chance = shared_by_chance(k, k, total)
        low, high = chance_range(chance, level=level)
        rows.append({
            "k": int(k), "shared": x, "jaccard": x / (2 * k - x), "expected": k * k / total, "low": low, "high": high,
            "expected_jaccard": mean_jaccard(chance, k, k), "p": at_least(chance, x),
            "rbo": float(agreed[k - 1]),
        })  # fmt: skip
    return pd.DataFrame(rows)


def agreement(
    rankings: Rankings,
    ks: Sequence[int] | None = None,
    *,
    shape: tuple[int, int] | None = None,
    level: float = 0.95,
    p: float = PERSISTENCE,
) -> pd.DataFrame:
    """`agreement_by_k` for every pair of rankings; its first columns are pair, a and b.

    Raises:
        InputError: fewer than two rankings, or as `agreement_by_k`.
    """
    rankings = named_rankings(rankings)
    _at_least_two(rankings, "rankings", "{'LoFiT': ..., 'ITI': ...}")
    frames = []
    for a, b in combinations(rankings, 2):
        frame = agreement_by_k(rankings[a], rankings[b], ks, shape=shape, level=level, p=p)
        for i, (column, value) in enumerate((("pair", f"{a} & {b}"), ("a", a), ("b", b))):
            frame.insert(i, column, value)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def joint_shape(of: Mapping[str, Ranking], shape: tuple[int, int] | None = None) -> Grid:
    """The one `(n_layers, n_heads)` that these head sets or scores belong to.

    Raises:
        InputError: no shape is known, shapes differ, or a head is outside it.
    """
    known = {name: s.shape for name, s in of.items() if s.shape}
    found = {*known.values()} | (set() if shape is None else {check_shape(shape)})
    if not found:
        raise InputError("these head sets do not know their model; give shape=(n_layers, n_heads)")
    if len(found) > 1:
        said = ", ".join(f"{name}: {s[0]}x{s[1]}" for name, s in known.items()) + (f"; shape={shape}" if shape else "")
        raise InputError(f"heads of different models cannot be compared ({said}); give one model's")
    only = joint_grid([*known.values(), *found])
    for s in of.values():
        if isinstance(s, HeadSet):
            s.check(only)
    return only


def _at_least_two(given: Mapping[str, object], what: str, example: str) -> None:
    if len(given) < 2:
        raise InputError(f"{len(given)} {what} given; a comparison needs at least two, e.g. {example}")


def _within_layers(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two tables of ranks minus each layer's mean."""
    x, y = (t - t.mean(1, keepdims=True) for t in (a, b))
    size = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size > 1e-9 else float("nan")
