"""The common part of methods that edit the residual stream: chosen layers, and one edit at a site of each."""

from collections.abc import Iterable
from typing import Any, ClassVar

from lofit_lens.checks import check_whole
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.heads import layers_of
from lofit_lens.interventions.base import Adapter, AdapterMeta, Edit
from lofit_lens.models import ALL, Positions, Site, check_residual, model_info, residual_point


class ResidualAdapter(Adapter):
    """An adapter of vectors of the residual stream's width, with one edit per layer.

    A sub-class sets `site`, and gives `_edit(layer)`.

    Attributes:
        n_layers: layers of the model.
        d_model: width of its residual stream.
        layers: the edited layers, ascending.

    Raises:
        InputError: no layer, or a layer outside the model or given twice.
    """

    site: ClassVar[Site]

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        layers: Iterable[int] | None,
        meta: AdapterMeta | None = None,
        positions: str | Positions = ALL,
    ) -> None:
        super().__init__(meta, positions)
        self.n_layers, self.d_model, self.layers = n_layers, d_model, chosen_layers(layers, n_layers)

    def places(self) -> tuple[str, str]:
        """Describe site and layers."""
        of = f"(of {self.n_layers}, from 0), width {self.d_model}."
        return "Where it acts", f"`{self.site}` of the layers {' '.join(map(str, self.layers))} {of}"

    def _settings(self) -> dict[str, Any]:
        return {"n_layers": self.n_layers, "d_model": self.d_model, "layers": list(self.layers)}

    def _edit(self, layer: int) -> Edit:
        raise NotImplementedError

    def _points(self, model: Any) -> Iterable[tuple[Any, Edit]]:
        return [(residual_point(model, layer, self.site), self._edit(layer)) for layer in self.layers]

    def _check_shape(self, model: Any) -> None:
        info = model_info(model)
        if (info.n_layers, info.d_model) != (self.n_layers, self.d_model):
            raise AdapterError(
                f"this adapter is for {self.n_layers} layers of width {self.d_model}{self._made_for}; {info.name} has "
                f"{info.n_layers} of {info.d_model}. Load the model it was made for"
            )
        if self.meta.model is not None and self.meta.model.processed != info.processed:
            raise AdapterError(
                f"{info.name} was loaded {'with' if info.processed else 'without'} weight processing and this adapter was made "
                f"{'with' if self.meta.model.processed else 'without'} it{self._made_for}: processing shifts the residual "
                "stream, so the same numbers mean another edit. Load the model the same way (lofit_lens.load_model: without)"
            )
        check_residual(model, self.layers, self.site)


def chosen_layers(layers: Iterable[int] | None, n_layers: int) -> tuple[int, ...]:
    """Return the layers to edit, ascending; None = all.

    Raises:
        InputError: no layer, or a layer outside the model or given twice.
    """
    check_whole(1, n_layers=n_layers)
    listed = list(range(n_layers)) if layers is None else sorted(layers_of(layers))
    if not listed:
        raise InputError(f"no layer to edit; give some of 0 to {n_layers - 1}, or None for all")
    if listed[0] < 0 or listed[-1] >= n_layers or len(set(listed)) < len(listed):
        raise InputError(f"layers {listed} cannot be edited; give each once, from 0 to {n_layers - 1}")
    return tuple(listed)
