"""Read and write files: atomically, never pickled, always with a record of what made them.

Every writer here writes to a temporary name in the target's folder, flushes it to disk and renames
it, so that a reader sees the old file or the new one and never a part. Tensors are stored as
safetensors, everything else as JSON.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lofit_lens.errors import AdapterError, DataError, DiskFull, InputError, NewerData

# A folder may be replaced only if one of these is in it.
MARKERS = (
    "adapter_config.json", "heads.json", "scores.json", "result.json", "run.json", "lofit_lens_export.json",
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)  # the system's errors when no space or quota is left
RECORDED_PACKAGES = ("lofit-lens", "transformer-lens", "torch", "transformers", "safetensors", "numpy")


def environment() -> dict[str, str]:
    """Versions of Python, the platform and the packages that can change a result."""
    return dict(_versions())


@functools.cache  # every result asks for it, and finding versions takes milliseconds
def _versions() -> Mapping[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cannot_write(path: str | Path, error: OSError, advice: str = "choose a folder you may write to") -> InputError:
    """Return the error for a file or folder that could not be written: `DiskFull` if no space or quota is left."""
    path, why = Path(path), error.strerror or error
    if error.errno not in FULL:
        return InputError(f"cannot write {path}: {why}; {advice}")
    there = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
    return DiskFull(
        f"cannot write {path}: {why} ({shutil.disk_usage(there).free / 1e6:.1f} MB are free on the disk of {there}); free "
        "some space and run the same command again: what is finished is kept"
    )


def sync(path: str | Path) -> None:
    """Flush a file to disk, or a folder and everything in it (inner files first).

    Raises:
        OSError: a file cannot be read, or the disk is full or failing.
    """
    path = Path(path)
    if path.is_dir():
        for child in sorted(path.iterdir()):
            sync(child)
        sync_folder(path)
        return
    with path.open("rb") as f:
        os.fsync(f.fileno())


def sync_folder(path: str | Path) -> None:
    """Flush the names in a folder to the disk, so that a rename survives a power loss.

    Raises:
        OSError: the disk is full or failing.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def new_mode(*, folder: bool = False) -> int:
    """Return the permission bits that the process's umask leaves a new file or folder."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if folder else 0o666) & ~mask


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write a file atomically: temporary name, fsync, rename.

    Raises:
        InputError: the folder cannot be written to (`DiskFull`: no space is left); nothing is left behind.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, new_mode())
        os.replace(temporary, path)
    except BaseException as e:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(e, OSError):
            raise cannot_write(path, e) from e
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text; see `write_bytes`."""
    return write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> Path:
    """Write indented JSON; NaN and infinities are refused, since other readers cannot take them."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def decoded(path: str | Path) -> str:
    """Read a UTF-8 file; line endings are kept, a leading byte-order mark is dropped.

    Raises:
        DataError: unreadable or not UTF-8; names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 text ({e.reason}, byte {data[e.start]:#04x} at {e.start}); re-encode it as UTF-8"
        ) from e


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: missing, empty or not JSON; names the file and the line.
    """
    return _read_json(Path(path), json.JSONDecoder())


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds one object, without duplicate keys or non-finite numbers.

    Raises:
        DataError: missing, empty, not JSON or not such an object; names the file.
    """
    record = _read_json(
        Path(path), json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    )
    if not isinstance(record, dict):
        raise DataError(f"{path} holds {type(record).__name__}, not an object")
    return record


def _read_json(path: Path, decoder: json.JSONDecoder) -> Any:
    text = decoded(path)
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as e:
        what = "is empty" if not text.strip() else f"is not JSON: {e.msg} at line {e.lineno}"
        raise DataError(f"{path} {what}") from e
    except (ValueError, RecursionError) as e:  # lists nested too deeply, integers of thousands of digits
        raise DataError(f"{path} cannot be read: {e}") from e


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError(f"the key {next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)!r} appears twice")
    return held


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def check_record(record: Any, kind: str, schema: int, fields: Sequence[str], where: str) -> None:
    """Check that a JSON record is of a kind, of a schema from 1 to `schema`, and has its fields.

    Raises:
        DataError: it does not match (`NewerData`: its schema is later); says where and what is wrong.
    """
    if not isinstance(record, dict) or record.get("kind") != kind:
        raise DataError(f"{where} is not a {kind} record")
    found = record.get("schema")
    if not isinstance(found, int) or not 1 <= found <= schema:
        error = NewerData if isinstance(found, int) and found > schema else DataError
        raise error(f"{where} has schema {found!r}; this version reads 1 to {schema}: update lofit-lens")
    for name in fields:
        if name not in record:
            raise DataError(f"{where} lacks the field {name!r}")


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors of any shape as safetensors, atomically."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return write_bytes(path, save(whole, metadata=dict(metadata or {})))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        AdapterError: missing, truncated or not a safetensors file (a pickle, for instance, is never opened).
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, ValueError) as e:
        raise AdapterError(f"{path} is not a complete safetensors file ({e}); fetch or save it again") from e


def tensor_metadata(path: str | Path) -> dict[str, str]:
    """Return the text record in a safetensors file's header."""
    with safe_open(path, framework="pt", device="cpu") as f:
        return dict(f.metadata() or {})


@contextlib.contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, and vanishes if it raises.

    Raises:
        InputError: `path` exists (and not `overwrite`), holds none of this package's files (and is not empty), or the
            parent cannot be written to.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another folder, or overwrite it (overwrite=True, --overwrite)")
    if path.exists():
        check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as e:
        raise cannot_write(path, e) from e
    try:
        yield temporary
        os.chmod(temporary, new_mode(folder=True))
        try:
            replace_folder(temporary, path)
        except OSError as e:
            raise cannot_write(path, e, "choose another folder") from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_replaceable(path: Path) -> None:
    """Raise InputError unless a folder is empty or one that this package wrote."""
    if not path.is_dir() or (any(path.iterdir()) and not any(_is_ours(path / m) for m in MARKERS)):
        raise InputError(f"{path} was not written by this package, so it is not replaced; give another folder")


def _is_ours(file: Path) -> bool:
    """Return whether this is an existing file that only this package writes; an `adapter_config.json` may be PEFT's."""
    return file.is_file() and (file.name != "adapter_config.json" or b'"lofit_lens_schema"' in file.read_bytes())


def replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` in place of `target`; an old `target` is moved aside first, then removed."""
    if not target.exists():
        os.rename(new, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    try:
        os.rename(target, aside / target.name)
        os.rename(new, target)
    except BaseException:  # Ctrl-C too
        if not target.exists() and (aside / target.name).exists():
            os.rename(aside / target.name, target)
        with contextlib.suppress(OSError):
            aside.rmdir()  # only if it is empty: the old folder is never lost
        raise
    shutil.rmtree(aside, ignore_errors=True)


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """Turn `"float32"`, `"bfloat16"`, `"float16"`, `"float64"` (or short forms) into a torch dtype.

    Raises:
        InputError: any other name.
    """
    if isinstance(name, torch.dtype):
        return name
    names = {
        "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
        "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64,
    }  # fmt: skip
    if name not in names:
        raise InputError(f"unknown dtype {name!r}; allowed: {', '.join(names)}")
    return names[name]
