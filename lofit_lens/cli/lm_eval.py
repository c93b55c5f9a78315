"""lofit-lens lm-eval: tasks of lm-evaluation-harness on the bare model, or on the model with an adapter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c

TASKS = "lm_eval's names, with commas between; also lofit_mquake, lofit_clutrr, lofit_truthfulqa."


def lm_eval(
    tasks: Annotated[str, typer.Option("--tasks", "-t", help=TASKS)],
    how: c.ModelOptions,
    adapter: c.AdapterName = None,
    data_dir: c.DataDir = None,
    fold: c.Fold = None,
    include: Annotated[
        Path | None, typer.Option("--include", help="Folder with your own task files, in lm_eval's format.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first rows of each task.", min=1)] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Sequences run together, or auto.")] = "8",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for results and samples.")] = None,
    overwrite: c.Overwrite = False,
    as_json: c.AsJson = False,
    other_model: c.OtherModel = False,
) -> None:
    """Run lm-evaluation-harness on a model with an adapter attached (TransformerBridge).

    Example: lofit-lens lm-eval --tasks lofit_mquake --model smollm2 --adapter out/adapter --limit 100
    """
    c.console.stderr = as_json
    if out is not None:
        c.check_new(out, overwrite=overwrite, folder=False)
    c.quiet_libraries()
    from rich.table import Table

    from lofit_lens import io
    from lofit_lens.checks import optional
    from lofit_lens.errors import InputError, unknown
    from lofit_lens.sharing import LM_EVAL_TASKS, lm_eval_model

    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size)):
        raise InputError(f"--batch-size is {batch_size!r}; give a whole number from 1, or auto")
    if include is not None and not include.is_dir():
        raise InputError(f"no folder {include}; give --include a folder with task files (.yaml)")
    harness = optional("lm_eval", "lm_eval", "lm-eval")
    names = [name.strip() for name in tasks.split(",")]
    manager = optional("lm_eval.tasks", "lm_eval", "lm-eval").TaskManager(
        include_path=[str(folder) for folder in (LM_EVAL_TASKS, include) if folder is not None],
        include_defaults=not all(name.startswith("lofit_") for name in names),  # thousands of files, which take a while
        metadata={k: v for k, v in {"data_dir": data_dir and str(data_dir), "fold": fold}.items() if v is not None},
    )
    for name in names:
        if not manager.match_tasks([name]):
            near = [n for n in manager.all_tasks if n.startswith(("lofit_", name[:4]))]
            raise unknown("task of lm_eval", name, near, hint="`lm_eval ls tasks` lists all.")
    bridge = replace(how, backend="bridge") if how.backend == "auto" else how
    loaded, change = c.open_with(adapter, bridge, other_model=other_model)
    made = lm_eval_model(loaded, change, batch_size=batch_size)
    found = harness.simple_evaluate(model=made, tasks=names, limit=limit, task_manager=manager)
    label = "bare model" if change is None else str(adapter)
    table = Table(title=f"lm_eval {harness.__version__}: {label}", title_justify="left")
    for column in ("task", "n", "metric", "value", "standard error"):
        table.add_column(column)
    for task, values in found["results"].items():
        n = found["n-samples"].get(task, {}).get("effective", "")
        for key, value in values.items():
            metric, _, of = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{of}")
                table.add_row(task, str(n), metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "-")
    c.console.print(table)
    record = {
        "adapter": None if change is None else label, "model": loaded.cfg.model_name, "lm_eval": harness.__version__,
        **{key: found[key] for key in ("results", "n-samples", "samples")}, "versions": io.environment(),
    }  # fmt: skip
    record = json.loads(json.dumps(record, default=str))  # lm_eval's samples hold functions and numpy numbers
    if out is not None:
        io.write_json(out, record)
        c.console.print(f"wrote {out}")
    if as_json:
        c.print_json({key: value for key, value in record.items() if key != "samples"})
