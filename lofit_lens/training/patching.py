"""Activation patching, one head at a time: how an outcome changes when a head's z is replaced by one from elsewhere.

    effect[layer, head, row] = outcome[row] with z[layer, head] patched - outcome[row] unpatched

`patch_effects` is the loop; functions passed to it define the outcome and the patch. `AnswerLogProbs` measures
answers to prompts and `few_shot_prompts` makes donor prompts, as in Todd et al. 2024 (arXiv 2310.15213, 2.3).
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lofit_lens.checks import check_whole
from lofit_lens.errors import DataError
from lofit_lens.heads import Head, HeadSet
from lofit_lens.models import (
    Borders,
    KVState,
    check_cache,
    context_length,
    device_of,
    head_size,
    hook_z,
    hooked,
    model_info,
    peek,
    remember,
    tokenizer_of,
)
from lofit_lens.progress import tqdm
from lofit_lens.tasks.chat import asked
from lofit_lens.tasks.collate import Encoded, encode, encode_continuations, pad, pad_id
from lofit_lens.tasks.examples import SFTExample, TrainingExample
from lofit_lens.training.losses import NO_LABEL, token_log_probs

AT_ONCE = 256  # positions whose log-probs are computed together: in float32 over the whole vocabulary they are large
Hook = Callable[..., Tensor]  # z of one layer, and `hook` -> z with one head's changed; must not change its input


@torch.no_grad()
def patch_effects(
    model: Any,
    measure: Callable[[], Float[Tensor, " rows"]],
    *,
    patch: Callable[[Head], Hook],
    progress: bool = True,
    label: str = "patch heads",
) -> Float64[Tensor, "n_layers n_heads rows"]:
    """Measure how patching each single head changes every row's outcome. Nothing stays attached; layers without heads keep zeros.

    Args:
        model: the model that `measure` runs.
        measure: runs the model and returns one outcome per row, in any unit; called once unpatched and once for each head.
        patch: returns the forward hook that changes a head's z at its layer's hook_z; called layer by layer, heads in order.
        progress: show a bar over heads.
        label: text of the bar.

    Returns:
        Patched minus unpatched outcome, in the outcome's unit, float64 on the CPU.

    Raises:
        ModelError: heads that cannot be reached.
    """
    head_size(model)
    info = model_info(model)
    base = measure().cpu().double()
    effects = torch.zeros(*info.grid, len(base), dtype=torch.float64)
    for head in tqdm(HeadSet.all(info.grid), desc=label, disable=not progress, unit="head"):
        with hooked(hook_z(model, head.layer), patch(head)):
            effects[head] = measure().cpu().double() - base
    return effects


def replace_head(head: int, donor: Float[Tensor, "..."], *, at: int | None = None) -> Hook:
    """Make a hook that replaces one head's z by `donor`.

    Args:
        head: index within the layer.
        donor: `[d_head]` or `[batch, d_head]` for a position; `[batch, pos, d_head]` for all.
        at: the one position to patch; None = every position.
    """

    def patch(z: Float[Tensor, "batch pos n_heads d_head"], hook: Any) -> Float[Tensor, "batch pos n_heads d_head"]:
        z = z.clone()
        z[:, slice(None) if at is None else at, head] = donor.to(z)
        return z

    return patch


class AnswerLogProbs:
    """Summed log-prob (nats) of one answer per row; only the prompt's last token and the answer run at each call.

    What is attached during a call acts only on those tokens: the KV cache of the earlier tokens is computed once, when
    the object is made. The prompt's last token is at position 0 of each pass.

    Args:
        model: any HookedTransformer or TransformerBridge.
        rows: prompts with their answers, BOS included.

    Raises:
        DataError: a row longer than the context, or a prompt of one token.
        ModelError: this model's KV cache gives wrong logits.
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Sequence[Encoded]) -> None:
        limit, name = context_length(model), model_info(model).name
        for i, row in enumerate(rows):
            if row.start < 2:
                raise DataError(f"row {i} has a prompt of one token; patching at its end needs a token before it")
            if len(row.ids) > limit:
                raise DataError(
                    f"row {i} has {len(row.ids)} tokens; the context of {name} is {limit}: shorten or drop it"
                )
        check_cache(model)  # without gaps here, nothing else needs a check
        fill, device = pad_id(tokenizer_of(model)), device_of(model)
        starts = torch.tensor([row.start for row in rows])
        self.model, self.borders = model, Borders(starts, torch.tensor([len(row.ids) for row in rows]))
        before = pad([row.ids[: row.start - 1] for row in rows], side="left", pad_id=fill, device=device)
        self.state: KVState = remember(model, None, *before, self.borders)[1]
        self.tokens, self.mask = pad([r.ids[r.start - 1 : -1] for r in rows], side="right", pad_id=fill, device=device)
        self.targets, _ = pad([r.ids[r.start :] for r in rows], side="right", pad_id=NO_LABEL, device=device)

    def __call__(self) -> Float[Tensor, " rows"]:
        """Return the log-probs of all answers, in order."""
        every = torch.arange(len(self.tokens), device=self.tokens.device)
        logits = peek(self.model, self.state, every, self.tokens, self.mask, self.borders)
        parts = zip(logits.flatten(0, 1).split(AT_ONCE), self.targets.flatten().split(AT_ONCE), strict=True)
        return torch.cat([token_log_probs(*part) for part in parts]).view(self.targets.shape).sum(dim=1)


def answer_rows(tokenizer: Any, example: TrainingExample) -> tuple[Encoded, ...]:
    """Encode the right answer after its prompt, and for pairs the rejected one too; without an end token."""
    answers = [example.answer] if isinstance(example, SFTExample) else [example.chosen, example.rejected]
    return encode_continuations(tokenizer, example.prompt, answers)


def few_shot_prompts(
    model: Any, examples: Sequence[TrainingExample], *, n_prompts: int, n_shots: int, separator: str, seed: int
) -> tuple[list[TrainingExample], list[list[int]], list[int]]:
    """Draw examples to measure, and few-shot prompts from the others.

    The examples are shuffled and halved. The first half gives the measured ones; the second gives the donor prompts and the
    solved examples before them, so that no measured example is in a donor prompt. A donor prompt holds no example twice.

    Args:
        model: provides the tokenizer and the context length.
        examples: examples to draw from.
        n_prompts: number of measured examples and of donor prompts; fewer if half of the examples is less.
        n_shots: solved examples before a donor prompt; fewer if there are not so many others or the context is too short.
        separator: text after each solved example.
        seed: seed of the draw.

    Returns:
        The measured examples; token ids of each donor prompt, BOS included; the number of solved examples in each.

    Raises:
        InputError: `n_prompts` or `n_shots` below 1.
        DataError: fewer than three examples, or a donor prompt that does not fit the context after any one solved example.
    """
    check_whole(1, n_prompts=n_prompts, n_shots=n_shots)
    if len(examples) < 3:
        raise DataError(
            f"{len(examples)} training examples are too few for patching: one is measured, one gives the prompt and one "
            "comes solved before it; give 3 or more"
        )
    draw, tokenizer, limit = random.Random(seed), tokenizer_of(model), context_length(model)
    order = draw.sample(range(len(examples)), len(examples))
    half = len(order) // 2
    measured, pool = order[:half][:n_prompts], order[half:]
    donors, counts = [], []
    for query in pool[:n_prompts]:
        others = [i for i in pool if i != query]
        shots = draw.sample(others, min(n_shots, len(others)))
        fitting = (s for s in _fewer(shots) if len(_behind(tokenizer, examples, s, query, separator)) <= limit)
        kept = next(fitting, None)
        if kept is None:
            raise DataError(
                f"the prompt {examples[query].prompt[-60:]!r} after one solved example is longer than the context of "
                f"{model_info(model).name} ({limit} tokens); patching needs shorter examples, or choose another selector"
            )
        donors.append(_behind(tokenizer, examples, kept, query, separator))
        counts.append(len(kept))
    return [examples[i] for i in measured], donors, counts


def _fewer(shots: Sequence[int]) -> list[Sequence[int]]:
    """List all shots, then one fewer each time, down to each single one."""
    return [shots[:n] for n in range(len(shots), 1, -1)] + [[s] for s in shots]


def _behind(
    tokenizer: Any, examples: Sequence[TrainingExample], shots: Sequence[int], query: int, separator: str
) -> list[int]:
    solved = "".join(asked(examples[i].prompt) + _right(examples[i]) + separator for i in shots)
    return encode(tokenizer, solved + examples[query].prompt)


def _right(example: TrainingExample) -> str:
    return example.answer if isinstance(example, SFTExample) else example.chosen
