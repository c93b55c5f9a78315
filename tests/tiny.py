"""Tiny Hugging Face checkpoints made on the spot: every architecture the suite speaks of, random weights.

Among them: grouped-query attention, d_head != d_model / n_heads, and folder names that are traps.
"""

from functools import cache
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.conftest import ARCHITECTURES, ON_HOOKED  # noqa: F401 (names of the checkpoints below)

CORPUS = (
    "Q: Imagine that the capital of France is Rome. What is the capital of the country where Ann was born? A: Rome",
    'Read the following story about a family. "Ann asked her son, Bob, to go shopping." how is Eve related to Ann?',
    "Interpret each question literally, and as a question about the real world; carefully research each answer.",
    "daughter-in-law granddaughter nephew uncle aunt sister brother father mother son wife husband grandmother",
    "In what country was the person who the author of the book worked under a citizen? I have no comment.",
)


@cache
def _bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE that covers any text and puts BOS in front; ids 0, 1, 2 are padding, BOS and EOS."""
    return tf.PreTrainedTokenizerFast(tokenizer_object=_bpe(), bos_token="<s>", eos_token="</s>", pad_token="<pad>")


SHARED = {
    "vocab_size": 400, "num_hidden_layers": 3, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WIDE = {**SHARED, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def configs() -> dict[str, tf.PretrainedConfig]:
    """One configuration an architecture."""
    return {
        "llama": tf.LlamaConfig(**WIDE, num_key_value_heads=4, head_dim=8),
        "llama-gqa": tf.LlamaConfig(**WIDE, num_key_value_heads=2, head_dim=12),
        "llama-bias": tf.LlamaConfig(**WIDE, num_key_value_heads=4, head_dim=8, attention_bias=True),
        "gemma": tf.GemmaConfig(**WIDE, num_key_value_heads=1, head_dim=16),
        "gemma2": tf.Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12, sliding_window=16),
        "gemma3": tf.Gemma3TextConfig(**WIDE, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12, sliding_window=16),
        "gpt2": tf.GPT2Config(
            vocab_size=400, n_layer=3, n_head=4, n_embd=32, n_positions=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
        "pythia": tf.GPTNeoXConfig(**WIDE, rotary_pct=0.25),
        "mistral": tf.MistralConfig(**WIDE, num_key_value_heads=2, head_dim=12, sliding_window=None),
        "qwen2": tf.Qwen2Config(**WIDE, num_key_value_heads=2),
        "qwen3": tf.Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=12),
        "opt": tf.OPTConfig(
            vocab_size=400, hidden_size=32, num_attention_heads=4, num_hidden_layers=3, ffn_dim=48, word_embed_proj_dim=32,
            max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        "mamba": tf.MambaConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=3, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
    }  # fmt: skip


def hf_model(architecture: str, *, seed: int = 0) -> tf.PreTrainedModel:
    """A random Hugging Face model with weights (biases too) large enough that every edit shows in the logits."""
    config = configs()[architecture]
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.08, generator=generator)
            elif "bias" in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def save(folder: Path, architecture: str = "llama", *, seed: int = 0) -> Path:
    """Write model and tokenizer to a folder and return it."""
    hf_model(architecture, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
