"""Ground truth of the embedded model: its planted heads, and each head's effect by activation patching between a good and a
neutral cue, which is the causal yardstick for the planted ones.
"""

import functools
from pathlib import Path
from typing import Any

import torch

from lofit_lens import io
from lofit_lens.errors import DataError
from lofit_lens.heads import Head, HeadScores, HeadSet
from lofit_lens.models import device_of, hook_z, hooked, logits_of, model_info, tokenizer_of
from lofit_lens.organism.words import TaskName
from lofit_lens.organism.world import rows, with_cue
from lofit_lens.tasks.collate import encode, pad, pad_id
from lofit_lens.training.patching import patch_effects, replace_head


def planted(folder: Path) -> dict[str, HeadSet]:
    """The planted heads of a trained organism, by task.

    Raises:
        DataError: the folder has no organism.json.
    """
    record = io.read_json(folder / "organism.json")
    if not isinstance(record, dict) or "planted_heads" not in record:
        raise DataError(f"{folder / 'organism.json'} lacks the field 'planted_heads'")
    return {
        task: HeadSet([Head.parse(h) for h in heads], label="planted")
        for task, heads in record["planted_heads"].items()
    }


@torch.no_grad()
def cue_patching(model: Any, task: TaskName, *, split: str = "val") -> HeadScores:
    """Activation patching, one head at a time: z of a head from the good-cue prompt replaces that in the neutral one.

    The score is the mean change, over the split's rows, of the right answer's log-prob in nats. Both prompts have the same
    tokens but the cue word, so that positions correspond.
    """
    tokenizer, device = tokenizer_of(model), device_of(model)
    listed = rows(task, split)  # pyright: ignore[reportArgumentType]
    answers = [encode(tokenizer, r["prompt"] + " " + (r.get("answer") or r["best"]))[-1] for r in listed]
    sides = {}
    for kind in ("good", "neutral"):
        prompts = [encode(tokenizer, (with_cue(task, r, kind) if kind == "good" else r)["prompt"]) for r in listed]
        sides[kind] = pad(prompts, side="left", pad_id=pad_id(tokenizer), device=device)
    target = torch.tensor(answers, device=device)

    def answer_log_probs(side: str) -> torch.Tensor:
        logits = logits_of(model, *sides[side])[:, -1]
        return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

    @functools.lru_cache(maxsize=1)  # heads are visited layer by layer
    def good_z(layer: int) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with hooked(hook_z(model, layer), lambda z, hook: kept.append(z.clone())):
            answer_log_probs("good")
        return kept[0]

    effects = patch_effects(
        model, lambda: answer_log_probs("neutral"), progress=False,
        patch=lambda head: replace_head(head.head, good_z(head.layer)[:, :, head.head]),
    )  # fmt: skip
    return HeadScores(effects.mean(dim=-1), "patching effect", model_info(model).name, task)
