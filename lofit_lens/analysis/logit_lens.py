"""What a head's offset says by itself: the tokens that it makes more and less likely.

    u_h = v_h W_O[h]                                    what the offset adds to the residual stream, at every position
    logits_h = (w * centred(u_h)) W_U * mean(1 / s)     its direct share of the logits, minus their mean over the vocabulary

s is what the final norm divides by at the position that predicts (the last one of each prompt), measured on prompts while nothing
but what the caller attached acts. Held fixed, it makes the path linear, so that heads' shares add up; the mean over prompts of
the shares is the share at mean(1 / s). Without prompts s = 1: then the order of tokens is right, the sizes only relative.
What later layers make of an offset (its indirect effect) is not in these numbers.

Every vector promotes some tokens, so that a list of them means nothing by itself. The yardstick is a random offset: a direction
drawn evenly over the head's space, of the offset's norm (of the total: one for each head, independent). Compared is the mean of
the listed logits, with the mean that each random offset gives to *its own* strongest tokens, as many of them; p = (1 + random
ones at least as large) / (1 + random ones), for promoted and suppressed tokens apart. If the offset is itself such a draw, it is
as likely to take any place among 199 others, so that p <= 0.05 in exactly 10 of 200 cases, whatever W_O and W_U are (0.046 of
4,608 such lists were called better in a simulation on the embedded model). The size is compared and not the shape (the first
logit over the standard deviation, say): random offsets have as pointed a list as learned ones, which move whole families of
tokens. p is of one list: among K heads, one in twenty lists of chance comes out better.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits" (W_O W_U as a head's direct path).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lofit_lens.checks import check_is, check_seed, check_whole, shown, texts_of
from lofit_lens.errors import InputError
from lofit_lens.heads import Head, Heads, HeadSet
from lofit_lens.interventions.lofit import LOFIT, Lofit
from lofit_lens.models import (
    FinalNorm,
    backend_of,
    final_norm,
    head_output_matrix,
    head_size,
    model_info,
    to_logits,
    token_texts,
    tokenizer_of,
)
from lofit_lens.probing.record import record
from lofit_lens.tasks.collate import encode

TOTAL = "total"
KINDS = {"promoted": 1, "suppressed": -1}
DRAWS = 199  # random offsets beside each
LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class HeadTokens:
    """The tokens that each head promotes and suppresses.

    Attributes:
        frame: one row a token: `head` (`"L1H2"`, or `"total"` for the sum over heads), `kind` (`"promoted"` or `"suppressed"`),
            `rank` (from 1, strongest first), `token_id`, `token`, `logit` (minus the mean over the vocabulary); `chance`: 95 % of
            random offsets of equal norm give the token of this rank in their own list less than this; `p` of the whole list, the
            same in all its rows: the share of random offsets whose own list has a mean logit at least as large.
        heads: in the order of the frame.
        scale: 1 / mean(1 / s) over the prompts, what the final norm divides by; None without prompts (logits are relative).
        n_prompts: prompts that s was measured on.
        model: name of the model.
        task: what the offsets were learned on.
    """

    frame: pd.DataFrame
    heads: HeadSet
    scale: float | None
    n_prompts: int
    model: str
    task: str

    @property
    def unit(self) -> str:
        """Of `logit`."""
        return "logits" if self.scale is not None else "logits at norm scale 1"

    def of(self, head: Head | str | Sequence[int]) -> pd.DataFrame:
        """Rows of one head, or of `"total"`.

        Raises:
            InputError: a head that is not here.
        """
        name = head if head == TOTAL else str(Head.parse(head))
        rows = self.frame.loc[self.frame["head"] == name]
        if rows.empty:
            raise InputError(f"no tokens of {name}; there are those of {', '.join(self.frame['head'].unique())}")
        return rows.reset_index(drop=True)  # pyright: ignore[reportReturnType]

    def no_better_than_chance(self, head: Head | str | Sequence[int]) -> list[str]:
        """Which of a head's lists (`"promoted"`, `"suppressed"`) are no stronger than random offsets' (p above 0.05).

        Empty where that is not known, as in results of older versions.

        Raises:
            InputError: a head that is not here.
        """
        rows = self.of(head)
        return list(dict.fromkeys(rows.loc[rows["p"] > LEVEL, "kind"])) if "p" in rows else []

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kind": "lofit_lens.HeadTokens", "schema": 1, "model": self.model, "task": self.task,
            "heads": self.heads.to_dict(), "scale": self.scale, "n_prompts": self.n_prompts, "unit": self.unit,
            "rows": self.frame.to_dict("records"),
        }  # fmt: skip


def promoted_tokens(
    model: Any,
    lofit: Lofit,
    *,
    heads: Heads | None = None,
    top: int = 10,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
) -> HeadTokens:
    """The tokens that each head's offset v promotes and suppresses, and those of all offsets together.

    Args:
        model: any HookedTransformer or TransformerBridge that the adapter fits.
        lofit: an adapter with offsets.
        heads: which of its heads; None = all. The total is over these.
        top: tokens of either kind.
        prompts: on which the final norm's scale is measured, at the last token.
        seed: of the random offsets.

    Raises:
        InputError: heads without an offset, `top` below 1 or above half of the vocabulary, or an empty list of prompts.
        AdapterError: an adapter for another shape.
        ModelError: heads that have no direct path to the stream.
        DataError: a prompt longer than the context.
    """
    backend_of(model)
    check_is(lofit, Lofit, "lofit", LOFIT)
    lofit._check_shape(model)
    chosen = lofit.heads if heads is None else HeadSet.of(heads)
    if missing := [str(h) for h in chosen if h not in lofit.heads]:
        raise InputError(f"{', '.join(missing)} not in this adapter; it has offsets on {lofit.heads}")
    if len(chosen) == 0:
        raise InputError("no head to read; give some of the adapter's heads")
    v = torch.stack([lofit.v.detach()[h] for h in chosen])
    if not bool(v.any()):
        raise InputError(
            "every offset of these heads is zero; tune offsets first (a scaling A has no tokens of its own: what it adds "
            "depends on z)"
        )
    return promoted_by(model, v, chosen, top=top, prompts=prompts, seed=seed, task=lofit.meta.task)


@torch.no_grad()
def promoted_by(
    model: Any,
    directions: Float[Tensor, "K d_head"],
    heads: Heads,
    *,
    top: int = 10,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    task: str = "",
) -> HeadTokens:
    """The same for any direction of each head, in units of z: a probe's, a mean difference, a row of z itself.

    Args:
        model: any HookedTransformer or TransformerBridge.
        directions: one a head, in the order of `heads`.
        heads: the heads.
        top: tokens of either kind.
        prompts: on which the final norm's scale is measured, at the last token.
        seed: of the random offsets; a head's are the same whichever other heads are asked for.
        task: kept in the result.

    Raises:
        InputError: another number of directions than heads, `top` outside 1 to half of the vocabulary, or no prompt in the list.
        ModelError: heads that have no direct path to the stream.
        DataError: a prompt longer than the context.
    """
    info, heads = model_info(model), HeadSet.of(heads)
    heads.check((info.n_layers, info.n_heads))
    d_head = head_size(model, heads.layers)
    if not isinstance(directions, Tensor) or tuple(directions.shape) != (len(heads), d_head):
        of = f"of shape {tuple(directions.shape)}" if isinstance(directions, Tensor) else shown(directions)
        raise InputError(
            f"directions {of} for {len(heads)} heads; give a tensor [{len(heads)}, {d_head}], one row a head"
        )
    check_whole(1, info.d_vocab // 2, top=top)
    check_seed(seed)
    streams = to_stream(model, directions, heads)
    scale = None if prompts is None else _mean_scale(model, prompts)
    norm, tokenizer, rows = final_norm(model), tokenizer_of(model), []
    every = torch.cat([streams, streams.sum(dim=0, keepdim=True)])
    random = _random_streams(model, directions, heads, seed)
    random = torch.cat([random, random.sum(dim=0, keepdim=True)])
    for name, u, drawn in zip([*map(str, heads), TOTAL], every, random, strict=True):
        logits = _centred(model, u[None], scale, norm)[0].cpu()
        others = _centred(model, drawn, scale, norm)
        for kind, sign in KINDS.items():
            ids = torch.argsort(logits * sign, descending=True, stable=True)[:top]
            lists = (others * sign).topk(top, dim=1).values.cpu()
            chance = sign * lists.quantile(1 - LEVEL, dim=0)
            p = (1 + int((lists.mean(dim=1) >= sign * logits[ids].mean()).sum())) / (1 + DRAWS)
            rows += [
                {
                    "head": name, "kind": kind, "rank": i + 1, "token_id": t, "token": text, "logit": float(logits[t]),
                    "chance": float(chance[i]), "p": p,
                }
                for i, (t, text) in enumerate(zip(ids.tolist(), token_texts(tokenizer, ids.tolist()), strict=True))
            ]  # fmt: skip
    return HeadTokens(pd.DataFrame(rows), heads, scale, len(prompts or ()), info.name, task)


@torch.no_grad()
def to_stream(model: Any, directions: Float[Tensor, "K d_head"], heads: HeadSet) -> Float[Tensor, "K d_model"]:
    """What each head's direction adds to the residual stream, `d W_O[h]`, float32.

    Raises:
        ModelError: heads that have no direct path to the stream.
    """
    found: dict[Head, Tensor] = {}
    for layer in heads.layers:
        W = head_output_matrix(model, layer)
        for i, head in enumerate(heads):
            if head.layer == layer:
                found[head] = (directions[i].float().to(W.device) @ W[head.head]).cpu()
    return torch.stack([found[head] for head in heads])


def _random_streams(
    model: Any, directions: Float[Tensor, "K d_head"], heads: HeadSet, seed: int
) -> Float[Tensor, "K draws d_model"]:
    """What random directions of each head, of the norm of its own, add to the residual stream."""
    found = []
    for head, norm in zip(heads, torch.linalg.vector_norm(directions.float(), dim=1).tolist(), strict=True):
        drawn = np.random.default_rng([seed, *head]).normal(size=(DRAWS, directions.shape[1]))
        drawn *= norm / np.linalg.norm(drawn, axis=1, keepdims=True)
        W = head_output_matrix(model, head.layer)[head.head].float()
        found.append((torch.from_numpy(drawn).float().to(W.device) @ W).cpu())
    return torch.stack(found)


def _centred(
    model: Any, streams: Float[Tensor, "n d_model"], scale: float | None, norm: FinalNorm
) -> Float[Tensor, "n d_vocab"]:
    """Their logits, minus the mean of each over the vocabulary."""
    logits = to_logits(model, streams, scale or 1.0, norm=norm)
    return logits - logits.mean(dim=1, keepdim=True)


def _mean_scale(model: Any, prompts: Sequence[str]) -> float:
    """1 / mean(1 / s) at the last token of the prompts."""
    prompts = texts_of("prompts", prompts)
    if not prompts:
        raise InputError("prompts is an empty list; give one or more, or None for relative sizes")
    last, norm, tokenizer = model_info(model).n_layers - 1, final_norm(model), tokenizer_of(model)
    with record(model, [encode(tokenizer, p) for p in prompts], what="resid", layers=[last], progress=False) as found:
        stream = torch.from_numpy(np.array(found.layer(last)))
    return float(1 / (1 / norm.scale(stream).double()).mean())
