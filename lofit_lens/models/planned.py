"""Describe a model from its configuration only, before it is loaded: a grid can be planned where its models do not fit."""

from pathlib import Path
from typing import Any

import torch

from lofit_lens import io
from lofit_lens.errors import ModelError, unknown
from lofit_lens.models.as_hooked import hooked_config, on_hooked
from lofit_lens.models.identity import weights_revision
from lofit_lens.models.info import ModelInfo, alike
from lofit_lens.models.loading import BACKENDS, read_tokenizer
from lofit_lens.models.sources import at_commit, located, read_config, remember_source
from lofit_lens.models.tokens import chosen_rules


def planned_info(
    name_or_path: str | Path,
    *,
    backend: str = "auto",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    prepend_bos: bool | None = None,
    name: str | None = None,
) -> ModelInfo:
    """Return what `model_info(load_model(...))` would be with the same arguments; no weights are loaded.

    One thing is known only after loading: whether a checkpoint's conversion fails, so that `backend="auto"` falls back to the
    bridge. A local folder's weights are read for their checksum (above 1 GiB, a sample of them), once per process.

    Args:
        name_or_path: `"organism"`, a hub id or a local Hugging Face folder; for a hub id the configuration is fetched.
        backend: `"hooked"`, `"bridge"` or `"auto"`.
        dtype: of the frozen weights.
        revision: hub commit, tag or branch.
        prepend_bos: whether BOS is prepended to every text; None = as the tokenizer does.
        name: of the model in records; None = the hub id, or the folder's own name.

    Raises:
        InputError: unknown backend or dtype, or BOS for a tokenizer without one.
        ModelError: no such model, or HookedTransformer was requested and cannot load it.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    wanted = io.torch_dtype(dtype)
    source, found = located(name_or_path)
    called = name or found
    with at_commit(source, revision) as commit:
        config = read_config(source, commit)
        on, _ = on_hooked(lambda: hooked_config(config, source, wanted), config, source, name=called, backend=backend)
        bos = _puts_bos(source, commit, prepend_bos)
        identity = weights_revision(source, commit)
        remember_source(called, identity, source)
    shape = _shape(config) if on is None else (on.n_layers, on.n_heads, on.d_model, on.d_vocab)
    n_layers, n_heads, d_model, d_vocab = map(int, shape)
    reached = planned_head_layers(config) if on is None else None
    return ModelInfo(
        name=called, revision=identity, backend="bridge" if on is None else "hooked", processed=False,
        dtype=str(wanted).removeprefix("torch."), n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_vocab=d_vocab,
        prepend_bos=bos, head_layers=reached,
    )  # fmt: skip


def _puts_bos(source: Any, commit: str | None, asked: bool | None) -> bool | None:
    """Return whether BOS will be prepended to a text; None if the tokenizer is not available (then nothing loads)."""
    try:
        return chosen_rules(read_tokenizer(source, commit), asked).prepend_bos
    except ModelError:
        return None


def planned_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """Return the tokenizer that `load_model` would read; no weights are loaded.

    Raises:
        ModelError: no such model, or no tokenizer.
    """
    source, _ = located(name_or_path)
    with at_commit(source, revision) as commit:
        return read_tokenizer(source, commit)


def _shape(config: Any) -> tuple[int, int, int, int]:
    """Return layers, heads, width and vocabulary as the bridge counts them (one nominal head in a model without attention)."""
    text = config.get_text_config()
    n_heads = getattr(text, "num_attention_heads", None) or getattr(text, "num_heads", None) or 1
    return text.num_hidden_layers, n_heads, text.hidden_size, text.vocab_size


def planned_head_layers(config: Any) -> tuple[int, ...] | None:
    """Return what `head_layers` will find in the loaded bridge; None = all."""
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        return ()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    each = getattr(text, "per_layer_config", None)  # of models whose layers differ in more than that
    attends = [i for i, kind in enumerate(kinds) if "attention" in kind and kind != "linear_attention"]
    return (
        alike({i: getattr(each[i], "head_dim", None) if each else None for i in attends}, len(kinds))
        if attends
        else None
    )
