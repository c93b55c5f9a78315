"""All figures and tables of a study, drawn from its folder alone: nothing is trained or run here.

| file | what it shows |
|---|---|
| fig2_transfer | offsets tuned on one task with another task's heads (the paper's Figure 2) |
| fig3_layers | share of chosen heads by layer (Figure 3) |
| fig4_data | accuracy against the number of training examples (Figure 4) |
| fig5_heads | accuracy against the number of heads (Figure 5) |
| table1, table2, table3, table5 | methods, selectors, tasks not tuned on |
| head_grid, overlap_tasks, overlap_selectors, agreement, stability | head sets |
| methods | Tables 1 and 3 as a figure |
| trials | settings that were tried on validation rows; a table only |
| and what `experiments.readings` found about each adapter | |
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lofit_lens import io
from lofit_lens.analysis.layers import layer_shares
from lofit_lens.analysis.overlap import agreement_by_k, overlap
from lofit_lens.analysis.stability import stability
from lofit_lens.analysis.sweeps import paired_differences, sweep
from lofit_lens.analysis.transfer import Transfer, transfer_matrix
from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments.methods.base import OWN
from lofit_lens.experiments.organism import planted
from lofit_lens.experiments.tables.paper_tables import paper_tables
from lofit_lens.experiments.tables.results import LOFIT, ZERO, Results
from lofit_lens.experiments.tables.table import settings_text
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.models import ORGANISM
from lofit_lens.plots.curves import metric_name
from lofit_lens.plots.heads import head_grid
from lofit_lens.plots.layers import layer_distribution
from lofit_lens.plots.layout import say
from lofit_lens.plots.methods import method_bars
from lofit_lens.plots.overlap import agreement_curves, overlap_heatmap
from lofit_lens.plots.saving import FORMATS, check_formats, many_figures, save_figure
from lofit_lens.plots.stability import stability_curves
from lofit_lens.plots.sweeps import data_efficiency, k_sweep
from lofit_lens.plots.transfer import transfer_heatmap
from lofit_lens.report.drawn import Drawn, short_names
from lofit_lens.report.official import official_figures
from lofit_lens.report.reading_figures import reading_figures

log = logging.getLogger(__name__)


Draw = Callable[[Results], Iterator[Drawn]]
"""A study's results -> figures with their tables; InputError where the study lacks the runs for it."""

Restyle = Callable[[go.Figure], go.Figure]


def draw_all(
    results: Results, out: str | Path, *, formats: Sequence[str] = FORMATS, heads: str | Path | None = None,
    more: Sequence[Draw] = (), restyle: Restyle | None = None,
) -> list[Path]:  # fmt: skip
    """Write every figure and table for which the study has runs.

    Args:
        results: a study.
        out: folder; files of the same names are replaced.
        formats: of the figures; see `save_figure`.
        heads: folder with the official code's head files, for Figure 3 and the overlaps from real heads.
        more: figures of one's own.
        restyle: what is done to each figure before it is written, e.g. `partial(for_paper, paper="icml")`.

    Returns:
        The files.

    Raises:
        InputError: an unknown format, or a folder that cannot be written to.
        DataError: damaged results or head files.
    """
    check_formats(formats)
    official = list(official_figures(heads)) if heads is not None else []
    files: list[Path] = []
    tables = paper_tables(results)
    for name in sorted({"table1", "table2", "table3", "table5"} - {t.name for t in tables}):
        log.warning("Table %s is left out: the study has no runs for it", name.removeprefix("table"))
    for table in tables:
        files += table.save(out)
    if len(tried := trials(results)):
        files.append(io.write_text(Path(out) / "trials.csv", tried.to_csv(index=False)))
    return files + save_all((*figures(results, more), *official), out, formats=formats, restyle=restyle)


def trials(results: Results) -> pd.DataFrame:
    """Return one row per method, setting and seed: what each method of Tables 1 and 3 tried on validation rows."""
    rows = []
    for task in results.tasks:
        table = results.method_table(task)
        for method in table.methods if table else ():
            if (tuned := method.tuned) is None:
                continue
            for row in tuned.trials.to_dict("records"):
                settings = settings_text({name: row[name] for name in tuned.settings})
                kept = {name: row[name] for name in ("seed", "value", "low", "high", "n_items", "chosen")}
                rows.append({"task": task, "method": method.method, "settings": settings, **kept})
    return pd.DataFrame(rows)


def save_all(
    drawn: Iterable[Drawn], out: str | Path, *, formats: Sequence[str] = FORMATS, restyle: Restyle | None = None
) -> list[Path]:
    """Write figures with their tables beside them; see `save_figure`."""
    files: list[Path] = []
    with many_figures(formats):
        for d in drawn:
            figure = restyle(d.figure) if restyle else d.figure
            files += save_figure(figure, Path(out) / d.name, data=d.data, formats=formats)
    return files


def figures(results: Results, more: Sequence[Draw] = ()) -> Iterator[Drawn]:
    """Each figure for which the study has runs; what is missing is said in the log."""
    for name, draw in (*FIGURES.items(), *((draw.__name__.strip("_").replace("_", " "), draw) for draw in more)):
        try:
            yield from draw(results)
        except InputError as e:
            if isinstance(e, DataError):
                raise
            log.warning("%s: left out, %s", name, e)


# --------------------------------------------------------------------------------------------------- head sets


def chosen_sets(results: Results) -> dict[str, HeadSet]:
    """Task -> its heads by A-norm with the first seed, usual K."""
    return {t: results.heads(t) for t in results.tasks}


def compared_sets(results: Results) -> dict[str, HeadSet]:
    """Heads of the rankings that stand side by side (`Results.compared`), usual K."""
    return {name: results.heads(task, by) for name, (task, by) in results.compared().items()}


def scores_by(results: Results, task: str) -> dict[str, HeadScores]:
    """Selector -> a task's scores with the first seed."""
    return {by: s for (t, by, seed), s in results.scores.items() if t == task and seed == results.seeds[0]}


def head_grids(results: Results, known: Mapping[str, HeadSet] | None = None) -> Iterator[Drawn]:
    """Every head's score: a panel a task, or for a study of one task a panel a selector.

    Args:
        results: a study.
        known: last part of a task's name -> heads to mark; None = the embedded model's planted heads, on that model.
    """
    keys = results.compared()
    scores = {name: results.scores[t, by, results.seeds[0]] for name, (t, by) in keys.items()}
    chosen = compared_sets(results)
    frame = pd.DataFrame([
        {"task": t, "by": by, "layer": h.layer, "head": h.head, "score": s[h], "rank": rank, "chosen": h in chosen[name]}
        for (name, s), (t, by) in zip(scores.items(), keys.values(), strict=True)
        for rank, h in enumerate(s.ranking(), start=1)
    ])  # fmt: skip
    if known is None:
        known = planted(ORGANISM) if results.model.name == "organism" else {}
    short = short_names(results.tasks)
    marked = {name: known[short[t]] for name, (t, _) in keys.items() if short[t] in known}
    tasks = {t for t, _ in keys.values()}
    title = "Which heads each task uses: A-norm after step 1" if len(tasks) == len(keys) else f"Heads for {tasks.pop()}"
    fig = head_grid(scores, chosen, marked=marked, scale="panel", title=title)
    yield Drawn("head_grid", say(fig, _seed(results)), frame)


def layers(results: Results) -> Iterator[Drawn]:
    """Share of the chosen heads by layer."""
    sets = compared_sets(results)
    shares = layer_shares(sets, results.model.n_layers)
    fig = layer_distribution(sets, n_layers=results.model.n_layers, title="Chosen heads by layer")
    yield Drawn("fig3_layers", say(fig, _seed(results)), shares)


def _overlap(results: Results) -> Iterator[Drawn]:
    sets = chosen_sets(results)
    if len(sets) > 1:
        frame = overlap(sets)
        title = f"{results.model.name}: heads shared by tasks"
        yield Drawn("overlap_tasks", say(overlap_heatmap(frame, "shared", title=title), _seed(results)), frame)
    by, names = {t: scores_by(results, t) for t in results.tasks}, short_names(results.tasks)
    selected = {
        f"{names[t]}: {name}": s.top(results.k(t))
        for t, named in by.items()
        for name, s in named.items()
        if len(named) > 1
    }
    if len(selected) > 1:
        frame = overlap(selected)
        title = f"{results.model.name}: overlap of tasks and selectors"
        yield Drawn("overlap_selectors", say(overlap_heatmap(frame, "jaccard", title=title), _seed(results)), frame)


def _agreement(results: Results) -> Iterator[Drawn]:
    parts, names = [], short_names(results.tasks)
    for task in results.tasks:
        named = scores_by(results, task)
        for other, scores in named.items():
            if other != OWN:
                frame = agreement_by_k(named[OWN], scores)
                parts.append(frame.assign(pair=names[task], task=task, other=other))
    if not parts:
        raise InputError("one selector only; agreement needs two")
    for other in dict.fromkeys(p["other"].iloc[0] for p in parts):
        frame = pd.concat([p for p in parts if p["other"].iloc[0] == other], ignore_index=True)
        name = f"agreement_{other.replace(' ', '_')}"
        fig = agreement_curves(frame, title=f"Heads shared by {OWN} and {other}")
        yield Drawn(name, say(fig, _seed(results)), frame)


def _stability(results: Results) -> Iterator[Drawn]:
    frames = {}
    for task in results.tasks:
        scores = [s for (t, by, _), s in results.scores.items() if (t, by) == (task, OWN)]
        if len(scores) > 1:
            frames[task] = stability(scores)
    if not frames:
        raise InputError("head scores of one seed only; stability needs two or more")
    joined = pd.concat([f.assign(task=t) for t, f in frames.items()], ignore_index=True)
    yield Drawn("stability", stability_curves(frames), joined)


# --------------------------------------------------------------------------------------------------------- runs


def transfer(results: Results) -> Transfer:
    """The transfer matrix of a study.

    Raises:
        InputError: fewer than two tasks, or a run that is missing (named).
    """
    if len(results.tasks) < 2:
        raise InputError("a transfer matrix needs two tasks or more")
    runs = {(t, o): results.values(results.lofit(t, source=o)) for t in results.tasks for o in results.tasks}
    random = {t: results.values(results.by_chance(t)) for t in results.tasks}
    return transfer_matrix(runs, random=random, metrics={t: results.metric(t) for t in results.tasks})


def _transfer(results: Results) -> Iterator[Drawn]:
    found = transfer(results)
    yield Drawn("fig2_transfer", say(transfer_heatmap(found), _ks(results, results.tasks)), found.frame)


def _k_sweep(results: Results) -> Iterator[Drawn]:
    values: dict[str, dict[float, Any]] = {}
    for task in results.tasks:
        rows = results.rows(task=task, method=LOFIT, heads_from=OWN, source=task, n_train=None)
        values[_series(results, task)] = {k: results.values(rows.loc[rows["k"] == k]) for k in sorted(set(rows["k"]))}
    if all(len(v) < 2 for v in values.values()):
        raise InputError("one number of heads only; run paper/fig5 or organism/fig5 into the same store")
    frame = sweep(values)
    fig = k_sweep(frame, n_heads_total=results.model.grid.n_total)
    yield Drawn("fig5_heads", fig, frame.merge(_against_most_heads(values), how="left", on=["series", "x"]))


def _against_most_heads(values: Mapping[str, Mapping[float, Any]]) -> pd.DataFrame:
    """Each number of heads minus the largest one of its series, with p adjusted over the series."""
    found = []
    for series, points in values.items():
        if len(points) > 1:
            pairs = paired_differences({str(k): {0.0: at} for k, at in points.items()}, str(max(points)))
            found.append(pairs.assign(x=pairs["series"].astype(float), series=series))
    columns = {"low": "low_of_difference", "high": "high_of_difference"}
    return pd.concat(found).rename(columns=columns).drop(columns=["mark", "n_items"])


def _data_efficiency(results: Results) -> Iterator[Drawn]:
    drawn, names = False, short_names(results.tasks)
    for task in results.tasks:
        found: dict[str, dict[float, Any]] = {ZERO: {0.0: results.values(results.zero_shot(task))}}
        for method in results.methods:
            rows = results.rows(task=task, method=method)
            if bool(rows["heads_from"].any()):
                rows = results.rows(task=task, method=method, heads_from=OWN, source=task, k=results.k(task))
            few = rows.loc[rows["n_train"].notna()]
            if not len(few):
                continue
            found[method] = {n: results.values(few.loc[few["n_train"] == n]) for n in sorted(set(few["n_train"]))}
            if len(whole := rows.loc[rows["n_train"].isna()]):
                found[method][_n_train(results, whole)] = results.values(whole)
        if len(found) == 1:
            continue
        frame = sweep(found).assign(task=task)
        metric = metric_name(results.metric(task))
        fig = data_efficiency(frame, metric=metric, title=f"{task}: accuracy by training examples")
        fig = say(fig, f"heads: {_ks(results, [task])}")
        drawn = True
        yield Drawn(f"fig4_data_{names[task]}", fig, frame)
    if not drawn:
        raise InputError("one number of training examples only; run paper/fig4 or organism/fig4 into the same store")


def _n_train(results: Results, rows: pd.DataFrame) -> float:
    config = io.read_json(results.folders[rows.index[0]] / "adapter" / "adapter_config.json")
    return float(config["n_train"])


def _methods(results: Results) -> Iterator[Drawn]:
    tables = {t: table for t in results.tasks if (table := results.method_table(t)) is not None}
    if not tables:
        raise InputError("no method beside LoFiT; run paper/table1 or organism/table1 into the same store")
    frame = pd.concat([
        pd.DataFrame([
            {
                "task": t, "metric": table.metric, "method": r.method, "mean": r.metrics[table.metric].mean,
                "low": (r.metrics[table.metric].interval or (np.nan, np.nan))[0],
                "high": (r.metrics[table.metric].interval or (np.nan, np.nan))[1], "n_items": r.metrics[table.metric].n,
                "seeds": r.metrics[table.metric].seeds, "n_parameters": r.n_parameters,
            }
            for r in table.rows
        ])
        for t, table in tables.items()
    ], ignore_index=True)  # fmt: skip
    yield Drawn("methods", method_bars(frame), frame)


def _series(results: Results, task: str) -> str:
    return f"{task} ({metric_name(results.metric(task))})"


def _seed(results: Results) -> str:
    return f"seed {results.seeds[0]}"


def _ks(results: Results, tasks: Iterable[str]) -> str:
    """`K=3`, or `K=3 or 16` where tasks differ."""
    return f"K={' or '.join(dict.fromkeys(str(results.k(t)) for t in tasks))}"


FIGURES: dict[str, Draw] = {
    "head grids": head_grids, "Figure 3 (heads by layer)": layers, "overlap of head sets": _overlap,
    "agreement of rankings by K": _agreement, "stability over seeds": _stability,
    "Figure 2 (transfer of heads between tasks)": _transfer, "Figure 5 (number of heads)": _k_sweep,
    "Figure 4 (number of training examples)": _data_efficiency, "comparison of methods": _methods,
    "readings of adapters": reading_figures,
}  # fmt: skip
