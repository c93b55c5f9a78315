"""Do adapters of several tasks interfere: attached together, learned one after another, after long contexts?

    interference      each task with no adapter, its own, another task's, all together, and their sum as one edit
    learned_in_turn   adapters tuned one after another, each on top of the earlier ones; every task after every step
    long_context      one task after other documents, with and without its adapter

Differences are paired by item and tested by the paired bootstrap (permutation below 50 items);
p-values are adjusted over all tests of one result (Holm).
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import pandas as pd

from lofit_lens.analysis.measure import Items, items_of, paired, records, summary
from lofit_lens.checks import check_is, check_seed, check_whole, shown, texts_of
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.stats import holm
from lofit_lens.heads import Heads
from lofit_lens.interventions.base import Intervention, attached, check_adapter
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.models import backend_of, context_length, rules_of, tokenizer_of
from lofit_lens.progress import tqdm
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import encode
from lofit_lens.tasks.registry import task_of
from lofit_lens.training.config import TrainConfig
from lofit_lens.training.lofit import tune_offsets

NONE, OWN, TOGETHER, SUM = "no adapter", "own adapter", "all together", "sum"


@dataclass(frozen=True, eq=False)
class Interference:
    """Metrics of several tasks under several conditions.

    Attributes:
        frame: one row per run: `task`, `metric`, `condition`, `value`, `low`, `high` (95 % over items), `n`.
        items: metric of every item, in the order of the frame.
        tests: one row per comparison: `task`, `first`, `second` (conditions), `difference` (first - second), `low`, `high`, `p`
            (two-sided), `p_holm`, `n`.
        order: names of the attached or tuned adapters, in order.
        split: name of the split.
    """

    frame: pd.DataFrame
    items: tuple[Items, ...]
    tests: pd.DataFrame
    order: tuple[str, ...]
    split: str

    def value(self, task: str, condition: str) -> float:
        """The metric of one run.

        Raises:
            InputError: no such run.
        """
        here = (self.frame["task"] == task) & (self.frame["condition"] == condition)
        values = self.frame.loc[here, "value"].tolist()
        if not values:
            known = ", ".join(dict.fromkeys(self.frame["condition"]))
            raise InputError(f"no run of {task!r} with {condition!r}; conditions: {known}")
        return float(values[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.Interference", "schema": 1, "order": list(self.order), "split": self.split,
            "rows": records(self.frame), "tests": records(self.tests), "items": [list(i) for i in self.items],
        }  # fmt: skip


def interference(
    model: Any, pairs: Mapping[str, tuple[Task | str, Intervention]], *, split: str = "test", limit: int | None = None,
    progress: bool = True,
) -> Interference:  # fmt: skip
    """Measure each task with no adapter, with each single adapter, and with all of them together.

    All together means attached in the order of `pairs`, each edit on top of the earlier ones. If all are LoFiT adapters, their
    sum (one edit with all A and v added up) is measured too; without scalings A it is the same edit.

    Args:
        model: any HookedTransformer or TransformerBridge.
        pairs: name -> (task, its adapter), at least two, in the order of attachment.
        split: which split to use.
        limit: use only the first rows.
        progress: show a bar over runs.

    Returns:
        Conditions `"no adapter"`, `"own adapter"`, `"adapter of NAME"` (of each other task), `"all together"`, and `"sum"`.
        Tests: all together against the task's own adapter, each other adapter against no adapter.

    Raises:
        InputError: fewer than two tasks; or as in `evaluate`.
        AdapterError: an adapter for another shape.
    """
    backend_of(model)
    check_is(pairs, Mapping, "pairs", "name -> (task, its adapter), two or more")
    if len(pairs) < 2:
        raise InputError(f"{len(pairs)} task(s) cannot interfere; give two or more with their adapters")
    pairs = {str(name): _pair(name, pair) for name, pair in pairs.items()}
    adapters = {name: adapter for name, (_, adapter) in pairs.items()}
    lofits = [a for a in adapters.values() if isinstance(a, Lofit)]
    sides: dict[str, list[Intervention]] = {TOGETHER: list(adapters.values())}
    if len(lofits) == len(adapters):
        sides[SUM] = [reduce(lambda a, b: a + b, lofits)]
    runs: dict[tuple[str, str], Items] = {}
    plan = []
    for name in pairs:
        others = {_of(other): [adapter] for other, adapter in adapters.items() if other != name}
        plan += [(name, c, a) for c, a in ({NONE: [], OWN: [adapters[name]]} | others | sides).items()]
    for name, condition, attach in tqdm(plan, desc="interference", disable=not progress, unit="run"):
        runs[name, condition] = items_of(model, pairs[name][0], *attach, split=split, limit=limit)
    tests = [(name, TOGETHER, OWN) for name in pairs]
    tests += [(name, _of(other), NONE) for name in pairs for other in pairs if other != name]
    return _result(runs, tests, {n: t for n, (t, _) in pairs.items()}, tuple(pairs), split)


def _pair(name: str, pair: Any) -> tuple[Task, Intervention]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{name!r} is {shown(pair)}; give (task, its adapter)")
    check_adapter(pair[1])
    return task_of(pair[0]), pair[1]


def learned_in_turn(
    model: Any, tasks: Mapping[str, Task | str], heads: Mapping[str, Heads], *, seed: int = 42,
    config: TrainConfig | None = None, split: str = "test", limit: int | None = None, progress: bool = True,
) -> tuple[Interference, dict[str, Lofit]]:  # fmt: skip
    """Tune offsets for one task after another while the earlier adapters stay attached; measure every task after every step.

    A later adapter may depend on the earlier ones, so they belong together in this order. DPO's reference is the model
    with the earlier adapters.

    Args:
        model: any HookedTransformer or TransformerBridge.
        tasks: name -> task, at least two, in the order of learning.
        heads: name -> the heads to tune for it.
        seed: seed of each tuning.
        config: hyperparameters; None = each task's preset.
        split: which rows are measured.
        limit: use only the first rows of the split.
        progress: show a bar over tunings and runs.

    Returns:
        The results, with conditions `"no adapter"` and `"after NAME"` (all adapters up to NAME attached), and tests of the last
        step against the step in which a task was learned, for all tasks but the last. And the adapters by name.

    Raises:
        InputError: fewer than two tasks, or a task without heads; or as in `tune_offsets` and `evaluate`.
        TrainingDiverged: a loss that is NaN or infinite.
    """
    backend_of(model)
    for kind, given in (("tasks", tasks), ("heads", heads)):
        check_is(given, Mapping, kind, f"name -> {kind}, for two or more tasks")
    tasks = {name: task_of(task) for name, task in tasks.items()}
    if len(tasks) < 2:
        raise InputError(f"{len(tasks)} task(s) cannot be learned in turn; give two or more")
    if missing := [name for name in tasks if name not in heads]:
        raise InputError(f"no heads for {', '.join(missing)}; give a HeadSet for each task")
    runs = {(name, NONE): items_of(model, task, split=split, limit=limit) for name, task in tasks.items()}
    learned: dict[str, Lofit] = {}
    for name, task in tqdm(tasks.items(), desc="learned in turn", disable=not progress, unit="task"):
        with attached(model, *learned.values()):
            learned[name] = tune_offsets(model, task, heads[name], seed=seed, config=config, progress=False)
        for other, asked in tasks.items():
            runs[other, _after(name)] = items_of(model, asked, *learned.values(), split=split, limit=limit)
    names = list(tasks)
    tests = [(name, _after(names[-1]), _after(name)) for name in names[:-1]]
    order = [(name, c) for name in names for c in (NONE, *map(_after, names))]
    return _result({key: runs[key] for key in order}, tests, tasks, tuple(names), split), learned


@dataclass(frozen=True, eq=False)
class LongContext:
    """A task's metric after contexts of several lengths.

    Attributes:
        frame: one row per run: `length` (most filler tokens), `tokens` (their mean number), `adapter` (True: attached), `value`,
            `low`, `high` (95 % over items), `n`.
        items: metric of every item, in the order of the frame.
        tests: one row per length: `length`, `gain` (with - without the adapter), `low`, `high`, `p`, `p_holm`; `loss` (with the
            adapter, without filler - at this length), `loss_low`, `loss_high`, `loss_p`, `loss_p_holm` (NaN at length 0); `n`.
        task: name of the task.
        metric: name of the metric.
        split: name of the split.
        seed: seed of the draw of documents.
    """

    frame: pd.DataFrame
    items: tuple[Items, ...]
    tests: pd.DataFrame
    task: str
    metric: str
    split: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.LongContext", "schema": 1, "task": self.task, "metric": self.metric, "split": self.split,
            "seed": self.seed, "rows": records(self.frame), "tests": records(self.tests),
            "items": [list(i) for i in self.items],
        }  # fmt: skip


def long_context(
    model: Any, task: Task | str, adapter: Intervention, fillers: Iterable[str], lengths: Sequence[int], *,
    separator: str = "\n\n", seed: int = 0, split: str = "test", limit: int | None = None, progress: bool = True,
) -> LongContext:  # fmt: skip
    """Measure the task with other documents prepended to each prompt, up to each length, with and without the adapter.

    Every item gets its own order of documents (by seed and item), the same at all lengths. A longer context adds documents at
    its start, so the text right before the question stays the same. A document that would exceed the length is left out, with
    all that would precede it. LoFiT edits the documents' tokens too.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: the task to measure, by its own metric.
        adapter: attached in one of the two runs at each length.
        fillers: documents, without BOS.
        lengths: numbers of filler tokens; 0 (the bare prompt) is always measured.
        separator: text after each document.
        seed: seed of the draw of documents.
        split: which split to use.
        limit: use only the first rows.
        progress: show a bar over runs.

    Raises:
        InputError: no filler, no length, or a length below 0; or as in `evaluate`.
        DataError: an item that does not fit the context, or fillers that give no more tokens than a shorter length.
        AdapterError: an adapter for another shape.
    """
    backend_of(model)
    task, documents = task_of(task), texts_of("fillers", fillers)
    check_adapter(adapter)
    check_seed(seed)
    check_is(separator, str, "separator", "a text")
    if not documents or not isinstance(lengths, Sequence) or not lengths:
        raise InputError(f"{len(documents)} fillers and lengths {shown(lengths)}; give at least one of both")
    for length in lengths:
        check_whole(0, length=length)
    listed = sorted({0, *lengths})
    examples = task.examples(split, limit=limit)
    if listed[-1] >= context_length(model):
        raise DataError(f"a length of {listed[-1]} leaves no room for a prompt; the context is {context_length(model)}")
    tokenizer, rows, found = tokenizer_of(model), [], {}
    sizes = [_size(tokenizer, text + separator) for text in documents]
    plan = [(n, on) for n in listed for on in (False, True)]
    asked, tokens = {}, {}
    for n in listed:
        drawn = [_in_front(sizes, n, random.Random(f"{seed} {i}")) for i in range(len(examples))]
        tokens[n] = sum(sum(sizes[j] for j in d) for d in drawn) / len(drawn)
        made = [
            replace(e, prompt="".join(documents[j] + separator for j in d) + e.prompt)
            for e, d in zip(examples, drawn, strict=True)
        ]
        asked[n] = replace(task, test={split: tuple(made)}, forms={})
    for at, shorter in zip(listed[1:], listed, strict=False):
        if tokens[at] <= tokens[shorter]:
            raise DataError(
                f"fillers give no more tokens at length {at} than at {shorter}; give shorter or more documents"
            )
    for n, on in tqdm(plan, desc="long context", disable=not progress, unit="run"):
        items = items_of(model, asked[n], *([adapter] if on else []), split=split)
        found[n, on] = items
        rows.append({"length": n, "tokens": tokens[n], "adapter": on, **summary(items)})
    tests = []
    for n in listed:
        gain, loss = _test(found[n, True], found[n, False]), _test(found[0, True], found[n, True])
        none = None if n else float("nan")
        tests.append({
            "length": n, "gain": gain["difference"], "low": gain["low"], "high": gain["high"], "p": gain["p"],
            "loss": loss["difference"], "loss_low": loss["low"], "loss_high": loss["high"],
            "loss_p": loss["p"] if none is None else none, "n": gain["n"],
        })  # fmt: skip
    frame = pd.DataFrame(tests)
    adjusted = holm([*frame["p"].tolist(), *frame["loss_p"].tolist()[1:]])
    frame["p_holm"], frame["loss_p_holm"] = adjusted[: len(frame)], [float("nan"), *adjusted[len(frame) :]]
    return LongContext(pd.DataFrame(rows), tuple(found.values()), frame, task.name, task.metric, split, seed)


def _of(name: str) -> str:
    return f"adapter of {name}"


def _after(name: str) -> str:
    return f"after {name}"


def _test(first: Items, second: Items) -> dict[str, Any]:
    found = paired(first, second)
    low, high = found.interval or (float("nan"), float("nan"))
    return {"difference": found.difference, "low": low, "high": high, "p": found.p, "n": found.n}


def _result(
    runs: Mapping[tuple[str, str], Items], tests: Sequence[tuple[str, str, str]], tasks: Mapping[str, Task],
    order: tuple[str, ...], split: str,
) -> Interference:  # fmt: skip
    rows = [{"task": t, "metric": tasks[t].metric, "condition": c, **summary(items)} for (t, c), items in runs.items()]
    compared = [{"task": t, "first": a, "second": b, **_test(runs[t, a], runs[t, b])} for t, a, b in tests]
    frame = pd.DataFrame(compared)
    frame.insert(len(frame.columns) - 1, "p_holm", holm(frame["p"].tolist()))
    return Interference(pd.DataFrame(rows), tuple(runs.values()), frame, order, split)


def _size(tokenizer: Any, text: str) -> int:
    return len(encode(tokenizer, text)) - len(rules_of(tokenizer).front)


def _in_front(sizes: Sequence[int], length: int, draw: random.Random) -> list[int]:
    """Documents to prepend to one prompt, first to last: drawn backwards from the prompt until the length would be exceeded."""
    found: list[int] = []
    room = length
    for i in draw.sample(range(len(sizes)), len(sizes)):
        if sizes[i] > room:
            break
        found.insert(0, i)
        room -= sizes[i]
    return found
