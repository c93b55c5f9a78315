"""Take what was learned elsewhere, and bring in what others learned: plain checkpoints and other tools' formats."""

from lofit_lens.sharing.affine import affine
from lofit_lens.sharing.checkpoints import Checkpoint, open_checkpoint
from lofit_lens.sharing.outputs import Outputs, outputs_of

__all__ = ["Checkpoint", "Outputs", "affine", "open_checkpoint", "outputs_of"]
