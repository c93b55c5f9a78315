"""RepE's reading vectors (arXiv 2310.01405, section 3.1): directions in the residual stream that separate right from wrong.

1. Run pairs of statements, one right and one wrong; take `hook_resid_post` at the last token.
2. Take the difference within each pair; flip the sign of half of the differences, drawn by seed; center them.
3. The first principal component is the direction. Its sign comes from the labels: right statements project higher than wrong
   ones in most pairs.

The paper's other choice is the difference of means. `ReadingVectors.repe` steers along the directions found.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_is, check_one_of, check_seed, check_whole, shown
from lofit_lens.errors import DataError, InputError
from lofit_lens.heads import layers_of
from lofit_lens.html import wrapped
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.interventions.repe import RepE
from lofit_lens.models import ALL, Positions, attached_to, backend_of, device_of, model_info, tokenizer_of
from lofit_lens.probing.record import record, statement_ids
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import encode
from lofit_lens.tasks.registry import task_of
from lofit_lens.tasks.statements import Statement, pairs, statements

Method = Literal["pca", "mean_difference"]
METHODS = ("pca", "mean_difference")
Ids = Sequence[int]

log = logging.getLogger(__name__)


def reading_vector(
    differences: Float[np.ndarray, "n_pairs d_model"], method: Method = "pca", *, seed: int = 42
) -> Float[np.ndarray, " d_model"]:
    """Unit direction of one layer from differences right - wrong, one per pair.

    `"pca"`: if all differences pointed from wrong to right, centering would remove the very direction that is sought. So
    the sign of half of them (rounded down, drawn by `seed`) is flipped first, as the public code does by shuffling within pairs.
    The direction gets the sign of most pairs' projections (on a tie, of their sum).

    `"mean_difference"`: the mean, whose sign follows from the labels.

    Raises:
        InputError: unknown method.
        DataError: no pair (for `"pca"`: fewer than two), or differences that are zero or cancel out.
    """
    check_one_of("method", method, METHODS)
    check_seed(seed)
    check_is(differences, np.ndarray, "differences", "an array [n_pairs, d_model]")
    values, n = differences.astype(np.float64), len(differences)
    if n < (2 if method == "pca" else 1):
        raise DataError(f"{n} pairs; {method} needs at least {'two' if method == 'pca' else 'one'}")
    if method == "mean_difference":
        mean = values.mean(axis=0)
        return mean / _size(mean, values)
    signs = np.ones(n)
    signs[np.random.default_rng(seed).permutation(n)[: n // 2]] = -1
    turned = values * signs[:, None]
    _size(turned - turned.mean(axis=0), values)
    # The full decomposition is exact and deterministic; scikit-learn's default for wide data is randomized.
    from sklearn.decomposition import PCA

    found = np.asarray(PCA(n_components=1, svd_solver="full").fit(turned).components_)[0]
    along = values @ found
    return found * (np.sign(np.sign(along).sum()) or np.sign(along.sum()) or 1.0)


def _size(found: np.ndarray, values: np.ndarray) -> float:
    """Norm of a direction found in `values`; raises DataError if it is close to zero."""
    size = float(np.linalg.norm(found))
    if not size > 1e-6 * np.abs(values).max():
        raise DataError(
            "right and wrong statements do not differ, or their differences cancel out; check that they end in different tokens "
            "and that there are enough of them"
        )
    return size


@dataclass(frozen=True, eq=False)
class ReadingVectors:
    """One direction per layer that tells right from wrong.

    Attributes:
        layers: the layers, ascending.
        directions: `[n_layers, d_model]`, unit, from wrong to right, in the order of `layers`.
        accuracy: `[n_layers]`, share of pairs whose right statement projects higher than the wrong one: validation pairs, or
            training pairs if there are none (`meta.config["accuracy_on"]`).
        sigma: `[n_layers]`, standard deviation of the training statements' projections, in units of h.
        meta: provenance.
    """

    layers: tuple[int, ...]
    directions: Float32[Tensor, "n_layers d_model"]
    accuracy: Float32[Tensor, " n_layers"]
    sigma: Float32[Tensor, " n_layers"]
    meta: AdapterMeta

    def top_layers(self, k: int) -> tuple[int, ...]:
        """The `k` layers of highest accuracy, best first; ties go to the earlier layer.

        Raises:
            InputError: `k` below 1 or above the number of layers.
        """
        check_whole(1, len(self.layers), k=k)
        order = torch.argsort(self.accuracy, descending=True, stable=True).tolist()
        return tuple(self.layers[i] for i in order[:k])

    def repe(
        self,
        layers: Iterable[int],
        *,
        coefficient: float,
        positions: str | Positions = ALL,
        relative: bool = False,
    ) -> RepE:
        """Make the intervention that adds these directions at chosen layers; with `relative`, in units of each layer's sigma.

        Raises:
            InputError: a layer without a vector, no layer, or as in `RepE`.
        """
        chosen = tuple(layers_of(layers))
        for layer in chosen:
            if layer not in self.layers:
                raise InputError(f"no vector for layer {layer}; the layers are {', '.join(map(str, self.layers))}")
        rows = [self.layers.index(layer) for layer in chosen]
        assert self.meta.model is not None
        return RepE(
            self.directions[rows], chosen, n_layers=self.meta.model.n_layers, coefficient=coefficient,
            scale=self.sigma[rows], relative=relative, positions=positions, meta=copy.deepcopy(self.meta),
        )  # fmt: skip

    def __repr__(self) -> str:
        best = self.top_layers(1)[0]
        at = self.layers.index(best)
        of = f"{self.meta.config['pairs']} pairs{f' of {self.meta.task}' if self.meta.task else ''}"
        shown = f"best layer {best} ({self.accuracy[at]:.3f} of {self.meta.config['accuracy_on']} pairs)"
        return wrapped(f"ReadingVectors({self.meta.config['reading']}, {of}, {len(self.layers)} layers, {shown})")


def reading_vectors(
    model: Any,
    source: Task | str | Sequence[tuple[str, str]],
    *,
    method: Method = "pca",
    layers: Iterable[int] | None = None,
    seed: int = 42,
    n_train: int | None = None,
    progress: bool = True,
) -> ReadingVectors:
    """Reading vectors of a task's right and wrong statements, or of pairs of texts.

    Args:
        model: any HookedTransformer or TransformerBridge; attached interventions stay active.
        source: a task (the first right and the first wrong statement of each drawn row, see `tasks.statements`; accuracy on those
            of its validation split), or (right text, wrong text) pairs (accuracy on the same pairs).
        method: `"pca"` or `"mean_difference"`; see `reading_vector`.
        layers: which layers; None = all.
        seed: seed of the draw of rows and wrong answers, and of the differences whose sign is flipped.
        n_train: number of rows drawn, for a task; None = the task's own.
        progress: show a bar.

    Raises:
        InputError: unknown method, a layer outside the model, `n_train` with pairs of texts, or no training rows.
        DataError: too few pairs, a text longer than the context, or statements that do not differ at some layer.
        ModelError: a residual stream that cannot be read.
    """
    backend_of(model)
    check_one_of("method", method, METHODS)
    check_seed(seed)
    if isinstance(source, Task | str | Path):
        source = task_of(source).asked_of(model)
        train, val = _task_pairs(model, source, n_train, seed)
        name, data_hash = source.name, source.data_hash
    else:
        if n_train is not None:
            raise InputError("n_train draws rows of a task; for pairs of texts, omit it and give the pairs to use")
        tokenizer, source = tokenizer_of(model), _pairs_of_texts(source)
        train, val = [(encode(tokenizer, right), encode(tokenizer, wrong)) for right, wrong in source], []
        name, data_hash = "", io.digest([list(pair) for pair in source])
    if len(train) < 2:
        raise DataError(f"{name or 'the list'} has {len(train)} pairs of a right and a wrong text; give at least two")
    meta = AdapterMeta(
        model_info(model), name, data_hash, seed,
        {"reading": method, "pairs": len(train), "accuracy_on": "validation" if val else "training"},
        io.environment(), n_train=len(train), attached=attached_to(model, f"reading vectors {name}".strip()),
    )  # fmt: skip
    sequences = [ids for listed in (train, val) for side in (0, 1) for ids in (pair[side] for pair in listed)]
    directions, accuracy, sigma = [], [], []
    with record(model, sequences, what="resid", layers=layers, progress=progress, label="read") as found:
        for layer in found.layers:
            values = np.asarray(found.layer(layer), dtype=np.float64)
            right, wrong, right_val, wrong_val = np.split(values, np.cumsum([len(train), len(train), len(val)]))
            try:
                direction = reading_vector(right - wrong, method, seed=seed)
            except DataError as e:
                raise DataError(f"layer {layer}: {e}") from e
            tested = (right_val - wrong_val) if val else (right - wrong)
            directions.append(direction)
            accuracy.append(np.mean(tested @ direction > 0))
            sigma.append(np.std(values[: 2 * len(train)] @ direction))
        listed = found.layers
    to_tensor = lambda listed: torch.tensor(np.array(listed), dtype=torch.float32)  # noqa: E731
    return ReadingVectors(
        listed, to_tensor(directions).to(device_of(model)), to_tensor(accuracy), to_tensor(sigma), meta
    )


def _pairs_of_texts(source: Any) -> list[tuple[str, str]]:
    listed: list[Any] = list(source) if isinstance(source, Sequence) else [source]
    for pair in listed:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"source holds {shown(pair)}; give a task, or pairs (right text, wrong text)")
    return [(right, wrong) for right, wrong in listed]


def _task_pairs(
    model: Any, task: Task, n_train: int | None, seed: int
) -> tuple[list[tuple[Ids, Ids]], list[tuple[Ids, Ids]]]:
    """Ids of right and wrong statements, of the training split and of the validation split."""
    listed = statements(task, "train", n=n_train, seed=seed)
    tested: tuple[Statement, ...] = ()
    if task.training.get("val"):
        try:
            tested = statements(task, "val", seed=seed)
        except DataError as e:
            log.warning("no validation pairs, so accuracy is on the training pairs: %s", e)
    return _ids(model, listed), _ids(model, tested)


def _ids(model: Any, listed: Sequence[Statement]) -> list[tuple[Ids, Ids]]:
    found = pairs(listed)
    right, wrong = (statement_ids(model, [pair[side] for pair in found]) for side in (0, 1))
    return list(zip(right, wrong, strict=True))
