"""ITI's interventions as the reference implementation keeps them (github.com/likenneth/honest_llama, `get_interventions_dict`).

A dictionary `"model.layers.{layer}.self_attn.head_out" -> [(head, direction, std), ...]`, heads ascending, directions of norm 1.
Its readers add `alpha * std * direction` to that head's output; alpha stands nowhere in it. In a file it is JSON: a head is
`[head, [direction], std]`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.heads import Head, HeadSet
from lofit_lens.interventions import ITI, Adapter
from lofit_lens.interventions.base import AdapterMeta, check_adapter
from lofit_lens.models import Positions
from lofit_lens.sharing.foreign import numbers, read_object, whole, write_object

KEY = "model.layers.{}.self_attn.head_out"
_LAYER = re.compile(re.escape(KEY).replace(r"\{\}", "(0|[1-9][0-9]{0,5})"))
WHAT = f"a JSON object of {KEY.format('<layer>')!r}: [[head, [direction], std], ...]"

Entry = tuple[int, np.ndarray, float]


def to_iti_dict(adapter: Adapter) -> dict[str, list[Entry]]:
    """The dictionary of an ITI adapter: `(head, direction [d_head] float32, std)` by layer, std in units of z.

    The strength (`adapter.alpha`), the positions, and the order and scores of the heads have no place in it.

    Raises:
        AdapterError: not an ITI adapter.
    """
    check_adapter(adapter)
    if not isinstance(adapter, ITI):
        raise AdapterError(
            f"this is a {adapter.title} adapter, and an ITI dictionary holds unit directions and spreads; write LoFiT's offsets "
            "with export_svec, or fold them (export_folded)"
        )
    found: dict[str, list[Entry]] = {}
    for i, head in enumerate(adapter.heads):
        entry = (head.head, adapter.directions[i].cpu().numpy().copy(), adapter.sigma[i].item())
        found.setdefault(KEY.format(head.layer), []).append(entry)
    return {name: sorted(entries, key=lambda entry: entry[0]) for name, entries in found.items()}


def from_iti_dict(
    interventions: Mapping[str, Any],
    shape: tuple[int, int, int],
    *,
    alpha: float,
    positions: str | Positions = "answer",
    meta: AdapterMeta | None = None,
) -> ITI:
    """The adapter of an ITI dictionary; heads in its order, without scores.

    Args:
        interventions: layer's name -> `(head, direction [d_head], std)` of each head; numpy or Python numbers.
        shape: `(n_layers, n_heads, d_head)` of the model it was made for, which the dictionary does not say.
        alpha: strength, in sigmas; the dictionary does not say it either (15 in the paper).
        positions: where it acts; see `models.Positions`.
        meta: provenance.

    Raises:
        DataError: another key, an entry that is no triple, a number that is none or is not finite, a direction of another length.
        InputError: no head, one twice or outside the shape, or a direction that is neither of norm 1 nor zero.
    """
    heads, directions, sigma = [], [], []
    for name, entries in interventions.items():
        layer = _LAYER.fullmatch(str(name))
        if layer is None:
            raise DataError(
                f"{name!r} is no key of an ITI dictionary; expected {KEY.format('<layer>')!r}, layers from 0"
            )
        if isinstance(entries, str) or not isinstance(entries, Sequence):
            raise DataError(f"{name} holds {type(entries).__name__}; expected a list of (head, direction, std)")
        for i, entry in enumerate(entries):
            where = f"{name}[{i}]"
            if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 3:
                raise DataError(f"{where} is no triple (head, direction, std)")
            heads.append(Head(int(layer[1]), whole(entry[0], f"the head of {where}")))
            directions.append(numbers(entry[1], (shape[2],), f"the direction of {where}"))
            sigma.append(numbers(entry[2], (), f"the std of {where}"))
    if not heads:
        raise InputError("this ITI dictionary holds no head; give one with at least one")
    chosen = HeadSet(heads, shape=(shape[0], shape[1]), label="ITI dictionary")
    return ITI(
        shape, chosen, directions=torch.stack(directions), sigma=torch.stack(sigma), alpha=alpha, positions=positions,
        meta=meta or AdapterMeta(config={"made_by": "ITI dictionary"}),
    )  # fmt: skip


def export_iti(adapter: Adapter, file: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter's ITI dictionary as JSON; numbers are read back bit by bit.

    Raises:
        AdapterError: not an ITI adapter.
        InputError: the file exists (and not `overwrite`), or cannot be written.
    """
    found = to_iti_dict(adapter)
    record = {name: [[head, d.tolist(), std] for head, d, std in entries] for name, entries in found.items()}
    return write_object(file, record, overwrite=overwrite)


def import_iti(
    file: str | Path,
    shape: tuple[int, int, int],
    *,
    alpha: float,
    positions: str | Positions = "answer",
    meta: AdapterMeta | None = None,
) -> ITI:
    """The adapter of a JSON file with an ITI dictionary; arguments as in `from_iti_dict`.

    Raises:
        DataError: no such file, a pickle (never opened), not JSON, or what `from_iti_dict` refuses.
        InputError: no head, one twice or outside the shape, or a direction that is neither of norm 1 nor zero.
    """
    made = meta or AdapterMeta(config={"made_by": "ITI dictionary", "file": Path(file).name})
    record = read_object(file, WHAT)
    try:
        return from_iti_dict(record, shape, alpha=alpha, positions=positions, meta=made)
    except InputError as e:
        raise type(e)(f"{file}: {e}") from e
