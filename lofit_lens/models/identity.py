"""Identify a model's weights and files by their content, wherever they are stored."""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lofit_lens import io

FULL_HASH_LIMIT = 2**30  # bytes of local weights up to which a folder's revision is their SHA-256
PIECE = 2**20  # bytes; large files are sampled: tensors up to this size in full, and this much at each of 65 places
TOKENIZER = (
    "config.json",
    "tokenizer*",
    "special_tokens*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "*.model",
    "chat_template*",
)


def weights_revision(source: Any, revision: str | None) -> str | None:
    """Return the hub's commit hash, or a checksum of a local folder's weights: in full up to `FULL_HASH_LIMIT`, else a sample."""
    if source is None:
        return None
    path = Path(source)
    if path.is_dir():
        files = [(f, f.stat()) for f in sorted(path.glob("*.safetensors"))]
        if not files:
            return None
        whole = sum(stat.st_size for _, stat in files) <= FULL_HASH_LIMIT
        found = [(_digest if whole else _sample)(f, stat.st_size, stat.st_mtime_ns) for f, stat in files]
        return ("sha256:" if whole else "sha256:sample:") + io.digest(found)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(source), "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def folder_digest(name_or_path: str | Path) -> str:
    """Return SHA-256 of a local folder's configuration and tokenizer files; empty for a hub model, whose commit covers them."""
    path = Path(name_or_path)
    if str(name_or_path) == "organism" or not path.is_dir():
        return ""
    files = {f for pattern in TOKENIZER for f in path.glob(pattern) if f.is_file()}
    return io.digest({f.name: io.file_digest(f) for f in sorted(files)})


@torch.no_grad()
def fingerprint(model: Any, kind: str = "memory") -> str:
    """Hash a model in memory: the name, shape, dtype and sum of each parameter, and up to 4,096 of its values.

    Edited or fine-tuned weights give another fingerprint. It takes one pass over the weights, on their devices. Only fingerprints
    of one `kind` can be compared: classes name and split the same weights differently.
    """
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        flat = plain(p.detach()).reshape(-1)
        some = flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy()
        total = float(flat.sum(dtype=torch.float64))
        found.update(f"{name} {tuple(p.shape)} {p.dtype} {total:.6g}".encode() + some.tobytes())
    return f"{kind}:{found.hexdigest()}"


def plain(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor unchanged, or dequantized if it is torchao's, which few operations accept."""
    return values.dequantize() if type(values.data).__module__.startswith("torchao") else values


def file_digest(file: Path) -> str:
    """Return SHA-256 of a large file, computed once per process unless its size or modification time changes."""
    stat = file.stat()
    return _digest(file, stat.st_size, stat.st_mtime_ns)


@functools.cache  # a grid asks for the same folder again and again
def _digest(path: Path, size: int, changed: int) -> str:
    return io.file_digest(path)


@functools.cache
def _sample(path: Path, size: int, changed: int) -> str:
    """Return SHA-256 of a file's size, 65 evenly spaced pieces, and all its small tensors (norms, biases) in full."""
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as f:
        for place, length in _pieces(f, size):
            f.seek(place)
            found.update(f.read(length))
    return found.hexdigest()


def _pieces(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    yield from ((i * max(0, size - PIECE) // 64, PIECE) for i in range(65))
    file.seek(0)
    front = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(front)) if 0 < front <= min(size, 100 * PIECE) else {}
    except ValueError:  # not a safetensors file: loading will say so
        header = {}
    for name, tensor in sorted(header.items()):
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            if end - begin <= PIECE:
                yield 8 + front + begin, end - begin
