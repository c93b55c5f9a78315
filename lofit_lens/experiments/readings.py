"""Readings: what a grid's LoFiT adapters reveal about the model. They are cells of the grid; figures and report only load them.

A task's reading (of the adapter on its own heads, first seed) holds promoted tokens, norms and cosines, attention patterns, each
head's contribution, what the model loses without the chosen heads, how representations drift, and whether the adapter works
after long contexts. The reading of all tasks together holds what happens when their adapters are attached together or learned
one after another.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lofit_lens.analysis.answers import answer_patching
from lofit_lens.analysis.attention import attention_patterns
from lofit_lens.analysis.drift import drift
from lofit_lens.analysis.geometry import geometry
from lofit_lens.analysis.interference import interference, learned_in_turn, long_context
from lofit_lens.analysis.logit_lens import promoted_tokens
from lofit_lens.analysis.measure import records
from lofit_lens.analysis.needed import drop_edits, keep_only, leave_one_out, removal
from lofit_lens.errors import InputError, TrainingDiverged
from lofit_lens.heads import HeadSet
from lofit_lens.interventions.lofit import Lofit
from lofit_lens.models import context_length, model_info, tokenizer_of
from lofit_lens.probing.probes import fit_probes
from lofit_lens.probing.reading import reading_vectors
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import encode

PROMPTS = 32  # validation prompts that norms, scales and drift are measured on
LONG_ROWS = 60  # test rows asked after long contexts
SHOWN = 2  # prompts whose attention patterns are kept
ALL_HEADS = 128  # patterns of all heads are kept in models with at most this many; else those of the adapter's heads
LONGEST = 60  # maximum number of tokens of a prompt whose patterns are kept

HALF, SILENCED, CARRIED = "half of the edits", "removal in the same layers", "answer patching"
CONTROLS = (HALF, SILENCED, CARRIED)  # controls of `localisation`, read only on request
PARTS = (
    "tokens", "geometry", "attention", "leave_one_out", "keep_only", "removal", "drift", "removal_cued", "removal_edits",
    "long_context", *CONTROLS,
)  # fmt: skip

log = logging.getLogger(__name__)


def read_adapter(
    model: Any, task: Task, lofit: Lofit, *, seed: int, limit: int | None, draws: int, wide: Lofit | None = None,
    cued: Task | None = None, texts: Sequence[str] = (), only: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Read one task's adapter; a part that the model or the task does not allow is left out, with a warning.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: the task that the adapter learned.
        lofit: the adapter on the task's own heads.
        seed: seed of the probes and reading vectors that it is compared with.
        limit: use only the first test rows.
        draws: number of draws of random heads.
        wide: the task's adapter on three times as many heads, from which edits are dropped.
        cued: the same task with prompts that the unmodified model can solve, which shows whether it needs the heads.
        texts: ordinary texts to prepend to questions for long contexts; empty = that part is left out.
        only: names of the requested parts, including controls; empty = all but the controls of `localisation`.

    Returns:
        Name of a part -> its record, JSON-able.
    """
    split = "val" if task.test.get("val") else "train"
    prompts = [e.prompt for e in task.examples(split, limit=PROMPTS)]
    options: dict[str, Any] = {"limit": limit, "progress": False}
    removed: dict[str, Any] = {"ks": [lofit.k], "draws": draws, **options}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tokens": lambda: promoted_tokens(model, lofit, prompts=prompts).to_dict(),
        "geometry": lambda: _geometry(model, task, lofit, prompts, seed),
        "attention": lambda: _patterns(model, lofit, prompts),
        "leave_one_out": lambda: leave_one_out(model, task, lofit, **options).to_dict(),
        "keep_only": lambda: keep_only(model, task, lofit, draws=min(2, draws), **options).to_dict(),
        "removal": lambda: removal(model, task, lofit.heads, adapter=lofit, **removed).to_dict(),
        "drift": lambda: drift(model, lofit, prompts, progress=False).to_dict(),
    }
    if cued is not None:
        # Means over neutral prompts: those over cued ones would hold the cue.
        parts["removal_cued"] = lambda: removal(model, cued, lofit.heads, prompts=prompts, **removed).to_dict()
    if wide is not None:
        parts["removal_edits"] = lambda: drop_edits(model, task, wide, lofit.heads, **removed).to_dict()
    if texts:
        rows = min(LONG_ROWS, limit or LONG_ROWS)
        parts["long_context"] = lambda: long_context(
            model, task, lofit, texts, _lengths(model), separator=" ", limit=rows, progress=False
        ).to_dict()
    if only:
        nearby = HeadSet.all(model_info(model).grid).restrict(lofit.heads.layers)
        parts |= {
            HALF: lambda: keep_only(model, task, lofit, ks=[max(1, lofit.k // 2)], draws=draws, **options).to_dict(),
            SILENCED: lambda: removal(model, task, lofit.heads, adapter=lofit, pool=nearby, **removed).to_dict(),
            CARRIED: lambda: answer_patching(model, task, lofit.heads, adapter=lofit, draws=draws, **options).to_dict(),
        }
        parts = {name: parts[name] for name in only if name in parts}
    return _parts(parts)


def read_together(
    model: Any, pairs: Mapping[str, tuple[Task, Lofit]], *, seed: int, limit: int | None
) -> dict[str, Any]:  # fmt: skip
    """Read the adapters of several tasks together.

    Args:
        model: any HookedTransformer or TransformerBridge.
        pairs: name -> task and its adapter.
        seed: seed of the tuning in turn.
        limit: only the first test rows.

    Returns:
        Name of a part -> its record, JSON-able.
    """
    options: dict[str, Any] = {"limit": limit, "progress": False}
    tasks, heads = {t: task for t, (task, _) in pairs.items()}, {t: lofit.heads for t, (_, lofit) in pairs.items()}
    return _parts({
        "interference": lambda: interference(model, pairs, **options).to_dict(),
        "learned_in_turn": lambda: learned_in_turn(model, tasks, heads, seed=seed, **options)[0].to_dict(),
    })  # fmt: skip


def _parts(named: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Each part's result; a part that a model or task does not allow is left out with a warning."""
    found = {}
    for name, make in named.items():
        try:
            found[name] = make()
        except (InputError, TrainingDiverged) as e:
            log.warning("%s is left out: %s", name, e)
    return found


def _lengths(model: Any) -> tuple[int, ...]:
    """Numbers of tokens before a question: none, a fifth and three fifths of the context, at most 2,000."""
    n = context_length(model)
    return (0, min(400, n // 5), min(2000, 3 * n // 5))


def _geometry(model: Any, task: Task, lofit: Lofit, prompts: list[str], seed: int) -> dict[str, Any]:
    """Norms and cosines; without ITI's or RepE's directions if the task has no right and wrong statements."""
    probes = reading = None
    try:
        probes = fit_probes(model, task, seed=seed, progress=False)
        reading = reading_vectors(model, task, seed=seed, progress=False)
    except InputError as e:
        log.warning("cosines with ITI's and RepE's directions are left out: %s", e)
    return {"rows": records(geometry(model, lofit, prompts=prompts, probes=probes, reading=reading))}


def _patterns(model: Any, lofit: Lofit, prompts: Sequence[str]) -> dict[str, Any]:
    """Attention patterns with the adapter: of all heads of a small model, else of the adapter's; on short prompts."""
    short = [p for p in prompts if len(encode(tokenizer_of(model), p)) <= LONGEST][:SHOWN]
    if not short:
        raise InputError(f"every prompt has more than {LONGEST} tokens, too many for a readable attention pattern")
    grid = model_info(model).grid
    heads = HeadSet.all(grid) if grid.n_total <= ALL_HEADS else lofit.heads
    with lofit.attached(model):
        return attention_patterns(model, short, heads).to_dict()
