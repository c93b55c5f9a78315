"""Run a model: one full forward, or a KV cache that works the same way on both classes."""

import contextlib
import copy
import inspect
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lofit_lens.errors import ModelError
from lofit_lens.models.hooks import unhooked
from lofit_lens.models.info import backend_of, computes_exactly, device_of, quantization_of
from lofit_lens.models.positions import Borders, Layout, laid_out, names_of
from lofit_lens.models.proofs import proven_once

logger = logging.getLogger(__name__)

FLOAT16_ENDS = (
    "float16 ends at 65,504, and activations of models made in bfloat16 go beyond; load it with dtype='bfloat16' or 'float32' "
    "(--dtype)"
)
_without_cache: "weakref.WeakKeyDictionary[Any, str]" = (
    weakref.WeakKeyDictionary()
)  # models whose cache is wrong, and how


def logits_of(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], borders: Borders | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run one full forward; the mask (1 = token, 0 = padding on either side) is always passed.

    `borders` says where prompts end, for edits that act only on certain positions.
    """
    with laid_out(model, Layout.of(tokens, mask, tokens.shape[1], borders)):
        return model(tokens, attention_mask=mask, **uncached(model)).to(tokens.device)


def not_finite(model: Any, what: str) -> ModelError:
    """Build the error for NaN or infinite numbers in a pass, with the remedy."""
    return ModelError(f"{what} of {model.cfg.model_name} are NaN or infinite: {why_not_finite(model)}")


def why_not_finite(model: Any) -> str:
    """Say what makes numbers NaN or infinite in a model, as far as known, and what to do."""
    if next(model.parameters()).dtype == torch.float16:
        return FLOAT16_ENDS
    if names := names_of(model):
        return f"what is attached ({', '.join(names)}) may be too strong; run the model without it"
    return "its weights may be damaged, or a hook on it; run it in plain Hugging Face to see which"


def uncached(model: Any) -> dict[str, bool]:
    """Return the arguments that stop a forward from making a KV cache, which Hugging Face makes by default."""
    return {"use_cache": False} if backend_of(model) == "bridge" else {}


def run_through(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], borders: Borders | None = None
) -> None:
    """Run one forward only for its hooks: nothing is cached, and logits are computed only at the last position."""
    with laid_out(model, Layout.of(tokens, mask, tokens.shape[1], borders)), _last_logits(model, tokens) as options:
        model(tokens, attention_mask=mask, **uncached(model), **options)


@dataclass
class KVState:
    """Keys and values of tokens already run, on either class; made by `prefill`, grown by `extend`.

    Attributes:
        cache: the class's own; None for a model whose cache is wrong: each pass then runs all tokens again.
        tokens: ids that were run, padding included.
        mask: 1 = token, 0 = padding.
        borders: where the prompts end, as far as stated; a later pass may state it again.
    """

    cache: Any
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    borders: Borders | None = None

    def select(self, rows: Int[Tensor, " n"]) -> "KVState":
        """Select rows of the batch (repeats allowed); the original stays usable. Copied only when new tokens join them."""
        return self._rows(rows, keep=True)

    def _rows(self, rows: Int[Tensor, " n"], *, keep: bool) -> "KVState":
        borders = None if self.borders is None else self.borders.select(rows)
        rows = rows.to(self.tokens.device)  # once, not in every layer
        return KVState(_select_rows(self.cache, rows, keep=keep), self.tokens[rows], self.mask[rows], borders)


def together(states: Sequence[KVState]) -> KVState:
    """Concatenate the rows of several states, padded on the left; only for models for which `can_join` is true."""
    cache = copy.copy(states[0].cache)
    name = "entries" if hasattr(cache, "entries") else "layers"
    layers = zip(*(getattr(state.cache, name) for state in states), strict=True)
    setattr(cache, name, [parts[0].together(parts) for parts in layers])
    if name == "entries":
        cache.previous_attention_mask = _left_padded([state.cache.previous_attention_mask for state in states])
    tokens, mask = (_left_padded([getattr(state, name) for state in states]) for name in ("tokens", "mask"))
    borders = [state.borders for state in states if state.borders is not None]
    return KVState(cache, tokens, mask, Borders.together(borders) if borders else None)


@torch.no_grad()
def can_join(model: Any) -> bool:
    """Return whether a state put `together` continues as its parts do; tried once per model on a few tokens.

    It does not if a layer keeps anything but keys and values of all tokens, or if padding counts (see `gaps_are_exact`).

    Raises:
        ModelError: logits that are NaN.
    """
    return gaps_are_exact(model) and _caches_join(model)


@proven_once("caches put together")
def _caches_join(model: Any) -> bool:
    device = device_of(model)
    ids = torch.arange(8, device=device)[None] % int(model.cfg.d_vocab)
    new = torch.cat([ids[:, 5:7], ids[:, 3:5]])
    borders = [Borders(torch.tensor([n]), marks=torch.ones(1, n, dtype=torch.long)) for n in (5, 3)]
    parts = [
        prefill(model, ids[:, :n], torch.ones_like(ids[:, :n]), b)[1] for n, b in zip((5, 3), borders, strict=True)
    ]
    row = torch.tensor([0])
    wanted = torch.cat([extend(model, p.select(row), n[None])[0] for p, n in zip(parts, new, strict=True)])
    try:
        found = extend(model, together(parts), new)[0]
    # A layer of another kind, or one that holds more than its rows.
    except (AttributeError, TypeError, RuntimeError):
        return False
    limit = (1e-4 if computes_exactly(model) else 0.1) * wanted.float().std()
    return bool((found.float() - wanted.float()).abs().max() <= limit)


def _left_padded(parts: Sequence[Int[Tensor, "_ _"]]) -> Int[Tensor, "rows pos"]:
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts])


def prefill(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], borders: Borders | None = None
) -> tuple[Float[Tensor, "batch pos d_vocab"], KVState]:
    """Run prompts and keep their keys and values. Prompts of different lengths are padded on the left."""
    return _run(model, None, tokens, mask, borders)


def extend(
    model: Any,
    state: KVState,
    tokens: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch new"] | None = None,
    borders: Borders | None = None,
) -> tuple[Float[Tensor, "batch new d_vocab"], KVState]:
    """Run further tokens after a state and return the grown state; the one passed in must not be used again.

    New tokens of different lengths are padded on either side, with 0 in `mask`. Positions count only real tokens, so a gap
    inside a row changes nothing, unless the model counts differently (see `gaps_are_exact`, `attention_window`). All positions,
    padding included, must fit the context.
    """
    return _run(model, state, tokens, torch.ones_like(tokens) if mask is None else mask, borders)


def remember(
    model: Any,
    state: KVState | None,
    tokens: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch new"],
    borders: Borders | None = None,
) -> tuple[Float[Tensor, "batch d_vocab"], KVState]:
    """Run `prefill` (no state) or `extend` with logits only at the last position, so rows must be padded on the left.

    Logits of a long prompt are large, and only the last ones are needed to continue it.
    """
    logits, state = _run(model, state, tokens, mask, borders, last_only=True)
    return logits[:, -1], state


def peek(
    model: Any,
    state: KVState,
    rows: Int[Tensor, " batch"],
    tokens: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch new"],
    borders: Borders | None = None,
) -> Float[Tensor, "batch new d_vocab"]:
    """Return logits of new tokens after chosen rows of a state; the state does not change, and the tokens are not cached."""
    return extend(model, state._rows(rows, keep=False), tokens, mask, borders)[0]


def _run(
    model: Any,
    state: KVState | None,
    tokens: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch new"],
    borders: Borders | None,
    *,
    last_only: bool = False,
) -> tuple[Float[Tensor, "batch some d_vocab"], KVState]:
    from lofit_lens.models.gathered import BridgeLayer

    whole, ids = mask, tokens
    if state is not None:
        whole, ids = torch.cat([state.mask, mask], dim=1), torch.cat([state.tokens, tokens], dim=1)
        borders = state.borders if borders is None else borders
    if model in _without_cache:
        logits = logits_of(model, ids, whole, borders)[:, -1 if last_only else -tokens.shape[1] :]
        return logits, KVState(None, ids, whole, borders)
    with contextlib.ExitStack() as stack:
        stack.enter_context(laid_out(model, Layout.of(ids, whole, tokens.shape[1], borders)))
        options = stack.enter_context(_last_logits(model, tokens)) if last_only else {}
        if backend_of(model) == "bridge":
            if state is not None:
                options["past_key_values"] = state.cache
            logits, cache = model(
                tokens, attention_mask=whole, return_type="logits_and_cache", use_cache=True, **options
            )
            if state is None and hasattr(cache, "layers"):
                cache.layers = [BridgeLayer.of(layer) for layer in cache.layers]
        else:
            logits, cache = _run_hooked(model, state, tokens, mask)
    return logits.to(tokens.device), KVState(cache, ids, whole, borders)


@contextlib.contextmanager
def _last_logits(model: Any, tokens: Int[Tensor, "batch new"]) -> Iterator[dict[str, Any]]:
    """Have logits computed only at the last position, if the model can; yields the arguments for its forward."""
    if backend_of(model) == "bridge":
        can = "logits_to_keep" in inspect.signature(model.original_model.forward).parameters
        # An index on the CPU fits any device. With layers on several devices, accelerate would move it to one of them.
        kept = 1 if hasattr(model.original_model, "hf_device_map") else torch.tensor([tokens.shape[1] - 1])
        yield {"logits_to_keep": kept} if can else {}
        return
    cut = model.unembed.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
    try:
        yield {}
    finally:
        cut.remove()


def _run_hooked(
    model: Any, state: KVState | None, tokens: Int[Tensor, "batch new"], mask: Int[Tensor, "batch new"]
) -> tuple[Float[Tensor, "batch some d_vocab"], Any]:
    from transformer_lens import TransformerLensKeyValueCache

    from lofit_lens.models.gathered import hooked_entries, rotating_new_keys

    if state is not None:
        with rotating_new_keys(model, state.cache.entries):
            return model(tokens, past_kv_cache=state.cache, attention_mask=mask), state.cache
    cache: Any = TransformerLensKeyValueCache.init_cache(model.cfg, device_of(model), tokens.shape[0])
    logits = model(tokens, past_kv_cache=cache, attention_mask=mask)
    cache.entries[:] = hooked_entries(model, cache, mask)
    return logits, cache


def check_cache(model: Any) -> None:
    """Raise ModelError for a model whose KV cache gives other logits than one full pass."""
    gaps_are_exact(model)
    if (how := _without_cache.get(model)) is not None:
        raise ModelError(f"{model.cfg.model_name}: {how}, and this needs them; try another version of transformer-lens")


@torch.no_grad()
@proven_once("cached keys, gaps in them")
def gaps_are_exact(model: Any) -> bool:
    """Return whether padding between cached and new tokens changes nothing; tried once per model on a few tokens, all hooks off.

    It changes something if distances are counted in positions of the cache (some ALiBi models) instead of real tokens. If the
    KV cache gives other logits than one full pass even without padding, or fails, every later pass of this model runs all
    tokens again; a warning says so.

    Raises:
        ModelError: logits that are NaN.
    """
    with unhooked(model):
        return _try_cache(model)


def _try_cache(model: Any) -> bool:
    device = device_of(model)
    ids = torch.arange(8, device=device)[None] % int(model.cfg.d_vocab)
    ones, gap = torch.ones_like(ids), torch.zeros(1, 3, dtype=ids.dtype, device=device)
    borders = Borders(torch.tensor([4]), torch.tensor([8]), marks=torch.ones(1, 4, dtype=torch.long))
    whole = logits_of(model, ids, ones, borders)[:, 4:]
    if whole.isnan().any():
        raise not_finite(model, "logits")
    exact, scale = computes_exactly(model), whole.float().std()
    limit, off = (0.01 if exact else 0.3) * scale, []
    if quantization_of(model) is not None:  # other rows of a pass may change how activations are quantized
        alone = logits_of(model, ids[:, 4:], ones[:, 4:])[:, :1] - logits_of(model, ids[:, 4:5], ones[:, 4:5])
        limit += 3 * alone.float().abs().max()
    for n in (0, 3):
        tokens, mask = torch.cat([gap[:, :n], ids[:, 4:]], 1), torch.cat([gap[:, :n], ones[:, 4:]], 1)
        try:
            state = prefill(model, ids[:, :4], ones[:, :4], borders)[1]
            behind = extend(model, state, tokens, mask)[0][:, n:]
        except RuntimeError as e:
            return _do_without(model, f"it cannot continue from its KV cache ({e})")
        off.append((behind.float() - whole.float()).abs().max())
    if not off[0] <= limit:
        how = f"logits from the KV cache are off by {float(off[0]):.2g} from those of one full pass"
        return _do_without(model, f"{how} (a defect of this TransformerLens version for this architecture)")
    return bool(off[1] <= 4 * off[0] + 1e-4 * scale)


def _do_without(model: Any, how: str) -> bool:
    _without_cache[model] = how
    logger.warning("%s: %s; every pass runs all tokens again, which is correct but slow", model.cfg.model_name, how)
    return False


def step(model: Any, state: KVState, token: Int[Tensor, " batch"]) -> tuple[Float[Tensor, "batch d_vocab"], KVState]:
    """Run `extend` with one token per row."""
    logits, state = extend(model, state, token[:, None])
    return logits[:, -1], state


def _select_rows(cache: Any, rows: Tensor, *, keep: bool) -> Any:
    if cache is None:
        return None
    if hasattr(cache, "entries"):
        mask = cache.previous_attention_mask[rows.to(cache.previous_attention_mask.device)]
        return replace(cache, entries=[e.select(rows, keep=keep) for e in cache.entries], previous_attention_mask=mask)
    from lofit_lens.models.gathered import BridgeLayer  # transformers' caches are slow to import

    chosen = copy.copy(cache)
    chosen.layers = []
    for layer in cache.layers:
        if isinstance(layer, BridgeLayer):
            chosen.layers.append(layer.select(rows, keep=keep))
        else:  # a window, an index, a state: the layer knows how
            chosen.layers.append(copy.deepcopy(layer))
            chosen.layers[-1].reorder_cache(rows)  # `batch_select_indices` forgets the states of hybrid layers
    return chosen
