"""A figure with its name and the table it was drawn from."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go


class Drawn(NamedTuple):
    """A figure and the table it was drawn from; `name` is the front of its files' names."""

    name: str
    figure: go.Figure
    data: pd.DataFrame


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task -> the last part of its name, or the whole of it where two tasks share that; fit for file names.

    >>> short_names(["organism/truth", "truthfulqa:0", "my/v1.2"])
    {'organism/truth': 'truth', 'truthfulqa:0': 'truthfulqa-0', 'my/v1.2': 'v1-2'}
    >>> short_names(["a/x", "b/x"])
    {'a/x': 'a-x', 'b/x': 'b-x'}
    """
    last = [t.rsplit("/", 1)[-1] for t in tasks]
    chosen = last if len(set(last)) == len(last) else list(tasks)
    return {t: re.sub(r"[^A-Za-z0-9_-]", "-", name) for t, name in zip(tasks, chosen, strict=True)}
