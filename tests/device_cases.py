"""What tests run on pretend devices: a small call of every public function that takes a model, by the names it stands for."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from accelerate import dispatch_model

import lofit_lens as ll
from lofit_lens import HeadSet, Task, TrainConfig, analysis, models
from lofit_lens.evaluation import Metric, generate, score_continuations
from lofit_lens.interventions import HeadAblation, Lora, LoReft, PostBlock, Red, mean_z
from lofit_lens.models import Borders
from lofit_lens.probing import fit_probes, record
from lofit_lens.training import FAST, PLAIN, LofitRun, Passes, reference_log_probs, task_loss
from lofit_lens.training.fitting import fit
from lofit_lens.training.loop import Training
from lofit_lens.training.selectors import LEARNED, SELECTORS
from tests.adapters import CHOSEN, random_adapter
from tests.selecting import DPO, PLACES, SFT

CONFIG = TrainConfig(lr=1e-2, epochs=1, batch_size=4, l1=1e-3)
PROMPTS = ["Q: Is Eve an aunt?\nA:", "how?", "Q: What is the capital of France?\nA:", "Q: Ann?\nA:"]
ANSWERS = [[" no", " Eve is the aunt"], [" mother"], [" Rome", " a book"], [" I have no comment"]]
TOKENS = torch.randint(3, 400, (3, 10), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[1, 7:] = MASK[2, :4] = 0
OPTIONS = Task.from_records(
    "options",
    train=[{"prompt": f"where is {p}?", "options": [" here", " there"], "answer": " here"} for p in PLACES],
    val=[{"prompt": f"so where is {p}?", "options": [" here", " there"], "answer": " here"} for p in PLACES[:2]],
    test=[{"prompt": f"who is {p}?", "options": [" Ann", " a sister", " it"], "answer": " it"} for p in PLACES[:3]],
)
WORDS = Task.from_records(
    "words",
    train=[{"prompt": f"where is {p}?", "answer": " here"} for p in PLACES],
    val=[{"prompt": f"so where is {p}?", "answer": " here"} for p in PLACES[:2]],
    test=[{"prompt": f"who is {p}?", "answer": " it"} for p in PLACES[:3]],
    max_new_tokens=2,
)
# Of a tiny Llama: one layer on the first device, two on the second.
MAP = {
    "model.embed_tokens": "pretend:0", "model.rotary_emb": "pretend:0", "model.layers.0": "pretend:0",
    "model.layers.1": "pretend:1", "model.layers.2": "pretend:1", "model.norm": "pretend:1", "lm_head": "pretend:1",
}  # fmt: skip
QUIET: dict[str, Any] = {"progress": False}


def in_two(folder: Any) -> Any:
    """A tiny Llama on two devices. As on GPUs 0 and 1, accelerate's main device is the first: it takes one of a set."""
    first = functools.partial(dispatch_model, main_device="pretend:0")
    with mock.patch("transformers.integrations.accelerate.dispatch_model", first):
        return models.load_model(folder, device_map=MAP)


Case = Callable[[Any, Any], Any]  # (model, folder) -> what it finds


@dataclass(frozen=True)
class Told:
    """A case and what it stands for."""

    run: Case
    stands_for: tuple[str, ...]
    bridge_only: bool = False
    of_others: bool = False  # it calls nothing on a model but what other cases call


CASES: dict[str, Told] = {}


def case(*stands_for: str, bridge_only: bool = False, of_others: bool = False) -> Callable[[Case], Case]:
    """Make a function a case."""

    def kept(run: Case) -> Case:
        CASES[run.__name__] = Told(run, stands_for, bridge_only, of_others)
        return run

    return kept


def plain(found: Any) -> Any:
    """Numbers and texts of whatever a call returns, in lists and dictionaries."""
    if isinstance(found, torch.Tensor):
        return found.detach().cpu().tolist()
    if isinstance(found, torch.nn.Module):
        return {**plain(found.state_dict()), "history": plain(getattr(found.meta, "history", []))}
    if isinstance(found, pd.DataFrame):
        return plain(found.to_dict("records"))
    if isinstance(found, np.ndarray):
        return found.tolist()
    if isinstance(found, dict):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, Metric):
        return [found.mean, found.n]
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    return plain(found.to_dict()) if hasattr(found, "to_dict") else found


# --------------------------------------------------------------------------------------------------------- training


@case("select_heads", "tune_scalings")
def selection(model, folder):
    return ll.select_heads(model, DPO, config=CONFIG, **QUIET).values, ll.tune_scalings(
        model, SFT, config=CONFIG, **QUIET
    )


@case("tune_offsets", "fingerprint")
def offsets(model, folder):
    return [ll.tune_offsets(model, task, CHOSEN, config=CONFIG, **QUIET) for task in (SFT, DPO)]


@case("tune_many")
def many(model, folder):
    runs = [LofitRun(SFT, "A", seed=0, config=CONFIG), LofitRun(DPO, "v", CHOSEN, seed=1, config=CONFIG)]
    return ll.tune_many(model, runs, **QUIET)


@case(
    "fit", "LoReft.for_model", "PostBlock.for_model", "Red.for_model", "Red.attached", "LoReft.attached", "PostBlock.attached"
)  # fmt: skip
def residual_methods(model, folder):
    made = [
        Red.for_model(model, layers=[0, 2]), LoReft.for_model(model, rank=2, layers=[1, 2], seed=0),
        PostBlock.for_model(model, rank=2, layers=[0, 1], seed=0),
    ]  # fmt: skip
    for adapter in made:
        fit(adapter, model, SFT, config=CONFIG, seed=0, **QUIET)
    return made


@case("Lora.for_model", "Lora.attached", "projection", "projection_replaced", "projection_sizes", bridge_only=True)
def lora(model, folder):
    adapter = Lora.for_model(model, rank=2, seed=0)
    fit(adapter, model, SFT, config=CONFIG, seed=0, **QUIET)
    adapter.save_pretrained(folder / "lora", overwrite=True)
    again = ll.load_adapter(folder / "lora", model=model)
    with again.attached(model), torch.no_grad():
        return adapter, again, models.logits_of(model, *on(model, TOKENS, MASK))


@case("Passes.ready", "checkpointed", "fused_attention", "fused_refusal")
def ways_of_passing(model, folder):
    ways, short = (PLAIN, Passes(token_budget=30), Passes(checkpointing=True), FAST), CONFIG.with_changes(max_steps=1)
    return [ll.tune_offsets(model, DPO, CHOSEN, config=short, n_train=4, passes=way, **QUIET) for way in ways], str(
        models.fused_refusal(model)
    )


@case()
def resumed(model, folder):
    """Stopped after its first step, and gone on with."""
    wanted, file = ll.tune_offsets(model, SFT, CHOSEN, config=CONFIG, **QUIET), folder / "state.safetensors"

    def stop(self):
        return len(self.history) == 1

    own, Training.at_epoch_end = Training.at_epoch_end, property(stop)
    try:
        ll.tune_offsets(model, SFT, CHOSEN, config=CONFIG, checkpoint=file, **QUIET)
    finally:
        Training.at_epoch_end = own
    found = ll.tune_offsets(model, SFT, CHOSEN, config=CONFIG, checkpoint=file, **QUIET)
    assert plain(found) == plain(wanted)
    return found


@case("task_loss", "reference_log_probs")
def losses(model, folder):
    examples = DPO.training_examples("train", n=None, seed=0)
    reference = reference_log_probs(model, examples)
    with random_adapter(model).to(models.device_of(model)).attached(model):
        return reference, task_loss(model, examples, beta=0.5, reference=reference)([0, 1, 2])


@case("probe_layers", "fit_jola", *(f.__name__ for f in SELECTORS.values()))
def selectors(model, folder):
    smaller = {name: {"config": CONFIG} for name in (*LEARNED, "JoLA gates")} | {
        "activation patching": {"n_prompts": 2, "n_shots": 1}
    }
    return {
        name: choose(model, DPO, seed=0, n_train=4, **smaller.get(name, {}), **QUIET).values
        for name, choose in SELECTORS.items()
    }


# ------------------------------------------------------------------------------------------------------- evaluation


def on(model, *tensors):
    """These where the model takes its tokens."""
    return tuple(t.to(models.device_of(model)) for t in tensors)


def edited(model):
    """An adapter whose effect shows, read from files as a user would, attached."""
    return random_adapter(model).to(models.device_of(model)).attached(model)


@case("evaluate", "Lofit.for_model", "Lofit.attached", "Intervention.attached", "attached")
def evaluation(model, folder):
    found = []
    with edited(model):
        for task in (OPTIONS, WORDS, DPO):
            result = ll.evaluate(model, task, **QUIET)
            found.append([result.metrics[name].mean for name in sorted(result.metrics)] + [result.items])
    return found


@case("score_continuations")
def scoring(model, folder):
    found = [score_continuations(model, PROMPTS, ANSWERS)]
    for positions in ("answer", "last", "f2+l2"):
        layers = LoReft.for_model(model, rank=2, layers=[1], seed=0, positions=positions)
        with layers.attached(model):
            found.append(score_continuations(model, PROMPTS, ANSWERS))
    return found


@case("generate", "can_join", "end_tokens")
def generation(model, folder):
    front = "Interpret each question literally, and carefully research each answer.\n\n"
    with edited(model):
        return generate(model, [front + p for p in PROMPTS], max_new_tokens=4), generate(
            model, PROMPTS, max_new_tokens=4
        )


@case("damage")
def damage(model, folder):
    return ll.damage(model, random_adapter(model).to(models.device_of(model)), ["Ann asked her son.", "who?"], **QUIET)


# ------------------------------------------------------------------------------------------------- other adapters


@case("fit_probes", "probe_heads", "ITI.attached", "record", "statement_ids", "attached_to")
def iti(model, folder):
    adapter = fit_probes(model, DPO, **QUIET).iti(3)
    with adapter.attached(model), record(model, [[1, 5, 6], [1, 7]], what="z", **QUIET) as z:
        return adapter, z.layer(2), score_continuations(model, PROMPTS, ANSWERS)


@case("reading_vectors", "RepE.attached")
def repe(model, folder):
    adapter = ll.reading_vectors(model, DPO, **QUIET).repe([0, 2], coefficient=2.0)
    with adapter.attached(model):
        return adapter, generate(model, PROMPTS, max_new_tokens=2)


@case("ContrastVectors.for_model", "ContrastVectors.attached")
def contrast(model, folder):
    adapter = ll.ContrastVectors.for_model(model, [0, 2], coefficient=1.5)
    with adapter.attached(model):
        return score_continuations(model, PROMPTS, ANSWERS), generate(model, PROMPTS, max_new_tokens=2)


@case("HeadAblation.of", "HeadAblation.attached", "mean_z")
def ablation(model, folder):
    adapter = HeadAblation.of(model, CHOSEN, means=mean_z(model, PROMPTS))
    with adapter.attached(model):
        return mean_z(model, PROMPTS), score_continuations(model, PROMPTS, ANSWERS)


@case("Lofit.from_pretrained", "load_adapter", "Adapter.from_pretrained")
def files(model, folder):
    random_adapter(model).save_pretrained(folder / "a", overwrite=True)
    adapter = ll.load_adapter(folder / "a", model=model)
    assert adapter.v.device == models.device_of(model)
    with adapter.attached(model), torch.no_grad():
        return models.logits_of(model, *on(model, TOKENS, MASK)), adapter + 0.5 * adapter


# --------------------------------------------------------------------------------------------------------- analysis


@case("promoted_tokens", "promoted_by", "geometry", "final_norm", "head_output_matrix", "to_logits")
def what_heads_write(model, folder):
    lofit = random_adapter(model).to(models.device_of(model))
    probes, reading = fit_probes(model, DPO, **QUIET), ll.reading_vectors(model, DPO, **QUIET)
    return [
        analysis.promoted_tokens(model, lofit, top=3, prompts=PROMPTS),
        analysis.promoted_by(model, torch.ones(3, lofit.d_head), CHOSEN, top=3),
        analysis.geometry(model, lofit, prompts=PROMPTS, probes=probes, reading=reading),
        models.to_logits(model, torch.ones(2, 32)),
    ]


@case("attention_patterns", "drift", "pattern_point")
def what_heads_do(model, folder):
    lofit = random_adapter(model).to(models.device_of(model))
    seen, moved = (
        analysis.attention_patterns(model, PROMPTS[:2], CHOSEN),
        analysis.drift(model, lofit, PROMPTS, **QUIET),
    )
    return seen.to_dict(), moved.layers, moved.heads


@case("answer_patching", "leave_one_out", "keep_only", "removal", "drop_edits", of_others=True)
def needed(model, folder):
    lofit, options = random_adapter(model).to(models.device_of(model)), {"limit": 1, **QUIET}
    rows = [
        {"prompt": f"who is {p}?", "answer": a} for p, a in zip(PLACES, [" it", " it", " Ann", " Ann"], strict=False)
    ]
    task = Task.from_records("answers", train=rows, test=rows)
    return [
        analysis.leave_one_out(model, OPTIONS, lofit, **options),
        analysis.keep_only(model, OPTIONS, lofit, ks=[1], draws=1, **options),
        analysis.removal(model, OPTIONS, HeadSet(["L0H0"]), adapter=lofit, draws=1, **options),
        analysis.drop_edits(model, OPTIONS, lofit, HeadSet(["L0H3"]), draws=1, **options),
        analysis.answer_patching(model, task, CHOSEN, adapter=lofit, draws=1, progress=False),
    ]


@case("interference", "learned_in_turn", "long_context", of_others=True)
def together(model, folder):
    lofit, options = random_adapter(model).to(models.device_of(model)), {"limit": 1, **QUIET}
    short = CONFIG.with_changes(max_steps=1)
    heads = {"one": CHOSEN, "two": HeadSet(["L1H1"])}
    return [
        analysis.interference(model, {"one": (OPTIONS, lofit), "two": (DPO, ll.ITI(lofit.shape, **_shift(lofit)))}, **options),
        analysis.learned_in_turn(model, {"one": OPTIONS, "two": DPO}, heads, config=short, **options)[0],
        analysis.long_context(model, WORDS, lofit, ["Ann asked her son.", "the capital"], [0, 12], **options),
    ]  # fmt: skip


def _shift(lofit):
    directions = torch.nn.functional.normalize(torch.ones(1, lofit.d_head), dim=1)
    return {"heads": HeadSet(["L1H0"]), "directions": directions, "sigma": torch.ones(1), "alpha": 2.0, "meta": None}


# ----------------------------------------------------------------------------------------------------------- passes


@case(
    "prefill",
    "extend",
    "step",
    "peek",
    "remember",
    "logits_of",
    "logits_at",
    "read_at",
    "run_through",
    "check_cache",
    "gaps_are_exact",
)
def passes(model, folder):
    tokens, mask = on(model, TOKENS, MASK)
    borders = Borders(torch.tensor([6, 4, 3]))
    with torch.no_grad(), edited(model):
        first, state = models.prefill(model, tokens[:, :6], mask[:, :6], borders)
        rows = torch.tensor([0, 0, 2])
        peeked = models.peek(model, state, rows, *on(model, TOKENS[:, 6:8], MASK[:, 6:8] * 0 + 1))
        chosen = state.select(torch.tensor([2, 0]))
        later, chosen = models.extend(model, chosen, tokens[:2, 6:8])
        stepped = models.step(model, chosen, tokens[:2, 8])[0]
        at = mask.bool() & (tokens % 2 == 0)
        return [
            models.logits_of(model, tokens, mask)[mask.bool()], models.logits_at(model, tokens, mask, at),
            models.read_at(model, tokens, mask, at, lambda logits, part: logits.logsumexp(-1)),
            models.remember(model, None, tokens[:, :6], mask[:, :6])[0][:1], first[:1], peeked[:1], later, stepped,
        ]  # fmt: skip


@case(
    "model_info",
    "check_residual",
    "head_size",
    "hook_z",
    "residual_point",
    "context_length",
    "attention_window",
    "fingerprint",
    "origin_of",
)
def told_of_a_model(model, folder):
    models.check_residual(model, [0, 1], "hook_resid_post")
    return [
        ll.model_info(model).to_dict(), models.head_size(model), models.context_length(model), models.fingerprint(model),
        models.is_processed(model), models.value_biases_folded(model), models.attention_window(model) or 0,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- studies


@case("compare_methods", "compare_selectors", "localisation", "run_grid", "tune_method", of_others=True)
def studies(model, folder):
    """All run a grid; its fits are those of the cases above."""
    fast, options = {"lr": 1e-2, "epochs": 1}, {"batch_size": 4, "n_train": 4, **QUIET}
    table = ll.compare_methods(
        model,
        OPTIONS,
        methods=["zero-shot", "RED"],
        settings={"RED": fast},
        reference="RED",
        texts=["Ann asked."],
        seeds=(0,),
        **options,
    )
    return table.rows[0].metrics, ll.tune_method(model, OPTIONS, "RED", grid=[fast], **options).settings
