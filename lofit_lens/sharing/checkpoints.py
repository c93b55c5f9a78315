"""A plain Hugging Face checkpoint on disk, read tensor by tensor, never as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lofit_lens import io
from lofit_lens.errors import ModelError
from lofit_lens.hub import commit_of, fetched
from lofit_lens.models import located, weights_revision

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
ADAPTER = "adapter_config.json"  # marks an adapter of any tool
# The files of a plain checkpoint besides its weights; code and pickles are never fetched.
BESIDE = (
    "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and the file of each of its tensors.

    Attributes:
        folder: folder that holds its files.
        name: a hub id, a folder's own name, or `"organism"`.
        revision: the hub's commit, or a checksum of a local folder's weights.
        config: `config.json`, with `architectures` filled in from the class of its `model_type` if it is missing.
        where: tensor -> name of its file.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    where: Mapping[str, str]

    @property
    def source(self) -> str:
        """The name under which `load_model` finds it: its folder, or its id on the hub."""
        return self.name if commit_of(self.revision) else str(self.folder)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its safetensors files, in order."""
        return tuple(sorted(set(self.where.values())))

    @property
    def architecture(self) -> str:
        """Name of its Hugging Face class, e.g. `"LlamaForCausalLM"`.

        Raises:
            ModelError: its configuration names none, or several.
        """
        found = self.config.get("architectures")
        if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
            raise ModelError(f"{self.folder / CONFIG} names the architectures {found!r}; one is needed")
        return found[0]

    def read(self, name: str) -> Tensor:
        """Read one tensor, on the CPU, with its stored dtype and shape.

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
        """Dtype of a tensor.

        Raises:
            ModelError: no such tensor, or a damaged file.
        """
        return self.read(name).dtype  # the file is memory-mapped, so nothing is read

    def _opened(self, name: str) -> Any:
        if name not in self.where:
            raise ModelError(f"{self.folder} has no tensor {name}")
        file = self.folder / self.where[name]
        try:
            return safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{file} is not a complete safetensors file ({e}); fetch or save it again") from e


def open_checkpoint(name_or_path: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find the tensors of a checkpoint, fetching it first if it is on the hub.

    Args:
        name_or_path: a folder written by Hugging Face's `save_pretrained`, a hub id, or `"organism"`.
        revision: hub commit, tag or branch.

    Raises:
        InputError: no such folder and no such model on the hub.
        ModelError: no configuration or no safetensors (pickles are never opened), an adapter's folder or an adapter in it,
            quantized weights, an index that does not match its files, names one outside the folder or competes with other
            weights, or a damaged file.
    """
    source, name = located(name_or_path)
    folder, came_from = fetched(source, files=BESIDE, revision=revision)
    config = _configuration(folder, name)
    if config.get("quantization_config"):
        raise ModelError(
            f"{name} holds quantized weights, into which nothing can be folded exactly; use the checkpoint in full "
            "precision that they were made from (export: base=..., strict=False; --base, --other-model)"
        )
    where = _indexed(folder, name) if (folder / INDEX).is_file() else None
    files = [WEIGHTS] if where is None else sorted(set(where.values()))
    commit = came_from.rpartition("@")[2]
    if commit:  # only these files: a repository may also hold the same weights in other formats
        fetched(source, files=files, revision=commit)
    held = {tensor: file for file in files for tensor in _held(folder / file, name)}
    wrong = sorted(tensor for tensor in {*(where or held), *held} if (where or held).get(tensor) != held.get(tensor))
    if wrong:
        raise ModelError(f"{folder / INDEX} does not match its files, e.g. at {wrong[0]}; fetch or save {name} again")
    return Checkpoint(folder, name, commit or weights_revision(folder, None), config, held)


def _configuration(folder: Path, name: str) -> dict[str, Any]:
    """`config.json` of a folder that holds only a model, with its class."""
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER).is_file():
            raise ModelError(
                f"{name} is an adapter's folder, not a model: there is nothing to import; load_adapter reads lofit_lens adapters"
            )
        raise ModelError(f"{name} has no {CONFIG}; give a folder written by Hugging Face's save_pretrained")
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{name} holds an adapter too ({ADAPTER}), which transformers would load along with the model; move it out"
        )
    config = _read(folder / CONFIG)
    if not config.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
        if isinstance(kind, str):
            config["architectures"] = [kind]
    return config


def _indexed(folder: Path, name: str) -> dict[str, str]:
    """Tensor -> file according to the index; only files of the folder."""
    if (folder / WEIGHTS).exists():
        raise ModelError(
            f"{folder} holds {WEIGHTS} beside {INDEX}, and transformers would read only the first; delete the stale one"
        )
    where = _read(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ModelError(f"{folder / INDEX} has no weight_map; fetch or save {name} again")
    for file in sorted(set(where.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{folder / INDEX} names the file {file!r}; only .safetensors files of its own folder are read"
            )
    return where


def _held(file: Path, name: str) -> list[str]:
    """Names of the tensors of a file."""
    if not file.is_file():
        raise ModelError(
            f"{name} has no file {file.name} (pickled weights are not read); fetch it again, or save the model again with "
            "save_pretrained, which writes safetensors"
        )
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
