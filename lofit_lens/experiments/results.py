"""What a study's folder holds, read for figures and tables; nothing is trained here."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lofit_lens import io
from lofit_lens.errors import DataError, InputError, unknown
from lofit_lens.evaluation.result import EvalResult
from lofit_lens.experiments import store
from lofit_lens.experiments.methods import CHANCE as CHANCE_ROW
from lofit_lens.experiments.methods import LEARNED
from lofit_lens.experiments.plan import CHANCE, LOFIT, OWN, TRAINED, ZERO, wide_k
from lofit_lens.experiments.runs import MethodRuns, Run
from lofit_lens.experiments.study import KIND as STUDY_KIND
from lofit_lens.experiments.study import SCHEMA as STUDY_SCHEMA
from lofit_lens.experiments.study import read_scores
from lofit_lens.experiments.table import MethodTable
from lofit_lens.experiments.tuning import Tuned
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.models import ModelInfo
from lofit_lens.training.selectors import SELECTORS

COLUMNS = (
    "task", "tested", "method", "heads_from", "source", "k", "n_train", "seed", "draw", "metric", "value", "n_items",
    "n_parameters", "heads", "fit_seconds", "eval_seconds",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Results:
    """A study that was run (`run_study`), or as much of it as is there.

    Attributes:
        folder: where it lies.
        record: `study.json`.
        model: the model.
        tasks: names of the tasks, in the study's order.
        runs: one row a run, see `COLUMNS`: `task` was learned, `tested` was asked; `k` and `n_train` are NaN where they do not
            apply (all of the task's own training examples).
        evaluations: one a row of `runs`.
        folders: where each lies.
        scores: (task, selector, seed) -> head scores.
    """

    folder: Path
    record: dict[str, Any]
    model: ModelInfo
    tasks: tuple[str, ...]
    runs: pd.DataFrame
    evaluations: tuple[EvalResult, ...]
    folders: tuple[Path, ...]
    scores: dict[tuple[str, str, int], HeadScores]

    def k(self, task: str) -> int:
        """Usual number of heads of a task (the preset's)."""
        return int(self._task(task)["k"])

    def wide_k(self, task: str) -> int:
        """Number of heads of the 10 % setting."""
        return wide_k(self.k(task), self.model.n_layers * self.model.n_heads)

    def metric(self, task: str) -> str:
        """The task's own metric."""
        return str(self._task(task)["metric"])

    def _task(self, task: str) -> dict[str, Any]:
        known = {**self.record["other_tasks"], **self.record["tasks"]}
        if task not in known:
            raise unknown("task", task, known)
        return known[task]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of selection and fits."""
        return tuple(self.record["plan"]["seeds"])

    def rows(self, **wanted: Any) -> pd.DataFrame:
        """Rows of `runs` whose columns have these values (None: not set), by seed and draw; tested on their own task unless
        `tested` is given.

        Raises:
            InputError: no such column.
        """
        keep = np.ones(len(self.runs), dtype=bool)
        if "tested" not in wanted:
            keep &= (self.runs["tested"] == self.runs["task"]).to_numpy()
        for column, value in wanted.items():
            if column not in self.runs:
                raise unknown("column", column, COLUMNS)
            of = self.runs[column]
            keep &= (of.isna() if value is None else of == value).to_numpy()
        return self.runs.loc[keep].sort_values(["seed", "draw"], kind="stable")

    def values(self, rows: pd.DataFrame) -> Float[np.ndarray, "runs items"]:
        """Item scores (the task's own metric) of some rows of `runs`.

        Raises:
            InputError: no row, or rows of different items.
        """
        if not len(rows):
            raise InputError(f"no such run in {self.folder}; run the study's other parts too")
        listed = [self.evaluations[i] for i in rows.index]
        if len({(e.task, len(e.items)) for e in listed}) > 1:
            raise InputError("these runs were tested on different items")
        return np.array([e.items[m].to_numpy(dtype=float) for e, m in zip(listed, rows["metric"], strict=True)])

    def lofit(self, task: str, **wanted: Any) -> pd.DataFrame:
        """LoFiT's runs with the task's own heads by A-norm, usual K and all training examples, unless told otherwise."""
        return self.rows(**{
            "task": task, "method": LOFIT, "heads_from": OWN, "source": task, "k": self.k(task), "n_train": None, **wanted,
        })  # fmt: skip

    def by_chance(self, task: str) -> pd.DataFrame:
        """LoFiT's runs on random heads."""
        return self.lofit(task, heads_from=CHANCE, source="")

    def zero_shot(self, task: str) -> pd.DataFrame:
        """The unmodified model's run."""
        return self.rows(task=task, method=ZERO)

    def heads(self, task: str, by: str = OWN, seed: int | None = None, k: int | None = None) -> HeadSet:
        """The best heads of a task by a selector (first seed, usual K, unless told otherwise).

        Raises:
            InputError: no such scores.
        """
        at = (task, by, self.seeds[0] if seed is None else seed)
        if at not in self.scores:
            raise InputError(
                f"{self.folder} holds no head scores of {task} by {by} with seed {at[2]}; it has "
                + (", ".join(f"{t} by {b} seed {s}" for t, b, s in self.scores) or "none")
            )
        return self.scores[at].top(self.k(task) if k is None else k)

    def adapter(self, task: str, seed: int | None = None, *, k: int | None = None, model: Any = None) -> Lofit:
        """LoFiT's adapter on the task's own heads (first seed, usual K, unless told otherwise).

        Raises:
            InputError: no such run.
        """
        rows = self.lofit(task, seed=self.seeds[0] if seed is None else seed, k=self.k(task) if k is None else k)
        if not len(rows):
            raise InputError(f"{self.folder} holds no LoFiT run of {task}; run the study first")
        return Lofit.from_pretrained(self.folders[rows.index[0]] / "adapter", model=model)

    # ------------------------------------------------------------------------------------------------ tables

    def method_table(self, task: str) -> MethodTable | None:
        """The paper's Tables 1 and 3 on one task: LoFiT and the methods it is compared with; None where none ran."""
        named = {
            "zero-shot": self.zero_shot(task),
            **{m: self.rows(task=task, method=m, n_train=None) for m in ("ITI", "RepE")},
            CHANCE_ROW: self.by_chance(task),
            LEARNED: self.lofit(task),
            "LoFiT 10 %": self.lofit(task, k=self.wide_k(task)),
            **{m: self.rows(task=task, method=m, n_train=None) for m in TRAINED},
        }
        return self._table(f"methods {task}", named, LEARNED)

    def selector_table(self, task: str) -> MethodTable | None:
        """The paper's Table 2 on one task: heads by each selector, then offsets; None where none ran."""
        found = self.rows(task=task, method=LOFIT, k=self.k(task), n_train=None)
        selectors = [by for by in SELECTORS if by in set(found["heads_from"])]
        chosen = {by: self.lofit(task, heads_from=by, source="" if by == CHANCE else task) for by in selectors}
        named = {f"heads by {by}": rows for by, rows in chosen.items()}
        return self._table(f"selectors {task}", named, f"heads by {OWN}")

    @cached_property
    def _tables(self) -> dict[str, MethodTable]:
        return {}

    def _table(self, key: str, named: dict[str, pd.DataFrame], reference: str) -> MethodTable | None:
        """The table of these runs, worked out once."""
        if key in self._tables:
            return self._tables[key]
        runs = [
            MethodRuns(name, tuple(self._run(i) for i in rows.index), None if name == CHANCE_ROW else self._tuned(rows))
            for name, rows in named.items() if len(rows)
        ]  # fmt: skip
        if len(runs) < 2 or reference not in [m.method for m in runs]:
            return None
        self._tables[key] = MethodTable.of(runs, reference)
        return self._tables[key]

    def _run(self, i: Any) -> Run:
        record = io.read_json(self.folders[i] / "run.json")
        return Run(int(record["spec"]["seed"]), record["settings"], self.evaluations[i], **record["run"])

    def _tuned(self, rows: pd.DataFrame) -> Tuned | None:
        found = io.read_json(self.folders[rows.index[0]] / "run.json").get("tuned")
        if found is None:
            return None
        return Tuned(
            found["method"], found["task"], found["metric"], found["settings"], found["tried"], pd.DataFrame(found["trials"])
        )  # fmt: skip

    def damage(self, task: str) -> Float[np.ndarray, "seeds texts"] | None:
        """KL (nats a token) of LoFiT's adapters on ordinary text; None where not measured."""
        hurt = [self._run(i).damage for i in self.lofit(task).index]
        return np.array([h["kl"] for h in hurt if h]) if hurt and all(hurt) else None


def load_results(folder: str | Path) -> Results:
    """Read a study's folder.

    Raises:
        DataError: it holds no study, no run, or a damaged file (named).
    """
    folder = Path(folder)
    path = folder / "study.json"
    if not path.is_file():
        raise DataError(
            f"{folder} holds no study (no study.json); run one first: lofit-lens figures {folder} --run, or run_study(...)"
        )
    record = io.read_json(path)
    io.check_record(record, STUDY_KIND, STUDY_SCHEMA, ("model", "plan", "tasks", "other_tasks"), str(path))
    plan = record["plan"]
    rows, evaluations, folders = [], [], []
    for run, found in _run_folders(folder):
        spec = found["spec"]
        if spec["draw"] >= plan["draws"] if spec["heads_from"] == CHANCE else spec["seed"] not in plan["seeds"]:
            continue  # of an earlier call with more draws or other seeds
        result = EvalResult.load(run)
        metric = next(iter(result.metrics))
        rows.append({
            **{c: spec.get(c) for c in COLUMNS if c in spec}, "metric": metric, "value": result.metrics[metric].mean,
            "n_items": len(result.items), **{c: found["run"][c] for c in COLUMNS if c in found["run"]},
        })  # fmt: skip
        evaluations.append(result)
        folders.append(run)
    if not rows:
        raise DataError(f"{folder} holds no run yet; run the study: lofit-lens figures {folder} --run")
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    for column in ("k", "n_train"):
        frame[column] = frame[column].astype(float)
    return Results(
        folder, record, ModelInfo(**record["model"]), tuple(record["tasks"]), frame, tuple(evaluations), tuple(folders),
        read_scores(folder),
    )  # fmt: skip


def _run_folders(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Each run's folder with its run.json, by name."""
    found = []
    for path in sorted((folder / "runs").glob("*/run.json")):
        record = io.read_json(path)
        io.check_record(record, store.KIND, store.SCHEMA, ("spec", "run", "settings"), str(path))
        found.append((path.parent, record))
    return found
