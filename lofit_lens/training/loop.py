"""The only training loop: AdamW, a learning rate that falls to 0, global clip, last step kept. For one adapter, or for several.

It knows rows only by their index; the caller defines rows and their loss. Epoch e visits the rows in
the order `torch.randperm(n)` of a generator seeded with `seed + e` (the official order); consecutive rows form the
steps. A stop, by Ctrl-C or by NaN, always falls between two steps.
"""

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_is, check_seed, check_whole, shown
from lofit_lens.errors import AdapterError, InputError, TrainingDiverged
from lofit_lens.progress import tqdm
from lofit_lens.training.config import TrainConfig

logger = logging.getLogger(__name__)

Record = dict[str, float]
OnStep = Callable[[Record], None]
Share = tuple[int, Sequence[int]]  # a training's number, and the rows of its next step
StepOf = Callable[[Sequence[Share]], Sequence[Tensor]]


def row_order(n_rows: int, *, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch visits the rows."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


@dataclass(frozen=True, eq=False)
class FitSpec:
    """One requested training; see `training.fit` for the meaning of its fields."""

    adapter: Any
    task: Any  # the loop does not use it
    config: TrainConfig
    seed: int
    n_train: int | None = None
    penalty: Callable[[], Tensor] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    on_step: OnStep | None = None
    order: Sequence[Sequence[int]] | None = None
    reference: Float[Tensor, "rows 2"] | None = None


class Training:
    """One fit under way: its rows, optimizer, schedule and records.

    Args:
        asked: what to learn and how; parameters of its adapter with `requires_grad` are updated.
        n_rows: number of training rows.
        identity: what this training is, besides config, seed, rows and order; a checkpoint of another one is refused.

    Attributes:
        history: one record per step taken.
        error: why it stopped before its end, if it did; the adapter keeps the last good step's values.

    Raises:
        InputError: nothing to train, no rows, a row order that does not fit, or a schedule shorter than the training.
    """

    def __init__(self, asked: FitSpec, n_rows: int, identity: Mapping[str, Any]) -> None:
        check_is(asked.config, TrainConfig, "config", "a TrainConfig(lr=...)")
        check_seed(asked.seed)
        if asked.on_step is not None and not callable(asked.on_step):
            raise InputError(f"on_step is {shown(asked.on_step)}; give a function that takes a step's record")
        self.asked, self.config, self.n_rows = asked, asked.config, n_rows
        self.history: list[Record] = []
        self.error: TrainingDiverged | None = None
        self.learned = {n: p for n, p in asked.adapter.named_parameters() if p.requires_grad}
        if not self.learned:
            raise InputError("nothing to train: no parameter of this module has requires_grad")
        if n_rows < 1:
            raise InputError("nothing to train on: 0 rows")
        c = self.config
        self.optimizer = torch.optim.AdamW(
            self.learned.values(), lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )
        each = n_rows if asked.order is None else _checked(asked.order, n_rows, c.epochs)
        self.steps_per_epoch = -(-each // c.batch_size)
        total = self.steps_per_epoch * c.epochs
        self.last = total if c.max_steps is None else min(total, c.max_steps)
        self.span = c.schedule_steps or total
        if self.span < self.last:
            raise InputError(
                f"the learning rate is 0 after schedule_steps={self.span} of {self.last} steps; give a longer schedule, or "
                f"max_steps={self.span}"
            )
        self._order: tuple[int, Sequence[int]] | None = None
        known = {"config": c.to_dict(), "seed": asked.seed, "n_rows": n_rows, **identity}
        if asked.order is not None:
            known["order"] = io.digest([[int(row) for row in rows] for rows in asked.order])
        self.what: dict[str, Any] = json.loads(json.dumps(known))  # as JSON has it

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or it diverged."""
        return self.error is not None or len(self.history) >= self.last

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step taken was an epoch's last, or the last of all."""
        return len(self.history) % self.steps_per_epoch == 0 or len(self.history) == self.last

    def rows(self) -> Sequence[int]:
        """Rows of the next step."""
        epoch, place = divmod(len(self.history), self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            given = self.asked.order
            self._order = (
                epoch,
                row_order(self.n_rows, seed=self.asked.seed, epoch=epoch) if given is None else given[epoch],
            )
        return self._order[1][place * self.config.batch_size : (place + 1) * self.config.batch_size]

    def begin(self) -> None:
        """Set the next step's learning rate, drop old gradients, and tell the adapter which step it is, if it wants to know."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self.optimizer.zero_grad(set_to_none=True)
        if (tell := getattr(self.asked.adapter, "begin_step", None)) is not None:
            tell(len(self.history))

    @property
    def _lr(self) -> float:
        return self.config.lr_at(len(self.history), self.span)

    def clipped(self) -> tuple[Tensor, Tensor]:
        """Add the penalty's gradient to the loss's, and clip; return the raw penalty and the gradient norm before clipping."""
        some, penalty = next(iter(self.learned.values())), self.asked.penalty
        l1 = some.new_zeros(()) if penalty is None else penalty()
        if penalty is not None:
            (self.config.l1 * l1).backward()
        return l1.detach(), torch.nn.utils.clip_grad_norm_(self.learned.values(), self.config.clip)

    def finish(self, loss: float, l1: float, norm: float) -> str | None:
        """Take the step and keep its record; if a value is not finite, take no step and return the value's name."""
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
        if self.asked.on_step is not None:
            self.asked.on_step(record)
        return None


def _checked(order: Sequence[Sequence[int]], n_rows: int, epochs: int) -> int:
    """Return how many rows each epoch of a given order visits.

    Raises:
        InputError: not one list for each epoch, empty lists or lists of different lengths, or a row that does not exist.
    """
    lists = isinstance(order, Sequence) and all(isinstance(rows, Sequence) for rows in order)
    sizes = {len(rows) for rows in order} if lists else {0}
    if len(sizes) != 1 or 0 in sizes or len(order) != epochs:
        raise InputError(
            f"order is {shown(order)}; give {epochs} lists of rows (one for each epoch), all of equal length"
        )
    for rows in order:
        for row in rows:
            check_whole(0, n_rows - 1, **{"a row of order": row})
    return sizes.pop()


def train_together(
    runs: Sequence[Training],
    step_of: StepOf,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    label: str = "training",
) -> None:
    """Take the steps of several runs side by side, each with its own rows, schedule, clip and end.

    Args:
        runs: what to train; histories are filled. A run that diverges stops with its `error`; the others continue.
        step_of: the next rows of each unfinished run -> its task loss. It also runs the backward pass.
        checkpoint: a file with the state of all runs at an epoch's end (of the first unfinished run) and at
            Ctrl-C. Training resumes from an existing one, with the same numbers as if never stopped. It stays at the end.
        progress: show a bar with loss, L1 and steps per second.
        label: text before the bar.

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
        torch.enable_grad(),  # even if the caller switched it off: nothing else here keeps a graph
        first_ctrl_c() as interrupted,
        tqdm(total=longest.last, initial=len(longest.history), desc=label, disable=not progress, unit="step") as bar,
    ):
        while going := [i for i, run in enumerate(runs) if not run.ended]:
            for i in going:
                runs[i].begin()
            losses = step_of([(i, runs[i].rows()) for i in going])
            values = [x for i, loss in zip(going, losses, strict=True) for x in (loss, *runs[i].clipped())]
            # One wait for the device per step.
            found = rearrange(
                torch.stack([x.to(values[0].device) for x in values]), "(run value) -> run value", value=3
            ).tolist()
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
                    f"run it again to resume from {state.path}"
                    if state.path
                    else "give checkpoint=FILE to resume later"
                )
                raise KeyboardInterrupt(f"stopped after step {len(longest.history)} of {longest.last}; {where}")
    for run in runs:
        run.optimizer.zero_grad(set_to_none=True)


def check_gradients(*tensors: Tensor) -> None:
    """Raise InputError under `torch.inference_mode()`, or if one of these was made under it: no gradient goes through."""
    if torch.is_inference_mode_enabled():
        raise InputError("gradients are needed, and torch.inference_mode() forbids them: leave its block first")
    if any(t.is_inference() for t in tensors):
        raise InputError("this was made under torch.inference_mode(), so no gradient goes through it: make it outside")


class _State:
    """Parameters, optimizer moments and histories of all runs, in one safetensors file."""

    def __init__(self, runs: Sequence[Training], path: Path | None) -> None:
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
                "remove it to start again, or give another path"
            )
        for i, (run, record) in enumerate(zip(self.runs, listed, strict=True)):
            self._resume(i, run, record, tensors)
        logger.info("resumed from %s at step %d", self.path, max(len(run.history) for run in self.runs))

    @torch.no_grad()
    def _resume(self, i: int, run: Training, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
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
    """Turn the first Ctrl-C into a flag that is read between two steps; the second acts at once. Only for the main thread."""
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
