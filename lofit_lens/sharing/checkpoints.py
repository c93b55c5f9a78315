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
from lofit_lens.hub import commit_of, fetched
from lofit_lens.models import located, weights_revision

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
ADAPTER = "adapter_config.json"  # of an adapter, of whatever tool
# What a plain checkpoint consists of, beside its weights; code and pickles are left where they are.
BESIDE = (
    "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Where each tensor of a checkpoint lies.

    Attributes:
        folder: that holds its files.
        name: a hub id, a folder's own name, or `"organism"`.
        revision: the hub's commit, or a checksum of a local folder's weights.
        config: `config.json` as it stands, but for `architectures`: where it names none, the class of its `model_type`.
        where: tensor -> name of its file.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    where: Mapping[str, str]

    @property
    def source(self) -> str:
        """Where `load_model` reads it: its folder, or its id on the hub."""
        return self.name if commit_of(self.revision) else str(self.folder)

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
        ModelError: no configuration or no safetensors (pickles are never opened), an adapter's folder or an adapter in it,
            quantised weights, an index that does not match its files, names one outside the folder or lies beside other weights,
            or a damaged file.
    """
    source, name = located(name_or_path)
    folder, came_from = fetched(source, files=BESIDE, revision=revision)
    config = _configuration(folder, name)
    if config.get("quantization_config"):
        raise ModelError(
            f"{name} holds quantized weights, into which nothing can be folded exactly; take the checkpoint in full "
            "precision that they were made from (export: base=..., strict=False; --base, --other-model)"
        )
    where = _indexed(folder, name) if (folder / INDEX).is_file() else None
    files = [WEIGHTS] if where is None else sorted(set(where.values()))
    commit = came_from.rpartition("@")[2]
    if commit:  # these alone: a repository may hold the same weights in other forms as well
        fetched(source, files=files, revision=commit)
    held = {tensor: file for file in files for tensor in _held(folder / file, name)}
    wrong = sorted(tensor for tensor in {*(where or held), *held} if (where or held).get(tensor) != held.get(tensor))
    if wrong:
        raise ModelError(f"{folder / INDEX} does not match its files, e.g. at {wrong[0]}; fetch or save {name} again")
    return Checkpoint(folder, name, commit or weights_revision(folder, None), config, held)


def _configuration(folder: Path, name: str) -> dict[str, Any]:
    """`config.json` of a folder that holds a model and nothing else, with its class."""
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER).is_file():
            raise ModelError(
                f"{name} is an adapter's folder and no model: there is nothing to import; load_adapter reads one of lofit_lens"
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
    """Tensor -> file, as the index says; files of the folder alone."""
    if (folder / WEIGHTS).exists():
        raise ModelError(
            f"{folder} holds {WEIGHTS} beside {INDEX}, and transformers would read the first alone; delete the one that is stale"
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
