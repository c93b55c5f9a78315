"""lofit-lens transfer: do other tasks' heads work as well as a task's own?"""

from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c
from lofit_lens.cli import studies as s


def transfer(
    how: c.ModelOptions,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the study; finished runs in it are reused.")
    ] = Path("runs/transfer"),
    task: s.Tasks = None,
    seeds: s.Seeds = 2,
    draws: s.Draws = 5,
    limit: s.Limit = None,
    data_dir: c.DataDir = None,
    column: c.Column = None,
    chat: c.IsChat = False,
    system: c.System = None,
    workers: s.Workers = 0,
    quiet: c.Quiet = False,
    as_json: c.AsJson = False,
) -> None:  # fmt: skip
    """Tune each task's offsets on every task's heads and on random ones: accuracy relative to the task's own heads.

    Example: lofit-lens transfer --task organism/all
    """
    from lofit_lens.cli.methods import task_names
    from lofit_lens.errors import InputError

    c.console.stderr = as_json
    if len(names := task_names(task or ["organism/all"])) < 2:
        raise InputError(f"transfer between tasks needs at least two; got only {names[0]}: repeat --task")
    c.check_writable(out)
    study = s.Study(
        results=out, how=how, tasks=names, seeds=seeds, draws=draws, limit=limit, parts=["fig2"], texts="none",
        data_dir=data_dir, column=column, chat=chat, system=system, workers=workers, quiet=quiet,
    )  # fmt: skip
    s.run(study, "transfer")
    from lofit_lens.experiments.tables.load import load_results
    from lofit_lens.plots.style import save_figure
    from lofit_lens.plots.transfer import transfer_heatmap
    from lofit_lens.report.figures import transfer as matrix

    found = matrix(load_results(out, grids=["transfer fig2"]))
    cells = {
        (r["source"], r["task"]): f"{r['relative']:.0f} [{r['low']:.0f}, {r['high']:.0f}] {r['mark']}".strip()
        for r in found.frame.to_dict("records")
    }
    files = save_figure(transfer_heatmap(found), out / "transfer", data=found.frame, formats=("html",))
    wide = found.matrix()
    s.print_table(
        "Accuracy with other heads, % of that with the task's own", ("heads from", *wide.columns),
        [(source, *(cells[source, t] for t in wide.columns)) for source in wide.index],
        ("[ ]: 95 % interval over seeds and items; * p < .05, + p < .1 (paired test against the task's own heads)",),
    )  # fmt: skip
    c.console.print(f"wrote {', '.join(str(f) for f in files)}")
    if as_json:
        c.print_json(found.to_dict())
