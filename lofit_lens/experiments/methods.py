"""The methods that are compared: how each is fitted, and the hyperparameters it may choose from.

All are fitted on the same training rows (drawn by the seed), trained ones by the same loop and loss. Every method has one
grid of the same number of points, `TRIALS`; its point is chosen on the validation split by `tune_method`. What a grid does not
name is held at the values below:

- zero-shot: the model as it is. Nothing to choose.
- ITI: as many heads as LoFiT's 3 %, by probe accuracy; mass-mean directions; all positions, as LoFiT. Chosen: strength.
- RepE: first principal component of the pairs' differences, all positions. Chosen: strength (in standard deviations of the
  statements' projections) and layers (those that tell right from wrong best, a third or all).
- LoFiT: heads by A-norm with the preset's settings; offsets. Chosen: learning rate of the offsets. Its random-head control
  takes over what was chosen for the learned heads.
- RED, LoReFT, LoRA: all layers, rank 8. Chosen: learning rate. As many passes over the rows as LoFiT's offsets.
"""

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lofit_lens.errors import InputError, ModelError, unknown
from lofit_lens.heads import HeadScores, HeadSet, check_k
from lofit_lens.hub import commit_of
from lofit_lens.interventions import Intervention, Lofit, Lora, LoReft, Red
from lofit_lens.models import ModelInfo, device_of, load_model, logits_of, model_info, origin_of
from lofit_lens.probing import Probes, ReadingVectors, fit_probes, reading_vectors
from lofit_lens.tasks.base import Task
from lofit_lens.training import Preset, TrainConfig, preset, select_heads, tune_offsets
from lofit_lens.training.config import method_config
from lofit_lens.training.fitting import fit
from lofit_lens.training.loop import OnStep
from lofit_lens.training.selectors import SELECTORS, probe_scores

Settings = Mapping[str, Any]
TRIALS = 4
DRAWS = 5  # of random heads
RATES = (0.1, 0.3, 1.0, 3.0)  # times the preset's or the method's usual learning rate


@dataclass(frozen=True)
class Outline:
    """What is known of a model and a task before anything is loaded.

    Attributes:
        info: of the model.
        preset: LoFiT's settings for this model and task.
    """

    info: ModelInfo
    preset: Preset

    @classmethod
    def of(cls, info: ModelInfo, task: Task) -> "Outline":
        """With the task's preset."""
        return cls(info, preset(info, task.family, task.objective))


@dataclass(frozen=True)
class Training:
    """What a fit is given beside its settings: a state file for stop and resume, and who reads its steps."""

    checkpoint: Path | None = None
    on_step: OnStep | None = None


class Workbench:
    """One model and one task, and what several methods and trials share: head scores, probes, reading vectors.

    Shared work is done once; its seconds count for every method that uses it.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: what the methods learn.
        n_train: training rows drawn; None = the task's own number.
        progress: show bars of the fits.

    Attributes:
        info: of the model.
        preset: LoFiT's settings for this model and task.
        training: state file and tracker of the fits to come.
    """

    def __init__(self, model: Any, task: Task, *, n_train: int | None = None, progress: bool = False) -> None:
        self.model, self.task, self.n_train, self.progress = model, task, n_train, progress
        known = Outline.of(model_info(model), task)
        self.info, self.preset = known.info, known.preset
        self.training = Training()
        self._kept: dict[Any, tuple[Any, float]] = {}
        self._borrowed = 0.0

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once."""
        if key not in self._kept:
            outer, self._borrowed, start = self._borrowed, 0.0, time.perf_counter()
            value = make()
            self._kept[key] = (value, time.perf_counter() - start + self._borrowed)
            self._borrowed += outer
        else:
            self._borrowed += self._kept[key][1]
        return self._kept[key][0]

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Result and seconds, those of shared work included that was done before."""
        self._borrowed, start = 0.0, time.perf_counter()
        value = work()
        return value, time.perf_counter() - start + self._borrowed

    def head_scores(self, seed: int) -> HeadScores:
        """A-norms of step 1."""
        return self.shared(("A-norm", seed), lambda: select_heads(
            self.model, self.task, seed=seed, n_train=self.n_train, progress=self.progress
        ))  # fmt: skip

    def probes(self, seed: int) -> Probes:
        """A probe for every head."""
        return self.shared(("probes", seed), lambda: fit_probes(
            self.model, self.task, seed=seed, n_train=self.n_train, progress=self.progress
        ))  # fmt: skip

    def selected(self, select: Callable[..., HeadScores], seed: int) -> HeadScores:
        """Head scores of a selector; by probe accuracy they are those of the probes, which ITI is made from."""
        if select is probe_scores:
            return self.probes(seed).scores
        return self.shared(
            (select, seed), lambda: select(self.model, self.task, seed=seed, n_train=self.n_train, progress=False)
        )

    def reading(self, seed: int) -> ReadingVectors:
        """A reading vector for every layer."""
        return self.shared(("reading", seed), lambda: reading_vectors(
            self.model, self.task, seed=seed, n_train=self.n_train, progress=self.progress
        ))  # fmt: skip

    def bridge(self) -> Any:
        """The model as a TransformerBridge, which LoRA needs: itself, or the same checkpoint read once more.

        Raises:
            ModelError: it is none, and its checkpoint cannot be read.
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


@torch.no_grad()
def _check_same(model: Any, bridge: Any, name: str) -> None:
    """Raise ModelError unless a checkpoint read once more says what the model in memory says: it may have been edited since."""
    tokens = torch.arange(3, 11, device=device_of(model))[None] % model_info(model).d_vocab
    ours, theirs = (logits_of(m, tokens, torch.ones_like(tokens)).float().cpu() for m in (model, bridge))
    off = (ours - theirs[..., : ours.shape[-1]]).abs().max() / ours.abs().max().clamp(min=1.0)
    if not off <= (1e-3 if ours.dtype == next(model.parameters()).dtype else 5e-2):
        raise ModelError(
            f"LoRA needs {name} as a TransformerBridge, and its checkpoint has other weights than the model in memory; leave "
            "LoRA out (methods=...), or load the model as a bridge"
        )


_bridges: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        name: in tables.
        fit: workbench, settings, seed -> the fitted intervention (None: the model as it is).
        grid: workbench, or its outline alone -> settings that may be chosen.
        settings: names of all that may be set.
        model: workbench -> the model that the intervention is attached to.
        seeded: whether another seed can give another result.
        least_seeds: seeds it is run with at least, for methods by chance.
    """

    name: str
    fit: Callable[[Workbench, Settings, int], Intervention | None]
    grid: Callable[[Any], tuple[dict[str, Any], ...]]
    settings: tuple[str, ...] = ()
    model: Callable[[Workbench], Any] = field(default=lambda bench: bench.model)
    seeded: bool = True
    least_seeds: int = 1


def _zero_shot(bench: Workbench, settings: Settings, seed: int) -> None:
    return None


def k_of(bench: Workbench, share: str) -> int:
    """Number of heads: the preset's for 3 %, three times as many for 10 % (96 of Llama-2-7B's 1,024, as in the paper)."""
    k = {"3 %": bench.preset.k, "10 %": 3 * bench.preset.k}[share]
    check_k(k, bench.info.n_layers * bench.info.n_heads, bench.info.name)
    return k


def _fit_iti(bench: Workbench, settings: Settings, seed: int) -> Intervention:
    k = settings.get("k") or k_of(bench, "3 %")  # a grid's runs say how many
    return bench.probes(seed).iti(k, alpha=settings["alpha"], positions="all")


def _fit_repe(bench: Workbench, settings: Settings, seed: int) -> Intervention:
    found = bench.reading(seed)
    layers = found.top_layers(max(1, round(settings["layers"] * bench.info.n_layers)))
    return found.repe(layers, coefficient=settings["coefficient"], relative=True)


def _rates(config: TrainConfig) -> tuple[dict[str, Any], ...]:
    return tuple({"lr": float(f"{config.lr * r:.3g}")} for r in RATES)


def _lofit(share: str, chosen: Callable[[Workbench, int, int], HeadSet]) -> Callable[..., Intervention]:
    def fit_lofit(bench: Workbench, settings: Settings, seed: int) -> Intervention:
        heads = chosen(bench, k_of(bench, share), seed)
        return fit_offsets(bench, heads, settings, seed)

    return fit_lofit


def fit_offsets(bench: Workbench, heads: HeadSet, settings: Settings, seed: int) -> Lofit:
    """LoFiT's step 2 on these heads, with the preset's settings but for those that are given."""
    return tune_offsets(
        bench.model, bench.task, heads, seed=seed, config=training_config("LoFiT", bench, settings), n_train=bench.n_train,
        checkpoint=bench.training.checkpoint, on_step=bench.training.on_step, progress=bench.progress,
    )  # fmt: skip


def training_config(method: str, bench: Workbench | Outline, settings: Settings) -> TrainConfig:
    """How `LoFiT` (step 2), `LoRA`, `RED` or `LoReFT` is trained: as many passes over the rows for each.

    Raises:
        InputError: a setting that `TrainConfig` does not have, or a value out of its range.
    """
    tune = bench.preset.tune
    base = tune if method == "LoFiT" else method_config(method.lower(), bench.info).with_changes(epochs=tune.epochs)
    return base.with_changes(**settings)


def _by_norm(bench: Workbench, k: int, seed: int) -> HeadSet:
    return bench.head_scores(seed).top(k)


def _by_chance(bench: Workbench, k: int, seed: int) -> HeadSet:
    return HeadSet.random((bench.info.n_layers, bench.info.n_heads), k, seed=seed)


def _trained(
    name: str, make: Callable[[Workbench, int], Any], model: Callable[[Workbench], Any]
) -> Callable[..., Intervention]:
    def fit_adapter(bench: Workbench, settings: Settings, seed: int) -> Intervention:
        adapter = make(bench, seed)
        fit(
            adapter, model(bench), bench.task, training_config(name, bench, settings), seed=seed, n_train=bench.n_train,
            label=adapter.title, checkpoint=bench.training.checkpoint, on_step=bench.training.on_step, progress=bench.progress,
        )  # fmt: skip
        return adapter

    return fit_adapter


def _own(bench: Workbench) -> Any:
    return bench.model


ITI_GRID = tuple({"alpha": a} for a in (5.0, 15.0, 45.0, 135.0))
REPE_GRID = tuple({"coefficient": c, "layers": share} for share in (1 / 3, 1.0) for c in (0.5, 1.0))
LEARNED, CHANCE = "LoFiT 3 %", "random heads"
TRAINED = tuple(f.name for f in fields(TrainConfig))


def _tuned_rates(bench: Workbench | Outline) -> tuple[dict[str, Any], ...]:
    return _rates(bench.preset.tune)


def _adapter(name: str, make: Callable[[Workbench, int], Any], model: Callable[[Workbench], Any] = _own) -> Method:
    """A method that is trained with LoFiT's loop on all layers."""
    return Method(
        name, _trained(name, make, model), lambda bench: _rates(method_config(name.lower(), bench.info)), TRAINED, model
    )


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("zero-shot", _zero_shot, lambda bench: ({},), seeded=False),
        Method("ITI", _fit_iti, lambda bench: ITI_GRID, ("alpha",)),
        Method("RepE", _fit_repe, lambda bench: REPE_GRID, ("coefficient", "layers")),
        Method(CHANCE, _lofit("3 %", _by_chance), _tuned_rates, TRAINED, least_seeds=DRAWS),
        Method(LEARNED, _lofit("3 %", _by_norm), _tuned_rates, TRAINED),
        Method("LoFiT 10 %", _lofit("10 %", _by_norm), _tuned_rates, TRAINED),
        _adapter("LoRA", lambda bench, seed: Lora.for_model(bench.bridge(), seed=seed), Workbench.bridge),
        _adapter("RED", lambda bench, seed: Red.for_model(bench.model)),
        _adapter("LoReFT", lambda bench, seed: LoReft.for_model(bench.model, seed=seed)),
    )
}


def _selector_methods() -> dict[str, Method]:
    """Each head selector as a method: its K best heads (as many as LoFiT's 3 %), then offsets with the preset's settings."""

    def with_heads_by(select: Callable[..., HeadScores]) -> Callable[[Workbench, Settings, int], Intervention]:
        def fit_selected(bench: Workbench, settings: Settings, seed: int) -> Intervention:
            return fit_offsets(bench, bench.selected(select, seed).top(k_of(bench, "3 %")), settings, seed)

        return fit_selected

    return {
        f"heads by {name}": Method(
            f"heads by {name}", with_heads_by(select), lambda bench: ({},), least_seeds=DRAWS if name == "random" else 1
        )
        for name, select in SELECTORS.items()
    }


SELECTED_BY = _selector_methods()


def method_of(name: "str | Method") -> Method:
    """A method by its name.

    Raises:
        InputError: no such method.
    """
    if isinstance(name, Method):
        return name
    known = {**METHODS, **SELECTED_BY}
    if name not in known:
        raise unknown("method", name, known)
    return known[name]
