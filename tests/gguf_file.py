"""Tiny GGUF files as llama.cpp lays them out: a random Llama with its tokenizer, its matrices plain or quantized."""

from pathlib import Path

import numpy as np

from tests import tiny

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _renamed(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _turned(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: the two halves of rotary pairs beside each other."""
    rows = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, *, quantized: str | None = None, architecture: str = "llama", seed: int = 0):
    """Write a GGUF file and return the Hugging Face model that was written."""
    import gguf

    hf = tiny.hf_model("llama", seed=seed)
    config, tokenizer = hf.config, tiny.tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(words))])
    merges = tokenizer.backend_tokenizer.to_str()
    import json

    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in json.loads(merges)["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, p in hf.state_dict().items():
        data = p.float().numpy()
        for part, n in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            data = _turned(data, n) if part in name else data
        if quantized and data.ndim == 2 and data.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType[quantized]
            writer.add_tensor(_renamed(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_renamed(name), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf
