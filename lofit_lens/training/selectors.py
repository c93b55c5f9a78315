"""Ways to choose heads besides the A-norm of step 1 (arXiv 2406.01563, Table 2): each scores every head of a model.

| name | a head's score |
|---|---|
| A-norm | L2 norm of its learned scaling A (`select_heads`) |
| bias norm | L2 norm of its learned offset v, trained on every head at once |
| probe accuracy | validation accuracy of a true/false probe on its z (ITI) |
| probing layers | rank of its layer by the accuracy of one probe on all the layer's z, then its own probe accuracy |
| gradient attribution | mean over examples of abs(sum over positions of z . dLoss/dz) |
| activation patching | mean gain of the right answer's log-prob with its z from few-shot prompts |
| JoLA gates | sum of its two gates, learned together with the edits (`jola_scores`) |
| random | place in a random order |

All have the signature of `Selector`, so that `SELECTORS[name](model, task, seed=0).top(k)` can go to `tune_offsets`.
"""

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float64
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_is, check_number, check_seed, check_whole
from lofit_lens.errors import InputError
from lofit_lens.heads import Heads, HeadScores
from lofit_lens.interventions.lofit import Component
from lofit_lens.models import (
    attached_to,
    backend_of,
    device_of,
    frozen,
    head_size,
    hook_z,
    hooked,
    model_info,
    not_finite,
    tokenizer_of,
)
from lofit_lens.probing import probe_heads, probe_layers, record
from lofit_lens.progress import tqdm
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import encode_training
from lofit_lens.tasks.registry import task_of
from lofit_lens.training.config import TrainConfig
from lofit_lens.training.jola import jola_scores
from lofit_lens.training.lofit import learned_scores, select_heads, tune_offsets
from lofit_lens.training.loop import OnStep, check_gradients
from lofit_lens.training.objective import task_loss
from lofit_lens.training.patching import AnswerLogProbs, answer_rows, few_shot_prompts, patch_effects, replace_head


@runtime_checkable
class Selector(Protocol):
    """A function that scores every head of a model for a task; larger = chosen earlier. The model is left as it was."""

    def __call__(
        self, model: Any, task: Task | str, *, seed: int = 42, n_train: int | None = None, progress: bool = True
    ) -> HeadScores:
        """Return scores `[n_layers, n_heads]`; `n_train` examples are drawn by `seed` (None = the task's own number)."""
        ...


def random_scores(
    model: Any, task: Task | str, *, seed: int = 42, n_train: int | None = None, progress: bool = True
) -> HeadScores:
    """Score heads in a random order, so that `.top(k)` is a uniform draw of k heads without replacement.

    Scores are n, n - 1, ..., 1 in the order into which `random.Random(seed)` shuffles the n heads: the same on every machine and
    for every task. (`HeadSet.random` draws differently.) No example is used, and it returns at once:
    `n_train` and `progress` are there because every selector has them.
    """
    info, task = model_info(model), task_of(task)
    check_seed(seed)
    order = list(range(info.grid.n_total))
    random.Random(seed).shuffle(order)
    values = torch.zeros(len(order), dtype=torch.float64)
    values[order] = torch.arange(len(order), 0, -1, dtype=torch.float64)
    scores = torch.zeros(info.grid, dtype=torch.float64)
    scores[list(info.grid.layers)] = rearrange(values, "(layer head) -> layer head", head=info.n_heads)
    return _scored(scores, "random", model, task, seed=seed, n_train=0, config={})


def bias_scores(
    model: Any, task: Task | str, *, heads: Heads | None = None, seed: int = 42, config: TrainConfig | None = None,
    n_train: int | None = None, checkpoint: str | Path | None = None, on_step: OnStep | None = None, progress: bool = True,
) -> HeadScores:  # fmt: skip
    """Score heads by the L2 norm of their offset v, when v is trained on every head (or on those given) at once.

    Arguments and errors as in `tune_offsets`; `config=None` uses step 2's preset.
    """
    lofit = tune_offsets(
        model, task, heads, seed=seed, config=config, n_train=n_train, checkpoint=checkpoint, on_step=on_step,
        progress=progress,
    )  # fmt: skip
    return learned_scores(lofit, "v", kind="bias norm")


probe_scores, probing_layers = probe_heads, probe_layers  # see `lofit_lens.probing`

# --------------------------------------------------------------------------------------------------- attribution


def attribution_scores(
    model: Any, task: Task | str, *, seed: int = 42, n_train: int | None = None, batch_size: int = 8, beta: float = 0.5,
    progress: bool = True,
) -> HeadScores:  # fmt: skip
    """Score how much each head's output moves the task's loss, to first order (Michel et al. 2019, arXiv 1905.10650, 4.1).

        I_h = mean over examples x of | dL(x) / da_h |,     z_h -> (1 + a_h) z_h at every position, a_h = 0
            = mean over examples x of | sum over positions and d_head of z_h * dL(x)/dz_h |

    The absolute value is outside the sum over positions (and, for a pair, over its two sequences) and inside the mean over
    examples. L(x), in nats, is an example's summed -log p over its label tokens (SFT), or its DPO loss against the model itself.
    Each batch takes one forward and one backward pass (pairs: one more forward for the reference). Scores do not depend on
    `batch_size` beyond rounding. Michel et al. also divide by the L2 norm over each layer's heads; that is not done here, so that
    heads of different layers can be compared.

    Args:
        model: any HookedTransformer or TransformerBridge; left as it was.
        task: the task whose loss is used.
        seed: seed of the draw of examples.
        n_train: training examples drawn; None = the task's own number.
        batch_size: examples at a time (a DPO pair is one example).
        beta: DPO's inverse temperature; a common factor of all scores.
        progress: show a bar over examples.

    Raises:
        InputError: a batch size below 1, or a beta that is not above 0.
        DataError: a training row longer than the model's context.
        ModelError: heads that cannot be reached, or gradients that are NaN or infinite.
    """
    backend_of(model)
    check_gradients(*model.parameters())
    task = task_of(task)
    check_whole(1, batch_size=batch_size)
    check_number(beta=beta)
    if beta <= 0:
        raise InputError(f"beta is {beta}; it must be above 0 and finite")
    examples = task.training_examples("train", n=n_train, seed=seed)
    attached = attached_to(model, f"gradient attribution {task.name}")
    head_size(model)
    info = model_info(model)
    forms = [encode_training(tokenizer_of(model), e) for e in examples]
    # The batch's loss is a mean over label tokens (SFT) or pairs (DPO).
    weights = [f[0].n_labels if len(f) == 1 else 1 for f in forms]
    total = torch.zeros(info.n_layers, info.n_heads, dtype=torch.float64)
    with frozen(model), tqdm(total=len(examples), desc="attribute", disable=not progress, unit="example") as bar:
        loss_of = task_loss(model, examples, beta=beta, batch_size=batch_size)
        for first in range(0, len(examples), batch_size):
            rows = range(first, min(first + batch_size, len(examples)))
            with _gates(model, len(rows) * len(forms[0])) as gates, torch.enable_grad():
                (slopes,) = torch.autograd.grad(loss_of(rows), gates)
            scale = sum(weights[r] for r in rows)
            per_example = scale * reduce(
                slopes.cpu().double(), "layer (row form) head -> layer row head", "sum", row=len(rows)
            )
            total += per_example.abs().sum(dim=1)
            bar.update(len(rows))
    return _scored(
        total / len(examples), "gradient attribution", model, task, seed=seed, n_train=len(examples),
        config={"batch_size": batch_size, "beta": beta if len(forms[0]) == 2 else None}, attached=attached,
    )  # fmt: skip


@contextlib.contextmanager
def _gates(model: Any, batch: int) -> Any:
    """Scale every head by 1 + a for each sequence; yields a = 0, `[n_layers, batch, n_heads]`, which requires gradients."""
    info = model_info(model)
    gates = torch.zeros(info.n_layers, batch, info.n_heads, device=device_of(model), requires_grad=True)

    def gated(layer: int) -> Any:
        def scale(z: Float[Tensor, "batch pos n_heads d_head"], hook: Any) -> Tensor:
            return (z * (1 + gates[layer].to(z.device)[:, None, :, None])).to(z.dtype)

        return scale

    with contextlib.ExitStack() as stack:
        for layer in info.grid.layers:
            stack.enter_context(hooked(hook_z(model, layer), gated(layer)))
        yield gates


# ------------------------------------------------------------------------------------------------------ patching


def patching_scores(
    model: Any, task: Task | str, *, seed: int = 42, n_train: int | None = None, n_prompts: int = 32, n_shots: int = 10,
    separator: str = "\n\n", batch_size: int = 32, progress: bool = True,
) -> HeadScores:  # fmt: skip
    """Score how much the right answer gains if a head's z comes from few-shot prompts (after Todd et al. 2024, arXiv 2310.15213).

    The donor is each head's z at the last prompt token, averaged over prompts that follow solved training examples. It replaces z
    at the last prompt token of zero-shot prompts, one head at a time. The score is the mean over these prompts of the change of
    the right answer's summed log-prob, in nats; for pairs, of log p(chosen) - log p(rejected).

    Todd et al. (section 2.3, causal mediation) differ: they patch into few-shot prompts with shuffled labels, not zero-shot ones;
    measure the probability of the answer's first token, not the log-prob of all of it; and average over tasks.

    Args:
        model: any HookedTransformer or TransformerBridge; left as it was.
        task: its training rows give prompts and right answers.
        seed: seed of the draw of examples and prompts.
        n_train: training examples to draw from; None = the task's own number.
        n_prompts: measured prompts, and donor prompts; no measured example is in a donor prompt (see `few_shot_prompts`).
        n_shots: solved examples before each donor prompt; fewer if the context is too short.
        separator: text after each solved example.
        batch_size: sequences at a time.
        progress: show bars.

    Raises:
        InputError: a number below 1.
        DataError: too few examples, or prompts that do not fit the context.
        ModelError: heads that cannot be reached, or activations that are NaN or infinite.
    """
    backend_of(model)
    task = task_of(task)
    check_whole(1, n_prompts=n_prompts, n_shots=n_shots, batch_size=batch_size)
    check_is(separator, str, "separator", "a text")
    examples = task.training_examples("train", n=n_train, seed=seed)
    attached = attached_to(model, f"activation patching {task.name}")
    measured, donors, counts = few_shot_prompts(
        model, examples, n_prompts=n_prompts, n_shots=n_shots, separator=separator, seed=seed
    )
    with record(model, donors, what="z", progress=progress, label="donor prompts") as z:
        means = {n: torch.from_numpy(z.layer(n).mean(axis=0, dtype=np.float64)).float() for n in z.layers}
    forms = [answer_rows(tokenizer_of(model), e) for e in measured]
    rows = [f for example in forms for f in example]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    effects = torch.zeros(*model_info(model).grid, len(rows), dtype=torch.float64)
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with frozen(model):
        for number, part in enumerate(parts, start=1):
            effects[:, :, part] = patch_effects(
                model, AnswerLogProbs(model, [rows[i] for i in part]), progress=progress,
                patch=lambda head: replace_head(head.head, means[head.layer][head.head], at=0),
                label=f"patch heads {number}/{len(parts)}",
            )  # fmt: skip
    per_example = rearrange(effects, "layer head (row form) -> layer head row form", form=len(forms[0]))
    gains = per_example[..., 0] - per_example[..., 1] if len(forms[0]) == 2 else per_example[..., 0]
    settings = {
        "n_prompts": len(measured), "n_donors": len(donors), "n_shots": n_shots, "shots": [min(counts), max(counts)],
        "separator": separator, "batch_size": batch_size,
    }  # fmt: skip
    return _scored(
        gains.mean(dim=-1),
        "activation patching",
        model,
        task,
        seed=seed,
        n_train=len(examples),
        config=settings,
        attached=attached,
    )


def register_selector(name: str, select: Selector) -> None:
    """Register your own selector under a name, for `compare_selectors`, grids and `lofit-lens select --by`.

    Raises:
        InputError: the library has a selector of that name.
    """
    if name in _LIBRARY:
        raise InputError(f"the library has a selector {name!r} already; give yours another name")
    SELECTORS[name] = select


def _scored(
    values: Float64[Tensor, "n_layers n_heads"], kind: str, model: Any, task: Task, *, seed: int, n_train: int,
    config: dict[str, Any], attached: Sequence[str] = (),
) -> HeadScores:  # fmt: skip
    info, task = model_info(model), task.asked_of(model)
    if not values.isfinite().all():
        raise not_finite(model, f"scores by {kind}")
    return HeadScores(values, kind, info.name, task.name, layers=info.head_layers, meta={
        "step": "head selection", "model": info.to_dict(), "task": task.name, "data_hash": task.data_hash,
        "n_train": n_train, "seed": seed, "config": config, "versions": io.environment(), "attached": list(attached),
    })  # fmt: skip


LEARNED: dict[str, Component] = {
    "A-norm": "A",
    "bias norm": "v",
}  # selectors that train, with what they train on every head
SELECTORS: dict[str, Selector] = {
    "A-norm": select_heads,
    "bias norm": bias_scores,
    "probe accuracy": probe_scores,
    "probing layers": probing_layers,
    "gradient attribution": attribution_scores,
    "activation patching": patching_scores,
    "JoLA gates": jola_scores,
    "random": random_scores,
}
_LIBRARY = tuple(SELECTORS)
