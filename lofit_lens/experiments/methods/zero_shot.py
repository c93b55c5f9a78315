"""The unmodified model."""

from lofit_lens.experiments.methods.base import Method

METHOD = Method("zero-shot", None, cost=0.15, place=0)
