"""lofit-lens grid: run a grid, here or on Ray."""

import contextlib
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lofit_lens.cli import common as c

if TYPE_CHECKING:
    from lofit_lens.experiments.executors.runner import Report
    from lofit_lens.experiments.grid.specs import Grid


def grid(
    name: Annotated[str | None, typer.Argument(metavar="GRID", help="A grid's name (--list shows them) or a YAML file.")] = None,
    store: Annotated[
        Path, typer.Option("--store", "-o", help="Folder of the runs; finished runs in it are reused.")
    ] = Path("runs/grid"),
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Replaces the grid's models; may be repeated.")] = None,
    called: Annotated[str | None, typer.Option("--name", help="Name of the model in results, if there is only one.")] = None,
    prepend_bos: c.PrependBos = None,
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Replaces the grid's tasks; may be repeated.")] = None,
    column: c.Column = None,
    chat: c.IsChat = False,
    system: c.System = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds (0, 1, ...).", min=1)] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first test rows.", min=1)] = None,
    data_dir: Annotated[Path | None, typer.Option(
        "--data-dir", help="Folder with one sub-folder per task (or a single task's files); default: fetched."
    )] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes; 0 = one per GPU (embedded model: per core).", min=0)] = 0,
    devices: Annotated[str | None, typer.Option("--devices", help="Devices of the workers, with commas: cuda:0,cuda:1.")] = None,
    executor: Annotated[str, typer.Option("--executor", help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option("--address", help="Ray: address of the cluster (auto, or HOST:PORT).")] = None,
    cpus: Annotated[float, typer.Option("--cpus", help="Ray: CPUs per task.", min=0)] = 1.0,
    gpus: Annotated[float | None, typer.Option(
        "--gpus", help="Ray: GPUs per task (0.5: two share one); default: 1 if the cluster has GPUs.", min=0
    )] = None,
    retries: Annotated[int, typer.Option("--retries", help="Further attempts at a failed cell.", min=0)] = 1,
    together: Annotated[int, typer.Option(
        "--together", help="Maximum number of LoFiT fits per pass; 1: no sharing. Another number changes last digits.", min=1
    )] = 8,
    track: Annotated[str | None, typer.Option("--track", help="Track training: wandb or tensorboard.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be computed.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show the grids that come with the library.")] = False,
    quiet: c.Quiet = False,
    as_json: c.AsJson = False,
) -> None:  # fmt: skip
    """Run a grid; runs that are in the store are not computed again, so a stopped grid continues.

    Example: lofit-lens grid organism/all --store runs/organism
    """
    from lofit_lens.errors import InputError, unknown

    c.console.stderr = as_json
    from lofit_lens.experiments.grid.paper import known_grids

    if listing:
        for known, what in known_grids().items():
            c.console.print(f"{known:20} {what}", soft_wrap=True)
        return
    if name is None:
        raise InputError("give a grid's name (lofit-lens grid --list shows them) or a YAML file")
    if executor not in ("local", "ray"):
        raise unknown("executor", executor, ("local", "ray"))
    start = time.perf_counter()
    c.quiet_libraries()
    from lofit_lens.cli.methods import workers_for
    from lofit_lens.experiments.grid.run import open_grid, plan_grid, run_grid

    asked = _changed(open_grid(name), model, called, prepend_bos, task, column, chat, system, seeds, limit, data_dir)
    c.say_template_of([(m.name, m.revision) for m in asked.model], used=any(t.chat or t.system for t in asked.tasks))
    if dry_run:
        _print_plan(plan_grid(asked).cells, store, as_json)
        return
    listed = _devices(devices)
    models = {m.name for m in asked.model}
    n = workers_for(workers or len(listed), models.pop() if len(models) == 1 else "several", None)
    place = None
    if executor == "ray":
        from lofit_lens.experiments.executors.ray import RayExecutor

        place = partial(RayExecutor, address=address, cpus=cpus, gpus=gpus)
    with contextlib.redirect_stdout(sys.stderr), c.progress_lines(quiet):  # Ray writes to stdout when a node dies
        found = run_grid(
            asked,
            store,
            workers=n,
            devices=listed or None,
            executor=place,
            retries=retries,
            together=together,
            track=track,
            progress=not quiet,
        )
    report(found, store)
    c.console.print(f"{time.perf_counter() - start:.0f} s. Figures: lofit-lens figures {store}")
    if as_json:
        c.print_json({
            "store": str(store), "computed": list(found.computed), "there": list(found.there), "failed": found.failed,
            "blocked": found.blocked,
        })  # fmt: skip
    if found.failed:
        raise SystemExit(1)


def report(found: "Report", store: Path) -> None:
    """Print what a grid's run computed, and what failed."""
    parts = [f"{len(found.computed)} computed", f"{len(found.there)} there before"]
    if found.failed:
        parts.append(f"{len(found.failed)} failed")
    if found.blocked:
        parts.append(f"{len(found.blocked)} blocked by these failures")
    c.console.print(f"cells in {store}: {', '.join(parts)}")
    for cell, error in found.failed.items():
        c.console.print(f"  {cell}: {error}", style="red", markup=False)
    if found.failed:
        c.console.print(f"  logs: {store / 'logs'}; the same command retries them")


def _changed(
    grid: "Grid", models: Sequence[str] | None, called: str | None, prepend_bos: bool | None, tasks: Sequence[str] | None,
    column: Sequence[str] | None, chat: bool, system: str | None, seeds: int | None, limit: int | None, data_dir: Path | None,
) -> "Grid":  # fmt: skip
    """The grid with the fields that the options replace."""
    from lofit_lens.cli.methods import task_names
    from lofit_lens.errors import InputError
    from lofit_lens.experiments.grid.specs import Grid
    from lofit_lens.organism.words import TASKS

    asked = {**grid.model_dump(), "runs": grid.runs, "selections": grid.selections}  # a dump would give every field
    if models:
        asked["name"] = f"{grid.name} {' '.join(re.sub(r'[^A-Za-z0-9._/-]+', '-', m) for m in models)}"
        asked["model"] = [next((m.model_dump() for m in grid.model if m.name == n), {"name": n}) for n in models]
    if tasks:
        asked["tasks"] = [
            next((t.model_dump() for t in grid.tasks if t.name == n), {"name": n}) for n in task_names(tasks)
        ]
        embedded = [n for n in task_names(tasks) if n.removeprefix("organism/") in TASKS]
        if (
            embedded
            and not any(t["name"].startswith("organism/") for t in asked["other_tasks"])
            and asked["other_tasks"]
        ):
            asked["other_tasks"], asked["texts"] = [{"name": f"{n}-cued"} for n in embedded], "organism"
    if column:
        of = c.columns_by_task([t["name"] for part in ("tasks", "other_tasks") for t in asked[part]], column)
        for part in ("tasks", "other_tasks"):
            asked[part] = [{**t, "columns": c.columns_of(column)} if of[t["name"]] else t for t in asked[part]]
    if called is not None and len(asked["model"]) > 1:
        raise InputError(
            f"--name {called} for {len(asked['model'])} models; name one model, or write `called` into the grid"
        )
    asked["model"] = [
        {
            **m,
            "called": called or m.get("called"),
            "prepend_bos": m.get("prepend_bos") if prepend_bos is None else prepend_bos,
        }
        for m in asked["model"]
    ]
    if chat or system is not None:
        for part in ("tasks", "other_tasks"):
            asked[part] = [{**t, "chat": True, "system": system or t.get("system")} for t in asked[part]]
    if seeds is not None:
        asked["seeds"] = tuple(range(seeds))
    if limit is not None:
        asked["limit"] = limit
    if data_dir is not None:
        for part in ("tasks", "other_tasks"):
            asked[part] = [_at(t, data_dir) for t in asked[part]]
    return Grid(**asked)


def _at(task: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    """The task with its files in `data_dir` or the sub-folder of its name there; embedded tasks and single files need none."""
    from lofit_lens.tasks.files import is_task_file

    own = data_dir / task["name"].split(":")[0]
    if task["name"].startswith("organism/") or is_task_file(task["name"]):
        return task
    return {**task, "data_dir": str(own if own.is_dir() else data_dir)}


def _devices(given: str | None) -> list[str]:
    """The named devices, or all GPUs."""
    import torch

    from lofit_lens.models import parse_device

    if given is None:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    listed = [d.strip() for d in given.split(",") if d.strip()]
    for device in listed:
        parse_device(device)
    return listed


def _print_plan(cells: Sequence[Any], store: Path, as_json: bool) -> None:
    """Print what exists and what would be computed, without creating the store."""
    there = {p.name for p in (store / "runs").iterdir()} if (store / "runs").is_dir() else set()
    todo = [cell for cell in cells if cell.name not in there]
    for cell in todo:
        c.console.print(f"  {cell.label}", markup=False)
    c.console.print(f"{len(cells)} cells: {len(cells) - len(todo)} in {store}, {len(todo)} to compute")
    if as_json:
        c.print_json({"there": len(cells) - len(todo), "to_compute": [cell.name for cell in todo]})
