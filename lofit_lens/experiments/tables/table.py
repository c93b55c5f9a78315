"""The table of a comparison: one row per method, each number with its interval; as text, Markdown, LaTeX, CSV and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.evaluation.compare import Comparison, PairedTester, compare, over_seeds
from lofit_lens.evaluation.result import Metric, how_many, table_html
from lofit_lens.evaluation.stats import (
    FEW,
    bootstrap_interval_over_seeds,
    holm,
    paired_bootstrap_test,
    paired_permutation_test,
)
from lofit_lens.experiments.tables.runs import FitResult, MethodRuns
from lofit_lens.html import wrapped
from lofit_lens.models import ModelInfo

KIND, SCHEMA = "lofit_lens.MethodTable", 1


@dataclass(frozen=True)
class Spread:
    """Mean time in seconds over runs, with the shortest and longest run."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute it from one value per run."""
        return cls(float(np.mean(values)), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})" if self.low < self.high else f"{self.mean:.2f}"


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: name.
        settings: chosen on the validation split, or given; if runs differ, all values as one text.
        tried: number of settings that were tried; 0 if settings were given or reused.
        n_parameters: number of learned or estimated parameters; the same for every seed.
        metrics: mean over seeds and items with the 95 % interval.
        against: paired tests of this method minus the reference; None for the reference itself.
        p_holm: p-value for the task's own metric, adjusted over all methods; None for the reference.
        fit: seconds, selection and probing included.
        evaluation: seconds.
        kl: divergence from the unmodified model on ordinary text, nats per token; None if not measured.
        increase: increase of cross-entropy on that text, nats per token.
        heads: of each seed, for methods that edit heads.
    """

    method: str
    settings: dict[str, Any]
    tried: int
    n_parameters: int
    metrics: dict[str, Metric]
    against: Comparison | None
    p_holm: float | None
    fit: Spread
    evaluation: Spread
    kl: Metric | None
    increase: Metric | None
    heads: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class MethodTable:
    """Methods on one task, side by side.

    Attributes:
        task: name of the task.
        split: the evaluated split.
        metric: the task's main metric.
        reference: the method that the others are tested against.
        rows: one per method.
        methods: the data behind the rows: each run with its items, and the settings that were tried.
        model: the model.
        data_hash: of the task's files.
        versions: Python and package versions.
    """

    task: str
    split: str
    metric: str
    reference: str
    rows: tuple[Row, ...]
    methods: tuple[MethodRuns, ...]
    model: ModelInfo | None
    data_hash: str
    versions: dict[str, str]

    @classmethod
    def of(cls, methods: Sequence[MethodRuns], reference: str) -> "MethodTable":
        """Compute means, intervals and paired tests of these runs, all on the same rows of one task.

        Raises:
            InputError: the reference is not among them, or the same method has runs with different numbers of parameters.
        """
        named = {m.method: m for m in methods}
        if reference not in named:
            raise InputError(f"no method {reference!r} here; there are {', '.join(named)}")
        base = [r.result for r in named[reference].runs]
        metric = next(iter(base[0].metrics))
        test = paired_tester(len(base[0].items))
        others = [m for m in methods if m.method != reference]
        tests = {m.method: compare([r.result for r in m.runs], base, test=test) for m in others}
        p = dict(zip(tests, holm([t[metric].p for t in tests.values()]), strict=True)) if tests else {}
        rows = tuple(_row(m, tests.get(m.method), p.get(m.method)) for m in methods)
        return cls(
            base[0].task, base[0].split, metric, reference, rows, tuple(methods), base[0].model, base[0].data_hash,
            io.environment(),
        )  # fmt: skip

    def __getitem__(self, method: str) -> Row:
        """One method's row."""
        for row in self.rows:
            if row.method == method:
                return row
        raise InputError(f"no method {method!r} in this table; it has {', '.join(r.method for r in self.rows)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics, the task's main metric first."""
        return tuple(self.rows[0].metrics)

    # ------------------------------------------------------------------------------------------------ as text

    def columns(self) -> tuple[str, ...]:
        """Return the column headings of `cells`."""
        measured = any(r.kl for r in self.rows)
        return (
            "method", "parameters", *self.metrics, f"{self.metric} - {self.reference}", "p, Holm", "fit, s", "evaluation, s",
            *(("KL, nats", "CE increase, nats") if measured else ()),
        )  # fmt: skip

    def cells(self) -> list[tuple[str, ...]]:
        """Return one row of text per method."""
        measured = any(r.kl for r in self.rows)
        return [
            (
                r.method, f"{r.n_parameters:,}", *(str(m) for m in r.metrics.values()), *self._difference(r), str(r.fit),
                str(r.evaluation), *((_or_dash(r.kl), _or_dash(r.increase)) if measured else ()),
            )
            for r in self.rows
        ]  # fmt: skip

    def _difference(self, row: Row) -> tuple[str, str]:
        if row.against is None or row.p_holm is None:
            return "-", "-"
        test = row.against[self.metric]
        between = f" [{test.interval[0]:+.3f}, {test.interval[1]:+.3f}]" if test.interval else ""
        return f"{test.difference:+.3f}{between}", f"{row.p_holm:.4f}"

    def title(self) -> str:
        """Return the title: task, split, number of items, model."""
        model = f", {self.model.name} ({self.model.class_name})" if self.model else ""
        return f"{self.task}, {self.split} split, n={len(self.methods[0].runs[0].result.items)}{model}"

    def notes(self) -> tuple[str, ...]:
        """Return the explanations below the table."""
        runs = how_many(((m.method, len(m.runs)) for m in self.methods), "run")
        tested = next((r.against for r in self.rows if r.against is not None), None)
        chosen = [r for r in self.rows if r.tried > 1]
        tried = sorted({r.tried for r in chosen})
        edge = [m.method for m in self.methods if m.tuned is not None and m.tuned.at_edge]
        apart = {m.method for m in self.methods if m.by_run}
        by_run = [r for r in self.rows if r.method in apart]
        given = [r for r in self.rows if r.tried <= 1 and r.settings and r.method not in apart]
        notes = [
            f"[ ]: 95 % bootstrap interval over seeds and items (per row: {runs}); ( ): shortest to "
            "longest run. With few seeds these intervals can be too narrow."
        ]
        if tested is not None:
            notes.append(f"differences: {tested.notes()[0]}; p adjusted over the methods by Holm")
        if chosen:
            notes.append(
                f"settings chosen on the validation split, {' or '.join(map(str, tried))} settings per method, before the "
                f"{self.split} split was used: {_all_settings(chosen)}"
            )
        if by_run:
            notes.append(f"settings chosen for each run on the validation split: {_all_settings(by_run)}")
        if given:
            notes.append(f"settings given or reused: {_all_settings(given)}")
        if edge:
            notes.append(f"chosen at the edge of the grid, so a wider grid might do better: {', '.join(edge)}")
        if any(r.kl for r in self.rows):
            notes.append(
                "KL and increase of cross-entropy (CE) are relative to the unmodified model, in nats per token of ordinary text; "
                "intervals over seeds and texts"
            )
        notes.append(
            "parameters: learned or estimated numbers that the method adds to the model; fit: seconds, including selection or "
            "probing, without loading and the choice of settings"
        )
        return tuple(notes)

    def to_frame(self) -> pd.DataFrame:
        """Return one row of numbers per method."""
        found = []
        for r in self.rows:
            row: dict[str, Any] = {"task": self.task, "method": r.method, "n_parameters": r.n_parameters}
            for name, m in r.metrics.items():
                row |= {name: m.mean, f"{name}_low": _end(m, 0), f"{name}_high": _end(m, 1)}
            test = r.against[self.metric] if r.against else None
            row |= {
                "difference": test and test.difference, "difference_low": test and test.interval and test.interval[0],
                "difference_high": test and test.interval and test.interval[1], "p": test and test.p, "p_holm": r.p_holm,
                **{f"fit_{k}": v for k, v in asdict(r.fit).items()},
                **{f"evaluation_{k}": v for k, v in asdict(r.evaluation).items()},
            }  # fmt: skip
            for name, m in (("kl", r.kl), ("increase", r.increase)):
                row |= {name: m and m.mean, f"{name}_low": m and _end(m, 0), f"{name}_high": m and _end(m, 1)}
            found.append(
                {**row, "seeds": max(m.seeds for m in r.metrics.values()), "settings": settings_text(r.settings)}
            )
        return pd.DataFrame(found)

    def runs(self) -> pd.DataFrame:
        """Return one row per run."""
        return pd.DataFrame([
            {
                "task": self.task, "method": m.method, "seed": r.seed, **{k: v.mean for k, v in r.result.metrics.items()},
                "n_parameters": r.n_parameters, "fit_seconds": r.fit_seconds, "eval_seconds": r.eval_seconds,
                "settings": settings_text(r.settings), "heads": r.heads,
            }
            for m in self.methods for r in m.runs
        ])  # fmt: skip

    def trials(self) -> pd.DataFrame:
        """Return one row per setting and seed: all trials on the validation split."""
        tables = [m.tuned.trials.assign(method=m.method, task=self.task) for m in self.methods if m.tuned is not None]
        if not tables:
            return pd.DataFrame()
        joined = pd.concat(tables, ignore_index=True)
        return joined.reindex(columns=["task", "method", *(c for c in joined.columns if c not in ("task", "method"))])

    def to_markdown(self) -> str:
        """Return a Markdown table with its title and notes."""
        return markdown(self.title(), self.columns(), self.cells(), self.notes())

    def to_latex(self) -> str:
        """Return a LaTeX `table*` for the booktabs package, with its caption and notes."""
        columns, rows = self.columns(), self.cells()
        body = "\n".join("  " + " & ".join(map(tex, row)) + r" \\" for row in rows)
        return (
            "% needs \\usepackage{booktabs}\n\\begin{table*}\n\\centering\\scriptsize\n"
            f"\\caption{{{tex(self.title())}}}\n\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}\n\\toprule\n"
            f"  {' & '.join(map(tex, columns))} \\\\\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\n"
            + "\n\n".join(f"\\raggedright {tex(note)}" for note in self.notes())
            + "\n\\end{table*}\n"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the individual items, JSON-able."""
        return {
            "kind": KIND, "schema": SCHEMA, "task": self.task, "split": self.split, "metric": self.metric,
            "reference": self.reference, "data_hash": self.data_hash, "versions": self.versions,
            "model": asdict(self.model) if self.model else None,
            "rows": [
                {
                    "method": r.method, "settings": r.settings, "tried": r.tried, "n_parameters": r.n_parameters,
                    "metrics": {k: asdict(m) for k, m in r.metrics.items()},
                    "against": r.against.to_dict() if r.against else None, "p_holm": r.p_holm, "fit": asdict(r.fit),
                    "evaluation": asdict(r.evaluation), "kl": r.kl and asdict(r.kl),
                    "increase": r.increase and asdict(r.increase), "heads": list(r.heads),
                }
                for r in self.rows
            ],
            "tuned": [m.tuned.to_dict() for m in self.methods if m.tuned is not None],
        }  # fmt: skip

    def save(self, folder: str | Path, stem: str = "") -> list[Path]:
        """Write the table as .md, .tex, .csv and .json, and the trials as -trials.csv; returns the files.

        Args:
            folder: created if it is missing; files of the same names are replaced.
            stem: first part of the file names; empty = the task's name.

        Raises:
            InputError: the folder is not writable.
        """
        front = Path(folder) / (stem or self.task.replace("/", "-").replace(":", "-"))
        files = {
            ".md": self.to_markdown(), ".tex": self.to_latex(), ".csv": self.to_frame().to_csv(index=False),
            "-runs.csv": self.runs().to_csv(index=False), "-trials.csv": self.trials().to_csv(index=False),
        }  # fmt: skip
        written = [io.write_text(f"{front}{end}", text) for end, text in files.items()]
        return [*written, io.write_json(f"{front}.json", self.to_dict())]

    def __repr__(self) -> str:
        shown = ", ".join(f"{r.method} {r.metrics[self.metric]}" for r in self.rows)
        return wrapped(f"MethodTable({self.title()}, {self.metric}: {shown})")

    def _repr_html_(self) -> str:
        return table_html(self.title(), self.columns(), self.cells(), self.notes())


def _row(method: MethodRuns, against: Comparison | None, p_holm: float | None) -> Row:
    runs = method.runs
    counts = {r.n_parameters for r in runs}
    if len(counts) > 1:
        raise InputError(f"runs of {method.method} have different numbers of parameters: {sorted(counts)}")
    hurt = [r.damage for r in runs if r.damage is not None]
    kl = increase = None
    if hurt:
        kl = over_texts([h["kl"] for h in hurt])
        increase = over_texts([
            [q - p for q, p in zip(h["cross_entropy"], h["cross_entropy_base"], strict=True)] for h in hurt
        ])  # fmt: skip
    return Row(
        method.method, _settings_of(runs), 0 if method.tuned is None else method.tuned.tried, counts.pop(),
        over_seeds([r.result for r in runs]), against, p_holm, Spread.of([r.fit_seconds for r in runs]),
        Spread.of([r.eval_seconds for r in runs]), kl, increase, tuple(r.heads for r in runs if r.heads),
    )  # fmt: skip


def _settings_of(runs: Sequence[FitResult]) -> dict[str, Any]:
    """Return the settings of all runs; where they differ, all values, ascending, as one text."""
    found = {}
    for name in runs[0].settings:
        values = sorted({run.settings[name] for run in runs})
        found[name] = values[0] if len(values) == 1 else " / ".join(f"{v:.3g}" for v in values)
    return found


def markdown(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return a Markdown table between its title and its notes."""
    lines = [columns, ("---",) * len(columns), *cells]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{title}**\n\n{table}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def paired_tester(n_items: int) -> PairedTester:
    """Return the paired test for this many items: bootstrap, or permutation if there are few."""
    return paired_permutation_test if n_items < FEW else paired_bootstrap_test


def over_texts(values: ArrayLike) -> Metric:
    """Return the mean of `[seeds, texts]` with its interval over both."""
    grid = np.array(values, dtype=float)
    return Metric(float(grid.mean()), bootstrap_interval_over_seeds(grid), grid.shape[1], grid.shape[0])


def _end(metric: Metric, side: int) -> float | None:
    return None if metric.interval is None else metric.interval[side]


def _or_dash(metric: Metric | None) -> str:
    return "-" if metric is None else str(metric)


def _all_settings(rows: Sequence[Row]) -> str:
    return "; ".join(f"{r.method}: {settings_text(r.settings)}" for r in rows)


def settings_text(settings: dict[str, Any]) -> str:
    """Return settings as text: `alpha 15, k 3`."""
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())


_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$"}  # fmt: skip


def tex(text: str) -> str:
    """Escape LaTeX's special characters."""
    return "".join(_TEX.get(c, c) for c in text)
