"""Does head selection find the same heads over seeds or folds?

For runs r of one task, with T_r(K) the top K heads of run r:

    jaccard(K)    mean over pairs of |T_r & T_s| / |T_r | T_s|
    frequency     share of runs in which a head is in T_r(K)
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from lofit_lens.analysis.chance import mean_jaccard, shared_by_chance, shared_by_depth
from lofit_lens.analysis.overlap import joint_shape, score_agreement
from lofit_lens.checks import shown
from lofit_lens.errors import InputError
from lofit_lens.heads import Grid, HeadScores, Scores, check_k, named_scores


def stability(scores: Scores, ks: Sequence[int] | None = None) -> pd.DataFrame:
    """Agreement of the top K heads over the runs of one task, for each K.

    Args:
        scores: one `[n_layers, n_heads]` per run (seed or fold), in a list or by name.
        ks: numbers of heads; None = every K from 1 to all heads.

    Returns:
        One row per K: k; jaccard and shared (mean over pairs of runs), lowest and highest (Jaccard of the pairs), expected
        and expected_shared (two sets drawn uniformly, exact), n_runs, n_pairs. The pairs share runs, so their range is not
        a confidence interval.

    Raises:
        InputError: fewer than two runs, runs of different models, no K, or a K that the model does not have.

    Examples:
        >>> runs = [HeadScores([[0.1, 0.9], [0.7, 0.2]]), HeadScores([[0.1, 0.8], [0.2, 0.7]])]
        >>> stability(runs, ks=[1, 2])["jaccard"].round(3).tolist()
        [1.0, 0.333]
    """
    runs, shape = _checked(scores)
    total = shape.n_total
    wanted = list(range(1, total + 1)) if ks is None else list(ks) if isinstance(ks, Iterable) else []
    if not wanted:
        raise InputError(f"ks is {shown(ks)}; give numbers of heads from 1 to {total}, or None for all")
    rankings = [s.ranking().heads for s in runs]
    depth = np.array([shared_by_depth(a, b) for a, b in combinations(rankings, 2)])
    rows = []
    for k in wanted:
        check_k(k, total, "this model")
        shared = depth[:, k - 1]
        jaccard = shared / (2 * k - shared)
        expected = mean_jaccard(shared_by_chance(k, k, total), k, k)
        rows.append({
            "k": int(k), "jaccard": float(jaccard.mean()), "shared": float(shared.mean()), "lowest": float(jaccard.min()),
            "highest": float(jaccard.max()), "expected": expected, "expected_shared": k * k / total,
            "n_runs": len(rankings), "n_pairs": len(depth),
        })  # fmt: skip
    return pd.DataFrame(rows)


def selection_frequency(scores: Scores, k: int) -> HeadScores:
    """Share of runs in which each head is among the top K: 1 = always, 0 = never; K / N by chance.

    Raises:
        InputError: no run, runs of different models, or a K that the model does not have.

    Examples:
        >>> runs = [HeadScores([[0.1, 0.9], [0.7, 0.2]]), HeadScores([[0.1, 0.8], [0.2, 0.7]])]
        >>> selection_frequency(runs, 2).values.tolist()
        [[0.0, 1.0], [0.5, 0.5]]
    """
    runs, shape = _checked(scores, least=1)
    chosen = torch.stack([s.top(k).mask(shape) for s in runs]).double().mean(0)
    names = [{getattr(s, of) for s in runs} for of in ("model", "task")]
    model, task = (n.pop() if len(n) == 1 else "" for n in names)
    return HeadScores(
        chosen, f"share of {len(runs)} runs (top {k})", model, task, {"k": k, "n_runs": len(runs)}, shape.head_layers
    )


def mean_spearman(scores: Scores) -> float:
    """Mean rank correlation of all heads' scores over pairs of runs.

    Raises:
        InputError: fewer than two runs, runs of different models, or a run whose scores are all equal.

    Examples:
        >>> runs = [HeadScores([[0.1, 0.9], [0.7, 0.2]]), HeadScores([[0.1, 0.8], [0.2, 0.7]])]
        >>> round(mean_spearman(runs), 3)
        0.8
    """
    runs, _ = _checked(scores)
    return float(np.mean(score_agreement({f"run {i}": s for i, s in enumerate(runs)})["rho"].to_numpy()))


def _checked(scores: Scores, *, least: int = 2) -> tuple[list[HeadScores], Grid]:
    runs = list(named_scores(scores).values())
    if len(runs) < least:
        raise InputError(f"{len(runs)} runs given; give at least {least} seeds or folds of one task")
    return runs, joint_shape({f"run {i}": s for i, s in enumerate(runs)})
