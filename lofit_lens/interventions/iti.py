"""ITI: `z <- z + alpha * sigma * d` on the outputs of chosen attention heads (arXiv 2306.03341, section 4.1, equation 2).

z is `hook_z`, each head's output before W_O. d is a unit vector in the head's own space that points from false to true
statements, and sigma is the standard deviation of the statements' projections on it. Both are estimated, not trained;
`lofit_lens.probing.fit_probes` finds them and ranks the heads. alpha is the strength, 15 in the paper.

Where it acts (`positions`): the paper shifts the last position of each decoding step; it does not say what is shifted when
answers are scored. The sources differ there:

- `"answer"`, the default: every token of the answer. This is the least that makes scoring match decoding: in both, a token that
  the model has read as part of its answer is shifted.
- `"second"`: the answer's tokens except the first. The public code does this (`legacy/llama_utils.py`, `start_edit_location`): it
  counts four tokens for the `\nA: ` between question and answer, and three where it leaves those tokens out of the score. An
  answer of two tokens or fewer keeps the unmodified model's score.
- `"last"`: the newest version of that code shifts only the last position, which leaves the scores of all answers unchanged.

All three decode alike. The shift also depends on how statements end: see `full_stop` of `lofit_lens.probing.fit_probes`.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.checks import check_is, check_whole
from lofit_lens.errors import InputError
from lofit_lens.heads import Head, Heads
from lofit_lens.interventions.at_heads import HeadAdapter, shape_and_heads
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import check_tensors
from lofit_lens.interventions.steering import Steering
from lofit_lens.models import Positions

ALPHA = 15.0
NORM_TOLERANCE = 1e-3  # how far from 1 the norm of a direction may be


def shift_z(
    z: Float[Tensor, "batch pos n_heads d_head"], shift: Float[Tensor, "n_heads d_head"]
) -> Float[Tensor, "batch pos n_heads d_head"]:
    """Add a shift to every head's output, in units of z; entries whose shift is 0 do not change, bit by bit.

    The shift is float32: over a half-precision model the sum is computed in float32 and rounded once.
    """
    return torch.where(shift == 0, z, (z + shift).to(z.dtype))


class ITI(HeadAdapter, Steering):
    """Directions and their standard deviations for the chosen heads of one model, and one strength.

    Args:
        shape: `(n_layers, n_heads, d_head)`.
        heads: the heads that are edited.
        directions: `[K, d_head]`, one per head in the order of `heads`, of norm 1; or all zero, for a head without a direction.
        sigma: `[K]`, in units of z.
        alpha: strength, in sigmas; a negative one steers towards false statements.
        positions: where it acts; see `models.Positions`.
        meta: provenance.

    Attributes:
        directions: `[K, d_head]` float32.
        sigma: `[K]` float32.
        heads: the head set, its scores kept.

    Nothing is trained: `with_strength` and `with_positions` give copies that need no new fit. Value biases that were folded
    into b_O on loading shift z by a constant and change neither d nor sigma.

    Raises:
        InputError: no head, a head outside the shape, not one direction and sigma per head, a direction that neither has norm 1
            nor is zero, a sigma below 0, a number that is not finite, or unknown positions.
    """

    method: ClassVar[str] = "iti"
    title: ClassVar[str] = "ITI"
    strength: ClassVar[str] = "alpha"
    alpha: float
    directions: Tensor
    sigma: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        heads: Heads,
        *,
        directions: Float[Tensor, "n_directions size"],
        sigma: Float[Tensor, " n_sigmas"],
        alpha: float = ALPHA,
        positions: str | Positions = "answer",
        meta: AdapterMeta | None = None,
    ) -> None:
        super().__init__(shape, heads, meta, positions)
        self._set_strength(alpha)
        k, d_head = self.k, self.d_head
        for name, value in (("directions", directions), ("sigma", sigma)):
            check_is(value, Tensor, name, "a tensor")
        if directions.shape != (k, d_head) or sigma.shape != (k,):
            raise InputError(
                f"{k} heads of d_head {d_head} with directions {tuple(directions.shape)} and sigma {tuple(sigma.shape)}; "
                f"give [{k}, {d_head}] and [{k}], one per head"
            )
        unit, spread = directions.detach().float().clone(), sigma.detach().float().clone()
        norms = torch.linalg.vector_norm(unit, dim=1).tolist()
        for head, norm, size in zip(self.heads, norms, spread.tolist(), strict=True):
            if not (norm == 0 or abs(norm - 1) <= NORM_TOLERANCE):
                raise InputError(f"the direction of head {head} has norm {norm:.4g}; divide it by its norm")
            if not 0 <= size < math.inf:
                raise InputError(f"sigma of head {head} is {size:.4g}; it must be 0 or above and finite")
        self.register_buffer("directions", unit)
        self.register_buffer("sigma", spread.to(unit.device))

    @property
    def n_parameters(self) -> int:
        """Count of numbers estimated for the edit: `K * d_head`, with sigma counted into the direction's length."""
        return self.k * self.d_head

    def affine(self, head: Head) -> tuple[Float[Tensor, " d_head"], Float[Tensor, " d_head"]]:
        """Return 1 and `alpha * sigma * d`."""
        shift = self.shift(head.layer)[head.head]
        return torch.ones_like(shift), shift

    def shift(self, layer: int) -> Float[Tensor, "n_heads d_head"]:
        """Return what is added to z in one layer, `alpha * sigma * d` in units of z, float32; zero outside the chosen heads."""
        check_whole(0, self.shape[0] - 1, layer=layer)
        found = torch.zeros(self.shape[1:], device=self.directions.device)
        for i, head in enumerate(self.heads):
            if head.layer == layer:
                found[head.head] = self.alpha * self.sigma[i] * self.directions[i]
        return found

    def _edit(self, layer: int) -> Edit:
        return lambda z: shift_z(z, self.shift(layer).to(z.device))

    # ------------------------------------------------------------------------------------------- saving

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"alpha": self.alpha}

    @classmethod
    def _made_from(cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path) -> "ITI":
        shape, heads = shape_and_heads(record, where)
        check_tensors(tensors, {"directions": (len(heads), shape[2]), "sigma": (len(heads),)}, where)
        return cls(
            shape, heads, directions=tensors["directions"], sigma=tensors["sigma"],
            alpha=float(record["alpha"]), positions=record["positions"], meta=meta,
        )  # fmt: skip

    def _parts(self) -> list[str]:
        kind = self.meta.config.get("direction")
        return [
            f"K={self.k} of {self.shape[0]}x{self.shape[1]} heads", *([f"{kind} directions"] if kind else []),
            f"alpha {self.alpha:g} at {self.positions}", f"{self.n_parameters:,} parameters",
        ]  # fmt: skip
