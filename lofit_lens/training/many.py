"""Many LoFiT trainings in one pass over the frozen model: seeds, tasks, head sets, K, learning rates and L1 weights at once.

Each run learns kilobytes against the same weights. So the rows of all runs go through the model together, each row edited by
its own run's A and v; loss, clip, schedule, order of rows and end are those of the run trained alone, and what it learns is the
same up to rounding. Rows a pass are bounded by `Passes.token_budget`, whatever the number of runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lofit_lens.checks import shown
from lofit_lens.errors import InputError, TrainingDiverged
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.interventions.side_by_side import side_by_side
from lofit_lens.training.fitting import fit_together
from lofit_lens.training.lofit import LofitRun
from lofit_lens.training.passes import FAST, Passes


def tune_many(
    model: Any,
    runs: Sequence[LofitRun],
    *,
    passes: Passes = FAST,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[Lofit | TrainingDiverged]:
    """Train several LoFiT adapters side by side; tasks with SFT and DPO, A and v may mix.

    Head scores of a run that trained A: `learned_scores(lofit, "A", kind="A-norm")`.

    Args:
        model: any HookedTransformer or TransformerBridge; left as it was.
        runs: what to train. One alone is trained as by `tune_scalings` or `tune_offsets`, to the bit.
        passes: how the rows of a step go through the model.
        checkpoint: one state file for all runs, for Ctrl-C and resume; see `training.loop.train_together`.
        progress: show one bar.

    Returns:
        For each run the adapter, on the model's device and not attached; or the error of a run that diverged, with the adapter
        after its last good step in `.adapter`. The others go on.

    Raises:
        InputError: no run; heads outside the model; a checkpoint of other runs.
        DataError: a training row longer than the model's context.
        KeyboardInterrupt: Ctrl-C, after the step in progress.
    """
    if not isinstance(runs, Sequence) or not runs or not all(isinstance(run, LofitRun) for run in runs):
        raise InputError(f"runs is {shown(runs)}; give one or more, e.g. [LofitRun(task, 'v', heads)]")
    fits = [run.fit(model) for run in runs]
    adapters: list[Lofit] = [one.adapter for one in fits]
    attached = adapters[0].attached if len(runs) == 1 else (lambda model: side_by_side(model, adapters))
    errors = fit_together(
        model, fits, attached, checkpoint=checkpoint, passes=passes, progress=progress, label=f"{len(runs)} runs"
    )
    return [error or adapter for adapter, error in zip(adapters, errors, strict=True)]
