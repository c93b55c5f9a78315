"""Steering vectors of AISteer360 (github.com/IBM/AISteer360): JSON with one row a head for each layer.

`directions[layer][head]` is what its `ITI` control adds to that head's output before W_O, times a strength that the file
does not say: ITI's `sigma * d`, for which the strength is ITI's alpha; or LoFiT's v, for which it is 1. `probe_accuracies`
ranks heads, and the control takes the best `num_heads` of them (48 where nobody says otherwise). Where it acts is its
`token_scope`: `"after_prompt"` (its default; our positions `answer`) or `"all"`.

The format's `meta` is the reader's to ignore. A file written here keeps there the adapter's record and, for ITI, d and sigma, so
that it is read back bit by bit.
"""

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.errors import AdapterError, DataError, InputError, ModelError
from lofit_lens.heads import Head, HeadScores, HeadSet
from lofit_lens.interventions import ITI, Adapter, Lofit, load_adapter
from lofit_lens.interventions.base import AdapterMeta, check_adapter
from lofit_lens.interventions.files import CONFIG_FILE, SCHEMA, WEIGHTS_FILE, public, write_files
from lofit_lens.interventions.iti import ALPHA
from lofit_lens.models import Positions, located, source_of
from lofit_lens.models.sources import read_config
from lofit_lens.sharing.foreign import numbers, read_object, whole, write_object

logger = logging.getLogger(__name__)

SUFFIX = ".svec"
WHAT = "an AISteer360 .svec file: a JSON object with model_type, directions, num_heads and head_dim"
OURS = "lofit_lens"  # our key in the file's `meta`
_SCOPES = {"all": "all", "answer": "after_prompt"}  # positions here -> token_scope there
_INDEX = re.compile("0|[1-9][0-9]{0,5}")

Rows = Float[Tensor, "n_heads d_head"]


def export_svec(
    adapter: Adapter,
    file: str | Path,
    *,
    scores: HeadScores | None = None,
    model_type: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ITI's `sigma * d`, or LoFiT's offsets, as an AISteer360 steering vector; how to use it there is logged.

    Args:
        adapter: ITI, or LoFiT without scalings.
        file: its name must end in `.svec`, which AISteer360 otherwise adds.
        scores: a score for every head, to rank the adapter's own by; None = those of its head set. Without any, `selected_heads`
            has to be given to AISteer360.
        model_type: the base model's, as in its config.json (`"llama"`); None = read there.
        overwrite: replace an existing file.

    Raises:
        AdapterError: another method, scalings (which the format has no place for), or a strength of 0 or below (which AISteer360
            refuses).
        InputError: another ending, scores of another model's shape, a base model that is not known or cannot be read, an existing
            file (and not `overwrite`), or one that cannot be written.
    """
    path = Path(file)
    if path.suffix != SUFFIX:
        raise InputError(
            f"{path} does not end in {SUFFIX}, which AISteer360 would add on reading; name it {path}{SUFFIX}"
        )
    found, _ = _steering(adapter)
    _, n_heads, d_head = found.shape
    own = {
        "record": public({"lofit_lens_schema": SCHEMA, **found._record(), "history": []}),
        "tensors": {name: t.tolist() for name, t in found._tensors().items()},
    }
    record = {
        "model_type": model_type or _model_type(found),
        "directions": {str(layer): rows.tolist() for layer, rows in _rows(found).items()},
        "num_heads": n_heads,
        "head_dim": d_head,
    }
    ranked = _ranked(found.heads, scores, found.shape[:2])
    if ranked is not None:
        record["probe_accuracies"] = {
            f"{h.layer}:{h.head}": score for h, score in zip(found.heads, ranked, strict=True)
        }
    written = write_object(path, record | {"meta": {OURS: own}}, overwrite=overwrite)
    logger.info("%s: in AISteer360 it is %s", written, svec_use(found))
    return written


def svec_use(adapter: Adapter) -> str:
    """The call of AISteer360 that steers with the exported file as the adapter does here.

    Raises:
        AdapterError: see `export_svec`.
    """
    found, strength = _steering(adapter)
    scope = _SCOPES.get(str(found.positions))
    where = repr(scope) if scope else f"... (none acts on our positions {str(found.positions)!r})"
    return (
        f"ITI(steering_vector=SteeringVector.load(...), alpha={strength:g}, num_heads={found.k}, token_scope={where})"
    )


def import_svec(
    file: str | Path,
    *,
    heads: HeadSet | int | None = None,
    shape: tuple[int, int, int] | None = None,
    alpha: float | None = None,
    positions: str | Positions | None = None,
) -> ITI | Lofit:
    """The adapter in an AISteer360 steering vector: what was exported from here bit by bit, another tool's as ITI.

    The arguments are for files of other tools, which do not say any of them. For one of ours all but `shape` are refused.

    Args:
        file: made by `SteeringVector.save` or `export_svec`.
        heads: the heads to edit, or how many of the best by the file's probe accuracies (AISteer360 takes 48).
        shape: `(n_layers, n_heads, d_head)` of the model it was made for; checked against the file, which may hold some layers
            alone.
        alpha: strength; None = 15, the default of AISteer360 and of ITI's paper.
        positions: where it acts; None = `"answer"`, AISteer360's default (`"after_prompt"`).

    Returns:
        ITI: d is each direction divided by its norm, and sigma the norm. LoFiT where `export_svec` wrote one.

    Raises:
        DataError: no such file, a pickle (never opened), not JSON, a vector of the residual stream, numbers that are none or
            not finite, rows that do not match num_heads and head_dim, or a file of ours that was changed.
        InputError: an argument missing or too many, or a head outside the model or the file, or a layer of the file outside the
            model.
    """
    record = read_object(file, WHAT)
    try:
        rows = _read_rows(record)
        accuracies = _read_accuracies(record, _size(rows)[0])
        own = record["meta"].get(OURS) if isinstance(record.get("meta"), dict) else None
        if shape is not None and shape[1:] != _size(rows):
            raise InputError(
                f"it is for heads of shape {_size(rows)}, and the model's are {shape[1:]}; give its own model's"
            )
        if own is None:
            return _foreign(rows, accuracies, heads, shape, alpha, positions, Path(file).name)
        if any(x is not None for x in (heads, alpha, positions)):
            raise InputError(
                "it was exported from here and says its heads, strength and positions itself; leave them out, and change the "
                "adapter that is read (with_strength, with_positions, restrict)"
            )
        made = _own(own)
        if shape not in (None, made.shape):
            raise InputError(f"it is for a model of shape {made.shape}, not {shape}; give its own model's, or none")
        kept = _rows(made)
        if kept.keys() != rows.keys() or not all(torch.equal(kept[layer], rows[layer]) for layer in kept):
            raise DataError(
                f"its directions are not those of the record in its meta, so it was changed since; export it again, or take "
                f"{OURS!r} out of its meta to read it as another tool's"
            )
        return made
    except InputError as e:
        raise type(e)(f"{file}: {e}") from e


# ------------------------------------------------------------------------------------------------------------------- writing


def _steering(adapter: Adapter) -> tuple[ITI | Lofit, float]:
    """The adapter, if the format has a place for it, and the strength to give to AISteer360."""
    check_adapter(adapter)
    if isinstance(adapter, Lofit):
        if adapter.A.detach().any():
            raise AdapterError(
                "this LoFiT adapter scales heads (its A is not 0), and a steering vector only adds; fold it (export_folded), "
                "or train offsets alone"
            )
        return adapter, 1.0
    if isinstance(adapter, ITI):
        if not adapter.alpha > 0:
            raise AdapterError(
                f"alpha is {adapter.alpha:g}, and AISteer360 takes strengths above 0 alone; export with_strength(...)"
            )
        return adapter, adapter.alpha
    raise AdapterError(f"{adapter.title} does not add a vector to single heads' outputs; ITI and LoFiT's offsets do")


@torch.no_grad()
def _rows(adapter: ITI | Lofit) -> dict[int, Rows]:
    """What is added at strength 1, float32 on the CPU, for each layer with a head; 0 for heads that are not the adapter's."""
    rows = {layer: torch.zeros(adapter.shape[1:]) for layer in adapter.heads.layers}
    for i, (layer, head) in enumerate(adapter.heads):
        if isinstance(adapter, ITI):
            rows[layer][head] = (adapter.sigma[i] * adapter.directions[i]).cpu()
        else:
            rows[layer][head] = adapter.v[layer, head].cpu()
    return rows


def _ranked(heads: HeadSet, scores: HeadScores | None, grid: tuple[int, int]) -> list[float] | None:
    """A score for each of the heads. Others get none: AISteer360 would choose among them too, and their rows are 0."""
    if scores is None:
        return None if heads.scores is None else list(heads.scores)
    if scores.shape != grid:
        raise InputError(
            f"scores of {scores.shape[0]} layers of {scores.shape[1]} heads for an adapter of {grid[0]} of {grid[1]}; give "
            "those of its model"
        )
    return [scores[head] for head in heads]


def _model_type(adapter: Adapter) -> str:
    base = adapter.meta.model
    advice = "give model_type, as in the base model's config.json (e.g. 'llama')"
    if base is None:
        raise InputError(f"this adapter does not say its base model, and a .svec file names its type; {advice}")
    commit = base.revision if base.revision and ":" not in base.revision else None
    try:
        source, _ = located(source_of(base.name, base.revision))
        return str(read_config(source, commit).model_type)
    except ModelError as e:
        raise InputError(f"the type of the base model is not known ({e}); {advice}") from e


# ------------------------------------------------------------------------------------------------------------------- reading


def _read_rows(record: Mapping[str, Any]) -> dict[int, Rows]:
    """The directions by layer, `[num_heads, head_dim]` each."""
    table, model_type = record.get("directions"), record.get("model_type")
    if not isinstance(table, dict) or not table or not isinstance(model_type, str) or not model_type:
        raise DataError(f"it lacks directions or model_type; expected {WHAT}")
    if record.get("num_heads") is None or record.get("head_dim") is None:
        raise DataError(
            "it does not say num_heads and head_dim, so its directions are of the residual stream and not of heads; give one "
            "of AISteer360's ITI"
        )
    size = (whole(record["num_heads"], "num_heads"), whole(record["head_dim"], "head_dim"))
    return {_index(key, "a layer"): numbers(rows, size, f"directions[{key!r}]") for key, rows in table.items()}


def _read_accuracies(record: Mapping[str, Any], n_heads: int) -> dict[Head, float]:
    """The scores by head, in the file's order; empty where it has none."""
    table = record.get("probe_accuracies")
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise DataError(f"probe_accuracies is {type(table).__name__}; expected an object of 'layer:head' to a number")
    found = {}
    for key, value in table.items():
        layer, _, head = key.partition(":")
        at = Head(_index(layer, f"the layer of {key!r}"), _index(head, f"the head of {key!r}"))
        if at.head >= n_heads:
            raise DataError(f"probe_accuracies has {key!r}, and there are {n_heads} heads in a layer")
        numbers(value, (), f"probe_accuracies[{key!r}]")
        found[at] = float(value)
    return found


def _index(text: str, what: str) -> int:
    if not _INDEX.fullmatch(text):
        raise DataError(f"{text!r} is not {what}; expected a number from 0")
    return int(text)


def _size(rows: Mapping[int, Rows]) -> tuple[int, int]:
    n_heads, d_head = next(iter(rows.values())).shape
    return n_heads, d_head


def _foreign(
    rows: dict[int, Rows],
    accuracies: dict[Head, float],
    heads: HeadSet | int | None,
    shape: tuple[int, int, int] | None,
    alpha: float | None,
    positions: str | Positions | None,
    name: str,
) -> ITI:
    if heads is None or shape is None:
        raise InputError(
            f"it holds directions for {len(rows) * _size(rows)[0]} heads of the layers {min(rows)} to {max(rows)}, and says "
            "neither which heads are edited nor how many layers the model has; give heads=48 (the best by its accuracies, as "
            "AISteer360 does; --k 48) or a HeadSet (--heads), and the model's shape (--model)"
        )
    if isinstance(heads, bool):
        raise InputError(f"heads={heads} is no number of heads; give one from 1 on, or a HeadSet")
    if isinstance(heads, int):
        # Equal ones in the file's order, as there.
        ranking = sorted(accuracies, key=accuracies.__getitem__, reverse=True)
        if not 1 <= heads <= len(ranking):
            raise InputError(
                f"heads={heads} is not possible: it has {len(ranking)} probe accuracies; give fewer, or a HeadSet"
            )
        heads = HeadSet(ranking[:heads])
    heads.check(shape[:2])
    beyond = max({*rows, *(h.layer for h in accuracies)})
    if beyond >= shape[0]:
        raise InputError(f"it holds layer {beyond}, and the model has {shape[0]} layers; give its own model's shape")
    lacking = next((h for h in heads if h.layer not in rows), None)
    if lacking is not None:
        raise InputError(f"it has no directions for head {lacking}; its layers are {', '.join(map(str, sorted(rows)))}")
    known = heads.scores or ([accuracies[h] for h in heads] if all(h in accuracies for h in heads) else None)
    chosen = HeadSet(heads, known, heads.shape, heads.label)
    picked = torch.stack([rows[h.layer][h.head] for h in heads]).double()
    sigma = torch.linalg.vector_norm(picked, dim=1)
    unit = torch.where(sigma[:, None] > 0, picked / sigma[:, None], 0.0)
    return ITI(
        shape, chosen, directions=unit.float(), sigma=sigma.float(),
        alpha=ALPHA if alpha is None else alpha, positions="answer" if positions is None else positions,
        meta=AdapterMeta(config={"made_by": "AISteer360", "file": name}),
    )  # fmt: skip


def _own(own: Any) -> ITI | Lofit:
    """The adapter that `export_svec` kept in the file's meta, read as strictly as an adapter's folder."""
    with tempfile.TemporaryDirectory(prefix="svec-") as folder:
        try:
            tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in own["tensors"].items()}
            write_files(Path(folder), own["record"], tensors)
            made = load_adapter(folder)
        except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            reason = (
                str(e)
                .replace(f"{folder}/{CONFIG_FILE}", "its record")
                .replace(f"{folder}/{WEIGHTS_FILE}", "its tensors")
            )
            raise DataError(f"the adapter in its meta.{OURS} is damaged: {reason.replace(folder, 'it')}") from e
    if not isinstance(made, ITI | Lofit):
        raise DataError(f"the adapter in its meta.{OURS} is {made.title}, which no such file is written of")
    return made
