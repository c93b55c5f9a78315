"""Gradient checkpointing on both classes: a block keeps its input and is recomputed in backward.

Memory for backward falls from all activations of all blocks to one residual stream per block and the activations of one block;
time rises by one forward.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from lofit_lens.models.gathered import replaced
from lofit_lens.models.info import backend_of
from lofit_lens.models.positions import resumed, stated_layout

_inside: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@contextlib.contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Recompute each transformer block in backward instead of storing its activations, for passes within this `with` block.

    The model's mode does not change, so a model in eval mode has no dropout (Hugging Face's own switch needs training mode).
    Hooks fire again when a block is recomputed, with the pass's own layout (see `positions.layout_of`), so that edits are
    repeated. A hook must give the same result both times; one that only observes sees everything twice. Keep the `with` block
    open until backward has finished, and likewise all that changes how the model runs (`fused_attention`, adapters).

    Passes that fill or read a KV cache are unaffected, since recomputing would append to it twice; so are passes without
    gradients.

    Args:
        model: a HookedTransformer or TransformerBridge; `with` blocks of one model may be nested.

    Raises:
        ModelError: neither of the two classes.
    """
    backend_of(model)
    if model in _inside:
        yield
        return
    with contextlib.ExitStack() as stack:
        _inside.add(model)
        stack.callback(_inside.discard, model)
        for block in model.blocks:
            stack.enter_context(replaced(block, "forward", _recomputed(model, block.forward)))
        yield


def _recomputed(model: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or any(_is_cache(x) for x in (*args, *kwargs.values())):
            return own(*args, **kwargs)
        layout = stated_layout(model)

        def run(*args: Any, **kwargs: Any) -> Any:
            with resumed(model, layout):
                return own(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return forward


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache) or hasattr(x, "past_keys")
