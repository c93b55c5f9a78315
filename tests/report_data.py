"""Data for the report's tests: a model of 3 layers of 4 heads whose overlaps can be counted by hand.

Best heads of the two first sets, in order:

    truth: L0H0 L1H1 L2H2 L0H3 L1H0 ...      shared for K = 1, 2, 3, 4: 0, 2, 2, 3
    edits: L1H1 L0H0 L2H3 L2H2 L0H1 ...
"""

from typing import Any

HOSTILE = "</script><script>window.pwned=1</script> </SCRIPT> <!-- <b>bold</b> & \u2028 \u2029 \u00e9"
TRUTH = ["L0H0", "L1H1", "L2H2", "L0H3", "L1H0"]
EDITS = ["L1H1", "L0H0", "L2H3", "L2H2", "L0H1"]


def pair(name: str) -> list[int]:
    return [int(name[1]), int(name[3])]


def ranked(best: list[str]) -> list[list[int]]:
    """The best heads, then all others, last layer first."""
    first = [pair(name) for name in best]
    return first + [[layer, h] for layer in (2, 1, 0) for h in range(4) if [layer, h] not in first]


def scored(ranking: list[list[int]]) -> list[list[float]]:
    """Score 1.2 for the first head, 1.1 for the second, ... 0.1 for the last."""
    return [[round(1.2 - 0.1 * ranking.index([layer, h]), 1) for h in range(4)] for layer in range(3)]


def head_set(name: str, task: str, method: str, best: list[str], **changes: Any) -> dict[str, Any]:
    ranking = ranked(best)
    made = {
        "id": name,
        "task": task,
        "method": method,
        "seed": 0,
        "kind": method,
        "scores": scored(ranking),
        "ranking": ranking,
        "k": 2,
    }
    return made | changes


def least() -> dict[str, Any]:
    """Only what must be there: one set, without scores."""
    one = head_set("t", "truth", "A-norm", TRUTH, scores=None, seed=None, k=1)
    return {
        "title": "Least",
        "model": {"name": "tiny", "class_name": "TransformerBridge", "n_layers": 3, "n_heads": 4, "revision": None},
        "sets": [one],
    }


def full() -> dict[str, Any]:
    """Every part, with text that tries to leave its place."""
    reading = {
        "norm_v": 0.75, "promoted": [[" Paris", 2.5], ["\n", 1.25]], "suppressed": [[HOSTILE, -1.5]],
        "cosines": {"ITI mass mean": 0.5}, "without": {"value": -0.03, "low": -0.05, "high": -0.01},
    }  # fmt: skip
    tokens = ["<bos>", "Q", " river"]
    weights = [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.2, 0.70001, 0.1]]
    return {
        "title": "Heads of <b>tiny</b> & co",
        "model": {"name": "tiny", "class_name": "HookedTransformer", "n_layers": 3, "n_heads": 4, "revision": "abc123"},
        "versions": {"python": "3.11.7"},
        "notes": [HOSTILE],
        "sets": [
            head_set("truth-0", "truth", "A-norm", TRUTH),
            head_set("truth-probe", "truth", "probe accuracy", EDITS, seed=None),
            head_set("edits-0", "edits", "A-norm", EDITS),
            head_set("edits-file", "edits", "head file", [], scores=None, ranking=[pair(h) for h in EDITS], k=5),
        ],
        "tables": [{"title": "Table 1", "columns": ["method", "MC1 (%)"], "rows": [["LoFiT", "81.2"]], "notes": ["2 seeds"]}],
        "transfer": {
            "tasks": ["truth", "edits"], "sources": ["truth", "edits", "random heads"],
            "relative": [[1.0, 0.8], [0.9, 1.0], [0.5, None]], "accuracy": [[0.8, 0.48], [0.72, 0.6], [0.4, None]],
            "low": [[0.7, 0.4], [0.6, 0.5], [0.3, None]], "high": [[0.9, 0.5], [0.8, 0.7], [0.5, None]],
            "mark": [["", "*"], ["+", ""], ["*", ""]], "p": [[None, 0.01], [0.07, None], [0.0001, None]],
            "metric": {"truth": "MC1", "edits": "EM"}, "n_items": {"truth": 408, "edits": 1864}, "n_seeds": 2,
        },
        "heads": {"truth": {"L1H1": reading}},
        "attention": {"truth": [{"prompt": "Q river", "tokens": tokens, "heads": {"L1H1": weights}}]},
    }  # fmt: skip


def large() -> dict[str, Any]:
    """40 layers of 40 heads and long names: what must still fit a phone."""
    ranking = [[i * 7 % 1600 // 40, i * 7 % 1600 % 40] for i in range(1600)]
    other = [[i * 11 % 1600 // 40, i * 11 % 1600 % 40] for i in range(1600)]
    name = "a-task-with-a-name-that-knows-no-end-and-has-no-spaces"
    scores = [[layer / 40 + h / 1600 for h in range(40)] for layer in range(40)]
    sets = [
        {"id": str(i), "task": name + str(i), "method": "A-norm", "seed": 42, "kind": "A-norm", "scores": scores,
         "ranking": r, "k": 48}
        for i, r in enumerate((ranking, other))
    ]  # fmt: skip
    table = {"title": name, "columns": [name, name, name], "rows": [["a", "1", "2"]], "notes": []}
    model = {"name": name, "class_name": "TransformerBridge", "n_layers": 40, "n_heads": 40, "revision": None}
    return {"title": name, "model": model, "sets": sets, "tables": [table]}
