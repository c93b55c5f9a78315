"""Whether it matters which heads are edited: chosen heads against random sets of as many heads in each layer.

Edits that are optimised at random heads may do nearly as well as at chosen ones (Wang & Veitch, arXiv 2502.11447), so that a
gain does not show by itself that a task is located where the edit is. Here every head set, chosen or random, is trained with
the same seeds at a learning rate of its own, chosen by the same trials on the validation rows; `analysis.controls` has the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from lofit_lens.analysis.resampling import mean_interval, paired_test_of_means
from lofit_lens.evaluation.result import table_html
from lofit_lens.evaluation.stats import PairedTest, p_in_words
from lofit_lens.experiments.comparison import grid_results, one_task_grid
from lofit_lens.experiments.grid.specs import CHOSEN, Run
from lofit_lens.experiments.methods.base import MATCHED, OWN, TRIALS
from lofit_lens.experiments.methods.choice import Settings
from lofit_lens.experiments.tables.results import ZERO, Results
from lofit_lens.experiments.tables.table import markdown, settings_text
from lofit_lens.tasks.base import Task

CHOSEN_SET = "chosen"
SHOWN = {"set": "set", "value": "mean", "low": "low", "high": "high", "settings": "settings", "heads": "heads"}
UNLEARNED = (
    "These runs cannot tell: the chosen heads do not do better than the unmodified model, so that beside random ones they "
    "say nothing. More training or another learning rate may."
)
IN_WORDS = {
    LOCALISED: "The chosen heads do better than random ones: the edit is localised.",
    EQUIVALENT: "There is no evidence of localisation: chosen and random heads are equivalent within the margin.",
    WORSE: "The chosen heads do worse than random ones, so that these runs speak against localisation at them.",
    UNCLEAR: "These runs cannot tell: they show neither a difference nor equivalence. More random sets or test rows may.",
}


@dataclass(frozen=True, eq=False)
class Localisation:
    """What `localisation` found. Prints as a paragraph.

    Attributes:
        task: name.
        model: name.
        split: that the sets were tested on.
        metric: the task's own; scores are shares from 0 to 1.
        k: heads in each set.
        tried: settings that each set chose from.
        table: one row a head set, the chosen first: `set` (`"chosen"`, `"random 0"`, ...), `value` (mean over seeds and items),
            `low`, `high` (95 % over seeds and items), `settings` and `heads` (of each seed, where they differ).
        test: chosen against random.
        unmodified: mean of the model without edits.
        gain: the chosen set against it, a paired test over items.
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

    @property
    def verdict(self) -> str:
        """One of `analysis.controls.LOCALISED`, `EQUIVALENT`, `WORSE` and `UNCLEAR`.

        It is the test's; but a chosen set that is not better than the unmodified model leaves it unclear.
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

    def title(self) -> str:
        """What it is about."""
        return f"{self.task}, {self.split} split, {self.metric.upper()} in %, n={self.test.n_items}, {self.model}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "task": self.task, "model": self.model, "split": self.split, "metric": self.metric, "k": self.k, "tried": self.tried,
            "sets": self.table.astype(object).where(self.table.notna(), None).to_dict("records"), "test": self.test.to_dict(),
            "unmodified": self.unmodified, "gain": self.gain.to_dict(), "verdict": self.verdict, "words": str(self),
        }  # fmt: skip

    def to_markdown(self) -> str:
        """The paragraph below the table."""
        return markdown(self.title(), self.columns(), self.rows(), [str(self)])

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
            f"{UNLEARNED if self._unlearned else IN_WORDS[self.verdict]}"
        )

    def __repr__(self) -> str:
        return f"Localisation({self.title()}: {self.verdict})"

    def _repr_html_(self) -> str:
        return table_html(self.title(), self.columns(), self.rows(), [str(self)])


def localisation(
    model: Any,
    task: Task,
    *,
    k: int | str | None = None,
    draws: int = 10,
    seeds: Sequence[int] = (0, 1),
    margin: float = 0.05,
    points: Sequence[Settings] | None = None,
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
    """Tune LoFiT's offsets on the task's own heads and on random sets of the same layers, and test whether the own do better.

    The own heads are the best by A-norm with each seed; a random set has as many in each layer (`HeadSet.matched`) and is
    trained with the same seeds. Every set chooses its settings for each seed, by trials on its own heads. That makes
    `(draws + 1) * seeds * (points + 1)` fits, which share passes over the model. The unmodified model is tested beside them.

    Args:
        model: any HookedTransformer or TransformerBridge; or a name, a folder or a `ModelSpec`, needed for several workers.
        task: with training rows, and validation rows where there is something to choose.
        k: heads in each set, as `Run.k`; None = the preset's.
        draws: random sets; fewer than four are not tested, and leave it open.
        seeds: of selection and fits.
        margin: the smallest difference in the task's metric that would matter, a share: 0.05 = 5 points. Fix it beforehand.
        points: settings that every set chooses from, e.g. `[{"lr": 0.01}, {"lr": 0.03}]`; None = LoFiT's own four learning
            rates. A single point is taken without trials.
        split: that the sets are tested on.
        limit: only its first rows.
        tuning_limit: only the first validation rows in the trials.
        n_train: training rows drawn; None = the task's own number.
        batch_size: of the evaluation, as in `evaluate`.
        workers: processes, each on one thread.
        device: of a model given by name.
        out: folder of a store for the runs; what is in it is not computed again. None = they are not kept.
        progress: show what is done and the time left.

    Raises:
        InputError: a margin that is not above 0, no draw or seed, no points, a task without validation rows, several workers
            with a model in memory, or a run that failed.
        TrainingDiverged: training gave NaN or infinity at every point of a set.
    """
    check_margin(margin)
    fields: dict[str, Any] = {"k": "K" if k is None else k}
    if points is not None and len(points) == 1:
        fields |= {"settings": dict(points[0])}  # nothing to choose
    else:
        fields |= {"settings": CHOSEN if points is None else tuple(map(dict, points)), "trials_on": "heads"}
    runs = [Run(heads=(OWN,), **fields), Run(heads=(MATCHED,), draws=draws, **fields), Run(method=(ZERO,))]
    grid = one_task_grid(
        "localisation", model, task, runs, seeds=tuple(seeds), split=split, limit=limit, tuning_limit=tuning_limit,
        batch_size=batch_size,
    )  # fmt: skip
    with grid_results(grid, model, task, n_train, out, (), workers, device, progress) as results:
        return _found(results, task, split, TRIALS if points is None else len(points), margin)


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


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
