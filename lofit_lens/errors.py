"""Errors that a user can act on: each says what was received, what is allowed and what to do next.

`InputError` and its children mean "the request cannot be carried out as asked"; the shell turns
them into exit code 2. `TrainingDiverged` means that a run started and went wrong.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value given by the user is not usable; nothing was changed."""


class DataError(InputError):
    """A data file is missing, empty, corrupt or lacks a field; names the file and the row."""


class NewerData(DataError):
    """A file was written by a later version of this library; the installed version must be updated."""


class DiskFull(InputError):
    """A file could not be written because no space is left; existing files are unchanged, and the same command resumes later."""


class ModelError(InputError):
    """The requested class cannot load a model correctly, or the model's heads cannot be reached."""


class AdapterError(InputError):
    """An adapter file is damaged, or does not fit the model it is attached to."""


class TrainingDiverged(RuntimeError):
    """The loss or a gradient became NaN or infinite; the last good state was kept."""


def unknown(kind: str, name: object, allowed: Iterable[object], *, hint: str = "") -> InputError:
    """Build the error for a name outside a closed set, with the nearest allowed name.

    Args:
        kind: what the name stands for, e.g. `"task"`.
        name: what was received.
        allowed: every allowed name, in the order to show.
        hint: an extra sentence on what to do.
    """
    names = [str(a) for a in allowed]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" {hint}" if hint else ""
    return InputError(f"unknown {kind} {str(name)!r}; allowed: {', '.join(names)}.{guess}{tail}")


def no_field(name: str, allowed: Iterable[str]) -> InputError:
    """Build the error for a field that a record does not have, with the nearest one that it does have."""
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return InputError(f"no field {name!r}{guess} Allowed: {', '.join(names) or 'none'}")
