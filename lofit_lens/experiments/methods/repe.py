"""RepE (arXiv 2310.01405): first principal component of the pairs' differences, at all positions.

Two settings are chosen: its strength, in standard deviations of the statements' projections, and its layers (the third that
tells right from wrong best, or all).
"""

from lofit_lens.experiments.methods.base import Fit, Method, Workbench
from lofit_lens.interventions import Intervention

POINTS = tuple({"coefficient": c, "layers": share} for share in (1 / 3, 1.0) for c in (0.5, 1.0))


def _fit(bench: Workbench, asked: Fit) -> Intervention:
    found = bench.reading(asked.seed)
    layers = found.top_layers(max(1, round(asked.settings["layers"] * bench.info.n_layers)))
    return found.repe(layers, coefficient=asked.settings["coefficient"], relative=True)


METHOD = Method("RepE", _fit, lambda outline: POINTS, settings=("coefficient", "layers"), cost=0.5, place=20)
