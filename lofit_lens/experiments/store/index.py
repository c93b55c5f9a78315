"""A table of runs, one row per run, from their records."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lofit_lens import io


def table_of(runs: Sequence[tuple[dict[str, Any], float | None]]) -> pd.DataFrame:
    """Tabulate runs (run.json, seconds), in their order; columns as in `Store.index`."""
    rows = [_row(record, seconds) for record, seconds in runs]
    columns = dict.fromkeys(("name", "label", *(k for row in rows for k in row)))
    return pd.DataFrame({k: _column([row.get(k) for row in rows]) for k in columns})


def _row(record: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    result = record.get("result")
    metrics = result.get("metrics", {}) if isinstance(result, dict) else {}
    row = {**record["row"], "name": record["name"], "label": record["label"], "seconds": seconds}
    for metric, found in metrics.items():
        low, high = found["interval"] or (None, None)
        row |= {metric: found["mean"], f"{metric}_low": low, f"{metric}_high": high}
        row.setdefault("n_items", found["n"])
    return row


def _column(values: Sequence[Any]) -> pd.Series:
    """Values of one column (None = missing) in the narrowest type that holds them all unchanged."""
    kinds = {type(v) for v in values if v is not None}
    if kinds == {int}:
        return pd.Series(values, dtype="Int64")
    if kinds and kinds <= {int, float}:
        return pd.Series(values, dtype="float64")
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean")
    texts = [v if v is None or isinstance(v, str) else io.canonical_json(v) for v in values]
    return pd.Series(texts, dtype="string")
