"""Write docs/findings.md: the paper's claims, with what the committed tables of each study say of them.

    python benchmarks/findings_page.py

Every number comes from the files that `lofit-lens figures` and `lofit-lens localise` wrote, every verdict from the rules in
`RULES`. What a study lacks is said to be missing.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lofit_lens import io
from lofit_lens.analysis.layers import mean_layer_differences
from lofit_lens.heads import HeadSet

ROOT = Path(__file__).parents[1]
STUDIES = {"SmolLM2-135M-Instruct": "figures/smollm2", "The embedded model": "figures"}
MARGIN, LEVEL = 0.05, 0.05  # of accuracy; of p
HOLDS, FAILS, OPEN = "holds", "**does not hold**", "cannot tell"
INTRODUCTION = """# Findings

Each claim of the paper ([LoFiT](https://arxiv.org/abs/2406.01563)) on a real model of 135 million parameters, and on the
[embedded model](embedded-model.md), whose heads are known. Numbers are means with 95 % intervals over seeds and items. Made by
`python benchmarks/findings_page.py` from the tables in `figures/`.
"""
RULES = f"""## When a claim holds

- *A does better than B* **holds** if the paired test, adjusted by Holm, finds A better (p < {LEVEL}). It **does not hold** if the
  test finds B better, or if the interval of the difference excludes an advantage of {100 * MARGIN:.0f} points.
- *A does as well as B* **holds** if the interval excludes a loss of {100 * MARGIN:.0f} points. It **does not hold** if the test
  finds A worse and the interval does not exclude such a loss.
- Otherwise we **cannot tell**.
"""


@dataclass(frozen=True)
class Answer:
    """What one comparison says: on which task, in words, and the verdict."""

    task: str
    text: str
    verdict: str


Answers = Callable[[Path], Iterator[Answer]]


def better(difference: float, low: float, high: float, p: float) -> str:
    """Verdict on "A does better than B" from A minus B."""
    if p < LEVEL and difference > 0:
        return HOLDS
    return FAILS if (p < LEVEL and difference < 0) or high < MARGIN else OPEN


def as_well(difference: float, low: float, high: float, p: float) -> str:
    """Verdict on "A does as well as B" from A minus B."""
    if low > -MARGIN:
        return HOLDS
    return FAILS if p < LEVEL and difference < 0 else OPEN


def against_reference(name: str, methods: Callable[[str], bool], verdict: Callable[..., str]) -> Answers:
    """Rows of a table of methods: its reference, the row without a difference, minus each of them."""

    def answers(folder: Path) -> Iterator[Answer]:
        table = pd.read_csv(folder / f"{name}.csv")
        own = table.loc[table["difference"].isna()].set_index("task")
        for row in table.loc[table["difference"].notna() & table["method"].map(methods)].to_dict("records"):
            found, reference = minus(row), own.loc[row["task"]]
            text = (
                f"{reference['method']} ({reference['n_parameters']:,} numbers) {value(reference)}, {row['method']} "
                f"({row['n_parameters']:,}) {value(row)}; {words(found)}"
            )
            yield Answer(row["task"], text, verdict(**found))

    return answers


def own_heads(folder: Path) -> Iterator[Answer]:
    """Offsets on a task's own heads against those on another task's."""
    table = pd.read_csv(folder / "fig2_transfer.csv")
    for row in table.loc[table["p_holm"].notna()].to_dict("records"):
        heads = "random heads" if row["source"] == "random" else f"{row['source']}'s heads"
        reached = f"{row['relative']:.0f} % [{row['low']:.0f}, {row['high']:.0f}]"
        loss = {"difference": 100 - row["relative"], "low": 100 - row["high"], "high": 100 - row["low"]}
        verdict = better(**{name: of / 100 for name, of in loss.items()}, p=row["p_holm"])
        yield Answer(
            row["task"], f"{heads} reach {reached} of the accuracy of its own; {p_text(row['p_holm'])}", verdict
        )


def layers(folder: Path) -> Iterator[Answer]:
    """Mean layers of the tasks' heads, pair by pair."""
    grid = pd.read_csv(folder / "head_grid.csv")
    if grid["task"].nunique() < 2:  # of one task the file has a panel for each head score
        return
    chosen = grid.loc[grid["chosen"]].groupby("task", sort=False)
    sets = {task: HeadSet(list(zip(of["layer"], of["head"], strict=True))) for task, of in chosen}
    overlap = pd.read_csv(folder / "overlap_tasks.csv").set_index(["a", "b"])
    for row in mean_layer_differences(sets).to_dict("records"):
        a, b = sets[row["a"]], sets[row["b"]]
        both = overlap.loc[(row["a"], row["b"])]
        text = (
            f"mean layer {a.mean_layer:.1f} against {b.mean_layer:.1f}, {p_text(row['p_holm'])}; {both['shared']:.0f} of "
            f"{len(a)} heads shared, {both['expected_layer']:.1f} expected of heads in these layers"
        )
        yield Answer(f"{row['a']}, {row['b']}", text, HOLDS if row["p_holm"] < LEVEL else OPEN)


def few_heads(folder: Path) -> Iterator[Answer]:
    """Each number of heads against the largest one."""
    table = pd.read_csv(folder / "fig5_heads.csv")
    most = table.groupby("series")["x"].max()
    for row in table.loc[table["difference"].notna()].to_dict("records"):
        found = minus(row, sign=1)
        against = f"from K = {most[row['series']]:.0f} "
        text = f"K = {row['x']:.0f}: {value(row)}; {words(found, against)}"
        yield Answer(row["series"], text, as_well(**found))


def damage(folder: Path) -> Iterator[Answer]:
    """Other tasks and ordinary text under a task's adapter."""
    table = pd.read_csv(folder / "table5.csv")
    for row in table.loc[table["tuned_on"] != "unmodified"].to_dict("records"):
        if row["task"] == "ordinary text":
            yield Answer(row["tuned_on"], f"KL on ordinary text {value(row)} nats per token", "")
        else:
            found = minus(row, sign=1)
            yield Answer(row["tuned_on"], f"{row['task']} {value(row)}; {words(found)}", as_well(**found))


def localised(folder: Path) -> Iterator[Answer]:
    """Chosen heads against random sets with as many heads in each layer, tuned in the same way."""
    for file in sorted(folder.glob("*-localisation.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        test = found["test"]
        difference = dict(zip(("low", "high"), test["interval"], strict=True)) | {
            name: test[name] for name in ("difference", "p")
        }
        text = (
            f"K = {found['k']}: chosen heads {number(test['chosen'])}, {test['n_sets']} random sets {number(test['random'])}, "
            f"unmodified {number(found['unmodified'])}; {words(difference)}; equivalence within {100 * test['margin']:.0f} "
            f"points {p_text(test['p_equivalence'])}"
        )
        yield Answer(found["task"], text, better(**difference))


def steered(method: str) -> bool:
    """Whether a row of Table 1 is of a method that LoFiT is said to beat."""
    return method in ("ITI", "RepE")


def learned(method: str) -> bool:
    """Whether a row of Table 3 is of another method that learns."""
    return not method.startswith("LoFiT")


CLAIMS: tuple[tuple[str, str, Answers], ...] = (
    ("LoFiT does better than ITI and RepE", "Table 1", against_reference("table1", steered, better)),
    ("LoFiT does as well as methods that learn more", "Table 3", against_reference("table3", learned, as_well)),
    ("A task's own heads do better than another task's", "Figure 2", own_heads),
    ("A-norm selects better heads than other scores", "Table 2", against_reference("table2", lambda _: True, better)),
    (
        "The chosen heads do better than random ones in the same layers",
        "[against random sets](howto/localisation.md)",
        localised,
    ),
    ("Tasks use heads in different layers", "Figure 3", layers),
    ("Few heads do as well as many", "Figure 5", few_heads),
    ("Other tasks do as well under the adapter", "Table 5", damage),
)


def tried(folder: Path) -> Iterator[str]:
    """Rows of what each method tried on validation rows, the chosen settings in bold."""
    table = pd.read_csv(folder / "trials.csv")
    for (task, method), of in table.groupby(["task", "method"], sort=False):
        points = of.groupby("settings", sort=False).agg(value=("value", "mean"), chosen=("chosen", "any"))
        listed = [f"{name}: {number(value)}" for name, value in points["value"].items()]
        listed = [f"**{text}**" if chosen else text for text, chosen in zip(listed, points["chosen"], strict=True)]
        yield f"| {task} | {method} | {'; '.join(listed)} |"


def minus(row: dict[str, Any], sign: int = -1) -> dict[str, float]:
    """Difference, interval and p of a row of a table; by default the reference minus the row."""
    low, high = sorted(sign * row[end] for end in ("low_of_difference", "high_of_difference"))
    return {"difference": sign * row["difference"], "low": low, "high": high, "p": row["p_holm"]}


def value(row: Any) -> str:
    """`.80 [.75, .85]`."""
    return f"{number(row['mean'])} [{number(row['low'])}, {number(row['high'])}]"


def number(x: float, sign: str = "") -> str:
    """`.80`, `-.05`."""
    text = f"{x:{sign}z.2f}"
    return text.replace("0.", ".", 1) if abs(x) < 0.995 else text


def p_text(p: float) -> str:
    """`p < .001`, `p .020`."""
    return "p < .001" if p < 0.001 else f"p {p:.3f}".replace("0.", ".", 1)


def words(found: dict[str, float], against: str = "") -> str:
    """`difference +.22 [+.15, +.28], p < .001`."""
    ends = ", ".join(number(found[end], "+") for end in ("low", "high"))
    return f"difference {against}{number(found['difference'], '+')} [{ends}], {p_text(found['p'])}"


def page(root: Path = ROOT) -> str:
    """The whole page."""
    parts = [INTRODUCTION, RULES]
    for title, where, answers in CLAIMS:
        parts.append(f"## {title}\n")
        for model, folder in STUDIES.items():
            rows = _rows(answers, root / folder)
            table = "\n".join(["| task | found | claim |", "|---|---|---|", *rows])
            parts.append(f"**{model}** ({where})" + (f":\n\n{table}\n" if rows else ": not computed yet.\n"))
    parts.append("## Settings that were tried\n\nMean on the validation rows; the chosen settings in bold.\n")
    for model, folder in STUDIES.items():
        if (root / folder / "trials.csv").exists():
            parts.append(
                "\n".join([f"**{model}**:\n", "| task | method | tried |", "|---|---|---|", *tried(root / folder), ""])
            )
    return "\n".join(parts)


def _rows(answers: Answers, folder: Path) -> list[str]:
    """Rows of the page's table; none where the study lacks the file."""
    try:
        return [f"| {a.task} | {a.text} | {a.verdict} |" for a in answers(folder)]
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    io.write_text(ROOT / "docs/findings.md", page())
