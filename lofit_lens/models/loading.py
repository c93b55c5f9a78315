"""Loading without weight processing, on the class that gets it right."""

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

from lofit_lens import io
from lofit_lens.errors import InputError, ModelError, unknown
from lofit_lens.models.hooks import frozen
from lofit_lens.models.identity import weights_revision
from lofit_lens.models.info import bridge_class, hooked_class, model_info

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "hooked", "bridge")
ORGANISM = Path(__file__).parents[1] / "organism" / "weights"
# Architectures that HookedTransformer builds correctly from a local configuration.
HOOKED_ARCHITECTURES = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GPTNeoXForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "GPTJForCausalLM", "BloomForCausalLM",
    "Phi3ForCausalLM",
})  # fmt: skip


def load_model(
    name_or_path: Any,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
) -> Any:
    """Load a model without weight processing, frozen and in eval mode.

    Args:
        name_or_path: `"organism"` (the embedded model), a hub id, a local Hugging Face folder of any
            name, or a Hugging Face model in memory (the bridge then takes its layers over).
        backend: `"hooked"`, `"bridge"`, or `"auto"`: HookedTransformer where it exists and loads this checkpoint
            correctly, else the bridge. `model_info(model).class_name` tells which; a fallback is logged with its reason.
        dtype: of the frozen weights; adapters stay float32.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`; None = CUDA where available, else the CPU.
        tokenizer: needed for a model in memory, optional otherwise.
        revision: hub commit, tag or branch.

    Returns:
        A `HookedTransformer` or a `TransformerBridge`.

    Raises:
        InputError: unknown backend, dtype or device.
        ModelError: no such model; or the class asked for cannot load it correctly (the reason is given).
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    wanted_dtype, wanted_device = io.torch_dtype(dtype), parse_device(device)
    hf_model = None if isinstance(name_or_path, str | Path) else name_or_path
    if hf_model is not None and tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: load_model(model, tokenizer=...)")
    if hf_model is None:
        source, name = located(name_or_path)
        config = read_config(source, revision)
    else:
        source, config = None, copy.deepcopy(hf_model.config)
        config.architectures = config.architectures or [type(hf_model).__name__]  # never saved
        name = str(config.name_or_path or "in memory")
    model, reason = on_hooked(
        lambda: _load_hooked(hf_model, source, config, tokenizer, revision, wanted_dtype, wanted_device),
        config, source, name=name, backend=backend,
    )  # fmt: skip
    if model is None:
        if reason is not None and hooked_class() is not None:
            logger.warning("%s: loaded as TransformerBridge, since HookedTransformer cannot: %s", name, reason)
        model = _load_bridge(hf_model, source, tokenizer, revision, wanted_dtype, wanted_device)
    model.eval()
    model.requires_grad_(False)
    object.__setattr__(model, "_lofit_lens_origin", (name, weights_revision(source, revision)))
    logger.info("%s loaded as %s", name, model_info(model).class_name)
    return model


def parse_device(device: str | torch.device | None) -> torch.device:
    """Turn a device name into a device that exists here.

    Raises:
        InputError: not a device name, or no such device on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise InputError(f"unknown device {str(device)!r}; allowed: cpu, cuda, cuda:0, cuda:1, ...") from e
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {device} here: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    if parsed.type not in ("cpu", "cuda"):
        raise InputError(
            f"device {device} is not supported (TransformerLens gives silent errors on MPS); use cpu or cuda"
        )
    return parsed


def located(name_or_path: str | Path) -> tuple[str | Path, str]:
    """Where a model is read from (a folder or a hub id), and its name in records."""
    if str(name_or_path) in ("organism", str(ORGANISM)):
        return ORGANISM, "organism"
    return name_or_path, str(name_or_path)


def on_hooked(
    build: Callable[[], Any], config: Any, source: Any, *, name: str, backend: str
) -> tuple[Any | None, str | None]:
    """What `build` makes on the way to HookedTransformer, or None and why the bridge has to load it (None: asked for).

    Raises:
        ModelError: backend is "hooked", and HookedTransformer cannot.
    """
    if backend == "bridge":
        return None, None
    reason = hooked_refusal(config, source)
    if reason is None:
        try:
            return build(), None
        except (ModelError, RuntimeError, KeyError, AttributeError, ValueError, TypeError) as e:
            if isinstance(e, torch.OutOfMemoryError):
                raise
            reason = _first_line(e)
    if backend == "hooked":
        raise ModelError(f"HookedTransformer cannot load {name}: {reason}. Use backend='bridge'")
    return None, reason


def hooked_refusal(config: Any, source: Any = None) -> str | None:
    """Why HookedTransformer cannot load this Hugging Face configuration correctly, or None if it can."""
    if hooked_class() is None:
        return "this TransformerLens (4.0 or later) has no HookedTransformer"
    architecture = _architecture(config)
    if architecture == "LlamaForCausalLM" and getattr(config, "attention_bias", False):
        return "it silently drops the attention biases of a Llama with attention_bias=True"
    if architecture.startswith("Qwen") and getattr(config, "use_sliding_window", False):
        return f"it ignores the sliding window of {architecture}"
    if architecture in HOOKED_ARCHITECTURES or _official_name(source) is not None:
        return None
    return f"it does not build {architecture} from a local configuration"


def _architecture(config: Any) -> str:
    return (config.architectures or ["unknown"])[0]


def _official_name(source: Any) -> str | None:
    """The hub name that HookedTransformer has a hand-written configuration for, if any."""
    if source is None or Path(source).exists():
        return None
    from transformer_lens import loading_from_pretrained as loading

    with contextlib.suppress(ValueError):
        return loading.get_official_model_name(str(source))
    return None


def read_config(source: Any, revision: str | None) -> Any:
    """The Hugging Face configuration of a folder or hub id; one from the hub is then in the cache.

    Raises:
        ModelError: no such model, or a folder that lacks its configuration or its weights.
    """
    from transformers import AutoConfig

    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give a folder written by Hugging Face's save_pretrained")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no .safetensors file (pickled weights are not read); save the model again as safetensors"
        )
    try:
        return AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except Exception as e:
        reason = _first_line(e)
        raise ModelError(
            f"unknown model {str(source)!r}: neither a local folder nor a model on the Hugging Face hub that can be "
            f"reached and read ({reason}). Give 'organism', a hub id such as EleutherAI/pythia-70m, or a local folder"
        ) from e


def _first_line(e: Exception) -> str:
    text = str(e).strip()
    line = text.splitlines()[0] if text else type(e).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _load_hf(source: Any, revision: str | None, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(source),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",
            trust_remote_code=False,
        ).eval()
    except Exception as e:
        raise ModelError(f"cannot read the weights of {source}: {_first_line(e)}") from e


def _load_tokenizer(source: Any, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except Exception as e:
        raise ModelError(f"cannot read the tokenizer of {source}: {_first_line(e)}") from e


def _in_memory_tokenizer(tokenizer: Any) -> Any:
    """A copy that TransformerLens does not try to read again from disk."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs.setdefault("name_or_path", "in memory")
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


def _load_hooked(
    hf_model: Any,
    source: Any,
    config: Any,
    tokenizer: Any,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Build a HookedTransformer from a Hugging Face model and check that their logits agree."""
    from transformer_lens import loading_from_pretrained as loading

    hf = hf_model if hf_model is not None else _load_hf(source, revision, dtype)
    tokenizer = _in_memory_tokenizer(tokenizer if tokenizer is not None else _load_tokenizer(source, revision))
    cls = hooked_class()
    assert cls is not None
    official = _own_configuration(config, source)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        if official is not None:
            model = cls.from_pretrained_no_processing(
                official, hf_model=hf, tokenizer=tokenizer, dtype=dtype, device="cpu", move_to_device=False
            )
        else:
            with _local_config(config, dtype) as (folder, cfg):
                weights = loading.get_pretrained_state_dict(folder, cfg, hf, dtype=dtype)
            model = cls(cfg, tokenizer, move_to_device=False)
            model.load_and_process_state_dict(
                weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
            )
            del weights
    _check_same_logits(model, hf, config)
    model.cfg.device = str(device)
    model.move_model_modules_to_device()
    return model


def hooked_config(config: Any, source: Any, dtype: torch.dtype) -> Any:
    """What HookedTransformer makes of a Hugging Face configuration, without weights."""
    from transformer_lens import loading_from_pretrained as loading

    official = _own_configuration(config, source)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        if official is not None:
            return loading.get_pretrained_model_config(official, device="cpu", dtype=dtype)
        with _local_config(config, dtype) as (_, cfg):
            return cfg


def _own_configuration(config: Any, source: Any) -> str | None:
    """The hub name under which HookedTransformer has to look, where it does not build the architecture from a configuration."""
    return _official_name(source) if _architecture(config) not in HOOKED_ARCHITECTURES else None


@contextlib.contextmanager
def _local_config(config: Any, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """A folder that holds the configuration alone, and HookedTransformer's own made from it.

    The class reads the architecture from the folder's *name* ("llama" in the path breaks it): this one's is neutral.
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


def _check_same_logits(model: Any, hf: Any, config: Any) -> None:
    """Compare with the Hugging Face model on 12 tokens; a conversion that went wrong is refused, not returned."""
    n_vocab = int(config.get_text_config().vocab_size)
    tokens = torch.randint(0, n_vocab, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), frozen(hf):
        expected = hf(tokens.to(next(hf.parameters()).device)).logits.float().cpu()
        got = model(tokens).float()[..., : expected.shape[-1]]
    scale = expected.abs().max().clamp(min=1.0)
    error = ((got - expected).abs().max() / scale).item()
    bound = 1e-3 if next(hf.parameters()).dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= bound:
        raise ModelError(f"its logits differ from the Hugging Face model's by {error:.2g} of their size on a probe")


def _load_bridge(
    hf_model: Any, source: Any, tokenizer: Any, revision: str | None, dtype: torch.dtype, device: torch.device
) -> Any:
    cls: Any = bridge_class()
    more: dict[str, Any]
    if hf_model is not None:
        tokenizer = _in_memory_tokenizer(tokenizer)
        name = hf_model.config.name_or_path or "in memory"
        if not hf_model.config.architectures:  # never saved: the bridge looks here for what it is
            hf_model.config.architectures = [type(hf_model).__name__]
        more = {"hf_model": hf_model.to(device, dtype)}
    else:
        name, more = str(source), {"revision": revision}
        tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(source, revision)
    with _quiet():
        try:
            return cls.boot_transformers(name, tokenizer=tokenizer, device=device, dtype=dtype, **more)
        except Exception as e:
            raise ModelError(f"TransformerBridge cannot load {name}: {_first_line(e)}") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back messages below ERROR of everything that logs through the root logger, as TransformerLens does."""
    log = logging.getLogger()
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
