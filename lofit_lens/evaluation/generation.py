"""Greedy decoding on the shared prefill / step calls: the same on both model classes, left-padded, mask always passed.

(TransformerLens' own `generate` ignores the mask in one class, and its rules differ between the two; see `models`.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.checks import check_whole, given, shown
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.batches import TOKEN_BUDGET, grouped
from lofit_lens.evaluation.prefix import NO_FRONT, SharedFront, shared_front
from lofit_lens.models import (
    Borders,
    KVState,
    backend_of,
    can_join,
    check_marked,
    context_length,
    device_of,
    end_tokens,
    frozen,
    fused_attention,
    marks_of_rows,
    not_finite,
    positions_of,
    remember,
    step,
    together,
    tokenizer_of,
)
from lofit_lens.progress import tqdm
from lofit_lens.tasks.chat import as_conversation, parsed, turn_of
from lofit_lens.tasks.collate import encode, marks_of, pad, pad_id

PADDING = 128  # padding tokens that prompts in one pass may waste; another pass would cost about as much
WASTE = 1024  # the same if prompts can only be decoded together after one pass; another batch would repeat all steps

Message = Mapping[str, str]


@overload
def generate(
    model: Any, prompts: str | list[Message], *, max_new_tokens: int = ..., batch_size: int | None = ...,
    token_budget: int = ..., progress: bool = ..., chat: bool = ..., system: str | None = ...,
) -> str: ...  # fmt: skip
@overload
def generate(
    model: Any, prompts: list[str] | tuple[str, ...] | list[list[Message]], *, max_new_tokens: int = ...,
    batch_size: int | None = ..., token_budget: int = ..., progress: bool = ..., chat: bool = ..., system: str | None = ...,
) -> list[str]: ...  # fmt: skip
def generate(
    model: Any, prompts: Any, *, max_new_tokens: int = 32, batch_size: int | None = None, token_budget: int = TOKEN_BUDGET,
    progress: bool = False, chat: bool = False, system: str | None = None,
) -> str | list[str]:  # fmt: skip
    """Continue prompts greedily, up to any of the checkpoint's end tokens (`models.end_tokens`) or `max_new_tokens`.

    Interventions of this package may edit certain positions only (`models.Positions`). Your own hook must treat all positions
    alike, since each pass sees only the new tokens.

    Args:
        model: any HookedTransformer or TransformerBridge, with whatever is attached to it.
        prompts: one text, or several; or one conversation, `[{"role": "user", "content": "..."}]`, or several, which always go
            through the model's chat template. A text may name positions for the attached adapter (`tasks.Marked`).
        max_new_tokens: length limit, in tokens.
        batch_size: maximum number of prompts decoded together; None = as many as the budget allows. Prompts are sorted by
            length, and results keep the given order.
        token_budget: padded tokens of prompts and answers that are decoded together (a single prompt may exceed it); lower it
            if memory runs out.
        progress: show a bar over prompts.
        chat: put each text through the model's chat template, as the user's turn.
        system: the system prompt; implies `chat`.

    Returns:
        The new text after each prompt, without special tokens; a text for a text, a list for a list.

    Raises:
        InputError: a limit below 1, no prompt, or a chat that the model has no chat template for, or whose template refuses it.
        DataError: a prompt that leaves no room in the model's context, or messages that do not form a conversation.
        ModelError: logits that are NaN or infinite; names the prompt.
    """
    backend_of(model)
    check_whole(1, max_new_tokens=max_new_tokens, token_budget=token_budget, **given(batch_size=batch_size))
    wanted = "give a text, a list of texts, or messages of a conversation"
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise InputError(f"prompts is {shown(prompts)}; {wanted}")
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    for i, prompt in enumerate(asked):
        if isinstance(prompt, bytes) or not isinstance(prompt, str | Sequence | Mapping):
            raise InputError(f"prompts holds {shown(prompt)} at index {i}; {wanted}")
    messages = any(isinstance(p, Mapping) for p in asked)  # the messages of one conversation
    single = isinstance(prompts, str) or messages
    listed = [_prompt(p, chat, system) for p in ([asked] if messages else asked)]
    if not listed:
        raise InputError("no prompt given")
    tokenizer, limit = tokenizer_of(model), context_length(model)
    turns = [turn_of(tokenizer, p) for p in listed]
    encoded = [encode(tokenizer, turn.prompt) for turn in turns]
    marks = [marks_of(tokenizer, turn, ids) for turn, ids in zip(turns, encoded, strict=True)]
    check_marked(positions_of(model), marks, "prompt")
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
    with (
        frozen(model),
        fused_attention(model, cached=True),
        tqdm(total=len(listed), desc="generate", disable=not progress, unit="prompt") as bar,
    ):
        front = shared_front(model, encoded, longest=max(map(len, encoded)) + max_new_tokens, marks=marks)
        own, cached = [len(ids) - len(front) for ids in encoded], len(front) + max_new_tokens
        padding = token_budget if can_join(model) else WASTE
        for rows in grouped(order, own, token_budget, padding=padding, cached=cached, most=batch_size):
            ends = [turns[i].end for i in rows]
            new_ids = decode_ids(
                model, [encoded[i] for i in rows], max_new_tokens, front=front, marks=[marks[i] for i in rows],
                turn_ends=ends, tell=bar.update,
            )  # fmt: skip
            for i, new in zip(rows, new_ids, strict=True):
                texts[i] = new_text(tokenizer, encoded[i], new)
    return texts[0] if single else texts


def _prompt(prompt: Any, chat: bool, system: str | None) -> str:
    """A text unchanged or as a chat, and messages as a conversation."""
    if not isinstance(prompt, str):
        prompt = parsed(prompt)
    return as_conversation(prompt, system) if chat or system is not None else prompt


@torch.no_grad()
def decode_ids(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, front: SharedFront = NO_FRONT,
    marks: Sequence[Sequence[bool] | None] = (), turn_ends: Sequence[int | None] = (),
    tell: Callable[[int], Any] = lambda n: None,
) -> list[list[int]]:  # fmt: skip
    """Decode one batch greedily up to an end token, which is left out. A prompt that has ended leaves the batch.

    `front` holds the keys and values of what all prompts begin with; `marks` the ids that each prompt marks (`marks_of`);
    `turn_ends` the token that ends each answer besides the model's own end tokens. `tell` is called with the number of prompts
    that are done.
    """
    tokenizer = tokenizer_of(model)
    ends = [{*end_tokens(model), turn_ends[i] if turn_ends else None} for i in range(len(prompts))]
    scores, state = _begun(model, prompts, front, marks or [None] * len(prompts))
    new: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # the prompt of each row of the batch
    for left in reversed(range(max_new_tokens)):
        token = scores.argmax(dim=-1)  # in a row with NaN, argmax points to a NaN
        sound = scores.gather(1, token[:, None])[:, 0].isfinite()
        going = []
        told = torch.stack([token, sound]).T.tolist()  # the only synchronization with the device in a step
        for row, (said, fine) in enumerate(told):
            prompt = running[row]
            if not fine:
                raise not_finite(model, f"the logits after {new_text(tokenizer, (), prompts[prompt])[-60:]!r}")
            if said not in ends[prompt]:
                new[prompt].append(said)
                going.append(row)
        tell(len(running) - (len(going) if left else 0))
        if not left or not going:
            break
        if len(going) < len(running):
            rows = torch.tensor(going)
            state, token, running = state.select(rows), token[rows.to(token.device)], [running[row] for row in going]
        scores, state = step(model, state, token)
    return new


def _begun(
    model: Any, prompts: Sequence[Sequence[int]], front: SharedFront, marks: Sequence[Sequence[bool] | None]
) -> tuple[Float[Tensor, "batch d_vocab"], KVState]:
    """Logits after each prompt, and the KV cache; prompts run in groups of similar length if their caches can be joined."""
    own = [p[len(front) :] for p in prompts]
    lengths = [len(p) for p in own]
    order = sorted(range(len(own)), key=lambda i: lengths[i])
    parts = []
    for rows in grouped(order, lengths, sum(lengths) + PADDING, padding=PADDING) if can_join(model) else [order]:
        tokens, mask = pad(
            [own[i] for i in rows], side="left", pad_id=pad_id(tokenizer_of(model)), device=device_of(model)
        )
        borders = Borders(torch.tensor([len(prompts[i]) for i in rows]), marks=marks_of_rows([marks[i] for i in rows]))
        parts.append(remember(model, front.rows(len(rows)), tokens, mask, borders))
    scores, state = torch.cat([found for found, _ in parts]), parts[0][1]
    if len(parts) > 1:
        state = together([state for _, state in parts])
    if order != list(range(len(order))):
        back = torch.tensor(order).argsort()
        scores, state = scores[back.to(scores.device)], state.select(back)
    return scores, state


def new_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Text of the new ids as it follows the prompt.

    Both are decoded together: decoding only the new ids would lose the leading space of SentencePiece tokenizers.
    """
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    front = tokenizer.decode(list(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if whole.startswith(front):
        return whole[len(front) :]
    return tokenizer.decode(list(new), skip_special_tokens=True, clean_up_tokenization_spaces=False)
