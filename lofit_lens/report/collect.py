"""The report's data from a study's folder: see `report.data.checked` for its form."""

from typing import Any

import pandas as pd

from lofit_lens.analysis.logit_lens import TOTAL
from lofit_lens.analysis.transfer import Transfer
from lofit_lens.errors import InputError
from lofit_lens.experiments.grid.expand import TOGETHER
from lofit_lens.experiments.tables.paper_tables import paper_tables
from lofit_lens.experiments.tables.results import Results
from lofit_lens.plots.readings import COSINES
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
PATTERN_NUMBERS = 400_000  # attention weights in the page, some six bytes each
TOKENS = 8  # of either kind in a head's panel


def collect(results: Results) -> dict[str, Any]:
    """What the report shows of a study: as much as its folder holds.

    Raises:
        DataError: damaged files.
    """
    readings = results.readings()
    info, seeds = results.model, ", ".join(map(str, results.seeds))
    notes = [
        f"Seeds {seeds}; adapters whose heads, tokens and patterns are shown are those of seed {results.seeds[0]}.",
        "Promoted tokens: a head's offset v through W_O, the final norm at its mean scale, and W_U; later layers are left out.",
        "Attention: with the adapter of the task attached.",
    ]
    attention, left = attention_readings(
        {t: parts["attention"] for t, parts in readings.items() if "attention" in parts}
    )
    if left:
        notes.append(f"{left} attention patterns were left out to keep this page small; figures have them.")
    return {
        "title": f"Which heads does {info.name} use?",
        "model": {
            "name": info.name, "class_name": info.class_name, "n_layers": info.n_layers, "n_heads": info.n_heads,
            "revision": info.revision,
        },
        "versions": results.record["versions"], "notes": notes, "sets": _sets(results),
        "tables": [t.to_dict() for t in paper_tables(results)], "transfer": _transfer(results),
        "heads": {t: head_readings(parts) for t, parts in readings.items() if t != TOGETHER},
        "attention": attention,
    }  # fmt: skip


def _sets(results: Results) -> list[dict[str, Any]]:
    """Every task's scores by every selector and seed; tasks in order, A-norm first, first seed first."""
    places = {by: i for i, by in enumerate(ORDER)}  # selections of one's own come last
    keys = sorted(results.scores, key=lambda k: (results.tasks.index(k[0]), places.get(k[1], len(ORDER)), *k[1:]))
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


def head_readings(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was read of a task's adapter, by head (`"L2H5"`), in the form of `report.data.checked`'s `heads`."""
    found: dict[str, dict[str, Any]] = {}

    def of(head: str) -> dict[str, Any]:
        nothing = {"norm_v": None, "promoted": [], "suppressed": [], "cosines": {}, "without": None}
        return found.setdefault(head, nothing)

    for row in parts.get("geometry", {}).get("rows", []):
        of(row["head"])["norm_v"] = row["v_norm"]
        of(row["head"])["cosines"] = {n: row[column] for column, n in COSINES.items() if row.get(column) is not None}
    for row in parts.get("tokens", {}).get("rows", []):
        if row["head"] != TOTAL and row["rank"] <= TOKENS:
            of(row["head"])[row["kind"]].append([row["token"], row["logit"]])
    for row in parts.get("leave_one_out", {}).get("rows", []):
        if row["low"] is not None:
            of(row["head"])["without"] = {"value": -row["loss"], "low": -row["high"], "high": -row["low"]}
    return found


def attention_readings(records: dict[str, dict[str, Any]]) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Task -> its prompts with their patterns, first prompts first, as far as they fit; and how many did not."""
    found: dict[str, list[dict[str, Any]]] = {t: [] for t in records}
    room, left = PATTERN_NUMBERS, 0
    for i in range(max((len(r["prompts"]) for r in records.values()), default=0)):
        for task, record in records.items():
            if i >= len(record["prompts"]):
                continue
            tokens, patterns = record["tokens"][i], record["patterns"][i]
            size = len(patterns) * len(tokens) ** 2
            if size > room:
                left += len(patterns)
                continue
            room -= size
            heads = [f"L{layer}H{head}" for layer, head in record["heads"]["heads"]]
            found[task].append(
                {"prompt": record["prompts"][i], "tokens": tokens, "heads": dict(zip(heads, patterns, strict=True))}
            )
    return {t: prompts for t, prompts in found.items() if prompts}, left
