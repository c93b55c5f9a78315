"""Which of the forms that are read here a file or a checkpoint has."""

from pathlib import Path

from lofit_lens.errors import DataError, ModelError
from lofit_lens.sharing.checkpoints import open_checkpoint
from lofit_lens.sharing.outputs import outputs_of


def format_of(source: str | Path, *, revision: str | None = None) -> str:
    """`"svec"` or `"iti"` for a file, `"lofit"` or `"folded"` for a checkpoint's folder or hub id (at `revision`).

    Raises:
        DataError: a file of another kind.
        InputError: no such file, folder or repository.
        ModelError: a checkpoint that holds neither the official code's attn_A and attn_v nor a bias in attention's output.
    """
    path = Path(source)
    if path.is_file():
        known = {".svec": "svec", ".json": "iti"}
        if path.suffix not in known:
            raise DataError(
                f"{path} is neither a .svec file nor a .json one (ITI's dictionary); say what it is (--format), read a .npy "
                "file of heads with HeadSet.from_npy (--heads), and leave pickles where they are"
            )
        return known[path.suffix]
    found = open_checkpoint(source, revision=revision)
    if any(".attn_A." in name for name in found.where):
        return "lofit"
    if any(f"{name}.bias" in found.where for name in outputs_of(found).names):
        return "folded"
    raise ModelError(
        f"{found.name} holds neither attn_A and attn_v (the official code's checkpoint) nor a bias in attention's output "
        "projection (a folded one): there is nothing to read without the base model. Where scalings alone were folded, give it: "
        "--format folded --model BASE, or import_folded(..., base=)"
    )
