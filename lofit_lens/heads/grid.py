"""The layers and heads of a model, and which of its layers have heads at all.

In some models only a few layers use softmax attention (Qwen3-Next, LFM2, Jamba, ...). Only these have heads to choose from, and
chance levels must count only these.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lofit_lens.checks import check_whole, shown
from lofit_lens.errors import InputError


class Grid(tuple[int, int]):
    """`(n_layers, n_heads)`, and the layers whose heads can be edited.

    Args:
        shape: the pair.
        layers: those with heads; None = all.

    Raises:
        InputError: not a pair of whole numbers above 0, or a layer outside the model.

    Examples:
        >>> grid = Grid((16, 32), layers=[2, 5, 8])
        >>> grid == (16, 32), grid.n_total
        (True, 96)
    """

    head_layers: tuple[int, ...] | None

    def __new__(cls, shape: Iterable[int], layers: Iterable[int] | None = None) -> "Grid":
        pair = tuple(shape)
        if len(pair) != 2:
            raise InputError(f"shape is {shown(pair)}; give (n_layers, n_heads)")
        check_whole(1, n_layers=pair[0], n_heads=pair[1])
        made = super().__new__(cls, (int(pair[0]), int(pair[1])))
        made.head_layers = None
        if layers is not None:
            listed = tuple(sorted({int(layer) for layer in layers}))
            for layer in listed:
                check_whole(0, made[0] - 1, layer=layer)
            made.head_layers = None if len(listed) == made[0] else listed
        return made

    def __getnewargs__(self) -> Any:
        return tuple(self), self.head_layers

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with heads, ascending."""
        return tuple(range(self[0])) if self.head_layers is None else self.head_layers

    @property
    def n_total(self) -> int:
        """Number of heads that can be edited."""
        return len(self.layers) * self[1]


def check_shape(shape: Any) -> Grid:
    """Return a pair (n_layers, n_heads) as a `Grid`.

    Raises:
        InputError: anything else.
    """
    if isinstance(shape, Grid):
        return shape
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise InputError(f"shape is {shown(shape)}; give (n_layers, n_heads)")
    return Grid(shape)


def joint_grid(shapes: Iterable[tuple[int, int]]) -> Grid:
    """Return one of several equal shapes: one that says which layers have heads, if any does."""
    grids = [check_shape(shape) for shape in shapes]
    return next((grid for grid in grids if grid.head_layers is not None), grids[0])


def layers_of(layers: Any) -> list[int]:
    """Return layers as a list of integers.

    Raises:
        InputError: anything but whole numbers from 0.
    """
    if not isinstance(layers, Iterable) or isinstance(layers, str | bytes | Mapping):
        raise InputError(f"layers is {shown(layers)}; give a list of layers, e.g. [0, 1]")
    listed = list(layers)
    for layer in listed:
        check_whole(0, layer=layer)
    return listed
