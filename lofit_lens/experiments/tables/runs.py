"""The data of one row of a table: a method's fits, one per seed."""

from dataclasses import dataclass
from typing import Any

from lofit_lens.evaluation.result import EvalResult
from lofit_lens.experiments.methods.choice import Tuned


@dataclass(frozen=True, eq=False)
class FitResult:
    """One fit and its evaluation.

    Attributes:
        seed: seed of the fit (drawn rows, initialization, row order; for random heads, the draw of heads too).
        settings: given, or chosen for the method.
        result: the result on the evaluated split.
        n_parameters: numbers learned or estimated that the method adds to the model.
        fit_seconds: seconds of the fit, including selection or probing but not the choice of settings and loading.
        eval_seconds: seconds of the evaluation on the task only.
        damage: per text `kl`, `cross_entropy` and `cross_entropy_base` in nats; None if not measured.
        heads: edited heads, for methods that edit heads.
    """

    seed: int
    settings: dict[str, Any]
    result: EvalResult
    n_parameters: int
    fit_seconds: float
    eval_seconds: float
    damage: dict[str, list[float]] | None = None
    heads: str = ""


@dataclass(frozen=True, eq=False)
class MethodRuns:
    """A method's fits, one per seed, and how its settings were chosen (None = given, reused, or by each run: `by_run`)."""

    method: str
    runs: tuple[FitResult, ...]
    tuned: Tuned | None = None
    by_run: bool = False
