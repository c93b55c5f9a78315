"""The data to explore, in one form: named rankings of the heads of one model, and stored readings of adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lofit_lens.analysis.overlap import joint_shape
from lofit_lens.checks import check_one_of, texts_of
from lofit_lens.errors import InputError, unknown
from lofit_lens.experiments.grid.expand import TOGETHER
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.experiments.tables.results import Results
from lofit_lens.explorer.readings import stored_attention, stored_readings
from lofit_lens.heads import Grid, Head, HeadScores, HeadSet, named_rankings
from lofit_lens.models import ModelInfo, model_info, same_weights

USUAL_SHARE = 0.03  # of all heads: K where nothing says another (the paper's main setting)
# Selectors in the order to show; selections of one's own come last.
ORDER = (
    "A-norm", "bias norm", "probe accuracy", "probing layers", "gradient attribution", "activation patching", "JoLA gates",
    "random",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Entry:
    """One ranking of heads.

    Attributes:
        name: shown to the reader, e.g. `"LoFiT"` or `"organism/truth, A-norm, seed 0"`.
        task: what it was computed on; empty if unknown.
        method: how it was computed; the name if unknown.
        seed: of the method, or None.
        kind: what the score is.
        ranking: heads, best first; all of the model, or those of a given set.
        scores: `[n_layers, n_heads]`, or None for a set without scores of all heads.
        k: the usual number of heads.
    """

    name: str
    task: str
    method: str
    seed: int | None
    kind: str
    ranking: HeadSet
    scores: HeadScores | None
    k: int

    @cached_property
    def shades(self) -> dict[Head, float]:
        """Head -> 0 (lowest score, or last rank) to 1; 0.5 if all scores are equal. Unranked heads are left out."""
        if self.scores is None:
            return {head: 1 - (rank - 1) / len(self.ranking) for head, rank in self.ranks.items()}
        values = {head: self.scores[head] for head in self.ranking}
        low, high = min(values.values()), max(values.values())
        return {head: (x - low) / (high - low) if high > low else 0.5 for head, x in values.items()}

    @cached_property
    def ranks(self) -> dict[Head, int]:
        """Head -> rank, from 1."""
        return {head: i for i, head in enumerate(self.ranking, start=1)}


@dataclass(frozen=True, eq=False)
class Source:
    """All that is known without running a model.

    Attributes:
        entries: name -> ranking, in the order to show.
        shape: `(n_layers, n_heads)`, and which layers have heads.
        readings: head -> stored readings of its edits (`readings.reading`).
        attention: prompts with patterns, as `readings.stored_attention` gives them.
        left_out: number of attention patterns left out.
        results: where they come from, or None.
    """

    entries: dict[str, Entry]
    shape: Grid
    readings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    attention: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    results: Results | None = None

    def entry(self, name: str | Sequence[Any]) -> Entry:
        """An entry by its name, or by (task, method) or (task, method, seed).

        Raises:
            InputError: no such entry.
        """
        if isinstance(name, str):
            if name not in self.entries:
                raise unknown("head set", name, self.entries)
            return self.entries[name]
        for entry in self.entries.values() if isinstance(name, tuple | list) else ():
            if tuple(name) in ((entry.task, entry.method), (entry.task, entry.method, entry.seed)):
                return entry
        said = ", ".join(map(str, name)) if isinstance(name, tuple | list) else name
        raise unknown("head set", said, self.entries)


def read_source(source: Any, model: Any = None, *, tasks: Sequence[str] | None = None) -> Source:
    """Bring what is to be explored to one form.

    Args:
        source: a results folder, `load_results(...)`, or a mapping of names, or of (task, method), to `HeadScores` or `HeadSet`.
        model: the loaded model, or None; says the shape of head sets that do not.
        tasks: only these; None = all.

    Raises:
        InputError: nothing to show, something else than the above, heads of several models, a model of another shape or (results,
            which know) of other weights, or an unknown task.
        DataError: a folder that holds no results, or damaged ones.
    """
    info = None if model is None else model_info(model)
    if isinstance(source, str | Path):
        source = load_results(source)
    made = _of_results(source) if isinstance(source, Results) else _of_mapping(source, info)
    if info is not None and made.shape != (info.n_layers, info.n_heads):
        raise InputError(
            f"these heads belong to a model of {made.shape[0]} layers x {made.shape[1]} heads; {info.name} has {info.n_layers} x "
            f"{info.n_heads}. Give the model they were chosen on"
        )
    if info is not None and made.results is not None and not same_weights(made.results.model, info):
        raise InputError(
            f"these results are of {made.results.model.name}, but {info.name} has other weights; load that model, or give no "
            "model"
        )
    if tasks is None:
        return made
    known = list(dict.fromkeys(e.task for e in made.entries.values() if e.task))
    if not known:
        raise InputError(
            "tasks= chooses among tasks, but these head sets are named without a task; leave it out, or use keys (task, method)"
        )
    for task in (tasks := texts_of("tasks", tasks)):
        check_one_of("task", task, known)
    kept = {name: e for name, e in made.entries.items() if e.task in tasks}
    if not kept:
        raise InputError(f"tasks is empty; give some of {', '.join(known)}, or None for all")
    return replace(made, entries=kept)


def _of_results(results: Results) -> Source:
    if not results.scores:
        raise InputError(
            f"{results.folder} holds no head scores; run a grid that selects heads (lofit-lens grid --list), or give "
            "{name: HeadScores}"
        )
    places = {by: i for i, by in enumerate(ORDER)}
    keys = sorted(results.scores, key=lambda k: (results.tasks.index(k[0]), places.get(k[1], len(ORDER)), *k[1:]))
    entries = [_entry(results.scores[key], *key, k=results.k(key[0])) for key in keys]
    read = {task: parts for task, parts in results.readings().items() if task != TOGETHER}
    readings: dict[str, list[dict[str, Any]]] = {}
    for task, parts in read.items():
        for head, found in stored_readings(task, parts).items():
            readings.setdefault(head, []).append(found)
    attention, left_out = stored_attention({t: parts["attention"] for t, parts in read.items() if "attention" in parts})
    return Source({e.name: e for e in entries}, results.model.grid, readings, attention, left_out, results)


def _of_mapping(source: Any, info: ModelInfo | None) -> Source:
    listed = source if isinstance(source, list | tuple) else [source]
    if all(isinstance(one, HeadScores | HeadSet) for one in listed):
        source = named_rankings(source)
    if not isinstance(source, Mapping):
        raise InputError(
            f"cannot explore a {type(source).__name__}; give a results folder, ll.load_results(...), or head scores or sets by "
            "name, e.g. {'LoFiT': scores, 'ITI': probe_scores}"
        )
    if not source:
        raise InputError("no head set to show; give at least one, e.g. {'LoFiT': ll.select_heads(model, task)}")
    for key, value in source.items():
        if not isinstance(value, HeadScores | HeadSet):
            raise InputError(
                f"{key!r} is a {type(value).__name__}; give HeadScores (select_heads, probe_heads) or a HeadSet"
            )
        if isinstance(value, HeadSet) and not len(value):
            raise InputError(f"head set {key!r} is empty; leave it out")
    known = any(value.shape for value in source.values())
    of_model = None if info is None or known else info.grid
    shape = joint_shape({str(k): v for k, v in source.items()}, of_model)
    names = [isinstance(key, str) for key in source]
    pairs = [isinstance(key, tuple) and len(key) == 2 and all(isinstance(p, str) for p in key) for key in source]
    if not all(names) and not all(pairs):
        raise InputError(
            f"keys {list(source)} are not of one form; give names ('LoFiT') for all, or (task, method) for all"
        )
    total = shape.n_total
    entries = []
    for key, value in source.items():
        task, method = key if isinstance(key, tuple) else ("", key)
        k = len(value) if isinstance(value, HeadSet) else max(1, round(USUAL_SHARE * total))
        entries.append(_entry(value, task, method, None, k=k, shape=shape))
    said = list(dict.fromkeys(v.model for v in source.values() if isinstance(v, HeadScores) and v.model))
    if len(said) > 1:
        raise InputError(f"these head scores come from several models ({', '.join(said)}); explore one model at a time")
    named = {e.name: e for e in entries}
    if len(named) < len(entries):
        twice = next(name for name in named if [e.name for e in entries].count(name) > 1)
        raise InputError(f"keys {list(source)} give two head sets the same name, {twice!r}; rename one of them")
    return Source(named, shape)


def _entry(
    value: HeadScores | HeadSet, task: str, method: str, seed: int | None, *, k: int, shape: tuple[int, int] | None = None
) -> Entry:  # fmt: skip
    name = ", ".join(filter(None, [task, method, "" if seed is None else f"seed {seed}"]))
    if isinstance(value, HeadScores):
        return Entry(name, task, method, seed, value.kind, value.ranking(), value, k)
    return Entry(
        name, task, method, seed, "rank in the set", HeadSet(value.heads, value.scores, shape, value.label), None, k
    )
