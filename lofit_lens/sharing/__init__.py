"""Export adapters to plain checkpoints and other tools' formats, and import from them."""

from lofit_lens.sharing.affine import affine
from lofit_lens.sharing.biases import to_vllm
from lofit_lens.sharing.carrier import export_peft
from lofit_lens.sharing.checkpoints import Checkpoint, open_checkpoint
from lofit_lens.sharing.circuit import export_circuit
from lofit_lens.sharing.folded import FoldedExport, export_folded
from lofit_lens.sharing.for_inspect import inspect_model
from lofit_lens.sharing.for_lm_eval import LM_EVAL_TASKS, lm_eval_model
from lofit_lens.sharing.outputs import Outputs, outputs_of
from lofit_lens.sharing.recover import import_folded
from lofit_lens.sharing.reference import import_lofit
from lofit_lens.sharing.steered import export_steered
from lofit_lens.sharing.svec import export_svec, import_svec, svec_use
from lofit_lens.sharing.verify import RECORD, Verified

__all__ = [
    "LM_EVAL_TASKS", "RECORD", "Checkpoint", "FoldedExport", "Outputs", "Verified", "affine", "export_circuit", "export_folded",
    "export_peft", "export_steered", "export_svec", "import_folded", "import_lofit", "import_svec", "inspect_model",
    "lm_eval_model", "open_checkpoint", "outputs_of", "svec_use", "to_vllm",
]  # fmt: skip
