"""ITI (arXiv 2306.03341): mass-mean directions on as many heads as LoFiT, chosen by probe accuracy.

All positions are shifted, as LoFiT does. The strength alpha is chosen.
"""

from lofit_lens.experiments.methods.base import Fit, Method, Workbench
from lofit_lens.interventions import Intervention

STRENGTHS = (5.0, 15.0, 45.0, 135.0)


def _fit(bench: Workbench, asked: Fit) -> Intervention:
    k = asked.k or bench.preset.k
    return bench.probes(asked.seed).iti(k, alpha=asked.settings["alpha"], positions="all")


METHOD = Method(
    "ITI",
    _fit,
    lambda outline: tuple({"alpha": a} for a in STRENGTHS),
    settings=("alpha",),
    heads="k",
    cost=0.5,
    place=10,
)
