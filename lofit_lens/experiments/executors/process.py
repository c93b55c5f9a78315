"""Independent pieces of work on a model, in one process or in several; each runs on one thread.

So results do not depend on the number of processes: with many threads, sums may be added in another order.
"""

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from lofit_lens.errors import InputError
from lofit_lens.models import load_model

_loaded: dict[tuple[Any, ...], Any] = {}
_refused: dict[tuple[Any, ...], InputError] = {}  # models that cannot be loaded, so that not every cell tries again


def kept_model(
    name_or_path: str,
    *,
    backend: str = "auto",
    dtype: str = "float32",
    device: str | None = "cpu",
    revision: str | None = None,
    prepend_bos: bool | None = None,
    name: str | None = None,
) -> Any:
    """The model of that name, loaded once per process; another model replaces it."""
    how: dict[str, Any] = {
        "backend": backend, "dtype": dtype, "device": device, "revision": revision, "prepend_bos": prepend_bos, "name": name,
    }  # fmt: skip
    key = (name_or_path, *how.values())
    if key in _refused:
        raise _refused[key]
    if key not in _loaded:
        _loaded.clear()
        gc.collect()  # the old model is part of reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            _loaded[key] = load_model(name_or_path, **how)
        except InputError as e:
            _refused[key] = e
            raise
    return _loaded[key]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def streams_to(path: str | os.PathLike[str]) -> None:
    """Append stdout and stderr of this process, including those of C libraries, to a file."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)


def prepare_process() -> None:
    """Use one thread, and silence transformers' bars and advice: for a process that only works on a model."""
    import transformers

    torch.set_num_threads(1)
    logging.getLogger("lofit_lens").setLevel(logging.INFO)  # for the logs of cells
    # tqdm's own lock is a system semaphore, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
