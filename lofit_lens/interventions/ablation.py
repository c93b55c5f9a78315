"""Ablation: replace the z of chosen heads by a constant at every position, to see what the model does without their output.

    z_h <- mean of z_h over the tokens of some prompts      "mean"
    z_h <- 0                                                "zero"

The mean keeps what a head always adds, so that later layers still see typical residual streams; zero removes that as well, and
often does harm only for that reason. Attached after another adapter, an ablation undoes that adapter's edit of the same heads;
attached before it, the ablation's constant is edited.

Source: Wang et al. 2023 (arXiv 2211.00593), section 2.2 (mean ablation).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_is, check_one_of, texts_of
from lofit_lens.errors import DataError, InputError
from lofit_lens.heads import Head, Heads, HeadSet
from lofit_lens.interventions.at_heads import HeadAdapter, chosen_heads, shape_and_heads
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import check_tensors
from lofit_lens.interventions.residual import chosen_layers
from lofit_lens.models import (
    context_length,
    device_of,
    frozen,
    head_size,
    hook_z,
    hooked,
    model_info,
    run_through,
    tokenizer_of,
)
from lofit_lens.tasks.collate import encode, pad, pad_id

How = Literal["mean", "zero"]
HOW = ("mean", "zero")
BATCH = 16  # prompts run together for the mean


def replace_z(
    z: Float[Tensor, "batch pos n_heads d_head"], index: Sequence[int], values: Float[Tensor, "k d_head"]
) -> Float[Tensor, "batch pos n_heads d_head"]:
    """Set chosen heads of a layer's z to one value each, at every position; the others are copied bit by bit."""
    z = z.clone()
    z[:, :, list(index)] = values.to(z)
    return z


class HeadAblation(HeadAdapter):
    """Constants in place of chosen heads' outputs.

    Args:
        shape: `(n_layers, n_heads, d_head)`.
        heads: the ablated heads.
        values: `[K, d_head]`, the new z, in the order of `heads`.
        how: where the values come from: `"mean"` or `"zero"`.
        meta: provenance.

    Attributes:
        values: `[K, d_head]` float32, in units of z.
        heads: the head set, its scores kept.

    Raises:
        InputError: no head, a head outside the shape, values of another shape or not finite, or an unknown `how`.
    """

    method: ClassVar[str] = "ablation"
    title: ClassVar[str] = "ablation"
    values: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        heads: Heads,
        *,
        values: Float[Tensor, "n_values size"],
        how: How = "mean",
        meta: AdapterMeta | None = None,
    ) -> None:
        super().__init__(shape, heads, meta)
        check_one_of("ablation", how, HOW)
        check_is(values, Tensor, "values", "a tensor")
        self.how = how
        if tuple(values.shape) != (self.k, self.d_head):
            raise InputError(
                f"{self.k} heads of d_head {self.d_head} with values {tuple(values.shape)}; give one row per head"
            )
        if not bool(torch.isfinite(values).all()):
            raise InputError("a value that z should become is NaN or infinite; run the model in float32 or bfloat16")
        self.register_buffer("values", values.detach().float().clone())

    def affine(self, head: Head) -> tuple[Float[Tensor, " d_head"], Float[Tensor, " d_head"]]:
        """Return 0 and the constant."""
        value = self.values[self.heads.heads.index(head)]
        return torch.zeros_like(value), value

    @classmethod
    def of(
        cls, model: Any, heads: Heads, *, means: Float[Tensor, "n_layers n_heads d_head"] | None = None
    ) -> "HeadAblation":
        """Ablate heads of a model: by their means (see `mean_z`), or by zero if no means are given.

        Raises:
            InputError: no head, a head outside the model, or means of another shape.
            ModelError: heads that cannot be reached.
        """
        info, heads = model_info(model), HeadSet.of(heads)
        heads.check((info.n_layers, info.n_heads))
        d_head = head_size(model, heads.layers or None)
        check_is(means, (Tensor, type(None)), "means", "the result of mean_z")
        shape = (info.n_layers, info.n_heads, d_head)
        chosen = chosen_heads(heads, info.grid, cls.title)
        if means is not None and tuple(means.shape) != shape:
            raise InputError(f"means of shape {tuple(means.shape)} for a model of {shape}; compute them with mean_z")
        values = torch.zeros(len(chosen), d_head) if means is None else torch.stack([means[h] for h in chosen])
        meta = AdapterMeta(model=info, versions=io.environment())
        made = cls(shape, chosen, values=values, how="zero" if means is None else "mean", meta=meta)
        return made.to(device_of(model))

    @property
    def n_parameters(self) -> int:
        """Count of estimated numbers: `K * d_head` for means, 0 for zero."""
        return self.k * self.d_head if self.how == "mean" else 0

    def _edit(self, layer: int) -> Edit:
        rows = [i for i, h in enumerate(self.heads) if h.layer == layer]
        index = [self.heads[i].head for i in rows]
        return lambda z: replace_z(z, index, self.values[rows].to(z.device))

    # ------------------------------------------------------------------------------------------- saving

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"how": self.how}

    @classmethod
    def _made_from(
        cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path
    ) -> "HeadAblation":
        shape, heads = shape_and_heads(record, where)
        check_tensors(tensors, {"values": (len(heads), shape[2])}, where)
        return cls(shape, heads, values=tensors["values"], how=record["how"], meta=meta)

    def _parts(self) -> list[str]:
        return [f"to {self.how}", f"K={self.k}"]


@torch.no_grad()
def mean_z(
    model: Any, prompts: Iterable[str], *, layers: Sequence[int] | None = None
) -> Float[Tensor, "n_layers n_heads d_head"]:
    """Compute the mean z of every head over all tokens of some prompts (BOS included, padding not), float32 on the CPU.

    Sums are in float64; memory does not grow with the number of prompts. Attached adapters and hooks act.

    Args:
        model: any HookedTransformer or TransformerBridge.
        prompts: texts.
        layers: the layers to measure; the others stay 0. None = all that have heads.

    Raises:
        InputError: no prompt.
        DataError: a prompt without tokens or longer than the context.
        ModelError: heads that cannot be reached.
    """
    info = model_info(model)
    wanted = info.grid.layers if layers is None else chosen_layers(layers, info.n_layers)
    sums = torch.zeros(info.n_layers, info.n_heads, head_size(model, tuple(wanted)), dtype=torch.float64)
    count = 0
    with frozen(model):
        for tokens, mask in _batches(model, texts_of("prompts", prompts)):
            count += int(mask.sum())
            for layer, total in _totals(model, tokens, mask, wanted).items():
                sums[layer] += total
    if count == 0:
        raise InputError("no prompt to take means over; give one or more")
    return (sums / count).float()


def _totals(model: Any, tokens: Tensor, mask: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """Sum z over the real tokens of a batch, by layer."""
    found: dict[int, Tensor] = {}

    def adder(layer: int) -> Any:
        def add(z: Tensor, hook: Any) -> None:
            kept = torch.where(mask.to(z.device).bool()[..., None, None], z.detach(), 0)
            found[layer] = reduce(kept.double(), "batch pos head d -> head d", "sum").cpu()

        return add

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(hook_z(model, layer), adder(layer)))
        run_through(model, tokens, mask)
    return found


def _batches(model: Any, prompts: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
    tokenizer, limit, rows = tokenizer_of(model), context_length(model), []
    for i, prompt in enumerate(prompts):
        ids = encode(tokenizer, prompt)
        if not 0 < len(ids) <= limit:
            raise DataError(f"prompt {i} has {len(ids)} tokens; {model_info(model).name} takes 1 to {limit}")
        rows.append(ids)
        if len(rows) == BATCH:
            yield pad(rows, side="right", pad_id=pad_id(tokenizer), device=device_of(model))
            rows = []
    if rows:
        yield pad(rows, side="right", pad_id=pad_id(tokenizer), device=device_of(model))
