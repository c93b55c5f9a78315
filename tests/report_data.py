"""Head sets whose overlaps can be counted by hand, of a model of 3 layers of 4 heads.

Best heads of the two first sets, in order:

    truth: L0H0 L1H1 L2H2 L0H3 L1H0 ...      shared for K = 1, 2, 3, 4: 0, 2, 2, 3
    edits: L1H1 L0H0 L2H3 L2H2 L0H1 ...
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lofit_lens.explorer import Explorer
from lofit_lens.explorer.readings import attention_map, reading
from lofit_lens.explorer.source import read_source
from lofit_lens.heads import HeadScores, HeadSet

HOSTILE = "</script><script>window.pwned=1</script> </SCRIPT> <!-- <b>bold</b> & \u2028 \u2029 \u00e9"
TRUTH = ["L0H0", "L1H1", "L2H2", "L0H3", "L1H0"]
EDITS = ["L1H1", "L0H0", "L2H3", "L2H2", "L0H1"]
SHAPE = (3, 4)
READING = reading(
    "LoFiT on truth", facts=[["norm of the offset v", "0.75"]], unit="logits", promoted=[(" Paris", 2.5), ("\n", 1.25)],
    suppressed=[(HOSTILE, -1.5)],
)  # fmt: skip
PATTERN = attention_map("Q river", ["<bos>", "Q", " river"], [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.2, 0.7, 0.1]])


def pair(name: str) -> list[int]:
    return [int(name[1]), int(name[3])]


def ranked(best: list[str]) -> list[list[int]]:
    """The best heads, then all others, last layer first."""
    first = [pair(name) for name in best]
    return first + [[layer, h] for layer in (2, 1, 0) for h in range(4) if [layer, h] not in first]


def scores(best: list[str], kind: str = "A-norm") -> HeadScores:
    """Score 1.2 for the first head, 1.1 for the second, ... 0.1 for the last."""
    ranking = ranked(best)
    return HeadScores(
        [[round(1.2 - 0.1 * ranking.index([layer, h]), 1) for h in range(4)] for layer in range(3)], kind=kind
    )


def full() -> Explorer:
    """Two tasks, a set that is no more than a list, and what was read of one head; text that tries to leave its place."""
    source = read_source({
        ("truth", "A-norm"): scores(TRUTH), ("truth", "probes"): scores(EDITS, "probe accuracy"),
        ("edits", "A-norm"): scores(EDITS), ("edits", HOSTILE): HeadSet(EDITS, shape=SHAPE),
    })  # fmt: skip
    pattern = {"task": "truth", "prompt": "Q river", "title": PATTERN["title"], "tokens": PATTERN["tokens"]}
    heads = {"L1H1": PATTERN["weights"]}
    return Explorer(replace(source, readings={"L1H1": [READING]}, attention=[{**pattern, "heads": heads}] * 2), k=2)


def large() -> Explorer:
    """40 layers of 40 heads and long names: what must still fit a phone."""
    name = "a-task-with-a-name-that-knows-no-end-and-has-no-spaces"
    places = np.arange(1600)
    sets = {
        (f"{name}{i}", "A-norm"): HeadScores((places * step % 1600).reshape(40, 40)) for i, step in enumerate((7, 11))
    }
    return Explorer(read_source(sets), k=48)


def sized(n_layers: int, n_heads: int) -> Explorer:
    """Eight sets of a model of this size."""
    n = n_layers * n_heads
    places = np.arange(n)
    tasks = ("truth", "edits", "kinship", "arc")
    sets = {
        (task, method): HeadScores(((places * step + 5) % (n + 1)).reshape(n_layers, n_heads), kind=method)
        for task, step in zip(tasks, (7, 11, 13, 17), strict=True) for method in ("A-norm", "probe accuracy")
    }  # fmt: skip
    return Explorer(read_source(sets), k=max(8, n // 33))


def saved(ex: Explorer, folder: Path, name: str = "page") -> Path:
    return ex.save(folder / f"{name}.html", title="Heads of <b>tiny</b> & co")
