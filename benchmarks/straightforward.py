"""Select, tune, evaluate as one would write it down: what `whole_run.py` compares the library with.

Random batches padded to the longest, logits of all places, the class's own attention, one forward pass of the whole prompt for
every answer choice (batch of one), greedy decoding of every batch to the last allowed token. Decoding keeps the keys and values
of its own batch (anyone's would); nothing is shared between prompts. It has the library's prompts, token ids, starting values,
order of rows, optimiser and settings, so that both learn the same.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lofit_lens.evaluation.generation import new_text
from lofit_lens.evaluation.multiple_choice import mc_metrics
from lofit_lens.heads import HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.models import device_of, end_tokens, frozen, hook_z, hooked, prefill, step, tokenizer_of
from lofit_lens.models.running import uncached
from lofit_lens.tasks import ChoiceExample, GenerationExample, Task
from lofit_lens.tasks.collate import Encoded, encode, encode_continuations, encode_training, pad
from lofit_lens.training import TrainConfig

BATCH = 16  # prompts decoded together


@contextlib.contextmanager
def edited(model: Any, A: Tensor, v: Tensor, layers: Sequence[int]) -> Iterator[None]:
    """`z * (1 + A) + v` in some layers."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(
                hooked(hook_z(model, layer), lambda z, hook, layer=layer: (z * (1 + A[layer]) + v[layer]).to(z.dtype))
            )
        yield


def summed(model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Summed log-prob of each row's answer, and the number of its tokens."""
    tokens, mask = pad([r.ids for r in rows], side="right", pad_id=0, device=device_of(model))
    targets = tokens.masked_fill(mask == 0, -100)
    for i, row in enumerate(rows):
        targets[i, : row.start] = -100
    logits, wanted = model(tokens, attention_mask=mask, **uncached(model))[:, :-1], targets[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(wanted.shape).sum(dim=1), (wanted != -100).sum(dim=1)


def train(
    model: Any, task: Task, heads: HeadSet | None, component: str, config: TrainConfig, *, seed: int, n_train: int
) -> tuple[Tensor, list[float]]:
    """Train A or v; the learned values `[n_layers, n_heads, d_head]`, and each step's loss."""
    forms = [encode_training(tokenizer_of(model), e) for e in task.training_examples("train", n=n_train, seed=seed)]
    start = Lofit.for_model(model, heads).init_(component, seed=seed, std=config.init_std)  # type: ignore[arg-type]
    values = getattr(start, component).detach().clone().requires_grad_(True)
    zero, keep = torch.zeros_like(values), start.mask[..., None].to(values.device)
    A, v = (values, zero) if component == "A" else (zero, values)
    optimizer = torch.optim.AdamW(
        [values], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    pairs, losses = task.objective == "dpo", []
    n_steps = -(-len(forms) // config.batch_size) * config.epochs
    with frozen(model):
        if pairs:
            with torch.no_grad():
                reference = torch.cat([
                    margin(model, forms[i : i + config.batch_size]) for i in range(0, len(forms), config.batch_size)
                ])  # fmt: skip
        with edited(model, A, v, start.heads.layers):
            for epoch in range(config.epochs):
                order = torch.randperm(len(forms), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
                for first in range(0, len(order), config.batch_size):
                    rows = order[first : first + config.batch_size]
                    batch = [forms[i] for i in rows]
                    if pairs:
                        loss = -F.logsigmoid(config.beta * (margin(model, batch) - reference[rows])).mean()
                    else:
                        sums, counts = summed(model, [f[0] for f in batch])
                        loss = -sums.sum() / counts.sum()
                    penalty = config.l1 * values.abs().sum() if component == "A" else 0.0
                    optimizer.param_groups[0]["lr"] = config.lr * (1 - len(losses) / n_steps)
                    optimizer.zero_grad()
                    (loss + penalty).backward()
                    values.grad = torch.where(keep, values.grad, 0.0)  # type: ignore[arg-type]
                    torch.nn.utils.clip_grad_norm_([values], config.clip)
                    optimizer.step()
                    losses.append(loss.item())
    return values.detach(), losses


def margin(model: Any, batch: Sequence[tuple[Encoded, ...]]) -> Tensor:
    """Log-prob of each pair's chosen answer less that of its rejected one."""
    sums, _ = summed(model, [f[0] for f in batch] + [f[1] for f in batch])
    chosen, rejected = sums.chunk(2)
    return chosen - rejected


@torch.no_grad()
def evaluate(
    model: Any, task: Task, A: Tensor, v: Tensor, heads: HeadSet, *, limit: int
) -> tuple[dict[str, float], list[Any]]:
    """Means of a task's metrics over its first test rows, and each answer: summed log-probs, or the text."""
    examples = task.examples("test", limit=limit)
    with frozen(model), edited(model, A, v, heads.layers):
        if isinstance(examples[0], ChoiceExample):
            found, said = choices(model, examples)
        else:
            found, said = generations(model, task, examples)
    return {name: sum(f[name] for f in found) / len(found) for name in found[0]}, said


def choices(model: Any, examples: Sequence[Any]) -> tuple[list[dict[str, float]], list[Any]]:
    """Multiple choice, one pass an answer."""
    found, said = [], []
    for e in examples:
        score = {}
        for answer in dict.fromkeys((e.best, *e.true, *e.false)):
            row = encode_continuations(tokenizer_of(model), e.prompt, [answer])
            score[answer] = summed(model, row)[0].item()
        found.append(mc_metrics(score[e.best], [score[a] for a in e.true], [score[a] for a in e.false]))
        said.append(list(score.values()))
    return found, said


def generations(
    model: Any, task: Task, examples: Sequence[GenerationExample]
) -> tuple[list[dict[str, float]], list[Any]]:
    """Greedy decoding of consecutive prompts, each batch to the end."""
    tokenizer, ends, texts = tokenizer_of(model), end_tokens(model), []
    for first in range(0, len(examples), BATCH):
        prompts = [encode(tokenizer, e.prompt) for e in examples[first : first + BATCH]]
        tokens, mask = pad(prompts, side="left", pad_id=0, device=device_of(model))
        logits, state = prefill(model, tokens, mask)
        new = [logits[:, -1].argmax(dim=-1)]
        for _ in range(task.max_new_tokens - 1):
            last, state = step(model, state, new[-1])
            new.append(last.argmax(dim=-1))
        for prompt, ids in zip(prompts, torch.stack(new, dim=1).tolist(), strict=True):
            end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            texts.append(new_text(tokenizer, prompt, ids[:end]))
    assert task.grade is not None
    return [task.grade(t, e) for t, e in zip(texts, examples, strict=True)], texts
