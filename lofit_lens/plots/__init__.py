"""Figures: data in, `plotly.graph_objects.Figure` out; only `save_figure` writes files, and nothing is shown by itself."""

from lofit_lens.plots.attention import attention_figure, attention_html
from lofit_lens.plots.drift import drift_layers, drift_positions
from lofit_lens.plots.heads import head_grid
from lofit_lens.plots.in_matplotlib import to_matplotlib
from lofit_lens.plots.interference import interference_figure, long_context_figure
from lofit_lens.plots.layers import layer_distribution
from lofit_lens.plots.localisation import localisation_figure
from lofit_lens.plots.methods import method_bars
from lofit_lens.plots.overlap import agreement_curves, overlap_heatmap, score_scatter
from lofit_lens.plots.paper import for_paper
from lofit_lens.plots.readings import (
    cosine_figure,
    keep_figure,
    leave_one_out_figure,
    promoted_figure,
    removal_bars,
    removal_figure,
)
from lofit_lens.plots.saving import many_figures, save_figure
from lofit_lens.plots.stability import stability_curves
from lofit_lens.plots.sweeps import data_efficiency, k_sweep
from lofit_lens.plots.transfer import transfer_heatmap

__all__ = [
    "agreement_curves", "attention_figure", "attention_html", "cosine_figure", "data_efficiency", "drift_layers",
    "drift_positions", "for_paper", "head_grid", "interference_figure", "k_sweep", "keep_figure", "layer_distribution",
    "leave_one_out_figure", "localisation_figure", "long_context_figure", "many_figures", "method_bars", "overlap_heatmap",
    "promoted_figure", "removal_bars", "removal_figure", "save_figure", "score_scatter", "stability_curves", "to_matplotlib",
    "transfer_heatmap",
]  # fmt: skip
