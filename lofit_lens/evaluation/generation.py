"""Greedy decoding on the shared prefill / step calls: the same on both model classes, left-padded, mask always passed.

(The classes' own `generate` ignores the mask on one of them and differs in its rules; see `models`.)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from tqdm.auto import tqdm

from lofit_lens.checks import check_whole, shown
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.prefix import NO_FRONT, SharedFront, shared_front
from lofit_lens.models import (
    Borders,
    backend_of,
    context_length,
    device_of,
    end_tokens,
    frozen,
    not_finite,
    remember,
    step,
    tokenizer_of,
)
from lofit_lens.tasks.chat import as_conversation, parsed, turn_of
from lofit_lens.tasks.collate import encode, pad, pad_id

Message = Mapping[str, str]


@overload
def generate(
    model: Any, prompts: str | list[Message], *, max_new_tokens: int = ..., batch_size: int = ..., progress: bool = ...,
    chat: bool = ..., system: str | None = ...,
) -> str: ...  # fmt: skip
@overload
def generate(
    model: Any, prompts: list[str] | tuple[str, ...] | list[list[Message]], *, max_new_tokens: int = ..., batch_size: int = ...,
    progress: bool = ..., chat: bool = ..., system: str | None = ...,
) -> list[str]: ...  # fmt: skip
def generate(
    model: Any, prompts: Any, *, max_new_tokens: int = 32, batch_size: int = 16, progress: bool = False, chat: bool = False,
    system: str | None = None,
) -> str | list[str]:  # fmt: skip
    """Continue prompts greedily, up to any of the checkpoint's end tokens (`models.end_tokens`) or `max_new_tokens`.

    Interventions of this package may act on certain positions only (`models.Positions`); a hook of one's own must act alike on
    every position, since each pass sees the new tokens only.

    Args:
        model: any HookedTransformer or TransformerBridge, with whatever is attached to it.
        prompts: one text, or several; or one conversation, `[{"role": "user", "content": "..."}]`, or several, which always go
            through the model's chat template.
        max_new_tokens: limit, tokens.
        batch_size: prompts decoded together (they are sorted by length; results keep the given order).
        progress: show a bar over prompts.
        chat: put each text through the model's chat template, as the user's turn.
        system: text of the system's turn; means `chat`.

    Returns:
        The new text behind each prompt, special tokens left out; a text for a text, a list for a list.

    Raises:
        InputError: a limit below 1, no prompt, or a chat with a model that has no chat template or one that does not take it.
        DataError: a prompt with no room left in the model's context, or messages that are no conversation.
        ModelError: logits that are NaN or infinite; names the prompt.
    """
    backend_of(model)
    check_whole(1, max_new_tokens=max_new_tokens, batch_size=batch_size)
    wanted = "give a text, a list of texts, or messages of a conversation"
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts is {shown(prompts)}; {wanted}")
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    for i, prompt in enumerate(given):
        if isinstance(prompt, bytes) or not isinstance(prompt, str | Sequence | Mapping):
            raise InputError(f"prompts holds {shown(prompt)} at place {i}; {wanted}")
    messages = any(isinstance(p, Mapping) for p in given)  # of one conversation
    single = isinstance(prompts, str) or messages
    listed = [_prompt(p, chat, system) for p in ([given] if messages else given)]
    if not listed:
        raise InputError("no prompt given")
    tokenizer, limit = tokenizer_of(model), context_length(model)
    turns = [turn_of(tokenizer, p) for p in listed]
    encoded = [encode(tokenizer, turn.prompt) for turn in turns]
    for prompt, ids in zip(listed, encoded, strict=True):
        if not ids:
            raise DataError("a prompt is empty and this tokenizer has no BOS; give at least one word")
        if len(ids) + max_new_tokens > limit:
            raise DataError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the context of "
                f"{model.cfg.model_name} ({limit}): {prompt[:60]!r}"
            )
    texts = [""] * len(listed)
    order = sorted(range(len(listed)), key=lambda i: len(encoded[i]))
    with frozen(model), tqdm(total=len(listed), desc="generate", disable=not progress, unit="prompt") as bar:
        front = shared_front(model, encoded, longest=max(map(len, encoded)) + max_new_tokens)
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            ends = [turns[i].end for i in rows]
            new_ids = decode_ids(model, [encoded[i] for i in rows], max_new_tokens, front=front, turn_ends=ends)
            for i, new in zip(rows, new_ids, strict=True):
                texts[i] = new_text(tokenizer, encoded[i], new)
            bar.update(len(rows))
    return texts[0] if single else texts


def _prompt(prompt: Any, chat: bool, system: str | None) -> str:
    """A text as it is or as a chat's, and messages as a conversation."""
    if not isinstance(prompt, str):
        prompt = parsed(prompt)
    return as_conversation(prompt, system) if chat or system is not None else prompt


@torch.no_grad()
def decode_ids(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, front: SharedFront = NO_FRONT,
    turn_ends: Sequence[int | None] = (),
) -> list[list[int]]:  # fmt: skip
    """Greedy new ids for one batch up to an end token, which is left out.

    `front` is what all prompts begin with, run already; `turn_ends` the token that ends each one's answer beside the model's own.
    """
    tokenizer, ends = tokenizer_of(model), end_tokens(model)
    turn_end = torch.tensor([-1 if e is None else e for e in turn_ends] or [-1], device=device_of(model))
    own = [p[len(front) :] for p in prompts]
    tokens, mask = pad(own, side="left", pad_id=pad_id(tokenizer), device=device_of(model))
    borders = Borders(torch.tensor([len(p) for p in prompts]))
    scores, state = remember(model, front.rows(len(prompts)), tokens, mask, borders)
    running = torch.ones(len(prompts), dtype=torch.bool, device=tokens.device)
    bad = ~running
    new: list[list[int]] = [[] for _ in prompts]
    for i in range(max_new_tokens):
        token = scores.argmax(dim=-1)  # of a row with NaN, a place that holds it
        bad |= running & ~scores.gather(1, token[:, None])[:, 0].isfinite()
        for end in (*ends, turn_end):
            running &= token != end
        for row in torch.nonzero(running).flatten().tolist():
            new[row].append(int(token[row]))
        if i == max_new_tokens - 1 or not bool(running.any()):
            break
        scores, state = step(model, state, token)
    if bad.any():  # asked once a batch: each answer waits for the device
        raise not_finite(
            model, f"the logits behind {new_text(tokenizer, (), prompts[int(bad.int().argmax())])[-60:]!r}"
        )
    return new


def new_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Text of the new ids as it stands behind the prompt.

    Both are decoded together: decoding new ids alone would lose the leading space of SentencePiece tokenizers.
    """
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    front = tokenizer.decode(list(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if whole.startswith(front):
        return whole[len(front) :]
    return tokenizer.decode(list(new), skip_special_tokens=True, clean_up_tokenization_spaces=False)
