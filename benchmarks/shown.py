"""The figures of each benchmark's file as Markdown, for docs/performance.md (`performance.py`)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]
CLASSES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats with three digits."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_steps(settings: Record, results: Any) -> str:
    """train_step.py."""
    parts = [
        f"{settings['model']}, {settings['dtype']}, {settings['device']}, {settings['rounds']} rounds; A on every head of the "
        "edited layers. Ratios are medians of ratios within a round. Memory is what one step takes above the loaded model.\n"
    ]
    for case, found in results.items():
        rows = [
            (
                name, f["median_ratio"], f"{min(f['ratios']):.3g} to {max(f['ratios']):.3g}", f["median_seconds"],
                f["saved_for_backward_mib"], f.get("peak_memory_mib", "not measured"), f["loss_difference"],
                f["gradient_difference"],
            )
            for name, f in found.items()
        ]  # fmt: skip
        head = (
            "variant", "time / floor", "range", "seconds", "saved for backward, MiB", "peak, MiB", "loss off", "gradient off"
        )  # fmt: skip
        spent = [
            f"- {name}: " + ", ".join(f"{op} {ms:.0f}" for op, ms in f["largest_operations_ms"].items())
            for name, f in found.items()
            if "largest_operations_ms" in f
        ]
        parts.append(
            f"### {case}\n\n{table(head, rows)}\nOwn time of the largest operations, ms:\n\n" + "\n".join(spent) + "\n"
        )
    return "\n".join(parts)


def show_whole(settings: Record, results: Any) -> str:
    """whole_run.py."""
    rows, differ = [], []
    for task, by_class in results.items():
        for backend, f in by_class.items():
            gain, seconds = {k: g["median_ratio"] for k, g in f["gain"].items()}, f["median_seconds"]
            tokens = {
                way: f"{sum(p['real'] for p in t.values()):,} / {sum(p['padded'] for p in t.values()):,}"
                for way, t in f["tokens"].items()
            }
            rows.append((
                task, CLASSES[backend], f"{f['train_rows']} / {f['test_rows']}", gain["total"], gain["select"], gain["tune"],
                gain["evaluate"], seconds["straightforward"]["total"], seconds["library"]["total"],
                f["peak_mib"]["straightforward"], f["peak_mib"]["library"], tokens["straightforward"], tokens["library"],
            ))  # fmt: skip
            d = f["difference"]
            differ.append((
                task, CLASSES[backend], d["same_heads"], max(d["losses"].values()), d["offsets"], max(d["metrics"].values()),
                f"{d['same_texts']:.0%} of texts equal" if d["scores_nats"] is None else f"{d['scores_nats']:.1e} nats",
            ))  # fmt: skip
    return (
        f"{settings['model']}, {settings['device']}, {settings['rounds']} round(s).\n\n"
        + table(
            ("task", "class", "rows train / test", "gain", "select", "tune", "evaluate", "straightforward, s", "library, s",
             "peak, MiB: straightforward", "peak: library", "tokens real / padded, straightforward", "tokens, library"), rows,
        )
        + "\nHow far the two results are apart:\n\n"
        + table(("task", "class", "same heads", "losses", "offsets", "metrics", "answers"), differ)
    )  # fmt: skip


MANY = ("runs", "gain", "range", "together, s", "one after another, s", "largest difference learned", "same heads")


def _many_rows(found: Any) -> list[tuple[Any, ...]]:
    return [
        (
            n, f["gain"]["median_ratio"], f"{min(f['gain']['ratios']):.3g} to {max(f['gain']['ratios']):.3g}",
            f["median_seconds"]["together"], f["median_seconds"]["apart"], f["largest_difference"], f["same_heads"],
        )
        for n, f in found.items()
    ]  # fmt: skip


def show_many(settings: Record, results: Any) -> str:
    """many.py."""
    parts = [
        f"Runs of {settings['model']}: {', '.join(settings['tasks'])} in turn, component {settings['component']}, "
        f"{settings['n_train']} training examples, {settings['epochs']} epochs, {settings['device']}, "
        f"{settings['rounds']} rounds.\n"
    ]
    for backend, by_threads in results.items():
        for threads, found in by_threads.items():
            parts.append(f"{CLASSES[backend]}, {threads} thread(s):\n\n{table(MANY, _many_rows(found))}")
    return "\n".join(parts)


def show_scaling(settings: Record, results: Any) -> str:
    """scaling.py."""
    parts = []
    for backend, found in results.items():
        fits = [
            (
                what, found[what]["r2"], found[what]["median_error_left_out"], found[what]["largest_error_left_out"],
                ", ".join(f"{k} {v:.3g}" for k, v in found[what]["coefficients"].items()),
            )
            for what in ("time", "memory")
        ]  # fmt: skip
        points = [
            (
                name, p["heads"], f"{p['rows']}x{p['length']}", p["shape"]["n_layers"], p["shape"]["d_model"], p["seconds"],
                f"{off:+.0%}", p["kept_mib"], f"{kept:+.0%}",
            )
            for (name, p), off, kept in zip(
                found["points"].items(), found["time"]["relative_residuals"], found["memory"]["relative_residuals"],
                strict=True,
            )
        ]  # fmt: skip
        predicted = [
            (
                model, step, p["flop"], p["seconds_on_accelerator"], p["hours_here"], p["weights_gib"],
                p["kept_for_backward_gib"],
            )
            for model, steps in found["predicted"].items()
            for step, p in steps.items()
        ]  # fmt: skip
        head = ("step", "heads", "rows x tokens", "layers", "width", "seconds", "model off", "kept, MiB", "model off")
        aim = (
            f"\nPrediction for {settings['examples']} examples of {settings['tokens']} tokens, {settings['epochs']} epochs, "
            f"batch {settings['batch']}; the accelerator reaches {settings['share']:.0%} of {settings['peak_tflops']:.0f} "
            "TFLOP/s; weights and what is kept in bfloat16. Times on this machine lie far beyond what was measured.\n\n"
        )
        goal = ("model", "training", "FLOP", "accelerator, s", "this machine, h", "weights, GiB", "kept, GiB")
        parts += [
            f"{CLASSES[backend]}, {settings['dtype']}, {settings['device']}, {settings['rounds']} rounds.\n",
            table(("model of", "R^2", "median error left out", "largest", "coefficients"), fits),
            table(head, points),
            aim + table(goal, predicted),
        ]
    return "\n".join(parts)


def show_choices(settings: Record, results: Any) -> str:
    """mc_eval.py."""
    rows = [
        (
            CLASSES[backend], f["truthfulqa"]["median_ratio"], f["truthfulqa_with_adapter"]["median_ratio"],
            f["truthfulqa"]["largest_difference_nats"], f["peak_memory_mib"]["shared"], f["peak_memory_mib"]["one_by_one"],
            ", ".join(f"{n}: {c['median_ratio']:.3g}x" for n, c in f["by_number_of_choices"].items()),
        )
        for backend, f in results.items()
    ]  # fmt: skip
    head = (
        "class",
        "gain",
        "with adapter",
        "scores off, nats",
        "peak, MiB",
        "peak of the loop, MiB",
        "by number of answers",
    )
    return f"{settings['questions']} questions of TruthfulQA, {settings['device']}.\n\n{table(head, rows)}"


def show_processes(settings: Record, results: Any) -> str:
    """processes.py."""
    ways = {"plain": "plain transformers", "lofit-lens": "lofit-lens", **CLASSES}
    ways |= {f"former_{backend}": f"{title}, former code" for backend, title in CLASSES.items()}
    rows = [
        (
            part, ways[way], kinds["cpu"][way]["median_seconds"], kinds["cpu"][way]["median_ratio"],
            kinds["wall"][way]["median_seconds"], kinds["wall"][way]["median_ratio"],
        )
        for part, kinds in results.items()
        if "cpu" in kinds
        for way in kinds["cpu"]
    ]  # fmt: skip
    head = ("part", "of", "CPU seconds", "to the first", "wall seconds", "to the first")
    same = ", ".join(f"{ways[b]} {share:.1%}" for b, share in results["same_answers"].items())
    return (
        f"Whole processes, one thread, {settings['model']['name']}, {settings['rounds']} rounds. `eval`: {settings['limit']} "
        "test rows of MQuAKE with an adapter; `select`: to the end of the first step; `help`: `lofit-lens --help`. "
        f"Answers that are those of plain transformers: {same}.\n\n{table(head, rows)}"
    )


def show_gpu(settings: Record, results: Any) -> str:
    """gpu.py."""
    rows, parts = [], []
    for name, f in results["shapes"].items():
        if "error" in f:
            rows.append((name, f["error"], *[""] * 8))
            continue
        for mean, s in f["selection"].items():
            rows.append((
                name, mean, s["tokens_a_second"], f"{s['share_of_ceiling']:.0%}", f["ceiling_tflops"], s["seconds"],
                s["median_step_seconds"], f["weights_mib"], s["peak_memory_mib"],
                f"{s['tokens']['real']:,} / {s['tokens']['padded']:,}",
            ))  # fmt: skip
        if "many" in f:
            parts.append(f"Many runs, {name}:\n\n{table(MANY, _many_rows(f['many']))}")
    if "organism" in results:
        found = results["organism"]
        parts.append(
            "Many runs, embedded model:\n\n" + (found["error"] if "error" in found else table(MANY, _many_rows(found)))
        )
    head = (
        "shape", "tokens an example", "real tokens / s", "share of ceiling", "ceiling, TFLOP/s", "head selection, s", "step, s",
        "weights, MiB", "peak above, MiB", "tokens real / padded",
    )  # fmt: skip
    intro = (
        f"Head selection on {settings['examples']} examples, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"{settings['dtype']}, {CLASSES[settings['backend']]}, {settings['device']}.\n"
    )
    return "\n".join([intro, table(head, rows), *parts])


SECTIONS: dict[str, tuple[str, Callable[[Record, Any], str]]] = {
    "train_step": ("A training step", show_steps),
    "whole_run": ("A whole run", show_whole),
    "many": ("Many runs in one pass", show_many),
    "mc_eval": ("Multiple choice", show_choices),
    "processes": ("From start to end", show_processes),
    "scaling": ("Cost model", show_scaling),
    "gpu": ("On a GPU", show_gpu),
}
