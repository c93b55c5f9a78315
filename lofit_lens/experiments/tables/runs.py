"""What a comparison computes: each method's runs, one a seed, and how they are kept in a store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofit_lens.evaluation.result import EvalResult
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tuning import Tuned
from lofit_lens.heads import HeadScores
from lofit_lens.interventions import Intervention

DAMAGE_COLUMNS = ("kl", "cross_entropy", "cross_entropy_base")


@dataclass(frozen=True, eq=False)
class Run:
    """One fit and its evaluation.

    Attributes:
        seed: of the fit (draw of rows, init, row order; random heads: of the draw of heads too).
        settings: what was chosen for the method.
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
    """A method's runs, one a seed, and how its settings were chosen (None: they were given)."""

    method: str
    runs: tuple[Run, ...]
    tuned: Tuned | None = None


def save_run(
    root: str | Path, spec: dict[str, Any], result: EvalResult, *, adapter: Intervention | None = None,
    scores: HeadScores | None = None, more: dict[str, Any] | None = None, timing: dict[str, float] | None = None,
) -> Path:  # fmt: skip
    """Put a run into a store, whole or not at all; returns its folder. `more` joins run.json, `timing` timing.json.

    Raises:
        InputError: the folder is no store, or cannot be written to.
    """
    store, cell = Store(root), _cell(spec)
    with store.claim(cell.name), store.new(cell) as draft:
        result.write_into(draft.path)
        if scores is not None:
            scores.save(draft.path / "scores.json")
        if adapter is not None:
            adapter.save_pretrained(draft.path / "adapter")
        draft.record |= {"result": result.to_dict(), **(more or {})}
        draft.timing |= timing or {}
    return store.folder(cell.name)


def load_run(root: str | Path, spec: dict[str, Any]) -> tuple[EvalResult, dict[str, Any], dict[str, Any]] | None:
    """Evaluation, run.json and timing.json of a run that is in a store; None where it is not.

    Raises:
        InputError: the folder is no store.
        DataError: the run is damaged.
    """
    store, name = Store(root), _cell(spec).name
    if not store.done(name):
        return None
    return EvalResult.load(store.folder(name)), store.read(name), store.timing(name)


def _cell(spec: dict[str, Any]) -> Cell:
    """The run as a cell: task, method and seed in front."""
    return Cell(" ".join(str(spec[k]) for k in ("task", "method", "seed") if k in spec), spec)
