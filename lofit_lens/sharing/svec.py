"""Head directions for Steerability (called AISteer360 before version 0.4): a JSON file with a row per head.

Its `ITI` control adds `directions[layer][head]`, times a positive strength that the file does not record, to that head's output
before W_O. For ITI this is `sigma * d`, with ITI's alpha as strength (for a negative alpha, `-sigma * d` and `-alpha`); for LoFiT
it is v, with strength 1 (`svec_use`). The format is the same in versions 0.3.0 and 0.5.5, whose source was read
(github.com/generative-computing/steerability).
"""

import logging
from pathlib import Path

import torch

from lofit_lens import io
from lofit_lens.checks import check_whole
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.heads import Heads, HeadSet
from lofit_lens.hub import commit_of
from lofit_lens.interventions import ITI, Adapter, Lofit
from lofit_lens.interventions.base import AdapterMeta, check_adapter
from lofit_lens.models import Positions, located, source_of
from lofit_lens.models.sources import read_config

logger = logging.getLogger(__name__)

SCOPES = {"all": "all", "answer": "after_prompt"}  # positions here -> token_scope there


@torch.no_grad()
def export_svec(adapter: Adapter, file: str | Path, *, model_type: str | None = None, overwrite: bool = False) -> Path:
    """Write ITI's `sigma * d`, or LoFiT's offsets, as a steering vector, and log the call that uses it in Steerability.

    Args:
        adapter: ITI, or LoFiT without scalings.
        file: its name must end in `.svec`, which the tool would otherwise append.
        model_type: the base model's type, as in its config.json (`"llama"`); None = read from there.
        overwrite: replace an existing file.

    Raises:
        AdapterError: another method, scalings, or positions that the tool does not have.
        InputError: another ending, a base model that is not recorded, an existing file, or one that cannot be written.
        ModelError: a base model whose configuration cannot be read.
    """
    path, use, base = Path(file), svec_use(adapter), adapter.meta.model
    assert isinstance(adapter, ITI | Lofit)
    if path.suffix != ".svec":
        raise InputError(f"{path} does not end in .svec, which the tool would add on reading; name it {path}.svec")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another name, or overwrite it (overwrite=True, --overwrite)")
    if model_type is None:
        if base is None:
            raise InputError("this adapter does not name its base model, whose type the file needs; give model_type")
        source, _ = located(source_of(base.name, base.revision))
        model_type = str(read_config(source, commit_of(base.revision)).model_type)
    rows = torch.zeros(adapter.shape)
    for i, head in enumerate(adapter.heads):
        away = isinstance(adapter, ITI) and adapter.alpha < 0
        row = adapter.v[head] if isinstance(adapter, Lofit) else adapter.sigma[i] * adapter.directions[i]
        rows[head] = -row if away else row
    directions = {str(layer): rows[layer].tolist() for layer in adapter.heads.layers}
    record = {"model_type": model_type, "directions": directions}
    written = io.write_json(path, record | {"num_heads": adapter.shape[1], "head_dim": adapter.d_head})
    logger.info("%s: in Steerability, use %s", written, use)
    return written


def svec_use(adapter: Adapter) -> str:
    """The call of Steerability that steers with the exported file as the adapter does here.

    Raises:
        AdapterError: see `export_svec`.
    """
    check_adapter(adapter)
    scaled = isinstance(adapter, Lofit) and bool(adapter.A.detach().any())
    if not isinstance(adapter, ITI | Lofit) or scaled or str(adapter.positions) not in SCOPES:
        raise AdapterError(
            f"a .svec file holds ITI, or LoFiT without scalings, at positions {' or '.join(SCOPES)}, but this is {adapter!r}; "
            "change it (with_positions, train offsets), or fold it (export_folded)"
        )
    heads, scope = [tuple(head) for head in adapter.heads], SCOPES[str(adapter.positions)]
    alpha = 1.0 if isinstance(adapter, Lofit) else abs(adapter.alpha)
    if alpha == 0:
        raise AdapterError("this ITI adapter changes nothing, since its alpha is 0; give it another (with_strength)")
    return (
        f"ITI(steering_vector=SteeringVector.load(...), selected_heads={heads}, alpha={alpha!r}, token_scope={scope!r})"
    )


def import_svec(
    file: str | Path,
    heads: Heads | int,
    shape: tuple[int, int, int],
    *,
    alpha: float,
    positions: str | Positions,
) -> ITI:
    """Read the ITI adapter in a steering vector: d is each row divided by its norm, and sigma the norm.

    The file does not record heads, model, strength or positions, so all of them are arguments.

    Args:
        file: made by `SteeringVector.save` or `export_svec`.
        heads: the heads to edit, or how many of the best by the file's probe accuracies (Steerability takes 48).
        shape: `(n_layers, n_heads, d_head)` of the model it was made for.
        alpha: strength (15 in ITI's paper and by the tool's default; 1 for offsets of LoFiT).
        positions: the edited positions; `"answer"` is the tool's default (`"after_prompt"`), `"all"` that of LoFiT's offsets.

    Raises:
        DataError: no such file, not JSON (pickles are never opened), a vector of the residual stream, or rows of another shape or
            not finite.
        InputError: more heads than accuracies, or a head outside the model or the file.
    """
    record = io.read_record(file)
    try:
        rows = {layer: torch.tensor(table, dtype=torch.float32) for layer, table in record["directions"].items()}
        scores = {key: float(score) for key, score in (record.get("probe_accuracies") or {}).items()}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise DataError(f"{file} is not a .svec file of head directions ({e}); save it with SteeringVector.save") from e
    size = record.get("num_heads"), record.get("head_dim")
    if size != tuple(shape[1:]) or not all(tuple(t.shape) == size and bool(t.isfinite().all()) for t in rows.values()):
        raise DataError(
            f"{file} does not hold finite directions of {shape[1]} heads of size {shape[2]} per layer (it says num_heads "
            f"{size[0]}, head_dim {size[1]}); give a file of the ITI control, and the model it was made for"
        )
    if isinstance(heads, int):
        best = sorted(scores, key=scores.__getitem__, reverse=True)  # ties in the file's order, as in the tool
        check_whole(1, len(best), heads=heads)
        heads = ["L{}H{}".format(*key.partition(":")[::2]) for key in best[:heads]]
    chosen = HeadSet.of(heads)
    chosen.check(shape[:2])
    if lacking := [str(layer) for layer in chosen.layers if str(layer) not in rows]:
        raise InputError(f"{file} has no directions of layer {lacking[0]}; its layers are {', '.join(rows)}")
    picked = torch.stack([rows[str(head.layer)][head.head] for head in chosen]).double()
    sigma = torch.linalg.vector_norm(picked, dim=1)
    unit = torch.where(sigma[:, None] > 0, picked / sigma[:, None], 0.0)
    meta = AdapterMeta(config={"made_by": "AISteer360", "file": Path(file).name})
    return ITI(shape, chosen, directions=unit.float(), sigma=sigma.float(), alpha=alpha, positions=positions, meta=meta)
