"""ITI's probes: which heads tell true statements from false ones, and along which direction (arXiv 2306.03341, section 3).

1. Statements: a question with one of its answers, labeled right or wrong; z of every head at the last token. In ITI's data
   and by default that token is a full stop, in LoFiT's files the answer's last word (`full_stop`).
2. One logistic regression per head, fitted on the training questions; its accuracy on the validation questions ranks the head.
   Heads of equal accuracy are ranked by the area under the ROC curve (the paper does not say): if one label is rare, most probes
   always predict the other, and all of these have the same accuracy.
3. Directions for the shift, over both: mass mean (right minus wrong), the probe's weights, or random; sigma along each.

`Probes.iti` shifts the best heads along these directions.
"""

import importlib.metadata
import logging
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_one_of, check_whole, given
from lofit_lens.errors import DataError
from lofit_lens.heads import Heads, HeadScores, HeadSet
from lofit_lens.html import wrapped
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.interventions.iti import ALPHA, ITI
from lofit_lens.models import Positions, attached_to, device_of, model_info, tokenizer_of
from lofit_lens.probing.directions import mass_mean_direction, random_directions, spread, unit
from lofit_lens.probing.record import MEMORY_LIMIT, TOKEN_BUDGET, record, statement_ids
from lofit_lens.progress import tqdm
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.registry import task_of
from lofit_lens.tasks.statements import Statement, statements

Direction = Literal["mass_mean", "probe", "random"]
DIRECTIONS = ("mass_mean", "probe", "random")
HELD_OUT = 5  # one question in five is held out if a task has no validation rows
SERIAL = 10**8  # numbers to fit on; below this, starting other processes takes longer than it saves
MOST_JOBS = 8  # processes, each of which holds its own PyTorch
TIE = 1e-6  # weight of the AUC in the score: less than one statement's share of the accuracy

log = logging.getLogger(__name__)


class LayerProbes(NamedTuple):
    """Results of one layer: validation scores, and directions and sigma in the order of `DIRECTIONS`."""

    accuracy: Float[np.ndarray, " n_heads"]
    balanced: Float[np.ndarray, " n_heads"]
    auc: Float[np.ndarray, " n_heads"]
    directions: Float[np.ndarray, "kinds n_heads d_head"]
    sigma: Float[np.ndarray, "kinds n_heads"]
    unconverged: int

    @property
    def score(self) -> Float[np.ndarray, " n_heads"]:
        """The score that ranks heads: accuracy, with ties broken by AUC."""
        return self.accuracy - TIE * (1 - self.auc)


def fit_layer(
    z: Float[np.ndarray, "n n_heads d_head"],
    right: Bool[np.ndarray, " n"],
    fitting: Bool[np.ndarray, " n"],
    drawn: Float[np.ndarray, "n_heads d_head"],
    *,
    seed: int,
    max_iter: int,
) -> LayerProbes:
    """Fit a probe for every head of one layer, score it on the other statements, and find directions over all statements.

    Args:
        z: last-token values of all statements.
        right: labels.
        fitting: True for statements to fit on, False for those to validate on; both sides need both labels.
        drawn: the random directions.
        seed: scikit-learn's `random_state`.
        max_iter: limit of its solver's steps.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    truth, n_heads, unconverged = right[~fitting], z.shape[1], 0
    margins, found, sizes = np.zeros((len(truth), n_heads)), np.zeros((3, *drawn.shape)), np.zeros((3, n_heads))
    # One thread: such small products gain nothing from more, and another order of summation would change the numbers.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for head in range(n_heads):
            own = np.array(z[:, head], dtype=np.float64)
            probe = LogisticRegression(max_iter=max_iter, random_state=seed).fit(own[fitting], right[fitting])
            unconverged += int(probe.n_iter_[0] >= max_iter)
            margins[:, head] = probe.decision_function(own[~fitting])
            mean = mass_mean_direction(own[right], own[~right])
            found[:, head] = unit(np.stack([mean, probe.coef_[0], drawn[head]]))
            sizes[:, head] = spread(own, found[:, head])
    hits = (margins > 0) == truth[:, None]
    balanced = (hits[truth].mean(axis=0) + hits[~truth].mean(axis=0)) / 2
    return LayerProbes(hits.mean(axis=0), balanced, auc(margins, truth), found, sizes, unconverged)


def auc(margins: Float[np.ndarray, "n n_heads"], right: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n_heads"]:
    """Area under the ROC curve: the share of (right, wrong) pairs in which the right one has the larger margin (ties: half)."""
    n_right = int(right.sum())
    ranks = scipy.stats.rankdata(margins, axis=0)[right].sum(axis=0)
    return (ranks - n_right * (n_right + 1) / 2) / (n_right * (len(right) - n_right))


@dataclass(frozen=True, eq=False)
class Probes:
    """A probe of truth for every head.

    Attributes:
        scores: accuracy on the validation statements (kind "probe accuracy"), minus a millionth of (1 - AUC), so that heads of
            equal accuracy are ranked by AUC. `.meta["majority"]` is the accuracy of always predicting the more frequent label.
        balanced: mean of the accuracies on right and on wrong validation statements; chance is 0.5 whatever their numbers.
        auc: share of (right, wrong) pairs of validation statements that the probe orders correctly; ties count half.
        directions: kind -> `[n_layers, n_heads, d_head]` float32, of norm 1, from wrong to right (zero if a head has none).
        sigmas: kind -> `[n_layers, n_heads]` float32, standard deviation of all statements' projections, in units of z.
        meta: provenance.
    """

    scores: HeadScores
    balanced: HeadScores
    auc: HeadScores
    directions: Mapping[str, Tensor]
    sigmas: Mapping[str, Tensor]
    meta: AdapterMeta

    def direction(self, kind: Direction = "mass_mean") -> Float[Tensor, "n_layers n_heads d_head"]:
        """Every head's direction of one kind.

        Raises:
            InputError: unknown kind.
        """
        return self.directions[_known(kind)]

    def sigma(self, kind: Direction = "mass_mean") -> Float[Tensor, "n_layers n_heads"]:
        """Standard deviation along every head's direction of one kind, in units of z.

        Raises:
            InputError: unknown kind.
        """
        return self.sigmas[_known(kind)]

    def iti(
        self,
        heads: int | Heads,
        *,
        alpha: float = ALPHA,
        direction: Direction = "mass_mean",
        positions: str | Positions = "answer",
    ) -> ITI:
        """Make the intervention that shifts chosen heads by alpha sigmas along their directions.

        Args:
            heads: the heads, or a number K: those with the most accurate probes (48 in the paper).
            alpha: strength.
            direction: `"mass_mean"` (the paper's best), `"probe"` or `"random"`.
            positions: the edited positions; see `models.Positions`.

        Raises:
            InputError: K or a head outside the model, no head, unknown direction or positions, or an alpha that is not finite.
        """
        chosen = self.scores.top(heads) if isinstance(heads, int) else HeadSet.of(heads)
        chosen.check(self.scores.shape)
        unit_vectors, sigma = self.direction(direction), self.sigma(direction)
        rows = [h.layer for h in chosen], [h.head for h in chosen]
        n_layers, n_heads = self.scores.shape
        meta = replace(self.meta, config={**self.meta.config, "direction": direction})
        return ITI(
            (n_layers, n_heads, unit_vectors.shape[2]), chosen, directions=unit_vectors[rows], sigma=sigma[rows],
            alpha=alpha, positions=positions, meta=meta,
        )  # fmt: skip

    def __repr__(self) -> str:
        best, meta = self.scores.top(1), self.scores.meta
        return wrapped(
            f"Probes({self.scores.model}, {self.scores.task}: {self.scores.shape[0]}x{self.scores.shape[1]} heads, best {best} "
            f"{self.scores[best[0]]:.3f} of {meta['n_validation']} statements, majority {meta['majority']:.3f})"
        )


def fit_probes(
    model: Any,
    task: Task | str,
    *,
    seed: int = 42,
    n_train: int | None = None,
    max_iter: int = 1000,
    full_stop: bool | None = None,
    n_jobs: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    memory_limit: int = MEMORY_LIMIT,
    progress: bool = True,
) -> Probes:
    """Probe every head on a task's true and false statements.

    Probes are fitted on the statements of the drawn training rows and validated on those of the validation rows (ITI: four
    fifths and one fifth of the development questions). If a task has no validation statements, one training row in five is held
    out, drawn by the seed. Attached interventions stay active.

    Args:
        model: any HookedTransformer or TransformerBridge; it is left unchanged.
        task: a task with training rows; see `tasks.statements`.
        seed: seed of the draw of rows and wrong answers, the held-out rows, the probes and the random directions.
        n_train: training rows drawn; None = the task's own number.
        max_iter: limit of the solver's steps; `scores.meta["unconverged"]` counts the probes that reach it.
        full_stop: whether statements end with a full stop: True as in ITI's data, False as in the files that come with LoFiT,
            None (the default) as the task writes them (on TruthfulQA with one). z is read at the last token. With a full stop
            that is the same token in all statements, after a whole sentence. Without one it is the answer's last word, which
            distinguishes answers by their topic.
        n_jobs: number of processes; None = one for small work, up to 8 for large. The result is the same.
        token_budget: padded tokens of one forward pass.
        memory_limit: bytes of activations in memory; larger ones go to a temporary file.
        progress: show bars.

    Raises:
        InputError: no training rows, `n_train` outside them, or a number below 1.
        DataError: too few rows to hold one out, statements with only one label or longer than the context, or answers that end
            with an unknown token once they have a full stop.
        ModelError: heads that cannot be reached, or activations that are NaN or infinite.
    """
    info, task = model_info(model), task_of(task).asked_of(model)
    check_whole(1, max_iter=max_iter, **given(n_jobs=n_jobs))
    listed, right, fitting, held_out = labeled(task, n_train, seed, full_stop)
    n_fitting, attached = int(fitting.sum()), attached_to(model, f"probe heads {task.name}")
    ids, unknown = statement_ids(model, listed), tokenizer_of(model).unk_token_id
    if (
        full_stop
        and unknown is not None
        and (odd := [s.answer for s, i in zip(listed, ids, strict=True) if i[-1] == unknown])
    ):
        raise DataError(
            f"{task.name}: {len(odd)} answers, e.g. {odd[0]!r}, end with a token that this tokenizer does not know once they "
            "have a full stop, so nothing can be read there; use full_stop=None or False"
        )
    with record(
        model, ids, what="z", token_budget=token_budget, memory_limit=memory_limit,
        progress=progress, label="record z",
    ) as z:  # fmt: skip
        n_heads, d_head = z.layer(z.layers[0]).shape[1:]
        drawn = random_directions((info.n_layers, n_heads, d_head), seed=seed)
        work = ((z.layer(n), right, fitting, drawn[n], seed, max_iter) for n in z.layers)
        size = n_fitting * info.grid.n_total * d_head
        found = list(tqdm(
            _each(work, _jobs(n_jobs, size, len(z.layers))), total=len(z.layers), desc="fit probes", disable=not progress,
            unit="layer",
        ))  # fmt: skip
    n_rows = len({s.row for s in listed[:n_fitting]})
    how = {"max_iter": max_iter, **given(full_stop=full_stop)}
    meta = AdapterMeta(
        info, task.name, task.data_hash, seed,
        {"n_fitting": n_fitting, "n_validation": len(listed) - n_fitting, "held_out": held_out, **how},
        {**io.environment(), "scikit-learn": importlib.metadata.version("scikit-learn")}, n_train=n_rows,
        attached=attached,
    )  # fmt: skip
    record_of = {
        "step": "head selection", "model": info.to_dict(), "task": task.name, "data_hash": task.data_hash, "n_train": n_rows,
        "seed": seed, "config": how, "n_fitting": n_fitting, "n_validation": len(listed) - n_fitting,
        "held_out": held_out, "majority": float(max(right[~fitting].mean(), 1 - right[~fitting].mean())),
        "unconverged": sum(f.unconverged for f in found), "versions": meta.versions, "attached": attached,
    }  # fmt: skip

    def at_layers(values: Sequence[np.ndarray]) -> np.ndarray:
        """One entry for every layer of the model, zero if a layer has no heads."""
        whole = np.zeros((info.n_layers, *values[0].shape))
        whole[list(z.layers)] = values
        return whole

    def scores(kind: str, values: Sequence[np.ndarray]) -> HeadScores:
        return HeadScores(at_layers(values), kind, info.name, task.name, record_of, info.head_layers)

    def stacked(values: Sequence[np.ndarray]) -> Tensor:
        return torch.tensor(at_layers(values), dtype=torch.float32, device=device_of(model))

    return Probes(
        scores("probe accuracy", [f.score for f in found]),
        scores("probe balanced accuracy", [f.balanced for f in found]), scores("probe AUC", [f.auc for f in found]),
        {kind: stacked([f.directions[i] for f in found]) for i, kind in enumerate(DIRECTIONS)},
        {kind: stacked([f.sigma[i] for f in found]) for i, kind in enumerate(DIRECTIONS)}, meta,
    )  # fmt: skip


def probe_heads(
    model: Any,
    task: Task | str,
    *,
    seed: int = 42,
    n_train: int | None = None,
    max_iter: int = 1000,
    full_stop: bool | None = None,
    n_jobs: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """Validation accuracy of every head's probe; arguments and errors as in `fit_probes`, which also returns the directions.

    Returns:
        Scores `[n_layers, n_heads]`; `.top(k)` gives the heads, with ties in accuracy broken by AUC (see `Probes.scores`).
    """
    return fit_probes(
        model,
        task,
        seed=seed,
        n_train=n_train,
        max_iter=max_iter,
        full_stop=full_stop,
        n_jobs=n_jobs,
        progress=progress,
    ).scores


def _known(kind: str) -> str:
    check_one_of("direction", kind, DIRECTIONS)
    return kind


def labeled(
    task: Task, n_train: int | None, seed: int, full_stop: bool | None = None
) -> tuple[tuple[Statement, ...], Bool[np.ndarray, " n"], Bool[np.ndarray, " n"], int]:
    """A task's statements, their labels, a mask of those to fit on (which come first), and the number of held-out rows.

    See `fit_probes`.

    Raises:
        InputError: no training rows, or `n_train` outside them.
        DataError: too few rows to hold one out, or statements with only one label.
    """
    fit, val, held_out = _split(task, n_train, seed, full_stop)
    right = np.array([s.right for s in (*fit, *val)])
    fitting = np.arange(len(right)) < len(fit)
    for what, labels in (("training", right[fitting]), ("validation", right[~fitting])):
        if labels.all() or not labels.any():
            raise DataError(f"{task.name}: all {len(labels)} {what} statements are {'right' if labels[0] else 'wrong'}")
    return (*fit, *val), right, fitting, held_out


def _split(
    task: Task, n_train: int | None, seed: int, full_stop: bool | None
) -> tuple[tuple[Statement, ...], tuple[Statement, ...], int]:
    """Statements to fit on, statements to validate on, and the number of training rows that were held out for the latter."""
    train = statements(task, "train", n=n_train, seed=seed, full_stop=full_stop)
    if task.training.get("val"):
        try:
            return train, statements(task, "val", seed=seed, full_stop=full_stop), 0
        except DataError as e:
            log.warning("validating on held-out training rows: %s", e)
    rows = list(dict.fromkeys(s.row for s in train))
    if len(rows) < 2:
        raise DataError(f"{task.name} has one training row and no validation rows; give at least two rows")
    out = set(random.Random(seed).sample(rows, max(1, len(rows) // HELD_OUT)))
    kept = tuple(s for s in train if s.row not in out)
    return kept, tuple(s for s in train if s.row in out), len(out)


def _jobs(n_jobs: int | None, size: int, n_layers: int) -> int:
    """Number of processes: as requested, or one for small work; never more than there are layers."""
    if n_jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        n_jobs = 1 if size < SERIAL else min(cores, MOST_JOBS)
    return min(n_jobs, n_layers)


def _each(work: Iterable[tuple[Any, ...]], n_jobs: int) -> Iterator[LayerProbes]:
    """Run `fit_layer` on each layer, in order."""
    if n_jobs == 1:
        return (fit_layer(*job[:4], seed=job[4], max_iter=job[5]) for job in work)
    parallel: Any = Parallel(n_jobs=n_jobs, return_as="generator")
    return parallel(delayed(fit_layer)(*job[:4], seed=job[4], max_iter=job[5]) for job in work)
