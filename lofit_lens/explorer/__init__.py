"""A widget for Jupyter: two head sets side by side, and all that is known of the head that one clicks."""

from lofit_lens.explorer.explorer import Explorer, explore
from lofit_lens.explorer.running import PromptRun

__all__ = ["Explorer", "PromptRun", "explore"]
