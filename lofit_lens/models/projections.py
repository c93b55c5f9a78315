"""Attention's projections on the bridge, where they are modules of the Hugging Face model that can be replaced.

The bridge wraps each layer's `q`, `k`, `v` and `o`, whatever their names in Hugging Face. Where Hugging Face has one fused
matrix (GPT-2's `c_attn`, GPT-NeoX's `query_key_value`), the bridge has split it into q, k and v, and only these run.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lofit_lens.errors import ModelError
from lofit_lens.models.info import backend_of, device_of

PROJECTIONS = ("q", "k", "v", "o")
Place = tuple[int, str]  # layer, projection
_INNER = "_original_component"  # name of the wrapped module in the bridge's wrapper


def _holder(model: Any, place: Place) -> nn.Module:
    if backend_of(model) != "bridge":
        raise ModelError(
            f"{model.cfg.model_name} is a HookedTransformer, whose attention has bare weights instead of the Hugging Face "
            "model's projection modules; load it as a bridge: load_model(..., backend='bridge')"
        )
    layer, name = place
    holder = getattr(getattr(model.blocks[layer], "attn", None), name, None)
    if not isinstance(holder, nn.Module) or _INNER not in holder._modules:
        raise ModelError(
            f"layer {layer} of {model.cfg.model_name} has no projection {name} (not softmax attention, or not split by "
            "TransformerLens)"
        )
    return holder


def projection(model: Any, place: Place) -> nn.Module:
    """Return the module that is in a place now.

    Raises:
        ModelError: a HookedTransformer, or a layer without this projection.
    """
    inner = _holder(model, place)._modules[_INNER]
    assert inner is not None
    return inner


def projection_sizes(model: Any, places: Iterable[Place]) -> dict[Place, tuple[int, int]]:
    """Return the widths of each projection's input and output, read in one probe forward of two tokens.

    Raises:
        ModelError: a HookedTransformer, no such projection, or one that does not run exactly once (TransformerLens may compute
            it from the weights instead, as with `use_split_qkv_input`).
    """
    seen: dict[Place, list[tuple[int, int]]] = {place: [] for place in places}

    def recorder(place: Place) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[place].append((args[0].shape[-1], out.shape[-1]))

        return record

    with contextlib.ExitStack() as stack:
        for place in seen:
            stack.callback(projection(model, place).register_forward_hook(recorder(place)).remove)
        tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
        with torch.no_grad():
            model(tokens, attention_mask=torch.ones_like(tokens))
    for (layer, name), sizes in seen.items():
        if len(sizes) != 1:
            raise ModelError(
                f"projection {name} of layer {layer} of {model.cfg.model_name} ran {len(sizes)} times in one forward; it "
                "must run once (switch off use_split_qkv_input and use_attn_in)"
            )
    return {place: sizes[0] for place, sizes in seen.items()}


@contextlib.contextmanager
def projection_replaced(model: Any, place: Place, module: nn.Module) -> Iterator[None]:
    """Put another module in a place within the block; it is in eval mode if the one it replaces is."""
    holder = _holder(model, place)
    before = projection(model, place)
    holder._modules[_INNER] = module.train(before.training)
    try:
        yield
    finally:
        holder._modules[_INNER] = before
