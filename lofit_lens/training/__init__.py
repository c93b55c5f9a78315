"""The two steps of LoFiT, and the one loop they share."""

from lofit_lens.training.config import Preset, TrainConfig, preset
from lofit_lens.training.fitting import fit
from lofit_lens.training.lofit import LofitRun, learned_scores, select_heads, tune_offsets, tune_scalings
from lofit_lens.training.many import tune_many
from lofit_lens.training.passes import FAST, PLAIN, Passes
from lofit_lens.training.trackers import TRACKERS, Tracked, Tracker, tracked, tracker

__all__ = [
    "FAST", "PLAIN", "TRACKERS", "LofitRun", "Passes", "Preset", "Tracked", "Tracker", "TrainConfig", "fit",
    "learned_scores", "preset", "select_heads", "tracked", "tracker", "tune_many", "tune_offsets", "tune_scalings",
]  # fmt: skip
