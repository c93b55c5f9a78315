"""Readings of single heads as texts and numbers, which the view only places: what an edit does, where a head attends."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lofit_lens.analysis.logit_lens import LEVEL, TOTAL, HeadTokens
from lofit_lens.heads import Head
from lofit_lens.models import visible
from lofit_lens.plots.readings import COSINES

TOKENS = 8  # of either kind
PATTERN_NUMBERS = 200_000  # attention weights of a results folder that a page holds, some three bytes each
Token = tuple[str, float]


def adapter_name(task: str) -> str:
    """Name LoFiT's adapter of a task in a results folder."""
    return f"LoFiT on {task}"


def stored_title(name: str) -> str:
    """Title the stored reading of an adapter."""
    return f"{name}, from the results"


def reading(
    title: str, *, facts: Iterable[Sequence[str]] = (), note: str = "", unit: str = "", promoted: Iterable[Token] = (),
    suppressed: Iterable[Token] = (),
) -> dict[str, Any]:  # fmt: skip
    """Describe what an edit of one head does: `facts` (name, value), a `note`, and tokens with their values in `unit`."""
    lists = [[[visible(token), f"{x:+.2f}"] for token, x in tokens] for tokens in (promoted, suppressed)]
    return {
        "title": title, "facts": [list(f) for f in facts], "note": note, "unit": unit,
        "promoted": lists[0], "suppressed": lists[1],
    }  # fmt: skip


def token_reading(name: str, found: HeadTokens, head: Head) -> dict[str, Any]:
    """List the tokens that an adapter's edit of one head promotes and suppresses."""
    rows = found.of(head).to_dict("records")
    promoted, suppressed = (
        [(r["token"], r["logit"]) for r in rows if r["kind"] == kind] for kind in ("promoted", "suppressed")
    )
    plural = "" if found.n_prompts == 1 else "s"
    scale = f"The final norm's scale was measured on {found.n_prompts} prompt{plural}." if found.n_prompts else ""
    note = f"{scale} {chance_note(rows)}".strip()
    return reading(name, note=note, unit=found.unit, promoted=promoted, suppressed=suppressed)


def chance_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say whether a head's tokens stand out from those of random offsets of equal norm; "" for results without these p."""
    p = {r["kind"]: r["p"] for r in rows if r.get("p") is not None}
    parts = [
        f"{kind} {'no better than chance' if value > LEVEL else 'beyond chance'} (p = {value:.3f})"
        for kind, value in p.items()
    ]
    return f"Compared with random offsets of equal norm: {', '.join(parts)}." if parts else ""


def stored_readings(task: str, parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Map heads to what a results folder holds of their task's adapter: norm, cosines, loss without the head, tokens."""
    facts: dict[str, list[list[str]]] = defaultdict(list)
    tokens: dict[str, dict[str, list[Token]]] = defaultdict(lambda: {"promoted": [], "suppressed": []})
    listed: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in parts.get("geometry", {}).get("rows", []):
        facts[row["head"]].append(["norm of the offset v", f"{row['v_norm']:.3g}"])
        cosines = {name: row.get(column) for column, name in COSINES.items()}
        facts[row["head"]] += [[f"cosine with {name}", f"{x:.2f}"] for name, x in cosines.items() if x is not None]
    for row in parts.get("leave_one_out", {}).get("rows", []):
        if row["low"] is not None:  # a loss, so that the metric's change has the other sign
            value, low, high = (f"{round(-row[key], 3) + 0.0:+.3f}" for key in ("loss", "high", "low"))
            facts[row["head"]].append(["change of the metric without this head", f"{value} [{low}, {high}]"])
    for row in parts.get("tokens", {}).get("rows", []):
        if row["head"] != TOTAL and row["rank"] <= TOKENS:
            listed[row["head"]].append(row)
            tokens[row["head"]][row["kind"]].append((row["token"], row["logit"]))
    title = stored_title(adapter_name(task))
    return {
        h: reading(
            title,
            facts=facts[h],
            note=chance_note(listed[h]),
            unit="logits",
            promoted=tokens[h]["promoted"],
            suppressed=tokens[h]["suppressed"],
        )
        for h in dict.fromkeys([*facts, *tokens])
    }


def stored_attention(records: Mapping[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Read the attention patterns of a results folder, and count those left out.

    Returns:
        One record per prompt, the first prompt of every task first: `task`, `prompt`, `title`, `tokens`, and `heads`: name ->
        weights as in `attention_map`. Those that do not fit into PATTERN_NUMBERS are left out and counted.
    """
    found, room, left = [], PATTERN_NUMBERS, 0
    for i in range(max((len(r["prompts"]) for r in records.values()), default=0)):
        for task, record in records.items():
            if i >= len(record["prompts"]):
                continue
            tokens, patterns = record["tokens"][i], record["patterns"][i]
            size = len(patterns) * len(tokens) * (len(tokens) + 1) // 2
            if size > room:
                left += len(patterns)
                continue
            room -= size
            names = [str(Head(*h)) for h in record["heads"]["heads"]]
            prompt, heads = record["prompts"][i], {n: _weights(p) for n, p in zip(names, patterns, strict=True)}
            found.append({
                "task": task, "prompt": prompt, "title": f"with {adapter_name(task)}: {prompt}",
                "tokens": [visible(t) for t in tokens], "heads": heads,
            })  # fmt: skip
    return found, left


def attention_map(title: str, tokens: Iterable[str], pattern: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Make one pattern: `title`, `tokens`, and `weights`: per query token, thousandths on itself and the tokens before it."""
    return {"title": title, "tokens": [visible(t) for t in tokens], "weights": _weights(pattern)}


def _weights(pattern: Iterable[Sequence[float]]) -> list[list[int]]:
    return [[round(1000 * float(x)) for x in row[: i + 1]] for i, row in enumerate(pattern)]
