"""The methods that are compared, one file each: every module of this folder that holds a `METHOD`.

Methods from outside the library are added with `register`, by passing them to `compare_methods`, `tune_method` or a grid's `Run`,
or in a file that a grid names (`use_file`).
"""

import importlib
import pkgutil
import sys
from pathlib import Path

from lofit_lens import io
from lofit_lens.errors import DataError, InputError, unknown
from lofit_lens.experiments.methods.base import Fit, Method, Outline, Workbench

__all__ = ["METHODS", "Fit", "Method", "Outline", "Workbench", "method_of", "register", "use_file"]


def _own() -> list[Method]:
    found = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return sorted((m.METHOD for m in found if hasattr(m, "METHOD")), key=lambda m: (m.place, m.name))


METHODS: dict[str, Method] = {method.name: method for method in _own()}
_LIBRARY = tuple(METHODS)
_read: dict[str, str] = {}  # file -> digest of what was imported from it
USED: dict[str, str] = {}  # name of a module -> its file, of `use_file`


def register(method: Method) -> Method:
    """Register a method by its name; one of the same name from outside the library is replaced.

    Raises:
        InputError: the library has a method of that name.
    """
    if method.name in _LIBRARY and METHODS[method.name] is not method:
        raise InputError(f"the library already has a method {method.name!r}; give yours another name")
    METHODS[method.name] = method
    return method


def use_file(path: str | Path) -> None:
    """Import your own Python file; every `Method` in it is registered, and so are the selectors that it registers.

    Worker processes of grids import it too, so it must be where all of them see it.

    Raises:
        DataError: no such file.
        InputError: another module has its name, or the library has a method of that name.
    """
    path = Path(path).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise DataError(f"{path} is not a Python file; give the path of one")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    digest, there = io.file_digest(path), path.stem in sys.modules
    module = importlib.import_module(path.stem)
    if there and _read.get(str(path), digest) != digest:
        raise InputError(
            f"{path} has changed since this process imported it; restart Python, so that its new code runs"
        )
    if Path(module.__file__ or "").resolve() != path:
        raise InputError(f"{path} is hidden by another module of its name, {module.__file__}; rename it")
    USED[path.stem], _read[str(path)] = str(path), digest
    for value in vars(module).values():
        if isinstance(value, Method):
            register(value)


def method_of(method: str | Method) -> Method:
    """A method by its name, or your own, which is registered.

    Raises:
        InputError: no such method.
    """
    if isinstance(method, Method):
        return register(method)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]
