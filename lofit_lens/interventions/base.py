"""What every method has in common: it can be attached, counted and saved."""

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.models import (
    ALL,
    Layout,
    ModelInfo,
    Positions,
    Site,
    check_residual,
    declared,
    device_of,
    hooked,
    layout_of,
    model_info,
    residual_point,
    same_weights,
)

logger = logging.getLogger(__name__)

SCHEMA = 1
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

Some = TypeVar("Some", bound="Adapter")
Edit = Callable[[Tensor], Tensor]  # values at a HookPoint -> the same shape


@runtime_checkable
class Intervention(Protocol):
    """A change to a frozen model's forward pass (LoFiT, ITI, RepE, RED, LoReFT, LoRA).

    A trained one is also an `nn.Module`, whose `parameters()` the training loop updates.
    """

    @property
    def n_parameters(self) -> int:
        """Numbers that the method adds to the model and that it learns or estimates."""
        ...

    def attached(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Put the change in place for a `with` block and take it away afterwards, also after an exception."""
        ...

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write an adapter folder."""
        ...


@contextlib.contextmanager
def attached(model: Any, *interventions: Intervention) -> Iterator[None]:
    """Attach several interventions, applied in the order given; all are removed at the end."""
    with contextlib.ExitStack() as stack:
        for one in interventions:
            stack.enter_context(one.attached(model))
        yield


@dataclass
class AdapterMeta:
    """Where an adapter comes from: base model, task, seed, hyperparameters, versions, training history."""

    model: ModelInfo | None = None
    task: str = ""
    data_hash: str = ""
    seed: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    n_train: int | None = None


class Adapter(nn.Module):
    """An intervention by hooks: what it edits, how it is attached and saved. One sub-class a method.

    A sub-class names its `method` and `title`, says what it edits in `_points`, checks a model's shape in `_check_shape`, and
    gives its numbers and settings to files in `_tensors` and `_settings`, read back by `_made_from`.

    Attributes:
        meta: provenance.
        positions: where it acts.
    """

    method: ClassVar[str]  # in files
    title: ClassVar[str]  # in tables and messages
    meta: AdapterMeta
    positions: Positions

    def __init__(self, meta: AdapterMeta | None = None, positions: str | Positions = ALL) -> None:
        super().__init__()
        self.meta = meta or AdapterMeta()
        self.positions = Positions.parse(positions)

    # ------------------------------------------------------------------------------- to be given by each method

    @property
    def n_parameters(self) -> int:
        """Numbers that the method adds to the model and that it learns or estimates."""
        raise NotImplementedError

    def _points(self, model: Any) -> Iterable[tuple[Any, Edit]]:
        """HookPoints and the edit of each. An edit keeps nothing between calls and returns its input's dtype."""
        raise NotImplementedError

    def _check_shape(self, model: Any) -> None:
        """Raise AdapterError (wrong shape) or ModelError (no such place) unless this adapter fits this model."""
        raise NotImplementedError

    def _tensors(self) -> Mapping[str, Tensor]:
        """What the safetensors file holds."""
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """What the JSON file holds beside the provenance; JSON-able."""
        raise NotImplementedError

    @classmethod
    def _made_from(
        cls: type[Some], record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path
    ) -> Some:
        """The adapter of a record and its tensors; KeyError, TypeError and ValueError are reported as an incomplete file."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------- attaching

    @contextlib.contextmanager
    def attached(self: Some, model: Any) -> Iterator[Some]:
        """Edit this model's activations for the length of the block; removed at its end, also after an exception.

        The hooks are permanent in TransformerLens' sense: `run_with_hooks`, `run_with_cache` and
        `reset_hooks()` inside the block keep them, and other people's hooks are never touched.

        Raises:
            AdapterError: made for another shape, or already attached.
        """
        with self.reserved(model), self._in_place(model):
            yield self

    @contextlib.contextmanager
    def reserved(self, model: Any) -> Iterator[None]:
        """Count as attached for the length of the block, without an edit in place.

        Raises:
            AdapterError: made for another shape, or already attached.
        """
        self.attach_check(model)
        _attached.add(self)
        try:
            with declared(model, self.positions):
                yield
        finally:
            _attached.discard(self)

    @contextlib.contextmanager
    def _in_place(self, model: Any) -> Iterator[None]:
        """Hold the edit for the length of the block; by hooks, unless a method has another way."""
        with contextlib.ExitStack() as stack:
            for point, edit in self._points(model):
                stack.enter_context(hooked(point, self._hook(model, edit)))
            yield

    def attach_check(self, model: Any) -> None:
        """Raise unless this adapter fits this model; warns of another base model's name."""
        info = model_info(model)
        if self in _attached:
            raise AdapterError("this adapter is already attached; leave its `with` block first, or attach a copy")
        self._check_shape(model)
        made_for = self.meta.model
        if made_for and not same_weights(made_for, info):
            logger.warning("this adapter was made for %s; it is now attached to %s", made_for.name, info.name)

    @property
    def _made_for(self) -> str:
        return f" (made for {self.meta.model.name})" if self.meta.model else ""

    def _hook(self, model: Any, edit: Edit) -> Any:
        # Neither hook keeps anything between calls: a tensor made in inference mode would poison later training.
        if self.positions.everywhere:
            return lambda x, hook: edit(x)

        def at_positions(x: Tensor, hook: Any) -> Tensor:
            layout = layout_of(model, x.shape[0], x.shape[1], x.device)
            if not self.positions.acts(layout):
                return x
            keep = self._edited(layout).to(x.device)
            return torch.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), edit(x), x)

        return at_positions

    def _edited(self, layout: Layout) -> Tensor:
        return self.positions.mask(layout)

    # ------------------------------------------------------------------------------------------------- saving

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            InputError: the folder exists (and not `overwrite`) or cannot be written.
        """
        meta = self.meta
        record = {
            "lofit_lens_schema": SCHEMA,
            "method": self.method,
            "base_model": meta.model.to_dict() if meta.model else None,
            **self._settings(),
            "positions": str(self.positions),
            "task": meta.task, "data_hash": meta.data_hash, "n_train": meta.n_train, "seed": meta.seed,
            "config": meta.config, "versions": meta.versions or io.environment(), "history": meta.history,
        }  # fmt: skip
        with io.new_folder(folder, overwrite=overwrite) as temporary:
            io.save_tensors(temporary / WEIGHTS_FILE, self._tensors(), {"format": "pt"})
            io.write_json(temporary / CONFIG_FILE, record)
        return Path(folder)

    @classmethod
    def from_pretrained(cls: type[Some], folder: str | Path, *, model: Any = None) -> Some:
        """Read an adapter folder; with `model`, check that it fits and put it on the model's device.

        Raises:
            AdapterError: a file missing, damaged, of another method or a newer schema, or tensors that do not match the
                settings; or (with `model`) another shape.
        """
        folder = Path(folder)
        record = read_config(folder)
        where = folder / CONFIG_FILE
        if record.get("method") != cls.method:
            raise AdapterError(
                f"{where} does not describe a {cls.title} adapter: its method is {record.get('method')!r}"
            )
        tensors = io.load_tensors(folder / WEIGHTS_FILE)
        for name, t in tensors.items():
            if not torch.isfinite(t).all():
                raise AdapterError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity")
        try:
            base = ModelInfo(**record["base_model"]) if record["base_model"] else None
            meta = AdapterMeta(
                base, record["task"], record["data_hash"], record["seed"], record["config"], record["versions"],
                record["history"], record["n_train"],
            )  # fmt: skip
            made = cls._made_from(record, tensors, meta, folder)
        except AdapterError:
            raise
        except (KeyError, TypeError, ValueError) as e:
            raise AdapterError(f"{where} is incomplete: {e}") from e
        if model is not None:
            made.attach_check(model)
            made.to(device_of(model))
        return made


class ResidualAdapter(Adapter):
    """An adapter of vectors of the residual stream's width, one edit a layer.

    A sub-class sets `site` and `d_model`, and gives `_edit(layer)`.

    Attributes:
        layers: the edited layers, ascending.
        n_layers: layers of the model.
    """

    site: ClassVar[Site]
    layers: tuple[int, ...]
    n_layers: int
    d_model: int

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
                "stream, so that the same numbers mean another edit. Load the model the same way (lofit_lens.load_model: without)"
            )
        check_residual(model, self.layers, self.site)


def chosen_layers(layers: Iterable[int] | None, n_layers: int) -> tuple[int, ...]:
    """Layers to edit, ascending; None = all.

    Raises:
        InputError: a layer outside the model, given twice, or none at all.
    """
    listed = list(range(n_layers)) if layers is None else sorted(layers)
    if not listed:
        raise InputError(f"no layer to edit; give some of 0 to {n_layers - 1}, or None for all")
    if listed[0] < 0 or listed[-1] >= n_layers or len(set(listed)) < len(listed):
        raise InputError(f"layers {listed} cannot be edited; give each once, of 0 to {n_layers - 1}")
    return tuple(listed)


def at_other_positions(adapter: Some, positions: str | Positions) -> Some:
    """A copy of an adapter that acts on other positions.

    Raises:
        InputError: unknown positions.
    """
    made = copy.deepcopy(adapter)
    made.positions = Positions.parse(positions)
    return made


def read_config(folder: str | Path) -> dict[str, Any]:
    """The record of an adapter folder.

    Raises:
        AdapterError: no such file, damaged, or of a newer schema.
    """
    where = Path(folder) / CONFIG_FILE
    if not where.is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}")
    try:
        record = io.read_json(where)
    except DataError as e:
        raise AdapterError(str(e)) from e
    if not isinstance(record, dict) or "method" not in record:
        raise AdapterError(f"{where} does not describe an adapter")
    schema = record.get("lofit_lens_schema")
    if not isinstance(schema, int) or schema < 1:
        raise AdapterError(f"{where} has schema {schema!r}; this version reads 1 to {SCHEMA}")
    if schema > SCHEMA:
        raise AdapterError(f"{where} was written by a newer version (schema {schema}); update lofit-lens")
    return record


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise AdapterError unless the tensors have these names and shapes, all float32."""
    if set(tensors) != set(shapes):
        raise AdapterError(f"{where / WEIGHTS_FILE} holds {sorted(tensors)}; expected {' and '.join(sorted(shapes))}")
    for name, t in tensors.items():
        if tuple(t.shape) != tuple(shapes[name]) or t.dtype != torch.float32:
            raise AdapterError(
                f"{where / WEIGHTS_FILE}: {name} is {t.dtype} {tuple(t.shape)}, expected torch.float32 {tuple(shapes[name])}"
            )


# Adapters that are attached now. Kept outside the module: an attribute would make the model its sub-module.
_attached: "weakref.WeakSet[Adapter]" = weakref.WeakSet()
