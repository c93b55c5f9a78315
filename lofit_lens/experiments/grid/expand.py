"""Expand a grid into cells: each piece of work once, with the cells that it needs.

- `scores`: head scores of a task by a selector and a seed.
- `trial`: one point of a method's settings, fitted and tried on the validation rows.
- `fit`: one fit, tested once on the test rows. Its heads come from a `scores` cell, its settings from `trial` cells.
- `test`: a fit's adapter on a task that it did not learn.
- `damage`: a fit's adapter on ordinary text.
- `reading`: what a fit's adapter, or the adapters of all tasks together, reveal about the model.

Only data is loaded: models are described by their configuration (`models.planned_info`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from lofit_lens import io
from lofit_lens.errors import InputError, unknown
from lofit_lens.experiments.grid.keys import model_key, selector_source, task_key, versions_key
from lofit_lens.experiments.grid.specs import CHOSEN, EVERY, HEADS_READ, ITSELF, OTHERS, PRESET, Grid, Run, heads_of
from lofit_lens.experiments.methods import Method, Outline, method_of
from lofit_lens.experiments.methods.base import ALL, MATCHED, OWN, RANDOM
from lofit_lens.experiments.readings import PARTS
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.models import ModelInfo
from lofit_lens.tasks.base import Task
from lofit_lens.training.config import TrainConfig
from lofit_lens.training.selectors import LEARNED

COST = {
    "scores": 1.2,
    "fit": 1.0,
    "trial": 1.0,
    "test": 0.15,
    "damage": 0.2,
    "reading": 4.0,
}  # relative to a fit of LoFiT
TOGETHER = "together"  # the reading of all tasks' adapters


@dataclass(frozen=True, eq=False)
class Setting:
    """One model of a grid with its loaded tasks.

    Attributes:
        grid: the grid.
        info: description of the model.
        tasks: by name, as the grid lists them.
        others: tasks to test only.
        texts: digest of the ordinary texts; empty = none.
        files: as in `model_key`.
    """

    grid: Grid
    info: ModelInfo
    tasks: Mapping[str, Task]
    others: Mapping[str, Task] = field(default_factory=dict)
    texts: str = ""
    files: str = ""

    @cached_property
    def model_key(self) -> dict[str, Any]:
        """Key of the model."""
        return model_key(self.info, self.files)

    @cached_property
    def task_keys(self) -> dict[str, dict[str, Any]]:
        """Key of every task."""
        return {name: task_key(task) for name, task in (*self.tasks.items(), *self.others.items())}

    @property
    def n_heads(self) -> int:
        """Number of heads of the model."""
        return self.info.grid.n_total

    def outline(self, task: str) -> Outline:
        """Model and preset."""
        return Outline.of(self.info, self.tasks[task])


def expand(setting: Setting) -> list[Cell]:
    """All cells of a grid on one model, each once, after the cells that it needs.

    Raises:
        InputError: a task that the grid does not have, more heads or training examples than there are, no validation rows to
            choose settings on, or a value out of range; before anything is computed.
    """
    maker = _Maker(setting)
    grid = setting.grid
    for name in dict.fromkeys((*grid.scores, *(n for n, s in grid.selections.items() if s.seeds))):
        seeds = dict.fromkeys((*(grid.seeds if name in grid.scores else ()), *grid.selection(name).seeds))
        for task in setting.tasks:
            for seed in seeds:
                maker.scores(name, task, seed, None)
    for run in grid.runs:
        maker.run(run)
    for run in grid.runs:
        if run.readings:
            maker.readings(run)
    return list(maker.cells.values())


@dataclass
class _Maker:
    setting: Setting
    cells: dict[str, Cell] = field(default_factory=dict)

    def add(self, label: Sequence[object], spec: dict[str, Any], needs: Sequence[str], row: dict[str, Any]) -> Cell:
        """Add a cell, or return the existing one."""
        kind, info = spec["kind"], self.setting.info
        whole = {"cell": 1, **spec, "model": self.setting.model_key, "needs": list(needs), "versions": versions_key()}
        text = " ".join(str(part) for part in label if part not in ("", None))
        row = {
            "model": info.name, "model_id": io.digest(self.setting.model_key)[:8], "backend": info.backend, "dtype": info.dtype,
            **row, "kind": kind,
        }  # fmt: skip
        cost = COST[kind] * (method_of(spec["method"]).cost if kind in ("fit", "trial") else 1.0)
        cell = Cell(text, whole, tuple(needs), row, cost, _shares(whole))
        return self.cells.setdefault(cell.name, cell)

    # ------------------------------------------------------------------------------------------ head scores

    def scores(self, name: str, task: str, seed: int, n_train: int | None) -> Cell:
        """The cell of head scores by a selection."""
        grid, data = self.setting.grid, self.setting.tasks[task]
        selection, outline = grid.selection(name), self.setting.outline(task)
        n = self._given(selection.n_train or n_train, task)
        among = None
        needs: list[str] = []
        if selection.among is not None:
            k = heads_of(selection.among_k, outline.preset.k, self.setting.n_heads)
            before = self.scores(selection.among, task, seed, n_train)
            among, needs = {"cell": before.name, "k": k}, [before.name]
        config: TrainConfig | None = None
        if selection.by in LEARNED:
            base = outline.preset.select if selection.by == "A-norm" else outline.preset.tune
            config = _changed(base, selection.settings)
        spec = {
            "kind": "scores", "task": self.setting.task_keys[task], "by": selection.by, "seed": seed,
            "n_train": _rows(data, n, seed), "config": config and config.to_dict(), "among": among,
            **selector_source(selection.by),
        }  # fmt: skip
        row = {"task": task, "heads_from": name, "seed": seed, "n_train": None if selection.n_train else n}
        label = (task, selection.by, among and f"of {among['k']}", n and f"n{n}", f"seed{seed}")
        return self.add(label, spec, needs, row)

    # ------------------------------------------------------------------------------------------------- runs

    def run(self, run: Run) -> None:
        """Add every run of a block."""
        for n_train in run.n_train:
            for method in run.methods:
                for task in self.setting.tasks:
                    for fit in self._fits(run, method, task, self._given(n_train, task)):
                        self._tests(run, fit, task)

    def _given(self, n_train: int | None, task: str) -> int | None:
        """Treat the task's own number like no number, so that both name the same run."""
        return None if n_train == self.setting.tasks[task].n_train else n_train

    def _fits(self, run: Run, method: Method, task: str, n_train: int | None) -> Iterator[Cell]:
        seeds = run.seeds or self.setting.grid.seeds
        outline = self.setting.outline(task)
        if method.heads != "chosen":
            wanted = dict.fromkeys(heads_of(k, outline.preset.k, self.setting.n_heads) for k in run.k)
            for what in [{"k": k} for k in wanted] if method.heads == "k" else [{}]:
                for seed in (0,) if method.fit is None else seeds:
                    yield self._fit(run, method, task, n_train, seed, what)
            return
        for heads in run.heads:
            ks = ("100 %",) if heads == ALL else run.k
            for k in dict.fromkeys(heads_of(k, outline.preset.k, self.setting.n_heads) for k in ks):
                if heads == RANDOM:
                    for draw in range(run.draws):
                        what = {"heads_from": RANDOM, "source": "", "k": k, "draw": draw}
                        yield self._fit(run, method, task, n_train, draw, what, {"random": draw, "k": k})
                elif heads == MATCHED:
                    for draw in range(run.draws):
                        for seed in seeds:
                            own = self.scores(OWN, task, seed, n_train).name
                            what = {"heads_from": MATCHED, "source": "", "k": k, "draw": draw}
                            drawn = {"matched": draw, "cell": own, "k": k}
                            yield self._fit(run, method, task, n_train, seed, what, drawn)
                elif heads == ALL:
                    for seed in seeds:
                        what = {"heads_from": ALL, "source": "", "k": k}
                        yield self._fit(run, method, task, n_train, seed, what, {"all": True})
                else:
                    for source in self._sources(run, task):
                        for seed in seeds:
                            scores = self.scores(heads, source, seed, n_train if source == task else None)
                            what = {"heads_from": heads, "source": source, "k": k}
                            self._enough(heads, scores, k)
                            chosen = {"cell": scores.name, "k": k}
                            yield self._fit(run, method, task, n_train, seed, what, chosen)

    def _enough(self, name: str, scores: Cell, k: int) -> None:
        """Check that a selection among some heads scores enough of them."""
        among = scores.spec["among"]
        if among is not None and k > among["k"]:
            raise InputError(
                f"{k} heads are requested from the selection {name}, which scores {among['k']}; raise its among_k"
            )

    def _sources(self, run: Run, task: str) -> list[str]:
        found: list[str] = []
        for name in run.of:
            if name == ITSELF:
                found.append(task)
            elif name == OTHERS:
                found += [t for t in self.setting.tasks if t != task]
            elif name == EVERY:
                found += self.setting.tasks
            elif name in self.setting.tasks:
                found.append(name)
            else:
                raise unknown(
                    "task", name, (ITSELF, OTHERS, EVERY, *self.setting.tasks), hint="`of` takes the grid's tasks."
                )
        return list(dict.fromkeys(found))

    def _fit(
        self, run: Run, method: Method, task: str, n_train: int | None, seed: int, what: dict[str, Any],
        heads: dict[str, Any] | None = None,
    ) -> Cell:  # fmt: skip
        needs = [heads["cell"]] if heads and "cell" in heads else []
        settings, trials = self._settings(run, method, task, what, heads)
        spec = {
            **self._spec(method, task, seed, n_train, settings, heads, what.get("k")), "kind": "fit",
            "split": self.setting.grid.split, "limit": self.setting.grid.limit, "chosen": trials,
        }  # fmt: skip
        needs += [name for point in trials or () for name in point]
        row = {
            "task": task, "tested": task, "method": method.name, "seed": seed, "draw": 0, "n_train": n_train, **what,
            "settings": CHOSEN if trials else run.settings if isinstance(run.settings, str) else "given",
        }  # fmt: skip
        label = (task, method.name, *self._heads_label(what, task), n_train and f"n{n_train}", f"seed{seed}")
        return self.add(label, spec, needs, row)

    def _heads_label(self, what: Mapping[str, Any], task: str) -> Iterator[object]:
        """Parts of a fit's label that describe its heads: selector, source, number."""
        if (by := what.get("heads_from")) is not None:
            draw = what.get("draw", 0) if by == MATCHED else ""
            yield f"{by}{draw}" if by in HEADS_READ else self.setting.grid.selection(by).by
            yield f"of {what['source']}" if what["source"] not in ("", task) else ""
        if "k" in what:
            yield f"k{what['k']}"

    def _spec(
        self, method: Method, task: str, seed: int, n_train: int | None, settings: Mapping[str, Any],
        heads: dict[str, Any] | None, k: int | None,
    ) -> dict[str, Any]:  # fmt: skip
        data, outline, source = self.setting.tasks[task], self.setting.outline(task), method.source
        config = None if method.config is None else _changed(method.config(outline), settings).to_dict()
        return {
            "task": self.setting.task_keys[task], "method": method.name, "seed": seed,
            "n_train": None if method.fit is None else _rows(data, n_train, seed), "settings": dict(settings),
            "config": config, "heads": heads, "k": k if method.heads == "k" else None,
            "batch_size": self.setting.grid.batch_size, **({"source": source} if source else {}),
        }  # fmt: skip

    def _settings(
        self, run: Run, method: Method, task: str, what: Mapping[str, Any], heads: dict[str, Any] | None
    ) -> tuple[dict[str, Any], list[list[str]] | None]:  # fmt: skip
        """Given or preset settings; or the trials that they are chosen from, a list for each point."""
        if isinstance(run.settings, dict):
            return dict(run.settings), None
        data, grid, outline = self.setting.tasks[task], self.setting.grid, self.setting.outline(task)
        if run.settings == PRESET and method.config is not None:
            return {"lr": method.config(outline).lr}, None
        points = run.points or method.points(outline)
        if not points:
            return {}, None
        if not data.test.get("val"):
            raise InputError(
                f"{task} has no validation rows, on which the settings of {method.name} are chosen; add some, or give them "
                "(settings: {...})"
            )
        trial = partial(self._trial, method, task, what, heads if run.trials_on == "heads" else None)
        return {}, [[trial(dict(point), seed).name for seed in grid.tuning_seeds] for point in points]

    def _trial(
        self, method: Method, task: str, what: Mapping[str, Any], heads: dict[str, Any] | None, point: dict[str, Any], seed: int
    ) -> Cell:  # fmt: skip
        """A trial on the run's heads; None = on the task's own by A-norm and the preset's K, whichever heads the run names."""
        own = {"heads_from": OWN, "source": task, "k": self.setting.outline(task).preset.k}
        k, label = what.get("k"), [f"k{what['k']}"] if method.heads == "k" else []
        if method.heads == "chosen" and heads is None:
            what, k = own, own["k"]
            heads = {"cell": self.scores(OWN, task, seed, None).name, "k": k}
        elif method.heads == "chosen" and what != own:
            label = list(self._heads_label(what, task))
        needs = [heads["cell"]] if heads and "cell" in heads else []
        spec = {**self._spec(method, task, seed, None, point, heads, k), "kind": "trial", "split": "val"}
        if (limit := self.setting.grid.tuning_limit) is not None:
            spec["limit"] = limit
        row = {
            "task": task, "tested": task, "method": method.name, "seed": seed, **({} if what == own else what),
            **{f"set_{k}": v for k, v in point.items()},
        }  # fmt: skip
        shown = (f"{k}{v:.3g}" if isinstance(v, float) else f"{k}{v}" for k, v in point.items())
        return self.add((task, method.name, "trial", *label, *shown, f"seed{seed}"), spec, needs, row)

    # ------------------------------------------------------------------------------------- tests of a fit

    def _tests(self, run: Run, fit: Cell, task: str) -> None:
        grid, fitted = self.setting.grid, method_of(fit.row["method"]).fit is not None
        if run.tested and (fitted or task == next(iter(self.setting.tasks))):
            for name in self.setting.others:
                spec = {
                    "kind": "test", "fit": fit.name, "task": self.setting.task_keys[name], "limit": grid.limit,
                    "batch_size": grid.batch_size,
                }  # fmt: skip
                self.add((fit.label, "on", name), spec, [fit.name], {**fit.row, "tested": name})
        if run.damage and self.setting.texts and fitted:
            spec = {"kind": "damage", "fit": fit.name, "texts": self.setting.texts}
            self.add((fit.label, "damage"), spec, [fit.name], {**fit.row, "tested": ""})

    # --------------------------------------------------------------------------------------------- readings

    def readings(self, run: Run) -> None:
        """Add readings of each task's adapter with the first seed, and of all of them together."""
        grid, found = self.setting.grid, {}
        drawn = [r.draws for r in grid.runs if {RANDOM, MATCHED} & {*r.heads}]
        seed, draws = (run.seeds or grid.seeds)[0], max(drawn, default=5)
        only = [] if isinstance(run.readings, bool) else list(run.readings)
        for part in only:
            if part not in PARTS:
                raise unknown("part of a reading", part, PARTS)
        for task in self.setting.tasks:
            outline = self.setting.outline(task)
            fit = self._own_fit(run, task, seed, heads_of(run.k[0], outline.preset.k, self.setting.n_heads))
            wide = self._own_fit(run, task, seed, heads_of("3K", outline.preset.k, self.setting.n_heads))
            if fit is None:
                raise InputError(
                    "'readings' need adapters trained on all of a task's training examples; leave n_train out"
                )
            found[task] = fit
            spec = {
                "kind": "reading", "task": self.setting.task_keys[task], "fit": fit.name, "wide": wide and wide.name,
                "cued": self.setting.task_keys.get(f"{task}-cued"), "texts": self.setting.texts, "draws": draws, "seed": seed,
                "limit": grid.limit, **({"only": only} if only else {}),
            }  # fmt: skip
            self.add((fit.label, "reading"), spec, [f.name for f in (fit, wide) if f], {"task": task, "seed": seed})
        if len(found) > 1 and not only:
            spec = {
                "kind": "reading", "tasks": {t: self.setting.task_keys[t] for t in found}, "seed": seed, "limit": grid.limit,
                "fits": {t: fit.name for t, fit in found.items()},
            }  # fmt: skip
            self.add((TOGETHER, "reading"), spec, [f.name for f in found.values()], {"task": TOGETHER, "seed": seed})

    def _own_fit(self, run: Run, task: str, seed: int, k: int) -> Cell | None:
        """The fit of the run's method on the task's own heads that is in the grid, if any."""
        wanted = {
            "kind": "fit", "task": task, "method": run.method[0], "heads_from": OWN, "source": task, "k": k, "n_train": None,
            "seed": seed,
        }  # fmt: skip
        return next((c for c in self.cells.values() if wanted.items() <= c.row.items()), None)


def _shares(spec: Mapping[str, Any]) -> str:
    """Key of fits that may share LoFiT's passes: scores by A, scores by v, or offsets, since these take different times."""
    what = spec.get("by") or spec.get("method")
    joint = what in LEARNED if "by" in spec else "method" in spec and method_of(spec["method"]).joint is not None
    return f"{what} {io.digest(spec['model'])}" if joint else ""


def _rows(task: Task, n: int | None, seed: int) -> int | None:
    """Number of training examples drawn (None = all); raises InputError if there are fewer."""
    task.drawn("train", n=n, seed=seed)
    return task.n_train if n is None else n


def _changed(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    try:
        return config.with_changes(**settings)
    except TypeError as e:
        raise InputError(f"settings {dict(settings)}: {e}; give numbers") from e
