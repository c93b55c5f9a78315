"""The two steps of LoFiT, and the one loop they share."""

from lofit_lens.training.config import Preset, TrainConfig, preset
from lofit_lens.training.fitting import fit
from lofit_lens.training.lofit import select_heads, tune_offsets, tune_scalings
from lofit_lens.training.trackers import TRACKERS, Tracked, Tracker, tracked, tracker

__all__ = [
    "TRACKERS", "Preset", "Tracked", "Tracker", "TrainConfig", "fit", "preset", "select_heads", "tracked", "tracker",
    "tune_offsets", "tune_scalings",
]  # fmt: skip
