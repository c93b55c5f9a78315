"""What a verb says: its tables and lines, and one JSON record for other programs.

Work that is done is never lost to a screen: a character that a stream cannot encode is replaced, and a stream that fails (a
closed pipe, `| head`; a full disk) hears no more, while the work goes on.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

console = Console(highlight=False)


class Lasting:
    """A text stream whose writes do not fail; `error` is why it hears no more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write what the stream's encoding has, with `?` for the rest."""
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError as e:
            self._try(self._stream.write, text.encode(e.encoding, "replace").decode(e.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Callable[..., Any], *args: str) -> None:
        if self.error is not None:
            return
        try:
            call(*args)
        except OSError as e:
            self.error = e
            # What is still in its buffer would fail again when Python flushes it at the end.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Make stdout and stderr `Lasting` for the length of the block.

    Raises:
        SystemExit: with 1 at the end, where stdout failed by more than a reader who went away.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Lasting(stream) for stream in before)
    try:
        yield
    finally:
        out, (sys.stdout, sys.stderr) = sys.stdout, before
        if isinstance(out, Lasting):
            out.flush()
            if out.error is not None and out.error.errno != errno.EPIPE:
                print(
                    f"error: cannot write the output: {out.error.strerror}; files were written as asked",
                    file=sys.stderr,
                )
                raise SystemExit(1)


def print_json(record: Any) -> None:
    """One JSON record on stdout; characters that its encoding lacks are escaped, as JSON does."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(record, indent=2, allow_nan=False)
    print(text)
