"""Compare two results on the same items: the paired test of `stats`, for each metric.

Several results per side are seeds of one method: each item's values are averaged over them before the test, and means carry
intervals over seeds and items.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from lofit_lens import io
from lofit_lens.checks import check_is, shown, texts_of
from lofit_lens.errors import InputError
from lofit_lens.evaluation.result import EvalResult, Metric, table_html
from lofit_lens.evaluation.stats import (
    FEW,
    PairedTest,
    bootstrap_interval_over_seeds,
    holm,
    minimum_detectable_difference,
    paired_bootstrap_test,
)
from lofit_lens.html import wrapped

POWER = 0.8
ASKED = ("prompt", "references", "best", "true", "false", "options", "right")  # what must be the same on both sides

Results = EvalResult | Sequence[EvalResult]


@runtime_checkable
class PairedTester(Protocol):
    """`paired_bootstrap_test`, `paired_permutation_test`, or your own test."""

    def __call__(self, a: Any, b: Any, *, alternative: str, seed: int) -> PairedTest:
        """Test the mean of a - b."""
        ...


@dataclass(frozen=True)
class Comparison:
    """Differences a - b, metric by metric.

    Attributes:
        task: task, split and form.
        labels: labels of a and b.
        a: metric -> mean of a.
        b: metric -> mean of b.
        tests: metric -> paired test of a - b.
        p_holm: metric -> p adjusted for the number of metrics (Holm 1979).
        detectable: metric -> smallest true difference that this many items would show with 80 % power at the 5 % level,
            two-sided (None if all items have the same difference).
        versions: Python and package versions.
    """

    task: str
    labels: tuple[str, str]
    a: dict[str, Metric]
    b: dict[str, Metric]
    tests: dict[str, PairedTest]
    p_holm: dict[str, float]
    detectable: dict[str, float | None]
    versions: dict[str, str]

    def __getitem__(self, metric: str) -> PairedTest:
        """The test of one metric."""
        if metric not in self.tests:
            raise InputError(f"no metric {metric!r} in this comparison; it has {', '.join(self.tests)}")
        return self.tests[metric]

    def to_frame(self) -> pd.DataFrame:
        """One row per metric, as numbers."""
        return pd.DataFrame([
            {
                "metric": name, **_columns("a", self.a[name]), **_columns("b", self.b[name]), "difference": t.difference,
                "low": t.interval and t.interval[0], "high": t.interval and t.interval[1], "p": t.p, "mark": t.mark,
                "p_holm": self.p_holm[name], "detectable": self.detectable[name], "n": t.n,
            }
            for name, t in self.tests.items()
        ])  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """One row per metric, as text: metric, a, b, difference with interval, p with mark, Holm's p, detectable difference."""
        found = []
        for name, t in self.tests.items():
            between = f" [{t.interval[0]:+.3f}, {t.interval[1]:+.3f}]" if t.interval else ""
            least = self.detectable[name]
            found.append((
                name, str(self.a[name]), str(self.b[name]), f"{t.difference:+.3f}{between}", f"{t.p:.4f} {t.mark}".strip(),
                f"{self.p_holm[name]:.4f}", "-" if least is None else f"{least:.3f}",
            ))  # fmt: skip
        return found

    def columns(self) -> tuple[str, ...]:
        """Column headings of `rows`."""
        return ("metric", *self.labels, "difference", "p", "p, Holm", "detectable")

    def notes(self) -> tuple[str, ...]:
        """How to read the table."""
        t = next(iter(self.tests.values()))
        sides = {
            "two-sided": "two-sided",
            "greater": "one-sided, first above second",
            "less": "one-sided, first below second",
        }
        few = "few items: the permutation test keeps its level better" if t.n < FEW and "boot" in t.method else ""
        return (
            f"{t.method}, {sides[t.alternative]}, n={t.n} items, {t.resamples} resamples, seed {t.seed}; "
            "* p < 0.05, + p < 0.1; intervals: 95 %",
            f"detectable: smallest true difference found with {POWER:.0%} power at the 5 % level (two-sided)",
            *filter(None, [few]),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.Comparison", "schema": 1, "task": self.task, "labels": list(self.labels),
            "a": {k: asdict(m) for k, m in self.a.items()}, "b": {k: asdict(m) for k, m in self.b.items()},
            "tests": {k: t.to_dict() for k, t in self.tests.items()}, "p_holm": self.p_holm, "detectable": self.detectable,
            "versions": self.versions,
        }  # fmt: skip

    def __repr__(self) -> str:
        tests = ", ".join(f"{name} {t}" for name, t in self.tests.items())
        return wrapped(f"Comparison({self.labels[0]} - {self.labels[1]}, {self.task}: {tests})")

    def _repr_html_(self) -> str:
        title = f"{self.labels[0]} against {self.labels[1]}: {self.task}"
        return table_html(title, self.columns(), self.rows(), self.notes())


def compare(
    a: Results,
    b: Results,
    *,
    metrics: Sequence[str] | None = None,
    test: PairedTester = paired_bootstrap_test,
    alternative: str = "two-sided",
    seed: int = 0,
) -> Comparison:
    """Test the difference a - b on the items that both answered.

    Args:
        a: one result, or results of several seeds.
        b: one result, or results of several seeds.
        metrics: names of metrics; None = all that both have.
        test: `paired_bootstrap_test` (the paper's) or `paired_permutation_test` of `evaluation.stats`.
        alternative: `"two-sided"`, `"greater"` (a above b) or `"less"`.
        seed: seed of the resampling.

    Raises:
        InputError: results of different tasks, splits or items, no metric in common, or an unknown metric.
    """
    ones, others = _listed(a), _listed(b)
    first = ones[0]
    for result in (*ones[1:], *others):
        _check_same_items(first, result)
    if not callable(test):
        raise InputError(f"test is {shown(test)}; give a function, e.g. evaluation.stats.paired_permutation_test")
    shared = [m for m in first.metrics if all(m in r.metrics for r in (*ones, *others))]
    wanted = shared if metrics is None else list(dict.fromkeys(texts_of("metrics", metrics)))
    if bad := [m for m in wanted if m not in shared]:
        raise InputError(f"metric {bad[0]!r} is not in all results; they share {', '.join(shared) or 'none'}")
    if not wanted:
        raise InputError("the results have no metric in common; evaluate them in one form")
    tests, least = {}, {}
    for name in wanted:
        one, other = _means(ones, name), _means(others, name)
        tests[name] = test(one, other, alternative=alternative, seed=seed)
        sd = float(np.std(one - other, ddof=1)) if len(one) > 1 else 0.0
        least[name] = minimum_detectable_difference(len(one), sd=sd, power=POWER) if sd > 0 else None
    adjusted = dict(zip(wanted, holm([t.p for t in tests.values()]), strict=True))
    form = f" ({first.form})" if first.form else ""
    names = (_label(ones, "first"), _label(others, "second"))
    return Comparison(
        f"{first.task} {first.split}{form}", names if names[0] != names[1] else (f"{names[0]} (1)", f"{names[1]} (2)"),
        over_seeds(ones, wanted), over_seeds(others, wanted), tests, adjusted, least, io.environment(),
    )  # fmt: skip


def over_seeds(results: Results, metrics: Sequence[str] | None = None) -> dict[str, Metric]:
    """Mean of each metric over seeds and items; the interval resamples both with replacement (one seed: only items).

    Raises:
        InputError: no result, results on different items, or an unknown metric.
    """
    results = _listed(results)
    for result in results[1:]:
        _check_same_items(results[0], result)
    found = {}
    for name in results[0].metrics if metrics is None else texts_of("metrics", metrics):
        if bad := next((r for r in results if name not in r.metrics), None):
            raise InputError(f"no metric {name!r} in {bad!r}")
        values = np.array([r.items[name].to_numpy(dtype=float) for r in results])
        found[name] = Metric(
            float(values.mean()),
            bootstrap_interval_over_seeds(values, binary=bool(np.isin(values, (0, 1)).all())),
            values.shape[1],
            len(values),
        )
    return found


def _listed(results: Any) -> tuple[EvalResult, ...]:
    listed = tuple(results) if isinstance(results, list | tuple) else (results,)
    if not listed:
        raise InputError("no result given; give one, or one per seed")
    for result in listed:
        check_is(result, EvalResult, "a result", "what evaluate returns, or a list with one per seed")
    return listed


def _means(results: Sequence[EvalResult], metric: str) -> np.ndarray:
    return np.mean([r.items[metric].to_numpy(dtype=float) for r in results], axis=0)


def _label(results: Sequence[EvalResult], default: str) -> str:
    labels = list(dict.fromkeys(r.label for r in results if r.label))
    return " / ".join(labels) or default


def _check_same_items(one: EvalResult, other: EvalResult) -> None:
    for name in ("task", "split", "form"):
        if getattr(one, name) != getattr(other, name):
            raise InputError(
                f"these results differ in {name}: {getattr(one, name)!r} and {getattr(other, name)!r}; "
                "a paired test needs the same items on both sides"
            )
    if len(one.items) != len(other.items):
        raise InputError(
            f"these results have {len(one.items)} and {len(other.items)} items; evaluate the same ones on both sides"
        )
    for column in ASKED:
        if (column in one.items) != (column in other.items):
            raise InputError(f"only one of these results has a column {column!r}; evaluate both in one form")
        if column in one.items:
            pairs = zip(one.items[column], other.items[column], strict=True)
            if (at := next((i for i, (x, y) in enumerate(pairs) if x != y), None)) is not None:
                raise InputError(
                    f"item {at + 1} differs in {column!r} between these results; evaluate the same rows on both sides"
                )


def _columns(side: str, metric: Metric) -> dict[str, float | None]:
    low, high = metric.interval or (None, None)
    return {side: metric.mean, f"{side}_low": low, f"{side}_high": high}
