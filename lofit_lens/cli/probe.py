"""lofit-lens probe: how well each head's output tells right answers from wrong ones (ITI's probes)."""

import shlex
from typing import Annotated

import typer

from lofit_lens.cli import common as c


def probe(
    what: c.TaskOptions,
    how: c.ModelOptions,
    out: c.Out,
    k: Annotated[int | None, typer.Option("--k", help="Heads to keep in heads.json; default: the preset's.")] = None,
    seed: c.Seed = 42,
    n_train: c.NTrain = None,
    overwrite: c.Overwrite = False,
    quiet: c.Quiet = False,
) -> None:
    """Fit a logistic probe to every head's output at the answer's last token; rank heads by validation accuracy.

    Writes scores.json and heads.json. Example: lofit-lens probe --task organism/truth --out out/probes
    """
    c.check_new(out, overwrite=overwrite)
    opened = what.opened()
    loaded = c.open_model(how)
    (data,) = c.asked_of(loaded, opened)
    from lofit_lens.heads import check_k
    from lofit_lens.models import model_info
    from lofit_lens.probing import probe_heads
    from lofit_lens.training import preset

    info = model_info(loaded)
    wanted = preset(info, data.family, data.objective).k if k is None else k
    check_k(wanted, info.grid.n_total, info.name)
    scores = probe_heads(loaded, data, seed=seed, n_train=n_train, progress=not quiet)
    heads = c.write_heads(out, scores, wanted, overwrite=overwrite)
    best = ", ".join(f"{h} {scores[h]:.3f}" for h in heads)
    c.console.print(f"[bold]probes[/bold] validation accuracy, best {len(heads)}: {best}")
    c.console.print(f"       always saying the more frequent label: {scores.meta['majority']:.3f}", style="dim")
    c.console.print(
        f"wrote {out}; next: lofit-lens tune{c.again(how, what)} --heads {shlex.quote(str(out))} --out ADAPTER",
        soft_wrap=True,
    )
