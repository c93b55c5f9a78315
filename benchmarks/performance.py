"""Render docs/performance.md: which goals of speed are reached, and the figures behind them, all from benchmarks/results/*.json.

    python benchmarks/performance.py

A figure that no file holds is "not measured", as is one of a --quick run; one below its goal is "missed". Nothing is typed by
hand but the goals themselves (`GOALS`); what a person wants to add stands in benchmarks/notes.md, if there is such a file.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from shown import CLASSES, SECTIONS, Record, table

from lofit_lens import io

BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError)
NEEDED = ("benchmark", "settings", "results", "machine", "versions")
FREE = (
    "--data-dir",
    "--rounds",
    "--threads",
    "--device",
    "--backends",
    "--backend",
    "--tasks",
    "--train",
    "--test",
)  # options that leave what a benchmark measures
SAME_ANSWERS = 0.99  # of two ways to decode greedily: a near tie may fall either way
SAME = 1e-3  # nats a loss and units of a metric that two ways to the same result may be apart


@dataclass(frozen=True)
class Figure:
    """A figure that stands against a goal: what it is of, its value, and what else speaks against it."""

    of: str
    value: float
    objection: str = ""


@dataclass(frozen=True)
class Goal:
    """What is wanted of one benchmark.

    Attributes:
        what: in words.
        benchmark: its name.
        device: "cpu" or "cuda": where it has to be measured.
        bound: at most (if `most`) or at least this.
        figures: settings and results -> what was found.
        unit: of figures: "x" of a ratio, "%" of a share, "s".
    """

    what: str
    benchmark: str
    device: str
    bound: float
    figures: Callable[[Record, Any], Iterable[Figure]]
    most: bool = False
    unit: str = "x"

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"at {'most' if self.most else 'least'} {self.shown(self.bound)}"

    def shown(self, value: float) -> str:
        """A figure with its unit."""
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{'' if self.unit == 'x' else ' '}{self.unit}"

    def reached_by(self, figure: Figure) -> bool:
        """Whether a figure is good enough and nothing speaks against it."""
        good = figure.value <= self.bound if self.most else figure.value >= self.bound
        return good and not figure.objection


def of_steps(labels: float) -> Callable[[Record, Any], Iterable[Figure]]:
    """Time of a step of ours against the floor, with a share of labels; cases that edit few layers have no goal."""

    def figures(settings: Record, results: Any) -> Iterable[Figure]:
        for case, found in results.items():
            of = settings["cases"][case]
            for backend, title in CLASSES.items():
                if of["labels"] == labels and not of["lowest"] and f"{backend}_ours" in found:
                    ours = found[f"{backend}_ours"]
                    apart = np.max([ours["loss_difference"], ours["gradient_difference"]])
                    yield Figure(f"{title}, {case}", ours["median_ratio"], _apart(apart))

    return figures


def of_whole(task: str, memory: bool = False) -> Callable[[Record, Any], Iterable[Figure]]:
    """Gain of a whole run on a task, or its peak of memory against the straightforward run's."""

    def figures(settings: Record, results: Any) -> Iterable[Figure]:
        for backend, found in results.get(task, {}).items():
            differ, peak = found["difference"], found["peak_mib"]
            apart = np.max([*differ["losses"].values(), *differ["metrics"].values()])
            objection = _apart(apart) if differ["same_heads"] else "other heads were chosen"
            value = peak["library"] / peak["straightforward"] if memory else found["gain"]["total"]["median_ratio"]
            yield Figure(CLASSES[backend], value, objection)

    return figures


def of_many(settings: Record, results: Any) -> Iterable[Figure]:
    """Best time one after another against best time together, over the threads; the embedded model, four runs or more."""
    for backend, by_threads in results.items() if settings["model"] == "organism" else ():
        for n in next(iter(by_threads.values())):
            if int(n) >= 4:
                best = {
                    way: min(f[n]["median_seconds"][way] for f in by_threads.values()) for way in ("apart", "together")
                }
                objection = "" if all(f[n]["same_heads"] for f in by_threads.values()) else "other heads were chosen"
                yield Figure(f"{CLASSES[backend]}, {n} runs", best["apart"] / best["together"], objection)


def of_gpu_many(where: Callable[[Any], Any]) -> Callable[[Record, Any], Iterable[Figure]]:
    """Gain of many runs on a GPU."""

    def figures(settings: Record, results: Any) -> Iterable[Figure]:
        if "error" in where(results):
            yield Figure("", float("nan"), "out of memory")
            return
        for n, found in where(results).items():
            objection = "" if found["same_heads"] else "other heads were chosen"
            yield Figure(f"{n} runs", found["gain"]["median_ratio"], objection)

    return figures


def of_ceiling(settings: Record, results: Any) -> Iterable[Figure]:
    """Share of the matrix-product ceiling at the shape of Llama-2-7B."""
    if "error" in results["shapes"]["llama-2-7b"]:
        yield Figure("", float("nan"), "out of memory")
        return
    for mean, found in results["shapes"]["llama-2-7b"]["selection"].items():
        yield Figure(f"{mean} tokens an example", found["share_of_ceiling"])


def of_processes(part: str, gain: bool, former: bool = False) -> Callable[[Record, Any], Iterable[Figure]]:
    """CPU seconds of a whole process: how often as long as plain transformers or the former code (or its `gain` over it)."""

    def figures(settings: Record, results: Any) -> Iterable[Figure]:
        found = results[part]["cpu"]
        for backend, title in CLASSES.items():
            other = f"former_{backend}" if former else "plain"
            if backend in found and other in found:
                pairs = zip(found[backend]["ratios"], found[other]["ratios"], strict=True)
                ratio = float(np.median([ours / theirs for ours, theirs in pairs]))
                same = part != "eval" or results["same_answers"][backend] >= SAME_ANSWERS
                yield Figure(title, 1 / ratio if gain else ratio, "" if same else "answers differ")

    return figures


def of_help(settings: Record, results: Any) -> Iterable[Figure]:
    """CPU seconds of `lofit-lens --help`."""
    yield Figure("", results["help"]["cpu"]["lofit-lens"]["median_seconds"])


def _apart(difference: float) -> str:
    return "" if difference <= SAME else f"results differ by {difference:.1e}"


GOALS = (
    Goal("A training step against plain Hugging Face with SDPA", "train_step", "cpu", 1.0, of_steps(1.0), most=True),
    Goal("The same with few labels", "train_step", "cpu", 0.7, of_steps(0.25), most=True),
    *(
        goal
        for name, task, bound in (("TruthfulQA", "truthfulqa", 5.0), ("MQuAKE", "mquake", 1.5), ("CLUTRR", "clutrr", 1.7))
        for goal in (
            Goal(f"A whole run against a straightforward one: {name}", "whole_run", "cpu", bound, of_whole(task)),
            Goal(f"The same, peak of memory: {name}", "whole_run", "cpu", 1.0, of_whole(task, memory=True), most=True),
        )
    ),
    Goal("Evaluation on SmolLM2 against plain transformers", "processes", "cpu", 1.3, of_processes("eval", True)),
    Goal("First step of select, the same", "processes", "cpu", 1.4, of_processes("select", False), most=True),
    Goal("Evaluation on SmolLM2 against the former code", "processes", "cpu", 2.0, of_processes("eval", True, former=True)),
    Goal("lofit-lens --help, CPU seconds", "processes", "cpu", 1.0, of_help, most=True, unit="s"),
    Goal("Many runs in one pass, embedded model, CPU", "many", "cpu", 1.4, of_many),
    Goal("Many runs in one pass, embedded model, GPU", "gpu", "cuda", 5.0, of_gpu_many(lambda r: r["organism"])),
    Goal(
        "Many runs in one pass, Llama-2-7B shape, GPU", "gpu", "cuda", 2.0,
        of_gpu_many(lambda r: r["shapes"]["llama-2-7b"]["many"]),
    ),
    Goal("Share of the matrix-product ceiling, Llama-2-7B shape, GPU", "gpu", "cuda", 0.45, of_ceiling, unit="%"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ reading


def read(folder: Path) -> tuple[dict[str, Record], list[str]]:
    """File name -> record of every benchmark in a folder, and words on files that are none."""
    found, bad = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found[path.name] = {**record, **{name: record[name] for name in NEEDED}}
        except (*BROKEN, OSError) as e:
            bad.append(f"{path.name} cannot be read ({type(e).__name__}).")
    return found, bad


def is_quick(record: Record) -> bool:
    """Whether a file comes from a test run."""
    return "--quick" in record["settings"].get("command", "").split()


def is_as_set(record: Record) -> bool:
    """Whether a benchmark ran at its own size: another number of examples, epochs or runs measures something else."""
    words = record["settings"].get("command", "").split()
    return all(w in FREE for w in words if w.startswith("--"))


# ---------------------------------------------------------------------------------------------------------- rendering


def goals(records: dict[str, Record]) -> str:
    """The table of goals: one row a figure."""
    rows = []
    for goal in GOALS:
        mine = []
        for name, record in records.items():
            if record["benchmark"] != goal.benchmark or not is_as_set(record):
                continue
            if str(record["settings"].get("device", "")).split(":")[0] != goal.device:
                continue
            try:
                mine += [(name, f) for f in goal.figures(record["settings"], record["results"])]
            except BROKEN:
                continue
        for name, figure in mine:
            verdict = "reached" if goal.reached_by(figure) else "**missed**"
            if figure.objection:
                verdict += f" ({figure.objection})"
            rows.append((goal.what, figure.of, goal.wanted, goal.shown(figure.value), verdict, _link(name)))
        if not mine:
            rows.append((goal.what, "", goal.wanted, "", "not measured", ""))
    return table(("goal", "of", "wanted", "found", "", "file"), rows)


def _link(name: str) -> str:
    return f"[{name}](../benchmarks/results/{name})"


def section(name: str, record: Record) -> str:
    """Figures of one file, and what made them."""
    title, render = SECTIONS[record["benchmark"]]
    machine, versions = record["machine"], record["versions"]
    gpu = machine.get("gpu")
    where = [
        machine.get("processor"), f"{machine.get('cores')} cores", f"{machine.get('torch_threads')} threads of torch",
        f"{machine.get('memory_gib')} GiB", f"{gpu['name']}, {gpu['memory_gib']} GiB" if gpu else "no GPU",
    ]  # fmt: skip
    commit = str(record.get("commit"))[:12] + (", with changes not committed" if record.get("changed_files") else "")
    listed = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "platform")
    try:
        body = render(record["settings"], record["results"])
    except BROKEN as e:
        body = f"The figures in this file cannot be shown ({type(e).__name__}: {e}).\n"
    quick = "**A test run with tiny shapes: it measures nothing.**\n\n" if is_quick(record) else ""
    command = record["settings"].get("command")
    return (
        f"## {title}\n\n{quick}{body}\n"
        f"{'Made by `' + command + '`' if command else 'Command not recorded'}, {record.get('date')}, commit {commit}. "
        f"{', '.join(map(str, where))}. {listed}. File: {_link(name)}.\n"
    )


def page(folder: Path, notes: Path) -> str:
    """The whole page."""
    records, bad = read(folder)
    parts = [
        "# Speed\n\nMade from `benchmarks/results/*.json` by `python benchmarks/performance.py` (`make bench`, "
        "`make bench-real`). Every figure is a ratio measured side by side in one run, unless it has a unit.\n",
        f"## Goals\n\n{goals(records)}",
        *(
            section(name, record)
            for kind in SECTIONS
            for name, record in records.items()
            if record["benchmark"] == kind
        ),
    ]
    if bad:
        parts.append("\n".join(bad) + "\n")
    if notes.is_file():
        parts.append(f"## Notes\n\n{notes.read_text(encoding='utf-8').strip()}\n")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Render and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--notes", type=Path, default=Path("benchmarks/notes.md"))
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    io.write_text(args.out, page(args.results, args.notes))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
