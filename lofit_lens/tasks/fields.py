"""Fields of a row as it was read: they are checked, and errors say where the invalid row is."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import DataError

Row = tuple[str, Any]  # its place ("file:line"), and its fields


def check_options(where: str, options: Sequence[str]) -> None:
    """Check that there are at least two options, none empty and none given twice.

    Raises:
        DataError: names row and option.
    """
    if len(options) < 2:
        raise DataError(f"{where}: {len(options)} option(s) {list(options)}; a choice needs two or more")
    for i, option in enumerate(options):
        if not option.strip():
            raise DataError(f"{where}: option {i + 1} is empty")
        if option in options[:i]:
            raise DataError(f"{where}: option {option!r} is given twice; remove one")


def texts(where: str, row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field that holds a list of texts; empty if it is missing or null.

    Raises:
        DataError: it holds something else; names row and field.
    """
    found = row.get(name)
    if found is None:
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(t, str) for t in found):
        raise DataError(f"{where}: field {name!r} must be a list of texts, got {found!r}")
    for text in found:
        _whole(where, name, text)
    return tuple(found)


def one_or_more(where: str, row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A field that holds a text, or a list of one or more different texts.

    Raises:
        DataError: it is missing, or holds something else, an empty text or a text twice; names row and field.
    """
    if not isinstance(row.get(name), list | tuple):
        return fields(where, row, name)
    found = texts(where, row, name)
    if not found:
        raise DataError(f"{where}: field {name!r} is an empty list; give at least one text")
    for i, text in enumerate(found):
        if not text.strip() or text in found[:i]:
            raise DataError(f"{where}: field {name!r} holds {text!r}{' twice' if text.strip() else ''}; remove it")
    return found


def _whole(where: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"{where}: field {name!r} has half a character ({text[e.start]!r} at {e.start}); write the text again as UTF-8"
        ) from e


def fields(where: str, row: Any, *names: str) -> tuple[str, ...]:
    """The text fields of a row.

    Raises:
        DataError: the row is not a record or lacks a field, or a field is empty or not text; names file, row and field.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a record with {', '.join(names)}, got {type(row).__name__}")
    for name in names:
        if name not in row:
            raise DataError(
                f"{where}: no field {name!r}; a row needs {', '.join(names)} and has {', '.join(map(str, row))}"
            )
        if row[name] is None:
            raise DataError(f"{where}: field {name!r} is null; it must be non-empty text")
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(f"{where}: field {name!r} is {row[name]!r}; it must be non-empty text")
        _whole(where, name, row[name])
    return tuple(row[name] for name in names)


def file_hashes(paths: Mapping[str, Path]) -> dict[str, str]:
    """Split -> SHA-256 of its file's bytes."""
    return {split: io.file_digest(path) for split, path in paths.items()}


def repeated(prompts: Sequence[str], tested: Iterable[str]) -> frozenset[int]:
    """Indices of training prompts that a test item repeats."""
    asked = set(tested)
    return frozenset(i for i, prompt in enumerate(prompts) if prompt in asked)
