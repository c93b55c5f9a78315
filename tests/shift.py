"""A small adapter for tests: it adds a vector to the residual stream (or to an MLP's output) at its positions.

And the same edits on plain Hugging Face models at places that are given as numbers, written without the library's `Positions`.
"""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import check_tensors
from lofit_lens.interventions.residual import ResidualAdapter
from lofit_lens.models import Site, model_info
from tests.adapters import output_projection
from tests.blocks import blocks

POSITIONS = ("all", "answer", "second", "predicting", "last", "f3+l2", "f2+l9")


class Shift(ResidualAdapter):
    """`x + c` with one vector c a layer."""

    method: ClassVar[str] = "shift"
    title: ClassVar[str] = "Shift"
    site: ClassVar[Site] = "hook_resid_post"

    def __init__(
        self, c: Tensor, layers: Iterable[int], n_layers: int, positions: Any = "all", meta: Any = None
    ) -> None:
        super().__init__(n_layers, c.shape[1], layers, meta, positions)
        self.c = nn.Parameter(c, requires_grad=False)

    @property
    def n_parameters(self) -> int:
        return self.c.numel()

    def _edit(self, layer: int) -> Edit:
        return lambda x: (x + self.c[self.layers.index(layer)].to(x.device)).to(x.dtype)

    def _tensors(self) -> Mapping[str, Tensor]:
        return {"c": self.c}

    def _settings(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "n_layers": self.n_layers}

    @classmethod
    def _made_from(cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path) -> "Shift":
        check_tensors(tensors, {"c": (len(record["layers"]), tensors["c"].shape[-1])}, where)
        return cls(tensors["c"], record["layers"], record["n_layers"], record["positions"], meta)


class MLPShift(Shift):
    """The same behind an MLP, before its output is added to the residual stream."""

    site: ClassVar[Site] = "hook_mlp_out"


def shift_of(model, positions="all", *, kind=Shift, layers=(0, 2), seed=0, scale=0.5):
    """Random vectors for some layers of a model."""
    info = model_info(model)
    c = torch.randn(len(layers), info.d_model, generator=torch.Generator().manual_seed(seed)) * scale
    return kind(c, layers, info.n_layers, positions, AdapterMeta(info))


def places(name, prompt, length):
    """Numbers of the places that are edited in a sequence of `prompt` and then answer tokens, by the meaning of each name."""
    ends = {
        "all": range(length), "answer": range(prompt, length), "predicting": range(prompt - 1, length),
        "second": range(prompt + 1, length),
        "last": [length - 1], "f3+l2": [*range(3), *range(prompt - 2, prompt)],
        "f2+l9": [*range(2), *range(prompt - 9, prompt)], "f0+l4": range(prompt - 4, prompt), "f5+l0": range(5),
    }  # fmt: skip
    return sorted({i for i in ends[name] if 0 <= i < (prompt if "+" in name else length)})


def decoded(name, prompt, length):
    """The same while answers are decoded with a cache: each step sees its newest token as the last one."""
    return places("predicting" if name in ("answer", "second", "last") else name, prompt, length)


@contextlib.contextmanager
def edited_at(plain, adapter, at):
    """A `Shift` or a `Lofit` on plain Hugging Face, at these places of one sequence."""
    at = torch.tensor(at, dtype=torch.long)

    def added(layer):
        def hook(module, args, out):
            first = (out[0] if isinstance(out, tuple) else out).clone()
            first.view(-1, first.shape[-1])[at] += adapter.c[adapter.layers.index(layer)].detach()
            return (first, *out[1:]) if isinstance(out, tuple) else first

        return hook

    def scaled(layer):
        def hook(module, args):
            z = args[0].unflatten(-1, adapter.shape[1:]).clone()
            for h in adapter.heads:
                if h.layer == layer:
                    z[:, at, h.head] = (1 + adapter.A[h].detach()) * z[:, at, h.head] + adapter.v[h].detach()
            return (z.flatten(-2),)

        return hook

    handles = []
    if isinstance(adapter, Shift):
        for layer in adapter.layers:
            block = blocks(plain)[layer]
            module = block if adapter.site == "hook_resid_post" else getattr(block, "mlp", None) or block.fc2
            handles.append(module.register_forward_hook(added(layer)))
    else:
        handles += [output_projection(plain, n).register_forward_pre_hook(scaled(n)) for n in adapter.heads.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
