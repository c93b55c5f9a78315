"""Interventions on a frozen model: each is attached within a `with` block."""

from lofit_lens.interventions.ablation import HeadAblation, mean_z
from lofit_lens.interventions.at_heads import HeadAdapter
from lofit_lens.interventions.base import Adapter, Intervention, attached
from lofit_lens.interventions.contrast import ContrastVectors
from lofit_lens.interventions.folders import load_adapter
from lofit_lens.interventions.iti import ITI
from lofit_lens.interventions.lofit import Lofit, edit_z
from lofit_lens.interventions.lora import Lora, load_lora
from lofit_lens.interventions.loreft import LoReft
from lofit_lens.interventions.post_block import PostBlock
from lofit_lens.interventions.red import Red
from lofit_lens.interventions.repe import RepE

__all__ = [
    "ITI", "Adapter", "ContrastVectors", "HeadAblation", "HeadAdapter", "Intervention", "LoReft", "Lofit", "Lora",
    "PostBlock", "Red", "RepE", "attached", "edit_z", "load_adapter", "load_lora", "mean_z",
]  # fmt: skip
