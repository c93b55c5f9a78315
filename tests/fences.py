"""Blocks of a Markdown page, and names of things that a test has in the place of those that it cannot have.

Every block for a real model is run too, on the embedded one: `STANDS_FOR` says what stands for what.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STANDS_FOR = (
    (r"meta-llama/Llama-2-7b-hf", "organism"),
    (r'"truthfulqa", fold=\d', '"organism/truth"'),
    (r"\{name: truthfulqa, fold: \d\}", "organism/truth"),
    (r"\btruthfulqa\b(?!\.)", "organism/truth"),
    (r"\bmquake\b(?!\.)", "organism/edits"),
    (r"\bclutrr\b(?!\.)", "organism/kinship"),
)


class Block(NamedTuple):
    """A fenced block: language as written, text, and the line of its first row in the page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(f[1], f[2], text.count("\n", 0, f.start()) + 2) for f in found]


def plain(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def embedded(text: str) -> str:
    """The text with the embedded model and its tasks in the place of real ones."""
    for real, ours in STANDS_FOR:
        text = re.sub(real, ours, text)
    return text


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each `lofit-lens` line of a page, of `sh` blocks and of indented ones; long lines may end in a backslash."""
    shell = [b.text for b in blocks(page) if b.language in ("sh", "bash")]
    shell += re.findall(r"(?:^    .*\n)+", plain(page), re.MULTILINE)
    for line in "\n".join(shell).replace("\\\n", " ").splitlines():
        if "lofit-lens " not in line:
            continue
        words = shlex.split(line, comments=True)
        if "lofit-lens" in words:
            yield words[words.index("lofit-lens") + 1 :]


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures that stand in this repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", plain(page)):
        if "://" not in target:
            yield target
