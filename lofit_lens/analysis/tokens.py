"""Tokens as text that can be read and told apart."""

from typing import Any

from lofit_lens.models import tokenizer_of


def token_texts(model: Any, ids: list[int]) -> list[str]:
    """Each token's own text, with the space that a word begins with.

    A token that is no text by itself (a part of a character) is named as the vocabulary names it.
    """
    tokenizer = tokenizer_of(model)
    found = []
    for token, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text, name = tokenizer.decode([token]), str(name)
        if not text or "\ufffd" in text:
            text = name
        elif name.startswith("\u2581") and not text.startswith(" "):  # SentencePiece: dropped by decoding one token
            text = " " + text
        found.append(text)
    return found
