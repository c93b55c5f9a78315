"""RED (arXiv 2402.15179) on the MLP output of all layers."""

from lofit_lens.experiments.methods.base import trained_method
from lofit_lens.interventions import Red

METHOD = trained_method("RED", lambda bench, seed: Red.for_model(bench.model), place=50)
