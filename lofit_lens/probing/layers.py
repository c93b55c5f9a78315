"""One probe per layer: which layers tell true statements from false ones (LoFiT, arXiv 2406.01563, Table 2: 'probing layers').

The paper does not spell this baseline out. Here, each layer gets one logistic regression on the concatenated z of its heads,
fitted and validated like ITI's probes (`probes.fit_probes`). All heads of the layer with the highest validation accuracy come
first, then those of the next. Within a layer (this matters if K ends inside one), heads are ordered by their own probe's
accuracy.
"""

import importlib.metadata
from typing import Any

import numpy as np
from einops import rearrange

from lofit_lens import io
from lofit_lens.heads import HeadScores
from lofit_lens.models import attached_to, model_info
from lofit_lens.probing.probes import _each, _jobs, labeled
from lofit_lens.probing.record import record, statement_ids
from lofit_lens.progress import tqdm
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.registry import task_of

MAX_ITER = 1000  # limit of the solver's steps, as in `fit_probes`


def probe_layers(
    model: Any,
    task: Task | str,
    *,
    seed: int = 42,
    n_train: int | None = None,
    progress: bool = True,
) -> HeadScores:
    """Rank heads layer by layer, the best-probed layer first; statements, arguments and errors as in `probe_heads`.

    Returns:
        Scores `[n_layers, n_heads]`: (layers with heads - rank of the head's layer, from 0) + half the score of its own probe.
        AUC breaks ties in accuracy, for layers as for heads. `.meta["layer_accuracy"]` holds the accuracy of each layer
        that has heads.
    """
    info, task = model_info(model), task_of(task).asked_of(model)
    listed, right, fitting, held_out = labeled(task, n_train, seed)
    n, n_fitting = len(listed), int(fitting.sum())
    attached = attached_to(model, f"probe layers {task.name}")
    with record(model, statement_ids(model, listed), what="z", progress=progress, label="record z") as z:
        # A whole layer is fitted as one head of its width; its directions are not used.
        views = (v for i in z.layers for v in (z.layer(i), rearrange(z.layer(i), "n head d -> n 1 (head d)")))
        work = ((v, right, fitting, np.zeros(v.shape[1:]), seed, MAX_ITER) for v in views)
        size, n_layers = 2 * n_fitting * z.layer(z.layers[0])[0].size * len(z.layers), len(z.layers)
        fits = _each(work, _jobs(None, size, n_layers))
        found = list(tqdm(fits, total=2 * n_layers, desc="fit layers' probes", disable=not progress, unit="fit"))
    own, whole = np.stack([f.score for f in found[::2]]), np.array([f.score[0] for f in found[1::2]])
    place = np.argsort(np.argsort(-whole, kind="stable"))
    scores = np.zeros(info.grid)
    scores[list(z.layers)] = n_layers - place[:, None] + own / 2
    return HeadScores(scores, "probing layers", info.name, task.name, layers=info.head_layers, meta={
        "step": "head selection", "model": info.to_dict(), "task": task.name, "data_hash": task.data_hash,
        "n_train": len({s.row for s in listed[:n_fitting]}), "seed": seed, "config": {"max_iter": MAX_ITER},
        "n_fitting": n_fitting, "n_validation": n - n_fitting, "held_out": held_out,
        "layer_accuracy": [float(f.accuracy[0]) for f in found[1::2]],
        "unconverged": sum(f.unconverged for f in found), "attached": attached,
        "versions": {**io.environment(), "scikit-learn": importlib.metadata.version("scikit-learn")},
    })  # fmt: skip
