"""An adapter's two files, written together and read strictly.

`adapter_config.json` holds the checksum of `adapter_model.safetensors` and one of itself, so that a damaged or mixed folder is
refused, whichever bit is wrong.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import AdapterError, DataError
from lofit_lens.hub import commit_of, fetched, leads_out
from lofit_lens.models import ModelInfo

SCHEMA = 2
# The fields of a record about an adapter's origin, and their types.
_PROVENANCE = {
    "task": str, "data_hash": str, "n_train": int | None, "seed": int | None, "config": dict, "versions": dict,
    "history": list, "attached": list,
}  # fmt: skip
_BASE_MODEL = {
    "name": str, "revision": str | None, "backend": str, "processed": bool, "dtype": str, "n_layers": int, "n_heads": int,
    "d_model": int, "d_vocab": int, "prepend_bos": bool | None, "head_layers": list | None,
    "quantization": str | None,
}  # fmt: skip
_METRIC = {
    "task": str, "split": str, "form": str, "data_hash": str, "metric": str, "mean": float | int, "interval": list | None,
    "n": int, "seeds": int,
}  # fmt: skip
_PATH = re.compile(r"(?<!\S)(?:~|\.{1,2})?/\S*")  # in a text, after a space or at its start
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def located_adapter(name: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """Return the folder of an adapter, downloaded if it is on the hub, and its place there.

    Raises:
        InputError: neither a folder nor a repository that can be reached.
    """
    local = isinstance(name, Path) or not _HUB_ID.fullmatch(name) or Path(name).exists()
    if local and revision is None:
        return Path(name), ""
    return fetched(name, files=(CONFIG_FILE, WEIGHTS_FILE), revision=revision)


def write_files(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into an existing folder; `record` gets the schema and the checksums."""
    io.save_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    whole = {"lofit_lens_schema": SCHEMA, **record, "weights_sha256": io.file_digest(folder / WEIGHTS_FILE)}
    io.write_json(folder / CONFIG_FILE, whole | {"digest": _digest(json.loads(json.dumps(whole, allow_nan=False)))})


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the record of an adapter folder.

    Raises:
        AdapterError: no such file, damaged, of a newer schema, or a link that leads out of the folder.
    """
    where = Path(folder) / CONFIG_FILE
    if not where.is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}")
    _check_inside(where)
    try:
        record = io.read_record(where)
    except DataError as e:
        raise AdapterError(str(e)) from e
    if not isinstance(record.get("method"), str):
        raise AdapterError(f"{where} does not describe an adapter")
    schema = record.get("lofit_lens_schema")
    if type(schema) is not int or schema < SCHEMA:
        raise AdapterError(f"{where} has schema {schema!r}; this version reads {SCHEMA}: make the adapter again")
    if schema > SCHEMA:
        raise AdapterError(f"{where} was written by a newer version (schema {schema}); update lofit-lens")
    return record


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder.

    Raises:
        AdapterError: missing, not a complete safetensors file, or not finite.
    """
    where = folder / WEIGHTS_FILE
    if where.exists():
        _check_inside(where)
    tensors = io.load_tensors(where)
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise AdapterError(f"{where}: {name} holds NaN or infinity")
    return tensors


def check_unchanged(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise AdapterError unless both files are as they were written; run last, after checks with clearer messages."""
    if not isinstance(record.get("digest"), str) or record["digest"] != _digest(record):
        raise AdapterError(
            f"{folder / CONFIG_FILE} is damaged or was changed after it was written (its checksum does not match); fetch it "
            "again, or change the adapter in Python and save it again"
        )
    if record.get("weights_sha256") != io.file_digest(folder / WEIGHTS_FILE):
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} is damaged, or belongs to another {CONFIG_FILE} (its checksum does not match); fetch both "
            "again"
        )


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a record for publication: folders of this machine only by name, and no description of the machine."""
    base = record["base_model"]
    full, short = base["name"] if base else "", ""
    if base and not commit_of(base["revision"]) and (base["revision"] or Path(full).exists()):
        short = Path(full).name  # the folder's name, for an absolute or relative path
    found = _without_paths(record, full if short else "", short)
    found["versions"] = {name: version for name, version in found["versions"].items() if name != "platform"}
    return found


def _without_paths(value: Any, full: str, short: str) -> Any:
    """Replace `full` by `short` in all texts of a JSON value, and every path by its last part."""
    if isinstance(value, Mapping):
        return {k: _without_paths(v, full, short) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(v, full, short) for v in value]
    if not isinstance(value, str):
        return value
    text = value.replace(full, short) if full else value
    return _PATH.sub(lambda path: Path(path[0]).name, text)


def read_base_model(record: Mapping[str, Any]) -> ModelInfo | None:
    """Read the model that an adapter was made for; raise KeyError, TypeError or ValueError if the record is incomplete."""
    found = record["base_model"]
    if found is None:
        return None
    found = {"prepend_bos": None, "head_layers": None, "quantization": None, **found}  # older files do not say
    _check_types(found, _BASE_MODEL, "base_model")
    return ModelInfo.from_dict(found)


def check_provenance(record: Mapping[str, Any]) -> None:
    """Raise KeyError or ValueError unless a record's fields about an adapter's origin have the types that are written."""
    record = {"attached": [], **record}  # older files do not say
    _check_types(record, _PROVENANCE, "the record")
    if not all(isinstance(name, str) for name in record["attached"]):
        raise ValueError(f"attached of the record is {record['attached']!r}")
    for metric in record.get("metrics", []):
        _check_types(metric, _METRIC, "metrics")
        between = metric["interval"]
        if between is not None and (len(between) != 2 or not all(isinstance(x, float | int) for x in between)):
            raise ValueError(f"the interval {between!r} of metrics is not two numbers")


def _check_types(record: Any, kinds: Mapping[str, Any], what: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{what} is {record!r}, not an object")
    for name, kind in kinds.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"{name} of {what} is {record[name]!r}")


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise AdapterError unless the tensors have these names and shapes, all float32."""
    if set(tensors) != set(shapes):
        raise AdapterError(f"{where / WEIGHTS_FILE} holds {sorted(tensors)}; expected {' and '.join(sorted(shapes))}")
    for name, t in tensors.items():
        if tuple(t.shape) != tuple(shapes[name]) or t.dtype != torch.float32:
            raise AdapterError(
                f"{where / WEIGHTS_FILE}: {name} is {t.dtype} {tuple(t.shape)}, expected torch.float32 {tuple(shapes[name])}"
            )


def _digest(record: Mapping[str, Any]) -> str | None:
    try:
        return io.digest({k: v for k, v in record.items() if k != "digest"})
    except (ValueError, RecursionError):  # NaN, or invalid text
        return None


def _check_inside(path: Path) -> None:
    real = leads_out(path)
    if real is not None:
        raise AdapterError(f"{path} is a link to {real}, outside its folder; copy the file itself there")
