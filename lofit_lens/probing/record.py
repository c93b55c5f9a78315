"""Activations of many sequences in one streaming pass: z of every head, or the residual stream, at the last token.

The last token is where ITI (arXiv 2306.03341, section 3.1) and RepE (arXiv 2310.01405, section 3.1) read a statement.
"""

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from lofit_lens.checks import check_is, check_one_of, check_whole, shown
from lofit_lens.errors import DataError, InputError
from lofit_lens.heads import layers_of
from lofit_lens.html import wrapped
from lofit_lens.models import (
    ModelInfo,
    check_residual,
    context_length,
    device_of,
    frozen,
    head_size,
    hook_z,
    hooked,
    model_info,
    not_finite,
    residual_point,
    run_through,
    tokenizer_of,
)
from lofit_lens.progress import tqdm
from lofit_lens.tasks.collate import encode_continuations, pad, pad_id
from lofit_lens.tasks.statements import Statement

TOKEN_BUDGET = 8192  # padded tokens of one forward pass
MEMORY_LIMIT = 2**30  # bytes; larger activations go to a temporary file

What = Literal["z", "resid"]


class Activations:
    """Last-token activations of `n` sequences, float32, in memory or in a temporary file.

    The file is removed by `close()`, at the end of a `with` block, when the object is dropped, and when Python ends.

    Attributes:
        layers: the recorded layers, ascending.
        what: `"z"` or `"resid"`.
        path: the temporary file; None if everything is in memory.
    """

    layers: tuple[int, ...]
    what: What
    path: Path | None

    def __init__(
        self, what: What, layers: Sequence[int], n: int, width: tuple[int, ...], *, memory_limit: int = MEMORY_LIMIT
    ) -> None:
        self.what, self.layers, self.path = what, tuple(layers), None
        shape = (len(self.layers), n, *width)
        size = 4 * int(np.prod(shape))
        if size <= memory_limit:
            self._values: np.ndarray = np.zeros(shape, dtype=np.float32)
            return
        folder = tempfile.gettempdir()
        if (free := shutil.disk_usage(folder).free) < size:
            raise InputError(
                f"activations of {n} sequences take {size / 1e9:.2f} GB, more than memory_limit ({memory_limit / 1e9:.2f} GB) "
                f"and than the free space in {folder} ({free / 1e9:.2f} GB); record fewer sequences or layers, raise "
                "memory_limit, or name another folder in the environment variable TMPDIR"
            )
        made = tempfile.mkdtemp(prefix="lofit-lens-activations-")
        self._remove = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        self.path = Path(made) / "values.float32"
        self._values = np.memmap(self.path, dtype=np.float32, mode="w+", shape=shape)

    def layer(self, layer: int) -> Float32[np.ndarray, "n ..."]:
        """Values of one layer, `[n, n_heads, d_head]` (z) or `[n, d_model]` (resid), in the order the sequences were given.

        Raises:
            InputError: a layer that was not recorded, or after `close()` of activations in a file.
        """
        if layer not in self.layers:
            raise InputError(f"layer {layer} was not recorded; recorded layers: {', '.join(map(str, self.layers))}")
        if self.path is not None and not self._remove.alive:
            raise InputError("these activations are closed and their file is removed; record them again")
        return self._values[self.layers.index(layer)]

    def close(self) -> None:
        """Remove the temporary file, if there is one. Arrays that `layer` has returned stay readable."""
        if self.path is not None:
            self._remove()

    def __len__(self) -> int:
        """Number of sequences."""
        return self._values.shape[1]

    def __enter__(self) -> "Activations":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {self.path}"
        return wrapped(f"Activations({self.what}: {len(self)} sequences, {len(self.layers)} layers, {where})")


def statement_ids(model: Any, statements: Iterable[Statement]) -> list[tuple[int, ...]]:
    """Token ids of each statement: prompt and answer tokenized as one text, with BOS prepended once.

    Raises:
        DataError: a statement whose prompt or answer has no tokens.
    """
    tokenizer = tokenizer_of(model)
    check_is(statements, Iterable, "statements", "what tasks.statements gives")
    for s in (statements := list(statements)):
        check_is(s, Statement, "a statement", "what tasks.statements gives")
    return [encode_continuations(tokenizer, s.prompt, [s.answer])[0].ids for s in statements]


def record(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    what: What,
    layers: Iterable[int] | None = None,
    token_budget: int = TOKEN_BUDGET,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = True,
    label: str = "record",
) -> Activations:
    """Record the activations of every sequence at its last token.

    Attached interventions stay active, and activations are recorded after their edits. A sequence of plain ids has no prompt, so
    an intervention on the answer's tokens edits all of them.

    Args:
        model: any HookedTransformer or TransformerBridge.
        sequences: token ids of each sequence, including BOS; see `statement_ids`.
        what: `"z"` (hook_z of every head) or `"resid"` (hook_resid_post).
        layers: which layers; None = all, for z all that have heads.
        token_budget: bound on the padded tokens of one forward pass (a single sequence may exceed it).
        memory_limit: bytes; larger activations (4 bytes per number) go to a file in the temporary folder.
        progress: show a bar over sequences.
        label: text of the bar.

    Raises:
        InputError: no sequence, no layer, a layer outside the model, a token budget below 1, or no room for the temporary file.
        DataError: an empty sequence, or one longer than the context; names its index in the list.
        ModelError: heads or residual stream that cannot be reached, or activations that are NaN or infinite.
    """
    check_one_of("activations", what, ("z", "resid"))
    check_whole(1, token_budget=token_budget)
    check_whole(0, memory_limit=memory_limit)
    info = model_info(model)
    wanted = _layers(info, layers, info.grid.layers if what == "z" else range(info.n_layers))
    _check_lengths(model, sequences)
    if what == "z":
        width: tuple[int, ...] = (int(model.cfg.n_heads), head_size(model, wanted))
        points = [hook_z(model, layer) for layer in wanted]
    else:
        check_residual(model, wanted, "hook_resid_post")
        width = (int(model.cfg.d_model),)
        points = [residual_point(model, layer, "hook_resid_post") for layer in wanted]
    made = Activations(what, wanted, len(sequences), width, memory_limit=memory_limit)
    try:
        _fill(model, sequences, points, made, token_budget, progress, label)
    except BaseException:
        made.close()
        raise
    return made


@torch.no_grad()
def _fill(
    model: Any, sequences: Sequence[Sequence[int]], points: Sequence[Any], made: Activations, token_budget: int,
    progress: bool, label: str,
) -> None:  # fmt: skip
    fill, device, seen = pad_id(tokenizer_of(model)), device_of(model), dict[int, Tensor]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        for i, point in enumerate(points):
            stack.enter_context(hooked(point, _last_token(seen, i)))
        bar = stack.enter_context(tqdm(total=len(sequences), desc=label, disable=not progress, unit="text"))
        for rows in _batches([len(s) for s in sequences], token_budget):
            # Padding is on the left, so that the last column is every row's last token.
            run_through(model, *pad([sequences[r] for r in rows], side="left", pad_id=fill, device=device))
            for i, layer in enumerate(made.layers):
                values = seen.pop(i).cpu().numpy()
                if not np.isfinite(values).all():
                    raise not_finite(model, f"activations of layer {layer} on one of the sequences {rows}")
                made._values[i, rows] = values
            bar.update(len(rows))


def _last_token(seen: dict[int, Tensor], i: int) -> Any:
    def keep(x: Tensor, hook: Any) -> None:
        seen[i] = x[:, -1].detach().float()

    return keep


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Groups of items in order of length, as many as fit the budget when padded to the longest of them."""
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if rows and (len(rows) + 1) * lengths[i] > budget:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def _layers(info: ModelInfo, layers: Iterable[int] | None, every: Iterable[int]) -> tuple[int, ...]:
    n = info.n_layers
    if layers is None:
        return tuple(every)
    wanted = tuple(sorted(set(layers_of(layers))))
    if not wanted:
        raise InputError(f"no layer to record; give layers from 0 to {n - 1}, or None for all")
    if wanted[0] < 0 or wanted[-1] >= n:
        raise InputError(f"layers {list(wanted)} asked for; {info.name} has layers 0 to {n - 1}")
    return wanted


def _check_lengths(model: Any, sequences: Sequence[Sequence[int]]) -> None:
    if not isinstance(sequences, Sequence) or isinstance(sequences, str) or not sequences:
        raise InputError(f"sequences is {shown(sequences)}; give one or more lists of token ids")
    limit = context_length(model)
    for i, ids in enumerate(sequences):
        check_is(ids, Sequence, f"sequence {i}", "a list of token ids")
        if not ids:
            raise DataError(f"sequence {i} is empty; give at least one token")
        if len(ids) > limit:
            raise DataError(
                f"sequence {i} has {len(ids)} tokens; the context of {model_info(model).name} is {limit}: shorten or drop it"
            )
