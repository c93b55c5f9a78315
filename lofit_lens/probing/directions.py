"""Truthful directions in one head's output: the mean shift, its length, and the spread along it.

theta = mean(z of right statements) - mean(z of wrong statements)        (mass mean shift; arXiv 2306.03341, section 4.1)
sigma = standard deviation of the projections of all z on theta / |theta|
"""

import numpy as np
from jaxtyping import Float


def mass_mean_direction(
    right: Float[np.ndarray, "n_right d_head"], wrong: Float[np.ndarray, "n_wrong d_head"]
) -> Float[np.ndarray, " d_head"]:
    """Mean of the right statements minus mean of the wrong ones, in units of z; not normalized, see `unit`."""
    return right.mean(axis=0, dtype=np.float64) - wrong.mean(axis=0, dtype=np.float64)


def unit(directions: Float[np.ndarray, "*rest d_head"]) -> Float[np.ndarray, "*rest d_head"]:
    """Each vector divided by its norm; a zero vector, which has no direction, stays zero."""
    norms = np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.divide(directions, norms, out=np.zeros_like(directions), where=norms > 0)


def spread(
    z: Float[np.ndarray, "n d_head"], directions: Float[np.ndarray, "n_directions d_head"]
) -> Float[np.ndarray, " n_directions"]:
    """Standard deviation (divided by n) of the projections of z on each direction, in units of z for directions of norm 1."""
    return np.std(z.astype(np.float64) @ directions.T.astype(np.float64), axis=0)


def random_directions(shape: tuple[int, int, int], *, seed: int) -> Float[np.ndarray, "n_layers n_heads d_head"]:
    """A unit vector for every head, drawn uniformly over all directions: ITI's control."""
    return unit(np.random.default_rng(seed).normal(size=shape))
