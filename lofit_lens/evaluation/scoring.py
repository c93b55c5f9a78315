"""Log-probs of continuations; a prefix that several of them share runs once.

score(c | p) = sum over the tokens of c of log p(token | p, earlier tokens of c), in nats, no length normalization.

Work is shared at three levels: the common prefix of all prompts (a primer) runs once, each prompt runs once, and all
continuations of a prompt run as rows of one batch. Attached interventions edit their positions (`models.Positions`), also in
prompts.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.batches import TOKEN_BUDGET, grouped
from lofit_lens.evaluation.prefix import SharedFront, shared_front
from lofit_lens.models import (
    Borders,
    Layout,
    Positions,
    check_marked,
    context_length,
    device_of,
    frozen,
    fused_attention,
    marks_of_rows,
    not_finite,
    peek,
    positions_of,
    remember,
    tokenizer_of,
)
from lofit_lens.progress import tqdm
from lofit_lens.tasks.collate import Encoded, collate, encode_continuations, pad, pad_id
from lofit_lens.training.losses import NO_LABEL, token_log_probs

AT_ONCE = 256  # positions whose log-probs are computed together: over the whole vocabulary in float32 they are large
PADDING = 128  # padding tokens that one pass may waste; another pass would cost about as much

log = logging.getLogger(__name__)


def score_continuations(
    model: Any,
    prefixes: Sequence[str],
    continuations: Sequence[Sequence[str]],
    *,
    token_budget: int = TOKEN_BUDGET,
    progress: bool = False,
) -> list[list[float]]:
    """Summed log-prob (nats) of every continuation of every prefix.

    Interventions of this package may edit certain positions only (`models.Positions`). Your own hook must treat all positions
    alike, since prompts run once for all their continuations and each pass sees only its own tokens. Prefix and continuation
    are tokenized as one text. If the tokenizer merges across their border, the continuation is scored from the merged token on,
    and a warning gives the number of such continuations.

    Args:
        model: any HookedTransformer or TransformerBridge.
        prefixes: one text per question.
        continuations: the answers of each question, each with its leading space.
        token_budget: bound on the padded tokens of one forward pass, including cached ones (a single sequence may exceed it).
        progress: show a bar over questions.

    Returns:
        One list per prefix, in the order given.

    Raises:
        InputError: lists of different lengths, or a token budget below 1.
        DataError: an empty continuation, or a sequence longer than the model's context.
        ModelError: logits that are NaN; names the question.
    """
    if len(prefixes) != len(continuations):
        raise InputError(
            f"{len(prefixes)} prefixes and {len(continuations)} lists of continuations; give one list per prefix"
        )
    tokenizer, limit = tokenizer_of(model), context_length(model)
    encoded = [encode_continuations(tokenizer, p, c) for p, c in zip(prefixes, continuations, strict=True)]
    for prefix, answers in zip(prefixes, encoded, strict=True):
        if longest(answers) > limit:
            raise DataError(
                f"{longest(answers)} tokens in {prefix[-80:]!r}; the context of {model.cfg.model_name} is {limit}"
            )
    count_merges(encoded)
    count_unreached(model, encoded)
    return score_encoded(model, encoded, token_budget=token_budget, progress=progress)


def longest(answers: Sequence[Encoded]) -> int:
    """Tokens of a question with its longest answer."""
    return max((len(e.ids) for e in answers), default=0)


def count_merges(encoded: Sequence[Sequence[Encoded]]) -> int:
    """Number of continuations that share a token with their prefix; logs a warning if there are any."""
    n = sum(e.merged for answers in encoded for e in answers)
    if n:
        log.warning(
            "%d of %d continuations share a token with the end of their prompt in this tokenizer; they are scored from that "
            "token on",
            n,
            sum(map(len, encoded)),
        )
    return n


def count_unreached(model: Any, encoded: Sequence[Sequence[Encoded]]) -> int:
    """Number of answers whose score no attached edit can change, since no edited position precedes a scored token.

    This holds for an edit of the last position only, which predicts nothing of the answer, and for an edit from the answer on
    if the answer is one token. Logs a warning if there are any; 0 if an attached edit acts everywhere.

    Raises:
        InputError: an attached edit acts on the positions that each row marks, but a question marks none.
    """
    listed = positions_of(model)
    check_marked(listed, [answers[0].marks if answers else () for answers in encoded], "question")
    if not listed or any(p.everywhere for p in listed):
        return 0
    n = sum(not any(_reaches(p, e) for p in listed) for answers in encoded for e in answers)
    if n:
        log.warning(
            "%d of %d answers keep the unmodified model's score: the attached edit acts on positions %s, none of which comes "
            "before a scored token; use positions 'predicting' or 'all'",
            n,
            sum(map(len, encoded)),
            ", ".join(sorted({str(p) for p in listed})),
        )
    return n


def _reaches(positions: Positions, answer: Encoded) -> bool:
    length = len(answer.ids)
    whole = torch.ones(1, length, dtype=torch.long)
    borders = Borders(torch.tensor([answer.start]), torch.tensor([length]), marks=marks_of_rows([answer.marks]))
    return bool(positions.mask(Layout.of(whole, whole, length, borders))[0, : length - 1].any())


@torch.no_grad()
def score_encoded(
    model: Any, encoded: Sequence[Sequence[Encoded]], *, token_budget: int = TOKEN_BUDGET, progress: bool = False
) -> list[list[float]]:
    """`score_continuations` for token ids; the answers of one question begin with the same prompt.

    Raises:
        InputError: a token budget below 1.
    """
    if token_budget < 1:
        raise InputError(f"token_budget is {token_budget}; it must be at least 1")
    scores = [[0.0] * len(answers) for answers in encoded]
    units = _units(model, encoded)
    asked = [[encoded[q][a] for a in mine] for q, mine in units]
    prompts = [_prompt(answers) for answers in asked]
    order = sorted(range(len(units)), key=lambda i: len(prompts[i]))
    if not order:
        return scores
    with (
        frozen(model),
        fused_attention(model, cached=True),
        tqdm(total=len(order), desc="score answers", disable=not progress, unit="question") as bar,
    ):
        after = [longest(answers) - len(p) for answers, p in zip(asked, prompts, strict=True)]
        places = len(prompts[order[-1]]) + max(after[i] for i in order)
        marks = [asked[i][0].marks for i in order]
        front = shared_front(model, [prompts[i] for i in order], longest=places, marks=marks)
        own, limit = [len(p) - len(front) for p in prompts], context_length(model)
        for group in grouped(order, own, token_budget, padding=PADDING, cached=len(front), after=after, limit=limit):
            values = _score_group(model, front, [prompts[i] for i in group], [asked[i] for i in group], token_budget)
            for i, found in zip(group, values, strict=True):
                question, mine = units[i]
                if any(map(math.isnan, found)):
                    raise not_finite(model, f"logits for the answers of question {question + 1}")
                for a, value in zip(mine, found, strict=True):
                    scores[question][a] = value
            bar.update(len(group))
    return scores


def _units(model: Any, encoded: Sequence[Sequence[Encoded]]) -> list[tuple[int, list[int]]]:
    """Pairs of a question and the numbers of those of its answers that run after one prompt.

    Usually these are all answers of the question. But an edit of certain positions must know where each answer's prompt ends,
    and if the tokenizer merges across that border, answers of one question start at different positions.
    """
    alike = all(p.everywhere for p in positions_of(model))
    units: dict[tuple[int, int], list[int]] = {}
    for q, answers in enumerate(encoded):
        for a, e in enumerate(answers):
            units.setdefault((q, 0 if alike else e.start), []).append(a)
    return [(q, mine) for (q, _), mine in units.items()]


def _prompt(answers: Sequence[Encoded]) -> tuple[int, ...]:
    """Ids before the first label."""
    return answers[0].ids[: min(e.start for e in answers)] if answers else ()


def _score_group(
    model: Any,
    front: SharedFront,
    prompts: Sequence[Sequence[int]],
    questions: Sequence[Sequence[Encoded]],
    budget: int,
) -> list[list[float]]:
    fill, device = pad_id(tokenizer_of(model)), device_of(model)
    tokens, mask = pad([p[len(front) :] for p in prompts], side="left", pad_id=fill, device=device)
    ends = torch.tensor([len(p) for p in prompts])
    marks = marks_of_rows([answers[0].marks for answers in questions])
    last, state = remember(model, front.rows(len(prompts)), tokens, mask, Borders(ends, ends + 1, marks=marks))
    owner = [q for q, answers in enumerate(questions) for _ in answers]
    rest = [
        Encoded(e.ids[len(p) :], e.start - len(p))
        for p, answers in zip(prompts, questions, strict=True)
        for e in answers
    ]
    # The prompt predicts the first token of an answer, and each token predicts the next one; the last predicts none.
    found = [_first(last[torch.tensor(owner, device=device)], rest)]
    longer = sorted((i for i, e in enumerate(rest) if len(e.ids) > 1), key=lambda i: len(rest[i].ids))
    lengths, behind = [len(e.ids) - 1 for e in rest], []
    for chunk in grouped(longer, lengths, budget, padding=PADDING, cached=state.mask.shape[1]):
        batch = collate([Encoded(rest[i].ids[:-1], 0) for i in chunk], pad_id=fill, device=device)
        rows = torch.tensor([owner[i] for i in chunk])
        ends_too = torch.tensor([len(prompts[owner[i]]) + len(rest[i].ids) for i in chunk])
        borders = replace(Borders(ends, marks=marks).select(rows), length=ends_too)
        logits = peek(model, state, rows, batch.tokens, batch.mask, borders)
        found.append(_later(logits, [rest[i] for i in chunk]))
        behind += chunk
    values = torch.cat(found).tolist()  # the only synchronization with the device
    for i, value in zip(behind, values[len(rest) :], strict=True):
        values[i] += value
    it = iter(values)
    return [[next(it) for _ in answers] for answers in questions]


def _first(logits: Float[Tensor, "rows d_vocab"], rows: Sequence[Encoded]) -> Float[Tensor, " rows"]:
    """Log-prob of each row's first token, 0 if that is not a label."""
    tokens = torch.tensor([row.ids[0] if row.start == 0 else NO_LABEL for row in rows], device=logits.device)
    return token_log_probs(logits, tokens)


def _later(logits: Float[Tensor, "rows pos d_vocab"], rows: Sequence[Encoded]) -> Float[Tensor, " rows"]:
    """Summed log-prob of each row's other labels, from logits at all its tokens but the last."""
    tokens = torch.full(logits.shape[:2], NO_LABEL, dtype=torch.long)
    for i, row in enumerate(rows):
        start = max(row.start, 1)
        tokens[i, start - 1 : len(row.ids) - 1] = torch.tensor(row.ids[start:])
    flat = zip(logits.flatten(0, 1).split(AT_ONCE), tokens.to(logits.device).flatten().split(AT_ONCE), strict=True)
    found = torch.cat([token_log_probs(*part) for part in flat])
    return found.view(tokens.shape).sum(dim=1)
