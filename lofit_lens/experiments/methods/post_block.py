"""Post-block steering (arXiv 2603.00425) of rank 8 with SiLU on all layers."""

from lofit_lens.experiments.methods.base import trained_method
from lofit_lens.interventions import PostBlock

METHOD = trained_method("post-block", lambda bench, seed: PostBlock.for_model(bench.model, seed=seed), place=65)
