"""The attention implementations that `fused` puts in place of the classes' own; see there what they are and when they run."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from lofit_lens.models.gathered import replaced
from lofit_lens.models.hooks import has_hooks
from lofit_lens.models.info import backend_of

FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention")
SDPA = {"_attn_implementation_internal": "sdpa", "_output_attentions": False}  # of a Hugging Face configuration
Part = tuple[Any, str, Any]  # owner, attribute, what to put there


@dataclass
class _State:
    """State that the replaced parts of one model share.

    Attributes:
        cfg: TransformerLens' configuration.
        attentions: of all layers.
        points: HookPoints that fused attention does not serve.
        found: Hugging Face configurations (bridge) with their original values.
        own: whether the current pass uses the class's own attention; None between passes.
        masks: attention masks computed for the current pass.
    """

    cfg: Any
    attentions: list[nn.Module]
    points: list[nn.Module]
    found: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    own: bool | None = None
    masks: dict[Any, Any] = field(default_factory=dict)

    def takes_own(self) -> bool:
        """Return whether a call uses the class's own attention; a call outside a pass (a recomputed block) decides for itself."""
        if self.own is not None:
            return self.own
        return (
            any(getattr(self.cfg, flag, False) for flag in FLAGS)
            or any(attention.training for attention in self.attentions)
            or any(has_hooks(point) for point in self.points)
        )

    @contextlib.contextmanager
    def configured(self, *, own: bool) -> Iterator[None]:
        """Set Hugging Face's configurations to their original values (`own`) or to sdpa, within the block."""
        before = [(config, {name: config.__dict__[name] for name in values}) for config, values in self.found]
        for config, values in self.found:
            config.__dict__.update(values if own else {name: SDPA[name] for name in values})
        try:
            yield
        finally:
            for config, values in before:
                config.__dict__.update(values)


@contextlib.contextmanager
def in_place(model: Any) -> Iterator[None]:
    """Use fused attention within the block, proven or not."""
    bridge = backend_of(model) == "bridge"
    attentions = [block.attn for block in model.blocks]
    state = _State(model.cfg, attentions, [p for attn in attentions for p in _unserved(attn, bridge)])
    with contextlib.ExitStack() as stack:
        if bridge:
            state.found = _configurations(model.original_model)
            stack.enter_context(state.configured(own=False))
        else:
            stack.enter_context(_laid_out_for_products(model))
        outermost = model.original_model if bridge else model
        stack.enter_context(replaced(outermost, "forward", _pass(state, outermost.forward, bridge)))
        for block in model.blocks:
            for owner, name, value in _bridge_parts(block, state) if bridge else _hooked_parts(block, state):
                stack.enter_context(replaced(owner, name, value))
        yield


def _unserved(attn: Any, bridge: bool) -> list[nn.Module]:
    """List the HookPoints of an attention component that fused attention does not fire, or whose edits it would ignore."""
    served = [attn.hook_in, attn.hook_out, attn.o.hook_in, attn.o.hook_out] if bridge else [attn.hook_z]
    kind = type(served[0])
    return [m for m in attn.modules() if isinstance(m, kind) and not any(m is s for s in served)]


def _pass(state: _State, own: Callable[..., Any], bridge: bool) -> Callable[..., Any]:
    """Wrap the model's own forward: it decides once per pass which attention all layers use."""

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        outer = state.own, state.masks
        state.own, state.masks = state.takes_own() if state.own is None else state.own, {}
        try:
            with state.configured(own=state.own):
                if bridge and not state.own:
                    kwargs = _without_idle_mask(args, kwargs)
                return own(*args, **kwargs)
        finally:
            state.own, state.masks = outer

    return forward


def _without_idle_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop a mask that hides nothing from any token: causal attention never looks at padding on the right."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if not (isinstance(mask, Tensor) and mask.ndim == 2 and args and args[0].shape == mask.shape):
        return kwargs
    if cache is not None or "position_ids" in kwargs or not _right_padded(mask):
        return kwargs
    return {**kwargs, "attention_mask": None}


def _right_padded(mask: Int[Tensor, "batch pos"]) -> bool:
    seen = mask.bool()
    return bool(seen[:, 0].all() & (seen[:, 1:] <= seen[:, :-1]).all())


# ----------------------------------------------------------------------------------------- HookedTransformer


def _hooked_parts(block: Any, state: _State) -> list[Part]:
    attn, kept = block.attn, []
    own, own_norm = attn.forward, block.ln1.forward
    scales = [m for m in block.ln1.modules() if m is not block.ln1]

    @functools.wraps(own)
    def attend(query_input: Tensor, key_input: Tensor, value_input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept.clear()
        plain = args or kwargs.get("additive_attention_mask") is not None or kwargs.get("position_bias") is not None
        if plain or state.takes_own():
            return own(query_input, key_input, value_input, *args, **kwargs)
        entry, mask = kwargs.get("past_kv_cache_entry"), kwargs.get("attention_mask")
        return _attend(attn, state, (query_input, key_input, value_input), entry, mask)

    def norm(x: Tensor) -> Tensor:
        if any(has_hooks(point) for point in scales):  # an observer still sees it three times
            return own_norm(x)
        if not (kept and kept[0] is x):
            kept[:] = [x, own_norm(x)]
        return kept[1]

    return [(attn, "forward", attend), (attn, "rotate_every_two", _flip(attn)), (block.ln1, "forward", norm)]


def _flip(attn: Any) -> Callable[[Tensor], Tensor]:
    """Replace the class's `rotate_every_two`, where it swaps halves, by one step; the class clones and writes into the clone."""

    def flip(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    return attn.rotate_every_two if attn.cfg.rotary_adjacent_pairs else flip


def _attend(
    attn: Any,
    state: _State,
    inputs: tuple[Tensor, Tensor, Tensor],
    entry: Any,
    attention_mask: Int[Tensor, "batch both"] | None,
) -> Float[Tensor, "batch new d_model"]:
    """Run one layer's attention: the class's own steps in its own order, with the fused kernel between q, k, v and z."""
    q, k, v = attn.calculate_qkv_matrices(*inputs)
    past = 0
    if entry is not None:
        past = entry.past_keys.size(1)
        k, v = entry.append(k, v)
    if attn.cfg.positional_embedding_type == "rotary":
        q = attn.apply_rotary(q, past, attention_mask)
        k = attn.apply_rotary(k, 0, attention_mask)
    if attn.cfg.use_logn_attn:
        q = attn._apply_logn_scaling(q, past)
    key = (attn.attn_type, q.shape[1], past, str(q.device))
    if key not in state.masks or state.own is None:
        state.masks[key] = _mask(attn, q.shape[1], past, attention_mask, q.device)
    z = attn.hook_z(_kernel(q, k, v, state.masks[key], scale=1 / attn.attn_scale))
    W = rearrange(attn.W_O, "head d model -> model (head d)")
    return F.linear(rearrange(z, "batch pos head d -> batch pos (head d)").to(W.dtype), W, attn.b_O)


def _mask(
    attn: Any, n: int, past: int, attention_mask: Int[Tensor, "batch both"] | None, device: torch.device
) -> Bool[Tensor, "some one new both"] | None:
    """Return a mask that is True where a query may attend; None if that is every key up to its own position."""
    everything = attn.attn_type == "global" or n + past <= attn.cfg.window_size
    if past == 0 and everything and (attention_mask is None or _right_padded(attention_mask)):
        return None
    mask = attn._make_causal_mask(query_ctx_length=n, key_ctx_length=n + past, past_kv_pos_offset=past, device=device)
    return mask if attention_mask is None else mask & attention_mask[:, None, None].bool().to(device)


def _kernel(
    q: Float[Tensor, "batch new n_heads d_head"],
    k: Float[Tensor, "batch both n_kv d_head"],
    v: Float[Tensor, "batch both n_kv d_head"],
    mask: Tensor | None,
    *,
    scale: float,
) -> Float[Tensor, "batch new n_heads d_head"]:
    """Compute z; it is 0 for a query without visible keys.

    Without a mask, each query sees the keys up to its own position, and a single query sees all keys.
    """
    grouped = k.shape[2] != q.shape[2]
    if grouped and mask is not None and q.device.type != "cpu":  # the grouped kernels there accept no mask
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        grouped = False
    q, k, v = (rearrange(x, "batch pos head d -> batch head pos d") for x in (q, k, v))
    causal = mask is None and q.shape[2] > 1
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return rearrange(z, "batch head pos d -> batch pos head d")


@contextlib.contextmanager
def _laid_out_for_products(model: Any) -> Iterator[None]:
    """Lay weights out in memory so that HookedTransformer's reshaping before each product gives a view, not a copy.

    Shapes and values do not change. On exit the original layout is restored, in newly allocated memory. Weights that share memory
    with others of the model, or with another process, are left alone.
    """
    places: dict[int, int] = {}
    for p in model.parameters():
        places[p.untyped_storage().data_ptr()] = places.get(p.untyped_storage().data_ptr(), 0) + 1
    changed: list[nn.Parameter] = []
    try:
        for module in model.modules():
            for name, p in module._parameters.items():
                order = _product_order(module, name, p)
                if (
                    order
                    and p is not None
                    and p.is_contiguous()
                    and not p.is_shared()
                    and places[p.untyped_storage().data_ptr()] == 1
                ):
                    changed.append(p)
                    _lay_out(p, order)
        yield
    finally:
        for p in changed:
            _lay_out(p, tuple(range(p.ndim)))


def _lay_out(p: nn.Parameter, order: tuple[int, ...]) -> None:
    """Store a weight in memory with these axes from the slowest to the fastest."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # a weight made in inference mode would never allow training through it
        p.data = p.data.permute(order).contiguous().permute([order.index(i) for i in range(p.ndim)])


def _product_order(module: nn.Module, name: str, p: Tensor | None) -> tuple[int, ...] | None:
    """Return the axes of a weight, slowest first, in the order that its matrix product needs."""
    if p is not None and p.ndim == 3 and name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V"):
        return (0, 2, 1)
    if p is not None and p.ndim == 3 and name == "W_O":
        return (2, 0, 1)
    if (
        p is not None
        and p.ndim == 2
        and (name == "W_U" or (name in ("W_in", "W_gate", "W_out") and "W_gate" in module._parameters))
    ):
        return (1, 0)
    return None


# --------------------------------------------------------------------------------------------- TransformerBridge


def _configurations(hf: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """List the Hugging Face configurations that a model's modules read, with their current attention settings."""
    found = {id(c): c for m in hf.modules() if isinstance(c := m.__dict__.get("config"), PretrainedConfig)}
    return [(c, {name: c.__dict__[name] for name in SDPA if name in c.__dict__}) for c in found.values()]


def runs_projections(attn: Any) -> bool:
    """Return whether the wrapped Hugging Face module runs the bridge's own q, k, v and o."""
    inner = list(attn.original_component.children())
    return all(any(getattr(attn, name, None) is child for child in inner) for name in "qkvo")


def _bridge_parts(block: Any, state: _State) -> list[Part]:
    attn = block.attn
    name = "forward" if runs_projections(attn) else "_reconstruct_attention"
    own = getattr(attn, name)
    other = functools.partial(_inner, attn) if name == "forward" else functools.partial(_rebuilt, attn)

    @functools.wraps(own)
    def attend(*args: Any, **kwargs: Any) -> Any:
        if not state.takes_own():
            return other(*args, **kwargs)
        with state.configured(own=True):
            return own(*args, **kwargs)

    return [(attn, name, attend)]


def _inner(attn: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Run the Hugging Face module's own forward between the bridge's hooks."""
    if args:
        args = (attn.hook_in(args[0]), *args[1:])
    else:
        kwargs["hidden_states"] = attn.hook_in(kwargs["hidden_states"])
    return attn.hook_out(attn.original_component(*args, **kwargs)[0]), None


def _rebuilt(
    attn: Any,
    q: Float[Tensor, "batch new _"],
    k: Float[Tensor, "batch new _"],
    v: Float[Tensor, "batch new _"],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run the bridge's own attention on its split q, k and v, with the fused kernel."""
    n_heads = attn.config.n_heads
    n_kv = getattr(attn.config, "n_key_value_heads", None) or n_heads
    q, k, v, _, _, d_head = attn._reshape_qkv_to_heads(q, k, v, n_heads, n_kv)
    if hasattr(attn, "_apply_rotary_pos_emb"):
        q, k = attn._apply_rotary_pos_emb(q, k, *attn._apply_position_embedding_hooks(kwargs["position_embeddings"]))
    k, v = attn._update_kv_cache(k, v, **kwargs)
    scale = d_head**-0.5
    if getattr(attn.config, "scale_attn_by_inverse_layer_idx", False):
        scale /= attn._layer_idx + 1
    q, k, v = (rearrange(x, "batch head pos d -> batch pos head d") for x in (q, k, v))
    z = _kernel(q, k, v, kwargs.get("attention_mask"), scale=scale)
    return attn._apply_output_projection(rearrange(z, "batch pos head d -> batch pos (head d)")), None
