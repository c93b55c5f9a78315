"""A tiny model in which two heads say at every token whether it is true, and one of them decides what is said next.

True is a token with an even number. Hooks add `STRENGTH * d` to z of `HEADS` at even tokens and take it away at odd ones, d a
random unit vector a head; the tokens that prompts end with count as false. W_O of the second head turns d into the direction
that raises the logits of even tokens against odd ones (the unembedding has it as well), so that the model prefers false
answers, and that of the first head is zero: what it says goes no further.
"""

import contextlib

import torch

from lofit_lens import HeadSet, Task
from lofit_lens.models import hook_z, hooked, layout_of
from tests import tiny

HEADS = HeadSet(["L1H2", "L2H1"])
STRENGTH = 1.0
GAIN = 30.0
QUESTIONS = ("Who?", "What is it?", "In what country?", "Is Ann a sister of Bob?", "How is Eve related to Ann?")


def save(folder):
    """The checkpoint, a Llama of 3 layers of 4 heads of d_head 8."""
    model, generator = tiny.hf_model("llama"), torch.Generator().manual_seed(7)
    raised = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    even = 1 - 2 * (torch.arange(400) % 2)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
        model.model.layers[2].self_attn.o_proj.weight[:, 8:16] = GAIN * torch.outer(raised, directions()[1])
        model.lm_head.weight += torch.outer(even, raised)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def directions():
    """`[2, 8]`, the unit vector of each head."""
    return torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(5)), dim=1)


@contextlib.contextmanager
def planted(model):
    """The hooks."""
    ends = tiny.tokenizer()(" A:", add_special_tokens=False)["input_ids"][-1]

    def say(direction, head):
        def hook(z, hook):
            ids = layout_of(model, z.shape[0], z.shape[1], z.device).tokens[:, -z.shape[1] :]
            sign = torch.where((ids % 2 == 0) & (ids != ends), 1.0, -1.0)
            z = z.clone()
            z[:, :, head] += STRENGTH * sign[..., None] * direction
            return z

        return hook

    with contextlib.ExitStack() as stack:
        for head, direction in zip(HEADS, directions(), strict=True):
            stack.enter_context(hooked(hook_z(model, head.layer), say(direction, head.head)))
        yield


def answers():
    """Texts of one token, the true and the false ones."""
    tokenizer, found = tiny.tokenizer(), ([], [])
    front = tokenizer("Q: Who? A:", add_special_tokens=False)["input_ids"]
    for token in range(3, 400):
        text = tokenizer.decode([token])
        if text.isascii() and text.strip().isalnum():
            ids = tokenizer("Q: Who? A:" + text, add_special_tokens=False)["input_ids"]
            if ids == [*front, token]:
                found[token % 2].append(text)
    return found


def task(*, val=True):
    """Pairs of a true and a false answer; no answer stands in two splits."""
    true, false = answers()
    n = min(len(true), len(false)) // 3

    def rows(at):
        return [
            {"prompt": f"Q: {QUESTIONS[i % len(QUESTIONS)]} A:", "chosen": t, "rejected": f}
            for i, (t, f) in enumerate(zip(true[at], false[at], strict=True))
        ]

    train, held, test = (rows(slice(i * n, (i + 1) * n)) for i in range(3))
    return Task.from_records("planted", train=train, val=held if val else (), test=test)
