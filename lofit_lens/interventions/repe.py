"""RepE's control: `h_l <- h_l + coefficient * direction_l` (arXiv 2310.01405, section 3.2, the reading-vector baseline).

h is `hook_resid_post` of the chosen layers l, at every position. A direction is a unit vector that points from wrong to right
statements; `lofit_lens.probing.reading_vectors` finds it.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.checks import check_is
from lofit_lens.errors import InputError
from lofit_lens.heads import layers_of
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import check_tensors
from lofit_lens.interventions.residual import ResidualAdapter
from lofit_lens.interventions.steering import Steering
from lofit_lens.models import ALL, Positions, Site

NORM_TOLERANCE = 1e-3  # how far from 1 the norm of a direction may be


def shift_h(
    h: Float[Tensor, "batch pos d_model"], shift: Float[Tensor, "*batch_pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """Add a shift, in units of h; over a half-precision model in float32, rounded once."""
    return (h + shift).to(h.dtype)


class RepE(ResidualAdapter, Steering):
    """Unit directions that are added to the residual stream of chosen layers.

    With `relative`, a layer's shift is `coefficient * scale_l * direction_l`, where scale_l is the standard deviation of the
    statements' projections on the direction. Like ITI's alpha, one coefficient then means the same on any model and layer.
    Otherwise (as in the paper) the coefficient is in units of h itself, whose size grows with depth and differs between
    models.

    Args:
        directions: `[n_chosen, d_model]`, one per layer in the order of `layers`, of norm 1, sign applied.
        layers: the edited layers.
        n_layers: layers of the model.
        coefficient: strength; a negative one steers towards wrong statements.
        scale: `[n_chosen]`, in units of h; None = unknown.
        relative: whether the coefficient is in units of `scale`.
        positions: where it acts.
        meta: provenance.

    Attributes:
        directions: `[n_chosen, d_model]` float32, in the order of `layers`.
        scale: `[n_chosen]` float32; ones if unknown.
        layers: ascending.

    Nothing is trained.

    Raises:
        InputError: no layer, a layer outside the model or given twice, not one direction and scale per
            layer, a direction that is not of norm 1, a scale that is not above 0, a coefficient that is not finite,
            `relative` without scale, or unknown positions.
    """

    method: ClassVar[str] = "repe"
    title: ClassVar[str] = "RepE"
    strength: ClassVar[str] = "coefficient"
    coefficient: float
    site: ClassVar[Site] = "hook_resid_post"
    directions: Tensor
    scale: Tensor

    def __init__(
        self,
        directions: Float[Tensor, "n_chosen d_model"],
        layers: Iterable[int],
        *,
        n_layers: int,
        coefficient: float,
        scale: Float[Tensor, " n_scales"] | None = None,
        relative: bool = False,
        positions: str | Positions = ALL,
        meta: AdapterMeta | None = None,
    ) -> None:
        given = tuple(layers_of(layers))
        check_is(relative, bool, "relative", "True or False")
        check_is(directions, Tensor, "directions", "a tensor [n_chosen, d_model]")
        check_is(scale, (Tensor, type(None)), "scale", "a tensor [n_chosen], or None")
        if directions.ndim != 2:
            raise InputError(f"directions have shape {tuple(directions.shape)}; give [n_chosen, d_model]")
        super().__init__(n_layers, directions.shape[1], given, meta, positions)
        self.relative = relative
        self._set_strength(coefficient)
        if relative and scale is None:
            raise InputError("a relative strength is in units of each layer's scale; give scale, or relative=False")
        if len(directions) != len(given) or (scale is not None and len(scale) != len(given)):
            scales = "" if scale is None else f" and {len(scale)} scales"
            raise InputError(f"{len(given)} layers with {len(directions)} directions{scales}; give one per layer")
        order = [given.index(layer) for layer in self.layers]
        unit = directions.detach().float()[order].clone()
        sizes = torch.ones(len(order)) if scale is None else scale.detach().float()[order].clone()
        for layer, norm, size in zip(
            self.layers, torch.linalg.vector_norm(unit, dim=1).tolist(), sizes.tolist(), strict=True
        ):
            if not abs(norm - 1) <= NORM_TOLERANCE:
                raise InputError(f"the direction of layer {layer} has norm {norm:.4g}; divide it by its norm")
            if not 0 < size < math.inf:
                raise InputError(f"the scale of layer {layer} is {size:.4g}; it must be above 0 and finite")
        self.register_buffer("directions", unit)
        self.register_buffer("scale", sizes.to(unit.device))

    @property
    def n_parameters(self) -> int:
        """Count of numbers estimated for the edit: d_model per layer."""
        return len(self.layers) * self.d_model

    def shift(self, layer: int) -> Float[Tensor, " d_model"]:
        """Return what is added to h at a chosen layer, in units of h."""
        if layer not in self.layers:
            raise InputError(f"layer {layer!r} is not edited; give one of {', '.join(map(str, self.layers))}")
        i = self.layers.index(layer)
        size = self.scale[i] if self.relative else 1.0
        return self.coefficient * size * self.directions[i]

    def _edit(self, layer: int) -> Edit:
        return lambda h: shift_h(h, self.shift(layer).to(h.device))

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"coefficient": self.coefficient, "relative": self.relative}

    @classmethod
    def _made_from(cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path) -> "RepE":
        layers = [int(n) for n in record["layers"]]
        shapes = {"directions": (len(layers), int(record["d_model"])), "scale": (len(layers),)}
        check_tensors(tensors, shapes, where)
        if not isinstance(record["relative"], bool):
            raise ValueError(f"relative is {record['relative']!r}; it must be true or false")
        return cls(
            tensors["directions"], layers, n_layers=int(record["n_layers"]), coefficient=float(record["coefficient"]),
            scale=tensors["scale"], relative=record["relative"], positions=record["positions"], meta=meta,
        )  # fmt: skip

    def _parts(self) -> list[str]:
        unit = " sigma" if self.relative else ""
        return [
            f"coefficient {self.coefficient:g}{unit} at {self.positions}", f"layers {' '.join(map(str, self.layers))}",
            f"{self.n_parameters:,} parameters",
        ]  # fmt: skip
