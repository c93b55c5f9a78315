"""Attention by torch's fused kernel, where it is proven to give what the class's own attention gives.

    z = softmax(q k' / scale + mask) v

Both classes materialize the attention pattern for hooks. Training an adapter does not need it, and without it a pass is faster
and keeps less for backward. `fused_attention` replaces attention within a block:

- HookedTransformer: the class's own q, k, v and rotary code, then `scaled_dot_product_attention`. Weights are laid out in memory
  as the class's own matrix products need them, so that no pass copies them (HookedTransformer copies all of them in each
  forward and keeps the copies for backward). The norm before attention is computed once instead of three times.
- TransformerBridge: the Hugging Face module's own forward, whose projections are the bridge's, under
  `attn_implementation="sdpa"`. Where Hugging Face has one fused q-k-v matrix, the bridge's split one is used (`_rebuilt`).

`hook_z` fires as usual. A pass uses the class's own attention if any other hook point of attention has a hook, if a flag requests
more hook points (`use_attn_result`, `use_split_qkv_input`, ...), or in training mode (dropout).
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lofit_lens.models.attending import FLAGS, in_place, runs_projections
from lofit_lens.models.devices import runs_own_forward
from lofit_lens.models.hooks import frozen, hook_z, hooked, unhooked
from lofit_lens.models.info import backend_of, computes_exactly, device_of, model_info
from lofit_lens.models.proofs import proven_once
from lofit_lens.models.running import extend, logits_of, prefill, uncached

logger = logging.getLogger(__name__)

TOLERANCE, ROUGH = 1e-4, 0.1  # of the standard deviation of what is compared; ROUGH: half precision, quantized weights

_said: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()  # obstacles that were logged
_inside: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@contextlib.contextmanager
def fused_attention(model: Any, *, cached: bool = False) -> Iterator[None]:
    """Have a model attend by torch's fused kernel within the block, where that is proven; otherwise change nothing.

    Keep the block open until backward has finished if layers are recomputed in it (`checkpointed`). Values at padding may differ
    from the class's own; at tokens they agree up to rounding. On exit everything is restored, also after an exception.

    Args:
        model: a HookedTransformer or TransformerBridge; `with` blocks of one model may be nested.
        cached: the passes inside continue from a KV cache; that must then be proven too.
    """
    refused = model not in _inside and fused_refusal(model) is not None
    if model in _inside or refused or (cached and not _attends_alike_behind_cache(model)):
        yield
        return
    with in_place(model):
        _inside.add(model)
        try:
            yield
        finally:
            _inside.discard(model)


def fused_refusal(model: Any) -> str | None:
    """Return why `fused_attention` leaves a model as it is, or None if it does not.

    It is tried once per model, device and dtype, by a few passes with all hooks off, on a batch padded on the right and on one
    padded on the left. hook_z must fire once in each layer, and z, logits and gradients must equal the class's own while every
    layer's z is edited. Known obstacles are checked every time.
    """
    if any(getattr(model.cfg, flag, False) for flag in FLAGS):
        return f"one of {', '.join(FLAGS)} is on"
    if (obstacle := _known_obstacle(model)) is not None:  # checked every time: parts of a model may be replaced
        said = _said.setdefault(model, set())
        if obstacle not in said:
            said.add(obstacle)
            logger.info("%s keeps its class's own attention: %s", model.cfg.model_name, obstacle)
        return obstacle
    return _attends_alike.refusal(model)


@proven_once("fused attention")
def _attends_alike(model: Any) -> bool | str | None:
    return _tried(model, "attention", _difference)


@proven_once("fused attention behind cached keys")
def _attends_alike_behind_cache(model: Any) -> bool | str | None:
    return _tried(model, "attention behind cached keys", _difference_behind_cache)


def _tried(model: Any, what: str, differs: Callable[[Any], str | None]) -> bool | str | None:
    """Return True if nothing differs, else what does; None if memory is too short to try, since there may be more next time."""
    with frozen(model):
        try:
            found = differs(model)
        except torch.OutOfMemoryError:
            return None
        except Exception as e:
            found = f"{type(e).__name__}: {e}"
    if found is None:
        return True
    logger.info("%s keeps its class's own %s: %s", model.cfg.model_name, what, found)
    return found


# ------------------------------------------------------------------------------------------------------ proof


def _known_obstacle(model: Any) -> str | None:
    """Return what is known to be computed differently, or not known to be computed as here."""
    layers = model_info(model).grid.layers
    if not layers:
        return "no layer has heads at hook_z"
    if backend_of(model) == "bridge":
        return _bridge_obstacle(model, layers)
    return next((why for layer in layers if (why := _hooked_obstacle(model.blocks[layer].attn))), None)


def _hooked_obstacle(attn: Any) -> str | None:
    from transformer_lens.components import AbstractAttention

    cfg = attn.cfg
    direction = getattr(attn, "_attention_dir_override", None) or cfg.attention_dir
    foreign = type(attn).forward is not AbstractAttention.forward or "forward" in attn.__dict__
    found = {
        "another attention forward than the class's": foreign,
        f"positions of type {cfg.positional_embedding_type}": cfg.positional_embedding_type not in ("rotary", "standard"),
        f"attention is {direction}": direction != "causal",
        "a soft cap on attention scores": (cfg.attn_scores_soft_cap or 0) > 0,
        "attention sinks": bool(getattr(cfg, "use_attention_sinks", False)),
        "4-bit weights": bool(cfg.load_in_4bit),
        "queries and keys normed across heads": attn.q_norm is not None and not cfg.use_qk_norm,
        "clipped queries, keys and values": getattr(cfg, "clip_qkv", None) is not None,
        "linear products on MPS": attn.W_O.device.type == "mps",
    }  # fmt: skip
    return next((what for what, there in found.items() if there), None)


def _bridge_obstacle(model: Any, layers: Iterable[int]) -> str | None:
    from transformer_lens.model_bridge.generalized_components import (
        JointQKVAttentionBridge,
        JointQKVPositionEmbeddingsAttentionBridge,
    )

    name = type(model.original_model).__name__
    if not getattr(model.original_model, "_supports_sdpa", False):
        return f"Hugging Face's {name} has no sdpa attention"
    known = [c._reconstruct_attention for c in (JointQKVAttentionBridge, JointQKVPositionEmbeddingsAttentionBridge)]
    for attn in (model.blocks[layer].attn for layer in layers):
        inner = attn.original_component
        if {"forward", "_reconstruct_attention"} & attn.__dict__.keys() or "_reconstruct_attention" in inner.__dict__:
            return "another attention forward than the class's"
        if not runs_own_forward(inner):
            return "another attention forward than the class's"
        if runs_projections(attn):
            continue
        if getattr(type(attn), "_reconstruct_attention", None) not in known or attn._reorder_and_upcast_attn:
            return f"{type(attn).__name__} does not run the bridge's q, k, v and o in a way that is known here"
    return None


def _difference(model: Any) -> str | None:
    """Return where fused attention and the class's own differ on a few tokens, with z edited in every layer."""
    device, layers = device_of(model), model_info(model).grid.layers
    limit = TOLERANCE if computes_exactly(model) else ROUGH
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(model.cfg.d_vocab), (2, 9), generator=generator).to(device)
    masks = {side: torch.ones_like(tokens) for side in ("right", "left")}
    masks["right"][1, 6:], masks["left"][1, :3] = 0, 0
    with unhooked(model), torch.autocast(device.type, enabled=False):
        with torch.no_grad():
            plain, real = _seen(model, tokens, masks["right"], {}), masks["right"].bool()
        edits = {}
        for layer in layers:
            if len(plain[layer]) != 1:
                return f"hook_z of layer {layer} fires {len(plain[layer])} times in one forward"
            z = plain[layer][0]
            noise = torch.randn(z.shape[2:], generator=generator).to(z.device)
            edits[layer] = noise * z[real.to(z.device)].float().std()
        own = {side: _passed(model, tokens, mask, edits) for side, mask in masks.items()}
        if not _off(own["right"][0][-1][0], plain[-1][0], real) > 3 * limit:
            return "edits at hook_z do not show in the logits"
        with in_place(model):  # once, since each entry lays out HookedTransformer's weights again
            fused = {side: _passed(model, tokens, mask, edits) for side, mask in masks.items()}
    for side, mask in masks.items():
        (found, found_slopes), (wanted, slopes) = fused[side], own[side]
        for layer in layers:
            if len(found[layer]) != 1:
                return f"hook_z of layer {layer} fires {len(found[layer])} times in one forward with fused attention"
        for layer in sorted(wanted):
            what = "the logits" if layer < 0 else f"hook_z of layer {layer}"
            off = _off(found[layer][0], wanted[layer][0], mask.bool())
            if not off <= limit:
                return f"{what} differs by {off:.2g} standard deviations on a batch padded on the {side}"
            if not torch.isfinite(found[layer][0]).all():
                return f"{what} is not finite at padding"
        for layer, a, b in zip(layers, found_slopes, slopes, strict=True):
            off = float((a - b).square().mean().sqrt() / b.std())
            if not off <= 3 * limit:
                return f"gradients of layer {layer}'s z differ by {off:.2g} standard deviations padded on the {side}"
    return None


@torch.no_grad()
def _difference_behind_cache(model: Any) -> str | None:
    """Return how logits from a KV cache with fused attention differ from one uncached pass of the class's own, left-padded."""
    limit, device = TOLERANCE if computes_exactly(model) else ROUGH, device_of(model)
    tokens = torch.randint(0, int(model.cfg.d_vocab), (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with unhooked(model), torch.autocast(device.type, enabled=False):
        wanted = logits_of(model, tokens, mask)
        with in_place(model):
            found, state = prefill(model, tokens[:, :5], mask[:, :5])
            parts = [found]
            for new in (slice(5, 8), slice(8, 9)):
                found, state = extend(model, state, tokens[:, new])
                parts.append(found)
    off = _off(torch.cat(parts, dim=1), wanted, mask.bool())
    return None if off <= 3 * limit else f"the logits differ by {off:.2g} standard deviations"


def _seen(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], edits: Mapping[int, Tensor]
) -> dict[int, list[Tensor]]:
    """Return what hook_z saw in each layer of one pass, before the edit, and under -1 the logits."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in model_info(model).grid.layers}

    def edit(z: Tensor, hook: Any, layer: int) -> Tensor:
        seen[layer].append(z.detach().clone())
        return z if layer not in edits else (z + edits[layer].to(z.device)).to(z.dtype)

    with contextlib.ExitStack() as stack:
        for layer in seen:
            stack.enter_context(hooked(hook_z(model, layer), functools.partial(edit, layer=layer)))
        seen[-1] = [model(tokens, attention_mask=mask, **uncached(model))]
    return seen


@torch.enable_grad()
def _passed(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], edits: Mapping[int, Tensor]
) -> tuple[dict[int, list[Tensor]], tuple[Tensor, ...]]:
    """Return what `_seen` gives with these edits, and the gradient of a sum of log-probs at the tokens for each layer's edit."""
    leaves = {layer: edit.detach().clone().requires_grad_() for layer, edit in edits.items()}
    seen = _seen(model, tokens, mask, leaves)
    logits = seen[-1][0]
    scores = logits[mask.bool().to(logits.device)].float().log_softmax(-1)
    listed = [leaves[layer] for layer in sorted(leaves)]
    if not logits.requires_grad:  # no layer used the edits
        slopes = tuple(torch.zeros_like(leaf) for leaf in listed)
    else:
        slopes = torch.autograd.grad(scores[:, ::7].sum(), listed, allow_unused=True, materialize_grads=True)
    return {**seen, -1: [logits.detach()]}, slopes


def _off(found: Tensor, wanted: Tensor, real: Bool[Tensor, "batch pos"]) -> float:
    """Return the largest distance at any token (root mean square over its numbers), in standard deviations."""
    if found.shape != wanted.shape:
        return float("inf")
    at = real.to(found.device)
    a, b = found[at].flatten(1).float(), wanted[at].flatten(1).float()
    return float((a - b).square().mean(dim=1).sqrt().max() / b.std())
