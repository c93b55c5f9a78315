"""The shell: `lofit-lens VERB`. There is one file per verb, each a thin wrapper around the library.

Exit codes: 0 done, 1 a run failed (training diverged), 2 bad input, 130 stopped by Ctrl-C.
"""

import logging

import typer

from lofit_lens.cli import (
    bring_in,
    common,
    compare,
    damage,
    demo,
    doctor,
    evaluate,
    explore,
    export,
    figures,
    generate,
    grids,
    lm_eval,
    localise,
    probe,
    report,
    screen,
    select,
    store,
    transfer,
    tune,
)

app = typer.Typer(
    name="lofit-lens", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Find the attention heads a language model uses for a task, and steer it there (LoFiT on TransformerLens).",
    epilog="Start with: lofit-lens demo",
)  # fmt: skip
for _name, _verb in (
    ("demo", demo.demo), ("select", select.select), ("probe", probe.probe), ("tune", tune.tune), ("eval", evaluate.evaluate),
    ("lm-eval", lm_eval.lm_eval),
    ("compare", compare.compare), ("transfer", transfer.transfer), ("localise", localise.localise),
    ("figures", figures.figures), ("report", report.report), ("explore", explore.explore),
    ("grid", grids.grid),
    ("export", export.export), ("import", bring_in.bring_in),
    ("damage", damage.damage), ("generate", generate.generate), ("doctor", doctor.doctor),
):  # fmt: skip
    app.command(_name)(common.guarded(_verb))
app.add_typer(store.app)


def main() -> None:
    """Entry point of the `lofit-lens` command."""
    with screen.lasting():
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        app()
