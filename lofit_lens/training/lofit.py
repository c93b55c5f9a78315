"""The two steps of LoFiT (arXiv 2406.01563, section 3).

1. `select_heads`: train A on every head (v = 0) with task loss + lambda * sum |A|; score a head by the L2 norm of its A.
2. `tune_offsets`: from the unmodified model, train v on the chosen heads (A = 0).

`tune_many` runs many such trainings in the same passes over the frozen model: seeds, tasks, head sets, K, learning rates and L1
weights. The rows of all runs go through the model together, each edited by its own run's A and v. Each run has the loss, clip,
schedule, order of rows and end that it has when trained by itself, and learns the same up to rounding. `Passes.token_budget`
bounds the rows of a pass, whatever the number of runs.

Whether step 1 trained enough to rank heads shows in what it moved. A starts as a small random draw A_0, and AdamW's first steps
move every entry by about the learning rate, whatever the head. So at first the norms of A differ between heads as the draw does.
`trained_share` is the squared correlation, over heads, of |A| with |A - A_0|: the share of the differences between heads' scores
that follows how far training moved them. It is near 0 at the start and near 1 once the draw no longer matters; below
one half a warning says so. It needs neither a second run nor validation rows.

DPO's reference is the model with the adapter off, computed once before training. (The official code computes it after the
random init; the difference is 0.1 nats at most.)
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lofit_lens.checks import check_is, check_one_of, shown
from lofit_lens.errors import InputError, TrainingDiverged
from lofit_lens.heads import Heads, HeadScores
from lofit_lens.interventions.lofit import LOFIT, Component, Lofit
from lofit_lens.interventions.provenance import KEPT, AdapterMeta
from lofit_lens.interventions.side_by_side import side_by_side
from lofit_lens.models import model_info
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.registry import task_of
from lofit_lens.training.config import TrainConfig, preset
from lofit_lens.training.fitting import fit_together
from lofit_lens.training.loop import FitSpec, OnStep
from lofit_lens.training.losses import l1_norm
from lofit_lens.training.objective import encoded_rows
from lofit_lens.training.passes import FAST, Passes

LEAST_SHARE = 0.5  # of `trained_share`; below it, a ranking of heads mostly reflects the random start
log = logging.getLogger(__name__)


def select_heads(
    model: Any,
    task: Task | str,
    *,
    heads: Heads | None = None,
    seed: int = 42,
    config: TrainConfig | None = None,
    n_train: int | None = None,
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    passes: Passes = FAST,
    progress: bool = True,
) -> HeadScores:
    """Step 1: score every head by the L2 norm of its learned scaling A.

    Args:
        model: any HookedTransformer or TransformerBridge; left as it was.
        task: what to learn, or its name.
        heads: train A only on these (all others score 0), e.g. if some layers have no reachable heads; None = all.
        seed: seed of the init, the row order and the draw of training examples.
        config: hyperparameters; None = the preset for this task and model.
        n_train: training examples drawn; None = the task's own number.
        checkpoint: state file for Ctrl-C and resume; see `training.loop.train_together`.
        on_step: called with every new step's record; see `training.fit`.
        passes: how a step runs the model (bound on memory, shortcuts); changes nothing beyond rounding.
        progress: show a bar.

    Returns:
        Scores `[n_layers, n_heads]`; `.top(k)` gives the heads. `.meta` holds config, seed, history and versions, and
        `"trained_share"` (see `trained_share`); a warning says if that is too small to rank heads.

    Raises:
        DataError: a training row longer than the model's context.
        TrainingDiverged: NaN or infinity. This error, and Ctrl-C's KeyboardInterrupt, carry the adapter after its last
            good step in `.adapter`.
    """
    lofit = tune_scalings(
        model, task, heads, seed=seed, config=config, n_train=n_train, checkpoint=checkpoint, on_step=on_step,
        passes=passes, progress=progress,
    )  # fmt: skip
    return learned_scores(lofit, "A", kind="A-norm")


def learned_scores(lofit: Lofit, component: Component, *, kind: str) -> HeadScores:
    """Return the L2 norm of every head's trained A or v, with the training's record as `.meta`.

    If training hardly moved them (`trained_share`), a warning says what to change.
    """
    check_is(lofit, Lofit, "lofit", LOFIT)
    scores, record, share = lofit.norms(component), record_of(lofit.meta), trained_share(lofit, component)
    if share is not None:
        record["trained_share"] = share
        if share < LEAST_SHARE:
            config, n = lofit.meta.config, len(lofit.meta.history)
            log.warning(
                "scores of heads by %s on %s: after %d steps only %.0f %% of the differences between heads come from training, "
                "the rest from the random start, so their order means little; train for more epochs (epochs=%d, "
                "max_steps=%s) or with a higher learning rate (lr=%g)",
                kind, lofit.meta.task, n, 100 * share, config["epochs"], config["max_steps"], config["lr"],
            )  # fmt: skip
    return HeadScores(scores.values, kind, scores.model, scores.task, record, scores.head_layers)


def trained_share(lofit: Lofit, component: Component) -> float | None:
    """Compute the squared correlation over heads of the norm of A (or v) with the norm of its change since the start, 0 to 1.

    Negative correlations count as 0. None if it is unknown: fewer than 3 heads, or a start that the adapter's provenance
    does not name.
    """
    seed, std = lofit.meta.seed, lofit.meta.config.get("init_std")
    if seed is None or std is None or lofit.k < 3:
        return None
    start = Lofit(lofit.shape, lofit.heads).init_(component, seed=seed, std=std)
    ends = [getattr(x, component).detach().float().cpu() for x in (lofit, start)]
    norms = np.array([[float(x[h].norm()) for h in lofit.heads] for x in (ends[0], ends[0] - ends[1])])
    if not norms.std(axis=1).all():
        return 0.0
    return float(max(0.0, np.corrcoef(norms)[0, 1]) ** 2)


def record_of(meta: AdapterMeta) -> dict[str, Any]:
    """Return the record of a training that scores heads, for `HeadScores.meta`."""
    return {
        "step": "head selection", "model": meta.model.to_dict() if meta.model else None,
        **{name: getattr(meta, name) for name in KEPT if name != "metrics"}, "attached": meta.attached,
    }  # fmt: skip


def tune_scalings(
    model: Any,
    task: Task | str,
    heads: Heads | None = None,
    *,
    seed: int = 42,
    config: TrainConfig | None = None,
    n_train: int | None = None,
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    passes: Passes = FAST,
    progress: bool = True,
) -> Lofit:
    """Train only A (v = 0) and keep it; on every head by default. Arguments and errors as in `select_heads`."""
    run = LofitRun(task, "A", heads, seed=seed, config=config, n_train=n_train, on_step=on_step)
    return _tune(model, run, passes, checkpoint, progress)


def tune_offsets(
    model: Any,
    task: Task | str,
    heads: Heads | None,
    *,
    seed: int = 42,
    config: TrainConfig | None = None,
    n_train: int | None = None,
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    passes: Passes = FAST,
    progress: bool = True,
) -> Lofit:
    """Step 2: train offsets v on the chosen heads (None = every head) from the unmodified model.

    Arguments and errors as in `select_heads`; a head outside the model raises InputError.

    Returns:
        The adapter, `K * d_head` learned numbers, on the model's device and not attached.
    """
    run = LofitRun(task, "v", heads, seed=seed, config=config, n_train=n_train, on_step=on_step)
    return _tune(model, run, passes, checkpoint, progress)


@dataclass(frozen=True)
class LofitRun:
    """One training of LoFiT: step 1 (`component` A) or step 2 (v).

    Args:
        task: what to learn, or its name.
        component: `"A"` (v = 0, with the L1 penalty) or `"v"` (A = 0).
        heads: the edited heads; None = every head.
        seed: seed of the init, the row order and the draw of training examples.
        config: hyperparameters; None = the preset for this task and model.
        n_train: training examples drawn; None = the task's own number.
        on_step: called with every new step's record.
    """

    task: Task | str
    component: Component
    heads: Heads | None = None
    seed: int = 42
    config: TrainConfig | None = None
    n_train: int | None = None
    on_step: OnStep | None = None

    def check(self, model: Any) -> None:
        """Raise the errors that its training would raise before the first step.

        Raises:
            InputError: heads outside the model, or too few training rows.
            DataError: a training row longer than the model's context.
        """
        Lofit.for_model(model, self.heads)
        encoded_rows(model, task_of(self.task).training_examples("train", n=self.n_train, seed=self.seed))

    def fit(self, model: Any) -> FitSpec:
        """Return the training that this describes, with a new adapter on the model's device."""
        check_one_of("component", self.component, ("A", "v"))
        lofit, task = Lofit.for_model(model, self.heads), task_of(self.task)
        known = preset(model_info(model), task.family, task.objective)
        config = (known.select if self.component == "A" else known.tune) if self.config is None else self.config
        check_is(config, TrainConfig, "config", "a TrainConfig(lr=...), e.g. preset(...).tune")
        lofit.init_(self.component, seed=self.seed, std=config.init_std).train_only(self.component)
        return FitSpec(
            lofit, task, config, self.seed, self.n_train,
            penalty=(lambda: l1_norm(lofit.A)) if self.component == "A" else None,
            identity={"component": self.component, "heads": [list(h) for h in lofit.heads]}, on_step=self.on_step,
        )  # fmt: skip


def _tune(model: Any, run: LofitRun, passes: Passes, checkpoint: str | Path | None, progress: bool) -> Lofit:
    (found,) = tune_many(model, [run], passes=passes, checkpoint=checkpoint, progress=progress)
    if isinstance(found, TrainingDiverged):
        raise found
    return found


def tune_many(
    model: Any,
    runs: Sequence[LofitRun],
    *,
    passes: Passes = FAST,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[Lofit | TrainingDiverged]:
    """Train several LoFiT adapters side by side; tasks with SFT and DPO, and A and v, may be mixed.

    `learned_scores(lofit, "A", kind="A-norm")` gives the head scores of a run that trained A.

    Args:
        model: any HookedTransformer or TransformerBridge; left as it was.
        runs: what to train. A single run is trained as by `tune_scalings` or `tune_offsets`, bit for bit.
        passes: how a step runs the model.
        checkpoint: one state file for all runs, for Ctrl-C and resume; see `training.loop.train_together`.
        progress: show one bar.

    Returns:
        For each run the adapter, on the model's device and not attached; or the error if it diverged, with the adapter
        after its last good step in `.adapter`. The other runs continue.

    Raises:
        InputError: no run; heads outside the model; a checkpoint of other runs.
        DataError: a training row longer than the model's context.
        KeyboardInterrupt: Ctrl-C, after the step in progress.
    """
    if not isinstance(runs, Sequence) or not runs or not all(isinstance(run, LofitRun) for run in runs):
        raise InputError(f"runs is {shown(runs)}; give one or more, e.g. [LofitRun(task, 'v', heads)]")
    fits = [run.fit(model) for run in runs]
    adapters: list[Lofit] = [one.adapter for one in fits]
    label, attached = f"{len(runs)} runs", lambda model: side_by_side(model, adapters)
    if len(runs) == 1:
        (lofit,), attached = adapters, adapters[0].attached
        what = "select heads" if runs[0].component == "A" else f"tune offsets (K={lofit.k})"
        label = f"{what} {fits[0].task.name}"
    errors = fit_together(model, fits, attached, checkpoint=checkpoint, passes=passes, progress=progress, label=label)
    return [error or adapter for adapter, error in zip(adapters, errors, strict=True)]
