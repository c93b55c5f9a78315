"""Do chosen heads carry the answer? Patch their z from prompts with the same answer and from prompts with another one.

For row i with right answer a_i, and a row j with another answer a_j, the model prefers a_i by

    preference_i = sigmoid(log p(a_i) - log p(a_j)),    log p summed over the answer's tokens, nats

At the prompt's last token the heads' z is replaced by their z at the last token of row j (*other answer*), or of another row
whose right answer is also a_i (*same answer*). Every patch removes what the heads encode about this particular prompt, so a
drop of the preference by itself shows nothing. What they carry about the answer is

    carried_i = preference_i(same answer) - preference_i(other answer)

and the chosen heads are compared with random sets of as many heads in each layer.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.analysis.controls import ControlTest, chosen_against_random
from lofit_lens.analysis.measure import Items, check_draws, records, summary
from lofit_lens.errors import InputError
from lofit_lens.heads import Heads, HeadSet
from lofit_lens.interventions.base import Intervention, attached
from lofit_lens.models import hook_z, hooked, model_info, tokenizer_of
from lofit_lens.progress import tqdm
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import Encoded, encode_continuations
from lofit_lens.tasks.examples import SFTExample, TrainingExample
from lofit_lens.tasks.registry import task_of
from lofit_lens.training.patching import AnswerLogProbs

AT_ONCE = 32  # rows in one pass; each has two answers
NOT_PATCHED, SAME, OTHER = "not patched", "same answer", "other answer"
CHOSEN, RANDOM = "chosen", "random"


@dataclass(frozen=True, eq=False)
class AnswerPatching:
    """What chosen heads carry of the answer, compared with random heads.

    Attributes:
        frame: one row per run: `which` (`"none"`, `"chosen"`, `"random"`), `draw`, `donors` (`"not patched"`, `"same answer"`,
            `"other answer"`), `heads`, `value` (mean preference for the right answer, 0 to 1), `low`, `high` (95 % over rows),
            `n`.
        items: preference for every row, in the order of the frame.
        task: name of the task.
        split: name of the split.
        draws: number of random sets.
        seed: seed of the pairs and the sets.
    """

    frame: pd.DataFrame
    items: tuple[Items, ...]
    task: str
    split: str
    draws: int
    seed: int

    def carried(self, which: str = CHOSEN, draw: int = 0) -> Float[np.ndarray, " rows"]:
        """What a set's heads carry of each row's answer, from -1 to 1: preference with the same answer minus another one."""
        keys = zip(self.frame["which"], self.frame["draw"], self.frame["donors"], strict=True)
        found = dict(zip(keys, self.items, strict=True))
        return np.array(found[which, draw, SAME]) - np.array(found[which, draw, OTHER])

    def test(self, *, margin: float = 0.05) -> ControlTest:
        """What the chosen heads carry against what random sets carry (`chosen_against_random`)."""
        random_sets = np.stack([self.carried(RANDOM, d)[None] for d in range(self.draws)])
        return chosen_against_random(self.carried()[None], random_sets, margin=margin)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.AnswerPatching", "schema": 1, "task": self.task, "split": self.split, "draws": self.draws,
            "seed": self.seed, "rows": records(self.frame), "items": [list(i) for i in self.items],
        }  # fmt: skip


@torch.no_grad()
def answer_patching(
    model: Any, task: Task | str, heads: Heads, *, adapter: Intervention | None = None, draws: int = 10, seed: int = 0,
    split: str = "test", limit: int | None = None, progress: bool = True,
) -> AnswerPatching:  # fmt: skip
    """Patch the z of chosen heads at the prompt's last token from rows with the same answer and from rows with another one.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: a task with right answers in the training form of the split. Rows whose answer no other row shares are left out.
        heads: the chosen heads.
        adapter: attached throughout, before the patch, also while donors are read. None = the unmodified model.
        draws: number of random sets with as many heads in each layer (`HeadSet.matched`, seeds `seed`, `seed + 1`, ...).
        seed: seed of the random sets and of the pairs of rows.
        split: which split to use.
        limit: use only the first rows.
        progress: show a bar over runs.

    Raises:
        InputError: a split without answers, fewer than two rows that share their answer with another row, only one answer in
            all rows, fewer than one draw, or a negative seed.
        DataError: a row longer than the context.
        ModelError: heads that cannot be reached.
    """
    check_draws(draws, seed)
    info, task = model_info(model), task_of(task).asked_of(model)
    chosen = HeadSet(HeadSet.of(heads).heads, shape=info.grid)
    examples = _examples(task, split)[:limit]
    answers = [_right(e) for e in examples]
    pairs = _donors(examples, answers, random.Random(seed))
    sets = {(CHOSEN, 0): chosen} | {(RANDOM, d): HeadSet.matched(chosen, seed=seed + d) for d in range(draws)}
    layers = sorted({layer for s in sets.values() for layer in s.layers})
    kept = sorted(pairs)
    # A row without donors is run only for its z, so any other answer will do.
    others = [pairs[i][1] if i in pairs else _any_other(i, answers) for i in range(len(answers))]
    tokenizer = tokenizer_of(model)
    rows = [
        encode_continuations(tokenizer, e.prompt, [answers[i], answers[j]])
        for i, (e, j) in enumerate(zip(examples, others, strict=True))
    ]
    plan = [("none", 0, NOT_PATCHED), *((*key, donors) for key in sets for donors in (SAME, OTHER))]
    found, items = [], []
    with attached(model, *([] if adapter is None else [adapter])):
        measured = _Preferences(model, rows)
        plain, z = measured.with_z(layers)
        for which, draw, donors in tqdm(plan, desc="patch answers", disable=not progress, unit="run"):
            values = plain
            if donors != NOT_PATCHED:
                given = [pairs[i][donors == OTHER] if i in pairs else i for i in range(len(examples))]
                values = measured.patched(sets[which, draw], {layer: of[given] for layer, of in z.items()})
            items.append(tuple(values[kept].tolist()))
            of_set = "" if which == "none" else str(sets[which, draw])
            found.append({"which": which, "draw": draw, "donors": donors, "heads": of_set, **summary(items[-1])})
    return AnswerPatching(pd.DataFrame(found), tuple(items), task.name, split, draws, seed)


def _examples(task: Task, split: str) -> Sequence[TrainingExample]:
    found = task.training.get(split)
    if not found:
        raise InputError(
            f"{task.name} has no answers in the training form of its {split} split, and patching needs them; "
            f"name one of {', '.join(task.training) or 'no split: it has none'}"
        )
    return found


def _right(example: TrainingExample) -> str:
    return example.answer if isinstance(example, SFTExample) else example.chosen


def _donors(
    examples: Sequence[TrainingExample], answers: Sequence[str], draw: random.Random
) -> dict[int, tuple[int, int]]:
    """Row -> a row with the same answer to another prompt, and one with another answer; only rows that have both."""
    found = {}
    for i, answer in enumerate(answers):
        same = [j for j, a in enumerate(answers) if a == answer and examples[j].prompt != examples[i].prompt]
        other = [j for j, a in enumerate(answers) if a != answer]
        if same and other:
            found[i] = draw.choice(same), draw.choice(other)
    if len(found) < 2:
        raise InputError(
            f"{len(found)} of {len(answers)} rows have another row with the same answer and one with another answer; patching "
            "from rows with the same answer needs at least two: use more rows, or a task whose answers repeat"
        )
    return found


def _any_other(i: int, answers: Sequence[str]) -> int:
    return next(j for j, a in enumerate(answers) if a != answers[i])


class _Preferences:
    """Preference of every row for its first answer, patched or not; each prompt up to its last token is run once."""

    def __init__(self, model: Any, rows: Sequence[tuple[Encoded, ...]]) -> None:
        self.model = model
        parts = [rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)]
        self.parts = [(len(part), AnswerLogProbs(model, [e for pair in part for e in pair])) for part in parts]

    def with_z(self, layers: Sequence[int]) -> tuple[Float[Tensor, " rows"], dict[int, Float[Tensor, "rows head d"]]]:
        """Preferences without a patch, and every row's z at the prompt's last token, by layer."""
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

        def keeper(layer: int) -> Any:
            def keep(z: Tensor, hook: Any) -> None:
                found[layer].append(z[::2, 0].detach().clone())

            return keep

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(hooked(hook_z(self.model, layer), keeper(layer)))
            values = self._all()
        return values, {layer: torch.cat(parts) for layer, parts in found.items()}

    def patched(self, heads: HeadSet, z: dict[int, Float[Tensor, "rows head d"]]) -> Float[Tensor, " rows"]:
        """Preferences with the heads' z replaced by that of each row's donor."""
        start, values = 0, []
        for n, measure in self.parts:
            given = {layer: of[start : start + n] for layer, of in z.items()}
            with _replaced(self.model, heads, given):
                values.append(_preference(measure()))
            start += n
        return torch.cat(values)

    def _all(self) -> Float[Tensor, " rows"]:
        return torch.cat([_preference(measure()) for _, measure in self.parts])


def _preference(log_probs: Float[Tensor, " answers"]) -> Float[Tensor, " rows"]:
    own, other = log_probs.double().cpu().view(-1, 2).unbind(1)
    return torch.sigmoid(own - other)


@contextmanager
def _replaced(model: Any, heads: HeadSet, given: dict[int, Float[Tensor, "rows head d"]]) -> Iterator[None]:
    """Replace the heads' z at the first position of a pass by the one given for each row; both answers of a row get the same."""

    def patcher(layer: int) -> Any:
        index = [h.head for h in heads if h.layer == layer]

        def patch(z: Float[Tensor, "answers pos head d"], hook: Any) -> Float[Tensor, "answers pos head d"]:
            z = z.clone()
            z[:, 0, index] = given[layer][:, index].repeat_interleave(2, dim=0).to(z)
            return z

        return patch

    with ExitStack() as stack:
        for layer in heads.layers:
            stack.enter_context(hooked(hook_z(model, layer), patcher(layer)))
        yield
