"""The two steps of LoFiT, and the one loop they share."""

from lofit_lens.training.config import Preset, TrainConfig, preset
from lofit_lens.training.fitting import fit
from lofit_lens.training.lofit import select_heads, tune_offsets, tune_scalings

__all__ = ["Preset", "TrainConfig", "fit", "preset", "select_heads", "tune_offsets", "tune_scalings"]
