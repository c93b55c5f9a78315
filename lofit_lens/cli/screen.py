"""Output of a verb: its tables and lines, and one JSON record for other programs.

Output errors never abort the work: a character that a stream cannot encode is replaced, and a stream that fails (a closed pipe,
`| head`; a full disk) gets no more output, while the work continues.
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
    """A text stream whose writes do not fail; `error` says why it was closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, with `?` for characters that the stream's encoding lacks."""
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError as e:
            self._try(self._stream.write, text.encode(e.encoding, "replace").decode(e.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
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
            # The rest of its buffer would fail again when Python flushes it at exit.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Make stdout and stderr `Lasting` within the block.

    Raises:
        SystemExit: with 1 at the end, if stdout failed for another reason than a closed pipe.
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
    """Print one JSON record on stdout; characters that its encoding lacks are escaped, as JSON does."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(record, indent=2, allow_nan=False)
    print(text)
