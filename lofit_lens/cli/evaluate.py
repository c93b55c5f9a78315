"""lofit-lens eval: metrics of the bare model, or of the model with an adapter."""

from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c


def evaluate(
    what: c.TaskOptions,
    how: c.ModelOptions,
    adapter: c.AdapterName = None,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    form: c.Form = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first rows.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New folder for result.json and items.jsonl.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Name of this result in comparisons.")] = None,
    as_json: c.AsJson = False,
    too_long: Annotated[
        str,
        typer.Option("--too-long", help="Items longer than the model's context: error, or wrong (counted as failed)."),
    ] = "error",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Maximum number of prompts generated together.")
    ] = None,
    token_budget: Annotated[
        int,
        typer.Option("--token-budget", help="Padded tokens per pass; lower it if memory runs out.", min=1),
    ] = 8192,
    other_model: c.OtherModel = False,
    overwrite: c.Overwrite = False,
    quiet: c.Quiet = False,
) -> None:
    """Evaluate a task: greedy generation, options, or multiple choice (MC1, MC2, MC3), each with its 95 % interval.

    Example: lofit-lens eval --model organism --task organism/kinship --adapter out/adapter
    """
    c.console.stderr = as_json
    if out is not None:
        c.check_new(out, overwrite=overwrite)
    data = what.opened(form)
    data.examples(split, limit=limit)
    loaded, change = c.open_with(adapter, how, other_model=other_model)
    (data,) = c.asked_of(loaded, data)
    if change is not None and (made_on := change.meta.task) != data.name and made_on.split(":")[0] == data.family:
        c.console.print(f"       the adapter was made on {made_on}, and is evaluated on {data.name}", style="yellow")
    import contextlib

    from rich.table import Table

    from lofit_lens.evaluation import evaluate as run

    with contextlib.nullcontext() if change is None else change.attached(loaded):
        result = run(
            loaded, data, split=split, limit=limit, batch_size=batch_size, token_budget=token_budget, too_long=too_long,
            progress=not quiet, label=label or ("bare model" if change is None else str(adapter)),
        )  # fmt: skip
    if out is not None:
        result.save(out, overwrite=overwrite)
    form_ = f" ({data.form})" if data.form else ""
    table = Table(title=f"{data.name}, {split}{form_}, n={len(result.items)}: {result.label}", title_justify="left")
    for column in ("metric", "mean", "95 % interval over items"):
        table.add_column(column)
    for name, m in result.metrics.items():
        table.add_row(
            name, f"{m.mean:.4f}", "-" if m.interval is None else f"{m.interval[0]:.4f} to {m.interval[1]:.4f}"
        )
    c.console.print(table)
    for kind, n in result.counted.items():
        c.console.print(f"{kind}: {n}", style="dim")
    if out is not None:
        c.console.print(f"wrote {out}")
    if as_json:
        c.print_json(result.to_dict())
