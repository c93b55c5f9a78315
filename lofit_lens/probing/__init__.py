"""Probing: record activations, fit a probe on every head, find truthful directions."""

from lofit_lens.probing.layers import probe_layers
from lofit_lens.probing.probes import Probes, fit_probes, probe_heads
from lofit_lens.probing.reading import ReadingVectors, reading_vector, reading_vectors
from lofit_lens.probing.record import Activations, record, statement_ids

__all__ = [
    "Activations", "Probes", "ReadingVectors", "fit_probes", "probe_heads", "probe_layers", "reading_vector", "reading_vectors",
    "record", "statement_ids",
]  # fmt: skip
