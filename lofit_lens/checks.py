"""Checks of user input, each called in one line by the function that takes the input."""

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lofit_lens.errors import DataError, InputError, unknown

LARGEST_SEED = 2**32 - 1  # the largest that numpy and scikit-learn accept


def optional(module: str, what: str, extra: str) -> Any:
    """Import a module of an optional package, which one of lofit-lens' extras installs.

    Raises:
        InputError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise InputError(f'{what} is not installed ({e}): pip install "lofit-lens[{extra}]"') from e


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None, so that optional arguments can be checked."""
    return {name: value for name, value in values.items() if value is not None}


def check_whole(least: int, most: int | None = None, /, **values: Any) -> None:
    """Raise InputError unless each value is a whole number of at least `least` and at most `most`."""
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            allowed = f"{least} or more" if most is None else f"{least} to {most}"
            raise InputError(f"{name} is {value!r}; give {'' if whole else 'a whole number, '}{allowed}")


def check_seed(seed: Any) -> None:
    """Raise InputError unless every generator accepts the seed. None is refused: each run would draw different numbers."""
    check_whole(0, LARGEST_SEED, seed=seed)
    if isinstance(seed, np.integer):
        raise InputError(
            f"seed is {seed!r}, a numpy number, which some generators and all files refuse; give int(seed)"
        )


def check_number(**values: Any) -> None:
    """Raise InputError unless each value is a finite number."""
    for name, value in values.items():
        if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{name} is {value!r}; give a finite number")


def check_share(name: str, value: Any) -> None:
    """Raise InputError unless 0 < value < 1."""
    if not isinstance(value, int | float | np.number) or not 0 < value < 1:
        raise InputError(f"{name} is {value!r}; allowed: between 0 and 1, both excluded")


def check_is(value: Any, kind: type | tuple[type, ...], name: str, want: str) -> None:
    """Raise InputError unless a value is of a class; `want` says what to give."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is {shown(value)}; give {want}")


def check_one_of(kind: str, value: Any, allowed: Iterable[str], *, hint: str = "") -> None:
    """Raise InputError unless a value is one of the allowed names."""
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise unknown(kind, value, names, hint=hint)


def texts_of(name: str, texts: Any) -> list[str]:
    """Return a list of texts; a single text becomes a list of one.

    Raises:
        InputError: anything but texts.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
        raise InputError(f"{name} is {shown(texts)}; give a list of texts")
    listed = list(texts)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise InputError(f"{name} holds {shown(text)} at index {i}; give a list of texts")
    return listed


def records_of(where: str, rows: Any) -> list[Any]:
    """Return rows as a list; a pandas table gives its rows.

    Raises:
        DataError: not a list of rows.
    """
    if hasattr(rows, "to_dict"):  # iterating over a table gives its column names
        rows = rows.to_dict("records")
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"{where}: {shown(rows)} is not a list of records; give e.g. [{{'prompt': ..., 'answer': ...}}]"
        )
    return list(rows)


def shown(value: Any) -> str:
    """Show a value in an error message: a short one as written, any other by its class."""
    simple = isinstance(value, str | bytes | int | float | complex | tuple | list | dict | set) or value is None
    written = repr(value) if simple else ""
    if 0 < len(written) <= 60:
        return written
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
