"""Whether a checkpoint has room for a bias of attention's output projection, and how its configuration declares it.

GPT-2, GPT-NeoX, OPT and GPT-OSS have the bias. Llama, Gemma, Gemma-2, Gemma-3 (text), Qwen3, Qwen3-MoE, OLMo, OLMo-2, OLMo-3 and
OLMoE have it with `attention_bias=True`, which also requires biases of q, k and v: zeros. (A norm after attention, as in OLMo-2,
comes after the bias.) Mistral, Qwen2, Mixtral and Phi-3 have none and ignore the key. Without a sliding window, the first two are
the same function as a Llama, so the checkpoint can be written as one; the other two can only hold scalings. The model that a
configuration builds on the meta device, without weights, shows which biases it has.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lofit_lens.errors import ModelError
from lofit_lens.sharing.outputs import Outputs

# Architecture -> the key of its configuration that gives its projections biases.
SWITCHES = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "OlmoForCausalLM",
            "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
            "GPTNeoXForCausalLM", "GptOssForCausalLM",
        ),
        "attention_bias",
    ),
    "OPTForCausalLM": "enable_bias",
}  # fmt: skip
AS_LLAMA = ("MistralForCausalLM", "Qwen2ForCausalLM")
LLAMA = "LlamaForCausalLM"
# Keys of Mistral and Qwen2 that a Llama does not read; and keys that only a Llama reads.
ONLY_THEIRS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
ONLY_LLAMAS = ("mlp_bias", "pretraining_tp")
# Servers whose own version of an architecture lacks such a bias and silently ignores it (according to their source).
IGNORED_BY = {
    "GemmaForCausalLM": "vLLM (0.33) and SGLang (0.5.23) leave this model's new biases out silently, unless they are told to run "
    "it through transformers (--model-impl transformers)",
    **dict.fromkeys(
        ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        "vLLM (0.33) leaves this model's new biases out silently, unless it is told to run it through transformers "
        "(--model-impl transformers)",
    ),
    "OlmoeForCausalLM": "SGLang (0.5.23) leaves this model's new biases out silently, and vLLM (0.33) should fail on them, "
    "unless they are told to run it through transformers (--model-impl transformers)",
}
NEXT = "Export the adapter as a PEFT carrier (export_peft), or serve it with lofit_lens"


@dataclass(frozen=True)
class Slot:
    """Room for the biases.

    Attributes:
        config: `config.json` to write.
        added: bias -> its size, for every bias that the base lacks, including q/k/v; named as in the checkpoint.
    """

    config: dict[str, Any]
    added: Mapping[str, int]


def slot_for(outputs: Outputs, layers: Sequence[int]) -> Slot:
    """Find room for a bias of the output projection in these layers.

    Args:
        outputs: output projections of the base.
        layers: layers that need a bias; empty if only scalings are folded, which every architecture can hold.

    Raises:
        ModelError: no room, or none without changing what the model computes; says why and what to do instead.
    """
    checkpoint = outputs.checkpoint
    config = {k: v for k, v in copy.deepcopy(checkpoint.config).items() if k != "auto_map"}  # code is not copied
    if not layers:
        return Slot(config, {})
    # The model's own biases that a file lacks do not count as room: they would not be written.
    before = {k: v for k, v in _sizes(config, outputs).items() if not k.endswith(".bias") or k in checkpoint.where}
    wanted = {f"{outputs.names[layer]}.bias" for layer in layers}
    if wanted <= set(before):
        return Slot(config, {})
    architecture, name = checkpoint.architecture, checkpoint.name
    if architecture in AS_LLAMA:
        config = as_llama(config, name)
    elif architecture in SWITCHES:
        config[SWITCHES[architecture]] = True
    after = _sizes(config, outputs)
    if not wanted <= set(after):
        raise ModelError(
            f"{name}: {architecture} of this transformers has no bias in attention's output projection, and no setting gives it "
            f"one, so it cannot hold an offset (scalings need no bias). {NEXT}"
        )
    added = {bias: size for bias, size in after.items() if bias not in before}
    changed = [one for one in before if after.get(one) != before[one]]
    strange = [one for one in added if not one.endswith(".bias") or len(added[one]) != 1]
    if changed or strange:
        raise ModelError(
            f"{name}: the configuration with biases changes more than biases, e.g. {(changed + strange)[0]}. {NEXT}"
        )
    return Slot(config, {bias: size[0] for bias, size in added.items()})


def as_llama(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration of a Llama that computes the same as this Mistral or Qwen2, with room for biases.

    Every field that both know must have the same value once defaults are filled in, since the classes' defaults differ.

    Raises:
        ModelError: a sliding window, or a field that a Llama cannot adopt.
    """
    theirs = _built(config)
    kind = config["architectures"][0]
    windows = set(theirs.get("layer_types") or ()) - {"full_attention"}
    window = theirs.get("sliding_window") if kind.startswith("Mistral") or windows else None
    if window or windows:
        raise ModelError(
            f"{name}: {kind} has no bias in attention's output projection, and cannot be written as a Llama, which would have "
            f"one: it attends to the last {window or 'few'} tokens only, a Llama to all. {NEXT}; or, if no text "
            "is longer than that, set sliding_window to null in a copy of the model"
        )
    left_out = (*ONLY_THEIRS, *ONLY_LLAMAS)
    made = {k: copy.deepcopy(v) for k, v in config.items() if k not in left_out}
    made |= {"architectures": [LLAMA], "model_type": "llama", "attention_bias": True}
    own = {"architectures", "model_type", "attention_bias", *left_out}
    made |= {field: theirs[field] for field in _different(theirs, made, own)}  # fields whose default differs
    wrong = sorted({*_different(theirs, made, own), *(set(theirs) - set(_built(made)) - own)})
    if wrong:
        raise ModelError(f"{name}: {kind} cannot be written as a Llama, because of {', '.join(wrong)}. {NEXT}")
    return made


def _different(theirs: Mapping[str, Any], made: Mapping[str, Any], own: set[str]) -> list[str]:
    """Fields that both classes know and whose values differ, with defaults filled in."""
    ours = _built(made)
    return [field for field in (set(theirs) & set(ours)) - own if theirs[field] != ours[field]]


def _built(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its class's defaults filled in."""
    return _configuration(config).to_dict()


def _configuration(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    try:
        return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(config)))
    except Exception as e:  # transformers checks fields with errors of many classes
        raise ModelError(f"transformers cannot read a configuration of model_type {kind!r}: {e}. {NEXT}") from e


def _sizes(config: Mapping[str, Any], outputs: Outputs) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model that a configuration builds, named as in the checkpoint."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_configuration(config))
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    first = f"{outputs.names[0]}.weight"
    whole = next((name for name in found if name == first or name.endswith(f".{first}")), None)
    if whole is None:
        raise ModelError(f"{outputs.checkpoint.name}: its configuration builds a model without {first}; save it again")
    front = whole.removesuffix(first)  # GPT-2's checkpoint on the hub lacks the prefix "transformer."
    return {name.removeprefix(front): shape for name, shape in found.items()}
