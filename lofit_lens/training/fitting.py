"""Train any adapter on a task: the part that all methods share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.errors import InputError, TrainingDiverged
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import ALL, ModelInfo, frozen, model_info
from lofit_lens.tasks.base import Task
from lofit_lens.training.config import TrainConfig
from lofit_lens.training.loop import OnStep, train
from lofit_lens.training.objective import task_loss


def fit(
    adapter: Any,
    model: Any,
    task: Task,
    config: TrainConfig,
    *,
    seed: int,
    n_train: int | None = None,
    penalty: Callable[[], Tensor] | None = None,
    identity: dict[str, Any] | None = None,
    label: str = "",
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> None:
    """Train an adapter's trainable parameters on a task, in place, and write its `meta`.

    The model is frozen and in eval mode meanwhile; DPO's reference is the model as it stands, with this adapter off.

    Args:
        adapter: an `Adapter` (or `Lora`) with the parameters to train set to `requires_grad`; at the end none is.
        model: the model it belongs to.
        task: what to learn.
        config: hyperparameters.
        seed: of the draw of examples and of the row order.
        n_train: training examples drawn; None = the task's own number.
        penalty: added to the loss as `config.l1 * penalty()`.
        identity: what tells this run from others, for the checkpoint; beside method, positions, task, data and model.
        label: text in front of the bar.
        checkpoint: state file for Ctrl-C and resume; see `training.loop.train`.
        on_step: called with every new step's record; see `training.loop.train`.
        progress: show a bar.

    Raises:
        InputError: the adapter acts on a sequence's last position alone, which no answer's token is predicted from; or no
            training rows.
        AdapterError: the adapter does not fit the model, or is attached.
        DataError: a training row longer than the model's context.
        TrainingDiverged: NaN or infinity. It and Ctrl-C's KeyboardInterrupt carry the adapter as it was after the last good
            step in `.adapter`.
    """
    positions = getattr(adapter, "positions", ALL)
    if positions.name == "last":
        raise InputError(
            "an adapter at positions 'last' learns nothing: no token of an answer is predicted from the last position; train it "
            "at 'predicting', 'all' or the prompt's own (f7+l7)"
        )
    adapter.attach_check(model)
    examples = task.training_examples("train", n=n_train, seed=seed)
    info = model_info(model)
    adapter.meta = AdapterMeta(
        info, task.name, task.data_hash, seed, config.to_dict(), io.environment(), n_train=len(examples)
    )
    run = {
        "method": getattr(adapter, "method", type(adapter).__name__), "positions": str(positions), **(identity or {}),
        "task": task.name, "data_hash": task.data_hash, "model": _weights(info),
    }  # fmt: skip
    wanted = [p for p in adapter.parameters() if p.requires_grad]
    with _kept(adapter), frozen(model):
        loss_of = task_loss(model, examples, beta=config.beta, batch_size=config.batch_size)
        for p in wanted:  # an adapter inside the model (LoRA) was frozen with it
            p.requires_grad_(True)
        with adapter.attached(model):
            train(
                adapter, len(examples), loss_of, config, seed=seed, penalty=penalty, identity=run,
                history=adapter.meta.history, checkpoint=checkpoint, on_step=on_step, progress=progress,
                label=f"{label} {task.name}".strip(),
            )  # fmt: skip
    adapter.requires_grad_(False)


def _weights(info: ModelInfo) -> dict[str, Any]:
    """The model without its name where its weights are known: a folder may be moved between stop and resume."""
    found = info.to_dict()
    return {k: v for k, v in found.items() if k != "name"} if info.revision else found


@contextlib.contextmanager
def _kept(adapter: nn.Module) -> Iterator[None]:
    """Hand the adapter over with whatever stops its training; around `frozen`, which makes weights trainable again."""
    try:
        yield
    except (TrainingDiverged, KeyboardInterrupt) as e:
        e.adapter = adapter.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
        raise
