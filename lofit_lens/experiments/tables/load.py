"""Read a store's grids as `Results`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lofit_lens.errors import DataError, InputError, unknown
from lofit_lens.evaluation.result import EvalResult
from lofit_lens.experiments.methods.base import RANDOM
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.results import ASKED, COLUMNS, Results
from lofit_lens.heads import HeadScores
from lofit_lens.models import ModelInfo


def load_results(folder: str | Path, *, grids: Sequence[str] | None = None, model: str | None = None) -> Results:
    """Read the results in a store.

    Args:
        folder: folder of the store.
        grids: names of the grids to read; None = all in the store.
        model: name of the model, if the store holds several.

    Raises:
        DataError: the store holds no grid or no run, or a damaged file, which is named.
        InputError: no such grid or model; several models and none is named; or grids that cannot be shown together, since they
            have the same runs with different settings or test rows.
    """
    folder = Path(folder)
    if (folder / "study.json").is_file():
        raise DataError(f"{folder} is a study of an earlier version; run its grid again, into a new folder")
    if not (folder / "store.json").is_file():
        raise DataError(
            f"{folder} holds no study (no store.json); run one first: lofit-lens grid organism/all --store {folder}"
        )
    store = Store(folder, create=False)
    records = _records(store, grids, model)
    record = _joint(records)
    rows, evaluations, folders, scores = [], [], [], {}
    damage: dict[str, dict[str, list[float]]] = {}
    for name, row in sorted(record["cells"].items()):
        if not store.done(name) or row["kind"] in ("trial", "reading"):
            continue
        path = store.folder(name)
        if row["kind"] == "scores":
            if row["n_train"] is None:
                key = (row["task"], row["heads_from"], row["seed"])
                if key in scores:
                    raise _several(folder, f"head scores of {key[0]} by {key[1]} (seed {key[2]})", records)
                scores[key] = HeadScores.load(path / "scores.json")
            continue
        run = store.read(name)
        if row["kind"] == "damage":
            damage[run["spec"]["fit"]] = run["damage"]
            continue
        result = EvalResult.load(path)
        metric = next(iter(result.metrics))
        rows.append({
            **{c: row.get(c) for c in ASKED}, **run["run"], **_seconds(store, name, run), "metric": metric,
            "value": result.metrics[metric].mean, "n_items": len(result.items), "trained": bool(run["spec"].get("config")),
        })  # fmt: skip
        evaluations.append(result)
        folders.append(path)
    if not rows and not scores:
        raise DataError(f"{folder} holds no run yet; run its grid: lofit-lens grid ... --store {folder}")
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    for column in ("k", "n_train"):
        frame[column] = frame[column].astype(float)
    for column in ("heads_from", "source"):
        frame[column] = frame[column].fillna("")
    twice = frame.duplicated(list(ASKED))
    if twice.any():
        first = frame.loc[twice].iloc[0]
        raise _several(folder, f"{first['method']} on {first['task']} (seed {first['seed']})", records)
    ordered = dict(sorted(scores.items(), key=lambda item: (list(record["tasks"]).index(item[0][0]), item[0][1:])))
    whole = {**record, "damage": damage}
    return Results(
        folder, whole, ModelInfo.from_dict(record["model"]), tuple(record["tasks"]), frame, tuple(evaluations), tuple(folders),
        ordered,
    )  # fmt: skip


def _several(folder: Path, what: str, grids: Iterable[str]) -> InputError:
    return InputError(
        f"{folder} holds {what} with several settings, from the grids {', '.join(grids)}; name those to read (grids=[...], "
        "--grid). Tables and figures take one value of each setting; all runs are in Store(...).index()"
    )


def _records(store: Store, grids: Sequence[str] | None, model: str | None) -> dict[str, dict[str, Any]]:
    """Return the records of the selected grids, all of one model."""
    found = store.grids()
    if not found:
        raise DataError(f"{store.root} holds no grid; run one: lofit-lens grid organism/all --store {store.root}")
    for name in grids or ():
        if name not in found:
            raise unknown("grid", name, found)
    found = {name: r for name, r in found.items() if grids is None or name in grids}
    models = list(dict.fromkeys(r["model"]["name"] for r in found.values()))
    if model is not None and model not in models:
        raise unknown("model", model, models)
    if model is None and len(models) > 1:
        raise InputError(
            f"{store.root} holds runs of several models: {', '.join(models)}; name one (model=...), or name its grids "
            f"(grids=[...], --grid): {', '.join(map(repr, found))}"
        )
    return {name: r for name, r in found.items() if r["model"]["name"] == (model or models[0])}


def _joint(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the joint record of several grids."""
    first = next(iter(records.values()))
    joint: dict[str, Any] = {
        "model": first["model"], "versions": first["versions"], "limit": first["grid"]["limit"], "tasks": {}, "other_tasks": {},
        "cells": {}, "seeds": [], "draws": 0,
    }  # fmt: skip
    for name, record in records.items():
        for what, old, new in (
            ("model", joint["model"], record["model"]), ("limit", joint["limit"], record["grid"]["limit"]),
            *((t, joint["tasks"][t], of) for t, of in record["tasks"].items() if t in joint["tasks"]),
            *((t, joint["other_tasks"][t], of) for t, of in record["other_tasks"].items() if t in joint["other_tasks"]),
        ):  # fmt: skip
            if old != new:
                raise InputError(
                    f"the grid {name} has another {what} ({new}, not {old}); read the grids separately (grids=[...], --grid)"
                )
        for part in ("tasks", "other_tasks", "cells"):
            joint[part] |= record[part]
        joint["seeds"] += [s for s in record["grid"]["seeds"] if s not in joint["seeds"]]
        joint["draws"] = max([joint["draws"], *(r["draws"] for r in record["grid"]["runs"] if RANDOM in r["heads"])])
    return joint


def _seconds(store: Store, name: str, run: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of the fit, with the selection of its heads, and of the test; a test on another task has the fit's."""
    own, spec = store.timing(name), run["spec"]
    if "fit" in spec:
        fit = store.read(spec["fit"])
        return {**_seconds(store, spec["fit"], fit), "eval_seconds": own.get("eval_seconds", float("nan"))}
    seconds = own.get("fit_seconds", float("nan"))
    if spec["heads"] and "cell" in spec["heads"] and "matched" not in spec["heads"]:  # a random draw needs no selection
        seconds += store.timing(spec["heads"]["cell"]).get("seconds", 0.0)
    return {"fit_seconds": seconds, "eval_seconds": own.get("eval_seconds", float("nan"))}
