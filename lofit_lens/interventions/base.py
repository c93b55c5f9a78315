"""The common part of every method: it can be attached, counted and saved."""

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.checks import shown
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.html import wrapped
from lofit_lens.hub import pushed
from lofit_lens.interventions.cards import model_card
from lofit_lens.interventions.files import (
    CONFIG_FILE,
    check_provenance,
    check_unchanged,
    located_adapter,
    public,
    read_config,
    read_tensors,
    write_files,
)
from lofit_lens.interventions.provenance import KEPT, AdapterMeta, check_weights, meta_of, warn_of_other, with_metrics
from lofit_lens.models import ALL, Layout, Positions, backend_of, declared, device_of, hooked, layout_of, model_info

Some = TypeVar("Some", bound="Adapter")
Edit = Callable[[Tensor], Tensor]  # values at a HookPoint -> the same shape
OF_TORCH = frozenset(
    {"named_parameters", "parameters", "requires_grad_", "state_dict", "to"}
)  # of nn.Module: what a user calls


@runtime_checkable
class Intervention(Protocol):
    """A change to a frozen model's forward pass (LoFiT, ITI, RepE, RED, LoReFT, LoRA).

    A trained one is also an `nn.Module`, whose `parameters()` the training loop updates.
    """

    @property
    def n_parameters(self) -> int:
        """Count of the numbers that the method adds to the model and learns or estimates."""
        ...

    def attached(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Apply the change within a `with` block and remove it afterwards, also after an exception."""
        ...

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write an adapter folder."""
        ...


@contextlib.contextmanager
def attached(model: Any, *interventions: Intervention) -> Iterator[None]:
    """Attach several interventions, applied in the order given; all are removed at the end."""
    backend_of(model)
    for one in interventions:
        check_adapter(one)
    with contextlib.ExitStack() as stack:
        for one in interventions:
            stack.enter_context(one.attached(model))
        yield


def attachable(adapter: Any) -> bool:
    """Return whether an object can be attached; a method of your own needs nothing else."""
    return not isinstance(adapter, type) and callable(getattr(adapter, "attached", None))


def check_adapter(adapter: Any) -> None:
    """Raise InputError unless an adapter can be attached."""
    if not attachable(adapter):
        path = isinstance(adapter, str | Path)
        instead = f"load it first: load_adapter({str(adapter)!r})" if path else "give e.g. what tune_offsets returns"
        raise InputError(f"{shown(adapter)} is not an adapter; {instead}")


def adapters_of(adapters: Any) -> tuple[Intervention, ...]:
    """Return one adapter or several as a tuple.

    Raises:
        InputError: no adapter, or something else.
    """
    listed = tuple(adapters) if isinstance(adapters, list | tuple) else (adapters,)
    if not listed:
        raise InputError("no adapter given; give one or more")
    for one in listed:
        check_adapter(one)
    return listed


KNOWN: "dict[str, type[Adapter]]" = {}  # method, as in files -> the adapter's class


class Adapter(nn.Module):
    """An intervention by hooks: what it edits, and how it is attached and saved. Each method has one sub-class.

    A sub-class names its `method` and `title`, says what it edits in `_points`, checks a model's shape in `_check_shape`, and
    gives its numbers and settings to files in `_tensors` and `_settings`, which `_made_from` reads back. For its card on the hub,
    `places` describes where it acts; for its repr, `_parts` lists what distinguishes it. `load_adapter` then knows it by its
    `method`.

    Attributes:
        meta: provenance.
        positions: where it acts.
    """

    method: ClassVar[str]  # in files
    title: ClassVar[str]  # in tables and messages
    backend: ClassVar[str | None] = None  # the only class of TransformerLens that it can be attached to
    meta: AdapterMeta
    positions: Positions
    _held: contextlib.ExitStack | None = None  # of `attach`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "method" in vars(cls):  # otherwise it is a base class
            known = KNOWN.setdefault(cls.method, cls)
            if known.__module__.startswith("lofit_lens.") and cls.__module__ != known.__module__:
                raise InputError(f"the library has a method {cls.method!r} already; rename that of {cls.__name__}")
            KNOWN[cls.method] = cls

    def __init__(self, meta: AdapterMeta | None = None, positions: str | Positions = ALL) -> None:
        super().__init__()
        self.meta = meta or AdapterMeta()
        self.positions = Positions.parse(positions)

    # ------------------------------------------------------------------------------------ defined by each method

    @property
    def n_parameters(self) -> int:
        """Count of the numbers that the method adds to the model and learns or estimates."""
        raise NotImplementedError

    def _points(self, model: Any) -> Iterable[tuple[Any, Edit]]:
        """Yield HookPoints and the edit of each. An edit keeps nothing between calls and returns its input's dtype."""
        raise NotImplementedError

    def _check_shape(self, model: Any) -> None:
        """Raise AdapterError (wrong shape) or ModelError (no such place) unless this adapter fits this model."""
        raise NotImplementedError

    def _tensors(self) -> Mapping[str, Tensor]:
        """Return the contents of the safetensors file; by default, parameters and buffers by name."""
        return self.state_dict()

    def _settings(self) -> dict[str, Any]:
        """Return what the JSON file holds besides the provenance; JSON-able."""
        raise NotImplementedError

    @classmethod
    def _made_from(
        cls: type[Some], record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path
    ) -> Some:
        """Make an adapter from a record and tensors; KeyError, TypeError and ValueError are reported as an incomplete file."""
        raise NotImplementedError

    def places(self) -> tuple[str, str]:
        """Return heading and text, in Markdown, of the card's section on where it acts."""
        return "Where it acts", f"Not described for {self.title}."

    def _parts(self) -> list[str]:
        """List what its repr says besides model and task."""
        return []

    def __repr__(self) -> str:
        info = self.meta.model
        parts = [info.name if info else "no model", self.meta.task or "no task", *self._parts()]
        return wrapped(f"{type(self).__name__}({', '.join(parts)})")

    def __dir__(self) -> list[str]:
        """What a user calls; of torch's eighty names only `OF_TORCH`, so that the method's own are found by Tab."""
        of_torch = {"training", *dir(nn.Module)} - OF_TORCH
        return [name for name in super().__dir__() if name.startswith("_") or name not in of_torch]

    # ---------------------------------------------------------------------------------------------- attaching

    @contextlib.contextmanager
    def attached(self: Some, model: Any) -> Iterator[Some]:
        """Edit this model's activations within the block; the edit is removed at its end, also after an exception.

        The hooks are permanent in TransformerLens' sense: `run_with_hooks`, `run_with_cache` and
        `reset_hooks()` inside the block keep them, and other hooks are never touched.

        Raises:
            AdapterError: made for another shape, or already attached.
        """
        with self.reserved(model), self._in_place(model):
            yield self

    def attach(self: Some, model: Any) -> Some:
        """Edit this model's activations until `detach()`: `attached` where a block is in the way, as in a notebook.

        Several adapters act in the order in which they were attached, and may be detached in any order.

        Raises:
            AdapterError: made for another shape, or already attached.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.attached(model))
            self._held = stack.pop_all()
        return self

    def detach(self) -> None:
        """Undo `attach`; other adapters and hooks stay.

        Raises:
            AdapterError: it is not attached, or was attached by a `with` block.
        """
        if self._held is None:
            how = (
                "attached by a `with` block, which detaches it"
                if self in _attached
                else "not attached; attach(model) does it"
            )
            raise AdapterError(f"this adapter is {how}")
        held, self._held = self._held, None
        held.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which is not attached."""
        return {name: value for name, value in vars(self).items() if name != "_held"}

    @contextlib.contextmanager
    def reserved(self, model: Any) -> Iterator[None]:
        """Count as attached within the block, without any edit.

        Raises:
            AdapterError: made for another shape, or already attached.
        """
        self.attach_check(model)
        _attached.add(self)
        try:
            made = f"{self.title} of {self.meta.task}" if self.meta.task else self.title
            with declared(model, self.positions, made):
                yield
        finally:
            _attached.discard(self)

    @contextlib.contextmanager
    def _in_place(self, model: Any) -> Iterator[None]:
        """Apply the edit within the block; by hooks, unless a method overrides this."""
        with contextlib.ExitStack() as stack:
            for point, edit in self._points(model):
                stack.enter_context(hooked(point, self._hook(model, edit)))
            yield

    def attach_check(self, model: Any) -> None:
        """Raise unless this adapter fits this model; warns of other weights, and of another BOS setting."""
        info = model_info(model)
        if self in _attached:
            raise AdapterError(
                "this adapter is already attached; detach() it, or leave its `with` block, or attach a copy"
            )
        self._check_shape(model)
        if self.meta.model:
            warn_of_other(self.meta.model, info)

    @property
    def _made_for(self) -> str:
        return f" (made for {self.meta.model.name})" if self.meta.model else ""

    def _hook(self, model: Any, edit: Edit) -> Any:
        # Neither hook keeps anything between calls: a tensor made in inference mode would break later training.
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

    def add_metrics(self, result: Any) -> None:
        """Keep the result of an evaluation with this adapter (an `EvalResult`), for its files and its card on the hub.

        It replaces an earlier result for the same task, split and form.

        Raises:
            InputError: the result was measured on other weights than those the adapter was made for.
        """
        self.meta.metrics = with_metrics(self.meta, result)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            InputError: the folder exists (and not `overwrite`) or cannot be written.
        """
        with io.new_folder(folder, overwrite=overwrite) as temporary:
            write_files(temporary, self._record(), self._tensors())
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the adapter to the Hugging Face hub in one commit: its two files and a model card, `README.md`.

        Args:
            repo_id: `"user/name"`; created if missing.
            license: of the adapter, as the hub spells it (`"mit"`, `"llama2"`); the base model's license may prescribe one.
            private: make a new repository private and refuse an existing public one.
            revision: branch; None = main.
            message: commit message.
            token: None = the one that `hf auth login` keeps.

        Returns:
            URL of the commit.

        Raises:
            InputError: an invalid repo id, a missing token or missing rights, or a hub that cannot be reached.
        """
        with tempfile.TemporaryDirectory(prefix="adapter-") as made:
            write_files(Path(made), public(self._record()), self._tensors())
            shown = type(self).from_pretrained(Path(made))  # the card describes the files as uploaded
            io.write_text(Path(made) / "README.md", model_card(shown, repo_id=repo_id, license=license))
            said = message or f"{self.title} adapter"
            return pushed(made, repo_id, private=private, revision=revision, message=said, token=token)

    def _record(self) -> dict[str, Any]:
        meta = self.meta
        return {
            "method": self.method,
            "base_model": meta.model.to_dict() if meta.model else None,
            **self._settings(),
            "positions": str(self.positions),
            **{name: getattr(meta, name) for name in KEPT},
            "versions": meta.versions or io.environment(),
            "attached": meta.attached,
        }

    @classmethod
    def from_pretrained(
        cls: type[Some], folder: str | Path, *, model: Any = None, revision: str | None = None, strict: bool = True
    ) -> Some:
        """Read an adapter from a folder or from the Hugging Face hub.

        Args:
            folder: an adapter folder, or `"user/name"` on the hub.
            model: check that the adapter fits this model, and put it on its device.
            revision: hub commit, tag or branch.
            strict: refuse a `model` with other weights than those it was made for; otherwise only warn.

        Raises:
            AdapterError: a file missing, damaged or changed, of another method or a newer schema, or tensors that do not match
                the settings; or (with `model`) another shape or other weights.
            InputError: neither a folder nor a repository that can be reached.
        """
        folder, source = located_adapter(folder, revision)
        record = read_config(folder)
        where = folder / CONFIG_FILE
        if record.get("method") != cls.method:
            raise AdapterError(
                f"{where} does not describe a {cls.title} adapter: its method is {record.get('method')!r}"
            )
        tensors = read_tensors(folder)
        try:
            check_provenance(record)
            made = cls._made_from(record, tensors, meta_of(record, source), folder)
            if record["positions"] != str(made.positions):
                raise ValueError(f"positions {record['positions']!r}; {cls.title} acts at {made.positions}")
        except AdapterError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise AdapterError(f"{where} is incomplete: {e}") from e
        check_unchanged(folder, record)
        if model is not None:
            made._check_shape(model)
            if strict and made.meta.model:
                check_weights(made.meta.model, model_info(model))
            made.attach_check(model)
            made.to(device_of(model))
        return made


# Adapters that are attached now. Kept outside the module: an attribute would make the model its sub-module.
_attached: "weakref.WeakSet[Adapter]" = weakref.WeakSet()
