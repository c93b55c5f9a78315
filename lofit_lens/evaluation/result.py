"""The result of an evaluation: every metric with its interval, and every item."""

import html
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lofit_lens import io
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.stats import bootstrap_interval
from lofit_lens.html import wrapped
from lofit_lens.models import ModelInfo

KIND, SCHEMA = "lofit_lens.EvalResult", 1
FIELDS = (
    "task", "split", "form", "label", "metrics", "model", "data_hash", "split_hash", "counted", "config", "versions",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """Mean over items (and seeds), its 95 % bootstrap interval (None for a single value), and numbers of items and seeds."""

    mean: float
    interval: tuple[float, float] | None
    n: int
    seeds: int = 1

    @classmethod
    def of(cls, values: Sequence[float], *, share: bool = True) -> "Metric":
        """Mean and interval of one value per item; with `share`, values lie in [0, 1], and if all are 0 or 1, wrong or right."""
        binary = share and all(v in (0, 1) for v in values)
        return cls(math.fsum(values) / len(values), bootstrap_interval(values, binary=binary), len(values))

    def __str__(self) -> str:
        between = f" [{self.interval[0]:.3f}, {self.interval[1]:.3f}]" if self.interval else ""
        return f"{self.mean:.3f}{between}"


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Metrics, and the items that they average.

    Attributes:
        task: name of the task.
        split: `"train"`, `"val"` or `"test"`.
        metrics: name -> `Metric`; the task's own metric comes first.
        items: one row per item: `item` (its number in the split, from 1), `group`, `prompt`, the model's text or its score of
            each answer, each metric, and `correct` (whether the task's own metric is 1).
        form: how questions were asked, if the task has several forms.
        label: what was evaluated, as given by the caller.
        model: the model.
        data_hash: hash of the task's files.
        split_hash: hash of the file or records of the split.
        counted: irregularities that were accepted: flaws of the data, prompts too long for the model, merged tokens.
        config: settings of the evaluation.
        versions: Python and package versions.
    """

    task: str
    split: str
    metrics: dict[str, Metric]
    items: pd.DataFrame
    form: str = ""
    label: str = ""
    model: ModelInfo | None = None
    data_hash: str = ""
    split_hash: str = ""
    counted: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float:
        """Mean of one metric."""
        if metric not in self.metrics:
            raise InputError(f"no metric {metric!r} in this result; it has {', '.join(self.metrics)}")
        return self.metrics[metric].mean

    @property
    def main(self) -> float:
        """Mean of the task's own metric."""
        return next(iter(self.metrics.values())).mean

    def to_frame(self) -> pd.DataFrame:
        """One row per metric: `task`, `split`, `form`, `label`, `metric`, `mean`, `low` and `high` (95 %), `n` items, `seeds`."""
        of = {"task": self.task, "split": self.split, "form": self.form, "label": self.label}
        rows = []
        for name, metric in self.metrics.items():
            low, high = metric.interval or (None, None)
            rows.append(of | {"metric": name, "mean": metric.mean, "low": low, "high": high})
            rows[-1] |= {"n": metric.n, "seeds": metric.seeds}
        return pd.DataFrame(rows)

    def by_group(self) -> pd.DataFrame:
        """One row per group (number of hops, subject, category): items, and each metric's mean and 95 % interval."""
        rows = []
        for group, items in self.items.groupby("group", sort=True):
            row: dict[str, Any] = {"group": group, "n": len(items)}
            for name in self.metrics:
                metric = Metric.of(items[name].tolist())
                low, high = metric.interval or (None, None)
                row |= {name: metric.mean, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the items, JSON-able."""
        return {
            "kind": KIND, "schema": SCHEMA, "task": self.task, "split": self.split, "form": self.form, "label": self.label,
            "metrics": {name: asdict(m) for name, m in self.metrics.items()},
            "model": asdict(self.model) if self.model else None, "data_hash": self.data_hash, "split_hash": self.split_hash,
            "counted": self.counted, "config": self.config, "versions": self.versions,
        }  # fmt: skip

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `result.json` and `items.jsonl` into a new folder.

        Raises:
            InputError: the folder exists (and not `overwrite`), or cannot be written to.
        """
        with io.new_folder(folder, overwrite=overwrite) as temporary:
            self.write_into(temporary)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "EvalResult":
        """Read what `save` wrote.

        Raises:
            DataError: a file is missing, not JSON, of another kind, or lacks a field or an item.
        """
        folder = Path(folder)
        record = io.read_json(folder / "result.json")
        io.check_record(record, KIND, SCHEMA, FIELDS, str(folder / "result.json"))
        try:
            lines = io.decoded(folder / "items.jsonl").split("\n")
            items = pd.DataFrame([json.loads(line) for line in lines if line])
            metrics = {
                k: Metric(m["mean"], m["interval"] and tuple(m["interval"]), m["n"], m["seeds"])
                for k, m in record["metrics"].items()
            }
            for name, metric in metrics.items():
                if len(items[name]) != metric.n:
                    raise ValueError(f"{len(items)} items in items.jsonl, {metric.n} in result.json")
            names = ("task", "split", "form", "label", "data_hash", "split_hash", "counted", "config", "versions")
            model = ModelInfo.from_dict(record["model"]) if record["model"] else None
            return cls(metrics=metrics, items=items, model=model, **{name: record[name] for name in names})
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise DataError(f"{folder} does not hold a complete evaluation: {e}") from e

    def write_into(self, folder: Path) -> None:
        """Write both files into an existing folder."""
        io.write_json(folder / "result.json", self.to_dict())
        io.write_text(
            folder / "items.jsonl",
            "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in self.items.to_dict("records")),
        )

    def _title(self) -> str:
        form = f" ({self.form})" if self.form else ""
        return f"{f'{self.label}, ' if self.label else ''}{self.task} {self.split}{form}, n={len(self.items)}"

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name} {m}" for name, m in self.metrics.items())
        found = f"; {', '.join(f'{k} {n}' for k, n in self.counted.items())}" if self.counted else ""
        return wrapped(f"EvalResult({self._title()}: {metrics}{found})")

    def _repr_html_(self) -> str:
        rows = [(name, f"{m.mean:.3f}", _between(m)) for name, m in self.metrics.items()]
        notes = [f"{k}: {n}" for k, n in self.counted.items()]
        if self.model:
            notes.insert(0, f"{self.model.name} as {self.model.class_name}, {self.model.dtype}")
        return table_html(self._title(), ("metric", "mean", "95 % interval over items"), rows, notes)


def _plain(row: dict[Any, Any]) -> dict[Any, Any]:
    """An item for JSON, which has no infinity and no NaN (pandas writes it for an item that was too long to be scored)."""
    return {k: [_finite(x) for x in v] if isinstance(v, list) else _finite(v) for k, v in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _between(metric: Metric) -> str:
    return f"{metric.interval[0]:.3f} to {metric.interval[1]:.3f}" if metric.interval else "one item: none"


def how_many(numbers: Iterable[tuple[str, int]], what: str) -> str:
    """Say how many there are; where they differ, the most common number, and the names of all that have another.

    >>> how_many([("LoFiT", 2), ("ITI", 2), ("random heads", 5)], "run")
    '2 runs (random heads: 5)'
    """
    named: dict[str, set[int]] = {}
    listed = [(str(name), int(n)) for name, n in numbers]
    for name, n in listed:
        named.setdefault(name, set()).add(n)
    usual = Counter(n for _, n in listed).most_common(1)[0][0]
    others = [f"{name}: {' or '.join(map(str, sorted(n)))}" for name, n in named.items() if n != {usual}]
    return f"{usual} {what}{'' if usual == 1 else 's'}" + (f" ({'; '.join(others)})" if others else "")


def table_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A small HTML table with a title and lines of notes below; texts are escaped."""
    head = "".join(f'<th style="text-align:left">{html.escape(c)}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    below = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    caption = f'<caption style="text-align:left;font-weight:bold">{html.escape(title)}</caption>'
    return f'<table>{caption}<tr>{head}</tr>{body}</table><div style="font-size:smaller">{below}</div>'
