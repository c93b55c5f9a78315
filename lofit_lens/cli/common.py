"""Options that several verbs share, and what they all do first."""

import contextlib
import functools
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lofit_lens.cli.screen import console, print_json

if TYPE_CHECKING:
    from lofit_lens.training import Passes

__all__ = ["console", "print_json"]  # of the screen, for the verbs

LEASE = 30.0  # seconds without a sign of life after which a claim from another machine may be taken over
_claims: contextlib.ExitStack | None = None  # of the verb that runs; None: Python calls its function itself

LARGEST_SEED = 2**32 - 1  # of numpy and scikit-learn

Model = Annotated[str, typer.Option("--model", "-m", help="'organism' (embedded), a hub id, or a Hugging Face folder.")]
TaskName = Annotated[
    str, typer.Option("--task", "-t", help=(
        "truthfulqa, mquake, clutrr, siqa, arc_challenge, boolq, svamp, triviaqa, nq, mmlu, organism/truth|kinship|edits, "
        "or a folder of your own."
    ))
]  # fmt: skip
Source = Annotated[
    str | None, typer.Option("--source", help="files (instruction files) or hub: siqa, arc_challenge, boolq, svamp.")
]
Form = Annotated[
    str | None, typer.Option("--form", help="How questions are asked where there are several ways: choices, options, generation.")
]  # fmt: skip
AdapterName = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Of any method: a folder, or user/name or user/name@revision on the hub.")
]  # fmt: skip
OtherModel = Annotated[
    bool, typer.Option("--other-model", help="Use the adapter on other weights than those it was made for.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON record on stdout, everything else on stderr.")]
Fold = Annotated[int | None, typer.Option("--fold", help="TruthfulQA's fold, 0 or 1.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder with the task's files; left out: fetched.")]
Backend = Annotated[
    str, typer.Option("--backend", help="auto, hooked (HookedTransformer) or bridge (TransformerBridge).")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the frozen weights: float32, bfloat16, float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; left out: CUDA where there is one.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub commit, tag or branch of the model.")]
Seed = Annotated[int, typer.Option(
    "--seed", help="Of the init, the row order and the draw of training examples.", min=0, max=LARGEST_SEED
)]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder for the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
NTrain = Annotated[
    int | None, typer.Option("--n-train", help="Training examples drawn; left out: the task's own number.")
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate; left out: the preset's.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the examples; left out: the preset's.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Examples a step; left out: the preset's.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Stop after so many steps, e.g. to try things out.")]
TokenBudget = Annotated[
    int | None,
    typer.Option("--token-budget", help="Padded tokens of one training pass, 8192 if left out; less needs less memory.", min=1),
]  # fmt: skip
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Gradient checkpointing: less memory for a third more time.")
]
Track = Annotated[
    str | None, typer.Option("--track", help="wandb or tensorboard reads the training's steps; files go to OUT.track.")
]  # fmt: skip


def passes_of(token_budget: int | None, checkpointing: bool) -> "Passes":
    """How training goes through the model, as asked."""
    from dataclasses import replace

    from lofit_lens.training import FAST

    asked = replace(FAST, checkpointing=checkpointing)
    return asked if token_budget is None else replace(asked, token_budget=token_budget)


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose errors that a user can act on become one line on stderr and an exit code."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        from lofit_lens.errors import InputError, TrainingDiverged

        try:
            with _warnings_as_before(), _claiming():
                _check_texts(kwargs)
                verb(*args, **kwargs)
        except (InputError, TrainingDiverged) as e:
            print(f"error: {e}", file=sys.stderr)
            raise SystemExit(2 if isinstance(e, InputError) else 1) from e
        except KeyboardInterrupt as e:
            print(f"\n{e if str(e) else 'stopped'}", file=sys.stderr)
            raise SystemExit(130) from e

    return run


@contextlib.contextmanager
def _warnings_as_before() -> Iterator[None]:
    """What a verb does not want to hear counts for it alone, also where Python calls it and goes on."""
    before = os.environ.get("PYTHONWARNINGS")
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.pop("PYTHONWARNINGS", None)
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


@contextlib.contextmanager
def _claiming() -> Iterator[None]:
    """Give up what the verb claims (see `check_new`) when it ends."""
    global _claims
    with contextlib.ExitStack() as _claims:
        yield
    _claims = None


def _check_texts(given: Mapping[str, Any]) -> None:
    """Raise InputError for an option with bytes that are no text in the shell's encoding: no file could hold it later."""
    from lofit_lens.errors import InputError

    for name, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.encode(errors="replace").decode() != text:
                raise InputError(f"--{name.replace('_', '-')} is {text!r}, which is not UTF-8 text; write it anew")


def open_model(name: str, *, backend: str, dtype: str, device: str | None, revision: str | None = None) -> Any:
    """Load a model and say which class it became."""
    quiet_libraries()
    from lofit_lens.models import load_model, model_info

    model = load_model(name, backend=backend, dtype=dtype, device=device, revision=revision)
    info = model_info(model)
    console.print(
        f"[bold]model[/bold]  {info.name}: {info.class_name}, {info.n_layers} layers x {info.n_heads} heads, {info.dtype}"
    )
    return model


def open_with(
    adapter: str | None,
    name: str,
    *,
    backend: str,
    dtype: str,
    device: str | None,
    revision: str | None = None,
    other_model: bool = False,
) -> tuple[Any, Any]:
    """Load a model and the adapter of a folder or of the hub (None: no adapter); for LoRA `auto` means the bridge."""
    if adapter is None:
        return open_model(name, backend=backend, dtype=dtype, device=device, revision=revision), None
    from lofit_lens.interventions.base import located_adapter
    from lofit_lens.interventions.folders import load_adapter, method_in

    folder, _ = located_adapter(*_at_revision(adapter))
    if method_in(folder) == "lora" and backend == "auto":
        backend = "bridge"
    model = open_model(name, backend=backend, dtype=dtype, device=device, revision=revision)
    return model, load_adapter(folder, model=model, strict=not other_model)


def open_adapter(adapter: str) -> Any:
    """The adapter of a folder or of the hub, without a model."""
    from lofit_lens.interventions.folders import load_adapter

    name, revision = _at_revision(adapter)
    return load_adapter(name, revision=revision)


def _at_revision(adapter: str) -> tuple[str, str | None]:
    """Name and revision of `user/name[@revision]`; a folder has none."""
    name, _, revision = adapter.partition("@") if not Path(adapter).exists() else (adapter, "", "")
    return name, revision or None


def open_task(
    name: str, *, fold: int | None, data_dir: Path | None, source: str | None = None, form: str | None = None
) -> Any:
    """Load a task and say what it holds."""
    quiet_libraries()
    from lofit_lens.tasks import load_task

    task = load_task(name, fold=fold, data_dir=data_dir, source=source, form=form)
    counts = " / ".join(f"{len(rows)} {split}" for split, rows in task.test.items())
    trained = f", {task.objective.upper()}" if task.training else ", evaluation only"
    asked = f", form {task.form}" if task.form else ""
    console.print(f"[bold]task[/bold]   {task.name}: {counts}{trained}, metric {task.metric}{asked}")
    for kind, n in task.counted.items():
        console.print(f"       {kind}: {n}", style="dim")
    return task


def write_heads(out: Path, scores: Any, k: int, *, overwrite: bool) -> Any:
    """Write scores.json and heads.json (the k best) into a new folder; returns these heads."""
    from lofit_lens import io

    heads = scores.top(k)
    with io.new_folder(out, overwrite=overwrite) as folder:
        scores.save(folder / "scores.json")
        heads.save(folder / "heads.json")
    return heads


def again(**options: Any) -> str:
    """Options of this command that differ from their defaults, to repeat them in the command that is suggested next."""
    defaults = {"backend": "auto", "dtype": "float32"}
    given = {k: v for k, v in options.items() if v is not None and v != defaults.get(k)}
    return "".join(f" --{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in given.items())


def check_options(form: str, given: Mapping[str, Any], takes: Sequence[str]) -> None:
    """Raise InputError for an option that was given (it is neither None, False nor empty) and that a form does not take."""
    from lofit_lens.errors import InputError

    for name, value in given.items():
        left_out = value is None or value is False or value == []  # 0 is a value
        if not left_out and name not in takes:
            raise InputError(f"{form} takes no {name}; it takes {', '.join(takes)}")


def check_new(path: Path, *, overwrite: bool, folder: bool = True) -> None:
    """Claim an output for as long as the verb runs, and fail before the work starts if it could not be written after it.

    A claim ends with its process, however that ends, so that a killed run does not stand in the way of the next.

    Raises:
        InputError: another process writes it; it exists (and not `overwrite`), is not ours (a `folder`) or no file; or its
            parent cannot be written to.
    """
    from lofit_lens import io
    from lofit_lens.errors import InputError
    from lofit_lens.experiments.locks import claimed

    check_writable(path)
    if _claims is not None:
        lock = path.with_name(f".{path.name}.lock")
        if not _claims.enter_context(claimed(lock, LEASE)):
            raise InputError(
                f"another process writes {path} now (its claim is {lock}); wait for it, or give another --out"
            )
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another --out or --overwrite")
    if path.exists() and folder:
        io.check_replaceable(path)
    elif path.is_dir():
        raise InputError(f"{path} is a folder, and a file is to be written; give another --out")


def check_writable(path: Path) -> None:
    """Raise InputError unless files can be made beside `path`, under a name of its length."""
    from lofit_lens import io
    from lofit_lens.errors import InputError

    if not path.name or path.name == "..":
        raise InputError(f"{str(path)!r} names no new file or folder; give e.g. --out out/result")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent, prefix=f".{state_file(path).name}.", suffix=".tmp"):
            pass
    except OSError as e:
        raise io.cannot_write(path, e) from e


def open_tracker(kind: str | None, out: Path) -> Any:
    """Who reads the steps of the training whose result goes to `out`, with its files beside it; None: nobody."""
    from lofit_lens.training import tracker

    return None if kind is None else tracker(kind, out.with_name(f"{out.name}.track"))


def tracked_run(reader: Any, out: Path, info: Any, task: Any, seed: int, **settings: Any) -> Any:
    """`training.tracked` under a name that is the same when the run is resumed, and another for other settings."""
    from lofit_lens import io
    from lofit_lens.training import tracked

    config = {"model": info.to_dict(), "task": task.name, "data_hash": task.data_hash, "seed": seed, **settings}
    return tracked(reader, f"{out.name}-{io.digest(config)[:12]}", config)


def state_file(out: Path) -> Path:
    """Where a stopped run keeps its state, beside the output folder."""
    return out.parent / f".{out.name}.state.safetensors"


@contextlib.contextmanager
def progress_lines(quiet: bool) -> Iterator[None]:
    """Show on stderr what a grid begins, does and has done, line by line, where there is no terminal for its live table."""
    if quiet or sys.stderr.isatty():
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    loggers = [logging.getLogger(f"lofit_lens.experiments.{name}") for name in ("runner", "live")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # else a warning would come twice
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
            logger.propagate = True


def quiet_libraries() -> None:
    """Keep other packages' bars and advice out of the output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    os.environ["PYTHONWARNINGS"] = "ignore::DeprecationWarning,ignore::FutureWarning"  # for worker processes
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
