"""Progress of long work: a bar on a terminal and in a notebook, one line every ten seconds in a log.

A bar redraws its line by going back to its beginning; in a log or a file that would be one endless line.
"""

import re
import sys
from typing import Any

from tqdm.auto import tqdm as bar_of

EVERY = 10.0  # seconds between two lines


class _Lines:
    """Where a bar is written that cannot be redrawn: what it shows, a line each; steps of the cursor are left out."""

    encoding = "ascii"

    def write(self, text: str) -> None:
        if line := re.sub(r"\x1b\[A|[\r\n]", "", text).strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def is_live() -> bool:
    """Whether a bar can be redrawn here: in a notebook, or where stderr is a terminal."""
    return any(c.__module__ == "tqdm.notebook" for c in bar_of.__mro__) or sys.stderr.isatty()


def tqdm(*args: Any, **options: Any) -> Any:
    """tqdm's bar with these options; without a terminal, a line every `EVERY` seconds and none for what is done sooner."""
    if is_live():
        return bar_of(*args, **options)
    return bar_of(*args, **options, file=_Lines(), mininterval=EVERY, miniters=0, delay=EVERY)
