"""The paper's tables from a study: methods (Tables 1 and 3), head selectors (Table 2), tasks not tuned on (Table 5).

Rows are methods, columns are tasks. Each cell is a mean with its 95 % interval over seeds and items, and the mark of its paired
test against the table's reference (Holm over the methods of a task).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lofit_lens import io
from lofit_lens.evaluation.compare import compare, over_seeds
from lofit_lens.evaluation.result import Metric, how_many, table_html
from lofit_lens.evaluation.stats import PairedTest, holm, mark
from lofit_lens.experiments.methods.base import OWN, RANDOM
from lofit_lens.experiments.tables.results import LOFIT, ZERO, Results
from lofit_lens.experiments.tables.table import MethodTable, markdown, over_texts, paired_tester, settings_text, tex

STARS = "* p < 0.05, + p < 0.1 against {reference}: paired tests, adjusted over the {rows} of a task by Holm"
IN_TABLE_1 = (f"heads by {OWN}", f"heads by {RANDOM}")  # these alone would repeat its rows
MEAN = "mean [95 % bootstrap interval over seeds and items]; with few seeds these intervals can be too narrow"


@dataclass(frozen=True, eq=False)
class PaperTable:
    """One table of a paper.

    Attributes:
        name: file name.
        title: the table's title.
        columns: column headings of `cells`.
        cells: rows of text.
        notes: explanations below the table.
        frame: the numbers, one row per method and task.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    frame: pd.DataFrame

    def to_markdown(self) -> str:
        """Return a Markdown table with title and notes."""
        return markdown(self.title, self.columns, self.cells, self.notes)

    def to_latex(self) -> str:
        """Return a LaTeX `table*` for the booktabs package."""
        body = "\n".join("  " + " & ".join(map(tex, row)) + r" \\" for row in self.cells)
        return (
            "% needs \\usepackage{booktabs}\n\\begin{table*}\n\\centering\\small\n"
            f"\\caption{{{tex(self.title)}. {tex('; '.join(self.notes))}.}}\n"
            f"\\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}\n\\toprule\n"
            f"  {' & '.join(map(tex, self.columns))} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table*}}\n"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return title, columns, rows of text and notes; JSON-able."""
        return {
            "title": self.title, "columns": list(self.columns), "rows": [list(r) for r in self.cells], "notes": list(self.notes)
        }  # fmt: skip

    def save(self, folder: str | Path) -> list[Path]:
        """Write the table as .md, .tex and .csv (numbers); files of the same names are replaced.

        Raises:
            InputError: the folder is not writable.
        """
        front = Path(folder) / self.name
        texts = {
            "md": self.to_markdown(), "tex": self.to_latex(), "csv": self.frame.to_csv(index=False, lineterminator="\n")
        }  # fmt: skip
        return [io.write_text(f"{front}.{ending}", text) for ending, text in texts.items()]

    def _repr_html_(self) -> str:
        return table_html(self.title, self.columns, self.cells, self.notes)


def paper_tables(results: Results) -> list[PaperTable]:
    """Return the tables for which the study has runs, in the paper's order."""
    methods = {t: table for t in results.tasks if (table := results.method_table(t)) is not None}
    selectors = {t: table for t in results.tasks if (table := results.selector_table(t)) is not None}
    found = []
    model = results.model.name
    if methods:
        kinds = {name: kind for t in methods for name, kind in results.kinds(t).items()}
        parts = {
            "table1": (("steered", "random"), ("zero", "steered", "random", "own", "all")),
            "table3": (("trained",), ("own", "wide", "trained")),
        }
        for name, (needed, shown) in parts.items():
            if set(needed) & set(kinds.values()):
                rows = [row for row, kind in kinds.items() if kind in shown]
                *front, last = (LOFIT, *(r for r in rows if not r.startswith(LOFIT)))
                found.append(_wide(name, f"{', '.join(front)} and {last} ({model})", methods, rows, "methods"))
    if any(row not in IN_TABLE_1 for table in selectors.values() for row in (r.method for r in table.rows)):
        named = list(dict.fromkeys(r.method for table in selectors.values() for r in table.rows))
        table = _wide(
            "table2",
            f"Heads by different selectors, each followed by offset tuning ({model})",
            selectors,
            named,
            "selectors",
        )
        found.insert(min(1, len(found)), table)
    if (last := _other_tasks(results)) is not None:
        found.append(last)
    return [t for t in found if len(t.cells) > 1]


def _wide(name: str, title: str, tables: Mapping[str, MethodTable], rows: Sequence[str], what: str) -> PaperTable:
    first = next(iter(tables.values()))
    there = [r for r in rows if any(r == row.method for t in tables.values() for row in t.rows)]
    cells, numbers = [], []
    for method in there:
        line, counts = [], []
        for task, table in tables.items():
            row = next((r for r in table.rows if r.method == method), None)
            if row is None:
                line.append("-")
                continue
            metric = row.metrics[table.metric]
            counts.append(row.n_parameters)
            line.append(f"{short(metric)} {mark(row.p_holm) if row.p_holm is not None else ''}".strip())
            numbers.append({
                "method": method, "task": task, "metric": table.metric, **_numbers(metric), "n_parameters": row.n_parameters,
                **_difference(row.against and row.against[table.metric], row.p_holm),
            })  # fmt: skip
        count = " to ".join(f"{n:,}" for n in sorted(set(counts))[:: max(1, len(set(counts)) - 1)])
        cells.append((method, count, *line))
    heads = [f"{t.task}, {t.metric.upper()} (n={len(t.methods[0].runs[0].result.items)})" for t in tables.values()]
    runs = how_many(((n["method"], n["seeds"]) for n in numbers), "run")
    notes = (
        MEAN, f"per row: {runs}, each with its own seed or draw of heads", STARS.format(reference=first.reference, rows=what),
        "parameters: learned or estimated numbers that the method adds to the model",
        *_settings(tables, there),
    )  # fmt: skip
    return PaperTable(name, title, ("method" if what == "methods" else "heads", "parameters", *heads), tuple(cells), notes,
                      pd.DataFrame(numbers))  # fmt: skip


def _settings(tables: Mapping[str, MethodTable], there: Sequence[str]) -> list[str]:
    """Say how the settings of the rows were chosen, task by task."""
    found: dict[str, dict[str, list[str]]] = {}
    for method in there:
        rows = [row for t in tables.values() for row in t.rows if row.method == method and row.settings]
        if rows:
            how = (
                f"chosen on {_validation_rows(tables, method)}"
                if rows[0].tried > 1
                else "presets, or the same as LoFiT's"
            )
            each = [settings_text(row.settings) for row in rows]
            text = each[0] if len(set(each)) == 1 else " / ".join(each)
            found.setdefault(how, {}).setdefault(text, []).append(method)
    return [
        f"settings ({how}): " + "; ".join(f"{', '.join(methods)}: {text}" for text, methods in texts.items())
        for how, texts in found.items()
    ]


def _validation_rows(tables: Mapping[str, MethodTable], method: str) -> str:
    """Say on how many validation rows a method's settings were chosen, if its trials record it."""
    trials = [m.tuned.trials for t in tables.values() for m in t.methods if m.method == method and m.tuned]
    counts = sorted({int(n) for frame in trials if "n_items" in frame for n in frame["n_items"].dropna()})
    return f"{' or '.join(map(str, counts))} validation rows" if counts else "the validation rows"


def _other_tasks(results: Results) -> PaperTable | None:
    """Return Table 5: what tuning on one task does to other tasks and to ordinary text."""
    others = list(results.record["other_tasks"])
    rows = {o: results.rows(tested=o) for o in others}
    rows = {o: r for o, r in rows.items() if set(r["method"]) > {ZERO}}
    if not rows:
        return None
    cells: dict[str, list[str]] = {"unmodified": []}
    numbers = []
    for other in rows:
        base = [results.evaluations[i] for i in results.rows(tested=other, method=ZERO).index]
        metric = next(iter(base[0].metrics))
        tuned = {t: [results.evaluations[i] for i in results.lofit(t, tested=other).index] for t in results.tasks}
        tuned = {t: runs for t, runs in tuned.items() if runs}
        test = paired_tester(len(base[0].items))
        tests = {t: compare(runs, base, test=test)[metric] for t, runs in tuned.items()}
        adjusted = dict(zip(tests, holm([x.p for x in tests.values()]), strict=True))
        for name, runs in {"unmodified": base, **tuned}.items():
            mean, p = over_seeds(runs)[metric], adjusted.get(name)
            cells.setdefault(name, []).append(f"{short(mean)} {mark(p) if p is not None else ''}".strip())
            numbers.append(
                {"tuned_on": name, "task": other, "metric": metric, **_numbers(mean), **_difference(tests.get(name), p)}
            )
    extra: tuple[str, ...] = ()
    hurt = {t: found for t in results.tasks if t in cells and (found := results.damage(t)) is not None}
    if hurt:
        cells["unmodified"].append("0")
        extra = ("text: KL, nats per token",)
    for t, kl in hurt.items():
        mean = over_texts(kl)
        cells[t].append(short(mean))
        numbers.append(
            {"tuned_on": t, "task": "ordinary text", "metric": "kl", **_numbers(mean), **_difference(None, None)}
        )
    heads = [f"{o}, {next(iter(results.evaluations[r.index[0]].metrics)).upper()}" for o, r in rows.items()]
    title = f"LoFiT's adapters on other tasks and on ordinary text ({results.model.name})"
    return PaperTable(
        "table5", title, ("tuned on", *heads, *extra),
        tuple((name, *line) for name, line in cells.items()),
        (MEAN, STARS.format(reference="the unmodified model", rows="adapters")), pd.DataFrame(numbers),
    )  # fmt: skip


def short(metric: Metric) -> str:
    """Return `.98 [.95, 1.00]`."""

    def two(x: float) -> str:
        return f"{x:.2f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:.2f}"

    between = f" [{two(metric.interval[0])}, {two(metric.interval[1])}]" if metric.interval else ""
    return two(metric.mean) + between


def _difference(test: PairedTest | None, p_holm: float | None) -> dict[str, Any]:
    """Return the test of a row minus the table's reference."""
    low, high = (test and test.interval) or (None, None)
    return {
        "difference": test and test.difference, "low_of_difference": low, "high_of_difference": high, "p_holm": p_holm
    }  # fmt: skip


def _numbers(metric: Metric) -> dict[str, Any]:
    low, high = metric.interval or (None, None)
    return {"mean": metric.mean, "low": low, "high": high, "n_items": metric.n, "seeds": metric.seeds}
