"""What a model is: its class, shape, origin, and whether its weights were changed on loading."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from lofit_lens.errors import ModelError

Backend = Literal["hooked", "bridge"]


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

    `revision` is the hub's commit hash, or `sha256:...` of a local folder's weights (`sha256:sample:...` of large ones), or None
    if unknown.
    `processed` tells whether TransformerLens changed the weights.
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

    @property
    def class_name(self) -> str:
        """The TransformerLens class."""
        return "HookedTransformer" if self.backend == "hooked" else "TransformerBridge"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def backend_of(model: Any) -> Backend:
    """Which of the two classes a model is.

    Raises:
        ModelError: neither.
    """
    if isinstance(model, bridge_class()):
        return "bridge"
    hooked = hooked_class()
    if hooked is not None and isinstance(model, hooked):
        return "hooked"
    raise ModelError(
        f"{type(model).__name__} is neither a HookedTransformer nor a TransformerBridge; "
        "wrap a Hugging Face model with lofit_lens.load_model(model, tokenizer=...)"
    )


def model_info(model: Any) -> ModelInfo:
    """Describe any HookedTransformer or TransformerBridge, whoever loaded it."""
    backend = backend_of(model)
    cfg = model.cfg
    name, revision = getattr(model, "_lofit_lens_origin", None) or (str(cfg.model_name), None)
    return ModelInfo(
        name=name, revision=revision, backend=backend, processed=is_processed(model),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."), n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads), d_model=int(cfg.d_model), d_vocab=int(cfg.d_vocab),
    )  # fmt: skip


def same_weights(one: ModelInfo, other: ModelInfo) -> bool:
    """Whether two records can be of one model: the same revision, or the same last part of the name where those say nothing.

    A commit of the hub and a checksum of local files cannot be compared, nor the checksum of all bytes and that of a sample.
    """
    if one.revision and other.revision and _kind(one.revision) == _kind(other.revision):
        return one.revision == other.revision
    return one.name.rsplit("/")[-1].lower() == other.name.rsplit("/")[-1].lower()


def _kind(revision: str) -> str:
    return revision.rpartition(":")[0]


def is_processed(model: Any) -> bool:
    """Whether TransformerLens changed the weights on loading (layer norms or value biases folded, or compatibility mode)."""
    if backend_of(model) == "bridge":
        return bool(getattr(model, "compatibility_mode", False) or getattr(model, "_weights_processed", False))
    return str(model.cfg.normalization_type).endswith("Pre") or _value_biases_gone(model)


def value_biases_folded(model: Any) -> bool:
    """Whether processing moved value biases into b_O, which shifts z away from the original model's.

    True for GPT-2, GPT-NeoX, OPT, Qwen2 and others whose attention has biases, after `fold_value_biases`.
    """
    return is_processed(model) and _value_biases_gone(model)


def _value_biases_gone(model: Any) -> bool:
    """Query biases but no value biases: no architecture has that by itself."""
    try:
        return bool(model.b_Q.abs().max() > 0) and not bool(model.b_V.abs().max() > 0)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # no biases, or layers without attention
        return False


def tokenizer_of(model: Any) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: the model has none.
    """
    backend_of(model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ModelError("this model has no tokenizer; set model.tokenizer or load it with one")
    return tokenizer


def context_length(model: Any) -> int:
    """Longest sequence the model takes, in tokens; without a stated limit, no practical one."""
    return int(getattr(model.cfg, "n_ctx", None) or 2**31)


def attention_window(model: Any) -> int | None:
    """Smallest number of tokens that some layer's attention looks back over; None where all layers see everything.

    Windows are counted in places of the key-value cache, padding included.
    """
    cfg = model.cfg
    if backend_of(model) == "hooked":
        return int(cfg.window_size) if cfg.use_local_attn and cfg.window_size else None
    hf = model.original_model.config
    hf = hf.get_text_config() if hasattr(hf, "get_text_config") else hf
    if getattr(hf, "use_sliding_window", True) is False:
        return None
    sizes = [getattr(hf, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((int(s) for s in sizes if isinstance(s, int) and s > 0), default=None)


def device_of(model: Any) -> torch.device:
    """Device that takes the input tokens."""
    return next(model.parameters()).device
