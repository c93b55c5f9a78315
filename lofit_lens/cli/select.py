"""lofit-lens select: step 1, score all heads."""

import shlex
from typing import Annotated

import typer

from lofit_lens.cli import common as c
from lofit_lens.errors import InputError, unknown

A_NORM = "A-norm"


def select(
    what: c.TaskOptions,
    how: c.ModelOptions,
    out: c.Out,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="A-norm (LoFiT's step 1), bias norm, probe accuracy, probing layers, gradient attribution, activation patching, "
            "JoLA gates, random.",
        ),
    ] = A_NORM,
    k: Annotated[int | None, typer.Option("--k", help="Heads to keep in heads.json; default: the preset's.")] = None,
    seed: c.Seed = 42,
    n_train: c.NTrain = None,
    lr: c.LearningRate = None,
    l1: Annotated[float | None, typer.Option("--l1", help="Lambda of the L1 penalty; default: the preset's.")] = None,
    epochs: c.Epochs = None,
    batch_size: c.BatchSize = None,
    max_steps: c.MaxSteps = None,
    token_budget: c.TokenBudget = None,
    checkpointing: c.Checkpointing = False,
    track: c.Track = None,
    circuit: Annotated[
        bool,
        typer.Option("--circuit", help="Also write circuit.json: the scores in the format of MIB's circuit track."),
    ] = False,
    overwrite: c.Overwrite = False,
    quiet: c.Quiet = False,
) -> None:
    """Step 1: learn a scaling A on every head and rank heads by its norm, or by another score. Writes scores.json and heads.json.

    Example: lofit-lens select --model organism --task organism/kinship --out out/heads
    """
    c.check_new(out, overwrite=overwrite)
    from lofit_lens.training.selectors import SELECTORS

    if by not in SELECTORS:
        raise unknown("score", by, SELECTORS)
    ours = {"lr": lr, "l1": l1, "epochs": epochs, "batch_size": batch_size, "max_steps": max_steps}
    passes = {"token_budget": token_budget, "checkpointing": checkpointing or None, "track": track}
    if by != A_NORM and (given := [n for n, value in {**ours, **passes}.items() if value is not None]):
        raise InputError(f"--{given[0].replace('_', '-')} is a setting of {A_NORM}; leave it out with --by {by!r}")
    reader = c.open_tracker(track, out)
    opened = what.opened()
    loaded = c.open_model(how)
    (data,) = c.asked_of(loaded, opened)
    from lofit_lens.heads import check_k
    from lofit_lens.models import model_info
    from lofit_lens.training import preset, select_heads

    info = model_info(loaded)
    settings = preset(info, data.family, data.objective)
    wanted = settings.k if k is None else k
    check_k(wanted, info.grid.n_total, info.name)
    state = c.state_file(out)
    if by == A_NORM:
        config = settings.select.with_changes(**ours)
        asked = {"n_train": n_train, "config": config.to_dict()}
        with c.tracked_run(reader, out, info, data, seed, **asked) as run:
            scores = select_heads(
                loaded,
                data,
                seed=seed,
                config=config,
                n_train=n_train,
                checkpoint=state,
                on_step=run,
                passes=c.passes_of(token_budget, checkpointing),
                progress=not quiet,
            )
    else:
        scores = SELECTORS[by](loaded, data, seed=seed, n_train=n_train, progress=not quiet)
    heads = c.write_heads(out, scores, wanted, overwrite=overwrite)
    if circuit:
        from lofit_lens.sharing import export_circuit

        export_circuit(scores, out / "circuit.json", loaded, overwrite=overwrite)
    state.unlink(missing_ok=True)
    c.console.print(f"[bold]heads[/bold]  top {len(heads)} by {scores.kind}: {heads}")
    c.console.print(
        f"wrote {out}; next: lofit-lens tune{c.again(how, what)} --heads {shlex.quote(str(out))} --out ADAPTER",
        soft_wrap=True,
    )
