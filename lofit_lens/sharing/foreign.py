"""What all formats of other tools have in common: JSON that is checked number by number, and nothing pickled."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import DataError, InputError

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
MAGIC = (b"\x80", b"PK\x03\x04", b"\x93NUMPY")  # how pickles, torch's archives of them, and numpy's files begin


def read_object(file: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` says for messages what it ought to be.

    Raises:
        DataError: no such file, a pickle or an archive (never opened), not JSON, no object, a key twice, or a number that is not
            finite.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"no file {path}; give {what}")
    with path.open("rb") as f:
        start = f.read(8)
    if path.suffix.lower() in PICKLED or start.startswith(MAGIC):
        raise DataError(
            f"{path} is not JSON but a pickle or an archive, which may hold code and is never opened here; load it where "
            f"you trust it, and save {what}"
        )
    try:
        return io.read_record(path)
    except DataError as e:
        raise DataError(f"{e}; expected {what}") from e


def write_object(file: str | Path, record: Any, *, overwrite: bool) -> Path:
    """Write JSON on one line, whole or not at all; every float32 in it is read back bit by bit.

    Raises:
        InputError: the file exists (and not `overwrite`), or cannot be written.
    """
    path = Path(file)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another name, or overwrite it (overwrite=True, --overwrite)")
    return io.write_text(path, json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")


def numbers(values: Any, shape: Sequence[int], where: str) -> Float[Tensor, "..."]:
    """Lists, an array or a tensor as a float32 tensor on the CPU.

    Raises:
        DataError: another shape, something that is no number, or one that is not finite in float32.
    """
    try:
        found = np.asarray(values.detach().float().cpu() if isinstance(values, Tensor) else values)
    except (OverflowError, TypeError, ValueError) as e:  # lists of several lengths, for instance
        raise DataError(f"{where} is no table of numbers of shape {list(shape)}") from e
    if found.shape != tuple(shape) or found.dtype.kind not in "fiu":
        raise DataError(
            f"{where} has shape {list(found.shape)} and type {found.dtype}; expected numbers of shape {list(shape)}"
        )
    with np.errstate(over="ignore"):
        made = torch.from_numpy(found.astype(np.float32))
    if not torch.isfinite(made).all():
        raise DataError(f"{where} holds NaN, infinity or a number too large for float32")
    return made


def whole(value: Any, where: str) -> int:
    """A whole number of 0 or above, of Python or numpy.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise DataError(f"{where} is {value!r}; expected a whole number of 0 or above")
    return int(value)
