"""Interventions on a frozen model: each is attached for the length of a `with` block."""

from lofit_lens.interventions.base import Intervention, attached
from lofit_lens.interventions.iti import ITI
from lofit_lens.interventions.lofit import Lofit, edit_z
from lofit_lens.interventions.lora import Lora, load_lora
from lofit_lens.interventions.loreft import LoReft
from lofit_lens.interventions.red import Red

__all__ = ["ITI", "Intervention", "LoReft", "Lofit", "Lora", "Red", "attached", "edit_z", "load_lora"]
