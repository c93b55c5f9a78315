"""What tests of head selectors share: two small tasks, a planted model through a checkpoint, and slow computations."""

import pytest
import torch

from lofit_lens import Task
from lofit_lens.models import load_model
from lofit_lens.tasks.collate import encode
from lofit_lens.tasks.examples import SFTExample
from tests import tiny
from tests.adapters import output_projection
from tests.test_planted import planted_model, planted_of

PLACES = ("France", "Rome", "Ann", "Bob", "Eve", "a book", "the author", "an uncle")
ANSWERS = (" of", " the capital", " a sister in law", " Rome")
SFT = Task.from_records(
    "plain",
    train=[{"prompt": f"Q: where is {p}? A:", "answer": ANSWERS[i % 4]} for i, p in enumerate(PLACES)],
    test=[{"prompt": "Q: who? A:", "answer": " Ann"}],
)
DPO = Task.from_records(
    "pairs",
    train=[
        {"prompt": f"Q: where is {p}? A:", "chosen": ANSWERS[i % 4], "rejected": ANSWERS[(i + 1 + i // 4) % 4]}
        for i, p in enumerate(PLACES)
    ],
    test=[{"prompt": "Q: who? A:", "chosen": " Ann", "rejected": " Bob"}],
)
TASKS = pytest.mark.parametrize("task", [SFT, DPO], ids=["sft", "dpo"])


def answer_log_prob(plain, tokenizer, prompt, answer, *, eos):
    """Summed log-prob by plain Hugging Face; `tokenizer` must not merge across the border."""
    front, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    assert whole[: len(front)] == front
    ids = torch.tensor([whole + ([tokenizer.eos_token_id] if eos else [])])
    values = plain(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return values[len(front) - 1 :].sum()


def answers_of(example):
    return [example.answer] if isinstance(example, SFTExample) else [example.chosen, example.rejected]


def no_hooks(model):
    return not any(p.fwd_hooks or p._forward_hooks for p in model.hook_dict.values())


def z_at_end(plain, ids, at=-1):
    """z of all heads at one position, `[n_layers, n_heads * d_head]`, by pre-hooks on W_O of plain Hugging Face."""
    seen, n = [], plain.config.num_hidden_layers
    handles = [
        output_projection(plain, i).register_forward_pre_hook(lambda m, args: seen.append(args[0][0, at].clone()))
        for i in range(n)
    ]
    plain(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def planted_on_class(folder, seed, backend, change=lambda plain, planted: None):
    """The planted model of test_planted, changed, through a checkpoint."""
    plain = planted_model(planted_of(seed), seed)
    with torch.no_grad():
        change(plain, planted_of(seed))
    plain.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return load_model(folder, backend=backend, device="cpu")
