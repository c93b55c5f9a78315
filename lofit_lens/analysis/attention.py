"""What chosen heads attend to: their attention patterns on prompts, with any attached interventions active."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.checks import check_whole, texts_of
from lofit_lens.errors import DataError, InputError, ModelError
from lofit_lens.heads import Head, Heads, HeadSet
from lofit_lens.models import (
    context_length,
    device_of,
    frozen,
    hooked,
    model_info,
    pattern_point,
    run_through,
    token_texts,
    tokenizer_of,
)
from lofit_lens.tasks.collate import encode


@dataclass(frozen=True, eq=False)
class AttentionPatterns:
    """Attention of chosen heads on some prompts.

    Attributes:
        heads: the heads.
        prompts: the texts.
        tokens: for each prompt, its tokens as text (including BOS).
        patterns: for each prompt, `[K, pos, pos]` float32 on the CPU, heads in order: row = query token, column = key token; rows
            sum to 1.
        model: name of the model.
    """

    heads: HeadSet
    prompts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    patterns: tuple[Float[Tensor, "K _ _"], ...]
    model: str

    def of(self, head: Head | str | Sequence[int], prompt: int = 0) -> Float[Tensor, "pos pos"]:
        """One head's pattern of one prompt.

        Raises:
            InputError: a head or a prompt that is not in this result.
        """
        found = Head.parse(head)
        if found not in self.heads:
            raise InputError(f"no pattern of head {found}; the heads are {self.heads}")
        self.check_prompt(prompt)
        return self.patterns[prompt][self.heads.heads.index(found)]

    def check_prompt(self, prompt: int) -> None:
        """Raise InputError unless there is such a prompt."""
        check_whole(0, len(self.prompts) - 1, prompt=prompt)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; weights are rounded to 4 decimals, which is enough for a figure."""
        return {
            "kind": "lofit_lens.AttentionPatterns", "schema": 1, "model": self.model, "heads": self.heads.to_dict(),
            "prompts": list(self.prompts), "tokens": [list(t) for t in self.tokens],
            "patterns": [[[[round(x, 4) for x in row] for row in head] for head in p.tolist()] for p in self.patterns],
        }  # fmt: skip


@torch.no_grad()
def attention_patterns(model: Any, prompts: Sequence[str], heads: Heads) -> AttentionPatterns:
    """Attention patterns of some heads; prompts run one by one, and only the wanted heads are kept.

    Args:
        model: any HookedTransformer or TransformerBridge; attached interventions stay active.
        prompts: texts; BOS is prepended.
        heads: which heads.

    Raises:
        InputError: no prompt, no head, or a head outside the model.
        DataError: a prompt without tokens or longer than the context; names its index.
        ModelError: a layer that does not expose its attention pattern.
    """
    info, prompts, heads = model_info(model), texts_of("prompts", prompts), HeadSet.of(heads)
    if len(heads) == 0 or not prompts:
        raise InputError(f"{len(prompts)} prompts and {len(heads)} heads; give at least one of each")
    heads.check((info.n_layers, info.n_heads))
    tokenizer, limit, device = tokenizer_of(model), context_length(model), device_of(model)
    texts, patterns = [], []
    with frozen(model):
        for i, prompt in enumerate(prompts):
            ids = encode(tokenizer, prompt)
            if not 0 < len(ids) <= limit:
                raise DataError(f"prompt {i} has {len(ids)} tokens; {info.name} takes 1 to {limit}: change or drop it")
            found: dict[Head, Tensor] = {}
            with contextlib.ExitStack() as stack:
                for layer in heads.layers:
                    stack.enter_context(hooked(pattern_point(model, layer), _keeper(found, heads.restrict([layer]))))
                tokens = torch.tensor([ids], device=device)
                run_through(model, tokens, torch.ones_like(tokens))
            if missing := [h for h in heads if h not in found]:
                raise ModelError(
                    f"layer {missing[0].layer} of {info.name} does not expose its attention pattern; load the model "
                    "with eager attention"
                )
            texts.append(tuple(token_texts(tokenizer, ids)))
            patterns.append(torch.stack([found[h] for h in heads]))
    return AttentionPatterns(heads, tuple(prompts), tuple(texts), tuple(patterns), info.name)


def _keeper(found: dict[Head, Tensor], heads: HeadSet) -> Any:
    def keep(pattern: Float[Tensor, "batch n_heads query key"], hook: Any) -> None:
        for head in heads:
            found[head] = pattern[0, head.head].detach().float().cpu().clone()

    return keep
