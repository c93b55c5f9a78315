"""Trackers: Weights & Biases or TensorBoard read the records of training's steps, and metrics at the end.

Training does not depend on them: it calls `on_step`, and results are byte for byte the same with and without a tracker. A
tracker that fails (no network, a full disk) is dropped with one warning, and training continues.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lofit_lens.checks import optional
from lofit_lens.errors import unknown
from lofit_lens.training.loop import Record

logger = logging.getLogger(__name__)

TRACKERS = ("wandb", "tensorboard")
PATIENCE = 60  # seconds that wandb gets to reach its server, at the start and at the end


@runtime_checkable
class Tracker(Protocol):
    """An experiment tracker. A stopped run is started again under its name and continues with the next steps."""

    def start(self, name: str, config: dict[str, Any]) -> None:
        """Begin or continue a run; `config` is JSON-able."""

    def step(self, record: Record) -> None:
        """Log one step's record (step, epoch, loss, l1, grad_norm, lr)."""

    def finish(self, metrics: Mapping[str, float] | None) -> None:
        """End the run with its metrics; None = it was stopped before its end."""


def tracker(kind: str, folder: str | Path, *, project: str = "lofit-lens") -> Tracker:
    """Make a tracker by name.

    Args:
        kind: `"wandb"` or `"tensorboard"`.
        folder: where it writes; TensorBoard gets one sub-folder per run.
        project: wandb's project.

    Raises:
        InputError: an unknown kind, or its package is not installed.
    """
    if kind not in TRACKERS:
        raise unknown("tracker", kind, TRACKERS)
    package = optional("wandb" if kind == "wandb" else "torch.utils.tensorboard", kind, kind)
    return _Wandb(package, Path(folder), project) if kind == "wandb" else _TensorBoard(package, Path(folder))


class Tracked:
    """One tracked run: pass it as `on_step`, and set `metrics` at the end."""

    def __init__(self, reader: Tracker | None) -> None:
        self.reader = reader
        self.metrics: dict[str, float] = {}

    def __call__(self, record: Record) -> None:
        """Log one step's record."""
        self.tell("step", dict(record))

    def tell(self, what: str, *arguments: Any) -> None:
        """Call the tracker's `start`, `step` or `finish`; after a failure, do nothing."""
        if self.reader is None:
            return
        try:
            getattr(self.reader, what)(*arguments)
        except Exception as e:
            logger.warning(
                "the tracker %s failed (%s: %s); the run continues without it",
                type(self.reader).__name__.strip("_"), type(e).__name__, e,
            )  # fmt: skip
            failed, self.reader = self.reader, None
            if what != "finish":
                with contextlib.suppress(Exception):
                    failed.finish(None)


@contextlib.contextmanager
def tracked(reader: Tracker | None, name: str, config: Mapping[str, Any]) -> Iterator[Tracked]:
    """Track a run (not at all if `reader` is None): `with tracked(...) as run: tune_offsets(..., on_step=run)`.

    Args:
        reader: made by `tracker`, or your own.
        name: of the run; the same when it is resumed.
        config: description of the run, JSON-able.
    """
    run = Tracked(reader)
    run.tell("start", name, dict(config))
    try:
        yield run
    except BaseException:
        run.tell("finish", None)
        raise
    run.tell("finish", run.metrics)


class _Wandb:
    """Weights & Biases; the run's name is its id, so a resumed run continues the same chart."""

    def __init__(self, wandb: Any, folder: Path, project: str) -> None:
        self.wandb, self.folder, self.project = wandb, folder, project
        self.run: Any = None

    def start(self, name: str, config: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        quiet = self.wandb.Settings(
            silent=True, console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE, reinit="create_new"
        )
        self.run = self.wandb.init(
            project=self.project, id=_plain(name), name=name, config=config, resume="allow", dir=str(self.folder),
            settings=quiet,
        )  # fmt: skip

    def step(self, record: Record) -> None:
        self.run.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    def finish(self, metrics: Mapping[str, float] | None) -> None:
        if self.run is not None:
            self.run.summary.update(dict(metrics or {}))
            self.run.finish(exit_code=1 if metrics is None else 0)


class _TensorBoard:
    """Event files in a folder of the run's name; steps that a killed run had beyond its checkpoint are hidden on resume."""

    def __init__(self, tensorboard: Any, folder: Path) -> None:
        self.tensorboard, self.folder = tensorboard, folder
        self.writer: Any = None
        self.last = 0

    def start(self, name: str, config: dict[str, Any]) -> None:
        self.place, self.config = self.folder / _plain(name), config

    def step(self, record: Record) -> None:
        self.last = int(record["step"])
        writer = self._open(self.last)
        for name, value in record.items():
            if name != "step":
                writer.add_scalar(f"train/{name}", value, self.last)

    def finish(self, metrics: Mapping[str, float] | None) -> None:
        if metrics:
            for name, value in metrics.items():
                self._open(None).add_scalar(f"metrics/{name}", value, self.last)
        if self.writer is not None:
            self.writer.close()

    def _open(self, step: int | None) -> Any:
        if self.writer is None:
            self.writer = self.tensorboard.SummaryWriter(str(self.place), purge_step=step, flush_secs=30)
            self.writer.add_text("config", f"```json\n{json.dumps(self.config, indent=2)}\n```")
        return self.writer


def _plain(name: str) -> str:
    """Turn a name into one that is valid for a folder and as a wandb id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-128:]
