"""The view in Jupyter: one anywidget around the front-end that saved pages have, too."""

from collections.abc import Callable
from typing import Any

import anywidget
import traitlets

from lofit_lens.explorer.page import asset, script


class View(anywidget.AnyWidget):
    """The widget.

    Attributes:
        data: what stays as it is; see `page.view_data`.
        state: what the reader chose; both Python and the browser set it.
        said: what Python answers to it.
    """

    _esm = script() + "\nexport default { render };\n"
    _css = asset("explorer.css")
    data = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    said = traitlets.Dict().tag(sync=True)

    def listen(self, chosen: Callable[[Any], None], asked: Callable[[Any], None]) -> None:
        """Call `chosen` with each new state, and `asked` with each message of the browser."""
        self.observe(lambda change: chosen(change["new"]), "state")
        self.on_msg(lambda _, content, buffers: asked(content))

    def put(self, state: dict[str, Any], said: dict[str, Any]) -> None:
        """Show this; only what changed is sent."""
        with self.hold_sync():
            self.said, self.state = said, state
