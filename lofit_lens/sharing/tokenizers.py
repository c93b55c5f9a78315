"""Keep a tokenizer's behavior: transformers picks its class by the model's class, which can change how it reads text."""

from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import ModelError

SETTINGS = "tokenizer_config.json"
GENERIC = "PreTrainedTokenizerFast"  # follows tokenizer.json, whatever the model
TEXTS = (
    "Q: What is the capital of France? A: Paris", " two  spaces\tand\n\nlines ", "don't 1234567 3.14", "naïve 日本語 😀 ß",
    "<s>[INST] x </s><|im_start|>user\n", "",
)  # fmt: skip


def keep_tokenizer(base: Path, made: Path) -> None:
    """Make the tokenizer in folder `made`, whose files are those of `base`, read text as that of `base` does.

    Code is not copied, so its settings no longer name any (`auto_map`).

    Raises:
        ModelError: it reads text differently, even with the generic class in its settings; or one of them cannot be read without
            its own code.
    """
    wanted = _read(base)
    if (made / SETTINGS).is_file() and "auto_map" in (settings := io.read_json(made / SETTINGS)):
        io.write_json(made / SETTINGS, {name: value for name, value in settings.items() if name != "auto_map"})
    if _read(made) == wanted:
        return
    if (made / SETTINGS).is_file() and (made / "tokenizer.json").is_file():
        io.write_json(made / SETTINGS, io.read_json(made / SETTINGS) | {"tokenizer_class": GENERIC})
        if _read(made) == wanted:
            return
    raise ModelError(
        f"the tokenizer of {base} depends on the model's class: with a Llama it reads text differently, so nothing was written. "
        "Export the adapter as a PEFT carrier (export_peft), or serve it with lofit_lens"
    )


def _read(folder: Path) -> Any:
    """Tokens of some texts, with and without special tokens, and their decoded texts."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises many classes
        raise ModelError(
            f"the tokenizer in {folder} cannot be read, or only with code of its own, which is never run here: {e}"
        ) from e
    plain = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    return [
        plain, [tokenizer(text).input_ids for text in TEXTS], [tokenizer.decode(tokens) for tokens in plain],
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    ]  # fmt: skip
