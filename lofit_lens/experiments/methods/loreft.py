"""LoReFT (arXiv 2404.03592) of rank 8 on all layers."""

from lofit_lens.experiments.methods.base import trained_method
from lofit_lens.interventions import LoReft

METHOD = trained_method("LoReFT", lambda bench, seed: LoReft.for_model(bench.model, seed=seed), cost=1.5, place=60)
