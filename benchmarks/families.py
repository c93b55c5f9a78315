"""Tiny random checkpoints of every decoder family that TransformerLens says it takes, and of what makes families differ.

`FAMILIES` holds one configuration for each class, `VARIANTS` the options of a class that change what it computes; both say only
what differs from `SHARED`. Where a class can look back over a window, or scale its rotary positions beyond a length, it does so
within the lengths that are compared.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import measure
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, WINDOW, CONTEXT = 400, 16, 256
SHARED = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
TEXTS = (
    "Q: Imagine that the capital of France is Rome. What is the capital of the country where Ann was born? A: Rome",
    'Read the following story about a family. "Ann asked her son, Bob, to go shopping." how is Eve related to Ann?',
    "Interpret each question literally, and as a question about the real world; carefully research each answer.",
)

SLIDING = {"sliding_window": WINDOW}
CAPPED = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Rotary positions that are scaled; with `original` = 32, lengths that are compared lie on both sides of it."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


FAMILIES: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {**MOE, **MIXED, "head_dim": 12, "num_shared_experts": 1, "num_dense_layers": 1},
    "ApertusForCausalLM": {},
    "ArceeForCausalLM": {},
    "BambaForCausalLM": {**MAMBA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "BertLMHeadModel": {"is_decoder": True},
    "BitNetForCausalLM": {},
    "BloomForCausalLM": {},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "CohereForCausalLM": {"logit_scale": 0.25},
    "Cohere2ForCausalLM": {**MIXED, "logit_scale": 0.25},
    "DeepseekV2ForCausalLM": {**ROUTED, **LATENT},
    "DeepseekV3ForCausalLM": {**ROUTED, **LATENT},
    "DeepseekV4ForCausalLM": {
        **ROUTED, **SLIDING, "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "num_key_value_heads": 1,
        "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "num_nextn_predict_layers": 0,
    },
    "Ernie4_5ForCausalLM": {"head_dim": 12},
    "Ernie4_5_MoeForCausalLM": {
        "moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
    },
    "Exaone4ForCausalLM": {**MIXED},
    "FalconForCausalLM": {},
    "FalconH1ForCausalLM": {
        **MAMBA, "head_dim": 12, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64,
    },
    "FalconMambaForCausalLM": {"state_size": 8},
    "FlexOlmoForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "GemmaForCausalLM": {"head_dim": 12},
    "Gemma2ForCausalLM": {**MIXED, **CAPPED, "head_dim": 12, "query_pre_attn_scalar": 20},
    "Gemma3ForCausalLM": {**MIXED, "head_dim": 12, "query_pre_attn_scalar": 20},
    "Gemma4ForCausalLM": {
        **MIXED, "final_logit_softcapping": 1.5, "head_dim": 12, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "GlmForCausalLM": {"head_dim": 12},
    "Glm4ForCausalLM": {"head_dim": 12},
    "Glm4MoeForCausalLM": {**ROUTED, "head_dim": 12},
    "Glm4MoeLiteForCausalLM": {**ROUTED, **LATENT},
    "GlmMoeDsaForCausalLM": {**ROUTED, **LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
    "GPT2LMHeadModel": {},
    "GPTBigCodeForCausalLM": {},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {
        "num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW,
    },
    "GPTNeoXForCausalLM": {},
    "GptOssForCausalLM": {**MIXED, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteForCausalLM": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "GraniteMoeForCausalLM": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "num_local_experts": 4,
    },
    "GraniteMoeHybridForCausalLM": {
        **MAMBA, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "shared_intermediate_size": 24,
        "num_local_experts": 4, "layer_types": ["mamba", "attention", "mamba"],
    },
    "HrmTextForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 12},
    "Jais2ForCausalLM": {},
    "JambaForCausalLM": {
        **MAMBA, "mamba_dt_rank": 4, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "JetMoeForCausalLM": {"kv_channels": 8, "num_local_experts": 4, "num_key_value_heads": 4},
    "LagunaForCausalLM": {**MOE, **MIXED, "head_dim": 12, "shared_expert_intermediate_size": 24},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "Lfm2MoeForCausalLM": {**MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "LlamaForCausalLM": {},
    "Llama4ForCausalLM": {
        "head_dim": 12, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "no_rope_layers": [1, 0, 1],
    },
    "MambaForCausalLM": {"state_size": 8},
    "Mamba2ForCausalLM": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "MiniMaxM2ForCausalLM": {"head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Ministral3ForCausalLM": {
        **SLIDING, "head_dim": 12,
        **rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0,
               llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0),
    },
    "MistralForCausalLM": {**SLIDING},
    "MixtralForCausalLM": {**SLIDING, "num_local_experts": 4},
    "ModernBertDecoderForCausalLM": {"local_attention": WINDOW, "global_attn_every_n_layers": 2},
    "MptForCausalLM": {"max_seq_len": CONTEXT},
    "NanoChatForCausalLM": {"final_logit_softcapping": 1.5},
    "NemotronForCausalLM": {},
    "NemotronHForCausalLM": {
        "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
        "ssm_state_size": 8, "head_dim": 12, "chunk_size": 8, "use_mamba_kernels": False,
    },
    "OlmoForCausalLM": {"clip_qkv": 1.0},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": {**MIXED},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "OlmoHybridForCausalLM": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "OpenAIGPTLMHeadModel": {},
    "OPTForCausalLM": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {**SLIDING},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": {**MOE, "shared_expert_intermediate_size": 24},
    "Qwen3ForCausalLM": {"head_dim": 12},
    "Qwen3MoeForCausalLM": {**MOE, "head_dim": 12},
    "Qwen3NextForCausalLM": {**MOE, **DELTA, "head_dim": 12, "shared_expert_intermediate_size": 24},
    "Qwen3_5ForCausalLM": {**DELTA, "head_dim": 12},
    "Qwen3_5MoeForCausalLM": {**MOE, **DELTA, "head_dim": 12, "shared_expert_intermediate_size": 24},
    "RecurrentGemmaForCausalLM": {"lru_width": 32, "attention_window_size": WINDOW, "head_dim": 8, "logits_soft_cap": 1.5},
    "RwkvForCausalLM": {"attention_hidden_size": 32, "context_length": CONTEXT},
    "SeedOssForCausalLM": {"head_dim": 12},
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0, 1]},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {**SLIDING},
    "VaultGemmaForCausalLM": {**MIXED, **CAPPED, "head_dim": 12, "query_pre_attn_scalar": 20},
    "XGLMForCausalLM": {},
    "YoutuForCausalLM": {**LATENT},
    "Zamba2ForCausalLM": {
        **MAMBA, "layers_block_type": ["mamba", "hybrid", "mamba"], "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
        "chunk_size": 8, "num_mem_blocks": 1, "num_key_value_heads": 4, "attention_head_dim": 16, "use_mamba_kernels": False,
        "use_mem_eff_path": False,
    },
}  # fmt: skip

# name -> class and what differs from its entry above
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama: attention_bias, mlp_bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Llama: mlp_bias": ("LlamaForCausalLM", {"mlp_bias": True}),
    "Llama: head_dim 12, tied": ("LlamaForCausalLM", {"head_dim": 12, "tie_word_embeddings": True}),
    "Llama: rope linear": ("LlamaForCausalLM", rope("linear", factor=4.0)),
    "Llama: rope dynamic": ("LlamaForCausalLM", rope("dynamic", factor=4.0, original_max_position_embeddings=32)),
    "Llama: rope yarn": (
        "LlamaForCausalLM", rope("yarn", factor=8.0, original_max_position_embeddings=32),
    ),
    "Llama: rope llama3": (
        "LlamaForCausalLM",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "Mistral: no window, rope dynamic": (
        "MistralForCausalLM", {"sliding_window": None, **rope("dynamic", factor=4.0, original_max_position_embeddings=32)},
    ),
    "Mistral: head_dim 12": ("MistralForCausalLM", {"head_dim": 12}),
    "Qwen2: sliding window": (
        "Qwen2ForCausalLM", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "Qwen2: rope yarn": ("Qwen2ForCausalLM", rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    "Qwen3: sliding window": (
        "Qwen3ForCausalLM", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "Qwen3: attention_bias": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "Qwen3: rope yarn": ("Qwen3ForCausalLM", rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    "Phi3: rope longrope": (
        "Phi3ForCausalLM",
        {"sliding_window": None, "original_max_position_embeddings": 32,
         **rope("longrope", short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0], original_max_position_embeddings=32)},
    ),
    "Phi3: half rotary": ("Phi3ForCausalLM", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "Falcon: multi-query, sequential": (
        "FalconForCausalLM", {"multi_query": True, "parallel_attn": False, "new_decoder_architecture": False, "bias": True},
    ),
    "Falcon: new decoder architecture": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon: ALiBi": (
        "FalconForCausalLM", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "GPT-2: scale_attn_by_inverse_layer_idx": ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-2: scale_attn_weights off": ("GPT2LMHeadModel", {"scale_attn_weights": False}),
    "GPT-2: n_inner, relu": ("GPT2LMHeadModel", {"n_inner": 48, "activation_function": "relu"}),
    "GPT-NeoX: sequential": ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "GPT-NeoX: no bias": ("GPTNeoXForCausalLM", {"attention_bias": False}),
    "GPT-NeoX: rope linear": ("GPTNeoXForCausalLM", rope("linear", factor=4.0, partial_rotary_factor=0.25)),
    "OPT: post-norm, projected embeddings": (
        "OPTForCausalLM", {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "OPT: no bias, no norm weights": ("OPTForCausalLM", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "BLOOM: residual after the norm": ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
    "MPT: clip_qkv, softmax_scale": ("MptForCausalLM", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.5, "alibi": True}}),
    "Gemma3: soft caps": ("Gemma3ForCausalLM", CAPPED),
    "Gemma: tied": ("GemmaForCausalLM", {"tie_word_embeddings": True}),
    "Cohere: query-key norm": ("CohereForCausalLM", {"use_qk_norm": True}),
    "StableLM: query-key norm, parallel": (
        "StableLmForCausalLM", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    "Phi: query-key norm": ("PhiForCausalLM", {"qk_layernorm": True}),
    "GPT-BigCode: multi-head": ("GPTBigCodeForCausalLM", {"multi_query": False}),
    "Starcoder2: tied, no bias": ("Starcoder2ForCausalLM", {"tie_word_embeddings": True, "use_bias": False}),
    "StableLM: half rotary": ("StableLmForCausalLM", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "DeepSeek-V3: no query compression": ("DeepseekV3ForCausalLM", {"q_lora_rank": None}),
    "Qwen3-MoE: dense layer": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
    "Granite: biases": ("GraniteForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Olmo: no clipping": ("OlmoForCausalLM", {"clip_qkv": None}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One checkpoint: its name in the table, its class, and what its configuration says."""

    name: str
    architecture: str
    changes: dict[str, Any]


def cases() -> list[Case]:
    """All checkpoints, by name."""
    listed = [Case(name.removesuffix("ForCausalLM"), name, changes) for name, changes in FAMILIES.items()]
    listed += [Case(name, kind, FAMILIES[kind] | changes) for name, (kind, changes) in VARIANTS.items()]
    return sorted(listed, key=lambda case: (case.architecture.lower(), case.name.lower()))


@cache
def claimed() -> dict[str, str]:
    """Class that this TransformerLens says it takes -> why no checkpoint of it is made here; "" where one is."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    decoders = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        decoders |= {names} if isinstance(names, str) else set(names)
    return {name: "" if name in FAMILIES else _left_out(name, decoders) for name in sorted(SUPPORTED_ARCHITECTURES)}


def _left_out(name: str, decoders: set[str]) -> str:
    if not hasattr(tf, name):
        return "not in transformers: code of a checkpoint's own, which is never run, or another library's weights"
    if name not in decoders:
        return "no decoder of text alone in transformers"
    if "text_config" in _fields(getattr(tf, name).config_class):
        return "reads images or sound as well; its text part has a class of its own"
    return "**no configuration is given in benchmarks/families.py**"


def _fields(config_class: Any) -> set[str]:
    """Names that a configuration takes."""
    names = set(config_class.attribute_map)
    for cls in config_class.__mro__:
        names |= set(getattr(cls, "__annotations__", {})) | set(inspect.signature(cls.__init__).parameters)
    return names


def configuration(case: Case) -> tf.PretrainedConfig:
    """The configuration of a checkpoint."""
    config_class = getattr(tf, case.architecture).config_class
    known = _fields(config_class)
    return config_class(**{k: v for k, v in SHARED.items() if k in known} | case.changes)


def build(case: Case, *, seed: int = 0) -> tf.PreTrainedModel:
    """A random model in which nothing stands at a neutral value: noise is added to biases, norms and scales too."""
    torch.manual_seed(seed)
    config = configuration(case)
    config._attn_implementation = "eager"
    model = getattr(tf, case.architecture)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.empty_like(p).normal_(0, 0.15 if p.ndim > 1 else 0.05, generator=generator)
    return model


def save(case: Case, folder: Path) -> None:
    """Write checkpoint and tokenizer."""
    build(case).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@cache
def tokenizer() -> Any:
    """One for all of them."""
    return measure.tokenizer_for(TEXTS, size=VOCAB)
