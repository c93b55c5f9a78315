"""Build a HookedTransformer from a Hugging Face model, where it gives the same logits."""

import contextlib
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lofit_lens.errors import ModelError
from lofit_lens.hub import first_line
from lofit_lens.models.compared import Probe
from lofit_lens.models.info import hooked_class
from lofit_lens.models.rotary import positions_refusal, rotary_refusal

# Architectures that HookedTransformer builds correctly from a local configuration.
HOOKED_ARCHITECTURES = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GPTNeoXForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "GPTJForCausalLM", "BloomForCausalLM",
    "Phi3ForCausalLM",
})  # fmt: skip


def on_hooked(
    build: Callable[[], Any], config: Any, source: Any, *, name: str, backend: str
) -> tuple[Any | None, str | None]:
    """Return what `build` makes for HookedTransformer; or None, and why the bridge has to load it (None: it was requested).

    Raises:
        ModelError: backend is "hooked", and HookedTransformer cannot load the model.
    """
    if backend == "bridge":
        return None, None
    reason = hooked_refusal(config, source)
    if reason is None:
        try:
            return build(), None
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # TransformerLens' own code, of many classes
            reason = first_line(e)
    if backend == "hooked":
        raise ModelError(f"HookedTransformer cannot load {name}: {reason}. Use backend='bridge'")
    return None, reason


def hooked_refusal(config: Any, source: Any = None) -> str | None:
    """Return why HookedTransformer cannot load this Hugging Face configuration correctly, or None if it can."""
    if hooked_class() is None:
        return "this TransformerLens (4.0 or later) has no HookedTransformer"
    architecture = architecture_of(config)
    if architecture == "LlamaForCausalLM" and getattr(config, "attention_bias", False):
        return "it silently drops the attention biases of a Llama with attention_bias=True"
    if architecture.startswith("Qwen") and getattr(config, "use_sliding_window", False):
        return f"it ignores the sliding window of {architecture}"
    if architecture in HOOKED_ARCHITECTURES or _official_name(source) is not None:
        return None
    return f"it does not build {architecture} from a local configuration"


def architecture_of(config: Any) -> str:
    return (config.architectures or ["unknown"])[0]


def _official_name(source: Any) -> str | None:
    """Return the hub name for which HookedTransformer has a hand-written configuration, if any."""
    if source is None or Path(source).exists():
        return None
    from transformer_lens import loading_from_pretrained as loading

    with contextlib.suppress(ValueError):
        return loading.get_official_model_name(str(source))
    return None


def load_hooked(
    hf: Any, source: Any, config: Any, tokenizer: Any, dtype: torch.dtype, device: torch.device, probe: Probe
) -> Any:
    """Build a HookedTransformer from a Hugging Face model and check that their logits agree."""
    from transformer_lens import loading_from_pretrained as loading

    tokenizer = in_memory_tokenizer(tokenizer)
    cls = hooked_class()
    assert cls is not None
    official = _own_configuration(config, source)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        if official is not None:
            model = cls.from_pretrained_no_processing(
                official, hf_model=hf, tokenizer=tokenizer, dtype=dtype, device="cpu", move_to_device=False
            )
        else:
            with _local_config(config, dtype) as (folder, cfg):
                weights = loading.get_pretrained_state_dict(folder, cfg, hf, dtype=dtype)
            model = cls(cfg, tokenizer, move_to_device=False)
            _take(model, model.fill_missing_keys(weights), shares=source is not None)
            del weights
    if reason := positions_refusal(model.cfg, config) or rotary_refusal(model, hf):
        raise ModelError(reason)
    probe.check(model)
    model.cfg.device = str(device)
    model.move_model_modules_to_device()
    return model


def _take(model: Any, weights: dict[str, torch.Tensor], *, shares: bool) -> None:
    """Put weights into a HookedTransformer with their memory layout, which is the one its matrix products need.

    The class's own loading copies them into a layout that each product then copies again. Here a weight is copied only where it
    shares memory with another one, so that editing one leaves the other unchanged. If `shares` is false, the weights are a
    user's model's, and all are copied.
    """
    seen: set[int] = set()
    types = {name: p.dtype for name, p in model.named_parameters()}
    for name, found in weights.items():
        found = found.detach().to(types.get(name, found.dtype))
        place = found.untyped_storage().data_ptr()
        weights[name] = found if shares and place not in seen else found.clone()
        seen.add(place)
    model.load_state_dict(weights, assign=True, strict=False)


def hooked_config(config: Any, source: Any, dtype: torch.dtype) -> Any:
    """Return the configuration that HookedTransformer makes from a Hugging Face one, without weights.

    Raises:
        ModelError: the two describe different models.
    """
    from transformer_lens import loading_from_pretrained as loading

    official = _own_configuration(config, source)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        if official is not None:
            cfg = loading.get_pretrained_model_config(official, device="cpu", dtype=dtype)
        else:
            with _local_config(config, dtype) as (_, cfg):
                pass
    if reason := positions_refusal(cfg, config):
        raise ModelError(reason)
    return cfg


def _own_configuration(config: Any, source: Any) -> str | None:
    """Return the hub name that HookedTransformer has to look up, if it does not build the architecture from a configuration."""
    return _official_name(source) if architecture_of(config) not in HOOKED_ARCHITECTURES else None


@contextlib.contextmanager
def _local_config(config: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """Yield a folder that holds only the configuration, and the HookedTransformer configuration made from it.

    The class reads the architecture from the folder's *name* ("llama" in the path breaks it), so this name is neutral.
    """
    from transformer_lens import loading_from_pretrained as loading

    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        record = config.to_dict()
        record.setdefault("n_ctx", getattr(config, "max_position_embeddings", None))
        (Path(folder) / "config.json").write_text(json.dumps(record, default=str))
        cfg = loading.get_pretrained_model_config(folder, device="cpu", dtype=dtype)
        _fix_head_size(cfg, config)
        yield folder, cfg


def _fix_head_size(cfg: Any, config: Any) -> None:
    """Give a HookedTransformer configuration the checkpoint's own d_head where it assumed d_model / n_heads."""
    d_head = getattr(config, "head_dim", None)
    if d_head is not None and cfg.d_head != d_head:
        if cfg.rotary_dim == cfg.d_head:
            cfg.rotary_dim = d_head
        cfg.attn_scale = d_head**0.5
        cfg.d_head = d_head


def in_memory_tokenizer(tokenizer: Any) -> Any:
    """Copy a tokenizer so that TransformerLens does not try to read it from disk again."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs.setdefault("name_or_path", "in memory")
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress messages below ERROR from everything that logs through the root logger, as TransformerLens does."""
    log = logging.getLogger()
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
