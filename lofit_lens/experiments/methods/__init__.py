"""The methods that are compared, one file each. A module of this folder that holds a `METHOD` is one of them.

Methods from outside the library join with `register`, or by being handed to `compare_methods`, `tune_method` or `run_grid`.
"""

import importlib
import pkgutil

from lofit_lens.errors import InputError, unknown
from lofit_lens.experiments.methods.base import Fit, Method, Outline, Workbench

__all__ = ["METHODS", "Fit", "Method", "Outline", "Workbench", "method_of", "register"]


def _own() -> list[Method]:
    found = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return sorted((m.METHOD for m in found if hasattr(m, "METHOD")), key=lambda m: (m.place, m.name))


METHODS: dict[str, Method] = {method.name: method for method in _own()}
_LIBRARY = tuple(METHODS)


def register(method: Method) -> Method:
    """Make a method known by its name; one of the same name from outside the library is replaced.

    Raises:
        InputError: the library has a method of that name.
    """
    if method.name in _LIBRARY and METHODS[method.name] is not method:
        raise InputError(f"the library has a method {method.name!r} already; give yours another name")
    METHODS[method.name] = method
    return method


def method_of(method: str | Method) -> Method:
    """A method by its name, or one's own, which is made known.

    Raises:
        InputError: no such method.
    """
    if isinstance(method, Method):
        return register(method)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]
