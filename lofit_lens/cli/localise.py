"""lofit-lens localise: does it matter which heads are edited?"""

from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c
from lofit_lens.cli import studies as s


def localise(
    what: c.TaskOptions,
    how: c.ModelOptions,
    k: Annotated[
        str | None, typer.Option("--k", help="Heads in each set: a number, 3K or '10 %'; default: the preset's.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", help="Random sets.", min=1)] = 10,
    seeds: s.Seeds = 2,
    margin: Annotated[
        float, typer.Option("--margin", help="Smallest difference that would matter, a share: 0.05 = 5 points.")
    ] = 0.05,
    lr: Annotated[list[float] | None, typer.Option(
        "--lr", help="A learning rate to choose from; may be repeated. Default: four around the preset's."
    )] = None,
    reword: Annotated[list[str] | None, typer.Option(
        "--reword", help="Also test on other wordings of the prompts: OLD=NEW, replaced everywhere; may be repeated."
    )] = None,
    controls: Annotated[bool, typer.Option(
        "--controls/--no-controls", help="Also: half of the edits, heads silenced, answers patched, repeated selection."
    )] = True,
    limit: s.Limit = None,
    val_limit: Annotated[
        int | None, typer.Option("--val-limit", help="Use only the first validation rows in trials.", min=1)
    ] = None,
    n_train: c.NTrain = None,
    workers: s.Workers = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the runs; finished runs in it are reused.")
    ] = Path("runs/localise"),
    quiet: c.Quiet = False,
    as_json: c.AsJson = False,
) -> None:  # fmt: skip
    """Tune offsets on the task's own heads and on random sets in the same layers: do the own heads do better?

    Example: lofit-lens localise --task organism/kinship
    """
    c.console.stderr = as_json
    opened = what.opened()
    c.check_writable(out)
    if opened.chat is not None:
        from lofit_lens.models import planned_tokenizer

        opened = opened.asked_of(planned_tokenizer(how.model, revision=how.revision))
    c.quiet_libraries()
    from lofit_lens import io
    from lofit_lens.cli.methods import workers_for
    from lofit_lens.errors import InputError
    from lofit_lens.experiments.localisation import CONTROL_COLUMNS, localisation
    from lofit_lens.plots.localisation import localisation_figure
    from lofit_lens.plots.saving import save_figure

    for pair in reword or ():
        if "=" not in pair:
            raise InputError(f"--reword is {pair!r}; give OLD=NEW, e.g. --reword Q:=Question:")
    wordings = {"reworded": dict(pair.split("=", 1) for pair in reword)} if reword else None
    with c.progress_lines(quiet):
        found = localisation(
            how.spec(), opened, k=int(k) if k is not None and k.isdecimal() else k, draws=draws, seeds=range(seeds),
            margin=margin, points=[{"lr": rate} for rate in lr] if lr else None, wordings=wordings,
            controls=controls, limit=limit, tuning_limit=val_limit,
            n_train=n_train, workers=workers_for(workers, how.model, how.device), device=how.device, out=out, progress=not quiet,
        )  # fmt: skip
    heads = "" if k is None else f"-k{found.k}"
    stem = out / f"{opened.name.replace('/', '-').replace(':', '-')}{heads}-localisation"
    files = save_figure(localisation_figure(found), stem, data=found.table, formats=("html",))
    files += [io.write_json(f"{stem}.json", found.to_dict()), io.write_text(f"{stem}.md", found.to_markdown())]
    s.print_table(found.title(), found.columns(), found.rows(), ())
    if rows := found.control_rows():
        s.print_table("Controls", CONTROL_COLUMNS, rows, ())
    c.console.print(f"\n{found}\n")
    c.console.print(f"wrote {', '.join(f.name for f in files)} into {out}")
    if as_json:
        c.print_json(found.to_dict())
