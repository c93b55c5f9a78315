"""RED: `y = s * x + b` on every layer's MLP output, before it is added to the residual stream (arXiv 2402.15179, section 3).

s starts at 1 and b at 0, which leaves the model bit-equal. `2 * d_model` numbers are learned per layer. Written from the formula.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import check_tensors
from lofit_lens.interventions.residual import ResidualAdapter
from lofit_lens.models import Site, device_of, model_info


def scale_and_shift(
    x: Float[Tensor, "batch pos d_model"], s: Float[Tensor, " d_model"], b: Float[Tensor, " d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """Apply the edit, computed in float32 (as s and b are) and rounded once to x's dtype."""
    return (x * s + b).to(x.dtype)


class Red(ResidualAdapter):
    """One scaling vector and one bias vector for the MLP output of each chosen layer.

    Args:
        n_layers: layers of the model.
        d_model: width of the residual stream.
        layers: the edited layers; None = all.
        meta: provenance.

    Attributes:
        s: `[n_layers_chosen, d_model]` float32 scalings, 1 at the start.
        b: `[n_layers_chosen, d_model]` float32 biases in units of the MLP output, 0 at the start.

    Both are trainable until `fit` has trained them.

    Raises:
        InputError: no layer, or a layer outside the model or given twice.
    """

    method: ClassVar[str] = "red"
    title: ClassVar[str] = "RED"
    site: ClassVar[Site] = "hook_mlp_out"
    s: nn.Parameter
    b: nn.Parameter

    def __init__(
        self, n_layers: int, d_model: int, *, layers: Iterable[int] | None = None, meta: AdapterMeta | None = None
    ) -> None:
        super().__init__(n_layers, d_model, layers, meta)
        self.s = nn.Parameter(torch.ones(len(self.layers), d_model))
        self.b = nn.Parameter(torch.zeros(len(self.layers), d_model))

    @classmethod
    def for_model(cls, model: Any, *, layers: Iterable[int] | None = None) -> "Red":
        """Make an adapter that changes nothing yet, on the model's device.

        Raises:
            InputError: no layer, or a layer outside the model or given twice.
            ModelError: a layer whose MLP output cannot be reached.
        """
        info = model_info(model)
        made = cls(info.n_layers, info.d_model, layers=layers, meta=AdapterMeta(model=info, versions=io.environment()))
        made.attach_check(model)
        return made.to(device_of(model))

    @property
    def n_parameters(self) -> int:
        """Count of its numbers: `2 * d_model` for each layer."""
        return self.s.numel() + self.b.numel()

    def _edit(self, layer: int) -> Edit:
        at = self.layers.index(layer)
        return lambda x: scale_and_shift(x, self.s[at].to(x.device), self.b[at].to(x.device))

    @classmethod
    def _made_from(cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path) -> "Red":
        layers, d_model = [int(n) for n in record["layers"]], int(record["d_model"])
        check_tensors(tensors, dict.fromkeys(("s", "b"), (len(layers), d_model)), where)
        made = cls(int(record["n_layers"]), d_model, layers=layers, meta=meta)
        made.load_state_dict(tensors)
        return made.requires_grad_(False)

    def _parts(self) -> list[str]:
        return [f"{len(self.layers)} of {self.n_layers} layers", f"{self.n_parameters:,} parameters"]
