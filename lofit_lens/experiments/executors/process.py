"""Independent pieces of work on a model, in one process or in several; each runs on one thread.

So a result does not depend on the number of processes: sums over many threads may be added in another order.
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
_refused: dict[tuple[Any, ...], InputError] = {}  # models that cannot be loaded, not to be read again for every cell


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
    """The model of that name, loaded once a process; another one takes its place."""
    how: dict[str, Any] = {
        "backend": backend, "dtype": dtype, "device": device, "revision": revision, "prepend_bos": prepend_bos, "name": name,
    }  # fmt: skip
    key = (name_or_path, *how.values())
    if key in _refused:
        raise _refused[key]
    if key not in _loaded:
        _loaded.clear()
        gc.collect()  # the old model holds itself in circles
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
    """Hold torch to one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def streams_to(path: str | os.PathLike[str]) -> None:
    """Make the end of a file the stdout and stderr of this process, C libraries' too."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)


def prepare_process() -> None:
    """One thread, and no bars and advice from transformers: for a process that does nothing but work on a model."""
    import transformers

    torch.set_num_threads(1)
    logging.getLogger("lofit_lens").setLevel(logging.INFO)  # for the logs of cells
    # tqdm's own lock is a semaphore of the system, which a process that is ended leaves behind.
    tqdm.set_lock(threading.RLock())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
