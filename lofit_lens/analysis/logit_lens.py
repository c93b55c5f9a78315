"""The direct effect of a head's offset on the logits: the tokens that it makes more and less likely.

    u_h = v_h W_O[h]                                    what the offset adds to the residual stream, at every position
    logits_h = (w * centered(u_h)) W_U * mean(1 / s)    its direct share of the logits, minus their mean over the vocabulary

s is the divisor of the final norm at the predicting position (the last one of each prompt), measured on prompts with only the
caller's interventions attached. With s fixed, the path is linear, so heads' shares add up; the mean of the shares over prompts
is the share at mean(1 / s). Without prompts s = 1: then the order of tokens is right, but their logits are only relative.
The effect of an offset through later layers (its indirect effect) is not included.

Every vector promotes some tokens, so a list of them means nothing by itself. The yardstick is a random offset: a direction
drawn uniformly in the head's space, with the offset's norm (for the total: one for each head, independent). The mean of the
listed logits is compared with the mean that each random offset gives to as many of *its own* strongest tokens; p = (1 + random
ones at least as large) / (1 + random ones), separately for promoted and suppressed tokens. If the offset is itself such a draw,
every rank among 199 others is equally likely, so that p <= 0.05 in exactly 10 of 200 cases, whatever W_O and W_U are (0.046 of
4,608 such lists were called better in a simulation on the embedded model). The size is compared and not the shape (e.g. the
first logit over the standard deviation): random offsets have as peaked a list as learned ones, which move whole families of
tokens. Each p is for one list: of K heads at chance, one list in twenty comes out better.

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
DRAWS = 199  # random offsets to compare each with
LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class HeadTokens:
    """The tokens that each head promotes and suppresses.

    Attributes:
        frame: one row per token: `head` (`"L1H2"`, or `"total"` for the sum over heads), `kind` (`"promoted"` or `"suppressed"`),
            `rank` (from 1, strongest first), `token_id`, `token`, `logit` (minus the mean over the vocabulary); `chance`: 95 % of
            random offsets of equal norm give the token of this rank in their own list less than this; `p` of the whole list, the
            same in all its rows: the share of random offsets whose own list has a mean logit at least as large.
        heads: the heads, in the order of the frame.
        scale: 1 / mean(1 / s) over the prompts, the final norm's divisor; None without prompts (logits are relative).
        n_prompts: number of prompts that s was measured on.
        model: name of the model.
        task: name of the task that the offsets were learned on.
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
            raise InputError(f"no tokens of {name}; the heads are {', '.join(self.frame['head'].unique())}")
        return rows.reset_index(drop=True)  # pyright: ignore[reportReturnType]

    def no_better_than_chance(self, head: Head | str | Sequence[int]) -> list[str]:
        """Names of a head's lists (`"promoted"`, `"suppressed"`) that are no stronger than random offsets' (p above 0.05).

        Empty if p is not known, as in results of older versions.

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
    """Find the tokens that each head's offset v promotes and suppresses, and those of all offsets together.

    Args:
        model: any HookedTransformer or TransformerBridge that the adapter fits.
        lofit: an adapter with offsets.
        heads: which of its heads; None = all. The total is over these.
        top: number of tokens of either kind.
        prompts: texts on whose last token the final norm's scale is measured.
        seed: seed of the random offsets.

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
        raise InputError("no head to read; give at least one of the adapter's heads")
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
    """As `promoted_tokens`, for any direction of each head, in units of z: a probe's, a mean difference, a row of z itself.

    Args:
        model: any HookedTransformer or TransformerBridge.
        directions: one per head, in the order of `heads`.
        heads: the heads.
        top: number of tokens of either kind.
        prompts: texts on whose last token the final norm's scale is measured.
        seed: seed of the random offsets; those of a head do not depend on the other heads.
        task: stored in the result.

    Raises:
        InputError: not one direction per head, `top` outside 1 to half of the vocabulary, or an empty list of prompts.
        ModelError: heads that have no direct path to the stream.
        DataError: a prompt longer than the context.
    """
    info, heads = model_info(model), HeadSet.of(heads)
    heads.check((info.n_layers, info.n_heads))
    d_head = head_size(model, heads.layers)
    if not isinstance(directions, Tensor) or tuple(directions.shape) != (len(heads), d_head):
        of = f"of shape {tuple(directions.shape)}" if isinstance(directions, Tensor) else shown(directions)
        raise InputError(
            f"directions {of} for {len(heads)} heads; give a tensor [{len(heads)}, {d_head}], one row per head"
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
        logits = _centered(model, u[None], scale, norm)[0].cpu()
        others = _centered(model, drawn, scale, norm)
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
    """Map each head's direction to what it adds to the residual stream, `d W_O[h]`, float32.

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
    """What random directions of each head add to the residual stream; they have the norm of its own direction."""
    found = []
    for head, norm in zip(heads, torch.linalg.vector_norm(directions.float(), dim=1).tolist(), strict=True):
        drawn = np.random.default_rng([seed, *head]).normal(size=(DRAWS, directions.shape[1]))
        drawn *= norm / np.linalg.norm(drawn, axis=1, keepdims=True)
        W = head_output_matrix(model, head.layer)[head.head].float()
        found.append((torch.from_numpy(drawn).float().to(W.device) @ W).cpu())
    return torch.stack(found)


def _centered(
    model: Any, streams: Float[Tensor, "n d_model"], scale: float | None, norm: FinalNorm
) -> Float[Tensor, "n d_vocab"]:
    """Logits of these vectors, minus each one's mean over the vocabulary."""
    logits = to_logits(model, streams, scale or 1.0, norm=norm)
    return logits - logits.mean(dim=1, keepdim=True)


def _mean_scale(model: Any, prompts: Sequence[str]) -> float:
    """1 / mean(1 / s) at the last token of the prompts."""
    prompts = texts_of("prompts", prompts)
    if not prompts:
        raise InputError("prompts is an empty list; give at least one, or None for relative logits")
    last, norm, tokenizer = model_info(model).n_layers - 1, final_norm(model), tokenizer_of(model)
    with record(model, [encode(tokenizer, p) for p in prompts], what="resid", layers=[last], progress=False) as found:
        stream = torch.from_numpy(np.array(found.layer(last)))
    return float(1 / (1 / norm.scale(stream).double()).mean())
