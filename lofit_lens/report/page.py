"""The report: the explorer saved with a study's data, between the study's tables and its transfer matrix."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.colors import sample_colorscale

from lofit_lens import io
from lofit_lens.analysis.transfer import RANDOM, Transfer
from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments.tables.paper_tables import paper_tables
from lofit_lens.experiments.tables.results import Results
from lofit_lens.explorer.explorer import Explorer
from lofit_lens.explorer.source import Source, read_source
from lofit_lens.explorer.state import p_text
from lofit_lens.plots.style import HEAT
from lofit_lens.report.figures import transfer

ABOUT = (
    "LoFiT finds the attention heads that a task uses (a learned scale for each head's output, ranked by its norm), then tunes "
    "one offset vector in each chosen head: <code>z * (1 + A) + v</code>."
)
REVISION = len("sha256:") + 12  # characters of a revision that the heading shows; the table of versions has all
METHOD = (
    "This page is one file, made by lofit-lens, and needs no network. Chance: two sets of K heads drawn at random from N heads "
    "share K&sup2;/N heads on average. p is the exact probability of sharing at least as many heads as observed, once with heads "
    "drawn from the whole model and once within each layer. It holds for one pair of sets and one K, without a correction for "
    "looking at several."
)


def write_report(results: Results, path: str | Path) -> Path:
    """Write the report of a study, whole or not at all, and return its path.

    Args:
        results: what `ll.load_results` reads.
        path: the page; a file of that name is replaced.

    Raises:
        InputError: a study without head scores, a page of 10 MB or more, or a file that cannot be written.
        DataError: damaged files.
    """
    return io.write_text(path, render(results))


def render(results: Results) -> str:
    """The report as one HTML page; it shows as much as the study holds, and the same study gives the same page.

    Raises:
        InputError: a study without head scores, or a page of 10 MB or more.
        DataError: damaged files.
    """
    source = read_source(results)
    tables = "".join(
        f"<h3>{escape(t.title)}</h3>{_table(t.columns, t.cells, t.title, t.notes)}" for t in paper_tables(results)
    )
    versions = dict(sorted(results.record["versions"].items()))
    weights = {"weights": results.model.revision} if results.model.revision else {}
    versions = _table(("software", "version"), {**versions, **weights}.items(), "Versions")
    parts = {
        "Summary": tables,
        "Heads": "",
        "Transfer": _transfer(results),
        "About": f'<p class="quiet">{METHOD}</p>{versions}',
    }
    shown = {
        name: f'<h2 id="{name.lower()}">{name}</h2>{text}' for name, text in parts.items() if text or name == "Heads"
    }
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in shown)
    title = f"Which heads does {results.model.name} use?"
    header = f'<h1>{escape(title)}</h1>{_notes(results, source)}<nav aria-label="Sections">{links}</nav>'
    return Explorer(source).document(
        title,
        before=f"<header>{header}</header><main>{shown.get('Summary', '')}{shown['Heads']}",
        after=f"{shown.get('Transfer', '')}{shown['About']}</main>",
    )


def _notes(results: Results, source: Source) -> str:
    model, seeds = results.model, results.seeds
    revision = f", revision {model.revision[:REVISION]}" if model.revision else ""
    notes = [f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}."]
    if source.readings or source.attention:
        notes += [
            f"Promoted tokens and attention patterns are those of the adapters of seed {seeds[0]}.",
            "Promoted tokens: a head's offset v through W_O, the final norm at its mean scale, and W_U, without later layers.",
            "Attention patterns: with the adapter of the task attached.",
        ]
    if source.left_out:
        notes.append(
            f"{source.left_out} attention patterns are left out to keep this page small; the figures have them."
        )
    return (
        f"<p><b>{escape(model.name)}</b> ({escape(model.class_name)}): {model.n_layers} layers of {model.n_heads} heads"
        f'{escape(revision)}</p><p class="quiet">{ABOUT}</p><ul>{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul>'
    )


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]], label: str, notes: Iterable[str] = ()) -> str:
    """Texts as an HTML table, with notes below it."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return _scrolled(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", label) + "".join(
        f'<p class="quiet">{escape(note)}</p>' for note in notes
    )


def _scrolled(text: str, label: str) -> str:
    """What scrolls sideways by itself where it is too wide, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{text}</div>'


def _transfer(results: Results) -> str:
    """The transfer matrix as HTML; empty where the study holds none."""
    try:
        found: Transfer = transfer(results)
    except InputError as e:
        if isinstance(e, DataError):  # damaged; any other: one task, or that part was not run
            raise
        return ""
    cells = {(row["source"], row["task"]): row for row in found.frame.to_dict("records")}
    known = [x for x in found.frame["relative"] if not pd.isna(x)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    heads = "".join(
        f'<th scope="col">tuned on {escape(t)}<span>{escape(own["metric"].upper())}, n = {own["n_items"]:,}</span></th>'
        for t, own in ((t, cells[t, t]) for t in found.tasks)
    )
    rows = "".join(
        f'<tr><th scope="row">{"random heads" if s == RANDOM else escape(s)}</th>'
        + "".join(_cell(cells[s, t], low, high) for t in found.tasks) + "</tr>"
        for s in found.sources
    )  # fmt: skip
    return (
        "<p class=\"quiet\">Offsets are tuned on the column's task, in the heads chosen for the row's task. Large: accuracy "
        "relative to the column's own heads (100 %). Below: the accuracy with its interval, mean over "
        f"{min(found.frame['n_seeds'])} seed(s), and p of the paired test over test items against the column's own heads "
        "(* p &lt; 0.05, + p &lt; 0.1). Lighter: larger.</p>"
    ) + _scrolled(
        f'<table class="transfer"><thead><tr><th scope="col">heads from</th>{heads}</tr></thead><tbody>{rows}</tbody></table>',
        "Transfer between tasks",
    )


def _cell(row: dict[str, Any], low: float, high: float) -> str:
    accuracy = "not measured" if pd.isna(row["accuracy"]) else f"{row['accuracy']:.3f}"
    if pd.isna(row["relative"]):
        return f'<td class="none">{accuracy}{"" if pd.isna(row["accuracy"]) else " (own heads: 0)"}</td>'
    level = (row["relative"] - low) / (high - low) if high > low else 1.0
    interval = "" if pd.isna(row["accuracy_low"]) else f" [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}]"
    p = "" if pd.isna(row["p"]) else f"p {'' if row['p'] < 0.0005 else '= '}{p_text(row['p'])}"
    return (
        f'<td style="background:{sample_colorscale(HEAT, [level])[0]};color:{"#000" if level > 0.5 else "#fff"}">'
        f"<b>{row['relative']:.1f} %{row['mark']}</b><span>{accuracy}{interval}</span><span>{p}</span></td>"
    )
