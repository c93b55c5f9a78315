"""What `processes.py` compares with: plain transformers and torch, no part of this package.

python benchmarks/plain_transformers.py generate|step GIVEN OUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def edit(model, A, v):
    """`(1 + A) * z + v` at the input of every `o_proj`; A and v are `[n_layers, n_heads, d_head]`."""
    for layer, block in enumerate(model.model.layers):

        def hook(module, args, layer=layer):
            return (args[0] * (1 + A[layer].flatten()) + v[layer].flatten(),)

        block.self_attn.o_proj.register_forward_pre_hook(hook)


def padded(rows, side):
    """Token ids and mask of rows of different length."""
    width = max(map(len, rows))
    gaps = [[0] * (width - len(r)) for r in rows]
    ids = [g + r if side == "left" else r + g for g, r in zip(gaps, rows, strict=True)]
    mask = [
        [0] * len(g) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(g)
        for g, r in zip(gaps, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def generate(model, tokenizer, given):
    """Answers, greedy, in batches of neighbours in length."""
    v = torch.tensor(given["v"])
    edit(model, torch.zeros_like(v), v)
    prompts, texts = given["prompts"], {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), given["batch"]):
        rows = order[first : first + given["batch"]]
        ids, mask = padded([prompts[i] for i in rows], "left")
        said = model.generate(
            ids, attention_mask=mask, max_new_tokens=given["max_new_tokens"], do_sample=False, pad_token_id=0
        )
        for i, new in zip(rows, said[:, ids.shape[1] :].tolist(), strict=True):
            ends = [new.index(e) for e in {tokenizer.eos_token_id, model.config.eos_token_id} if e in new]
            texts[i] = tokenizer.decode(new[: min(ends, default=len(new))], skip_special_tokens=True)
    return [texts[i] for i in range(len(prompts))]


def step(model, tokenizer, given):
    """The loss of one step of selecting heads."""
    model.requires_grad_(False)
    A = (0.001 * torch.randn(torch.tensor(given["v"]).shape)).requires_grad_()
    edit(model, A, torch.zeros_like(A))
    optimizer = torch.optim.AdamW([A], lr=given["lr"])
    ids, mask = padded([row for row, _ in given["rows"]], "right")
    targets = ids.masked_fill(mask == 0, -100)
    for i, (_, start) in enumerate(given["rows"]):
        targets[i, :start] = -100
    logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten()) + given["l1"] * A.abs().sum()
    loss.backward()
    optimizer.step()
    return float(loss)


if __name__ == "__main__":
    what, source, out = sys.argv[1:]
    asked = json.loads(Path(source).read_text())
    plain = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(asked["model"])
    Path(out).write_text(json.dumps({"generate": generate, "step": step}[what](plain, words, asked)))
