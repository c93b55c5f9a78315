"""Does it matter which heads are edited? Chosen heads are tested against random sets of as many heads in each layer.

Edits that are optimized at random heads may do nearly as well as at chosen ones (Wang & Veitch, arXiv 2502.11447), so that a
gain by itself does not show that a task is localised where the edit is. Here every head set, chosen or random, is trained with
the same seeds at its own learning rate, chosen by the same trials on the validation rows; `analysis.controls` has the tests.

Further controls use the chosen heads' first adapter and as many random sets:

- other wordings of the test prompts: the same adapters, without retraining
- half of the edits: the first half of the heads, best first, against random halves
- heads silenced: z of the chosen heads is its mean, against as many other heads of the same layers
- answer carried: z patched from prompts with the same and with another answer (`analysis.answers`)
- stability: heads chosen again with other seeds, and by two halves of the training rows
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lofit_lens.analysis.controls import (
    EQUIVALENT,
    FEW_SETS,
    LOCALISED,
    UNCLEAR,
    WORSE,
    ControlTest,
    check_margin,
    chosen_against_random,
)
from lofit_lens.analysis.measure import records
from lofit_lens.analysis.needed import BEST, KeepOnly, Removal
from lofit_lens.analysis.resampling import mean_interval, paired_test_of_means
from lofit_lens.analysis.stability import stability
from lofit_lens.analysis.stored import restored
from lofit_lens.errors import InputError
from lofit_lens.evaluation.result import table_html
from lofit_lens.evaluation.stats import PairedTest, p_in_words
from lofit_lens.experiments.comparison import grid_results, one_task_grid
from lofit_lens.experiments.grid.specs import CHOSEN, Run, TaskSpec
from lofit_lens.experiments.methods.base import MATCHED, OWN, TRIALS
from lofit_lens.experiments.methods.choice import Settings
from lofit_lens.experiments.readings import CARRIED, CONTROLS, HALF, SILENCED
from lofit_lens.experiments.tables.results import ZERO, Results
from lofit_lens.experiments.tables.table import markdown, settings_text
from lofit_lens.heads import HeadScores
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.wording import reworded

CHOSEN_SET = "chosen"
CONTROL_COLUMNS = ("control", "chosen", "random", "difference", "p")
SHOWN = {"set": "set", "value": "mean", "low": "low", "high": "high", "settings": "settings", "heads": "heads"}
UNLEARNED = (
    "These runs cannot tell: the chosen heads do not do better than the unmodified model, so comparing them with random heads "
    "says nothing. More training or another learning rate may help."
)
IN_WORDS = {
    LOCALISED: "The chosen heads do better than random ones: the edit is localised.",
    EQUIVALENT: "There is no evidence of localisation: chosen and random heads are equivalent within the margin.",
    WORSE: "The chosen heads do worse than random ones, which is evidence against localisation at these heads.",
    UNCLEAR: "These runs cannot tell: they show neither a difference nor equivalence. More random sets or test rows may help.",
}


@dataclass(frozen=True, eq=False)
class Localisation:
    """The result of `localisation`. Prints as a paragraph.

    Attributes:
        task: name of the task.
        model: name of the model.
        split: the split that the sets were tested on.
        metric: the task's own metric; scores are shares from 0 to 1.
        k: heads in each set.
        tried: number of settings that each set chose from.
        table: one row per head set, the chosen first: `set` (`"chosen"`, `"random 0"`, ...), `value` (mean over seeds and items),
            `low`, `high` (95 % over seeds and items), `settings` and `heads` (per seed if they differ).
        test: chosen against random.
        unmodified: mean of the model without edits.
        gain: the chosen set against it, a paired test over items.
        controls: one row per control that could be computed: `control`, `chosen`, `random` (means), `difference`, `low`, `high`
            (95 %), `p`, `p_equivalence`, `n_sets`, `n_items`; of the first seed, except for other wordings.
        again: repeated selection: `over` (seeds, halves of the training rows), `jaccard` and `shared` (means over pairs of runs),
            `expected` and `expected_shared` by chance, `n_runs`.
    """

    task: str
    model: str
    split: str
    metric: str
    k: int
    tried: int
    table: pd.DataFrame
    test: ControlTest
    unmodified: float
    gain: PairedTest
    controls: pd.DataFrame = field(default_factory=pd.DataFrame)
    again: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def verdict(self) -> str:
        """One of `analysis.controls.LOCALISED`, `EQUIVALENT`, `WORSE` and `UNCLEAR`.

        It is the test's verdict, except that it is unclear if the chosen set is not better than the unmodified model.
        """
        return UNCLEAR if self._unlearned else self.test.verdict

    @property
    def _unlearned(self) -> bool:
        learned = self.gain.difference > 0 and self.gain.p < 1 - self.gain.level
        return self.test.verdict in (EQUIVALENT, LOCALISED) and not learned

    def columns(self) -> tuple[str, ...]:
        """Headings of `rows`."""
        return tuple(SHOWN.values())

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, in percent."""
        cells = pd.DataFrame(self.table[list(SHOWN)]).to_dict("records")
        return [tuple(f"{100 * v:.1f}" if isinstance(v, float) else str(v) for v in row.values()) for row in cells]

    def control_rows(self) -> list[tuple[str, ...]]:
        """The controls as text below `CONTROL_COLUMNS`: means and differences in percent."""
        return [
            (
                str(row["control"]), f"{100 * row['chosen']:z.1f}", f"{100 * row['random']:z.1f}",
                f"{100 * row['difference']:+z.1f} {_interval(row)}", p_in_words(row["p"]).removeprefix("p ").removeprefix("= "),
            )
            for row in self.controls.to_dict("records")
        ]  # fmt: skip

    def title(self) -> str:
        """Task, split, metric, number of rows and model."""
        return f"{self.task}, {self.split} split, {self.metric.upper()} in %, n={self.test.n_items}, {self.model}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "task": self.task, "model": self.model, "split": self.split, "metric": self.metric, "k": self.k, "tried": self.tried,
            "sets": records(self.table), "test": self.test.to_dict(),
            "unmodified": self.unmodified, "gain": self.gain.to_dict(), "controls": records(self.controls),
            "again": records(self.again), "verdict": self.verdict, "words": str(self),
        }  # fmt: skip

    def to_markdown(self) -> str:
        """The tables, followed by the paragraph."""
        sets = markdown(self.title(), self.columns(), self.rows(), [str(self)])
        rows = self.control_rows()
        return sets + ("\n" + markdown("Controls", CONTROL_COLUMNS, rows, []) if rows else "")

    def __str__(self) -> str:
        test, margin = self.test, f"{100 * self.test.margin:g} points"
        random = 100 * self.table.loc[self.table["set"] != CHOSEN_SET, "value"]
        lie = f" (from {random.min():.1f} to {random.max():.1f} %)" if test.n_sets > 1 else ""
        how = (
            f"at the best of {self.tried} settings on the validation rows" if self.tried > 1 else "with equal settings"
        )
        same = (
            "1 random set has"
            if test.n_sets == 1
            else f"{test.n_sets} random sets with as many heads in each layer have"
        )
        tests = f"{100 * test.difference:+z.1f} points; fewer than {FEW_SETS} random sets are not tested"
        if test.interval is not None:
            low, high = (f"{100 * end:+z.1f}" for end in test.interval)
            tests = (
                f"{100 * test.difference:+z.1f} points [{low}, {high}], {p_in_words(test.p)}; equivalence within {margin}: "
                f"{p_in_words(test.p_equivalence)}; {test.beaten_by} of {test.n_sets} random sets do as well or better"
            )
        return (
            f"On {self.task} ({self.metric.upper()}, {_counted(test.n_items, 'row')} of the {self.split} split), LoFiT on the "
            f"{_counted(self.k, 'head')} of {self.model} that were chosen by {OWN} reaches {100 * test.chosen:.1f} %; "
            f"{same} {100 * test.random:.1f} % on average{lie}, the unmodified model {100 * self.unmodified:.1f} %. Each set was "
            f"trained {how}, with {_counted(test.n_seeds, 'seed')}. The difference is {tests}. "
            f"{UNLEARNED if self._unlearned else IN_WORDS[self.verdict]}{self._controls_in_words()}"
        )

    def _controls_in_words(self) -> str:
        said = [
            f"{row['control']}: {100 * row['chosen']:z.1f} % against {100 * row['random']:z.1f} %, {p_in_words(row['p'])}"
            for row in self.controls.to_dict("records")
        ]
        chosen_again = [
            f"over {row['over']} {row['shared']:.1f} of {self.k} heads are chosen again ({row['expected_shared']:.1f} by chance)"
            for row in self.again.to_dict("records")
        ]
        beside = f" Controls, chosen against random heads: {'; '.join(said)}." if said else ""
        return beside + (f" By A-norm, {', and '.join(chosen_again)}." if chosen_again else "")

    def __repr__(self) -> str:
        return f"Localisation({self.title()}: {self.verdict})"

    def _repr_html_(self) -> str:
        sets, rows = table_html(self.title(), self.columns(), self.rows(), [str(self)]), self.control_rows()
        return sets + (table_html("Controls", CONTROL_COLUMNS, rows) if rows else "")


def localisation(
    model: Any,
    task: Task,
    *,
    k: int | str | None = None,
    draws: int = 10,
    seeds: Sequence[int] = (0, 1),
    margin: float = 0.05,
    points: Sequence[Settings] | None = None,
    wordings: Mapping[str, Mapping[str, str]] | None = None,
    controls: bool = True,
    split: str = "test",
    limit: int | None = None,
    tuning_limit: int | None = None,
    n_train: int | None = None,
    batch_size: int | None = None,
    workers: int = 1,
    device: str | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Localisation:
    """Tune LoFiT's offsets on the task's own heads and on random sets in the same layers, and test whether the own do better.

    The own heads are the best by A-norm with each seed; a random set has as many in each layer (`HeadSet.matched`) and is
    trained with the same seeds. Every set chooses its settings for each seed, by trials on its own heads. That makes
    `(draws + 1) * seeds * (points + 1)` fits, which share passes over the model. The unmodified model is tested too.

    Args:
        model: any HookedTransformer or TransformerBridge; or a name, a folder or a `ModelSpec`, needed for several workers.
        task: a task with training rows, and with validation rows if settings are chosen.
        k: heads in each set, as in `Run.k`; None = the preset's.
        draws: number of random sets; fewer than four are not tested, and the verdict is unclear.
        seeds: seeds of selection and fits.
        margin: the smallest difference in the task's metric that would matter, a share: 0.05 = 5 points. Fix it beforehand.
        points: settings that every set chooses from, e.g. `[{"lr": 0.01}, {"lr": 0.03}]`; None = LoFiT's own four learning
            rates. A single point is used without trials.
        wordings: other wordings of the test prompts, on which all adapters are tested too: name -> old text -> new text, e.g.
            `{"spelled out": {"Q:": "Question:", "A:": "Answer:"}}` (`tasks.wording.reworded`); None = no other.
        controls: also run the other controls: half of the edits, heads silenced, answer carried, repeated selection. They cost
            about `3 * draws` evaluations and a selection.
        split: the split to test on. Controls need the test split.
        limit: use only its first rows.
        tuning_limit: use only the first validation rows in the trials.
        n_train: number of training rows drawn; None = the task's own.
        batch_size: batch size of the evaluation, as in `evaluate`.
        workers: number of processes, each on one thread.
        device: device of a model given by name.
        out: folder of a store for the runs; runs that it already holds are not computed again. None = they are not kept.
        progress: show what is done and the time left.

    Raises:
        InputError: a margin that is not above 0, no draw or seed, no points, a task without validation rows, a wording that
            changes nothing, wordings on another split than test, several workers with a model in memory, or a run that failed.
        TrainingDiverged: training gave NaN or infinity at every point of a set.
    """
    check_margin(margin)
    fields: dict[str, Any] = {"k": "K" if k is None else k}
    if points is not None and len(points) == 1:
        fields |= {"settings": dict(points[0])}  # nothing to choose
    else:
        fields |= {"settings": CHOSEN if points is None else tuple(map(dict, points)), "trials_on": "heads"}
    asked = [reworded(task, replacements, name=name) for name, replacements in (wordings or {}).items()]
    if asked and split != "test":
        raise InputError(
            f"split is {split!r}, but wordings are of the test split; leave wordings out, or use split='test'"
        )
    fields["tested"] = bool(asked)
    read = {"readings": CONTROLS} if controls and split == "test" else {}
    halves = _halves(task if n_train is None else replace(task, n_train=n_train)) if read else []
    runs = [Run(heads=(OWN,), **read, **fields), Run(heads=(MATCHED,), draws=draws, **fields), Run(method=(ZERO,))]
    kind = "localisation" if k is None else f"localisation k{k}"  # so that one folder may hold several numbers of heads
    grid = one_task_grid(
        kind, model, task, runs, seeds=tuple(seeds), split=split, limit=limit, tuning_limit=tuning_limit,
        batch_size=batch_size,
    )  # fmt: skip
    more = {"workers": workers, "device": device, "progress": progress}
    with grid_results(grid, model, [task], n_train, out, other_tasks=asked, **more) as results:
        found = _found(results, task, split, TRIALS if points is None else len(points), margin)
        if asked or read:
            found = replace(found, controls=_controls(results, task, asked, margin))
        again = (
            [_again(f"{len(results.seeds)} seeds", _by_seed(results, task), found.k)] if len(results.seeds) > 1 else []
        )
    if halves:
        named = tuple(TaskSpec(name=half.name) for half in halves)
        grid = grid.model_copy(
            update={
                "name": f"{grid.name} halves",
                "tasks": named,
                "runs": (),
                "scores": (OWN,),
                "seeds": grid.seeds[:1],
            }
        )
        with grid_results(grid, model, halves, None, out, **more) as results:
            again.append(_again("two halves of the training rows", list(results.scores.values()), found.k))
    return replace(found, again=pd.DataFrame(again))


def _found(results: Results, task: Task, split: str, tried: int, margin: float) -> Localisation:
    own = results.rows(task=task.name, heads_from=OWN)
    drawn = [of for _, of in results.rows(task=task.name, heads_from=MATCHED).groupby("draw")]
    scores = [results.values(rows) for rows in (own, *drawn)]  # by seed
    names = [CHOSEN_SET, *(f"random {int(rows['draw'].iloc[0])}" for rows in drawn)]
    table = pd.DataFrame([
        _row(results, name, rows, of) for name, rows, of in zip(names, (own, *drawn), scores, strict=True)
    ])  # fmt: skip
    test = chosen_against_random(scores[0], scores[1:], margin=margin)
    bare = results.values(results.zero_shot(task.name))
    return Localisation(
        task.name, results.model.name, split, results.metric(task.name), int(own["k"].iloc[0]), tried, table, test,
        float(bare.mean()), paired_test_of_means(scores[0], bare),
    )  # fmt: skip


def _row(results: Results, name: str, rows: pd.DataFrame, scores: Any) -> dict[str, Any]:
    fits = [results.fit(i) for i in rows.index]
    low, high = mean_interval(scores)
    return {
        "set": name, "value": float(scores.mean()), "low": low, "high": high,
        "settings": " / ".join(dict.fromkeys(settings_text(fit.settings) for fit in fits)),
        "heads": " / ".join(dict.fromkeys(fit.heads for fit in fits)),
    }  # fmt: skip


def _controls(results: Results, task: Task, asked: Sequence[Task], margin: float) -> pd.DataFrame:
    """One row for each control that the store holds."""
    found = []

    def add(control: str, chosen: np.ndarray, sets: np.ndarray, others: tuple[int, int] | None = None) -> None:
        test = chosen_against_random(chosen, sets, others=others, margin=margin)
        low, high = test.interval or (float("nan"), float("nan"))
        found.append({
            "control": control, "chosen": test.chosen, "random": test.random, "difference": test.difference, "low": low,
            "high": high, "p": test.p, "p_equivalence": test.p_equivalence, "n_sets": test.n_sets, "n_items": test.n_items,
        })  # fmt: skip

    for other in asked:
        named = {"task": task.name, "tested": other.name}
        own = results.values(results.rows(heads_from=OWN, **named))
        drawn = [results.values(of) for _, of in results.rows(heads_from=MATCHED, **named).groupby("draw")]
        add(f"prompts {other.name.removeprefix(task.name + ':')}", own, np.stack(drawn))
    parts = results.readings().get(task.name, {})
    where = f"{results.folder}: the reading of {task.name}"
    if HALF in parts:
        kept = restored(parts[HALF], where)
        k = min(k for k in kept.frame["k"] if k)
        add(f"edits of {_counted(k, 'head')} only", *_items(kept, kept.frame["k"] == k, kept.frame["order"] == BEST))
    if SILENCED in parts:
        gone = restored(parts[SILENCED], where)
        k, pool = (int(gone.curve[column].iloc[0]) for column in ("k", "pool"))
        add("heads silenced", *_items(gone, gone.frame["k"] > 0, gone.frame["which"] == "chosen"), (k, pool))
    if CARRIED in parts:
        patched = restored(parts[CARRIED], where)
        carried = [patched.carried("random", draw)[None] for draw in range(patched.draws)]
        add("answer carried", patched.carried()[None], np.stack(carried))
    return pd.DataFrame(found)


def _items(found: KeepOnly | Removal, wanted: pd.Series, chosen: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Item scores of the chosen heads' run [1, n_items] and of the random ones [n_sets, 1, n_items]."""
    items = np.array(found.items)
    return items[(wanted & chosen).to_numpy()], items[(wanted & ~chosen).to_numpy()][:, None]


def _by_seed(results: Results, task: Task) -> list[HeadScores]:
    return [results.scores[task.name, OWN, seed] for seed in results.seeds]


def _again(over: str, scores: Sequence[HeadScores], k: int) -> dict[str, Any]:
    row = stability(scores, ks=[k]).to_dict("records")[0]
    return {"over": over, **{c: row[c] for c in ("jaccard", "shared", "expected", "expected_shared", "n_runs")}}


def _halves(task: Task) -> list[Task]:
    """Two halves of the training rows that are drawn with seed 0; empty for a single row."""
    rows = list(task.drawn("train", n=None, seed=0))
    random.Random(0).shuffle(rows)
    middle = len(rows) // 2
    return [
        replace(task.subset(train=sorted(half)), name=f"{task.name}:{name} half")
        for name, half in (("first", rows[:middle]), ("second", rows[middle:]))
        if middle
    ]


def _interval(row: Mapping[Any, Any]) -> str:
    return "" if np.isnan(row["low"]) else f"[{100 * row['low']:+z.1f}, {100 * row['high']:+z.1f}]"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
