"""The only training loop: AdamW, linear decay to 0, global clip, last step kept.

It knows rows by their index alone; what a row is and what its loss is belongs to the caller. Epoch e visits the rows in
the order `torch.randperm(n)` of a generator seeded with `seed + e` (the official order), consecutive rows form the
steps. A stop, by Ctrl-C or by NaN, always falls between two steps.
"""

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.errors import AdapterError, InputError, TrainingDiverged
from lofit_lens.training.config import TrainConfig

logger = logging.getLogger(__name__)

LossOfRows = Callable[[Sequence[int]], Tensor]
Record = dict[str, float]
OnStep = Callable[[Record], None]


def row_order(n_rows: int, *, seed: int, epoch: int) -> list[int]:
    """Order in which an epoch visits the rows."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def train(
    module: nn.Module,
    n_rows: int,
    loss_of: LossOfRows,
    config: TrainConfig,
    *,
    seed: int,
    penalty: Callable[[], Tensor] | None = None,
    identity: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    label: str = "training",
    history: list[Record] | None = None,
) -> list[Record]:
    """Train a module's trainable parameters in place.

    Args:
        module: its parameters with `requires_grad` are updated.
        n_rows: number of training rows.
        loss_of: row indices -> scalar task loss with a graph.
        config: hyperparameters.
        seed: of the row order.
        penalty: scalar added as `config.l1 * penalty()`; None = nothing.
        identity: what this run is; a checkpoint of another run is refused.
        checkpoint: a file that holds the state at every epoch's end and at Ctrl-C; an existing one is resumed from,
            to the same numbers as a run that was never stopped. It is left in place at the end.
        on_step: called with every new step's record, after the step; after a resume with those that follow.
        progress: show a bar with loss, L1 and steps per second.
        label: text in front of the bar.
        history: an empty list to fill with the records as they come; None = a new one.

    Returns:
        One record a step: step (from 1), epoch (from 1), loss (without the penalty), l1 (raw sum), grad_norm, lr.

    Raises:
        TrainingDiverged: loss or gradient not finite; the module keeps the last good step's values, which are also
            written beside the checkpoint.
        InputError: `checkpoint` belongs to another run.
        KeyboardInterrupt: Ctrl-C, after the step in progress; a second Ctrl-C stops at once.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("nothing to train: no parameter of this module has requires_grad")
    if n_rows < 1:
        raise InputError("nothing to train on: 0 rows")
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    steps_per_epoch = -(-n_rows // config.batch_size)
    total = steps_per_epoch * config.epochs
    last = total if config.max_steps is None else min(total, config.max_steps)
    run = {"config": config.to_dict(), "seed": seed, "n_rows": n_rows, **(identity or {})}
    state = _State(module, optimizer, Path(checkpoint) if checkpoint is not None else None, run)
    history = [] if history is None else history
    history.extend(state.resume())
    order: list[int] = []
    with (
        first_ctrl_c() as interrupted,
        tqdm(total=last, initial=len(history), desc=label, disable=not progress, unit="step", leave=True) as bar,
    ):
        for step in range(len(history), last):
            epoch, place = divmod(step, steps_per_epoch)
            if place == 0 or not order:
                order = row_order(n_rows, seed=seed, epoch=epoch)
            rows = order[place * config.batch_size : (place + 1) * config.batch_size]
            lr = config.lr * (1 - step / total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(rows)
            l1 = penalty() if penalty is not None else loss.new_zeros(())
            (loss + config.l1 * l1).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            record = {
                "step": step + 1, "epoch": epoch + 1, "loss": loss.item(), "l1": l1.item(), "grad_norm": norm.item(), "lr": lr,
            }  # fmt: skip
            bad = next((n for n in ("loss", "l1", "grad_norm") if not abs(record[n]) < float("inf")), None)
            if bad is not None:
                raise state.diverged(bad, record, rows, history)
            optimizer.step()
            history.append(record)
            if on_step is not None:
                on_step(record)
            bar.update()
            bar.set_postfix({"loss": f"{record['loss']:.4f}"} | ({"L1": f"{record['l1']:.2f}"} if penalty else {}))
            if place == steps_per_epoch - 1 or step == last - 1 or interrupted():
                state.save(history)
            if interrupted():
                where = (
                    f"run it again to go on from {state.path}" if state.path else "give checkpoint=FILE to go on later"
                )
                raise KeyboardInterrupt(f"stopped after step {step + 1} of {last}; {where}")
    for p in parameters:
        p.grad = None
    return history


class _State:
    """Parameters, optimiser moments and history, in one safetensors file."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None, run: dict[str, Any]
    ) -> None:
        self.names = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer, self.path = optimizer, path
        self.run = json.loads(json.dumps(run))

    def save(self, history: list[Record], path: Path | None = None) -> None:
        path = path or self.path
        if path is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, p in self.names.items():
            tensors[f"parameter/{name}"] = p
            for key in ("exp_avg", "exp_avg_sq"):
                if key in self.optimizer.state[p]:
                    tensors[f"{key}/{name}"] = self.optimizer.state[p][key]
        io.save_tensors(path, tensors, {"state": json.dumps({"run": self.run, "history": history})})

    def resume(self) -> list[Record]:
        if self.path is None or not self.path.exists():
            return []
        tensors = io.load_tensors(self.path)
        record = json.loads(io.tensor_metadata(self.path).get("state", "{}"))
        run = record.get("run", {})
        if run != self.run:
            other = sorted(k for k in {*run, *self.run} if run.get(k) != self.run.get(k))
            raise InputError(
                f"{self.path} is the state of another run (it differs in {', '.join(other)}); "
                "remove it to start anew, or give another path"
            )
        history: list[Record] = record["history"]
        with torch.no_grad():
            for name, p in self.names.items():
                if f"parameter/{name}" not in tensors or tensors[f"parameter/{name}"].shape != p.shape:
                    raise AdapterError(
                        f"{self.path} lacks parameter {name} or has it in another shape; remove the file"
                    )
                p.copy_(tensors[f"parameter/{name}"])
                if f"exp_avg/{name}" in tensors:
                    self.optimizer.state[p] = {
                        "step": torch.tensor(float(len(history))),
                        "exp_avg": tensors[f"exp_avg/{name}"].to(p.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(p.device),
                    }
        logger.info("resumed from %s at step %d", self.path, len(history))
        return history

    def diverged(self, what: str, record: Record, rows: Sequence[int], history: list[Record]) -> TrainingDiverged:
        kept = ""
        if self.path is not None:
            good = self.path.with_name(f"{self.path.stem}.last_good{self.path.suffix}")
            self.save(history, good)
            kept = f" and written to {good}"
        return TrainingDiverged(
            f"{what} is {record[what]} at step {record['step']:.0f} (epoch {record['epoch']:.0f}), training rows "
            f"{list(rows)}; the values after step {len(history)} were kept (error.adapter){kept}. Try a lower learning rate than "
            f"{self.run['config']['lr']:g}, or look at those rows"
        )


@contextlib.contextmanager
def first_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is read between two steps; the second acts at once. Only the main thread can."""
    seen: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: Any) -> None:
        seen.append(True)
        signal.signal(signal.SIGINT, before)

    if before in (signal.SIG_IGN, None):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
