"""Count the numbers that each method learns or estimates for a model, from its configuration only.

No weights are read and almost no memory is used. LoRA is counted on peft's own layers in the whole Hugging Face model, RED and
LoReFT on this package's modules, all on PyTorch's meta device, which has shapes but no numbers.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lofit_lens.errors import ModelError
from lofit_lens.heads import HeadSet, check_k
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.interventions.lora import RANK as LORA_RANK
from lofit_lens.interventions.lora import TARGETS, Lora, parse_targets
from lofit_lens.interventions.loreft import RANK, LoReft
from lofit_lens.interventions.post_block import PostBlock
from lofit_lens.interventions.red import Red
from lofit_lens.models import ORGANISM, ModelInfo, planned_head_layers
from lofit_lens.training.config import preset


def parameter_counts(
    config: Any, *, k: int | None = None, rank: int = RANK, lora_rank: int = LORA_RANK, targets: Iterable[str] = TARGETS
) -> dict[str, int]:
    """Return method -> count of numbers that it learns, or estimates (ITI, RepE), where all layers are edited.

    JoLA counts as if all gates stay open; the gates themselves end up in A and v.

    Args:
        config: a Hugging Face configuration, or the hub id or folder of one, or `"organism"`.
        k: heads of LoFiT 3 % and of ITI; LoFiT 10 % has three times as many, as in the paper. None = the preset's for a model of
            this name (Llama-2-7B 32, Llama-2-13B 48, Gemma-7B 16; others 3 %, rounded).
        rank: LoReFT's.
        lora_rank: LoRA's.
        targets: projections that LoRA changes.

    Raises:
        ModelError: no such configuration, or one without a language model in Hugging Face.
        InputError: a k, rank or target that this model cannot have.
    """
    config, name = _read(config)
    text = config.get_text_config()
    try:
        n_layers, n_heads, d_model = text.num_hidden_layers, text.num_attention_heads, text.hidden_size
    except AttributeError as e:
        raise ModelError(f"{name} has no attention heads to count ({e}); give a transformer's configuration") from e
    # With latent attention (DeepSeek), head_dim is that of the keys' rotary part.
    d_head = getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None) or d_model // n_heads
    info = ModelInfo(
        name, None, "bridge", False, "float32", n_layers, n_heads, d_model, 0, head_layers=planned_head_layers(config)
    )
    k = preset(info, "", "sft").k if k is None else k
    grid, shape = info.grid, (n_layers, n_heads, d_head)
    check_k(3 * k, grid.n_total, name)

    def offsets(n: int) -> int:
        return Lofit(shape, HeadSet.random(grid, n, seed=0)).train_only("v").n_parameters

    with torch.device("meta"):
        red, loreft = Red(n_layers, d_model), LoReft(n_layers, d_model, rank=rank)
        post_block = PostBlock(n_layers, d_model)
    every = Lofit(shape, HeadSet.all(grid)).train_only("A").n_parameters
    return {
        "ITI": k * d_head,
        "RepE": n_layers * d_model,
        "LoFiT step 1": every,
        "LoFiT 3 %": offsets(k),
        "LoFiT 10 %": offsets(3 * k),
        "LoRA": _lora(config, parse_targets(targets), lora_rank, shape),
        "RED": red.n_parameters,
        "LoReFT": loreft.n_parameters,
        "post-block": post_block.n_parameters,
        "JoLA": 2 * every,
    }


def _read(config: Any) -> tuple[Any, str]:
    from transformers import AutoConfig

    if not isinstance(config, str | Path):
        return config, str(config.name_or_path or "this model")
    try:
        found = AutoConfig.from_pretrained(str(ORGANISM if str(config) == "organism" else config))
    except Exception as e:
        raise ModelError(
            f"no configuration {str(config)!r} on the Hugging Face hub or in a folder ({e}); give 'organism', a hub id, a folder "
            "with config.json, or a configuration"
        ) from e
    return found, str(config)


def _lora(config: Any, targets: tuple[str, ...], rank: int, shape: tuple[int, int, int]) -> int:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    n_layers, n_heads, d_head = shape
    text, names = config.get_text_config(), [f"{t}_proj" for t in targets]
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, AttributeError) as e:
            raise ModelError(f"Hugging Face builds no language model from a {type(config).__name__}: {e}") from e
        if {n.rpartition(".")[2] for n, _ in model.named_modules()}.issuperset(names):
            changed: Any = inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), model)
            return sum(p.numel() for n, p in changed.named_parameters() if "lora_" in n)
        # One matrix for q, k and v (GPT-2, GPT-NeoX): the bridge splits it, and LoRA changes the parts.
        narrow = (getattr(text, "num_key_value_heads", None) or n_heads) * d_head
        whole, d_model = n_heads * d_head, text.hidden_size
        sizes = {"q": (d_model, whole), "k": (d_model, narrow), "v": (d_model, narrow), "o": (whole, d_model)}
        return Lora(n_layers, {t: sizes[t] for t in targets}, rank=rank).n_parameters
