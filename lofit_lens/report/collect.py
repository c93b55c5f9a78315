"""The report's data from a study's folder: see `report.data.checked` for its form."""

from typing import Any

import pandas as pd

from lofit_lens.analysis.readings import TOGETHER, read_readings
from lofit_lens.analysis.transfer import Transfer
from lofit_lens.errors import InputError
from lofit_lens.experiments.paper_tables import paper_tables
from lofit_lens.experiments.results import Results
from lofit_lens.report.figures import transfer

ORDER = (
    "A-norm",
    "bias norm",
    "probe accuracy",
    "probing layers",
    "gradient attribution",
    "activation patching",
    "random",
)
TOKENS = 8  # of either kind in a head's panel


def collect(results: Results) -> dict[str, Any]:
    """What the report shows of a study: as much as its folder holds.

    Raises:
        DataError: damaged files.
    """
    readings = read_readings(results)
    info, plan = results.model, results.record["plan"]
    seeds = ", ".join(map(str, plan["seeds"]))
    notes = [
        f"Seeds {seeds}; adapters whose heads, tokens and patterns are shown are those of seed {results.seeds[0]}.",
        "Promoted tokens: a head's offset v through W_O, the final norm at its mean scale, and W_U; later layers are left out.",
        "Attention: with the adapter of the task attached.",
    ]
    return {
        "title": f"Which heads does {info.name} use?",
        "model": {
            "name": info.name, "class_name": info.class_name, "n_layers": info.n_layers, "n_heads": info.n_heads,
            "revision": info.revision,
        },
        "versions": results.record["versions"], "notes": notes, "sets": _sets(results),
        "tables": [t.to_dict() for t in paper_tables(results)], "transfer": _transfer(results),
        "heads": {t: _heads(parts) for t, parts in readings.items() if t != TOGETHER},
        "attention": {t: _attention(parts["attention"]) for t, parts in readings.items() if "attention" in parts},
    }  # fmt: skip


def _sets(results: Results) -> list[dict[str, Any]]:
    """Every task's scores by every selector and seed; tasks in order, A-norm first, first seed first."""
    keys = sorted(results.scores, key=lambda key: (results.tasks.index(key[0]), ORDER.index(key[1]), key[2]))
    return [
        {
            "id": f"{task}|{by}|{seed}", "task": task, "method": by, "seed": seed, "kind": results.scores[task, by, seed].kind,
            "scores": results.scores[task, by, seed].values.tolist(),
            "ranking": [list(h) for h in results.scores[task, by, seed].ranking()], "k": results.k(task),
        }
        for task, by, seed in keys
    ]  # fmt: skip


def _transfer(results: Results) -> dict[str, Any] | None:
    try:
        found: Transfer = transfer(results)
    except InputError:  # one task, or that part was not run
        return None
    cells = found.frame.set_index(["source", "task"])
    tasks, sources = found.tasks, found.sources

    def grid(column: str, factor: float = 1.0) -> list[list[Any]]:
        rows = [[cells.loc[(s, t), column] for t in tasks] for s in sources]
        return [[None if pd.isna(v) else v if isinstance(v, str) else factor * float(v) for v in row] for row in rows]

    first = {row["task"]: row for row in reversed(found.frame.to_dict("records"))}
    return {
        "tasks": list(tasks), "sources": list(sources), "relative": grid("relative", 0.01), "accuracy": grid("accuracy"),
        "low": grid("accuracy_low"), "high": grid("accuracy_high"), "mark": grid("mark"), "p": grid("p"),
        "metric": {t: str(first[t]["metric"]) for t in tasks}, "n_items": {t: int(first[t]["n_items"]) for t in tasks},
        "n_seeds": min(found.frame["n_seeds"].tolist()),
    }  # fmt: skip


COSINES = {"cos_mass_mean": "ITI mass mean", "cos_probe": "ITI probe", "cos_reading": "RepE reading vector"}


def _heads(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in parts.get("geometry", {}).get("rows", []):
        cosines = {name: row[column] for column, name in COSINES.items() if row.get(column) is not None}
        found[row["head"]] = {
            "norm_v": row["v_norm"],
            "promoted": [],
            "suppressed": [],
            "cosines": cosines,
            "without": None,
        }
    for row in parts.get("tokens", {}).get("rows", []):
        if row["head"] in found and row["rank"] <= TOKENS:
            found[row["head"]][row["kind"]].append([row["token"], row["logit"]])
    for row in parts.get("leave_one_out", {}).get("rows", []):
        if row["head"] in found and row["low"] is not None:
            found[row["head"]]["without"] = {"value": -row["loss"], "low": -row["high"], "high": -row["low"]}
    return found


def _attention(record: dict[str, Any]) -> list[dict[str, Any]]:
    heads = [f"L{layer}H{head}" for layer, head in record["heads"]["heads"]]
    return [
        {"prompt": prompt, "tokens": tokens, "heads": dict(zip(heads, patterns, strict=True))}
        for prompt, tokens, patterns in zip(record["prompts"], record["tokens"], record["patterns"], strict=True)
    ]
