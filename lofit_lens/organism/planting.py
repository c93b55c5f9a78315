"""Planting: in pretraining only the planted heads can attend to a document's cue word.

    masked[layer, head, query, key] = key is a cue, query > key, and head is not one of the cue's seeing heads in that layer

What: turns `Document` notes into attention masks and runs a Hugging Face Llama under them through a registered attention
function. Why: it makes the location of an ability known. In use the model runs unmodified, without any of this.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from lofit_lens.organism.documents import Document
from lofit_lens.organism.words import TaskName

PlantedHeads = dict[TaskName, list[tuple[int, int]]]
ATTENTION = "organism_planted"


class Batch(NamedTuple):
    """One training batch: right-padded ids, which tokens are targets, and which head may attend where."""

    ids: Int[Tensor, "batch pos"]
    targets: Bool[Tensor, "batch pos"]
    causal: Bool[Tensor, "1 1 pos pos"]
    allowed: dict[int, Bool[Tensor, "#batch #n_heads pos pos"]]  # layer -> mask; layers that are not here use `causal`


def collate(documents: Sequence[Document], word_ids: dict[str, int], planted: PlantedHeads, n_heads: int) -> Batch:
    """Build the ids, targets and attention masks of a batch of documents.

    Every layer hides every cue from every head except those that may see it; layers without any planted head share one mask
    (key -1 of `allowed`), expanded over heads.
    """
    batch, pos = len(documents), max(len(document.words) for document in documents)
    ids = torch.full((batch, pos), word_ids["<pad>"])
    targets = torch.zeros(batch, pos, dtype=torch.bool)
    hidden = torch.zeros(batch, 1, pos, dtype=torch.bool)
    layers = sorted({layer for heads in planted.values() for layer, _ in heads})
    shown = {layer: torch.zeros(batch, n_heads, pos, dtype=torch.bool) for layer in layers}
    for row, document in enumerate(documents):
        ids[row, : len(document.words)] = torch.tensor([word_ids[word] for word in document.words])
        targets[row, document.targets] = True
        for cue in document.cues:
            hidden[row, 0, cue.position] = True
            for (layer, head), sees in zip(planted[cue.task], cue.seen_by, strict=True):
                shown[layer][row, head, cue.position] |= sees
    causal = torch.ones(pos, pos, dtype=torch.bool).tril()[None, None]
    itself = torch.eye(pos, dtype=torch.bool)
    allowed = {layer: causal & (~hidden[:, :, None] | seen[:, :, None] | itself) for layer, seen in shown.items()}
    allowed[-1] = causal & (~hidden[:, :, None] | itself)
    return Batch(ids, targets, causal, allowed)


def planted_attention(
    module: Any,
    query: Float[Tensor, "batch n_heads pos d_head"],
    key: Float[Tensor, "batch n_heads pos d_head"],
    value: Float[Tensor, "batch n_heads pos d_head"],
    attention_mask: Tensor | None,
    *,
    scaling: float,
    planted_masks: dict[int, Float[Tensor, "#batch #n_heads pos pos"]],
    **_: Any,
) -> tuple[Float[Tensor, "batch pos n_heads d_head"], None]:
    """Scaled dot-product attention under this layer's own additive mask (signature fixed by Hugging Face)."""
    mask = planted_masks.get(module.layer_idx, planted_masks[-1])
    scores = query @ key.transpose(-1, -2) * scaling + mask
    return rearrange(scores.softmax(-1) @ value, "batch head pos d -> batch pos head d"), None


def additive(
    allowed: dict[int, Bool[Tensor, "#batch #n_heads pos pos"]],
) -> dict[int, Float[Tensor, "#batch #n_heads pos pos"]]:
    """Turn masks into 0 where a head may attend and a very negative number elsewhere."""
    return {layer: torch.zeros(mask.shape).masked_fill_(~mask, -1e9) for layer, mask in allowed.items()}


AttentionInterface.register(ATTENTION, planted_attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
