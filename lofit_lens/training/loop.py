"""The only training loop: AdamW, linear decay to 0, global clip, last step kept. For one run, or for several side by side.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lofit_lens import io
from lofit_lens.checks import check_is, check_seed, shown
from lofit_lens.errors import AdapterError, InputError, TrainingDiverged
from lofit_lens.training.config import TrainConfig

logger = logging.getLogger(__name__)

LossOfRows = Callable[[Sequence[int]], Tensor]
Record = dict[str, float]
OnStep = Callable[[Record], None]
Share = tuple[int, Sequence[int]]  # a run's number, and the rows of its next step
StepOf = Callable[[Sequence[Share]], Sequence[Tensor]]


def row_order(n_rows: int, *, seed: int, epoch: int) -> list[int]:
    """Order in which an epoch visits the rows."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


@dataclass(eq=False)
class Run:
    """One training: what is learned, from how many rows, and how.

    Args:
        module: its parameters with `requires_grad` are updated.
        n_rows: number of training rows.
        config: hyperparameters.
        seed: of the row order.
        penalty: scalar added as `config.l1 * penalty()`; None = nothing.
        identity: what this run is; a checkpoint of another run is refused.
        on_step: called with every new step's record, after the step; after a resume with those that follow.
        history: an empty list to fill with the records as they come.

    Attributes:
        error: why it was stopped before its end, if it was; its module keeps the last good step's values.

    Raises:
        InputError: nothing to train, or no rows.
    """

    module: nn.Module
    n_rows: int
    config: TrainConfig
    seed: int
    penalty: Callable[[], Tensor] | None = None
    identity: dict[str, Any] | None = None
    on_step: OnStep | None = None
    history: list[Record] = field(default_factory=list)
    error: TrainingDiverged | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_is(self.config, TrainConfig, "config", "a TrainConfig(lr=...)")
        check_seed(self.seed)
        if self.on_step is not None and not callable(self.on_step):
            raise InputError(f"on_step is {shown(self.on_step)}; give a function that takes a step's record")
        self.learned = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if not self.learned:
            raise InputError("nothing to train: no parameter of this module has requires_grad")
        if self.n_rows < 1:
            raise InputError("nothing to train on: 0 rows")
        c = self.config
        self.optimizer = torch.optim.AdamW(
            self.learned.values(), lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )
        self.steps_per_epoch = -(-self.n_rows // c.batch_size)
        self.total = self.steps_per_epoch * c.epochs
        self.last = self.total if c.max_steps is None else min(self.total, c.max_steps)
        self._order: tuple[int, list[int]] | None = None

    @property
    def what(self) -> dict[str, Any]:
        """What tells it from other runs, as JSON has it."""
        known = {"config": self.config.to_dict(), "seed": self.seed, "n_rows": self.n_rows, **(self.identity or {})}
        return json.loads(json.dumps(known))

    @property
    def ended(self) -> bool:
        """All steps are done, or it diverged."""
        return self.error is not None or len(self.history) >= self.last

    @property
    def at_epoch_end(self) -> bool:
        """The last step done was an epoch's last one, or the last of all."""
        return len(self.history) % self.steps_per_epoch == 0 or len(self.history) == self.last

    def rows(self) -> list[int]:
        """Rows of the next step."""
        epoch, place = divmod(len(self.history), self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, row_order(self.n_rows, seed=self.seed, epoch=epoch))
        return self._order[1][place * self.config.batch_size : (place + 1) * self.config.batch_size]

    def begin(self) -> None:
        """Set the learning rate of the next step and drop old gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def _lr(self) -> float:
        return self.config.lr * (1 - len(self.history) / self.total)

    def clipped(self) -> tuple[Tensor, Tensor]:
        """Add the penalty's gradient to the loss's, and clip; raw penalty and gradient norm before the clip."""
        some = next(iter(self.learned.values()))
        l1 = some.new_zeros(()) if self.penalty is None else self.penalty()
        if self.penalty is not None:
            (self.config.l1 * l1).backward()
        return l1.detach(), torch.nn.utils.clip_grad_norm_(self.learned.values(), self.config.clip)

    def finish(self, loss: float, l1: float, norm: float) -> str | None:
        """Take the step and keep its record; the name of a value that is not finite, and then no step."""
        done = len(self.history)
        record = {
            "step": done + 1, "epoch": done // self.steps_per_epoch + 1, "loss": loss, "l1": l1, "grad_norm": norm,
            "lr": self._lr,
        }  # fmt: skip
        bad = next((n for n in ("loss", "l1", "grad_norm") if not abs(record[n]) < float("inf")), None)
        if bad is not None:
            self.error = TrainingDiverged(
                f"{bad} is {record[bad]} at step {done + 1} (epoch {record['epoch']}), training rows {self.rows()}; "
                + (
                    f"the values after step {done} were kept (error.adapter). Try a lower learning rate than "
                    f"{self.config.lr:g}, or look at those rows"
                    if done
                    else "nothing was learned yet, so look at those rows and at the model"
                )
            )
            return bad
        self.optimizer.step()
        self.history.append(record)
        if self.on_step is not None:
            self.on_step(record)
        return None


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
) -> list[Record]:
    """Train a module's trainable parameters in place.

    Args:
        module: see `Run`, as for `n_rows`, `config`, `seed`, `penalty`, `identity` and `on_step`.
        n_rows: number of training rows.
        loss_of: row indices -> scalar task loss with a graph.
        config: hyperparameters.
        seed: of the row order.
        penalty: scalar added as `config.l1 * penalty()`.
        identity: what this run is.
        checkpoint: see `train_together`.
        on_step: called with every new step's record.
        progress: show a bar with loss, L1 and steps per second.
        label: text in front of the bar.

    Returns:
        One record a step: step (from 1), epoch (from 1), loss (without the penalty), l1 (raw sum), grad_norm, lr.

    Raises:
        TrainingDiverged: loss or gradient not finite; the module keeps the last good step's values, which are also
            written beside the checkpoint.
        InputError: `checkpoint` belongs to another run.
        KeyboardInterrupt: Ctrl-C, after the step in progress; a second Ctrl-C stops at once.
    """

    def step_of(shares: Sequence[Share]) -> list[Tensor]:
        loss = loss_of(shares[0][1])
        loss.backward()
        return [loss.detach()]

    run = Run(module, n_rows, config, seed, penalty, identity, on_step)
    train_together([run], step_of, checkpoint=checkpoint, progress=progress, label=label)
    if run.error is not None:
        raise run.error
    return run.history


def train_together(
    runs: Sequence[Run],
    step_of: StepOf,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    label: str = "training",
) -> None:
    """Take the steps of several runs side by side, each with its own rows, schedule, clip and end.

    Args:
        runs: what to train; histories are filled. A run that diverges stops with its `error`, the others go on.
        step_of: the next rows of each run that is not at its end -> its task loss. It runs the backward pass, too.
        checkpoint: a file that holds the state of all runs at an epoch's end (of the first run that is not at its end) and at
            Ctrl-C; an existing one is resumed from, to the same numbers as if never stopped. It is left in place at the end.
        progress: show a bar with loss, L1 and steps per second.
        label: text in front of the bar.

    Raises:
        InputError: `checkpoint` belongs to other runs.
        KeyboardInterrupt: Ctrl-C, after the step in progress; a second Ctrl-C stops at once.
    """
    for run in runs:
        check_gradients(*run.learned.values())
    check_is(checkpoint, (str, Path, type(None)), "checkpoint", "the name of a file")
    state = _State(runs, Path(checkpoint) if checkpoint is not None else None)
    state.resume()
    longest = max(runs, key=lambda r: r.last)
    with (
        torch.enable_grad(),  # whatever was switched off around: nothing else here keeps a graph
        first_ctrl_c() as interrupted,
        tqdm(total=longest.last, initial=len(longest.history), desc=label, disable=not progress, unit="step") as bar,
    ):
        while going := [i for i, run in enumerate(runs) if not run.ended]:
            for i in going:
                runs[i].begin()
            losses = step_of([(i, runs[i].rows()) for i in going])
            values = [x for i, loss in zip(going, losses, strict=True) for x in (loss, *runs[i].clipped())]
            # One wait for the device a step.
            found = torch.stack([x.to(values[0].device) for x in values]).view(-1, 3).tolist()
            for i, (loss, l1, norm) in zip(going, found, strict=True):
                if runs[i].finish(loss, l1, norm) is not None:
                    state.diverged(i)
            bar.update(len(longest.history) - bar.n)
            loss, l1, _ = (sum(column) / len(going) for column in zip(*found, strict=True))
            bar.set_postfix({"loss": f"{loss:.4f}"} | ({"L1": f"{l1:.2f}"} if l1 else {}))
            stop = interrupted()
            if stop or runs[going[0]].at_epoch_end:
                state.save()
            if stop:
                where = (
                    f"run it again to go on from {state.path}" if state.path else "give checkpoint=FILE to go on later"
                )
                raise KeyboardInterrupt(f"stopped after step {len(longest.history)} of {longest.last}; {where}")
    for run in runs:
        run.optimizer.zero_grad(set_to_none=True)


def check_gradients(*tensors: Tensor) -> None:
    """Raise InputError under `torch.inference_mode()`, or where one of these was made under it: no gradient goes through."""
    if torch.is_inference_mode_enabled():
        raise InputError("gradients are needed, and torch.inference_mode() forbids them: leave its block first")
    if any(t.is_inference() for t in tensors):
        raise InputError(
            "this was made under torch.inference_mode(), so that no gradient goes through it: make it outside"
        )


class _State:
    """Parameters, optimiser moments and histories of all runs, in one safetensors file."""

    def __init__(self, runs: Sequence[Run], path: Path | None) -> None:
        self.runs, self.path = runs, path

    def save(self) -> None:
        if self.path is not None:
            self._write(self.path, range(len(self.runs)))

    def _write(self, path: Path, numbers: Sequence[int]) -> None:
        tensors: dict[str, Tensor] = {}
        for i in numbers:
            for name, p in self.runs[i].learned.items():
                tensors[f"{i}/parameter/{name}"] = p
                kept = self.runs[i].optimizer.state[p]
                tensors |= {f"{i}/{key}/{name}": kept[key] for key in ("exp_avg", "exp_avg_sq") if key in kept}
        listed = [
            {"run": self.runs[i].what, "history": self.runs[i].history, "error": str(self.runs[i].error or "")}
            for i in numbers
        ]
        io.save_tensors(path, tensors, {"state": json.dumps(listed)})

    def resume(self) -> None:
        if self.path is None or not self.path.exists():
            return
        tensors = io.load_tensors(self.path)
        listed = json.loads(io.tensor_metadata(self.path).get("state", "[]"))
        was, now = [r["run"] for r in listed], [r.what for r in self.runs]
        if was != now:
            other = sorted({k for a, b in zip(was, now, strict=False) for k in {*a, *b} if a.get(k) != b.get(k)})
            differ = ", ".join(other) if len(was) == len(now) else f"{len(was)} runs, not {len(now)}"
            raise InputError(
                f"{self.path} is the state of another run (it differs in {differ}); "
                "remove it to start anew, or give another path"
            )
        for i, (run, record) in enumerate(zip(self.runs, listed, strict=True)):
            self._resume(i, run, record, tensors)
        logger.info("resumed from %s at step %d", self.path, max(len(run.history) for run in self.runs))

    @torch.no_grad()
    def _resume(self, i: int, run: Run, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, p in run.learned.items():
            found = tensors.get(f"{i}/parameter/{name}")
            if found is None or found.shape != p.shape:
                raise AdapterError(f"{self.path} lacks parameter {name} or has it in another shape; remove the file")
            p.copy_(found)
            if f"{i}/exp_avg/{name}" in tensors:
                moments = {key: tensors[f"{i}/{key}/{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
                run.optimizer.state[p] = {"step": torch.tensor(float(len(record["history"]))), **moments}
        run.history.extend(record["history"])
        run.error = TrainingDiverged(record["error"]) if record["error"] else None

    def diverged(self, i: int) -> None:
        """Keep the last good values of a run beside the checkpoint."""
        run = self.runs[i]
        if self.path is not None and run.error is not None:
            which = f".{i}" if len(self.runs) > 1 else ""
            good = self.path.with_name(f"{self.path.stem}{which}.last_good{self.path.suffix}")
            self._write(good, [i])
            run.error = TrainingDiverged(f"{run.error} (also written to {good})")


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
