"""Analysis of head sets, runs and adapters. Functions return data; figures are in `lofit_lens.plots`.

| question | function |
|---|---|
| do head sets agree, more than by chance? | `overlap`, `score_agreement`, `agreement_by_k`, `agreement` |
| where in the model are they? | `layer_shares`, `mean_layers`, `mean_layer_differences` |
| is selection reproducible? | `stability`, `selection_frequency`, `mean_spearman` |
| do other tasks' heads work as well? | `transfer_matrix` |
| do chosen heads do better than random ones? | `chosen_against_random` |
| how many heads, how many examples? | `sweep`, `paired_differences` |
| what does an adapter promote, where do its vectors point? | `promoted_tokens`, `promoted_by`, `geometry`, `offset_cosines` |
| what do the heads attend to? | `attention_patterns` |
| are the heads necessary, are they sufficient? | `leave_one_out`, `keep_only`, `removal`, `drop_edits` |
| do the heads carry the answer? | `answer_patching` |
| what does an adapter change inside the model? | `drift` |
| do adapters interfere, do they work after long contexts? | `interference`, `learned_in_turn`, `long_context` |
"""

from lofit_lens.analysis.answers import AnswerPatching, answer_patching
from lofit_lens.analysis.attention import AttentionPatterns, attention_patterns
from lofit_lens.analysis.controls import ControlTest, chosen_against_random
from lofit_lens.analysis.drift import Drift, drift
from lofit_lens.analysis.geometry import geometry, offset_cosines
from lofit_lens.analysis.interference import Interference, LongContext, interference, learned_in_turn, long_context
from lofit_lens.analysis.layers import layer_shares, mean_layer_differences, mean_layers
from lofit_lens.analysis.logit_lens import HeadTokens, promoted_by, promoted_tokens
from lofit_lens.analysis.needed import KeepOnly, LeaveOneOut, Removal, drop_edits, keep_only, leave_one_out, removal
from lofit_lens.analysis.overlap import agreement, agreement_by_k, overlap, score_agreement
from lofit_lens.analysis.stability import mean_spearman, selection_frequency, stability
from lofit_lens.analysis.sweeps import paired_differences, sweep
from lofit_lens.analysis.transfer import Transfer, transfer_matrix

__all__ = [
    "AnswerPatching", "AttentionPatterns", "ControlTest", "Drift", "HeadTokens", "Interference", "KeepOnly", "LeaveOneOut",
    "LongContext", "Removal", "Transfer", "agreement", "agreement_by_k", "answer_patching", "attention_patterns",
    "chosen_against_random", "drift", "drop_edits", "geometry", "interference", "keep_only", "layer_shares", "learned_in_turn",
    "leave_one_out", "long_context", "mean_layer_differences", "mean_layers", "mean_spearman", "offset_cosines", "overlap",
    "paired_differences", "promoted_by", "promoted_tokens", "removal", "score_agreement", "selection_frequency", "stability",
    "sweep", "transfer_matrix",
]  # fmt: skip
