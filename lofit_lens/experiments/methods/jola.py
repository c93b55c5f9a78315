"""JoLA (arXiv 2502.01179): heads and edits learned together, by gates; see `training.jola`."""

from collections.abc import Sequence
from typing import Any

from lofit_lens.experiments.methods.base import Fit, Method, Outline, Workbench, rates
from lofit_lens.interventions import Lofit
from lofit_lens.training import TrainConfig
from lofit_lens.training.jola import fit_jola, jola_config


def _config(outline: Outline) -> TrainConfig:
    return jola_config(outline.info)


def _points(outline: Outline) -> Sequence[dict[str, Any]]:
    return rates(jola_config(outline.info))


def _fit(bench: Workbench, asked: Fit) -> Lofit:
    return fit_jola(
        bench.model, bench.task, seed=asked.seed, config=asked.config, n_train=bench.n_train, checkpoint=asked.checkpoint,
        on_step=asked.on_step, progress=False,
    )[0]  # fmt: skip


METHOD = Method("JoLA", _fit, _points, _config, cost=4.0, place=35)
