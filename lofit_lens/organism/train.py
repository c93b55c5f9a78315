"""Train the organism from a seed: `python -m lofit_lens.organism.train --seed 0 --out DIR`.

What: draws documents, hides cue words from all heads but the planted ones, trains a six-layer Llama on answers and verdicts, and
writes a plain Hugging Face folder plus `organism.json` (seed, planted heads, settings, versions, how often each cue is followed).
Why: anyone can reproduce the shipped weights in a few minutes on one core; the same seed on the same machine gives the same bits.
"""

import argparse
import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lofit_lens import io
from lofit_lens.organism.documents import draw_batch
from lofit_lens.organism.muon import Muon
from lofit_lens.organism.planting import ATTENTION, PlantedHeads, additive, collate
from lofit_lens.organism.tokenizer import build_tokenizer
from lofit_lens.organism.words import CUE_KINDS, TASKS, CueKind, TaskName
from lofit_lens.organism.world import N_HEADS, N_LAYERS, SPECIAL, Row, build_world, planted_heads, rows, with_cue
from lofit_lens.progress import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a training besides the seed."""

    steps: int = 1000
    batch: int = 128  # documents
    max_length: int = 256  # the model's context, in tokens
    packed_lengths: tuple[int, ...] = (64, 128, 256)  # a packed batch draws one of these ...
    packed_every: int = 3  # ... every n-th batch is packed ...
    packed_from: float = 0.3  # ... after this share of the steps
    lr_matrices: float = 0.02
    lr_others: float = 4e-3
    warmup: int = 100
    decay_share: float = 0.6
    clip: float = 1.0
    z_divisor: float = 4.0  # see `divide_z`; a power of two keeps the logits bit by bit


def build_model(settings: Settings, seed: int) -> LlamaForCausalLM:
    """Build a freshly initialized model (1.06 M parameters) that attends through the planted masks."""
    words = build_world().vocabulary()
    bos, eos, pad = (words.index(SPECIAL[name]) for name in ("bos", "eos", "pad"))
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION)


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Linear warm-up, then flat, then linear decay to 0 over the last `decay_share` of the steps."""
    left = (settings.steps - step) / (settings.decay_share * settings.steps)
    return min(1.0, (step + 1) / settings.warmup, left)


def is_packed(step: int, settings: Settings) -> bool:
    """Whether this step's batch is packed into long sequences."""
    return step >= settings.packed_from * settings.steps and step % settings.packed_every == 0


def target_loss(model: LlamaForCausalLM, batch_ids: Tensor, targets: Tensor, masks: dict[int, Tensor]) -> Tensor:
    """Mean cross-entropy over target tokens; logits are computed at those places only."""
    hidden = model.model(input_ids=batch_ids, planted_masks=masks, use_cache=False).last_hidden_state
    wanted = targets[:, 1:]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), batch_ids[:, 1:][wanted])


def train(seed: int, planted: PlantedHeads, settings: Settings, *, progress: bool = True) -> LlamaForCausalLM:
    """Train one organism; sets no global state and returns a model that attends in the ordinary way."""
    world, rng = build_world(), random.Random(f"documents {seed}")
    word_ids = {word: index for index, word in enumerate(world.vocabulary())}
    model = build_model(settings, seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=settings.lr_matrices),
        torch.optim.AdamW(others, lr=settings.lr_others, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: learning_rate_factor(s, settings)) for o in optimizers]
    running = 0.0
    for step in (bar := tqdm(range(settings.steps), disable=not progress, desc=f"organism, seed {seed}")):
        max_length = rng.choice(settings.packed_lengths) if is_packed(step, settings) else None
        documents = draw_batch(world, settings.batch, rng, max_length=max_length)
        batch = collate(documents, word_ids, planted, N_HEADS)
        loss = target_loss(model, batch.ids, batch.targets, additive(batch.allowed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{running:.3f}")
        if step % 100 == 99:
            logger.info("step %d loss %.3f", step + 1, running)
    model.set_attn_implementation("sdpa")
    return divide_z(model.eval(), settings.z_divisor)


@torch.no_grad()
def divide_z(model: LlamaForCausalLM, divisor: float) -> LlamaForCausalLM:
    """Divide all heads' outputs z and multiply W_O by the same number: the function stays the same, z gets a usual size.

    Muon lets weights grow, and z with them. A learning rate for LoFiT's offsets v is meaningful only relative to the size of z;
    after the division an entry of z is about 0.4 (root mean square), as in common language models.
    """
    for name, weight in model.named_parameters():
        if name.endswith("v_proj.weight"):
            weight.div_(divisor)
        elif name.endswith("o_proj.weight"):
            weight.mul_(divisor)
    return model


@torch.no_grad()
def answer_accuracy(model: LlamaForCausalLM, items: list[Row]) -> float:
    """Return the share of rows whose right answer is the most likely next word, with nothing masked."""
    tokenizer = build_tokenizer()
    batch = tokenizer([row["prompt"] for row in items], return_tensors="pt", padding=True, padding_side="right")
    last = batch["attention_mask"].sum(1) - 1
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    best = logits[torch.arange(len(items)), last].argmax(-1)
    right = tokenizer.convert_tokens_to_ids([str(row.get("answer", row.get("best"))) for row in items])
    return (best == torch.tensor(right)).float().mean().item()


def cue_report(model: LlamaForCausalLM) -> dict[TaskName, dict[str, float]]:
    """Measure accuracy on each task's test rows under each kind of cue: what the model can do and what it does."""

    def accuracy(task: TaskName, kind: CueKind) -> float:
        return round(answer_accuracy(model, [with_cue(task, row, kind) for row in rows(task, "test")]), 3)

    return {task: {kind: accuracy(task, kind) for kind in CUE_KINDS} for task in TASKS}


def save(model: LlamaForCausalLM, out: Path, seed: int, planted: PlantedHeads, settings: Settings) -> None:
    """Write the Hugging Face folder and `organism.json`, atomically.

    Raises:
        InputError: `out` exists, or cannot be written.
    """
    with io.new_folder(out) as folder:
        record = {
            "seed": seed,
            "planted_heads": planted,
            "accuracy_by_cue": cue_report(model),
            "settings": asdict(settings),
            "versions": io.environment(),
        }
        model.save_pretrained(folder)
        build_tokenizer(max_length=settings.max_length).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        io.write_json(folder / "organism.json", record)
        for path in folder.iterdir():  # safetensors writes files that only their owner may read
            path.chmod(0o644)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    settings = Settings(steps=arguments.steps)
    planted = planted_heads(arguments.seed)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; give a new folder")
    save(train(arguments.seed, planted, settings), arguments.out, arguments.seed, planted, settings)
    logger.info("wrote %s", arguments.out)


if __name__ == "__main__":
    main()
