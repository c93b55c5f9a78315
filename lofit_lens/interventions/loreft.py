"""LoReFT: `h + R^T (W h + b - R h)` on the residual stream after chosen layers (arXiv 2404.03592, section 3).

R has `rank` orthonormal rows. Inside the subspace that they span, h is replaced by the learned `W h + b`; outside, it does not
change. By default the prompt's first 7 and last 7 tokens are edited, in every layer.

R is learned through coordinates of the same size, X `[d_model, rank]`. Below the diagonal are the vectors of `rank`
Householder reflections, whose product's first columns are R's rows up to sign; the diagonal keeps the signs and is not
trained. PyTorch's `orthogonal` parametrization ("householder") uses the same coordinates, but multiplies reflections one by
one, which costs over a second per layer and step at d_model 4096. Here they are multiplied at once, in the form of Schreiber and
Van Loan (1989), in two milliseconds. So R is recomputed wherever it is used, and nothing is kept between passes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.checks import check_seed, check_whole
from lofit_lens.errors import AdapterError
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import WEIGHTS_FILE, check_tensors
from lofit_lens.interventions.residual import ResidualAdapter
from lofit_lens.models import Positions, Site, device_of, model_info

POSITIONS = "f7+l7"
RANK = 8
ORTHONORMAL = 1e-3  # how far a file's R may be from the rows that its coordinates give


def edit_subspace(
    h: Float[Tensor, "*batch d_model"],
    R: Float[Tensor, "rank d_model"],
    W: Float[Tensor, "rank d_model"],
    b: Float[Tensor, " rank"],
) -> Float[Tensor, "*batch d_model"]:
    """Apply the edit (paper, equation 2), computed in float32 or above and rounded once to h's dtype."""
    wide = torch.promote_types(h.dtype, R.dtype)
    x, R, W, b = h.to(wide), R.to(wide), W.to(wide), b.to(wide)
    return (x + F.linear(x, W - R, b) @ R).to(h.dtype)


def orthonormal_rows(X: Float[Tensor, "d_model rank"]) -> Float[Tensor, "rank d_model"]:
    """Compute R from its coordinates: the first columns of H_1 ... H_rank, each times its sign, as rows.

    H_i = I - 2 v_i v_i^T / |v_i|^2, where v_i is column i of X below the diagonal, with 1 on it and 0 above. With V = [v_1 ...]
    the product is I - V T^-1 V^T, where T is V^T V above the diagonal, half of it on it and 0 below.
    """
    eye = torch.eye(*X.shape, dtype=X.dtype, device=X.device)
    V = X.tril(-1) + eye
    G = V.mT @ V
    T = G.triu(1) + torch.diag(G.diagonal() / 2)
    columns = eye - V @ torch.linalg.solve_triangular(T, V[: X.shape[1]].mT, upper=True)
    return (columns * X.diagonal().sign()).mT


@torch.no_grad()
def coordinates(R: Float[Tensor, "rank d_model"]) -> Float[Tensor, "d_model rank"]:
    """Compute X of a matrix with orthonormal rows; `orthonormal_rows` gives R back up to rounding."""
    X, tau = torch.geqrf(R.mT)
    signs = X.diagonal().sign()
    signs[tau == 0] *= -1  # LAPACK used no reflection there; reflecting the axis itself flips the sign
    X.diagonal().copy_(signs)
    return X


class LoReft(ResidualAdapter):
    """A low-rank edit of the residual stream after each chosen layer.

    Args:
        n_layers: layers of the model.
        d_model: width of the residual stream.
        rank: dimensions of the subspace that is edited in each layer.
        layers: the edited layers; None = all.
        positions: where it acts; see `models.Positions`.
        meta: provenance.

    Attributes:
        X: `[n_layers_chosen, d_model, rank]` float32 coordinates of R.
        W: `[n_layers_chosen, rank, d_model]` float32.
        b: `[n_layers_chosen, rank]` float32, in units of the residual stream.
        rank: as given.

    All three are trainable until `fit` has trained them. A new adapter holds no numbers before `reset_`, and is not the
    identity after it, since W is random (as in pyreft).

    Raises:
        InputError: no layer, a layer outside the model or given twice; a rank outside 1..d_model.
    """

    method: ClassVar[str] = "loreft"
    title: ClassVar[str] = "LoReFT"
    site: ClassVar[Site] = "hook_resid_post"
    X: nn.Parameter
    W: nn.Parameter
    b: nn.Parameter

    def __init__(
        self, n_layers: int, d_model: int, *, rank: int = RANK, layers: Iterable[int] | None = None,
        positions: str | Positions = POSITIONS, meta: AdapterMeta | None = None,
    ) -> None:  # fmt: skip
        super().__init__(n_layers, d_model, layers, meta, positions)
        check_whole(1, d_model, rank=rank)
        self.rank = rank
        n = len(self.layers)
        self.X = nn.Parameter(-torch.eye(d_model, rank).repeat(n, 1, 1))  # rows of the identity
        self.W = nn.Parameter(torch.zeros(n, rank, d_model))
        self.b = nn.Parameter(torch.zeros(n, rank))

    @classmethod
    def for_model(
        cls, model: Any, *, rank: int = RANK, layers: Iterable[int] | None = None, positions: str | Positions = POSITIONS,
        seed: int,
    ) -> "LoReft":  # fmt: skip
        """Make an adapter with random numbers, on the model's device; see `reset_`.

        Raises:
            InputError: no layer, a layer outside the model or given twice; a rank outside 1..d_model; unknown positions.
            ModelError: a layer whose output cannot be reached.
        """
        info = model_info(model)
        meta = AdapterMeta(model=info, seed=seed, versions=io.environment())
        made = cls(info.n_layers, info.d_model, rank=rank, layers=layers, positions=positions, meta=meta)
        made.attach_check(model)
        return made.reset_(seed).to(device_of(model))

    @torch.no_grad()
    def reset_(self, seed: int) -> "LoReft":
        """Redraw all numbers and make them trainable.

        As pyreft does: R is uniform over matrices with orthonormal rows; W and b are those of `nn.Linear(d_model, rank)`,
        uniform within +-1/sqrt(d_model). All come from one CPU generator, layer by layer (R, W, b), the same on every device.
        """
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        bound = self.d_model**-0.5
        for at in range(len(self.layers)):
            R = nn.init.orthogonal_(torch.empty(self.rank, self.d_model), generator=generator)
            self.X[at] = coordinates(R).to(self.X.device)
            for p in (self.W, self.b):
                p[at] = torch.empty(p[at].shape).uniform_(-bound, bound, generator=generator).to(p.device)
        return self.requires_grad_(True)

    @property
    def R(self) -> Float[Tensor, "n_layers_chosen rank d_model"]:
        """The matrices with orthonormal rows."""
        return torch.stack([orthonormal_rows(X) for X in self.X])

    @property
    def n_parameters(self) -> int:
        """Count of R, W and b as in pyreft: `2 * rank * d_model + rank` for each layer, though R's rows are not free."""
        return self.X.numel() + self.W.numel() + self.b.numel()

    def _edit(self, layer: int) -> Edit:
        at = self.layers.index(layer)

        def edit(h: Tensor) -> Tensor:
            X, W, b = (p[at].to(h.device) for p in (self.X, self.W, self.b))
            return edit_subspace(h, orthonormal_rows(X), W, b)

        return edit

    def _tensors(self) -> Mapping[str, Tensor]:
        return {
            "R": self.R,
            "W": self.W,
            "b": self.b,
            "X": self.X,
        }  # R for other readers, X to restore the adapter bit by bit

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"rank": self.rank}

    @classmethod
    def _made_from(cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path) -> "LoReft":
        layers, d_model, rank = [int(n) for n in record["layers"]], int(record["d_model"]), int(record["rank"])
        n = len(layers)
        shapes = {"R": (n, rank, d_model), "W": (n, rank, d_model), "b": (n, rank)}
        check_tensors(tensors, shapes | {"X": (n, d_model, rank)}, where)
        made = cls(int(record["n_layers"]), d_model, rank=rank, layers=layers, positions=record["positions"], meta=meta)
        made.load_state_dict({name: tensors[name] for name in ("X", "W", "b")})
        if not torch.allclose(made.R, tensors["R"], atol=ORTHONORMAL):
            raise AdapterError(
                f"{where / WEIGHTS_FILE}: R is not orthonormal, or its coordinates X are another's; save the adapter again"
            )
        return made.requires_grad_(False)

    def _parts(self) -> list[str]:
        return [
            f"rank {self.rank}", f"positions {self.positions}", f"{len(self.layers)} of {self.n_layers} layers",
            f"{self.n_parameters:,} parameters",
        ]  # fmt: skip
