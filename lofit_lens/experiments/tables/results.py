"""Results of the grids in a store, for figures and tables; nothing is trained here."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

from lofit_lens import io
from lofit_lens.errors import InputError, unknown
from lofit_lens.evaluation.result import EvalResult, table_html
from lofit_lens.experiments.grid.compute import READINGS, choice
from lofit_lens.experiments.grid.expand import TOGETHER
from lofit_lens.experiments.grid.specs import heads_of
from lofit_lens.experiments.methods import METHODS, Method, lofit, zero_shot
from lofit_lens.experiments.methods.base import ALL, MATCHED, OWN, RANDOM
from lofit_lens.experiments.methods.choice import Tuned
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.runs import FitResult, MethodRuns
from lofit_lens.experiments.tables.table import MethodTable
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.html import wrapped
from lofit_lens.interventions import Lofit
from lofit_lens.models import ModelInfo
from lofit_lens.training.selectors import SELECTORS

COLUMNS = (
    "task", "tested", "method", "heads_from", "source", "k", "n_train", "seed", "draw", "metric", "value", "n_items",
    "n_parameters", "heads", "fit_seconds", "eval_seconds", "trained",
)  # fmt: skip
LOFIT, ZERO = lofit.METHOD.name, zero_shot.METHOD.name
ASKED = ("task", "tested", "method", "heads_from", "source", "k", "n_train", "seed", "draw")  # distinguish runs


@dataclass(frozen=True, eq=False)
class Results:
    """Results of grids (`run_grid`), which may be incomplete.

    Attributes:
        folder: the store.
        record: the joint record of the grids: `seeds`, `draws`, `limit`, `tasks`, `other_tasks`, `versions`.
        model: the model.
        tasks: names of the tasks, in the grids' order.
        runs: one row per run, see `COLUMNS`: `task` was trained on, `tested` was evaluated; `k` is NaN for methods without heads,
            `n_train` where all training examples of the task were used.
        evaluations: one per row of `runs`.
        folders: folder of each run.
        scores: (task, selection, seed) -> head scores.
    """

    folder: Path
    record: dict[str, Any]
    model: ModelInfo
    tasks: tuple[str, ...]
    runs: pd.DataFrame
    evaluations: tuple[EvalResult, ...]
    folders: tuple[Path, ...]
    scores: dict[tuple[str, str, int], HeadScores]

    def __repr__(self) -> str:
        return wrapped(f"Results({self.folder}: {len(self.runs)} runs of {self.model.name} on {', '.join(self.tasks)})")

    def _repr_html_(self) -> str:
        counts: Any = (
            self.runs.assign(heads_from=self.runs["heads_from"].fillna(""))
            .groupby(["method", "heads_from", "task"])
            .size()
        )
        rows = [
            (f"{method} on {heads}" if heads else method, *(str(counts.get((method, heads, t), 0)) for t in self.tasks))
            for method, heads in counts.droplevel("task").index.unique()
        ]
        return table_html(repr(self), ("runs", *self.tasks), rows, [f"seeds {', '.join(map(str, self.seeds))}"])

    def k(self, task: str) -> int:
        """Return a task's usual number of heads: the preset's, or the first one in the grids if they lack it."""
        usual = int(self._task(task)["k"])
        asked = [
            int(row["k"]) for row in self.record["cells"].values()
            if row["kind"] == "fit" and row["n_train"] is None
            and (row["task"], row["method"], row.get("heads_from"), row.get("source")) == (task, LOFIT, OWN, task)
        ]  # fmt: skip
        return usual if usual in asked or not asked else asked[0]

    def wide_k(self, task: str) -> int:
        """Return the number of heads of the 10 % setting."""
        return heads_of("3K", int(self._task(task)["k"]), self.model.grid.n_total)

    def metric(self, task: str) -> str:
        """Return the task's main metric."""
        return str(self._task(task)["metric"])

    def _task(self, task: str) -> dict[str, Any]:
        known = {**self.record["other_tasks"], **self.record["tasks"]}
        if task not in known:
            raise unknown("task", task, known)
        return known[task]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of selection and fits."""
        return tuple(self.record["seeds"])

    def rows(self, **wanted: Any) -> pd.DataFrame:
        """Return the rows of `runs` with these values (None: not set), sorted by seed and draw.

        Without `tested`, only tests on the task itself are returned.

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
        """Return the item scores (the task's main metric) of some rows of `runs`.

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
        """Return LoFiT's runs; by default on the task's own heads by A-norm, with the usual K and all training examples."""
        return self.rows(**{
            "task": task, "method": LOFIT, "heads_from": OWN, "source": task, "k": self.k(task), "n_train": None, **wanted,
        })  # fmt: skip

    @property
    def methods(self) -> list[str]:
        """Methods that ran, in the tables' order."""
        ran = dict.fromkeys(self.runs["method"])
        return [*(m for m in METHODS if m in ran), *(m for m in ran if m not in METHODS)]

    def by_chance(self, task: str) -> pd.DataFrame:
        """Return LoFiT's runs on random heads."""
        return self.lofit(task, heads_from=RANDOM, source="")

    def zero_shot(self, task: str) -> pd.DataFrame:
        """Return the run of the unmodified model."""
        return self.rows(task=task, method=ZERO)

    def compared(self) -> dict[str, tuple[str, str]]:
        """Return the rankings to compare, name -> (task, selection): each task by A-norm; for a single task, each selection."""
        if len(self.tasks) == 1 and len(named := self._selections(self.tasks[0])) > 1:
            return {by: (self.tasks[0], by) for by in named}
        return {t: (t, OWN) for t in self.tasks}

    def _selections(self, task: str) -> list[str]:
        """Return the selections with scores of a task for the first seed, A-norm first."""
        found = [by for (t, by, seed) in self.scores if (t, seed) == (task, self.seeds[0])]
        return sorted(found, key=lambda by: by != OWN)

    def heads(self, task: str, by: str = OWN, seed: int | None = None, k: int | None = None) -> HeadSet:
        """Return a task's best heads by a selector; by default for the first seed and the usual K.

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
        """Return LoFiT's adapter on the task's own heads; by default for the first seed and the usual K.

        Raises:
            InputError: no such run.
        """
        rows = self.lofit(task, seed=self.seeds[0] if seed is None else seed, k=self.k(task) if k is None else k)
        if not len(rows):
            raise InputError(f"{self.folder} holds no LoFiT run of {task}; run the study first")
        return Lofit.from_pretrained(self.folders[rows.index[0]] / "adapter", model=model)

    # ------------------------------------------------------------------------------------------------ tables

    def kinds(self, task: str) -> dict[str, str]:
        """Return the rows of the task's method table, each with its kind.

        Kinds: `zero` (nothing is fitted), `steered` (fitted, not trained), `random` heads, `matched` (random heads, as many in
        each layer as the task's own), `own` heads, `wide` (three times as many), `all` heads, `trained` (on all layers).
        """
        return {name: kind for name, (kind, _) in self._named(task).items()}

    def _named(self, task: str) -> dict[str, tuple[str, pd.DataFrame]]:
        """Return the rows of the method table in order: name -> kind and runs."""
        k, usual, wide = self.k(task), int(self._task(task)["k"]), self.wide_k(task)
        found = []
        of_task = self.rows(task=task, n_train=None)
        for key, rows in of_task.groupby(["method", "heads_from", "source", "k"], sort=False, dropna=False):
            name, by, source, n = cast("tuple[str, str, str, float]", key)
            # A method that is not known in this process came from outside the library.
            method = METHODS.get(name) or Method(name, None, heads="chosen" if by else "")
            own = by == OWN and source == task
            if by in (RANDOM, MATCHED) and n == k:
                kind = by
            elif by == ALL:
                kind = "all"
            elif own and n in (k, wide):
                kind = "own" if n == k else "wide"
            elif not by and (np.isnan(n) or n == k):
                kind = "zero" if name == ZERO else "trained" if bool(rows["trained"].any()) else "steered"
            else:
                continue
            order = (method.place, method.name, (RANDOM, MATCHED, "own", "wide", "all").index(kind) if by else 0)
            found.append((order, method.row(by, None if np.isnan(n) else int(n), usual, wide), kind, rows))
        return {name: (kind, rows) for _, name, kind, rows in sorted(found, key=lambda row: row[0])}

    def method_table(self, task: str, reference: str | None = None) -> MethodTable | None:
        """Return the paper's Tables 1 and 3 for one task: LoFiT and the other methods; None if none ran.

        Args:
            task: name of the task.
            reference: the row that the others are tested against; None = LoFiT on the task's own heads.
        """
        if reference is None:
            reference = lofit.METHOD.row(OWN, self.k(task), int(self._task(task)["k"]), self.wide_k(task))
        return self._table(
            f"methods {task} {reference}", {n: rows for n, (_, rows) in self._named(task).items()}, reference
        )

    def selector_table(self, task: str) -> MethodTable | None:
        """Return the paper's Table 2 for one task: offsets tuned on the heads of each selector; None if none ran."""
        found = self.rows(task=task, method=LOFIT, k=self.k(task), n_train=None)
        ran = dict.fromkeys(by for by in found["heads_from"] if by != ALL)
        selectors = [*(by for by in SELECTORS if by in ran), *(by for by in ran if by not in SELECTORS)]
        chosen = {
            by: self.lofit(task, heads_from=by, source="" if by in (RANDOM, MATCHED) else task) for by in selectors
        }
        named = {f"heads by {by}": rows for by, rows in chosen.items()}
        return self._table(f"selectors {task}", named, f"heads by {OWN}")

    def readings(self) -> dict[str, dict[str, Any]]:
        """Return the readings in the store: task, or `"together"` -> reading of the model with its adapter.

        Raises:
            DataError: a damaged file.
        """
        found = {}
        for name, row in self.record["cells"].items():
            if row["kind"] == "reading" and self._store.done(name):
                found[row["task"]] = io.read_json(self._store.folder(name) / READINGS)
        return {task: found[task] for task in (*self.tasks, TOGETHER) if task in found}

    def read_adapters(self, task: str) -> tuple[list[int], int]:
        """Return K of the adapters that a reading (of a task, or `"together"`) is about, and their seed."""
        cells = self.record["cells"]
        # The last one, as in `readings`.
        name = [
            n for n, row in cells.items() if (row["kind"], row["task"]) == ("reading", task) and self._store.done(n)
        ][-1]
        spec = self._store.read(name)["spec"]
        fits = list(spec["fits"].values()) if "fits" in spec else [spec["fit"]]
        return [int(cells[fit]["k"]) for fit in fits], int(cells[name]["seed"])

    @cached_property
    def _tables(self) -> dict[str, MethodTable]:
        return {}

    def _table(self, key: str, named: dict[str, pd.DataFrame], reference: str) -> MethodTable | None:
        """Return the table of these runs; it is computed once."""
        if key in self._tables:
            return self._tables[key]
        runs = [
            MethodRuns(name, tuple(self.fit(i) for i in rows.index), *self._tuned(rows))
            for name, rows in named.items() if len(rows)
        ]  # fmt: skip
        if len(runs) < 2 or reference not in [m.method for m in runs]:
            return None
        self._tables[key] = MethodTable.of(runs, reference)
        return self._tables[key]

    @cached_property
    def _store(self) -> Store:
        return Store(self.folder)

    def fit(self, i: Any) -> FitResult:
        """Return the fit of a row of `runs`, by the row's index."""
        record = self._store.read(self.folders[i].name)
        row, run = self.runs.loc[i], record["run"]
        return FitResult(
            int(record["spec"]["seed"]), record["settings"], self.evaluations[i], run["n_parameters"], float(row["fit_seconds"]),
            float(row["eval_seconds"]), self.record["damage"].get(self.folders[i].name), run["heads"],
        )  # fmt: skip

    def _tuned(self, rows: pd.DataFrame) -> tuple[Tuned | None, bool]:
        """Return the trials that these runs share, and whether each run had its own trials."""
        spec, *others = (self._store.read(self.folders[i].name)["spec"] for i in rows.index)
        by_run = any(other["chosen"] != spec["chosen"] for other in others)
        # The method's other runs reuse the settings that were chosen with the task's own heads.
        by, k = rows.iloc[0]["heads_from"], rows.iloc[0]["k"]
        taken_over = by and (by, k) != (OWN, self.k(spec["task"]["name"]))
        if not spec["chosen"] or taken_over or by_run:
            return None, by_run
        task = spec["task"]
        return choice(self._store, spec["chosen"], spec["method"], task["name"], task["metric"]), by_run

    def damage(self, task: str) -> Float[np.ndarray, "seeds texts"] | None:
        """Return the KL divergence (nats per token) of LoFiT's adapters on ordinary text; None if not measured."""
        hurt = [self.fit(i).damage for i in self.lofit(task).index]
        return np.array([h["kl"] for h in hurt if h]) if hurt and all(hurt) else None
