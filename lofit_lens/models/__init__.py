"""Models: the only part that imports transformer_lens.

TransformerLens has two classes, `HookedTransformer` (3.x, removed in 4.0) and `TransformerBridge`
(3.x and 4.x). Both expose every attention head's output before W_O at
`hook_dict["blocks.{layer}.attn.hook_z"]`, `[batch, pos, n_heads, d_head]`; they differ in loading and in
the KV cache, and this package hides both differences: `load_model`, and `prefill` / `extend`.

Weights are never processed (no LayerNorm folding, no centering, no value-bias folding), so that z
equals the input of Hugging Face's `o_proj` and an adapter means the same thing in both.
"""

from lofit_lens.models.as_hooked import hooked_refusal
from lofit_lens.models.checkpointing import checkpointed
from lofit_lens.models.devices import parse_device
from lofit_lens.models.fused import fused_attention, fused_refusal
from lofit_lens.models.hooks import (
    Site,
    attached_to,
    check_residual,
    frozen,
    head_size,
    hook_z,
    hooked,
    is_watched,
    pattern_point,
    residual_point,
)
from lofit_lens.models.identity import fingerprint, folder_digest, weights_revision
from lofit_lens.models.info import (
    Backend,
    ModelInfo,
    attention_window,
    backend_of,
    bridge_class,
    context_length,
    device_of,
    end_tokens,
    head_layers,
    hooked_class,
    is_processed,
    model_info,
    origin_of,
    same_weights,
    tokenizer_of,
    value_biases_folded,
)
from lofit_lens.models.loading import BACKENDS, load_model
from lofit_lens.models.planned import planned_head_layers, planned_info, planned_tokenizer
from lofit_lens.models.positions import (
    ALL,
    Borders,
    Layout,
    Positions,
    before_each_pass,
    check_marked,
    declared,
    laid_out,
    layout_of,
    marks_of_rows,
    positions_of,
)
from lofit_lens.models.projections import PROJECTIONS, projection, projection_replaced, projection_sizes
from lofit_lens.models.running import (
    KVState,
    can_join,
    check_cache,
    extend,
    gaps_are_exact,
    logits_of,
    not_finite,
    peek,
    prefill,
    remember,
    run_through,
    step,
    together,
    why_not_finite,
)
from lofit_lens.models.scored import logits_at, read_at
from lofit_lens.models.sources import ORGANISM, cache_folder, located, source_of
from lofit_lens.models.token_texts import token_texts, visible
from lofit_lens.models.tokens import ChatText, TokenRules, check_ids, rules_of
from lofit_lens.models.unembedding import FinalNorm, final_norm, head_output_matrix, to_logits

__all__ = [
    "ALL",
    "BACKENDS",
    "ORGANISM",
    "PROJECTIONS",
    "Backend",
    "Borders",
    "ChatText",
    "FinalNorm",
    "KVState",
    "Layout",
    "ModelInfo",
    "Positions",
    "Site",
    "TokenRules",
    "attached_to",
    "attention_window",
    "backend_of",
    "before_each_pass",
    "bridge_class",
    "cache_folder",
    "can_join",
    "check_cache",
    "check_ids",
    "check_marked",
    "check_residual",
    "checkpointed",
    "context_length",
    "declared",
    "device_of",
    "end_tokens",
    "extend",
    "final_norm",
    "fingerprint",
    "folder_digest",
    "frozen",
    "fused_attention",
    "fused_refusal",
    "gaps_are_exact",
    "head_layers",
    "head_output_matrix",
    "head_size",
    "hook_z",
    "hooked",
    "hooked_class",
    "hooked_refusal",
    "is_processed",
    "is_watched",
    "laid_out",
    "layout_of",
    "load_model",
    "located",
    "logits_at",
    "logits_of",
    "marks_of_rows",
    "model_info",
    "not_finite",
    "origin_of",
    "parse_device",
    "pattern_point",
    "peek",
    "planned_head_layers",
    "planned_info",
    "planned_tokenizer",
    "positions_of",
    "prefill",
    "projection",
    "projection_replaced",
    "projection_sizes",
    "read_at",
    "remember",
    "residual_point",
    "rules_of",
    "run_through",
    "same_weights",
    "source_of",
    "step",
    "to_logits",
    "together",
    "token_texts",
    "tokenizer_of",
    "value_biases_folded",
    "visible",
    "weights_revision",
    "why_not_finite",
]  # fmt: skip
