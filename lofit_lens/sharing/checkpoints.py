"""A plain Hugging Face checkpoint as it lies on disk: read tensor by tensor, never whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import ModelError
from lofit_lens.hub import fetched
from lofit_lens.models import located, weights_revision

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
# What a plain checkpoint consists of, beside its weights; code and pickles are left where they are.
BESIDE = (
    "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Where each tensor of a checkpoint lies.

    Attributes:
        folder: that holds its files.
        name: as given: a folder, a hub id, or `"organism"`.
        revision: the hub's commit, or a checksum of a local folder's weights.
        config: `config.json` as it stands.
        where: tensor -> name of its file.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    where: Mapping[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its safetensors files, in order."""
        return tuple(sorted(set(self.where.values())))

    @property
    def architecture(self) -> str:
        """Name of its Hugging Face class, e.g. `"LlamaForCausalLM"`.

        Raises:
            ModelError: its configuration does not say, or names several.
        """
        found = self.config.get("architectures")
        if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
            raise ModelError(f"{self.folder / CONFIG} names the architectures {found!r}; one is needed")
        return found[0]

    def names_in(self, file: str) -> tuple[str, ...]:
        """Names of the tensors of one file, sorted."""
        return tuple(sorted(name for name, held in self.where.items() if held == file))

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, of its own type and shape.

        Raises:
            ModelError: no such tensor, or a damaged file.
        """
        with self._opened(name) as f:
            return f.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Raises:
            ModelError: no such tensor, or a damaged file.
        """
        with self._opened(name) as f:
            return tuple(f.get_slice(name).get_shape())

    def dtype_of(self, name: str) -> torch.dtype:
        """Type of a tensor.

        Raises:
            ModelError: no such tensor, or a damaged file.
        """
        return self.read(name).dtype  # mapped, not read

    def _opened(self, name: str) -> Any:
        if name not in self.where:
            raise ModelError(f"{self.folder} has no tensor {name}")
        file = self.folder / self.where[name]
        try:
            return safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{file} is not a complete safetensors file ({e}); fetch or save it again") from e


def open_checkpoint(name_or_path: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find the tensors of a checkpoint, fetched first if it is one of the hub's.

    Args:
        name_or_path: a folder written by Hugging Face's `save_pretrained`, a hub id, or `"organism"`.
        revision: hub commit, tag or branch.

    Raises:
        InputError: no such folder and no such model on the hub.
        ModelError: no safetensors (pickles are never opened), quantised weights, an index that does not match its files or
            names one outside the folder, or a damaged file.
    """
    source, name = located(name_or_path)
    folder, fetched_from = fetched(source, files=[*BESIDE, "*.safetensors"], revision=revision)
    config = _read(folder / CONFIG)
    if config.get("quantization_config"):
        raise ModelError(
            f"{name} holds quantised weights, into which nothing can be folded exactly; take the model in its full precision"
        )
    where = _index(folder, name) if (folder / INDEX).is_file() else _single(folder, name)
    commit = fetched_from.rpartition("@")[2] or weights_revision(folder, None)
    return Checkpoint(folder, name, commit, config, where)


def _single(folder: Path, name: str) -> dict[str, str]:
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{name} has neither {WEIGHTS} nor {INDEX} (pickled weights are not read); save the model again with "
            "save_pretrained, which writes safetensors"
        )
    return dict.fromkeys(_held(folder / WEIGHTS), WEIGHTS)


def _index(folder: Path, name: str) -> dict[str, str]:
    where = _read(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map; fetch or save {name} again")
    held = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{folder / INDEX} names the file {file!r}; only .safetensors files of its own folder are read"
            )
        if not (folder / file).is_file():
            raise ModelError(f"{folder} lacks {file}, which its index names; fetch or save {name} again")
        held |= dict.fromkeys(_held(folder / file), file)
    wrong = sorted({tensor for tensor in {*where, *held} if where.get(tensor) != held.get(tensor)})
    if wrong:
        raise ModelError(f"{folder / INDEX} does not match its files, e.g. at {wrong[0]}; fetch or save {name} again")
    return where


def _held(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt", device="cpu") as f:
            return list(f.keys())
    except (SafetensorError, OSError) as e:
        raise ModelError(f"{file} is not a complete safetensors file ({e}); fetch or save it again") from e


def _read(path: Path) -> dict[str, Any]:
    record = io.read_json(path)
    if not isinstance(record, dict):
        raise ModelError(f"{path} does not hold a JSON object; fetch or save the model again")
    return record
