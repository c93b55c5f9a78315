"""Single tokens as text that can be read and told apart: the one way in which tables, figures, pages and errors show them.

A token is a piece of text, white space included, or a piece of a character's UTF-8 bytes. Tokenizers write both in their own
letters (`Ġthe`, `▁the`, `Ã`, `<0xC3>`), and decoding one token alone loses the space in front of a word (SentencePiece) and
turns part of a character into U+FFFD, whichever part it is. Here `token_texts` gives the text itself, with bytes that are no
text by themselves as `<0xC3>`, and `visible` makes white space and unprintable characters of a text visible.
"""

from collections.abc import Sequence
from typing import Any

UNKNOWN = "\ufffd"
SPACE = "\u2581"  # SentencePiece's letter for it
SIGNS = {" ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}
EMPTY = "\u2205"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's own text, with the space that a word begins with.

    Args:
        tokenizer: a Hugging Face tokenizer: byte-level BPE, SentencePiece (with bytes or without), or words.
        ids: of tokens that it has.

    Returns:
        For each id its text. Bytes that are no text by themselves, since they are part of a character, are `<0x..>` each; what
        is text beside them stays. A token without text is named as the vocabulary names it.
    """
    return [_text(tokenizer, int(i), name) for i, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]


def visible(text: str) -> str:
    """A token's text as it is shown: a space as `␣`, a line's end `↵`, a tab `⇥`, other unprintable characters by their number.

    Nothing at all is `∅`. U+FFFD stands for itself only where a token really is that character; it is shown as `<U+FFFD>`.
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
    """UTF-8 as text, each byte that is not part of a whole character as `<0x..>`."""
    text = raw.decode("utf-8", errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def _byte_letters() -> dict[str, int]:
    """The letters in which byte-level BPE writes bytes: visible ones as themselves, all others from U+0100 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in own]
    return {**{chr(b): b for b in own}, **{chr(0x100 + i): b for i, b in enumerate(rest)}}


BYTE_OF = _byte_letters()
