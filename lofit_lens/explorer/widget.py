"""The view in Jupyter: one anywidget. It shows `data` and `state` and says what the reader does; it decides nothing."""

import importlib.resources
from collections.abc import Callable
from typing import Any

import anywidget
import traitlets


def _asset(name: str) -> str:
    return (importlib.resources.files("lofit_lens.explorer") / name).read_text(encoding="utf-8")


class View(anywidget.AnyWidget):
    """The widget.

    Attributes:
        data: what changes with the shown sets only: shape, scores, ranks, colours.
        state: all the rest.
    """

    _esm = _asset("explorer.js")
    _css = _asset("explorer.css")
    data = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def listen(self, heard: Callable[[Any], None]) -> None:
        """Call `heard` with each message of the browser."""
        self.on_msg(lambda _, content, buffers: heard(content))

    def put(self, data: dict[str, Any], state: dict[str, Any]) -> None:
        """Show this: `data` is sent only if it changed, `state` as a whole."""
        with self.hold_sync():
            self.data, self.state = data, state
