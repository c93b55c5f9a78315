"""What is compared with plain Hugging Face of a checkpoint that TransformerLens loads (`architectures.py`).

Each check gives "" where both agree, or says in a few words what is off. The other side is one full pass of the Hugging Face
model for every row, without padding or cache, and plain torch hooks.
"""

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import torch
import transformers as tf
from torch import Tensor

from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import InputError
from lofit_lens.evaluation.generation import decode_ids
from lofit_lens.evaluation.prefix import shared_front
from lofit_lens.evaluation.scoring import score_encoded
from lofit_lens.models import context_length, fused_attention, hook_z, hooked, load_model, logits_at, logits_of
from lofit_lens.sharing import export_folded
from lofit_lens.tasks.collate import Encoded

LENGTHS = (1, 2, 7, 12, 40, 70)
ROWS, NEW, END = (
    (9, 23, 40),
    10,
    2,
)  # lengths of rows that are padded together; tokens answered to each; the id that ends them
NAME = "the checkpoint"
FRONT = torch.arange(100, 112)[None]  # what several prompts begin with
EXACT = 1e-3  # of the logits' standard deviation; float32 stays below 1e-4
PROJECTION = re.compile(
    r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.(?:\w+\.)*?"
    r"(?:self_attn|attn|attention|self_attention|mixer|temporal_block)\.(?:\w+\.)*?"
    r"(?:o_proj|out_proj|c_proj|dense|wo|Wo|o_b_proj)"
)


# ------------------------------------------------------------------------------------------------- Hugging Face alone


def plain(folder: Path) -> Any:
    """The Hugging Face model of a folder."""
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, attn_implementation="eager"
    ).eval()


def prompts(lengths: Sequence[int]) -> list[Tensor]:
    """Random ids, special tokens left out; `[1, n]` each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, families.VOCAB, (1, n), generator=generator) for n in lengths]


def said_by(hf: Any, tokens: Tensor) -> Tensor:
    """Hugging Face's logits of one row without padding."""
    return hf(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


def itself(hf: Any) -> str:
    """Hugging Face's logits of a text stay the same when more tokens follow; else padding and caches compare with nothing."""
    (tokens,) = prompts((40,))
    far = off(said_by(hf, tokens)[:, :30], said_by(hf, tokens[:, :30]))
    return "" if far <= EXACT else f"Hugging Face's own logits of 30 tokens change by {far:.2g} when 10 more follow"


def would_say(hf: Any, tokens: Tensor, new: list[int]) -> list[int]:
    """Hugging Face's most likely id at each place of an answer, and behind it; one full pass, no cache."""
    whole = torch.cat([tokens, torch.tensor([new], dtype=torch.long)], dim=1)
    return said_by(hf, whole)[0, tokens.shape[1] - 1 :].argmax(-1).tolist()


def projections(hf: Any) -> dict[int, Any]:
    """Layer -> Hugging Face's module whose input is all heads' outputs side by side."""
    return {
        int(hit[1]): m
        for name, m in hf.named_modules()
        if (hit := PROJECTION.search(name)) and not hit.string[hit.end() :]
    }


@contextlib.contextmanager
def before(modules: dict[int, Any], change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `change(layer, input)` before each module; what it returns goes in instead."""

    def hook(layer: int) -> Any:
        def run(module: Any, args: tuple[Tensor, ...]) -> Any:
            new = change(layer, args[0])
            return None if new is None else (new, *args[1:])

        return run

    handles = [m.register_forward_pre_hook(hook(layer)) for layer, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------------ checks


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of a logit, in standard deviations of all logits."""
    if found.shape != wanted.shape:
        found = found[..., : wanted.shape[-1]]
    return float((found.float() - wanted).abs().max() / wanted.std())


def logits(model: Any, hf: Any) -> str:
    """Single rows of several lengths."""
    for tokens in prompts([n for n in LENGTHS if n <= context_length(model)]):
        far = off(logits_of(model, tokens, torch.ones_like(tokens)), said_by(hf, tokens))
        if not far <= EXACT:
            return f"off by {far:.2g} of their standard deviation at {tokens.shape[1]} tokens"
    return ""


def padding(model: Any, hf: Any, side: str) -> str:
    """Rows of several lengths in one batch, each against the row alone in Hugging Face."""
    rows = prompts([n for n in ROWS if n <= context_length(model)])
    width = max(row.shape[1] for row in rows)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    places = []
    for i, row in enumerate(rows):
        n = row.shape[1]
        places.append(slice(0, n) if side == "right" else slice(width - n, width))
        tokens[i, places[i]], mask[i, places[i]] = row[0], 1
    found = logits_of(model, tokens, mask)
    for i, row in enumerate(rows):
        far = off(found[i : i + 1, places[i]], said_by(hf, row))
        if not far <= EXACT:
            return f"off by {far:.2g} of the logits' standard deviation, {width - row.shape[1]} padding tokens on the {side}"
    return ""


def answers(model: Any, hf: Any) -> str:
    """Greedy ids from a cache, of batches padded on the left; in the second one all rows share a front, which runs once."""
    rows = prompts([n for n in ROWS if n + NEW <= context_length(model)])
    for batch in (rows, [torch.cat([FRONT, row], 1) for row in rows]):
        ids = [row[0].tolist() for row in batch]
        front = shared_front(model, ids, longest=max(map(len, ids)) + NEW)
        for row, new in zip(batch, decode_ids(model, ids, NEW, front=front), strict=True):
            wanted = would_say(
                hf, row, new
            )  # greedy, by induction: each id of the answer is the most likely one behind it
            same = [a == b for a, b in zip([*new, END][:NEW], wanted, strict=False)]
            if not all(same):
                behind = f" (a shared front of {len(front)})" if len(front) else ""
                return f"token {same.index(False) + 1} of the answer to {row.shape[1]} tokens{behind} is another one"
    return ""


def scores(model: Any, hf: Any) -> str:
    """Log-probs of several answers to prompts that share a front, which runs once, as each prompt does."""
    questions = []
    for prompt in prompts((3, 9, 14)):
        ids = torch.cat([FRONT, prompt], 1)[0].tolist()
        questions.append([Encoded((*ids, *new[0].tolist()), len(ids)) for new in prompts((1, 4, 11))])
    found = score_encoded(model, questions)
    for given, mine in zip(questions, found, strict=True):
        for one, score in zip(given, mine, strict=True):
            tokens = torch.tensor([one.ids])
            logp = said_by(hf, tokens)[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[one.start - 1 :]
            if not abs(score - float(logp.sum())) <= EXACT * one.n_labels:
                return f"off by {abs(score - float(logp.sum())):.2g} nats for {one.n_labels} tokens behind {one.start}"
    return ""


def fused(model: Any, hf: Any) -> str:
    """The pass that training takes: logits at the scored places only, by the fused kernel where it is proven."""
    with fused_attention(model):
        for tokens in prompts([n for n in LENGTHS if n <= context_length(model)]):
            everywhere = torch.ones_like(tokens)
            far = off(logits_at(model, tokens, everywhere, everywhere.bool()), said_by(hf, tokens)[0])
            if not far <= EXACT:
                return f"off by {far:.2g} of their standard deviation at {tokens.shape[1]} tokens"
        return padding(model, hf, "right")


def in_memory(hf: Any, backend: str) -> str:
    """The same model handed over as an object, loaded as its user would load it."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        own = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return logits(load_model(own, tokenizer=families.tokenizer(), backend=backend, device="cpu", name=NAME), hf)


def reached(model: Any) -> tuple[list[int], str]:
    """Layers whose heads can be edited together, and why the others' cannot."""
    sizes: dict[int, int] = {}
    reason = ""
    for layer in range(int(model.cfg.n_layers)):
        try:
            sizes[layer] = Lofit.for_model(model, HeadSet([(layer, 0)])).d_head
        except InputError as e:
            reason = reason or one_line(e)
        except Exception as e:
            reason = reason or f"**{type(e).__name__}**: {one_line(e)}"
    size, _ = Counter(sizes.values()).most_common(1)[0] if sizes else (0, 0)
    if len(set(sizes.values())) > 1:
        reason = (
            reason or f"layers differ in d_head ({sorted(set(sizes.values()))}): heads of one size are edited together"
        )
    return [layer for layer, d_head in sizes.items() if d_head == size], reason


def adapter(model: Any, layers: Sequence[int]) -> Lofit:
    """Normal numbers on every head of these layers."""
    n_heads = int(model.cfg.n_heads)
    made = Lofit.for_model(model, HeadSet([(layer, h) for layer in layers for h in range(n_heads)]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for head in made.heads:
            made.A[head] = torch.randn(made.d_head, generator=generator) * 0.5
            made.v[head] = torch.randn(made.d_head, generator=generator) * 0.5
    return made


def heads(model: Any, hf: Any, made: Lofit) -> str:
    """z of each layer is what goes into Hugging Face's output projection, and an edit of it does there what it does here."""
    modules = {layer: m for layer, m in projections(hf).items() if layer in made.heads.layers}
    if sorted(modules) != sorted(made.heads.layers):
        return f"Hugging Face's output projections were found in layers {sorted(modules)} only"
    (tokens,) = prompts((9,))
    theirs: dict[int, Tensor] = {}
    ours: dict[int, Tensor] = {}
    with before(modules, lambda layer, x: theirs.__setitem__(layer, x.clone())):
        said_by(hf, tokens)
    with contextlib.ExitStack() as stack:
        for layer in modules:
            keep = lambda z, hook, layer=layer: ours.__setitem__(layer, z.flatten(2).clone())  # noqa: E731
            stack.enter_context(hooked(hook_z(model, layer), keep))
        logits_of(model, tokens, torch.ones_like(tokens))
    for layer, z in theirs.items():
        if ours[layer].shape != z.shape or not off(ours[layer], z) <= EXACT:
            return f"z of layer {layer} is not what goes into Hugging Face's output projection"
    A, v = made.A.detach().flatten(1), made.v.detach().flatten(1)
    with before(modules, lambda layer, x: x * (1 + A[layer]) + v[layer]):
        wanted = said_by(hf, tokens)
    with made.attached(model):
        far = off(logits_of(model, tokens, torch.ones_like(tokens)), wanted)
    return "" if far <= EXACT else f"the same edit gives other logits (off by {far:.2g} of their standard deviation)"


def training(model: Any, made: Lofit) -> str:
    """The gradient of A along one direction against a finite difference, and on every head."""
    (tokens,) = prompts((9,))
    mask, step = torch.ones_like(tokens), 1e-2

    def loss() -> Tensor:
        return logits_of(model, tokens, mask)[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).mean()

    with made.attached(model):
        made.train_only("A")
        loss().backward()
        gradient = made.A.grad
        made.train_only(None)
        if gradient is None:
            return "no gradient reaches A"
        dead = [str(head) for head in made.heads if not bool(gradient[head].abs().max() > 0)]
        if dead:
            return f"no gradient reaches {dead[0]}" + (f" and {len(dead) - 1} other heads" if dead[1:] else "")
        direction = gradient / gradient.norm()
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                made.A += sign * step * direction
                ends.append(float(loss()))
                made.A -= sign * step * direction
    slope, wanted = (ends[0] - ends[1]) / (2 * step), float(gradient.norm())
    made.A.grad = None
    return "" if abs(slope - wanted) <= 0.02 * wanted else f"gradient {wanted:.3g}, finite difference {slope:.3g}"


def export(made: Lofit, base: Path) -> str:
    """Folded into a checkpoint of its own."""
    with tempfile.TemporaryDirectory() as folder:
        export_folded(made, Path(folder) / "out", base=base, device="cpu", progress=False)
    return ""


def one_line(e: Exception) -> str:
    """One line of an error, without the folders of the machine."""
    line = (str(e).strip().splitlines() or [""])[0]
    return re.sub(r"(?:/[\w.+-]+)*/checkpoint\b", NAME, line)[:300]
