"""lofit-lens import: convert another tool's checkpoint or file into an adapter folder."""

from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c
from lofit_lens.errors import DataError, InputError, ModelError, unknown

TAKES = {
    "lofit": ("--heads", "--k", "--revision"),
    "folded": ("--heads", "--k", "--model", "--revision", "--base-revision"),
    "svec": ("--heads", "--k", "--model", "--revision", "--alpha", "--positions"),
}


def bring_in(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint, or a file.", metavar="SOURCE")],
    out: c.Out,
    form: Annotated[
        str | None,
        typer.Option("--format", help=(
            "lofit (official checkpoint with attn_A, attn_v), folded (plain checkpoint with o_proj.bias), svec "
            "(Steerability, AISteer360); default: detected from the source."
        )),
    ] = None,
    heads: Annotated[
        str | None, typer.Option("--heads", help="Heads to read: a file from select, a .npy file, or 'L1H2,L3H0'.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Only the first K heads; svec: the K of the best accuracies.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="folded: the base model; svec: the model it was made for.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Hub revision of SOURCE (lofit, folded) or of the model (svec).")
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option("--base-revision", help="folded: hub revision of the base model (--model).")
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="svec: strength.")] = None,
    positions: Annotated[str | None, typer.Option("--positions", help="svec: all, answer, last, ...")] = None,
    overwrite: c.Overwrite = False,
) -> None:  # fmt: skip
    """Read another tool's file and write an adapter folder. Pickles are never opened.

    Example: lofit-lens import runs/official_checkpoint --heads top_heads.npy --k 32 --out out/adapter
    """
    if out.resolve() == Path(source).resolve():
        raise InputError(f"{out} is the source itself, which would be lost; give another --out")
    c.check_new(out, overwrite=overwrite)
    c.quiet_libraries()
    from lofit_lens import sharing
    from lofit_lens.cli.tune import read_heads

    form = form or format_of(source, revision)
    if form not in TAKES:
        raise unknown("format", form, TAKES)
    if k is not None and heads is None and form != "svec":
        raise InputError(f"--k {k} without --heads; give the ranking from which to take the first {k} heads")
    given = {
        "--heads": heads, "--k": k, "--model": model, "--revision": revision, "--base-revision": base_revision, "--alpha": alpha,
        "--positions": positions,
    }  # fmt: skip
    c.check_options(f"format {form}", given, TAKES[form])
    chosen = None if heads is None else read_heads(heads, k)
    if form == "lofit":
        made = sharing.import_lofit(source, heads=chosen, revision=revision)
    elif form == "folded":
        made = sharing.import_folded(source, heads=chosen, base=model, revision=revision, base_revision=base_revision)
    else:
        some = k if chosen is None else chosen
        if model is None or alpha is None or positions is None or some is None:
            raise InputError(
                "a .svec file names no model, strength, positions or heads; give --model, --alpha, --positions (all, or "
                "answer for Steerability's after_prompt), and --k 48 (the best by its accuracies, as there) or --heads"
            )
        shape = sharing.outputs_of(sharing.open_checkpoint(model, revision=revision)).shape
        made = sharing.import_svec(source, some, shape, alpha=alpha, positions=positions)
    made.save_pretrained(out, overwrite=overwrite)
    c.console.print(f"[bold]adapter[/bold] {made!r}", soft_wrap=True)
    residuals = made.meta.config.get("residuals")
    if residuals:
        unique = (
            ""
            if made.meta.config["unique"]
            else "; other offsets of these heads would explain them as well: name fewer heads (--heads)"
        )
        c.console.print(
            f"share of the biases that the offsets do not explain: {max(residuals.values()):.2g} in the worst layer{unique}",
            soft_wrap=True,
        )
    c.console.print(f"wrote {out}")


def format_of(source: str | Path, revision: str | None = None) -> str:
    """Detect the format of a file or a checkpoint.

    Raises:
        DataError: a file of another kind.
        ModelError: a checkpoint that holds neither the official code's attn_A and attn_v nor a bias in attention's output.
    """
    from lofit_lens import sharing

    if Path(source).suffix == ".svec":
        return "svec"
    if Path(source).is_file():
        raise DataError(
            f"{source} is not a .svec file; read a .npy file of heads with HeadSet.from_npy (--heads), make an ITI adapter of a "
            "dictionary of directions in Python (docs/howto/share.md says how), and leave pickles where they are"
        )
    found = sharing.open_checkpoint(source, revision=revision)
    if any(".attn_A." in name for name in found.where):
        return "lofit"
    if any(f"{name}.bias" in found.where for name in sharing.outputs_of(found).names):
        return "folded"
    raise ModelError(
        f"{found.name} holds neither attn_A and attn_v (the official code's checkpoint) nor a bias in attention's output "
        "projection (a folded one): nothing can be read without the base model. If only scalings were folded, give it: "
        "--format folded --model BASE, or import_folded(..., base=)"
    )
