"""JoLA: learn which heads to edit, and whether to scale or shift them, together with the edits (arXiv 2502.01179, ICML 2025).

    z <- (1 + g_A A) z + g_v v                     two hard-concrete gates per head, g_A and g_v, from the numbers phi

    in training     g = clip(1.2 sigmoid((logit(u) + phi) / 0.33) - 0.1, 0, 1)     u uniform, redrawn in each step
    afterwards      g = clip(1.2 sigmoid(phi) - 0.1, 0, 1)
    penalty         [lambda P(phi_v) + (1 - lambda) P(phi_A)] / heads,   lambda = 0.1 exp(-0.01 t) after t steps
                    P = sum over layers of the mean over heads of sigmoid(phi - 0.33 log(0.1 / 1.1))

After fitting, it is a LoFiT adapter: A' = g_A A and v' = g_v v. As in the authors' code (github.com/wenlai-lavine/jola, commit
e2b73ce), u is drawn once per head, gate and step, u <- (1 - 2e-6) u + 1e-6, and P's sigmoid is kept within [1e-6, 1 - 1e-6].
Training is tested against recorded numbers of that code (`tests/test_jola_official.py`).

The training around the method differs:

- The base model is fully frozen. The authors' code freezes everything below the unembedding, and trains the unembedding too.
- The last step is kept. They keep the epoch with the lowest penalized validation loss, and stop after two epochs without a lower.
- lambda falls only with training steps; in their code each validation batch lowers it too.
- Answers are learned with the end token, and prompts are the task's own.
- Rotary embeddings are the model's own. Theirs for Llama have base 10,000 and no scaling, whatever the model's config says.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lofit_lens.checks import check_seed
from lofit_lens.heads import HeadScores, HeadSet, check_shape
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.lofit import Lofit, edit_z
from lofit_lens.models import ModelInfo, model_info
from lofit_lens.tasks.base import Task
from lofit_lens.training.config import TrainConfig
from lofit_lens.training.fitting import fit
from lofit_lens.training.lofit import record_of
from lofit_lens.training.loop import OnStep

TEMPERATURE, LOW, HIGH, EPS = 0.33, -0.1, 1.1, 1e-6
WEIGHT, DECAY = 0.1, 0.01  # lambda = WEIGHT exp(-DECAY t)
CONFIG = TrainConfig(lr=5e-3, epochs=20, l1=1.0, schedule="cosine", warmup_steps=50)
ON_ORGANISM = 5e-2  # learning rate on the embedded model, whose steps are few
TIE = 1e-6  # weight of the gated norm in the score, to rank heads with equal gates


def jola_config(info: ModelInfo) -> TrainConfig:
    """Return settings to start from: the authors', with a larger learning rate on the embedded model."""
    return CONFIG.with_changes(lr=ON_ORGANISM, warmup_steps=10) if info.name == "organism" else CONFIG


def gate(phi: Float[Tensor, "*any"], u: Float[Tensor, "*any"] | None = None) -> Float[Tensor, "*any"]:
    """Compute gates in [0, 1]: with noise u in (0, 1) those of training, without it those after training.

    Examples:
        >>> gate(torch.tensor([-10.0, 0.0, 10.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    x = phi if u is None else (torch.logit((1 - 2 * EPS) * u + EPS) + phi) / TEMPERATURE
    return (torch.sigmoid(x) * (HIGH - LOW) + LOW).clamp(0, 1)


def penalty(phi: Float[Tensor, "layers heads"]) -> Float[Tensor, ""]:
    """Compute how likely gates are open: the mean over a layer's heads, summed over layers."""
    return torch.sigmoid(phi - TEMPERATURE * math.log(-LOW / HIGH)).clamp(EPS, 1 - EPS).mean(dim=1).sum()


class Gated(Lofit):
    """LoFiT on every head with a gate on A and one on v; it exists only during training.

    Attributes:
        phi: `[2, n_layers, n_heads]`, of the gates on A and on v.
    """

    def __init__(self, shape: tuple[int, int, int], heads: HeadSet, meta: AdapterMeta | None = None) -> None:
        super().__init__(shape, heads, meta)
        self.phi = nn.Parameter(torch.zeros(2, *self.shape[:2]))
        self.seed, self.done, self.u = 0, 0, torch.zeros(2, *self.shape[:2])

    @torch.no_grad()
    def start_(self, seed: int, std: float) -> "Gated":
        """Draw A, v ~ N(0, std^2) and phi ~ U(-a, a), a = sqrt(6 / (1 + heads)), as Xavier for [heads, 1]; all are trainable."""
        check_seed(seed)
        generator, self.seed = torch.Generator().manual_seed(seed), seed
        for part in (self.A, self.v):
            part.copy_(torch.randn(part.shape, generator=generator) * std)
        bound = math.sqrt(6 / (1 + self.shape[1]))
        self.phi.copy_((2 * torch.rand(self.phi.shape, generator=generator) - 1) * bound)
        for part in (self.A, self.v, self.phi):
            part.requires_grad_(True)
        return self

    def begin_step(self, done: int) -> None:
        """Draw the noise of the next step: the same for all its passes, and again after a resume."""
        self.done = done
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done + 1)
        self.u = torch.rand(self.phi.shape, generator=generator).to(self.phi.device)

    def penalty(self) -> Tensor:
        """Return the penalty of the current step; layers without heads are left out."""
        grid = check_shape(self.heads.shape)
        weight = WEIGHT * math.exp(-DECAY * self.done)
        of_A, of_v = (penalty(phi[list(grid.layers)]) for phi in self.phi)
        return (weight * of_v + (1 - weight) * of_A) / grid.n_total

    def _edit(self, layer: int) -> Edit:
        def edit(z: Tensor) -> Tensor:
            g = gate(self.phi[:, layer], self.u[:, layer])[..., None]
            return edit_z(z, (g[0] * self.A[layer]).to(z.device), (g[1] * self.v[layer]).to(z.device))

        return edit

    @torch.no_grad()
    def fitted(self) -> tuple[Lofit, HeadScores]:
        """Return the LoFiT adapter of the heads with an open gate, and every head's score: g_A + g_v.

        Heads with equal gates are ranked by the norm of what the gates let through.
        """
        g = gate(self.phi)
        A, v = g[0][..., None] * self.A, g[1][..., None] * self.v
        norms = torch.cat([A, v], dim=-1).norm(dim=-1)
        info, grid = self.meta.model, check_shape(self.heads.shape)
        scores = HeadScores(
            g.sum(dim=0) + TIE * norms / norms.max().clamp(min=1e-30), "JoLA gates", info.name if info else "", self.meta.task,
            {**record_of(self.meta), "open": {name: int((of > 0).sum()) for name, of in zip("Av", g, strict=True)}},
            grid.head_layers,
        )  # fmt: skip
        k = int((g.sum(dim=0)[list(grid.layers)] > 0).sum())
        lofit = Lofit(self.shape, scores.top(max(1, k)), self.meta).to(self.A.device)
        keep = lofit.mask[..., None]
        lofit.A.copy_(torch.where(keep, A, 0.0))
        lofit.v.copy_(torch.where(keep, v, 0.0))
        return lofit, scores


def fit_jola(
    model: Any,
    task: Task | str,
    *,
    seed: int = 42,
    config: TrainConfig | None = None,
    n_train: int | None = None,
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> tuple[Lofit, HeadScores]:
    """Learn gates and edits of all heads together.

    Args:
        model: any HookedTransformer or TransformerBridge; left as it was.
        task: what to learn, or its name.
        seed: seed of the init, the noise, the row order and the draw of training examples.
        config: None = the authors' settings (`CONFIG`); `config.l1` multiplies the whole penalty.
        n_train: training examples drawn; None = the task's own number (the authors take 200).
        checkpoint: state file, for Ctrl-C and resume.
        on_step: called with every step's record, in which `l1` is the penalty.
        progress: show a bar.

    Returns:
        The adapter of the heads with a gate that is not closed, and every head's score, the sum of its two gates;
        `scores.meta["open"]` counts the gates that are not closed. With the authors' settings that may well be all of them.

    Raises:
        InputError, DataError, TrainingDiverged, KeyboardInterrupt: as `fit`.
    """
    config = config or jola_config(model_info(model))
    gated = Gated.for_model(model).start_(seed, config.init_std)
    fit(
        gated, model, task, config, seed=seed, n_train=n_train, penalty=gated.penalty, identity={"component": "JoLA"},
        label="JoLA", checkpoint=checkpoint, on_step=on_step, progress=progress,
    )  # fmt: skip
    return gated.fitted()


def jola_scores(
    model: Any,
    task: Task | str,
    *,
    seed: int = 42,
    config: TrainConfig | None = None,
    n_train: int | None = None,
    checkpoint: str | Path | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score each head by the sum of its two gates after training; arguments and errors as in `fit_jola`."""
    return fit_jola(
        model,
        task,
        seed=seed,
        config=config,
        n_train=n_train,
        checkpoint=checkpoint,
        on_step=on_step,
        progress=progress,
    )[1]
