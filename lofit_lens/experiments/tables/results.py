"""What a store of grids holds, read for figures and tables; nothing is trained here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

from lofit_lens import io
from lofit_lens.errors import DataError, InputError, unknown
from lofit_lens.evaluation.result import EvalResult, table_html
from lofit_lens.experiments.grid.compute import READINGS, choice
from lofit_lens.experiments.grid.expand import TOGETHER
from lofit_lens.experiments.grid.specs import heads_of
from lofit_lens.experiments.methods import METHODS, Method, lofit, zero_shot
from lofit_lens.experiments.methods.base import ALL, OWN, RANDOM
from lofit_lens.experiments.methods.choice import Tuned
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.table import MethodRuns, MethodTable, TestedFit
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.models import ModelInfo
from lofit_lens.training.selectors import SELECTORS

COLUMNS = (
    "task", "tested", "method", "heads_from", "source", "k", "n_train", "seed", "draw", "metric", "value", "n_items",
    "n_parameters", "heads", "fit_seconds", "eval_seconds", "trained",
)  # fmt: skip
LOFIT, ZERO = lofit.METHOD.name, zero_shot.METHOD.name
ASKED = ("task", "tested", "method", "heads_from", "source", "k", "n_train", "seed", "draw")  # what tells runs apart


@dataclass(frozen=True, eq=False)
class Results:
    """Grids that were run (`run_grid`), or as much of them as is there.

    Attributes:
        folder: the store.
        record: what was asked for: `seeds`, `draws`, `limit`, `tasks`, `other_tasks`, `versions`.
        model: the model.
        tasks: names of the tasks, in the grids' order.
        runs: one row a run, see `COLUMNS`: `task` was learned, `tested` was asked; `k` and `n_train` are NaN where they do not
            apply (all of the task's own training examples).
        evaluations: one a row of `runs`.
        folders: where each lies.
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
        return f"Results({self.folder}: {len(self.runs)} runs of {self.model.name} on {', '.join(self.tasks)})"

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
        """Usual number of heads of a task: the preset's; where the grids ask for others only, the first that they ask for."""
        usual = int(self._task(task)["k"])
        asked = [
            int(row["k"]) for row in self.record["cells"].values()
            if row["kind"] == "fit" and row["n_train"] is None
            and (row["task"], row["method"], row.get("heads_from"), row.get("source")) == (task, LOFIT, OWN, task)
        ]  # fmt: skip
        return usual if usual in asked or not asked else asked[0]

    def wide_k(self, task: str) -> int:
        """Number of heads of the 10 % setting."""
        return heads_of("3K", int(self._task(task)["k"]), self.model.n_layers * self.model.n_heads)

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
        return tuple(self.record["seeds"])

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

    def methods(self) -> list[str]:
        """Methods that ran, in the tables' order."""
        ran = dict.fromkeys(self.runs["method"])
        return [*(m for m in METHODS if m in ran), *(m for m in ran if m not in METHODS)]

    def by_chance(self, task: str) -> pd.DataFrame:
        """LoFiT's runs on random heads."""
        return self.lofit(task, heads_from=RANDOM, source="")

    def zero_shot(self, task: str) -> pd.DataFrame:
        """The unmodified model's run."""
        return self.rows(task=task, method=ZERO)

    def compared(self) -> dict[str, tuple[str, str]]:
        """Rankings that stand side by side: name -> (task, selection). Tasks by A-norm; of a single task, every selection."""
        if len(self.tasks) == 1 and len(named := self._selections(self.tasks[0])) > 1:
            return {by: (self.tasks[0], by) for by in named}
        return {t: (t, OWN) for t in self.tasks}

    def _selections(self, task: str) -> list[str]:
        """Selections that have scores of a task with the first seed, A-norm first."""
        found = [by for (t, by, seed) in self.scores if (t, seed) == (task, self.seeds[0])]
        return sorted(found, key=lambda by: by != OWN)

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

    def kinds(self, task: str) -> dict[str, str]:
        """Rows of the task's method table, each with what it is.

        Kinds: `zero` (nothing is fitted), `steered` (fitted, not trained), `random` heads, `own` heads, `wide` (three times as
        many), `all` heads, `trained` (on all layers).
        """
        return {name: kind for name, (kind, _) in self._named(task).items()}

    def _named(self, task: str) -> dict[str, tuple[str, pd.DataFrame]]:
        """Name of a row of the method table -> its kind and runs, in the table's order."""
        k, usual, wide = self.k(task), int(self._task(task)["k"]), self.wide_k(task)
        found = []
        of_task = self.rows(task=task, n_train=None)
        for key, rows in of_task.groupby(["method", "heads_from", "source", "k"], sort=False, dropna=False):
            name, by, source, n = cast("tuple[str, str, str, float]", key)
            # One that is not known in this process came from outside the library.
            method = METHODS.get(name) or Method(name, None, heads="chosen" if by else "")
            own = by == OWN and source == task
            if by == RANDOM and n == k:
                kind = "random"
            elif by == ALL:
                kind = "all"
            elif own and n in (k, wide):
                kind = "own" if n == k else "wide"
            elif not by and (np.isnan(n) or n == k):
                kind = "zero" if name == ZERO else "trained" if bool(rows["trained"].any()) else "steered"
            else:
                continue
            order = (method.place, method.name, ("random", "own", "wide", "all").index(kind) if by else 0)
            found.append((order, method.row(by, None if np.isnan(n) else int(n), usual, wide), kind, rows))
        return {name: (kind, rows) for _, name, kind, rows in sorted(found, key=lambda row: row[0])}

    def method_table(self, task: str, reference: str | None = None) -> MethodTable | None:
        """The paper's Tables 1 and 3 on one task: LoFiT and the methods it is compared with; None where none ran.

        Args:
            task: name.
            reference: the row that the others are tested against; None = LoFiT on the task's own heads.
        """
        if reference is None:
            reference = lofit.METHOD.row(OWN, self.k(task), int(self._task(task)["k"]), self.wide_k(task))
        return self._table(
            f"methods {task} {reference}", {n: rows for n, (_, rows) in self._named(task).items()}, reference
        )

    def selector_table(self, task: str) -> MethodTable | None:
        """The paper's Table 2 on one task: heads by each selector, then offsets; None where none ran."""
        found = self.rows(task=task, method=LOFIT, k=self.k(task), n_train=None)
        ran = dict.fromkeys(by for by in found["heads_from"] if by != ALL)
        selectors = [*(by for by in SELECTORS if by in ran), *(by for by in ran if by not in SELECTORS)]
        chosen = {by: self.lofit(task, heads_from=by, source="" if by == RANDOM else task) for by in selectors}
        named = {f"heads by {by}": rows for by, rows in chosen.items()}
        return self._table(f"selectors {task}", named, f"heads by {OWN}")

    def readings(self) -> dict[str, dict[str, Any]]:
        """Task (and `"together"`) -> what was read of the model with its adapter, as far as it is there.

        Raises:
            DataError: a damaged file.
        """
        found = {}
        for name, row in self.record["cells"].items():
            if row["kind"] == "reading" and self._store.done(name):
                found[row["task"]] = io.read_json(self._store.folder(name) / READINGS)
        return {task: found[task] for task in (*self.tasks, TOGETHER) if task in found}

    @cached_property
    def _tables(self) -> dict[str, MethodTable]:
        return {}

    def _table(self, key: str, named: dict[str, pd.DataFrame], reference: str) -> MethodTable | None:
        """The table of these runs, worked out once."""
        if key in self._tables:
            return self._tables[key]
        runs = [
            MethodRuns(name, tuple(self._run(i) for i in rows.index), self._tuned(rows))
            for name, rows in named.items() if len(rows)
        ]  # fmt: skip
        if len(runs) < 2 or reference not in [m.method for m in runs]:
            return None
        self._tables[key] = MethodTable.of(runs, reference)
        return self._tables[key]

    @cached_property
    def _store(self) -> Store:
        return Store(self.folder)

    def _run(self, i: Any) -> TestedFit:
        record = self._store.read(self.folders[i].name)
        row, run = self.runs.loc[i], record["run"]
        return TestedFit(
            int(record["spec"]["seed"]), record["settings"], self.evaluations[i], run["n_parameters"], float(row["fit_seconds"]),
            float(row["eval_seconds"]), self.record["damage"].get(self.folders[i].name), run["heads"],
        )  # fmt: skip

    def _tuned(self, rows: pd.DataFrame) -> Tuned | None:
        spec = self._store.read(self.folders[rows.index[0]].name)["spec"]
        # What was chosen with the task's own heads is taken over by the method's other runs.
        by, k = rows.iloc[0]["heads_from"], rows.iloc[0]["k"]
        taken_over = by and (by, k) != (OWN, self.k(spec["task"]["name"]))
        if not spec["chosen"] or taken_over:
            return None
        return choice(self._store, spec["chosen"], spec["method"], spec["task"]["name"], spec["task"]["metric"])

    def damage(self, task: str) -> Float[np.ndarray, "seeds texts"] | None:
        """KL (nats a token) of LoFiT's adapters on ordinary text; None where not measured."""
        hurt = [self._run(i).damage for i in self.lofit(task).index]
        return np.array([h["kl"] for h in hurt if h]) if hurt and all(hurt) else None


def load_results(folder: str | Path, *, grids: Sequence[str] | None = None, model: str | None = None) -> Results:
    """Read a store.

    Args:
        folder: of the store.
        grids: names of the grids that are wanted; None = all that are there.
        model: name of the model, where the store holds several.

    Raises:
        DataError: it holds no grid, no run, or a damaged file (named).
        InputError: no such grid or model; several models and none is named; or grids that cannot be drawn together, since they
            ask for the same runs with other settings or test rows.
    """
    folder = Path(folder)
    if (folder / "study.json").is_file():
        raise DataError(f"{folder} is a study of an earlier version; run its grid again, into a new folder")
    if not (folder / "store.json").is_file():
        raise DataError(
            f"{folder} holds no study (no store.json); run one first: lofit-lens grid organism/all --store {folder}"
        )
    store = Store(folder, create=False)
    records = _records(store, grids, model)
    record = _joint(records)
    rows, evaluations, folders, scores = [], [], [], {}
    damage: dict[str, dict[str, list[float]]] = {}
    for name, row in sorted(record["cells"].items()):
        if not store.done(name) or row["kind"] in ("trial", "reading"):
            continue
        path = store.folder(name)
        if row["kind"] == "scores":
            if row["n_train"] is None:
                key = (row["task"], row["heads_from"], row["seed"])
                if key in scores:
                    raise _several(folder, f"head scores of {key[0]} by {key[1]} (seed {key[2]})", records)
                scores[key] = HeadScores.load(path / "scores.json")
            continue
        run = store.read(name)
        if row["kind"] == "damage":
            damage[run["spec"]["fit"]] = run["damage"]
            continue
        result = EvalResult.load(path)
        metric = next(iter(result.metrics))
        rows.append({
            **{c: row.get(c) for c in ASKED}, **run["run"], **_seconds(store, name, run), "metric": metric,
            "value": result.metrics[metric].mean, "n_items": len(result.items), "trained": bool(run["spec"].get("config")),
        })  # fmt: skip
        evaluations.append(result)
        folders.append(path)
    if not rows and not scores:
        raise DataError(f"{folder} holds no run yet; run its grid: lofit-lens grid ... --store {folder}")
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    for column in ("k", "n_train"):
        frame[column] = frame[column].astype(float)
    for column in ("heads_from", "source"):
        frame[column] = frame[column].fillna("")
    twice = frame.duplicated(list(ASKED))
    if twice.any():
        first = frame.loc[twice].iloc[0]
        raise _several(folder, f"{first['method']} on {first['task']} (seed {first['seed']})", records)
    ordered = dict(sorted(scores.items(), key=lambda item: (list(record["tasks"]).index(item[0][0]), item[0][1:])))
    whole = {**record, "damage": damage}
    return Results(
        folder, whole, ModelInfo(**record["model"]), tuple(record["tasks"]), frame, tuple(evaluations), tuple(folders), ordered
    )  # fmt: skip


def _several(folder: Path, what: str, grids: Iterable[str]) -> InputError:
    return InputError(
        f"{folder} holds {what} with several settings, from the grids {', '.join(grids)}; say which are wanted (grids=[...], "
        "--grid). Tables and figures take one value of each setting; all runs are in Store(...).index()"
    )


def _records(store: Store, grids: Sequence[str] | None, model: str | None) -> dict[str, dict[str, Any]]:
    """The wanted grids' records, all of one model."""
    found = store.grids()
    if not found:
        raise DataError(f"{store.root} holds no grid; run one: lofit-lens grid organism/all --store {store.root}")
    for name in grids or ():
        if name not in found:
            raise unknown("grid", name, found)
    found = {name: r for name, r in found.items() if grids is None or name in grids}
    models = list(dict.fromkeys(r["model"]["name"] for r in found.values()))
    if model is not None and model not in models:
        raise unknown("model", model, models)
    if model is None and len(models) > 1:
        raise InputError(
            f"{store.root} holds runs of several models: {', '.join(models)}; say which is wanted (model=...), or name its grids "
            f"(grids=[...], --grid): {', '.join(map(repr, found))}"
        )
    return {name: r for name, r in found.items() if r["model"]["name"] == (model or models[0])}


def _joint(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What several grids ask for together."""
    first = next(iter(records.values()))
    joint: dict[str, Any] = {
        "model": first["model"], "versions": first["versions"], "limit": first["grid"]["limit"], "tasks": {}, "other_tasks": {},
        "cells": {}, "seeds": [], "draws": 0,
    }  # fmt: skip
    for name, record in records.items():
        for what, old, new in (
            ("model", joint["model"], record["model"]), ("limit", joint["limit"], record["grid"]["limit"]),
            *((t, joint["tasks"][t], of) for t, of in record["tasks"].items() if t in joint["tasks"]),
            *((t, joint["other_tasks"][t], of) for t, of in record["other_tasks"].items() if t in joint["other_tasks"]),
        ):  # fmt: skip
            if old != new:
                raise InputError(
                    f"the grid {name} has another {what} ({new}, not {old}); draw them apart (grids=[...], --grid)"
                )
        for part in ("tasks", "other_tasks", "cells"):
            joint[part] |= record[part]
        joint["seeds"] += [s for s in record["grid"]["seeds"] if s not in joint["seeds"]]
        joint["draws"] = max([joint["draws"], *(r["draws"] for r in record["grid"]["runs"] if RANDOM in r["heads"])])
    return joint


def _seconds(store: Store, name: str, run: dict[str, Any]) -> dict[str, float]:
    """Seconds of the fit, with the selection of its heads, and of the test. A test of another task's adapter has the fit's."""
    own, spec = store.timing(name), run["spec"]
    if "fit" in spec:
        fit = store.read(spec["fit"])
        return {**_seconds(store, spec["fit"], fit), "eval_seconds": own.get("eval_seconds", float("nan"))}
    seconds = own.get("fit_seconds", float("nan"))
    if spec["heads"] and "cell" in spec["heads"]:
        seconds += store.timing(spec["heads"]["cell"]).get("seconds", 0.0)
    return {"fit_seconds": seconds, "eval_seconds": own.get("eval_seconds", float("nan"))}
