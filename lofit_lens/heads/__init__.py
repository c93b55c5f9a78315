"""Attention heads as data: one head, an ordered set of heads, and a score for every head.

`HeadScores [n_layers, n_heads] -> .top(k) -> HeadSet -> .mask()` is the path from step 1 of LoFiT
(arXiv 2406.01563, section 3: keep the K heads with the largest norm) to step 2.

>>> scores = HeadScores([[0.1, 0.9], [0.7, 0.2]], kind="A-norm")
>>> str(scores.top(2))
'L0H1 L1H0'
>>> scores.top(1) | HeadSet([(1, 1)], shape=(2, 2))
HeadSet(2 of 2x2 heads: L0H1 L1H1)
"""

from lofit_lens.heads.grid import Grid, check_shape, joint_grid, layers_of
from lofit_lens.heads.named import (
    Ranking,
    Rankings,
    Scores,
    Sets,
    named_rankings,
    named_scores,
    named_sets,
)
from lofit_lens.heads.scores import HeadScores
from lofit_lens.heads.sets import Head, Heads, HeadSet, check_k

__all__ = [
    "Grid", "Head", "HeadScores", "HeadSet", "Heads", "Ranking", "Rankings", "Scores", "Sets", "check_k", "check_shape",
    "joint_grid", "layers_of", "named_rankings", "named_scores", "named_sets",
]  # fmt: skip
