"""LoRA (arXiv 2106.09685) of rank 8 on the query and value projections of all layers; it needs a TransformerBridge."""

from lofit_lens.experiments.methods.base import trained_method
from lofit_lens.interventions import Lora

METHOD = trained_method(
    "LoRA", lambda bench, seed: Lora.for_model(bench.bridge(), seed=seed), bridge=True, cost=1.5, place=40
)
