"""Post-block steering: `h + U f(D h)` on every block's output, after the residual addition (arXiv 2603.00425, ICML 2026).

D `[rank, d_model]` and U `[d_model, rank]` have no biases; f is SiLU, or the identity ("linear"). Written from the formula.

The settings come from the authors' code (github.com/SprocketLab/steerling, commit 76b60f1), whose README calls its defaults the
paper's: all layers, all tokens, rank 8, SiLU, U zero, D uniform within +-1e-3 / sqrt(d_model), a thousandth of `nn.Linear`'s own
start. The code trains by AdamW without weight decay at lr 9e-4, rising in 3 % of the steps and falling linearly, clip 1. The
paper's own table of settings was not at hand. What differs here:

| | the authors' code | here |
|---|---|---|
| rows per step, epochs, warm-up | 2 x 8 of like length, 1 to 3, 3 % | LoFiT's (8, 5, none); `TrainConfig` takes others |
| type of U and D | the base model's | float32; the edit is rounded once |
| factor alpha before U | an argument, 1 in all scripts | left out, as U can hold it |
| other places and functions, joint training with LoRA | options | left out |
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.checks import check_one_of, check_seed, check_whole
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import check_tensors
from lofit_lens.interventions.residual import ResidualAdapter
from lofit_lens.models import Site, device_of, model_info

RANK = 8
INIT = 1e-3  # times the bound of `nn.Linear`'s own start
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "linear": lambda x: x}


def steer(
    h: Float[Tensor, "*batch d_model"],
    D: Float[Tensor, "rank d_model"],
    U: Float[Tensor, "d_model rank"],
    f: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*batch d_model"]:
    """The edit, computed in float32 or above and rounded once to h's dtype."""
    wide = torch.promote_types(h.dtype, D.dtype)
    x, D, U = h.to(wide), D.to(wide), U.to(wide)
    return (x + F.linear(f(F.linear(x, D)), U)).to(h.dtype)


class PostBlock(ResidualAdapter):
    """A low-rank function of the residual stream, added to it behind each chosen layer, at all positions.

    Args:
        n_layers: layers of the model.
        d_model: width of the residual stream.
        rank: width of the bottleneck in each layer.
        f: the function in it, `"silu"` or `"linear"`.
        layers: the edited layers; None = all.
        meta: provenance.

    Attributes:
        D: `[n_layers_chosen, rank, d_model]` float32, from the residual stream down.
        U: `[n_layers_chosen, d_model, rank]` float32, back up; 0 at the start, which leaves the model bit-equal.
        rank: as given.
        f: as given.

    Both matrices are trainable until `fit` has trained them. D is 0 too before `reset_` has drawn it, and nothing learns then.

    Raises:
        InputError: a layer outside the model, given twice, or none at all; a rank outside 1..d_model; another f.
    """

    method: ClassVar[str] = "post-block"
    title: ClassVar[str] = "post-block steering"
    site: ClassVar[Site] = "hook_resid_post"
    D: nn.Parameter
    U: nn.Parameter

    def __init__(
        self, n_layers: int, d_model: int, *, rank: int = RANK, f: str = "silu", layers: Iterable[int] | None = None,
        meta: AdapterMeta | None = None,
    ) -> None:  # fmt: skip
        super().__init__(n_layers, d_model, layers, meta)
        check_whole(1, d_model, rank=rank)
        check_one_of("f", f, tuple(FUNCTIONS))
        self.rank, self.f = rank, f
        self.D = nn.Parameter(torch.zeros(len(self.layers), rank, d_model))
        self.U = nn.Parameter(torch.zeros(len(self.layers), d_model, rank))

    @classmethod
    def for_model(
        cls, model: Any, *, rank: int = RANK, f: str = "silu", layers: Iterable[int] | None = None, seed: int
    ) -> "PostBlock":
        """The adapter that changes nothing yet, ready to be trained, on the model's device; see `reset_`.

        Raises:
            InputError: a layer outside the model, given twice, or none at all; a rank outside 1..d_model; another f.
            ModelError: a layer whose output cannot be reached.
        """
        info = model_info(model)
        meta = AdapterMeta(model=info, seed=seed, versions=io.environment())
        made = cls(info.n_layers, info.d_model, rank=rank, f=f, layers=layers, meta=meta)
        made.attach_check(model)
        return made.reset_(seed).to(device_of(model))

    @torch.no_grad()
    def reset_(self, seed: int) -> "PostBlock":
        """Draw D anew, set U to 0, and make both trainable.

        D is drawn from one CPU generator, layer by layer, the same on every device.
        """
        check_seed(seed)
        generator, bound = torch.Generator().manual_seed(seed), INIT * self.d_model**-0.5
        for D in self.D:
            D.copy_(torch.empty(D.shape).uniform_(-bound, bound, generator=generator))
        self.U.zero_()
        return self.requires_grad_(True)

    @property
    def n_parameters(self) -> int:
        """`2 * rank * d_model` for each layer."""
        return self.D.numel() + self.U.numel()

    def _edit(self, layer: int) -> Edit:
        at = self.layers.index(layer)
        return lambda h: steer(h, self.D[at].to(h.device), self.U[at].to(h.device), FUNCTIONS[self.f])

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"rank": self.rank, "f": self.f}

    @classmethod
    def _made_from(
        cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path
    ) -> "PostBlock":
        layers, d_model, rank = [int(n) for n in record["layers"]], int(record["d_model"]), int(record["rank"])
        n = len(layers)
        check_tensors(tensors, {"D": (n, rank, d_model), "U": (n, d_model, rank)}, where)
        made = cls(int(record["n_layers"]), d_model, rank=rank, f=record["f"], layers=layers, meta=meta)
        made.load_state_dict(tensors)
        return made.requires_grad_(False)

    def _parts(self) -> list[str]:
        return [
            f"rank {self.rank}", self.f, f"{len(self.layers)} of {self.n_layers} layers", f"{self.n_parameters:,} parameters"
        ]  # fmt: skip
