"""How many heads two sets would share by chance.

Of N heads, one set holds k_a and another k_b, drawn uniformly and independently. The number X that they share is hypergeometric:

    P(X = x) = C(k_a, x) C(N - k_a, k_b - x) / C(N, k_b),   E[X] = k_a k_b / N

Layer-matched: each set keeps its number of heads in every layer, and only their indices within the layer are shuffled. Then
X is a sum of independent hypergeometric numbers, one per layer, and its distribution is their convolution. This is the exact
form of the permutation test that shuffles heads within layers.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from lofit_lens.checks import check_share
from lofit_lens.errors import InputError


@functools.lru_cache(maxsize=8192)
def shared_by_chance(k_a: int, k_b: int, n: int) -> Float[np.ndarray, " outcomes"]:
    """Probability of 0, 1, ... min(k_a, k_b) shared heads of two sets drawn uniformly from n heads (cached: do not write to it).

    Raises:
        InputError: a set larger than the model, or a negative number.
    """
    if not (0 <= k_a <= n and 0 <= k_b <= n):
        raise InputError(f"sets of {k_a} and {k_b} heads out of {n}; a set holds 0 to {n} heads")
    found = stats.hypergeom.pmf(np.arange(min(k_a, k_b) + 1), n, k_a, k_b)
    found.setflags(write=False)
    return found


def shared_by_chance_in_layers(
    counts_a: Int[np.ndarray, " n_layers"], counts_b: Int[np.ndarray, " n_layers"], n_heads: int
) -> Float[np.ndarray, " outcomes"]:
    """The same if both sets keep their number of heads in each layer (heads shuffled within layers), exact.

    Args:
        counts_a: heads of the first set in each layer.
        counts_b: heads of the second set in each layer.
        n_heads: heads per layer.

    Raises:
        InputError: a count above the number of heads in a layer.
    """
    found = np.ones(1)
    for a, b in zip(counts_a.tolist(), counts_b.tolist(), strict=True):
        if a and b:  # else no head is shared in this layer
            found = np.convolve(found, shared_by_chance(a, b, n_heads))
    return found


def at_least(outcomes: Float[np.ndarray, " outcomes"], shared: int) -> float:
    """P(X >= shared) of a distribution over 0, 1, 2, ...; 1 for 0."""
    return 1.0 if shared <= 0 else min(1.0, float(outcomes[shared:].sum()))


def mean_jaccard(outcomes: Float[np.ndarray, " outcomes"], k_a: int, k_b: int) -> float:
    """Mean of shared / (k_a + k_b - shared) over a distribution of shared heads, exact; at least one set must not be empty."""
    x = np.arange(outcomes.size)
    return float(outcomes @ (x / (k_a + k_b - x)))


def chance_range(outcomes: Float[np.ndarray, " outcomes"], *, level: float = 0.95) -> tuple[int, int]:
    """Quantiles of a distribution over 0, 1, 2, ...: at least `level` of it lies between them, both included.

    Raises:
        InputError: a level outside (0, 1).
    """
    check_share("level", level)
    below = np.cumsum(outcomes)
    low, high = np.searchsorted(below, [(1 - level) / 2 - 1e-12, (1 + level) / 2 - 1e-12])
    return int(low), min(int(high), below.size - 1)


def rank_biased_overlap(a: Sequence[object], b: Sequence[object], *, p: float = 0.9) -> float:
    """Top-weighted similarity of two rankings, in [0, 1]: RBO_ext of Webber, Moffat & Zobel 2010, eq. 32.

    With X_d the items shared by the first d of both, s the shorter and l the longer length:

        (1 - p) / p * (sum_{d=1}^{l} X_d / d p^d + sum_{d=s+1}^{l} X_s (d - s) / (s d) p^d)
            + ((X_l - X_s) / l + X_s / s) p^l

    It assumes that the observed agreement continues beyond the end of the lists. Identical lists give 1, lists without a shared
    item 0.

    Args:
        a: items, best first, none twice.
        b: likewise; may be longer or shorter.
        p: persistence. The first 10 ranks have 86 % of the weight at 0.9, the first 50 at 0.98.

    Raises:
        InputError: an empty list or p outside (0, 1).
    """
    check_share("p", p)
    if not a or not b:
        raise InputError("a ranking is empty; give at least one item on both sides")
    s, n = sorted((len(a), len(b)))
    x = shared_by_depth(a, b)
    d = np.arange(1, n + 1)
    weights = p ** d.astype(float)
    seen = (x / d) @ weights
    beyond = (x[s - 1] * (d - s) / (s * d))[s:] @ weights[s:]
    at_end = (x[-1] - x[s - 1]) / n + x[s - 1] / s
    return float((1 - p) / p * (seen + beyond) + at_end * p**n)


def shared_by_depth(a: Sequence[object], b: Sequence[object]) -> Int[np.ndarray, " depth"]:
    """Items shared by the first d of both rankings, for d = 1 up to the longer length."""
    place = {item: i for i, item in enumerate(b)}
    both = [max(i, place[item]) for i, item in enumerate(a) if item in place]
    return np.cumsum(np.bincount(np.array(both, dtype=np.int64), minlength=max(len(a), len(b))))
