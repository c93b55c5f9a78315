"""The declaration of a method, the workbench that it is fitted on, and the table of all methods.

All methods are fitted on the same training rows (drawn by the seed), trained ones with the same loop and loss. Each has the same
number of points to choose from, `TRIALS`; the point is chosen on the validation rows.
"""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lofit_lens.errors import InputError, ModelError
from lofit_lens.experiments.methods.source import digest_of, in_library
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.hub import commit_of
from lofit_lens.interventions import Intervention
from lofit_lens.models import ModelInfo, device_of, load_model, logits_of, model_info, origin_of
from lofit_lens.probing import Probes, ReadingVectors, fit_probes, reading_vectors
from lofit_lens.tasks.base import Task
from lofit_lens.training import LofitRun, Preset, TrainConfig, preset
from lofit_lens.training.config import method_config
from lofit_lens.training.fitting import fit
from lofit_lens.training.loop import OnStep
from lofit_lens.training.selectors import probe_scores

Settings = Mapping[str, Any]
TRIALS = 4
RATES = (0.1, 0.3, 1.0, 3.0)  # multiples of the usual learning rate
TRAINED = tuple(f.name for f in fields(TrainConfig))
OWN, RANDOM, MATCHED, ALL = "A-norm", "random", "matched", "all"  # heads of a run


@dataclass(frozen=True)
class Outline:
    """What is known about a model and a task before anything is loaded.

    Attributes:
        info: of the model.
        preset: LoFiT's settings for this model and task.
    """

    info: ModelInfo
    preset: Preset

    @classmethod
    def of(cls, info: ModelInfo, task: Task) -> "Outline":
        """Make the outline with the task's preset."""
        return cls(info, preset(info, task.family, task.objective))


@dataclass(frozen=True)
class Fit:
    """One fit that is requested from a method.

    Attributes:
        seed: seed of the draw of rows, the initialization and the order of rows.
        settings: settings, given or chosen on the validation rows.
        config: training configuration, including settings; None for a method that is not trained.
        heads: the heads to edit, for a method whose runs name them.
        k: the number of heads, for a method that finds them itself.
        checkpoint: state file, for stop and resume.
        on_step: callback that reads the steps of training.
    """

    seed: int
    settings: Settings = field(default_factory=dict)
    config: TrainConfig | None = None
    heads: HeadSet | None = None
    k: int | None = None
    checkpoint: Path | None = None
    on_step: OnStep | None = None


class Workbench:
    """One model and one task, and what several methods and trials share: probes, reading vectors, head scores.

    Shared work is done once; its seconds count for every method that uses it.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: the task that the methods learn.
        n_train: training rows drawn; None = the task's own number.

    Attributes:
        info: of the model.
        preset: LoFiT's settings for this model and task.
    """

    def __init__(self, model: Any, task: Task, *, n_train: int | None = None) -> None:
        self.model, self.task, self.n_train = model, task, n_train
        known = Outline.of(model_info(model), task)
        self.info, self.preset = known.info, known.preset
        self._kept: dict[Any, tuple[Any, float]] = {}
        self._borrowed = 0.0

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, computed once."""
        if key not in self._kept:
            outer, self._borrowed, start = self._borrowed, 0.0, time.perf_counter()
            value = make()
            self._kept[key] = (value, time.perf_counter() - start + self._borrowed)
            self._borrowed += outer
        else:
            self._borrowed += self._kept[key][1]
        return self._kept[key][0]

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Return a result and its seconds, including those of shared work that was done earlier."""
        self._borrowed, start = 0.0, time.perf_counter()
        value = work()
        return value, time.perf_counter() - start + self._borrowed

    def probes(self, seed: int, *, full_stop: bool | None = None) -> Probes:
        """A probe for every head; `full_stop` as in `fit_probes`."""
        return self.shared(("probes", seed, full_stop), lambda: fit_probes(
            self.model, self.task, seed=seed, n_train=self.n_train, full_stop=full_stop, progress=False
        ))  # fmt: skip

    def reading(self, seed: int) -> ReadingVectors:
        """A reading vector for every layer."""
        return self.shared(("reading", seed), lambda: reading_vectors(
            self.model, self.task, seed=seed, n_train=self.n_train, progress=False
        ))  # fmt: skip

    def selected(self, select: Callable[..., HeadScores], seed: int) -> HeadScores:
        """Head scores of a selector; for probe accuracy, those of the shared probes that ITI uses too."""
        if select is probe_scores:
            return self.probes(seed).scores
        return self.shared(
            (select, seed), lambda: select(self.model, self.task, seed=seed, n_train=self.n_train, progress=False)
        )

    def train(self, adapter: Any, asked: Fit, *, model: Any = None) -> Any:
        """Train an adapter with the common loop on the task's rows, as the fit requests, and return it.

        Raises:
            TrainingDiverged: NaN or infinity.
        """
        assert asked.config is not None
        fit(
            adapter, self.model if model is None else model, self.task, asked.config, seed=asked.seed, n_train=self.n_train,
            checkpoint=asked.checkpoint, on_step=asked.on_step, progress=False,
        )  # fmt: skip
        return adapter

    def bridge(self) -> Any:
        """The model as a TransformerBridge: itself, or the same checkpoint loaded again.

        Raises:
            ModelError: it is not a bridge, and its checkpoint cannot be read.
        """
        if self.info.backend == "bridge":
            return self.model
        if self.model not in _bridges:
            revision = commit_of(self.info.revision)
            device = next(self.model.parameters()).device
            try:
                bridge = load_model(
                    origin_of(self.model).source or self.info.name, backend="bridge", dtype=self.info.dtype, device=device,
                    revision=revision, prepend_bos=self.info.prepend_bos, name=self.info.name,
                )  # fmt: skip
            except InputError as e:
                raise ModelError(
                    f"LoRA changes the projections of a TransformerBridge; {self.info.name} is a HookedTransformer, and its "
                    f"checkpoint cannot be read as a bridge: {e}. Leave LoRA out (methods=...), or load the model as a bridge"
                ) from e
            _check_same(self.model, bridge, self.info.name)
            _bridges[self.model] = bridge
        return _bridges[self.model]


_bridges: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def _check_same(model: Any, bridge: Any, name: str) -> None:
    """Raise ModelError unless a reloaded checkpoint agrees with the model in memory, which may have been edited since."""
    tokens = torch.arange(3, 11, device=device_of(model))[None] % model_info(model).d_vocab
    ours, theirs = (logits_of(m, tokens, torch.ones_like(tokens)).float().cpu() for m in (model, bridge))
    off = (ours - theirs[..., : ours.shape[-1]]).abs().max() / ours.abs().max().clamp(min=1.0)
    if not off <= (1e-3 if ours.dtype == next(model.parameters()).dtype else 5e-2):
        raise ModelError(
            f"LoRA needs {name} as a TransformerBridge, and its checkpoint has other weights than the model in memory; leave "
            "LoRA out (methods=...), or load the model as a bridge"
        )


@dataclass(frozen=True)
class Method:
    """A method: how it is fitted, and what grids, tables and comparisons need to know. No other code depends on its name.

    Attributes:
        name: name in grids and tables.
        fit: workbench and fit -> the fitted adapter. None = nothing is fitted: the unmodified model.
        points: outline -> the settings to choose from, from weak to strong (`TRIALS` of them, or none).
        config: outline -> default training configuration, whose fields are the settings; None = it is not trained.
        settings: names of its settings, for a method that is not trained.
        heads: `"chosen"` = its runs name the heads that it edits; `"k"` = its runs say how many, and it finds them; `""` = it
            does not edit individual heads.
        joint: workbench and fit -> the same fit as a `LofitRun`, which shares passes over the model with others.
        bridge: whether it needs a TransformerBridge.
        cost: seconds of a fit relative to one of LoFiT, for the order of work.
        place: position in tables; ties are ordered by name.
        control_rows: names of its rows on random heads and on all heads; that of matched heads follows from the first.
    """

    name: str
    fit: Callable[[Workbench, Fit], Intervention] | None
    points: Callable[[Outline], Sequence[dict[str, Any]]] = lambda outline: ()
    config: Callable[[Outline], TrainConfig] | None = None
    settings: tuple[str, ...] = ()
    heads: str = ""
    joint: Callable[[Workbench, Fit], LofitRun] | None = None
    bridge: bool = False
    cost: float = 1.0
    place: int = 100
    control_rows: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.heads not in ("chosen", "k", ""):
            raise InputError(f"heads of the method {self.name} is {self.heads!r}; give 'chosen', 'k' or ''")

    @property
    def all_settings(self) -> tuple[str, ...]:
        """Names of all settings."""
        return TRAINED if self.config is not None else self.settings

    @property
    def source(self) -> str:
        """Digest of the code of a method from outside the library, which is part of the name of its runs; else "".

        Raises:
            InputError: the code uses an outer value that cannot be written down.
        """
        given = [f for f in (self.fit, self.points, self.config, self.joint) if f is not None]
        return "" if all(map(in_library, given)) else digest_of(given, f"the method {self.name}")

    def row(self, heads: str = "", k: int | None = None, usual: int = 0, wide: int = 0) -> str:
        """Name of its row in a table.

        Args:
            heads: `OWN`, `RANDOM`, `MATCHED` or `ALL`, for a method whose runs name the heads.
            k: number of heads.
            usual: the preset's number, 3 % of the paper's models.
            wide: three times the usual number, 10 %.
        """
        if self.heads != "chosen":
            return self.name
        if heads in (RANDOM, MATCHED, ALL):
            drawn, every = self.control_rows or (f"{self.name}, random heads", f"{self.name}, all heads")
            return {RANDOM: drawn, MATCHED: f"{drawn}, same layers", ALL: every}[heads]
        share = {wide: "10 %", usual: "3 %"}  # if both are equal, the usual one
        return f"{self.name} {share[k]}" if k in share else f"{self.name}, {k} heads"

    def model(self, bench: Workbench) -> Any:
        """The model that it is attached to."""
        return bench.bridge() if self.bridge else bench.model


def rates(config: TrainConfig) -> tuple[dict[str, Any], ...]:
    """The usual learning rate times `RATES`."""
    return tuple({"lr": float(f"{config.lr * r:.3g}")} for r in RATES)


def trained_method(
    name: str, make: Callable[[Workbench, int], Any], *, bridge: bool = False, cost: float = 1.0, place: int = 100
) -> Method:
    """Make a method that is trained with the common loop on all layers, with as many passes over the rows as LoFiT's offsets.

    Args:
        name: name in tables; in lower case, that of its settings in `training.config`.
        make: workbench and seed -> the initial adapter.
        bridge: as in `Method`, like the two that follow.
        cost: relative seconds.
        place: position in tables.
    """

    def config(outline: Outline) -> TrainConfig:
        return method_config(name.lower(), outline.info).with_changes(epochs=outline.preset.tune.epochs)

    def fit_adapter(bench: Workbench, asked: Fit) -> Intervention:
        return bench.train(make(bench, asked.seed), asked, model=bench.bridge() if bridge else bench.model)

    def points(outline: Outline) -> tuple[dict[str, Any], ...]:
        return rates(config(outline))

    return Method(name, fit_adapter, points, config, bridge=bridge, cost=cost, place=place)
