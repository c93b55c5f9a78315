"""What a study runs: head scores and fits, planned before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lofit_lens.errors import InputError, unknown
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.models import ModelInfo
from lofit_lens.training.selectors import SELECTORS

LOFIT, ZERO, CHANCE, OWN = "LoFiT", "zero-shot", "random", "A-norm"
STEERING, TRAINED = ("ITI", "RepE"), ("LoRA", "RED", "LoReFT")
PARTS = ("transfer", "methods", "selectors", "k", "data", "other tasks")


@dataclass(frozen=True)
class Plan:
    """What a study holds.

    Attributes:
        seeds: of selection and fits.
        extra_seeds: of head selection alone, for its stability.
        parts: of `PARTS`; scores, zero-shot, LoFiT's own heads and random heads are always there.
        selectors: whose heads are tuned (Table 2); the A-norm is always there.
        scored: further selectors, whose scores alone are compared with the others'.
        trained: methods that are fitted at several numbers of training examples beside LoFiT.
        ks: numbers of heads (Figure 5); None = 1, K, 3 K and 20 % of the heads.
        sizes: numbers of training examples (Figure 4) beside the task's own.
        draws: of random heads.
        tune: choose the trained methods' learning rates on the validation rows too (four points each); else they are the
            presets. ITI's and RepE's strength is always chosen there.
        limit: only the first test rows.
    """

    seeds: tuple[int, ...] = (0, 1)
    extra_seeds: tuple[int, ...] = (2, 3)
    parts: tuple[str, ...] = PARTS
    selectors: tuple[str, ...] = ("bias norm", "probe accuracy", "probing layers")
    scored: tuple[str, ...] = ("gradient attribution",)
    trained: tuple[str, ...] = ("LoRA", "RED")
    ks: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = (10, 40)
    draws: int = 5
    tune: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, given, allowed in (
            ("part", self.parts, PARTS),
            ("selector", (*self.selectors, *self.scored), SELECTORS),
            ("method", self.trained, TRAINED),
        ):
            for one in given:
                if one not in allowed:
                    raise unknown(name, one, allowed)
        if not self.seeds or self.draws < 1:
            raise InputError(
                f"{len(self.seeds)} seeds and {self.draws} draws of random heads; give one or more of each"
            )
        if any(n < 1 for n in (*self.sizes, *(self.ks or ()))):
            raise InputError(f"K and numbers of training examples start at 1, got {self.ks} and {self.sizes}")


@dataclass(frozen=True)
class Fit:
    """One fit. `heads` says which heads are edited where `heads_from` alone does not: `source` is the task they come from."""

    task: str
    method: str
    seed: int
    heads_from: str = ""
    source: str = ""
    k: int | None = None
    draw: int = 0
    n_train: int | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    also: tuple[str, ...] = field(default=(), compare=False)  # other tasks on which the fitted adapter is tested
    own: bool = field(
        default=False, compare=False
    )  # LoFiT on the task's own heads, usual K: what others are set against


ScoreJob = tuple[str, str, int]


def plan_scores(plan: Plan, tasks: Sequence[str]) -> list[ScoreJob]:
    """Head scores that a study needs: task, selector, seed."""
    wanted = [(t, OWN, s) for t in tasks for s in (*plan.seeds, *plan.extra_seeds)]
    if "selectors" in plan.parts:
        others = [by for by in dict.fromkeys((*plan.selectors, *plan.scored)) if by not in (OWN, CHANCE)]
        wanted += [(t, by, s) for by in others for t in tasks for s in plan.seeds]
    return wanted


def plan_fits(
    plan: Plan, tasks: Sequence[str], others: Sequence[str], info: ModelInfo, k: Mapping[str, int],
    scores: Mapping[tuple[str, str, int], HeadScores],
) -> list[Fit]:  # fmt: skip
    """All fits of a study, each once; long ones first."""
    n_heads, parts, seeds = info.n_layers * info.n_heads, plan.parts, plan.seeds
    also = tuple(others) if "other tasks" in parts else ()

    def lofit(task: str, seed: int, by: str, n: int, source: str = "") -> Fit:
        heads = tuple((h.layer, h.head) for h in scores[source or task, by, seed].top(n))
        return Fit(task, LOFIT, seed, by, source or task, n, heads=heads)

    fits: list[Fit] = []
    if "methods" in parts:
        fits += [Fit(t, m, s) for m in (*TRAINED, *STEERING) for t in tasks for s in seeds]
        fits += [lofit(t, s, OWN, wide_k(k[t], n_heads)) for t in tasks for s in seeds]
    if "k" in parts:
        fits += [lofit(t, s, OWN, n) for t in tasks for s in seeds for n in plan.ks or usual_ks(k[t], n_heads)]
    if "transfer" in parts:
        fits += [lofit(t, s, OWN, k[t], o) for t in tasks for o in tasks for s in seeds if o != t]
    if "selectors" in parts:
        chosen = [by for by in plan.selectors if by not in (OWN, CHANCE)]
        fits += [lofit(t, s, by, k[t]) for by in chosen for t in tasks for s in seeds]
    for t in tasks:
        for d in range(plan.draws):
            drawn = HeadSet.random((info.n_layers, info.n_heads), k[t], seed=d)
            heads = tuple((h.layer, h.head) for h in drawn)
            fits.append(Fit(t, LOFIT, d, CHANCE, "", k[t], d, heads=heads))
    own = [replace(lofit(t, s, OWN, k[t]), also=also, own=True) for t in tasks for s in seeds]
    if "data" in parts:
        fits += [Fit(t, m, s, n_train=n) for n in plan.sizes for m in plan.trained for t in tasks for s in seeds]
        fits += [Fit(t, LOFIT, s, OWN, t, k[t], n_train=n) for n in plan.sizes for t in tasks for s in seeds]
    zero = [Fit(t, ZERO, seeds[0], also=() if i else also) for i, t in enumerate(tasks)]
    known = set(own)
    fits = [f for f in fits if f not in known]
    return list(dict.fromkeys([*fits, *own, *zero]))


def usual_ks(k: int, n_heads: int) -> tuple[int, ...]:
    """Figure 5's numbers of heads: one, the preset's K (3 %), three times as many (10 %) and 20 % of all heads."""
    return tuple(sorted({min(n, n_heads) for n in (1, k, wide_k(k, n_heads), max(1, round(0.2 * n_heads)))}))


def wide_k(k: int, n_heads: int) -> int:
    """Heads of the 10 % setting: three times the preset's K (96 of Llama-2-7B's 1,024, as in the paper)."""
    return min(3 * k, n_heads)
