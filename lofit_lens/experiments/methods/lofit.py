"""LoFiT's step 2 (arXiv 2406.01563, section 3): offsets on the heads that a run names, with the preset's settings.

The learning rate may be chosen; this is done on the task's own heads with the preset's K, for all of its runs.
"""

from collections.abc import Sequence
from typing import Any

from lofit_lens.experiments.methods.base import Fit, Method, Outline, Workbench, rates
from lofit_lens.interventions import Lofit
from lofit_lens.training import LofitRun, TrainConfig, tune_offsets


def _config(outline: Outline) -> TrainConfig:
    return outline.preset.tune


def _points(outline: Outline) -> Sequence[dict[str, Any]]:
    return rates(outline.preset.tune)


def _joint(bench: Workbench, asked: Fit) -> LofitRun:
    return LofitRun(
        bench.task, "v", asked.heads, seed=asked.seed, config=asked.config, n_train=bench.n_train, on_step=asked.on_step
    )


def _fit(bench: Workbench, asked: Fit) -> Lofit:
    return tune_offsets(
        bench.model, bench.task, asked.heads, seed=asked.seed, config=asked.config, n_train=bench.n_train,
        checkpoint=asked.checkpoint, on_step=asked.on_step, progress=False,
    )  # fmt: skip


METHOD = Method(
    "LoFiT", _fit, _points, _config, heads="chosen", joint=_joint, place=30, control_rows=("random heads", "all heads")
)
