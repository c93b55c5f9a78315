"""The two steps of LoFiT, and the one loop they share."""

from lofit_lens.training.config import Preset, TrainConfig, preset
from lofit_lens.training.fitting import fit
from lofit_lens.training.jola import fit_jola, jola_scores
from lofit_lens.training.lofit import LofitRun, learned_scores, select_heads, tune_many, tune_offsets, tune_scalings
from lofit_lens.training.loop import row_order
from lofit_lens.training.losses import dpo_loss, l1_norm, sft_loss, summed_log_probs, token_log_probs
from lofit_lens.training.objective import Objective, reference_log_probs, task_loss
from lofit_lens.training.passes import FAST, PLAIN, Passes
from lofit_lens.training.trackers import TRACKERS, Tracked, Tracker, tracked, tracker

__all__ = [
    "FAST", "PLAIN", "TRACKERS", "LofitRun", "Objective", "Passes", "Preset", "Tracked", "Tracker", "TrainConfig", "dpo_loss",
    "fit", "fit_jola", "jola_scores", "l1_norm", "learned_scores", "preset", "reference_log_probs", "row_order",
    "select_heads", "sft_loss",
    "summed_log_probs", "task_loss", "token_log_probs", "tracked", "tracker", "tune_many", "tune_offsets", "tune_scalings",
]  # fmt: skip
