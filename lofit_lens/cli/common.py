"""Shared by all verbs: bundles of options, the checks before work starts, and the command to suggest next."""

import contextlib
import functools
import inspect
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lofit_lens.cli.options import *  # noqa: F403 (for the verbs, as c.NAME)
from lofit_lens.cli.screen import console as console
from lofit_lens.cli.screen import print_json as print_json

if TYPE_CHECKING:
    from lofit_lens.experiments.grid.specs import ModelSpec
    from lofit_lens.training import Passes


LEASE = 30.0  # seconds without a sign of life after which a claim from another machine may be taken over
_claims: contextlib.ExitStack | None = None  # claims of the running verb; None = its function is called from Python


@dataclass(frozen=True)
class ModelOptions:
    """The options of every verb that loads a model: `load_model`'s arguments (see `guarded`)."""

    model: Model = "organism"
    name: ModelName = None
    revision: Revision = None
    backend: Backend = "auto"
    dtype: Dtype = "float32"
    device: Device = None
    prepend_bos: PrependBos = None

    def load(self) -> dict[str, Any]:
        """Arguments of `load_model` besides the model."""
        return {k: v for k, v in vars(self).items() if k != "model"}

    def spec(self) -> "ModelSpec":
        """The model as a grid's spec."""
        from lofit_lens.experiments.grid.specs import ModelSpec

        given = {k: v for k, v in vars(self).items() if k not in ("model", "name", "device")}
        return ModelSpec(name=self.model, called=self.name, **given)


@dataclass(frozen=True)
class TaskOptions:
    """The options of every verb that takes one task."""

    task: TaskName
    fold: Fold = None
    data_dir: DataDir = None
    source: Source = None
    chat: IsChat = False
    system: System = None
    column: Column = None

    def opened(self, form: str | None = None) -> Any:
        """Load the task, as a chat if requested."""
        return open_task(
            self.task,
            fold=self.fold,
            data_dir=self.data_dir,
            source=self.source,
            form=form,
            chat=self.chat,
            system=self.system,
            column=self.column,
        )


def passes_of(token_budget: int | None, checkpointing: bool) -> "Passes":
    """Settings of the passes of training."""
    from dataclasses import replace

    from lofit_lens.training import FAST

    asked = replace(FAST, checkpointing=checkpointing)
    return asked if token_budget is None else replace(asked, token_budget=token_budget)


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Wrap a verb: errors that a user can act on become one line on stderr and an exit code.

    A parameter whose type is a dataclass of options stands for the options in its fields.
    """
    bundles, options = {}, []
    for name, parameter in inspect.signature(verb).parameters.items():
        if is_dataclass(parameter.annotation):
            bundles[name] = kind = parameter.annotation
            options += [
                parameter.replace(
                    name=f.name, annotation=f.type, default=parameter.empty if f.default is MISSING else f.default
                )
                for f in fields(kind)
            ]
        else:
            options.append(parameter)

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        from lofit_lens.errors import InputError, TrainingDiverged

        console.stderr = False  # an earlier verb in this process may have changed it
        try:
            _check_texts(given)
            for name, kind in bundles.items():
                given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind) if f.name in given})
            with _warnings_as_before(), _claiming():
                verb(**given)
        except (InputError, TrainingDiverged) as e:
            print(f"error: {e}", file=sys.stderr)
            raise SystemExit(2 if isinstance(e, InputError) else 1) from e
        except KeyboardInterrupt as e:
            print(f"\n{e if str(e) else 'stopped'}", file=sys.stderr)
            raise SystemExit(130) from e

    keyword = [p.replace(kind=p.KEYWORD_ONLY) for p in options]
    run.__signature__ = inspect.Signature(keyword)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {p.name: p.annotation for p in options}
    return run


@contextlib.contextmanager
def _warnings_as_before() -> Iterator[None]:
    """Restore warning filters after a verb, for Python code that calls it and continues."""
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
    """Release the verb's claims (see `check_new`) when it ends."""
    global _claims
    with contextlib.ExitStack() as _claims:
        yield
    _claims = None


def _check_texts(given: Mapping[str, Any]) -> None:
    """Raise InputError for an option that is not text in the shell's encoding: it could not be written to a file later."""
    from lofit_lens.errors import InputError

    for name, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text.encode(errors="replace").decode() != text:
                raise InputError(f"--{name.replace('_', '-')} is {text!r}, which is not UTF-8 text; write it again")


def open_model(how: ModelOptions) -> Any:
    """Load a model and print its class and size."""
    quiet_libraries()
    from lofit_lens.models import load_model, model_info

    model = load_model(how.model, **how.load())
    info = model_info(model)
    console.print(
        f"[bold]model[/bold]  {info.name}: {info.class_name}, {info.n_layers} layers x {info.n_heads} heads, {info.dtype}"
    )
    return model


def open_with(adapter: str | None, how: ModelOptions, *, other_model: bool = False) -> tuple[Any, Any]:
    """Load a model and an adapter from a folder or the hub (None = no adapter); for LoRA, `auto` means the bridge."""
    if adapter is None:
        return open_model(how), None
    from lofit_lens.interventions.files import located_adapter
    from lofit_lens.interventions.folders import load_adapter, method_in

    folder, _ = located_adapter(*_at_revision(adapter))
    if method_in(folder) == "lora" and how.backend == "auto":
        how = replace(how, backend="bridge")
    model = open_model(how)
    return model, load_adapter(folder, model=model, strict=not other_model)


def open_adapter(adapter: str) -> Any:
    """Load an adapter from a folder or the hub, without a model."""
    from lofit_lens.interventions.folders import load_adapter

    name, revision = _at_revision(adapter)
    return load_adapter(name, revision=revision)


def _at_revision(adapter: str) -> tuple[str, str | None]:
    """Name and revision of `user/name[@revision]`; a folder has no revision."""
    name, _, revision = adapter.partition("@") if not Path(adapter).exists() else (adapter, "", "")
    return name, revision or None


def open_task(
    name: str, *, fold: int | None, data_dir: Path | None, source: str | None = None, form: str | None = None,
    chat: bool = False, system: str | None = None, column: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """Load a task and print a summary."""
    quiet_libraries()
    from lofit_lens.tasks import load_task

    task = load_task(name, fold=fold, data_dir=data_dir, source=source, form=form, columns=columns_of(column))
    if chat or system is not None:
        task = task.as_chat(system=system)
    counts = " / ".join(f"{len(rows)} {split}" for split, rows in task.test.items())
    trained = f", {task.objective.upper()}" if task.training else ", evaluation only"
    asked = f", form {task.form}" if task.form else ""
    console.print(f"[bold]task[/bold]   {task.name}: {counts}{trained}, metric {task.metric}{asked}")
    for kind, n in task.counted.items():
        console.print(f"       {kind}: {n}", style="dim")
    return task


def asked_of(model: Any, *tasks: Any) -> list[Any]:
    """Tasks as they are put to this model (or its tokenizer), or an error; prints a note if its chat template is not used."""
    say_template(model, used=any(task.chat is not None for task in tasks))
    return [task.asked_of(model) for task in tasks]


def say_template(model: Any, *, used: bool) -> None:
    """Print a note if a model (or its tokenizer) has a chat template that is not used."""
    from lofit_lens.tasks.chat import has_template

    if not used and has_template(getattr(model, "tokenizer", model)):
        console.print("       this model has a chat template; --chat puts prompts through it", style="dim")


def say_template_of(models: Iterable[tuple[str, str | None]], *, used: bool) -> None:
    """`say_template` for models, given by name and revision, that other processes load; unreadable ones are skipped."""
    from lofit_lens.errors import InputError
    from lofit_lens.models import planned_tokenizer
    from lofit_lens.tasks.chat import has_template

    for name, revision in () if used else models:
        with contextlib.suppress(InputError):
            if has_template(found := planned_tokenizer(name, revision=revision)):
                say_template(found, used=used)
                return


def write_heads(out: Path, scores: Any, k: int, *, overwrite: bool) -> Any:
    """Write scores.json and heads.json (the k best) into a new folder, and return these heads."""
    from lofit_lens import io

    heads = scores.top(k)
    with io.new_folder(out, overwrite=overwrite) as folder:
        scores.save(folder / "scores.json")
        heads.save(folder / "heads.json")
    return heads


def again(*bundles: Any, leave: Collection[str] = ()) -> str:
    """Options of this command that differ from their defaults, for the command that is suggested next."""
    words = []
    for bundle in bundles:
        for f in fields(bundle):
            value = getattr(bundle, f.name)
            if f.name not in leave and (f.default is MISSING or value != f.default or f.name == "model"):
                option = f.name.replace("_", "-")
                words += (
                    [f"--{option}"]
                    if value is True
                    else [f"--no-{option}"]
                    if value is False
                    else [
                        f"--{option} {shlex.quote(str(one))}" for one in (value if isinstance(value, list) else [value])
                    ]
                )
    return "".join(f" {word}" for word in words)


def check_options(form: str, given: Mapping[str, Any], takes: Sequence[str]) -> None:
    """Raise InputError for a given option (not None, False or empty) that a form does not take."""
    from lofit_lens.errors import InputError

    for name, value in given.items():
        left_out = value is None or value is False or value == []  # 0 is a value
        if not left_out and name not in takes:
            raise InputError(f"{form} takes no {name}; it takes {', '.join(takes)}")


def check_new(path: Path, *, overwrite: bool, folder: bool = True) -> None:
    """Claim an output while the verb runs, and fail before the work starts if it could not be written at the end.

    A claim ends with its process, even if that is killed, so that it does not block the next run.

    Raises:
        InputError: another process writes it; it exists (without `overwrite`), is a folder that this package did not write, or
            not a file; or its parent cannot be written to.
    """
    from lofit_lens import io
    from lofit_lens.errors import InputError
    from lofit_lens.experiments.store.locks import claimed

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
        raise InputError(f"{path} is a folder, but the output is a file; give another --out")


def check_writable(path: Path) -> None:
    """Raise InputError unless files with names of its length can be created beside `path`."""
    from lofit_lens import io
    from lofit_lens.errors import InputError

    if not path.name or path.name == "..":
        raise InputError(f"{str(path)!r} is not a valid name for a new file or folder; give e.g. --out out/result")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent, prefix=f".{state_file(path).name}.", suffix=".tmp"):
            pass
    except OSError as e:
        raise io.cannot_write(path, e) from e


def open_tracker(kind: str | None, out: Path) -> Any:
    """Open a tracker for the training whose result goes to `out`, with its files beside it; None = no tracker."""
    from lofit_lens.training import tracker

    return None if kind is None else tracker(kind, out.with_name(f"{out.name}.track"))


def tracked_run(reader: Any, out: Path, info: Any, task: Any, seed: int, **settings: Any) -> Any:
    """`training.tracked` under a name that stays the same when the run is resumed and differs for other settings."""
    from lofit_lens import io
    from lofit_lens.training import tracked

    config = {"model": info.to_dict(), "task": task.name, "data_hash": task.data_hash, "seed": seed, **settings}
    return tracked(reader, f"{out.name}-{io.digest(config)[:12]}", config)


def state_file(out: Path) -> Path:
    """File beside the output folder in which a stopped run keeps its state."""
    return out.parent / f".{out.name}.state.safetensors"


@contextlib.contextmanager
def progress_lines(quiet: bool) -> Iterator[None]:
    """Log a grid's progress on stderr, line by line, if there is no terminal for its bar."""
    if quiet or sys.stderr.isatty():
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("lofit_lens.experiments.executors.runner")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # otherwise warnings would appear twice
    try:
        yield
    finally:
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
