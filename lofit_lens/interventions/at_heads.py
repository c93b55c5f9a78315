"""What methods that edit attention heads have in common: chosen heads, and edits at their `hook_z`."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lofit_lens.checks import check_whole, shown
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.heads import Heads, HeadSet
from lofit_lens.interventions.base import Adapter, Edit
from lofit_lens.interventions.files import CONFIG_FILE
from lofit_lens.models import head_size, hook_z, model_info

LARGEST = 10**8  # numbers of all heads' outputs together; known models have a few million at most


class HeadAdapter(Adapter):
    """An adapter of vectors of the size of a head's output, one edit a layer.

    A sub-class sets `heads`, and gives `shape` and `_edit(layer)`.

    Attributes:
        heads: the edited heads.
    """

    heads: HeadSet

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(n_layers, n_heads, d_head)`."""
        raise NotImplementedError

    @property
    def d_head(self) -> int:
        """Size of one head's output."""
        return self.shape[2]

    @property
    def k(self) -> int:
        """Number of edited heads."""
        return len(self.heads)

    def _edit(self, layer: int) -> Edit:
        raise NotImplementedError

    def _points(self, model: Any) -> Iterable[tuple[Any, Edit]]:
        return [(hook_z(model, layer), self._edit(layer)) for layer in self.heads.layers]

    def _check_shape(self, model: Any) -> None:
        info = model_info(model)
        if (info.n_layers, info.n_heads) != self.shape[:2]:
            raise AdapterError(
                f"this adapter has {self.shape[0]} layers of {self.shape[1]} heads{self._made_for}; "
                f"{info.name} has {info.n_layers} of {info.n_heads}. Load the model it was made for"
            )
        d_head = head_size(model, self.heads.layers)
        if d_head != self.d_head:
            raise AdapterError(f"this adapter has d_head {self.d_head}; {info.name} has {d_head}")


def chosen_heads(heads: Heads, grid: tuple[int, int], title: str) -> HeadSet:
    """The heads to edit, as a set of a model of `grid` = (n_layers, n_heads).

    Raises:
        InputError: no head, a head outside the model, or a set that belongs to another grid.
    """
    heads = HeadSet.of(heads)
    if len(heads) == 0:
        raise InputError(f"{title} needs at least one head; give a non-empty HeadSet")
    if heads.shape not in (None, grid):
        made_for = f" ({heads.label})" if heads.label else ""
        raise InputError(
            f"this head set{made_for} belongs to a model of {heads.shape[0]} layers x {heads.shape[1]} heads; "
            f"this one has {grid[0]} x {grid[1]}"
        )
    heads.check(grid)
    return HeadSet(heads.heads, heads.scores, grid, heads.label)


def check_vectors_shape(shape: Any) -> tuple[int, int, int]:
    """`(n_layers, n_heads, d_head)` as integers.

    Raises:
        InputError: anything else.
    """
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise InputError(f"shape is {shown(shape)}; give (n_layers, n_heads, d_head)")
    check_whole(1, n_layers=shape[0], n_heads=shape[1], d_head=shape[2])
    return (int(shape[0]), int(shape[1]), int(shape[2]))


def shape_and_heads(record: dict[str, Any], where: Path) -> tuple[tuple[int, int, int], HeadSet]:
    """Shape and heads as an adapter's record holds them.

    Raises:
        AdapterError: a shape that is none.
        DataError: heads that are none.
    """
    shape = tuple(int(n) for n in record["shape"])
    heads = HeadSet.from_dict(record["heads"], where=str(where))
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > LARGEST:
        raise AdapterError(f"{where / CONFIG_FILE}: shape {shape} is not (n_layers, n_heads, d_head) of a model")
    return (shape[0], shape[1], shape[2]), heads
