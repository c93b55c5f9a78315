"""What a model is: its class, shape, origin, and whether its weights were changed on loading."""

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lofit_lens.checks import shown
from lofit_lens.errors import ModelError
from lofit_lens.heads import Grid
from lofit_lens.models.identity import fingerprint
from lofit_lens.models.rotary import changing_angles
from lofit_lens.models.tokens import ends_in, has_rules, keep_rules, rules_before_lens, rules_of

logger = logging.getLogger(__name__)

Backend = Literal["hooked", "bridge"]
EXACT = 1e-3  # of the usual size: a smaller number was set to 0 on purpose, in any precision
# What configurations call the number of tokens that attention looks back over.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "attention_window_size")


def hooked_class() -> type | None:
    """`HookedTransformer`, or None where this TransformerLens (4.0 and later) does not have it."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def bridge_class() -> type:
    """`TransformerBridge`, from the import path that 3.x and 4.x share."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge


@dataclass(frozen=True)
class ModelInfo:
    """What a model is and how it was loaded; stored in every adapter and result.

    `name` is the hub id, a local folder's own name, or the name given on loading.
    `revision` is the hub's commit hash, `sha256:...` of a local folder's weights (`sha256:sample:...` of large ones), or a
    fingerprint of weights in memory, `memory...:...`; None if unknown.
    `processed` says whether TransformerLens changed the weights.
    `prepend_bos` says whether BOS (or what the tokenizer uses for it) is prepended to every text; None if unknown.
    `head_layers` are the layers whose heads can be edited together; None = all.
    `quantization` says how the weights are quantized, e.g. `"bitsandbytes 4-bit nf4"`; None if they are not.
    """

    name: str
    revision: str | None
    backend: Backend
    processed: bool
    dtype: str
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    prepend_bos: bool | None = None
    head_layers: tuple[int, ...] | None = None
    quantization: str | None = None

    @property
    def grid(self) -> Grid:
        """Its layers and heads, and which layers have heads that can be edited."""
        return Grid((self.n_layers, self.n_heads), self.head_layers)

    @property
    def class_name(self) -> str:
        """The TransformerLens class."""
        return "HookedTransformer" if self.backend == "hooked" else "TransformerBridge"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        record = asdict(self)
        return {k: v for k, v in record.items() if v is not None or k not in ("head_layers", "quantization")}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelInfo":
        """Read what `to_dict` wrote; raise TypeError if a field is missing or unknown."""
        layers = record.get("head_layers")
        return cls(**{**record, "head_layers": None if layers is None else tuple(layers)})


def backend_of(model: Any) -> Backend:
    """Return which of the two classes a model is.

    Raises:
        ModelError: neither of them.
    """
    if isinstance(model, bridge_class()):
        return "bridge"
    hooked = hooked_class()
    if hooked is not None and isinstance(model, hooked):
        return "hooked"
    raise ModelError(f"{shown(model)} is neither a HookedTransformer nor a TransformerBridge; {_instead(model)}")


def _instead(model: Any) -> str:
    """Say what to do if something else was given as a model."""
    if isinstance(model, str | Path):
        return f"load it first: lofit_lens.load_model({str(model)!r})"
    if hasattr(model, "attached"):
        return "it is an adapter: give the model, and run it inside `with adapter.attached(model):`"
    if hasattr(model, "peft_config"):
        return (
            "merge its adapter into the weights and wrap the result: "
            "lofit_lens.load_model(model.merge_and_unload(), tokenizer=...)"
        )
    if isinstance(model, torch.nn.Module):
        return "wrap a Hugging Face model with lofit_lens.load_model(model, tokenizer=...)"
    return "give the model that lofit_lens.load_model(...) gives"


def model_info(model: Any) -> ModelInfo:
    """Describe any HookedTransformer or TransformerBridge, whoever loaded it."""
    backend, cfg, origin = backend_of(model), model.cfg, origin_of(model)
    rules = None if getattr(model, "tokenizer", None) is None else rules_of(tokenizer_of(model))
    return ModelInfo(
        name=origin.name, revision=origin.revision, backend=backend, processed=is_processed(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."), n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads), d_model=int(cfg.d_model), d_vocab=int(cfg.d_vocab),
        prepend_bos=None if rules is None else rules.prepend_bos, head_layers=head_layers(model),
        quantization=quantization_of(model),
    )  # fmt: skip


def quantization_of(model: Any) -> str | None:
    """Return how the weights of a model of any class are quantized; None if they are not.

    Weights of a GGUF file are not quantized once transformers has read them.
    """
    hf = getattr(model, "original_model", model)
    method = getattr(hf, "quantization_method", None)
    if method is None:  # quantized in place by torchao's own call
        kinds = {type(p.data) for p in hf.parameters()}
        return "torchao" if any(kind.__module__.startswith("torchao") for kind in kinds) else None
    name = str(getattr(method, "value", method))
    settings = hf.config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
    kind = settings.get("bnb_4bit_quant_type") if bits == 4 else None
    parts = (name, bits and f"{bits}-bit", kind)
    return None if name == "gguf" else " ".join(str(part) for part in parts if part)


def computes_exactly(model: Any) -> bool:
    """Return whether equivalent computations differ only by float32 rounding: neither quantized weights nor half precision."""
    return next(model.parameters()).dtype in (torch.float32, torch.float64) and quantization_of(model) is None


_reached: "weakref.WeakKeyDictionary[Any, tuple[int, ...] | None]" = weakref.WeakKeyDictionary()


def head_layers(model: Any) -> tuple[int, ...] | None:
    """Return the layers whose heads can be edited together; None = all. A warning says once if some are left out.

    Those are layers without hook_z (linear attention, state spaces, convolutions), and layers whose heads differ in size from
    most.
    """
    if model not in _reached:
        _reached[model] = _find_head_layers(model)
    return _reached[model]


def _find_head_layers(model: Any) -> tuple[int, ...] | None:
    n_layers, sizes = int(model.cfg.n_layers), dict[int, Any]()
    if backend_of(model) == "hooked":
        return None
    points = model.hook_dict
    for layer in range(n_layers):
        if (point := points.get(f"blocks.{layer}.attn.hook_z")) is not None:
            sizes[layer] = getattr(point.hook_conversion, "d_head", None)
    found = alike(sizes, n_layers)
    if found is None:
        return None
    why = "the others' heads have another size" if len(sizes) == n_layers else "the others have no heads at hook_z"
    logger.warning(
        "%s: heads can be edited in %d of %d layers (%s); %s. K counts only these heads",
        model.cfg.model_name, len(found), n_layers, ", ".join(map(str, found)) or "none", why,
    )  # fmt: skip
    return found


def alike(sizes: Mapping[int, Any], n_layers: int) -> tuple[int, ...] | None:
    """Return the layers whose heads have the most frequent size, given the size in each layer; None = all layers of the model."""
    if not sizes:
        return ()
    usual = Counter(sizes.values()).most_common(1)[0][0]
    found = tuple(layer for layer, size in sizes.items() if size == usual)
    return None if len(found) == n_layers else found


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        name: its name in records.
        revision: of its weights; see `ModelInfo`.
        source: folder or hub id from which this process can read it again; None for a model made in memory.
        ends: end tokens that its configurations name.
    """

    name: str
    revision: str | None
    source: str | Path | None
    ends: frozenset[int]


_Versions = list[tuple["weakref.ref[torch.Tensor]", int]]  # each weight and how often it was written to
_origins: "weakref.WeakKeyDictionary[Any, tuple[Origin, _Versions]]" = weakref.WeakKeyDictionary()


def keep_origin(model: Any, origin: Origin) -> None:
    """Remember where a model comes from, as long as its weights do not change."""
    _origins[model] = origin, [(weakref.ref(p), _version(p)) for p in model.parameters()]


def origin_of(model: Any) -> Origin:
    """Return where a model comes from; if it was not loaded here, or was edited since, its revision is a fingerprint."""
    found = _origins.get(model)
    if found is not None and all((p := ref()) is not None and _version(p) == at for ref, at in found[1]):
        return found[0]
    name = found[0].name if found is not None else str(model.cfg.model_name)
    ends = found[0].ends if found is not None else _configured_ends(model)
    mine = Origin(name, fingerprint(model, f"memory:{backend_of(model)}"), None, ends)
    keep_origin(model, mine)
    return mine


def _version(p: torch.Tensor) -> int:
    return -1 if p.is_inference() else p._version


def _configured_ends(model: Any) -> frozenset[int]:
    """Return the end tokens in the configurations of a model that was not loaded here."""
    if backend_of(model) == "bridge":
        hf = model.original_model
        return ends_in(hf.config, hf.config.get_text_config(), getattr(hf, "generation_config", None))
    from transformers import AutoConfig, GenerationConfig

    name, listed = str(getattr(model.tokenizer, "name_or_path", "") or ""), []
    for kind in (AutoConfig, GenerationConfig) if name else ():
        with contextlib.suppress(Exception):  # of many classes: neither a folder nor in the cache
            listed.append(kind.from_pretrained(name, local_files_only=True))
    return ends_in(*listed)


def end_tokens(model: Any) -> frozenset[int]:
    """Return all ids at which generation stops: those of the checkpoint's two configurations, and the tokenizer's end token."""
    eos = rules_of(tokenizer_of(model)).eos
    return origin_of(model).ends | (frozenset() if eos is None else {int(eos)})


def same_weights(one: ModelInfo, other: ModelInfo) -> bool:
    """Return whether two records can describe one model: equal revisions, or equal last parts of the names.

    Names decide where revisions cannot be compared: a hub commit and a checksum of local files, or a checksum of all bytes and
    one of a sample.
    """
    if one.revision and other.revision and _kind(one.revision) == _kind(other.revision):
        return one.revision == other.revision
    return one.name.rsplit("/")[-1].lower() == other.name.rsplit("/")[-1].lower()


def _kind(revision: str) -> str:
    return revision.rpartition(":")[0]


def is_processed(model: Any) -> bool:
    """Return whether TransformerLens changed the weights: folded norms or value biases, centered or factored matrices."""
    if backend_of(model) == "bridge":
        # Compatibility mode by itself only renames hooks (no_processing=True leaves the weights).
        return bool(getattr(model, "_weights_processed", False))
    return (
        str(model.cfg.normalization_type).endswith("Pre") or _value_biases_gone(model) or _centered_or_factored(model)
    )


@torch.no_grad()
def _centered_or_factored(model: Any) -> bool:
    """Look for embeddings of mean 0, or orthonormal rows of W_O: training gives neither to the last digit."""
    rows = model.embed.W_E[:256].detach().float()
    W_O = model.blocks[0].attn.W_O[0].detach().float()  # [d_head, d_model]
    centered = rows.mean(dim=1).abs().max() < EXACT * rows.std()
    factored = (W_O @ W_O.mT - torch.eye(len(W_O), device=W_O.device)).abs().max() < EXACT
    return bool(centered or factored)


def value_biases_folded(model: Any) -> bool:
    """Return whether processing moved value biases into b_O, which shifts z away from the original model's.

    True for GPT-2, GPT-NeoX, OPT, Qwen2 and others whose attention has biases, after `fold_value_biases`.
    """
    return is_processed(model) and _value_biases_gone(model)


def _value_biases_gone(model: Any) -> bool:
    """Look for query biases without value biases: no architecture has that by itself."""
    try:
        return bool(model.b_Q.abs().max() > 0) and not bool(model.b_V.abs().max() > 0)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # no biases, or layers without attention
        return False


def tokenizer_of(model: Any) -> Any:
    """Return the model's tokenizer.

    Raises:
        ModelError: the model has no tokenizer.
    """
    backend_of(model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ModelError("this model has no tokenizer; set model.tokenizer or load it with one")
    if not has_rules(tokenizer):
        keep_rules(tokenizer, rules_before_lens(tokenizer, int(model.cfg.d_vocab)))
    return tokenizer


def context_length(model: Any) -> int:
    """Return the longest sequence that the model accepts, in tokens; 2**31 if it states no limit.

    If rotary angles change with the longest row of a batch, it is the length up to which they do not.
    """
    limit = int(getattr(model.cfg, "n_ctx", None) or 2**31)
    if backend_of(model) == "bridge" and changing_angles(model.original_model.config) is not None:
        text = model.original_model.config.get_text_config()
        rope = text.rope_parameters
        found = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        limit = min(limit, int(found or limit))
    return limit


def attention_window(model: Any) -> int | None:
    """Return the smallest attention window of any layer, in tokens; None if all layers see everything.

    Windows are counted in positions of the KV cache, padding included.
    """
    cfg = model.cfg
    if backend_of(model) == "hooked":
        return int(cfg.window_size) if cfg.use_local_attn and cfg.window_size else None
    hf = model.original_model.config
    hf = hf.get_text_config() if hasattr(hf, "get_text_config") else hf
    if getattr(hf, "use_sliding_window", True) is False:
        return None
    sizes = [getattr(hf, name, None) for name in WINDOWS]
    return min((int(s) for s in sizes if isinstance(s, int) and s > 0), default=None)


def device_of(model: Any) -> torch.device:
    """Return the device that takes the input tokens: the embedding's, wherever other layers are."""
    taking = model
    hf = getattr(model, "original_model", None)
    if hf is not None and hasattr(hf, "hf_device_map"):
        taking = hf.get_input_embeddings()
    return next(taking.parameters()).device
