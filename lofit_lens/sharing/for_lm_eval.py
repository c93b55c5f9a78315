"""lm-evaluation-harness on an edited model: the tool's own Hugging Face class, with the model of a bridge and adapters attached.

A bridge's `original_model` is the Hugging Face model itself, whose layers fire the bridge's HookPoints. So each pass of the tool
runs with the adapters attached, and returns the bridge's logits.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from lofit_lens.checks import optional
from lofit_lens.errors import InputError, ModelError
from lofit_lens.interventions import attached
from lofit_lens.interventions.base import Intervention, adapters_of
from lofit_lens.models import backend_of, context_length, positions_of, tokenizer_of
from lofit_lens.tasks.collate import encode, pad, pad_id

logger = logging.getLogger(__name__)

# Folder of `lofit_mquake`, `lofit_clutrr` and `lofit_truthfulqa` in the tool's format; they read local or pinned files.
LM_EVAL_TASKS = Path(__file__).with_name("lm_eval_tasks")


def lm_eval_model(
    model: Any, adapter: Intervention | Sequence[Intervention] | None = None, *, batch_size: int | str = 8
) -> Any:
    """Make a model for `lm_eval.simple_evaluate`: an `HFLM` with the logits of `model` with an adapter attached.

    The adapter is attached only while a pass of the tool runs. Text is tokenized as everywhere in this package, including BOS.

    Args:
        model: a TransformerBridge. HookedTransformer holds no Hugging Face model; load the checkpoint again with
            `load_model(..., backend="bridge")`, or give the output of `export_folded` to `lm_eval --model hf`.
        adapter: one that acts at all positions, or several in order; None = whatever is attached meanwhile.
        batch_size: sequences run together, or `"auto"`.

    Raises:
        InputError: lm_eval is not installed, `adapter` is not an adapter, or it acts at certain positions, which the tool does
            not report.
        ModelError: not a TransformerBridge.
        AdapterError: an adapter that does not fit.
    """
    if backend_of(model) != "bridge":
        raise ModelError(
            "HookedTransformer holds no Hugging Face model that lm_eval could run; load it with load_model(..., "
            "backend='bridge') (--backend bridge), or evaluate what export_folded writes (lm_eval --model hf)"
        )
    HFLM = optional("lm_eval.models.huggingface", "lm_eval", "lm-eval").HFLM
    adapters = () if adapter is None else adapters_of(adapter)
    tokenizer = copy.deepcopy(tokenizer_of(model))  # the tool changes its padding
    fill = pad_id(tokenizer)
    tokenizer.pad_token_id = fill

    class EditedModel(HFLM):
        def _model_call(self, *given: Any, **options: Any) -> Tensor:
            with attached(model, *adapters):
                _check_positions(model)
                return super()._model_call(*given, **options)

        def _model_generate(self, *given: Any, **options: Any) -> Tensor:
            with attached(model, *adapters):
                _check_positions(model)
                return super()._model_generate(*given, **options)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
        ) -> list[int]:
            if add_special_tokens is False:
                ids = list(tokenizer(string, add_special_tokens=False)["input_ids"])
            else:
                ids = encode(tokenizer, string)
            if left_truncate_len and len(ids) > left_truncate_len:
                logger.warning("a text of %d tokens is truncated to its last %d", len(ids), left_truncate_len)
                ids = ids[-left_truncate_len:]
            return ids

        def tok_batch_encode(
            self,
            strings: Sequence[str],
            padding_side: Any = "left",
            left_truncate_len: int | None = None,
            truncation: bool = False,
        ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
            rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
            return pad(rows, side=padding_side, pad_id=fill, device="cpu")

    with attached(model, *adapters):
        _check_positions(model)
    training = model.original_model.training
    made = EditedModel(
        pretrained=model.original_model, tokenizer=tokenizer, batch_size=batch_size, max_length=context_length(model)
    )
    model.original_model.train(training)
    return made


def _check_positions(model: Any) -> None:
    """Raise InputError if an attached intervention acts only at certain positions."""
    if some := [str(p) for p in positions_of(model) if not p.everywhere]:
        raise InputError(
            f"the attached adapter acts at positions {', '.join(some)}, but lm_eval does not say where prompts end; make one "
            "that acts everywhere (with_positions('all')), or evaluate it here: ll.evaluate, lofit-lens eval"
        )
