"""Width and wrapping of texts. Nothing is drawn, so widths are estimates, rounded up."""

import html
import re

TAG = re.compile(r"</?(?:b|i|sub|sup)>")
# Widths in Arial as shares of the font size, a little rounded up; what is not listed takes the last one.
CLASSES = (("ijl'|", 0.25), (' .,:;!/ft[]I()-r"', 0.32), ("mMW%@", 0.93), ("ABCDEFGHKLNOPQRSTUVXYZ&w+=<>~*", 0.7))
OTHER, WIDE = 0.57, 1.05
LINE = 1.3  # height of a line as a share of the font size, as plotly sets it


def text_width(text: str, size: float) -> float:
    """Return the width of a label's longest line, in the unit of `size`; `<br>` separates lines, markup has no width.

    >>> text_width("ii<br>mm", 10) > text_width("ii", 10)
    True
    """
    return max(sum(map(_width, html.unescape(TAG.sub("", line)))) * size for line in text.split("<br>"))


def plain(text: str) -> str:
    """Return a label without markup.

    >>> plain("<b>a</b><br>1 &lt; 2")
    'a\\n1 < 2'
    """
    return html.unescape(TAG.sub("", text).replace("<br>", "\n"))


def lines_of(text: str) -> int:
    """Return the number of lines of a label.

    >>> lines_of("a<br>b")
    2
    """
    return text.count("<br>") + 1 if text else 0


def wrapped(text: str, width: float, size: float, *, keep: bool = False) -> str:
    """Wrap a text at spaces so that no line is wider, as far as its words allow; `keep` keeps its own line breaks.

    What is in brackets, and `p < 0.05`, stays on one line if it fits.

    >>> wrapped("one two<br>three", 1000, 10)
    'one two three'
    >>> wrapped("one two", 20, 10)
    'one<br>two'
    >>> wrapped("if p < 0.05 [1, 2]", 60, 10)
    'if p < 0.05<br>[1, 2]'
    """
    if keep:
        return "<br>".join(wrapped(line, width, size) for line in text.split("<br>"))
    lines: list[str] = []
    words = re.findall(r"\([^()]*\)\S*|\[[^\[\]]*\]\S*|\w [<=] \S+|\S+", text.replace("<br>", " "))
    for word in (part for w in words for part in ([w] if text_width(w, size) <= width else w.split(" "))):
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return "<br>".join(lines)


def narrowed(label: str, width: float, size: float) -> str:
    """Wrap a tick label at spaces, and if that is not enough, after `/`, `-` and `_` too."""
    label = wrapped(label, width, size, keep=True)
    if text_width(label, size) <= width:
        return label
    lines: list[str] = []
    for line in label.split("<br>"):
        parts = [line] if text_width(line, size) <= width else re.findall(r"[^/_-]*[/_-]|[^/_-]+$", line)
        lines.append("")
        for part in parts:
            if lines[-1] and text_width(lines[-1] + part, size) > width:
                lines.append("")
            lines[-1] += part
    return "<br>".join(lines)


def _width(letter: str) -> float:
    if not letter.isascii():
        return WIDE if ord(letter) > 0x2E80 else 0.7
    return next((width for letters, width in CLASSES if letter in letters), OTHER)
