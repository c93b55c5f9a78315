"""Digest of a user's code. A run is named by everything that can change its result, which includes such code.

The compiled code is digested, not the text of its file: the file may have changed since this process imported it.
"""

import dis
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import InputError

_DESCRIBED = (types.FunctionType, classmethod, staticmethod, property)  # members treated as functions
_INSTALLED = tuple({Path(sysconfig.get_paths()[part]).resolve() for part in ("stdlib", "purelib", "platlib")})


def digest_of(code: Iterable[Any], what: str) -> str:
    """Digest of functions and classes and of everything that they refer to by name, except for installed packages.

    Comments do not count; bytecode does, so another Python version gives another digest.

    Args:
        code: functions and classes.
        what: their owner, for error messages.

    Returns:
        16 hexadecimal digits.

    Raises:
        InputError: not a function or class, or an outer value that it uses is not plain data (named).
    """
    reader = _Reader(what)
    for one in code:
        if not isinstance(one, types.FunctionType | type):
            raise InputError(f"{what} is {one!r}, but a run is named by its code; give a function (def) or a class")
        reader.read(one, getattr(one, "__qualname__", repr(one)))
    return io.digest(reader.found)[:16]


def in_library(code: Any) -> bool:
    """Whether a function or class belongs to the library, whose version is already part of a run's name."""
    return getattr(code, "__module__", "").startswith("lofit_lens.")


class _Reader:
    """Walks through code and notes each piece once, in the order in which it is referred to."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: list[Any] = []
        self._seen: set[int] = set()

    def read(self, value: Any, name: str) -> None:
        if isinstance(value, types.ModuleType):
            self.found.append([name, _bytes_of(value)])
        elif isinstance(value, types.FunctionType | type):
            if _is_installed(value.__module__):
                self.found.append([name, f"{value.__module__}.{value.__qualname__}"])
            elif id(value) not in self._seen:
                self._seen.add(id(value))
                self._read_code(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self.found.append([name, f"{value.__module__}.{value.__qualname__}"])
        else:
            self.found.append([name, self._plain(value, name)])

    def _read_code(self, value: Any) -> None:
        functions = [value] if isinstance(value, types.FunctionType) else list(_functions(value))
        if isinstance(value, type):
            self._read_class(value)
        for function in functions:
            self.found.append([function.__qualname__, _compiled(function.__code__)])
            for given in (function.__defaults__, function.__kwdefaults__):
                self.found.append([function.__qualname__, self._plain(given, f"a default of {function.__qualname__}")])
            for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if free != "__class__":
                    self.read(cell.cell_contents, free)
            for used in _names(function.__code__):
                if used in function.__globals__:
                    self.read(function.__globals__[used], used)

    def _read_class(self, cls: type) -> None:
        for base in cls.__bases__:
            self.read(base, base.__qualname__)
        for name, member in vars(cls).items():
            if not name.startswith("__") and not isinstance(member, _DESCRIBED):
                self.found.append([f"{cls.__qualname__}.{name}", self._plain(member, f"{cls.__qualname__}.{name}")])

    def _plain(self, value: Any, name: str) -> Any:
        """The value, if it is plain data that can be written down."""
        try:
            return io.canonical_json(dict(value) if isinstance(value, Mapping) else value)
        except (TypeError, ValueError) as e:
            raise InputError(
                f"{self.what} takes {name!r} from around it, a {type(value).__name__}: a run is named by all that can change it, "
                "and this cannot be written down. Make it a number, a text or a function, or make it inside"
            ) from e


def _compiled(code: types.CodeType) -> list[Any]:
    """What code does, without line numbers and file name."""
    return [
        code.co_code.hex(),
        code.co_exceptiontable.hex(),
        code.co_names,
        code.co_varnames,
        *map(_constant, code.co_consts),
    ]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _compiled(value)
    if isinstance(value, tuple):
        return [_constant(part) for part in value]
    # The order of a set of texts differs between processes.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _functions(cls: type) -> Iterator[types.FunctionType]:
    for member in vars(cls).values():
        inner = getattr(member, "__func__", getattr(member, "fget", member))
        if isinstance(inner, types.FunctionType):
            yield inner


def _names(code: types.CodeType) -> Iterator[str]:
    """Global names that code reads, including those in nested functions but not names of attributes."""
    yield from (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_installed(module: str) -> bool:
    """Whether a module belongs to the library or an installed package, whose versions are already part of a run's name."""
    if module.split(".")[0] == "lofit_lens" or module == "builtins":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and any(Path(file).resolve().is_relative_to(folder) for folder in _INSTALLED)


def _bytes_of(module: types.ModuleType) -> str:
    """A module's name, with a digest of its file if it is the user's own."""
    file = getattr(module, "__file__", None)
    if file is None or _is_installed(module.__name__):
        return module.__name__
    return f"{module.__name__}:{io.file_digest(Path(file))[:16]}"
