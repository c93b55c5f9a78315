"""A widget for Jupyter: two head sets side by side, and everything known about the head that is clicked."""

from lofit_lens.explorer.explorer import Explorer, explore
from lofit_lens.explorer.running import PromptRun

__all__ = ["Explorer", "PromptRun", "explore"]
