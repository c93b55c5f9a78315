"""Tokenizers with chat templates of several styles, written for these tests, and a tiny model of such a one."""

import copy

from tokenizers.processors import TemplateProcessing

from lofit_lens.models import load_model
from tests import tiny

_TURNS = "{% for m in messages %}"
_CHATML = (
    _TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
TEMPLATES = {
    # BOS nowhere; the end of a turn is not the end of a text.
    "chatml": _CHATML,
    # BOS in the template, a space in front of an answer and after it, no marker of the assistant's turn.
    "llama-2": (
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}" + _TURNS +
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # No BOS in the template, on a tokenizer that puts one in front of a text.
    "zephyr": _TURNS + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # BOS in the template and by the tokenizer; no system; "model" in place of "assistant"; contents without outer white space.
    "gemma": (
        "{{ bos_token }}" + _NO_SYSTEM + _TURNS +
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # An empty thought in front of the last answer.
    "qwen-3": (
        _TURNS + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Nothing but text: the end of a turn is no token.
    "plain": _TURNS + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
}  # fmt: skip
STYLES = tuple(TEMPLATES)
ENDS = {"chatml": "<|im_end|>", "qwen-3": "<|im_end|>", "gemma": "<end_of_turn>"}  # others: the tokenizer's own
ADDS_BOS = ("llama-2", "zephyr", "gemma")


def tokenizer(style, *, template=None):
    """The tiny tokenizer with a style's template and tokens."""
    made = copy.deepcopy(tiny.tokenizer())
    made.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]}
    )
    front = "<s> " if style in ADDS_BOS else ""
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{front}$A", special_tokens=[("<s>", 1)])
    made.chat_template = TEMPLATES[style] if template is None else template
    return made


def model(style, backend="bridge"):
    """A tiny Llama with that tokenizer."""
    hf, tok = tiny.hf_model("llama"), tokenizer(style)
    hf.resize_token_embeddings(len(tok), mean_resizing=False)
    return load_model(hf, tokenizer=tok, backend=backend, device="cpu")
