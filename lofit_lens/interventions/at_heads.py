"""The common part of methods that edit attention heads: chosen heads, and edits at their `hook_z`."""

import html
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_whole, shown
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.heads import Grid, Head, Heads, HeadSet, joint_grid
from lofit_lens.html import first_of, wrapped
from lofit_lens.interventions.base import Adapter, AdapterMeta, Edit
from lofit_lens.interventions.cards import plain, table
from lofit_lens.interventions.files import CONFIG_FILE, check_tensors
from lofit_lens.models import ALL, Positions, device_of, head_size, hook_z, model_info

SHOWN = 10  # heads in a card's table
Some = TypeVar("Some", bound="HeadAdapter")
LARGEST = 10**8  # numbers of all heads' outputs together; known models have a few million at most


class HeadAdapter(Adapter):
    """An adapter of vectors of a head's output size, with one edit per layer, which a sub-class gives in `_edit(layer)`.

    Attributes:
        shape: `(n_layers, n_heads, d_head)`.
        heads: the edited heads, their scores kept.

    Raises:
        InputError: an invalid shape, no head, or a head outside the shape.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        heads: Heads,
        meta: AdapterMeta | None = None,
        positions: str | Positions = ALL,
    ) -> None:
        super().__init__(meta, positions)
        self.shape = check_vectors_shape(shape)
        self.heads = chosen_heads(heads, self.shape[:2], self.title)

    @property
    def d_head(self) -> int:
        """Size of one head's output."""
        return self.shape[2]

    @property
    def k(self) -> int:
        """Number of edited heads."""
        return len(self.heads)

    def places(self) -> tuple[str, str]:
        """Describe the heads with their ranks and scores."""
        scores = self.heads.scores or [None] * self.k
        rows = [
            (str(i + 1), str(head), "not recorded" if score is None else f"{score:.4g}")
            for i, (head, score) in enumerate(zip(self.heads, scores, strict=True))
        ][:SHOWN]
        of = f"{self.k} of {self.shape[0]} x {self.shape[1]} heads (layer and head from 0)"
        shown = f", the first {SHOWN} of them here" if self.k > SHOWN else ""
        score_of = f" Scores: {plain(self.heads.label)}." if self.heads.label and self.heads.scores else ""
        return "Heads", f"{of}{shown}.{score_of}\n\n" + table(("rank", "head", "score"), rows)

    def _settings(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "heads": self.heads.to_dict()}

    def __repr__(self) -> str:
        return wrapped(f"{super().__repr__()[:-1]}: {first_of(self.heads.heads, 8)})")

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.heads._repr_html_()}"

    @classmethod
    def for_model(cls: type[Some], model: Any, heads: Heads | None = None) -> Some:
        """Make the adapter in its initial state, for a model and on its device; `heads=None` takes every head that can be edited.

        Raises:
            InputError: a head outside the model.
            ModelError: heads that cannot be reached at hook_z.
        """
        info = model_info(model)
        grid = info.grid
        chosen = HeadSet.all(grid) if heads is None else chosen_heads(heads, grid, cls.title)
        d_head = head_size(model, None if heads is None else chosen.layers)
        made = cls((info.n_layers, info.n_heads, d_head), chosen, AdapterMeta(model=info, versions=io.environment()))
        return made.to(device_of(model))

    @classmethod
    def _made_from(
        cls: type[Some], record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path
    ) -> Some:
        """Make it with its shape and heads, then set its tensors; a method with further settings has its own."""
        made = cls(*shape_and_heads(record, where), meta)
        check_tensors(tensors, {name: tuple(t.shape) for name, t in made.state_dict().items()}, where)
        made.load_state_dict(tensors)
        return made.requires_grad_(False)

    def affine(self, head: Head) -> tuple[Float[Tensor, " d_head"], Float[Tensor, " d_head"]]:
        """Return scale and shift of one chosen head's edit, `z <- scale * z + shift`, which export can fold into weights.

        Raises:
            AdapterError: the method's edit is not of this form.
        """
        raise AdapterError(
            f"{self.title} does not edit a head's output by a constant scale and shift, as is needed to fold it into attention's "
            "output projection; LoFiT, ITI at all positions and ablations do"
        )

    def _edit(self, layer: int) -> Edit:
        """Return the edit of one layer's z; it is called once, when attached, so the returned function reads the parameters."""
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
    """Return the heads to edit, as a set of a model of `grid` = (n_layers, n_heads).

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
    whole = joint_grid(s for s in (grid, heads.shape) if s)
    # Heads in other layers were named on purpose, e.g. where the size differs: attaching finds out if they can be reached.
    if any(head.layer not in whole.layers for head in heads):
        whole = Grid(whole)
    return HeadSet(heads.heads, heads.scores, whole, heads.label)


def check_vectors_shape(shape: Any) -> tuple[int, int, int]:
    """Return `(n_layers, n_heads, d_head)` as integers.

    Raises:
        InputError: anything else.
    """
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise InputError(f"shape is {shown(shape)}; give (n_layers, n_heads, d_head)")
    check_whole(1, n_layers=shape[0], n_heads=shape[1], d_head=shape[2])
    return (int(shape[0]), int(shape[1]), int(shape[2]))


def shape_and_heads(record: dict[str, Any], where: Path) -> tuple[tuple[int, int, int], HeadSet]:
    """Read shape and heads from an adapter's record.

    Raises:
        AdapterError: an invalid shape.
        DataError: invalid heads.
    """
    shape = tuple(int(n) for n in record["shape"])
    heads = HeadSet.from_dict(record["heads"], where=str(where))
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > LARGEST:
        raise AdapterError(f"{where / CONFIG_FILE}: shape {shape} is not (n_layers, n_heads, d_head) of a model")
    return (shape[0], shape[1], shape[2]), heads
