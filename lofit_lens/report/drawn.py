"""A figure with its name and the table it was drawn from."""

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go


class Drawn(NamedTuple):
    """A figure and the table it was drawn from; `name` is the front of its files' names."""

    name: str
    figure: go.Figure
    data: pd.DataFrame


def short(task: str) -> str:
    """The last part of a task's name, fit for a file name."""
    return task.split("/")[-1].replace(":", "-")
