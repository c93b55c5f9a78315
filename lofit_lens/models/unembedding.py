"""From a head's output to the logits: W_O, the final norm and W_U, the same on both classes.

    u = z W_O[h]                              what head h adds to the residual stream
    logits = (w * center(u) / scale) W_U      u's share of the logits, the final norm's scale held fixed

`center` subtracts the mean if the final norm does (LayerNorm), and does nothing if it does not (RMSNorm); w is its learned
weight. Biases cancel, being the same with and without u. Soft caps and other functions of the final logits are not applied.
"""

import contextlib
import weakref
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lofit_lens.errors import ModelError
from lofit_lens.models.devices import device_of_module
from lofit_lens.models.hooks import head_size, hook_z, hooked, residual_point
from lofit_lens.models.info import computes_exactly, device_of, model_info, quantization_of
from lofit_lens.models.projections import projection
from lofit_lens.models.running import run_through

PART = 8192  # columns of W_U that are converted to float32 at once
TOLERANCE, ROUGH = 1e-3, 0.1  # of the probe; ROUGH: half precision, quantized weights

_direct: "weakref.WeakKeyDictionary[nn.Module, set[int]]" = weakref.WeakKeyDictionary()


class FinalNorm(NamedTuple):
    """The norm before the unembedding.

    Attributes:
        weight: `[d_model]` float32, the factor of the normalized stream (1 + w in Gemma, 1 if it was folded).
        centered: whether the mean over d_model is subtracted first.
        eps: added to the mean square.
    """

    weight: Float[Tensor, " d_model"]
    centered: bool
    eps: float

    def scale(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """Return the number by which the norm divides a residual stream."""
        x = resid.float()
        x = x - x.mean(dim=-1, keepdim=True) if self.centered else x
        return (x.square().mean(dim=-1) + self.eps).sqrt()


def head_output_matrix(model: Any, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
    """Return W_O of one layer, float32: row vectors z of a head become `z @ W_O[h]` in the residual stream.

    A probe forward of two tokens checks once per layer that exactly this reaches the stream.

    Raises:
        ModelError: heads that cannot be reached, or an architecture that changes attention's output before it is added
            (a norm after attention, as in Gemma 2; a multiplier, as in Granite).
    """
    hook_z(model, layer)
    W = _by_running(model, layer) if quantization_of(model) else model.blocks[layer].attn.W_O.detach().float()
    if layer not in _direct.setdefault(model, set()):
        _check_direct(model, layer, W)
        _direct[model].add(layer)
    return W


@torch.no_grad()
def _by_running(model: Any, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
    """Compute W_O of quantized weights, which are packed, by running the projection on unit vectors."""
    project, n_heads = projection(model, (layer, "o")), int(model.cfg.n_heads)
    place = next(project.parameters()).device
    units = torch.eye(n_heads * head_size(model, [layer]), device=place, dtype=next(model.parameters()).dtype)
    rows = project(units).float() - project(torch.zeros_like(units[:1])).float()
    return rearrange(rows, "(head d) model -> head d model", head=n_heads)


@torch.no_grad()
def _check_direct(model: Any, layer: int, W: Float[Tensor, "n_heads d_head d_model"]) -> None:
    """Check that a change of z leaves the block as that change times W_O, apart from the MLP's reaction."""
    change = torch.randn(W.shape[:2], generator=torch.Generator().manual_seed(0)).to(W.device)
    found = []
    for added in (torch.zeros_like(change), change):
        seen: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(hooked(hook_z(model, layer), lambda z, hook, a=added: z + a.to(z)))
            for site in ("hook_resid_post", "hook_mlp_out"):
                point = residual_point(model, layer, site)
                stack.enter_context(hooked(point, lambda x, hook, s=seen, k=site: s.__setitem__(k, x.detach().float())))
            tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
            run_through(model, tokens, torch.ones_like(tokens))
        found.append(seen["hook_resid_post"] - seen["hook_mlp_out"])
    wanted = einsum(change.to(W), W, "head d, head d model -> model")
    exact = computes_exactly(model)
    # Half precision cannot show a small change of a large coordinate (the first token has some): allow a few of its steps.
    unseen = 0.0 if exact else 4 * torch.finfo(next(model.parameters()).dtype).eps * found[0].abs()
    missed = ((found[1] - found[0] - wanted).abs() - unseen).clamp(min=0)
    off = missed.max() / wanted.abs().max().clamp(min=1e-30)
    if not off <= (TOLERANCE if exact else ROUGH):
        raise ModelError(
            f"layer {layer} of {model_info(model).name} does not add z W_O to its residual stream unchanged (off by {off:.2g}): "
            "a norm or a multiplier follows attention, so offsets have no well-defined direct effect"
        )


@torch.no_grad()
def final_norm(model: Any) -> FinalNorm:
    """Find weight and kind of the final norm by running it, whatever its class calls its parameters.

    For streams s and -s the norm gives `w s / scale + b` and `-w s / scale + b`.
    """
    d, dtype = int(model.cfg.d_model), next(model.parameters()).dtype
    device = device_of_module(model.ln_final, otherwise=model.W_U.device)  # a norm may have no weight
    s = torch.ones(d, device=device)
    s[1::2] = -1
    if d % 2:
        s[-3:] = torch.tensor([1.0, 1.0, -2.0])
    s *= 64  # so that eps is negligible

    def normed(x: Tensor) -> Tensor:
        return model.ln_final(x.to(dtype)[None, None])[0, 0].float()

    weight = (normed(s) - normed(-s)) / (2 * s) * s.square().mean().sqrt()
    shifted = normed(s + 64) - normed(64 - s)  # unchanged, if the mean is subtracted
    centered = bool((shifted - (normed(s) - normed(-s))).abs().max() < 0.1 * weight.abs().max())
    return FinalNorm(weight, centered, float(getattr(model.cfg, "eps", None) or 0.0))


@torch.no_grad()
def to_logits(
    model: Any, vectors: Float[Tensor, "n d_model"], scale: float = 1.0, *, norm: FinalNorm | None = None
) -> Float[Tensor, "n d_vocab"]:
    """Return what vectors in the residual stream add to the logits when the final norm divides by `scale`; float32.

    Args:
        model: any HookedTransformer or TransformerBridge.
        vectors: added to the stream that the final norm reads.
        scale: of the final norm; with 1 the logits are correct up to one positive factor.
        norm: result of `final_norm`, if already known.
    """
    norm = final_norm(model) if norm is None else norm
    x = vectors.float().to(norm.weight.device)
    x = x - x.mean(dim=-1, keepdim=True) if norm.centered else x
    x = x * norm.weight / scale
    W = model.W_U
    return torch.cat([x.to(W.device) @ part.float() for part in W.split(PART, dim=1)], dim=1)
