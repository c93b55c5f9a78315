"""Train any adapter on a task, or several at once: the part that all methods share."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_is
from lofit_lens.errors import InputError, TrainingDiverged
from lofit_lens.interventions.base import AdapterMeta, check_adapter
from lofit_lens.models import (
    ALL,
    ModelInfo,
    attached_to,
    check_marked,
    fingerprint,
    frozen,
    model_info,
    positions_of,
    why_not_finite,
)
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.registry import task_of
from lofit_lens.training.config import TrainConfig
from lofit_lens.training.loop import FitSpec, OnStep, Training, check_gradients, train_together
from lofit_lens.training.objective import Steps, objective
from lofit_lens.training.passes import FAST, Passes

logger = logging.getLogger(__name__)


def fit(
    adapter: Any,
    model: Any,
    task: Task | str,
    config: TrainConfig,
    *,
    seed: int,
    n_train: int | None = None,
    penalty: Callable[[], Tensor] | None = None,
    identity: Mapping[str, Any] | None = None,
    order: Sequence[Sequence[int]] | None = None,
    reference: Float[Tensor, "rows 2"] | None = None,
    label: str = "",
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    passes: Passes = FAST,
    progress: bool = True,
) -> None:
    """Train an adapter's trainable parameters on a task, in-place, and write its `meta`.

    The model is frozen and in eval mode during training. DPO's reference is the model in its current state, with this adapter
    off, unless another is given.

    Args:
        adapter: an `Adapter` (or `Lora`) whose parameters to train have `requires_grad`; at the end none has.
        model: the model it belongs to.
        task: what to learn, or its name.
        config: hyperparameters.
        seed: seed of the draw of examples and of the row order.
        n_train: training examples drawn; None = the task's own number.
        penalty: added to the loss as `config.l1 * penalty()`.
        identity: what distinguishes this run, for the checkpoint, besides method, positions, task, data and model.
        order: the indices of the drawn examples that each epoch visits, in order: one list for each epoch, all of equal
            length; None = `row_order(n, seed=seed, epoch=epoch)`.
        reference: DPO's reference, `[rows, 2]`: summed log-probs (nats) of chosen and rejected for each drawn example, as
            `reference_log_probs` gives them for any model; None = those of the model in its current state.
        label: text before the bar.
        checkpoint: state file for Ctrl-C and resume; see `training.loop.train_together`.
        on_step: called after every new step with its record: step and epoch (from 1), loss (without the penalty), l1 (raw),
            grad_norm, lr.
        passes: how a step runs the model; changes nothing beyond rounding.
        progress: show a bar.

    Raises:
        InputError: the adapter acts only on a sequence's last position, which predicts no token of an answer; no training
            rows; or an order, reference or schedule that does not fit.
        AdapterError: the adapter does not fit the model, or is attached.
        DataError: a training row longer than the model's context.
        TrainingDiverged: NaN or infinity. This error, and Ctrl-C's KeyboardInterrupt, carry the adapter after its last good
            step in `.adapter`.
    """
    check_adapter(adapter)
    check_is(config, TrainConfig, "config", "a TrainConfig(lr=...)")
    task = task_of(task)
    asked = FitSpec(
        adapter, task, config, seed, n_train=n_train, penalty=penalty, identity=identity or {}, on_step=on_step, order=order,
        reference=reference,
    )  # fmt: skip
    (error,) = fit_together(
        model, [asked], adapter.attached, checkpoint=checkpoint, passes=passes, progress=progress,
        label=f"{label} {task.name}".strip(),
    )  # fmt: skip
    if error is not None:
        raise error


def fit_together(
    model: Any,
    fits: Sequence[FitSpec],
    attached: Callable[[Any], contextlib.AbstractContextManager[Any]],
    *,
    checkpoint: str | Path | None = None,
    passes: Passes = FAST,
    progress: bool = True,
    label: str = "",
) -> list[TrainingDiverged | None]:
    """Train adapters in the same passes over the model, each as `fit` trains a single one.

    Args:
        model: the model they belong to.
        fits: what to train.
        attached: model -> context in which the adapters act: `attached` of a single one, else `side_by_side`.
        checkpoint: one state file for all.
        passes: how a step runs the model.
        progress: show a bar.
        label: text before the bar.

    Returns:
        For each adapter, its error if it diverged, with the adapter after its last good step in `.adapter`; None = completed.

    Raises:
        InputError, AdapterError, DataError, KeyboardInterrupt: as `fit`.
    """
    info = model_info(model)
    check_gradients(*model.parameters())
    check_is(passes, Passes, "passes", "Passes(...), e.g. PLAIN")
    fits = [replace(one, task=one.task.asked_of(model)) for one in fits]
    for one in fits:
        _check_positions(one.adapter)
        one.adapter.attach_check(model)
    acting = positions_of(model)
    others = attached_to(model, label or "training")
    wanted = [p for one in fits for p in one.adapter.parameters() if p.requires_grad]
    drawn = [one.task.training_examples("train", n=one.n_train, seed=one.seed) for one in fits]
    runs: list[Training] = []
    weights = functools.cache(lambda: fingerprint(model))
    with _kept(fits), frozen(model), passes.ready(model):
        # DPO's reference comes first, while the adapters are off.
        objectives = []
        for one, examples in zip(fits, drawn, strict=True):
            how = {"passes": passes, "batch_size": one.config.batch_size, "weights": weights}
            objectives.append(objective(model, examples, beta=one.config.beta, reference=one.reference, **how))
            marks = [forms[0].marks for forms in objectives[-1].rows]
            check_marked([*acting, getattr(one.adapter, "positions", ALL)], marks, "training example")
        steps = Steps(model, objectives, passes, owned=len(fits) > 1)
        for p in wanted:  # an adapter inside the model (LoRA) was frozen with it
            p.requires_grad_(True)
        for one, examples in zip(fits, drawn, strict=True):
            run = Training(one, len(examples), _identity(one, info))
            given = {name: run.what[name] for name in ("order", "reference") if name in run.what}
            one.adapter.meta = AdapterMeta(
                model=info, task=one.task.name, data_hash=one.task.data_hash, seed=one.seed,
                config=one.config.to_dict() | given, versions=io.environment(), history=run.history, n_train=len(examples),
                attached=others,
            )  # fmt: skip
            runs.append(run)
        with attached(model):
            train_together(runs, steps, checkpoint=checkpoint, progress=progress, label=label)
    for one, run in zip(fits, runs, strict=True):
        if run.error is not None:
            if not run.history or info.dtype == "float16":
                run.error = TrainingDiverged(f"{run.error}: {why_not_finite(model)}")
            run.error.adapter = one.adapter  # pyright: ignore[reportAttributeAccessIssue]
    return [run.error for run in runs]


def _check_positions(adapter: Any) -> None:
    if getattr(adapter, "positions", ALL).name == "last":
        raise InputError(
            "an adapter at positions 'last' learns nothing: no token of an answer is predicted from the last position; train it "
            "at 'predicting', 'all' or the prompt's own (f7+l7)"
        )


def _identity(one: FitSpec, info: ModelInfo) -> dict[str, Any]:
    """Return what distinguishes a run, for its checkpoint."""
    given = {} if one.reference is None else {"reference": io.digest(one.reference.tolist())}
    return {
        "method": getattr(one.adapter, "method", type(one.adapter).__name__),
        "positions": str(getattr(one.adapter, "positions", ALL)), **one.identity,
        "task": one.task.name, "data_hash": one.task.data_hash, "model": _weights(info), **given,
    }  # fmt: skip


def _weights(info: ModelInfo) -> dict[str, Any]:
    """Describe the model without its name if its weights are known: a folder may be moved between stop and resume."""
    found = info.to_dict()
    return {k: v for k, v in found.items() if k != "name"} if info.revision else found


@contextlib.contextmanager
def _kept(fits: Sequence[FitSpec]) -> Iterator[None]:
    """Leave nothing trainable at the end, and attach a single adapter to the Ctrl-C that stops its training.

    It must enclose `frozen`, which makes weights trainable again.
    """
    try:
        yield
    except KeyboardInterrupt as e:
        if len(fits) == 1:
            e.adapter = fits[0].adapter  # pyright: ignore[reportAttributeAccessIssue]
        raise
    finally:
        for one in fits:
            one.adapter.requires_grad_(False)
