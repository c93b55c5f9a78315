"""Muon: momentum with orthogonalized steps, for the weight matrices of a small transformer.

    M <- mu M + G          step = lr * sqrt(max(1, rows/cols)) * orthogonal(G + mu M)

Newton-Schulz iteration brings every singular value of a matrix near 1 without computing it (Jordan et al., 2024). Why
here: the world's thousand facts are learned in few steps, and orthogonal updates keep the output matrix W_O well conditioned, so
that the heads of a layer write into nearly separate subspaces. Matrices of equal shape are stacked and handled at once.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Float[Tensor, "n rows cols"], *, iterations: int = 5) -> Float[Tensor, "n rows cols"]:
    """Push the singular values of each matrix to roughly 1 (between 0.7 and 1.2)."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if wide else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if wide else x


class Muon(torch.optim.Optimizer):
    """The optimizer above for 2-D parameters; use AdamW for embeddings and norms."""

    def __init__(self, params: Iterable[Tensor], *, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
                moment.mul_(group["momentum"]).add_(parameter.grad)
                by_shape[parameter.shape].append((parameter, parameter.grad + group["momentum"] * moment))
            for (rows, cols), pairs in by_shape.items():
                steps = orthogonal(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for (parameter, _), update in zip(pairs, steps, strict=True):
                    parameter.sub_(update, alpha=scale)
