"""Access to `hook_z` and the residual stream, and keeping a model frozen.

Hooks are permanent in TransformerLens' sense and removed by their own handles, so that no other hooks are touched. The
HookPoint object is never replaced (on the bridge a new one would silently never fire).
"""

import contextlib
import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lofit_lens.errors import ModelError
from lofit_lens.models.info import backend_of, device_of, head_layers
from lofit_lens.models.positions import Borders, Layout, laid_out, names_of

log = logging.getLogger(__name__)

_OWN = ("transformers.", "transformer_lens.model_bridge")  # modules whose hooks change nothing
_own_hooks: set[int] = set()  # torch's ids of the hooks that `hooked` holds
_probed: "weakref.WeakKeyDictionary[nn.Module, dict[int, int]]" = weakref.WeakKeyDictionary()
_probed_sites: "weakref.WeakKeyDictionary[nn.Module, set[tuple[int, str]]]" = weakref.WeakKeyDictionary()


def hook_z(model: Any, layer: int) -> Any:
    """Return the HookPoint of every head's output before W_O in one layer.

    Raises:
        ModelError: the layer has no such point (Mamba, linear attention, ...).
    """
    name = f"blocks.{layer}.attn.hook_z"
    points = model.hook_dict
    if name not in points:
        raise ModelError(
            f"layer {layer} of {model.cfg.model_name} has no {name}: its heads cannot be reached "
            "(not softmax attention, or not supported by TransformerLens); choose heads of other layers"
        )
    return points[name]


def pattern_point(model: Any, layer: int) -> Any:
    """Return the HookPoint of a layer's attention weights after softmax, `[batch, n_heads, query, key]`.

    Raises:
        ModelError: the layer has no such point.
    """
    name = f"blocks.{layer}.attn.hook_pattern"
    if name not in model.hook_dict:
        raise ModelError(
            f"layer {layer} of {model.cfg.model_name} has no {name}: its attention weights cannot be seen (not softmax "
            "attention, or not split by TransformerLens); choose heads of other layers"
        )
    return model.hook_dict[name]


Site = Literal["hook_resid_post", "hook_mlp_out"]


def residual_point(model: Any, layer: int, site: Site) -> Any:
    """Return the HookPoint of a block's output (`hook_resid_post`) or its MLP's output before the residual add (`hook_mlp_out`).

    Both hold `[batch, pos, d_model]`.

    Raises:
        ModelError: the block has no such point.
    """
    name = f"blocks.{layer}.{site}"
    if name not in model.hook_dict:
        raise ModelError(
            f"block {layer} of {model.cfg.model_name} has no {name} (TransformerLens does not split this architecture "
            "there); choose other layers, or a method that edits heads"
        )
    return model.hook_dict[name]


def check_residual(model: Any, layers: Iterable[int], site: Site) -> None:
    """Check by a probe forward of two tokens that a site fires once in each layer with `[batch, pos, d_model]`; remembered.

    Raises:
        ModelError: it does not, or a block has no such site.
    """
    width, known = int(model.cfg.d_model), _probed_sites.setdefault(model, set())
    wanted = [layer for layer in layers if (layer, site) not in known]
    if not wanted:
        return
    for layer, seen in _fired(model, {layer: residual_point(model, layer, site) for layer in wanted}).items():
        if len(seen) != 1 or seen[0] != (1, 2, width):
            raise ModelError(
                f"{site} of layer {layer} of {model.cfg.model_name} fired {len(seen)} times in one forward"
                + (f" with shape {seen[0]}" if seen else "")
                + f"; it must fire once with [batch, pos, {width}]"
            )
        known.add((layer, site))


def head_size(model: Any, layers: Iterable[int] | None = None) -> int:
    """Return d_head, read from z itself by one probe forward of two tokens; remembered for each model and layer.

    Args:
        model: a HookedTransformer or TransformerBridge.
        layers: layers that will be edited; None = all that have heads.

    Raises:
        ModelError: no layer has heads, hook_z of a requested layer does not fire once, its number of heads differs from
            the configuration's, or layers differ in d_head.
    """
    backend_of(model)
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    reached = head_layers(model)
    everywhere = tuple(range(n_layers)) if reached is None else reached
    if not everywhere:
        raise ModelError(
            f"no layer of {model.cfg.model_name} has heads at hook_z (none attends by softmax, or TransformerLens does not split "
            "its attention); choose another model"
        )
    wanted = everywhere if layers is None else tuple(layers)
    known = _probed.setdefault(model, {})
    if any(layer not in known for layer in wanted):
        for layer, seen in _fired(model, {layer: hook_z(model, layer) for layer in wanted}).items():
            if len(seen) != 1:
                raise ModelError(f"hook_z of layer {layer} fired {len(seen)} times in one forward; it must fire once")
            if len(seen[0]) != 4 or seen[0][2] != n_heads:
                raise ModelError(
                    f"z of layer {layer} has shape {seen[0]}; expected [batch, pos, {n_heads} heads, d_head]: "
                    "TransformerLens does not split this architecture's heads"
                )
            known[layer] = seen[0][3]
    sizes = {known[layer] for layer in wanted}
    if len(sizes) > 1:
        raise ModelError(f"layers differ in d_head ({sorted(sizes)}); choose heads of layers that share one")
    return sizes.pop()


def _fired(model: Any, points: Mapping[int, Any]) -> dict[int, list[tuple[int, ...]]]:
    """Return the shapes that each point saw in one forward of two tokens."""
    shapes: dict[int, list[tuple[int, ...]]] = {layer: [] for layer in points}
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    mask = torch.ones_like(tokens)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        # Stated before the hooks are added, since what is attached is told and may run passes of its own.
        borders = Borders(torch.tensor([2]), torch.tensor([2]), marks=torch.ones(1, 2, dtype=torch.long))
        stack.enter_context(laid_out(model, Layout.of(tokens, mask, 2, borders)))
        for layer, point in points.items():
            stack.enter_context(hooked(point, _recorder(shapes[layer])))
        model(tokens, attention_mask=mask)
    return shapes


def _recorder(seen: list[tuple[int, ...]]) -> Any:
    def record(z: Tensor, hook: Any) -> None:
        seen.append(tuple(z.shape))

    return record


@contextlib.contextmanager
def hooked(point: Any, fn: Any, *, prepend: bool = False) -> Iterator[None]:
    """Hold one forward hook on a HookPoint; it is permanent, so a user's `reset_hooks()` leaves it."""
    point.add_hook(fn, is_permanent=True, prepend=prepend)
    handle = point.fwd_hooks[0 if prepend else -1]
    _own_hooks.add(handle.hook.id)
    try:
        yield
    finally:
        _own_hooks.discard(handle.hook.id)
        handle.hook.remove()
        if handle in point.fwd_hooks:
            point.fwd_hooks.remove(handle)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has any forward or backward hook."""
    return bool(
        module._forward_hooks or module._backward_hooks or module._forward_pre_hooks or module._backward_pre_hooks
    )


def is_watched(model: nn.Module) -> bool:
    """Return whether any part of a model has a hook, TransformerLens' or torch's, whatever it does.

    Hooks by which the bridge and transformers pass values between their own modules do not count.
    """
    return next(_hooks(model), None) is not None


def attached_to(model: Any, work: str) -> list[str]:
    """List what acts on a model from outside: adapters by name, and the user's own hooks by function and place.

    If there is anything, a warning says that the results of `work` hold for the model with it.
    """
    places: dict[str, list[str]] = {}
    known = {id(point): name for name, point in model.hook_dict.items()}
    for name, module, number, hook in _hooks(model):
        if number not in _own_hooks:
            places.setdefault(_function(hook), []).append(known.get(id(module), name))
    hooks = [f"{f} on {at[0]}{f' and {len(at) - 1} more' if at[1:] else ''}" for f, at in places.items()]
    if found := [*names_of(model), *hooks]:
        log.warning(
            "%s: %s is attached to the model, so the results hold for both together; detach it to see the bare model",
            work, ", ".join(found),
        )  # fmt: skip
    return found


def _hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, Any]]:
    """Yield path, module, id and function of every hook that the libraries did not add themselves."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        for kind in kinds:
            for number, hook in getattr(module, kind).items():
                if not str(getattr(hook, "__module__", "")).startswith(_OWN):
                    yield name, module, number, hook


def _function(hook: Any) -> str:
    """Name a hook's function without its address; TransformerLens keeps the `repr` as the name."""
    name = str(getattr(hook, "__name__", type(hook).__name__))
    known = re.search(r"<(?:function|bound method) (\S+)", name)
    return known[1] if known else re.sub(r" at 0x\w+", "", name)


@contextlib.contextmanager
def unhooked(model: Any) -> Iterator[None]:
    """Remove all hooks from all HookPoints within the block; they are restored in their order."""
    points = {id(p): p for p in model.hook_dict.values()}.values()
    held = [(hooks, dict(hooks)) for p in points for hooks in (p._forward_hooks, p._backward_hooks) if hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.clear()
            hooks.update(before)


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Put a model into eval mode without gradients for its own weights, within the block; both are restored on exit."""
    modes = [(m, m.training) for m in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p in trainable:
            p.requires_grad_(True)
