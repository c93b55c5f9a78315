"""Tasks: truthfulness, knowledge edits, kinship, and your own."""

from lofit_lens.tasks.base import Form, Task
from lofit_lens.tasks.examples import (
    ChoiceExample,
    GenerationExample,
    OptionExample,
    PairExample,
    SFTExample,
    TestExample,
    TrainingExample,
)
from lofit_lens.tasks.marked import Marked
from lofit_lens.tasks.registry import TASKS, load_task, register
from lofit_lens.tasks.wording import reworded

__all__ = [
    "TASKS", "ChoiceExample", "Form", "GenerationExample", "Marked", "OptionExample", "PairExample", "SFTExample", "Task",
    "TestExample", "TrainingExample", "load_task", "register", "reworded",
]  # fmt: skip
