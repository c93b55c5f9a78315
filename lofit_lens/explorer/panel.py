"""What is said of the open head and of the two sets, as texts and numbers that a view only has to place."""

from typing import Any

import pandas as pd

from lofit_lens.analysis.attention import AttentionPatterns
from lofit_lens.analysis.logit_lens import HeadTokens
from lofit_lens.explorer.running import PromptRun
from lofit_lens.explorer.source import Source, adapter_name
from lofit_lens.explorer.state import State
from lofit_lens.heads import Head
from lofit_lens.plots.attention import MOST_TOKENS
from lofit_lens.tasks.chat import Conversation

NO_MODEL = (
    "No model was given. With one, ll.explore(..., model, adapters={'LoFiT': lofit}) shows which tokens an adapter's head "
    "promotes, where heads look on your own prompt, and what the model answers with and without the adapter or the head."
)
P_NOTE = (
    "probability of at least so many shared heads by chance, heads drawn {}; not adjusted for trying several K or sets"
)


def overlap_items(row: dict[str, Any]) -> list[list[str]]:
    """Label, value and explanation of each number of an `analysis.overlap` row."""
    return [
        ["shared heads", f"{row['shared']} of {row['k_a']} and {row['k_b']}", "heads in the top K of both sets"],
        ["expected by chance", f"{row['expected']:.2f}", "K left times K right over all heads of the model"],
        ["p, over all heads", p_text(row["p_hypergeometric"]), P_NOTE.format("from all heads of the model")],
        ["p, within layers", p_text(row["p_layer"]), P_NOTE.format("within each layer, so that favourite layers do not count")],
        ["Jaccard", f"{row['jaccard']:.2f}", f"shared over either; by chance {row['expected_jaccard']:.2f}"],
    ]  # fmt: skip


def p_text(p: float) -> str:
    """A p-value with three decimals, or `< 0.001`."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def head_table(state: State, head: Head) -> dict[str, Any]:
    """`columns`, `rows` (texts) and `bold` (rows of the two sets shown) of one head in all rankings."""
    seeds = any(e.seed is not None for e in state.source.entries.values())
    names = ["task", "method", *(["seed"] if seeds else [])] if state.source.has_tasks else ["set"]
    shown: dict[str, int] = {}
    for entry, k in zip(state.shown, state.k, strict=True):
        shown[entry.name] = max(k, shown.get(entry.name, 0))
    rows, bold = [], []
    for i, row in enumerate(state.table(head).to_dict("records")):
        listed = not pd.isna(row["rank"])
        inside = row["set"] in shown and listed and row["rank"] <= shown[row["set"]]
        if row["set"] in shown:
            bold.append(i)
        rows.append([
            *(_text(row[n]) for n in names), row["kind"], "" if pd.isna(row["score"]) else f"{row['score']:.4g}",
            f"{row['rank']:.0f} of {row['of']}" if listed else f"not among {row['of']}",
            "yes" if inside else "no" if row["set"] in shown else "",
        ])  # fmt: skip
    return {"columns": [*names, "score", "value", "rank", "in top K"], "rows": rows, "bold": bold}


def readings(source: Source, head: Head) -> dict[str, dict[str, Any]]:
    """What a results folder holds of this head's edits: adapter -> `title`, `facts`, `note`, `unit`, `promoted`, `suppressed`."""
    found = {}
    for task, heads in source.heads.items():
        if (known := heads.get(str(head))) is None:
            continue
        facts = [] if known["norm_v"] is None else [["norm of the offset v", f"{known['norm_v']:.3g}"]]
        facts += [[f"cosine with {name}", f"{x:.2f}"] for name, x in known["cosines"].items()]
        if (without := known["without"]) is not None:
            value, low, high = (f"{round(without[key], 3) + 0.0:+.3f}" for key in ("value", "low", "high"))
            facts.append(["change of the metric without it", f"{value} [{low}, {high}]"])
        name = adapter_name(task)
        found[name] = _reading(f"{name}, from the results", facts, "", "logits", known["promoted"], known["suppressed"])
    return found


def token_lists(name: str, found: HeadTokens, head: Head) -> dict[str, Any]:
    """Promoted and suppressed tokens of one head by an adapter, in the form of `readings`."""
    rows = found.of(head).to_dict("records")
    kinds = ([[r["token"], r["logit"]] for r in rows if r["kind"] == kind] for kind in ("promoted", "suppressed"))
    note = f"The final norm's scale was measured on {found.n_prompts} prompts." if found.n_prompts else ""
    return _reading(name, [], note, found.unit, *kinds)


def no_tokens(name: str, why: str) -> dict[str, Any]:
    """The same where there are none."""
    return _reading(name, [], why, "", [], [])


def _reading(
    title: str, facts: list[list[str]], note: str, unit: str, promoted: list[list[Any]], suppressed: list[list[Any]]
) -> dict[str, Any]:
    lists = ([[visible(token), f"{x:+.2f}"] for token, x in tokens] for tokens in (promoted, suppressed))
    return {
        "title": title,
        "facts": facts,
        "note": note,
        "unit": unit,
        **dict(zip(("promoted", "suppressed"), lists, strict=True)),
    }


def maps(state: State, run: PromptRun | None, *, can_run: bool) -> dict[str, Any]:
    """Attention of the open head: `maps` with title, tokens and weights (row = the token that looks), and a `note`."""
    if state.head is None:
        return {"maps": [], "note": ""}
    if run is not None:
        return _maps_of_run(state.head, run)
    tasks, found = dict.fromkeys(e.task for e in state.shown), []
    for task in (t for t in tasks if t in state.source.attention):
        for stored in state.source.attention[task]:
            if (weights := stored["heads"].get(str(state.head))) is not None:
                title = f"with LoFiT's adapter of {task}, from the results: {stored['prompt']}"
                found.append(attention_map(title, stored["tokens"], weights))
                break
    how = (
        "Type a prompt and press Run to see where it looks." if can_run else "It takes the model to see where it looks."
    )
    return {"maps": found, "note": "" if found else f"No pattern of {state.head} is known. {how}"}


def _maps_of_run(head: Head, run: PromptRun) -> dict[str, Any]:
    if run.n_tokens > MOST_TOKENS:
        note = (
            f"This prompt has {run.n_tokens} tokens; a pattern of more than {MOST_TOKENS} cannot be read here: see "
            "ll.plots.attention_html."
        )
        return {"maps": [], "note": note}
    found = [_map_of(said, p, head) for said, p in run.attention.items() if head in p.heads]
    return {"maps": found, "note": "" if found else f"Press Run to see where {head} looks."}


def _map_of(title: str, patterns: AttentionPatterns, head: Head) -> dict[str, Any]:
    return attention_map(title, patterns.tokens[0], patterns.of(head).tolist())


def attention_map(title: str, tokens: Any, weights: Any) -> dict[str, Any]:
    """One map; of each row only what lies up to its own token, three decimals."""
    rows = [[round(float(x), 3) for x in row[: i + 1]] for i, row in enumerate(weights)]
    return {"title": title, "tokens": [visible(t).strip() or visible(t) for t in tokens], "weights": rows}


def visible(token: str) -> str:
    """White space that can be seen."""
    return token.replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2205"


def _text(value: Any) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.0f}" if isinstance(value, float) else str(value)


def answers(run: PromptRun | None, head: Head | None, adapter: str | None, chat: bool) -> dict[str, Any]:
    """What the model said: `prompt`, `rows` of (what acted, text), and a `note` where something else was chosen since."""
    if run is None:
        return {"prompt": "", "rows": [], "note": ""}
    note = ""
    if head not in (None, run.head) or adapter != run.adapter:
        note = f"This was run with {run.head or 'no head'} open and {run.adapter or 'no adapter'}; press Run again."
    if (was := isinstance(run.prompt, Conversation)) != chat:
        note = f"This was run {'as a chat' if was else 'as plain text'}; press Run again."
    rows = [[said, text or "(nothing: the end token came first)"] for said, text in run.texts.items()]
    return {"prompt": run.prompt, "rows": rows, "note": note}


def summary(state: State) -> str:
    """The comparison in one line."""
    overlap = state.overlap.to_dict()
    (left, right), (k_left, k_right) = (e.name for e in state.shown), state.k
    n_layers, n_heads = state.source.shape
    return (
        f"{left} (top {k_left}) and {right} (top {k_right}) of {n_layers}x{n_heads} heads: {overlap['shared']} shared, "
        f"{overlap['expected']:.2f} expected by chance, p = {p_text(overlap['p_hypergeometric'])} over all heads, "
        f"{p_text(overlap['p_layer'])} within layers"
    ).replace("p = <", "p <")
