"""Show single tokens as readable, distinguishable text, the same way in tables, figures, pages and errors.

A token is a piece of text, white space included, or some of a character's UTF-8 bytes. Tokenizers write both in their own
letters (`Ġthe`, `▁the`, `Ã`, `<0xC3>`). Decoding a single token loses the space before a word (SentencePiece) and
turns any part of a character into U+FFFD. Here `token_texts` gives the text itself, with bytes that are not
text by themselves as `<0xC3>`, and `visible` makes white space and unprintable characters of a text visible.
"""

from collections.abc import Sequence
from typing import Any

UNKNOWN = "\ufffd"
SPACE = "\u2581"  # SentencePiece's letter for it
SIGNS = {" ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}
EMPTY = "\u2205"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's own text, with a word's leading space.

    Args:
        tokenizer: a Hugging Face tokenizer: byte-level BPE, SentencePiece (with bytes or without), or words.
        ids: ids of its tokens.

    Returns:
        The text of each id. Bytes that are only part of a character are shown as `<0x..>` each, among the text around them.
        A token without text gets its name in the vocabulary.
    """
    return [_text(tokenizer, int(i), name) for i, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]


def visible(text: str) -> str:
    """Make a token's text visible: a space as `␣`, a newline `↵`, a tab `⇥`, other unprintable characters by their number.

    Empty text is `∅`. U+FFFD, which only a token that really is that character contains, is shown as `<U+FFFD>`.
    """
    return (
        "".join(SIGNS.get(c) or (c if c.isprintable() and c != UNKNOWN else f"<U+{ord(c):04X}>") for c in text) or EMPTY
    )


def _text(tokenizer: Any, token: int, name: Any) -> str:
    if isinstance(name, bytes):
        return _bytes_as_text(name)
    name, text = str(name), tokenizer.decode([token], clean_up_tokenization_spaces=False)
    spaced = name.replace(SPACE, " ")
    if spaced.lstrip(" ") == text.lstrip(" "):  # SentencePiece, whose first space is dropped by decoding one token
        return spaced or name
    if text and UNKNOWN not in text:
        return text
    if all(c in BYTE_OF for c in name):
        return _bytes_as_text(bytes(BYTE_OF[c] for c in name))
    return name


def _bytes_as_text(raw: bytes) -> str:
    """Decode UTF-8, with each byte that is not part of a whole character as `<0x..>`."""
    text = raw.decode("utf-8", errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def _byte_letters() -> dict[str, int]:
    """Map the letters of byte-level BPE to bytes: visible ones stand for themselves, all others are from U+0100 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in own]
    return {**{chr(b): b for b in own}, **{chr(0x100 + i): b for i, b in enumerate(rest)}}


BYTE_OF = _byte_letters()
