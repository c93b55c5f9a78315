"""Figures of the readings of a study's adapters (`experiments.readings`)."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from lofit_lens.analysis.attention import AttentionPatterns
from lofit_lens.analysis.interference import Interference
from lofit_lens.analysis.stored import frame_of, restored
from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments.grid.expand import TOGETHER
from lofit_lens.experiments.methods.base import OWN
from lofit_lens.experiments.tables.results import Results
from lofit_lens.plots.attention import attention_figure
from lofit_lens.plots.drift import drift_layers, drift_positions
from lofit_lens.plots.interference import interference_figure, long_context_figure
from lofit_lens.plots.layout import say
from lofit_lens.plots.readings import (
    cosine_figure,
    keep_figure,
    leave_one_out_figure,
    promoted_figure,
    removal_bars,
)
from lofit_lens.report.drawn import Drawn, short_names

log = logging.getLogger(__name__)

Draw = Callable[[], tuple[go.Figure, pd.DataFrame]]
# Part of a reading -> what is removed, as the label under the bars.
REMOVALS = {
    "removal_cued": "heads of the<br>unmodified model,<br>good cue", "removal": "heads, with<br>the adapter",
    "removal_edits": "edits of an<br>adapter of 3 K",
}  # fmt: skip


def reading_figures(results: Results) -> Iterator[Drawn]:
    """Each figure for which the study has readings; the log names those that cannot be drawn (too many heads to be read).

    Raises:
        InputError: the study has no readings.
        DataError: a damaged file.
    """
    found = results.readings()
    if not found:
        raise InputError(
            "the study has no readings of its adapters; run lofit-lens figures with --run, or a grid with `readings: true`"
        )
    for task, parts in found.items():
        where = f"{results.folder}: the reading of {task}"
        kept = {name: part if name == "geometry" else restored(part, where) for name, part in parts.items()}
        ks, seed = results.read_adapters(task)
        adapters = f"LoFiT: K={' or '.join(map(str, dict.fromkeys(ks)))}, seed {seed}"
        wanted = _together(kept) if task == TOGETHER else _of_task(results, task, kept)
        for name, draw in wanted.items():
            try:
                figure, frame = draw()
                yield Drawn(name, figure if name.startswith("attention") else say(figure, adapters), frame)
            except InputError as e:
                if isinstance(e, DataError):
                    raise
                log.warning("%s: left out, %s", name.replace("_", " "), e)


def _together(parts: dict[str, Interference]) -> dict[str, Draw]:
    def drawn(found: Interference) -> Draw:
        tests = found.tests.rename(columns={"first": "condition", "second": "against"})
        both = found.frame.merge(tests, how="left", on=["task", "condition"], suffixes=("", "_of_difference"))
        return lambda: (interference_figure(found), both)

    return {name: drawn(found) for name, found in parts.items()}


def _of_task(results: Results, task: str, parts: dict[str, Any]) -> dict[str, Draw]:
    """Return name -> how it is drawn, for the parts that the reading has."""
    draws: dict[str, tuple[str, Draw]] = {
        "tokens": ("tokens", lambda: (
            promoted_figure(parts["tokens"], top=6, title=f"{task}: tokens that each head's offset promotes"),
            parts["tokens"].frame,
        )),
        "cosines": ("geometry", lambda: (
            cosine_figure(frame_of(parts["geometry"]["rows"]), title=f"{task}: offsets and the directions of ITI and RepE"),
            frame_of(parts["geometry"]["rows"]),
        )),
        "leave_one_out": ("leave_one_out", lambda: (
            leave_one_out_figure(parts["leave_one_out"], title=f"{task}: what the adapter loses without each head"),
            parts["leave_one_out"].frame,
        )),
        "keep_only": ("keep_only", lambda: (
            keep_figure(parts["keep_only"], title=f"{task}: are a few heads enough?"), parts["keep_only"].curve
        )),
        "drift": ("drift", lambda: (
            drift_layers(parts["drift"], title=f"{task}: how far the adapter moves activations"), parts["drift"].layers
        )),
        "drift_positions": ("drift", lambda: (
            drift_positions(parts["drift"], title=f"{task}: where in the text the adapter moves activations"),
            parts["drift"].positions,
        )),
        "long_context": ("long_context", lambda: (
            long_context_figure(parts["long_context"], title=f"{task}: after other documents in the context"),
            parts["long_context"].frame,
        )),
        "attention": ("attention", lambda: _attention(results, task, parts["attention"])),
    }  # fmt: skip
    found = {
        f"{name}_{short_names(results.tasks)[task]}": draw for name, (part, draw) in draws.items() if part in parts
    }
    removals = {label: parts[part] for part, label in REMOVALS.items() if part in parts}
    if removals:
        frame = pd.concat([r.curve.assign(removed=label.replace("<br>", " ")) for label, r in removals.items()])
        title = f"{task}: removing the chosen heads or as many random ones"
        found[f"removal_{short_names(results.tasks)[task]}"] = lambda: (removal_bars(removals, title=title), frame)
    return found


def _attention(results: Results, task: str, found: AttentionPatterns) -> tuple[go.Figure, pd.DataFrame]:
    """Draw the attention of the task's best head on the first prompt."""
    best = results.heads(task)[0]
    frame = pd.DataFrame(found.of(best).tolist(), columns=[f"{i} {t}" for i, t in enumerate(found.tokens[0])])
    fig = attention_figure(found, best, title=f"{task}: where {best} attends")
    return say(fig, f"best head by {OWN}, seed {results.seeds[0]}"), frame
