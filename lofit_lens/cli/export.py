"""lofit-lens export: write an adapter in another tool's format."""

from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c
from lofit_lens.errors import InputError

Adapter = Annotated[
    str, typer.Argument(help="Adapter folder, or user/name or user/name@revision on the hub.", metavar="ADAPTER")
]
FORMATS = ("--folded", "--peft", "--svec", "--steered", "--hub")
_BASE = ("--out", "--model", "--revision", "--dtype", "--device", "--other-model", "--overwrite")
TAKES = {
    "--folded": _BASE, "--peft": _BASE, "--svec": ("--out", "--model", "--revision", "--overwrite"), "--steered": _BASE,
    "--hub": ("--result", "--license", "--private", "--branch"),
}  # fmt: skip


def export(
    adapter: Adapter,
    folded: Annotated[
        bool, typer.Option("--folded", help="A plain Hugging Face checkpoint with the edit in its weights.")
    ] = False,
    peft: Annotated[bool, typer.Option("--peft", help="An adapter folder that stock PEFT loads (offsets only).")] = False,
    svec: Annotated[bool, typer.Option("--svec", help="Steerability's (AISteer360's) file of head directions.")] = False,
    steered: Annotated[
        bool, typer.Option("--steered", help="lm_eval's file of steering vectors, .pt (offsets only).")
    ] = False,
    hub: Annotated[
        str | None, typer.Option("--hub", help="Push to this repository, user/name, with a model card.", metavar="USER/NAME")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder (--folded, --peft) or file (--svec, --steered).")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model's folder or hub id; default: the recorded one.")
    ] = None,
    revision: c.Revision = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="--folded: of the written weights; --peft, --steered: of the comparison.")
    ] = None,
    device: c.Device = None,
    result: Annotated[
        list[Path] | None, typer.Option("--result", help="--hub: folder of eval --out, for the card's metrics; repeatable.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="--hub: license of the adapter, as the hub spells it: mit, llama2.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="--hub: a new repository is private.")] = False,
    branch: Annotated[str | None, typer.Option("--branch", help="--hub: branch; default: main.")] = None,
    other_model: c.OtherModel = False,
    overwrite: c.Overwrite = False,
    quiet: c.Quiet = False,
) -> None:  # fmt: skip
    """Write an adapter in another format. Folded checkpoints and PEFT folders are reloaded and compared with the hooked model.

    Example: lofit-lens export out/adapter --folded --out out/served
    """
    asked = [name for name, given in zip(FORMATS, (folded, peft, svec, steered, hub), strict=True) if given]
    if len(asked) != 1:
        raise InputError(f"{' and '.join(asked) or 'no form'} asked for; give one of {', '.join(FORMATS)}")
    form = asked[0]
    given = {
        "--model": model, "--revision": revision, "--dtype": dtype, "--device": device, "--other-model": other_model,
        "--result": result, "--license": license, "--private": private, "--branch": branch, "--out": out,
        "--overwrite": overwrite,
    }  # fmt: skip
    c.check_options(form, given, TAKES[form])
    if hub is not None:
        _push(adapter, hub, result or [], license=license, private=private, branch=branch)
        return
    if out is None:
        raise InputError(f"{form} needs --out")
    if out.resolve() == Path(adapter).resolve():
        raise InputError(f"{out} is the adapter itself, which would be lost; give another --out")
    c.check_new(out, overwrite=overwrite, folder=folded or peft)
    c.quiet_libraries()
    from lofit_lens import io, sharing

    made, verified = c.open_adapter(adapter), None
    if folded:
        found = sharing.export_folded(
            made, out, base=model, revision=revision, dtype=dtype, device=device, strict=not other_model, overwrite=overwrite,
            progress=not quiet,
        )  # fmt: skip
        was = f" (was {found.was})" if found.was != found.architecture else ""
        c.console.print(f"{found.architecture}{was}: {len(found.changed)} tensors changed, {len(found.added)} added")
    elif peft:
        sharing.export_peft(
            made, out, base=model, revision=revision, dtype=dtype or "float32", device=device, strict=not other_model,
            overwrite=overwrite,
        )  # fmt: skip
    elif steered:
        verified = sharing.export_steered(
            made, out, base=model, revision=revision, dtype=dtype or "float32", device=device, strict=not other_model,
            overwrite=overwrite,
        )  # fmt: skip
    else:
        kind = (
            None if model is None else str(sharing.open_checkpoint(model, revision=revision).config.get("model_type"))
        )
        sharing.export_svec(made, out, model_type=kind, overwrite=overwrite)
        c.console.print(f"in Steerability: {sharing.svec_use(made)}", markup=False, soft_wrap=True)
    if folded or peft:
        verified = sharing.Verified(**io.read_json(out / sharing.RECORD)["verified"])
    if verified is not None:
        c.console.print(
            f"{'run' if steered else 'loaded again'} and compared on {verified.tokens} tokens ({verified.dtype}): logits within "
            f"{verified.error:.2g} of the hooked model's (the adapter changes them by up to {verified.effect:.2g}); "
            f"greedy answers {'the same' if verified.same_greedy else 'not all the same'}",
            soft_wrap=True,
        )
    c.console.print(f"wrote {out}")


def _push(
    adapter: str, hub: str, results: list[Path], *, license: str | None, private: bool, branch: str | None
) -> None:
    """Push an adapter to the hub, with the metrics of evaluations on its card."""
    c.quiet_libraries()
    from lofit_lens.evaluation import EvalResult

    made = c.open_adapter(adapter)
    for folder in results:
        result = EvalResult.load(folder)
        if result.label == "bare model":
            raise InputError(f"{folder} is an evaluation of the bare model; give one of eval --adapter {adapter}")
        made.add_metrics(result)
    address = made.push_to_hub(hub, license=license, private=private, revision=branch)
    c.console.print(f"pushed {hub}: {address}", soft_wrap=True)
