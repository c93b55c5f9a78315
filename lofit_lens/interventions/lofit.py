"""LoFiT: `z <- (1 + A) * z + v` on the outputs of chosen attention heads (arXiv 2406.01563, section 3).

z is `hook_z`, each head's output before W_O, at every position, prompt included, in training and at
inference. Step 1 trains A on every head and ranks heads by the L2 norm of A; step 2 trains v only on
the chosen heads.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.checks import check_is, check_number, check_one_of, check_seed
from lofit_lens.errors import AdapterError
from lofit_lens.heads import Head, Heads, HeadScores, HeadSet, check_shape
from lofit_lens.interventions.at_heads import HeadAdapter, check_vectors_shape, shape_and_heads
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import check_tensors
from lofit_lens.models import model_info, value_biases_folded

INIT_STD = 1e-3
LOFIT = "a LoFiT adapter (tune_offsets, Lofit.from_pretrained)"  # what to give, in errors
Component = Literal["A", "v"]


def edit_z(
    z: Float[Tensor, "batch pos n_heads d_head"],
    A: Float[Tensor, "n_heads d_head"],
    v: Float[Tensor, "n_heads d_head"],
) -> Float[Tensor, "batch pos n_heads d_head"]:
    """The edit: scale every head's output by `1 + A`, then add `v` (paper, equation 1).

    A and v are float32: over a bfloat16 model the edit is computed in float32 and rounded once, since in bfloat16
    itself `1 + A` is 1 for every A below 0.004.

    Examples:
        >>> z = torch.tensor([[[[1.0, 2.0]]]])
        >>> edit_z(z, torch.tensor([[0.5, -0.5]]), torch.tensor([[0.0, 1.0]]))
        tensor([[[[1.5000, 2.0000]]]])
    """
    return (z * (1 + A) + v).to(z.dtype)


class PerHead(nn.Parameter):
    """Numbers of every head, `[n_layers, n_heads, d_head]`, that can be indexed by the name of a head or by a head set.

    Examples:
        >>> PerHead(torch.tensor([[[1.0], [2.0]]]))["L0H1"].tolist()
        [2.0]
    """

    def __getitem__(self, at: Any) -> Tensor:
        """Index as any tensor; `"L2H3"` gives that head's `[d_head]`, several heads give `[K, d_head]`."""
        if isinstance(at, str | HeadSet):
            heads = HeadSet.of(at)
            heads.check((self.shape[0], self.shape[1]))
            found = super().__getitem__(([h.layer for h in heads], [h.head for h in heads]))
            return found[0] if isinstance(at, str) and len(heads) == 1 else found
        return super().__getitem__(at)


class Lofit(HeadAdapter):
    """Scalings `A` and offsets `v` for the chosen heads of one model.

    Args:
        shape: `(n_layers, n_heads, d_head)`.
        heads: the edited heads; None = every head.
        meta: provenance.

    Attributes:
        A: `[n_layers, n_heads, d_head]` scalings, zero outside the heads; `A["L2H3"]` is that head's.
        v: `[n_layers, n_heads, d_head]` offsets in units of z, zero outside the heads; `v["L2H3"]` is that head's.
        heads: the head set, its scores kept.

    Both start at zero, which leaves the model bit-equal. They are float32 whatever the model's dtype.

    Raises:
        InputError: a head outside the shape, or an empty head set.
    """

    method: ClassVar[str] = "lofit"
    title: ClassVar[str] = "LoFiT"
    A: nn.Parameter
    v: nn.Parameter
    mask: Tensor

    def __init__(
        self, shape: tuple[int, int, int], heads: Heads | None = None, meta: AdapterMeta | None = None
    ) -> None:
        grid = check_vectors_shape(shape)[:2]
        super().__init__(shape, HeadSet.all(grid) if heads is None else heads, meta)
        self.A = PerHead(torch.zeros(self.shape), requires_grad=False)
        self.v = PerHead(torch.zeros(self.shape), requires_grad=False)
        self.register_buffer("mask", self.heads.mask(), persistent=False)

    # ------------------------------------------------------------------------------------------- making

    def affine(self, head: Head) -> tuple[Float[Tensor, " d_head"], Float[Tensor, " d_head"]]:
        """Return `1 + A` and `v`."""
        return 1 + self.A[head], self.v[head]

    @torch.no_grad()
    def init_(self, component: Component, *, seed: int, std: float = INIT_STD) -> "Lofit":
        """Draw one component from N(0, std), only on the chosen heads; the other one becomes zero.

        The draw comes from a CPU generator, head by head, layer-major, as in the official code, so it
        is the same on every device.
        """
        check_one_of("component", component, ("A", "v"))
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        self.A.zero_()
        self.v.zero_()
        target = self.A if component == "A" else self.v
        for head in sorted(self.heads):
            target[head] = torch.empty(self.d_head).normal_(0, std, generator=generator).to(target.device)
        return self

    def train_only(self, component: Component | None) -> "Lofit":
        """Make only one component trainable (None: neither)."""
        if component is not None:
            check_one_of("component", component, ("A", "v"))
        self.A.requires_grad_(component == "A")
        self.v.requires_grad_(component == "v")
        return self

    # ------------------------------------------------------------------------------------------- reading

    @property
    def n_parameters(self) -> int:
        """Count of the numbers in this adapter: `K * d_head` for each of A and v that is trainable or not all zero."""
        used = [p for p in (self.A, self.v) if p.requires_grad or bool(p.detach().any())]
        return len(used) * self.k * self.d_head

    def norms(self, component: Component = "A") -> HeadScores:
        """Return the L2 norm of every head's A (the score of step 1) or v, `[n_layers, n_heads]`."""
        check_one_of("component", component, ("A", "v"))
        values = (self.A if component == "A" else self.v).detach()
        info = self.meta.model
        return HeadScores(
            torch.linalg.vector_norm(values.double(), dim=-1), f"{component}-norm", info.name if info else "",
            self.meta.task, layers=check_shape(self.heads.shape).head_layers,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------- attaching

    def attach_check(self, model: Any) -> None:
        """Raise unless this adapter fits this model; warns of another base model's name and of processed weights.

        Raises:
            AdapterError: made for another shape, already attached, or scaling a model whose value biases were folded away.
        """
        super().attach_check(model)
        if value_biases_folded(model):
            name = model_info(model).name
            if self.A.requires_grad or bool(self.A.detach().any()):
                raise AdapterError(
                    f"{name} was loaded with processed weights: its value biases are folded into b_O, so "
                    "scaling z means something else than in the original model. Load it without processing "
                    "(lofit_lens.load_model, or from_pretrained_no_processing)"
                )
            warnings.warn(f"{name} has processed weights; offsets are unaffected, scalings would not be", stacklevel=3)

    def _edit(self, layer: int) -> Edit:
        def edit(z: Tensor) -> Tensor:
            keep = self.mask[layer].to(z.device)[:, None]
            A = torch.where(keep, self.A[layer].to(z.device), 0.0)
            v = torch.where(keep, self.v[layer].to(z.device), 0.0)
            return edit_z(z, A, v)

        return edit

    # ------------------------------------------------------------------------------------------ algebra

    def restrict(self, heads: Heads) -> "Lofit":
        """Return the same adapter on only those of its heads that are also in `heads`.

        Raises:
            InputError: it edits none of these heads.
        """
        return self._with_values(self.heads & heads, self.A, self.v, "restrict", self)

    def __mul__(self, factor: float) -> "Lofit":
        """Scale A and v by a number."""
        check_number(factor=factor)
        return self._with_values(self.heads, self.A * factor, self.v * factor, f"{factor} *", self)

    __rmul__ = __mul__

    def __add__(self, other: "Lofit") -> "Lofit":
        """Add scalings and offsets on the union of heads (one edit, not one after the other)."""
        check_is(other, Lofit, "the other adapter", LOFIT)
        if self.shape != other.shape:
            raise AdapterError(f"adapters of different models: shapes {self.shape} and {other.shape}")
        A, v = self.A + other.A.to(self.A.device), self.v + other.v.to(self.v.device)
        return self._with_values(self.heads | other.heads, A, v, "sum", self, other)

    def __sub__(self, other: "Lofit") -> "Lofit":
        """Subtract scalings and offsets on the union of heads."""
        check_is(other, Lofit, "the other adapter", LOFIT)
        return self + (-1.0) * other

    @torch.no_grad()
    def _with_values(self, heads: HeadSet, A: Tensor, v: Tensor, how: str, *sources: "Lofit") -> "Lofit":
        of = [{"task": s.meta.task, "seed": s.meta.seed, "config": s.meta.config} for s in sources]
        tasks = list(dict.fromkeys(s.meta.task for s in sources if s.meta.task))
        meta = AdapterMeta(
            self.meta.model, " and ".join(tasks), config={"made_by": how, "of": of}, versions=io.environment()
        )
        made = Lofit(self.shape, heads, meta).to(self.A.device)
        keep = made.mask[..., None]
        made.A.copy_(torch.where(keep, A, 0.0))
        made.v.copy_(torch.where(keep, v, 0.0))
        return made

    # ------------------------------------------------------------------------------------------- saving

    def _tensors(self) -> Mapping[str, Tensor]:
        order = self._index()
        return {"A": self.A[order], "v": self.v[order]}

    @classmethod
    def _made_from(cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path) -> "Lofit":
        shape, heads = shape_and_heads(record, where)
        made = cls(shape, heads, meta)
        check_tensors(tensors, dict.fromkeys(("A", "v"), (len(heads), shape[2])), where)
        order = made._index()
        with torch.no_grad():
            made.A[order] = tensors["A"]
            made.v[order] = tensors["v"]
        return made

    def _index(self) -> tuple[Tensor, Tensor]:
        return torch.tensor([h.layer for h in self.heads]), torch.tensor([h.head for h in self.heads])

    def _parts(self) -> list[str]:
        return [f"K={self.k} of {self.shape[0]}x{self.shape[1]} heads", f"{self.n_parameters:,} parameters"]
