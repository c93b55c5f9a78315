"""Is a chosen set of heads necessary, and is it sufficient?

    leave_one_out   the adapter without one head's edit, head by head          which head carries the effect
    keep_only       only the edits of the first k heads, k = 0 .. K            how many are sufficient
    removal         the chosen heads are ablated                               whether the model needs them
    drop_edits      an adapter of many heads loses its edits of the chosen     whether it depends on these

Each is compared with random heads: orders of the same heads (`keep_only`), or as many other heads (`removal`, `drop_edits`).
Differences are paired by item. Intervals are 95 %. Whether chosen heads differ from random ones is tested by
`chosen_against_random`, which needs at least four draws; the interval of the random heads' mean resamples draws and items.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lofit_lens.analysis.controls import chosen_against_random
from lofit_lens.analysis.measure import Items, check_draws, check_ks, items_of, paired, records, summary
from lofit_lens.analysis.resampling import NAN
from lofit_lens.checks import check_is, check_one_of
from lofit_lens.errors import InputError
from lofit_lens.evaluation.stats import bootstrap_interval_over_seeds, holm
from lofit_lens.heads import Heads, HeadSet
from lofit_lens.interventions.ablation import HOW, HeadAblation, How, mean_z
from lofit_lens.interventions.base import Intervention
from lofit_lens.interventions.lofit import LOFIT, Lofit
from lofit_lens.models import model_info
from lofit_lens.progress import tqdm
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.registry import task_of

BEST, RANDOM = "best first", "random"


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """How much each head's edit contributes to the adapter.

    Attributes:
        frame: one row per head, in the adapter's order: `head`, `layer`, `index`, `full` (metric of the whole adapter), `without`
            (of the adapter without this head), `loss` (full - without), `low`, `high` (95 % over items), `p` (paired test,
            two-sided), `p_holm` (over all heads), `n`.
        full: metric of every item with the whole adapter.
        without: likewise without each head, in the order of the frame.
        bare: likewise without any adapter.
        task: name of the task.
        metric: name of the metric.
        split: name of the split.
    """

    frame: pd.DataFrame
    full: Items
    without: tuple[Items, ...]
    bare: Items
    task: str
    metric: str
    split: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.LeaveOneOut", "schema": 1, "task": self.task, "metric": self.metric, "split": self.split,
            "rows": records(self.frame), "full": list(self.full), "bare": list(self.bare),
            "without": [list(items) for items in self.without],
        }  # fmt: skip


def leave_one_out(
    model: Any, task: Task | str, lofit: Lofit, *, split: str = "test", limit: int | None = None, progress: bool = True
) -> LeaveOneOut:
    """Measure the task with an adapter, and with all of it except one head's edit, for every head: K + 2 evaluations.

    Two heads that can replace each other both look unimportant here; `keep_only` shows what a few heads do by themselves.

    Args:
        model: any HookedTransformer or TransformerBridge that the adapter fits.
        task: what is measured, by its own metric.
        lofit: the adapter.
        split: which split to use.
        limit: use only the first rows.
        progress: show a bar over heads.

    Raises:
        InputError, DataError: as in `evaluate`.
        AdapterError: an adapter for another shape.
    """
    task = task_of(task)
    check_is(lofit, Lofit, "lofit", LOFIT)
    full = items_of(model, task, lofit, split=split, limit=limit)
    bare = items_of(model, task, split=split, limit=limit)
    without, rows = [], []
    for head in tqdm(lofit.heads, desc="leave one out", disable=not progress, unit="head"):
        rest = lofit.heads - HeadSet([head])
        items = items_of(model, task, lofit.restrict(rest), split=split, limit=limit) if len(rest) else bare
        test = paired(full, items)
        low, high = test.interval or (float("nan"), float("nan"))
        rows.append({
            "head": str(head), "layer": head.layer, "index": head.head, "full": summary(full)["value"],
            "without": summary(items)["value"], "loss": test.difference, "low": low, "high": high, "p": test.p, "n": test.n,
        })  # fmt: skip
        without.append(items)
    frame = pd.DataFrame(rows)
    frame.insert(len(frame.columns) - 1, "p_holm", holm(frame["p"].tolist()))
    return LeaveOneOut(frame, full, tuple(without), bare, task.name, task.metric, split)


@dataclass(frozen=True, eq=False)
class KeepOnly:
    """How far only the first k heads' edits go.

    Attributes:
        frame: one row per run: `order` (`"best first"` or `"random"`), `draw`, `k`, `heads`, `value`, `low`, `high`, `n`. k = 0
            (no edit) and k = K (all) are the same for every order and are listed once, under `"best first"`.
        items: metric of every item, in the order of the frame.
        curve: one row per k: `k`, `best` (value of the best-first order), `random` (mean over draws), `random_low`,
            `random_high` (95 % over draws and items), `difference` (best - random), `low`, `high`, `p` (of the difference; see
            `chosen_against_random`), `draws`, `n`. `low`, `high` and `p` are NaN for fewer than four draws, k = 0 and k = K.
        task: name of the task.
        metric: name of the metric.
        split: name of the split.
        draws: number of random orders.
        seed: seed of these orders.
    """

    frame: pd.DataFrame
    items: tuple[Items, ...]
    curve: pd.DataFrame
    task: str
    metric: str
    split: str
    draws: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.KeepOnly", "schema": 1, "task": self.task, "metric": self.metric, "split": self.split,
            "draws": self.draws, "seed": self.seed, "rows": records(self.frame), "curve": records(self.curve),
            "items": [list(i) for i in self.items],
        }  # fmt: skip


def keep_only(
    model: Any, task: Task | str, lofit: Lofit, *, ks: Sequence[int] | None = None, draws: int = 5, seed: int = 0,
    split: str = "test", limit: int | None = None, progress: bool = True,
) -> KeepOnly:  # fmt: skip
    """Measure the task with only k of an adapter's edits: those of the first k heads, and of k heads in random orders.

    The edits stay as they were learned together; nothing is retrained.

    Args:
        model: any HookedTransformer or TransformerBridge that the adapter fits.
        task: what is measured, by its own metric.
        lofit: the adapter; its heads are assumed to be best first, as `HeadScores.top` returns them.
        ks: numbers of heads between 1 and K; None = all, or powers of two from 13 heads on. 0 and K are always measured too.
        draws: number of random orders.
        seed: seed of these orders: draw d is `random.Random(seed + d)`.
        split: which split to use.
        limit: use only the first rows.
        progress: show a bar over runs.

    Raises:
        InputError: a number of heads outside 1 to K, fewer than one draw, a negative seed; or as in `evaluate`.
        AdapterError: an adapter for another shape.
    """
    task = task_of(task)
    check_is(lofit, Lofit, "lofit", LOFIT)
    check_draws(draws, seed)
    inner = [k for k in check_ks(ks, lofit.k) if k < lofit.k]
    orders = [list(lofit.heads)]
    for d in range(draws):
        orders.append(random.Random(seed + d).sample(orders[0], lofit.k))
    plan = [(BEST, 0, k) for k in (0, *inner, lofit.k)] + [(RANDOM, d, k) for d in range(draws) for k in inner]
    rows, found = [], {}
    for order, draw, k in tqdm(plan, desc="keep only", disable=not progress, unit="run"):
        kept = HeadSet((orders[0] if order == BEST else orders[1 + draw])[:k])
        adapters = [lofit.restrict(kept)] if k else []
        found[order, draw, k] = items_of(model, task, *adapters, split=split, limit=limit)
        rows.append({"order": order, "draw": draw, "k": k, "heads": str(kept), **summary(found[order, draw, k])})
    curve = []
    for k in (0, *inner, lofit.k):
        best = found[BEST, 0, k]
        drawn = [found.get((RANDOM, d, k), best) for d in range(draws)]  # at k = 0 and K all orders are the same
        curve.append(_beside(best, drawn, (k, lofit.k) if k in (0, lofit.k) else None) | {"k": k})
    columns = ["k", "best", "random", "random_low", "random_high", "difference", "low", "high", "p", "draws", "n"]
    return KeepOnly(
        pd.DataFrame(rows), tuple(found.values()), pd.DataFrame(curve, columns=columns), task.name, task.metric, split, draws,
        seed,
    )  # fmt: skip


def _beside(best: Items, drawn: Sequence[Items], others: tuple[int, int] | None) -> dict[str, Any]:
    """Compare one run with several random ones on the same items; `others` as in `chosen_against_random`."""
    sets = np.array(drawn, dtype=float)
    test = chosen_against_random([best], sets[:, None], others=others)
    low, high = test.interval or (NAN, NAN)
    random_low, random_high = bootstrap_interval_over_seeds(sets) or (NAN, NAN)
    return {
        "best": summary(best)["value"], "random": test.random, "random_low": random_low, "random_high": random_high,
        "difference": test.difference, "low": low, "high": high, "p": test.p if test.interval else NAN, "draws": len(drawn),
        "n": len(best),
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Removal:
    """How much the model loses without some heads.

    Attributes:
        frame: one row per run: `which` (`"none"`, `"chosen"`, `"random"`), `draw`, `k` (heads silenced), `heads`, `value`, `low`,
            `high`, `n`.
        items: metric of every item, in the order of the frame.
        curve: one row per k: `k`, `none` (nothing silenced), `chosen`, `chosen_low`, `chosen_high` (95 % over items), `random`,
            `random_low`, `random_high` (95 % over draws and items), `difference` (chosen - random; below 0: removing the chosen
            heads hurts more), `low`, `high`, `p` (of the difference; see `chosen_against_random`), `pool` (heads that the random
            ones were drawn from), `draws`, `n`. `low`, `high` and `p` are NaN for fewer than four draws, for fewer than four
            heads in the pool, or if k takes all of it.
        task: name of the task.
        metric: name of the metric.
        split: name of the split.
        how: `"mean"` or `"zero"`; `"edits"` if only an adapter's edits were removed.
        draws: number of random sets.
        seed: seed of these sets.
    """

    frame: pd.DataFrame
    items: tuple[Items, ...]
    curve: pd.DataFrame
    task: str
    metric: str
    split: str
    how: str
    draws: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.Removal", "schema": 1, "task": self.task, "metric": self.metric, "split": self.split,
            "how": self.how, "draws": self.draws, "seed": self.seed, "rows": records(self.frame),
            "curve": records(self.curve), "items": [list(i) for i in self.items],
        }  # fmt: skip


def removal(
    model: Any, task: Task | str, heads: Heads, *, adapter: Intervention | None = None, pool: Heads | None = None,
    prompts: Sequence[str] | None = None, how: How = "mean", ks: Sequence[int] | None = None, draws: int = 5, seed: int = 0,
    split: str = "test", limit: int | None = None, progress: bool = True,
) -> Removal:  # fmt: skip
    """Measure the task when the first k chosen heads are silenced, compared with as many random heads.

    Silenced means that z is its mean at every position (`"mean"`), or 0. Means are those of the model without the adapter. The
    ablation comes after the adapter and overwrites its edits of silenced heads.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: what is measured, by its own metric.
        heads: the chosen heads, best first.
        adapter: attached throughout; None = the bare model.
        pool: heads that the random ones are drawn from, without the chosen ones; None = all others. The same layers
            (`HeadSet.all(shape).restrict(heads.layers)`) make the comparison harder.
        prompts: texts over whose tokens the means are taken; None = the prompts of the measured rows (without answers). What all
            these prompts have in common stays in the means: if they share the cue that the heads read, give other prompts.
        how: `"mean"` or `"zero"`.
        ks: numbers of heads to silence; None = 1 to K, or powers of two from 13 heads on.
        draws: number of random sets.
        seed: seed of these sets: draw d is an order of the pool by `random.Random(seed + d)`, and its first k are silenced.
        split: which split to use.
        limit: use only the first rows.
        progress: show a bar over runs.

    Raises:
        InputError: a number of heads outside 1 to K, fewer random heads than chosen ones, fewer than one draw, a negative seed,
            an unknown `how`; or as in `evaluate`.
        ModelError: heads that cannot be reached.
    """
    check_one_of("how", how, HOW)
    info, task, heads = model_info(model), task_of(task), HeadSet.of(heads)
    shape = info.grid
    heads.check((info.n_layers, info.n_heads))
    means = None
    if how == "mean":
        given = [e.prompt for e in task.examples(split, limit=limit)] if prompts is None else prompts
        means = mean_z(model, given)
    front = [] if adapter is None else [adapter]

    def measure(silenced: HeadSet) -> Items:
        behind = [HeadAblation.of(model, silenced, means=means)] if len(silenced) else []
        return items_of(model, task, *front, *behind, split=split, limit=limit)

    others = HeadSet.all(shape) if pool is None else HeadSet.of(pool)
    return _removed(measure, heads, others, ks, draws, seed, progress, (task, split, how))


def drop_edits(
    model: Any, task: Task | str, lofit: Lofit, heads: Heads, *, ks: Sequence[int] | None = None, draws: int = 5, seed: int = 0,
    split: str = "test", limit: int | None = None, progress: bool = True,
) -> Removal:  # fmt: skip
    """Measure the task when an adapter of many heads loses the edits of the first k of `heads`, compared with k random others.

    The model's own heads are unchanged; only learned edits are removed.

    Args:
        model: any HookedTransformer or TransformerBridge that the adapter fits.
        task: what is measured, by its own metric.
        lofit: the adapter, with at least twice as many heads as are dropped.
        heads: some of its heads, best first.
        ks: numbers of heads to drop; None = 1 to K, or powers of two from 13 heads on.
        draws: number of random sets.
        seed: seed of these sets, as in `removal`.
        split: which split to use.
        limit: use only the first rows.
        progress: show a bar over runs.

    Returns:
        As in `removal`, with `how = "edits"`.

    Raises:
        InputError: heads that the adapter does not edit, or fewer others than these; or as in `removal`.
        AdapterError: an adapter for another shape.
    """
    task, heads = task_of(task), HeadSet.of(heads)
    check_is(lofit, Lofit, "lofit", LOFIT)
    if missing := [str(h) for h in heads if h not in lofit.heads]:
        raise InputError(f"{', '.join(missing)} not in this adapter; it has edits on {lofit.heads}")

    def measure(dropped: HeadSet) -> Items:
        return items_of(model, task, lofit.restrict(lofit.heads - dropped), split=split, limit=limit)

    return _removed(measure, heads, lofit.heads, ks, draws, seed, progress, (task, split, "edits"))


def _removed(
    measure: Callable[[HeadSet], Items], heads: HeadSet, pool: HeadSet, ks: Sequence[int] | None, draws: int, seed: int,
    progress: bool, of: tuple[Task, str, str],
) -> Removal:  # fmt: skip
    """Measure without the first k heads, and without k others of the pool, for several k and draws."""
    check_draws(draws, seed)
    listed, others = check_ks(ks, len(heads)), [h for h in pool if h not in heads]
    if len(others) < listed[-1]:
        raise InputError(
            f"{len(others)} heads to draw from for {listed[-1]} chosen ones; choose fewer, or a larger pool"
        )
    orders = [random.Random(seed + d).sample(others, listed[-1]) for d in range(draws)]
    plan: list[tuple[str, int, list[Any]]] = [("none", 0, [])]
    plan += [("chosen", 0, list(heads)[:k]) for k in listed]
    plan += [("random", d, order[:k]) for d, order in enumerate(orders) for k in listed]
    rows, found = [], {}
    for which, draw, gone in tqdm(plan, desc="remove heads", disable=not progress, unit="run"):
        items = measure(HeadSet(gone))
        found[which, draw, len(gone)] = items
        rows.append({"which": which, "draw": draw, "k": len(gone), "heads": str(HeadSet(gone)), **summary(items)})
    curve = []
    for k in listed:
        own = found["chosen", 0, k]
        row, at = _beside(own, [found["random", d, k] for d in range(draws)], (k, len(others))), summary(own)
        curve.append({
            "k": k, "none": summary(found["none", 0, 0])["value"], "chosen": row.pop("best"), "chosen_low": at["low"],
            "chosen_high": at["high"], **row, "pool": len(others),
        })  # fmt: skip
    task, split, how = of
    return Removal(
        pd.DataFrame(rows), tuple(found.values()), pd.DataFrame(curve), task.name, task.metric, split, how, draws, seed
    )  # fmt: skip
