"""lofit-lens tune: step 2, learn offsets on the chosen heads."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lofit_lens.cli import common as c

if TYPE_CHECKING:
    from lofit_lens.heads import HeadSet


def tune(
    what: c.TaskOptions,
    how: c.ModelOptions,
    heads: Annotated[
        str, typer.Option("--heads", help="A folder or file from select, a .npy file, heads like 'L1H2,L3H0', or 'all'.")
    ],
    out: c.Out,
    k: Annotated[int | None, typer.Option("--k", help="Use only the first K heads.")] = None,
    seed: c.Seed = 42,
    n_train: c.NTrain = None,
    lr: c.LearningRate = None,
    epochs: c.Epochs = None,
    batch_size: c.BatchSize = None,
    max_steps: c.MaxSteps = None,
    token_budget: c.TokenBudget = None,
    checkpointing: c.Checkpointing = False,
    track: c.Track = None,
    overwrite: c.Overwrite = False,
    quiet: c.Quiet = False,
) -> None:  # fmt: skip
    """Step 2: learn an offset v on the chosen heads only. Writes an adapter folder.

    Example: lofit-lens tune --model organism --task organism/kinship --heads out/heads --out out/adapter
    """
    c.check_new(out, overwrite=overwrite)
    chosen = read_heads(heads, k)
    reader = c.open_tracker(track, out)
    opened = what.opened()
    loaded = c.open_model(how)
    (data,) = c.asked_of(loaded, opened)
    from lofit_lens.heads import HeadSet, check_k
    from lofit_lens.models import model_info
    from lofit_lens.training import preset, tune_offsets

    info = model_info(loaded)
    if chosen is None:
        chosen = HeadSet.all(info.grid)
        if k is not None:
            check_k(k, len(chosen), info.name)
            chosen = chosen.top(k)
    config = preset(info, data.family, data.objective).tune.with_changes(
        lr=lr, epochs=epochs, batch_size=batch_size, max_steps=max_steps
    )
    state = c.state_file(out)
    settings = {"heads": [list(h) for h in chosen], "n_train": n_train, "config": config.to_dict()}
    with c.tracked_run(reader, out, info, data, seed, **settings) as run:
        lofit = tune_offsets(
            loaded, data, chosen, seed=seed, config=config, n_train=n_train, checkpoint=state, on_step=run,
            passes=c.passes_of(token_budget, checkpointing), progress=not quiet,
        )  # fmt: skip
    lofit.save_pretrained(out, overwrite=overwrite)
    state.unlink(missing_ok=True)
    c.console.print(f"[bold]adapter[/bold] {lofit!r}")
    c.console.print(
        f"wrote {out}; next: lofit-lens eval{c.again(how, what)} --adapter {shlex.quote(str(out))}", soft_wrap=True
    )


def is_scores(record: object) -> bool:
    """Whether a JSON record holds scores of all heads."""
    return isinstance(record, dict) and record.get("kind") == "lofit_lens.HeadScores"


def read_heads(text: str, k: int | None) -> "HeadSet | None":
    """Parse the heads of the `--heads` option; None = all heads of the model.

    Raises:
        InputError: neither a file nor a list of heads, or K out of range.
        DataError: a file that holds no heads.
    """
    from lofit_lens import io
    from lofit_lens.errors import InputError
    from lofit_lens.heads import HeadScores, HeadSet

    if text == "all":
        return None
    path = Path(text)
    if path.is_dir():
        path = path / "heads.json" if k is None else path / "scores.json"
    if path.suffix in (".json", ".npy"):
        if not path.is_file():
            raise InputError(
                f"no head file {path}; give a folder written by lofit-lens select, or heads like L1H2,L3H0"
            )
        if path.suffix == ".json" and is_scores(io.read_json(path)):
            scores = HeadScores.load(path)
            if k is None:
                raise InputError(f"{path} holds scores of all heads; give --k")
            return scores.top(k)
        found = HeadSet.load(path)
    else:
        found = HeadSet([part for part in text.replace(",", " ").split() if part])
    if len(found) == 0:
        raise InputError("no heads given; write e.g. --heads L1H2,L3H0")
    return found if k is None else found.top(k)
