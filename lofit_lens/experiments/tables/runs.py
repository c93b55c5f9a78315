"""What a row of a table is made from: a method's fits, one a seed."""

from dataclasses import dataclass
from typing import Any

from lofit_lens.evaluation.result import EvalResult
from lofit_lens.experiments.methods.choice import Tuned


@dataclass(frozen=True, eq=False)
class FitResult:
    """One fit and its evaluation.

    Attributes:
        seed: seed of the fit (draw of rows, init, row order; random heads: of the draw of heads too).
        settings: given, or chosen for the method.
        result: on the evaluated split.
        n_parameters: numbers learned or estimated that the method adds to the model.
        fit_seconds: selection or probing included, choice of settings and loading not.
        eval_seconds: of the task alone.
        damage: per text `kl`, `cross_entropy` and `cross_entropy_base` in nats; None where not measured.
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
    """A method's fits, one a seed, and how its settings were chosen (None: given, taken over, or by each run: `by_run`)."""

    method: str
    runs: tuple[FitResult, ...]
    tuned: Tuned | None = None
    by_run: bool = False
