"""NaN and infinity in a model: said for what they are, by everything that runs it, and never a number in silence."""

from functools import partial

import pytest
import torch

import lofit_lens as ll
from lofit_lens import Task, TrainConfig
from lofit_lens.errors import ModelError, TrainingDiverged
from lofit_lens.evaluation import damage, generate, score_continuations
from lofit_lens.models import gaps_are_exact, load_model
from lofit_lens.probing import probe_heads
from lofit_lens.training.selectors import SELECTORS
from tests import tiny
from tests.adapters import random_adapter
from tests.conftest import BACKENDS

WORD = " Rome"  # one token
BAD, GOOD = f"the capital of France is{WORD}", "the capital of France is"
FLOAT16 = "float16 ends at 65,504.*load it with dtype='bfloat16' or 'float32'"
OTHER = "its weights may be damaged, or a hook on it"
QUICK = TrainConfig(lr=1e-2, l1=0.0, epochs=1, batch_size=8, max_steps=1)

ANSWERS = [{"prompt": f"{BAD}, {who}:", "answer": " x"} for who in ("Ann", "Bob", "Eve")]
PAIRS = [{"prompt": r["prompt"], "chosen": " x", "rejected": " y"} for r in ANSWERS]
SFT, DPO = (Task.from_records(n, train=r, test=r) for n, r in (("sft", ANSWERS), ("dpo", PAIRS)))


@pytest.fixture(params=["float16", "float32"], scope="module")
def word(request, tmp_path_factory):
    """A folder of a model whose embedding of one word is above float16's end (or NaN); dtype; what is said."""
    plain, tokenizer = tiny.hf_model("llama"), tiny.tokenizer()
    (token,) = tokenizer(WORD, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        plain.model.embed_tokens.weight[token] = 1e5 if request.param == "float16" else torch.nan
    folder = tmp_path_factory.mktemp("word") / request.param
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, request.param, FLOAT16 if request.param == "float16" else OTHER


@pytest.fixture(scope="module", params=BACKENDS)
def model(word, request):
    """The model on each class."""
    return load_model(word[0], backend=request.param, dtype=word[1], device="cpu")


RUNS = {
    "generate": lambda model: generate(model, [GOOD, BAD], max_new_tokens=2),
    "one prompt": lambda model: generate(model, BAD, max_new_tokens=1),
    "score": lambda model: score_continuations(model, [GOOD, BAD], [[" a b", " c"]] * 2),
    "later token": lambda model: score_continuations(model, [GOOD], [[" a", f"{WORD} is"]]),
    "evaluate": lambda model: ll.evaluate(model, SFT, progress=False),
    "evaluate pairs": lambda model: ll.evaluate(model, DPO, progress=False),
    "damage": lambda model: damage(model, random_adapter(model), [GOOD, BAD], progress=False),
    "probe": lambda model: probe_heads(model, DPO, progress=False),
    "gradient attribution": lambda model: SELECTORS["gradient attribution"](model, SFT, progress=False),
    "activation patching": lambda model: SELECTORS["activation patching"](model, SFT, progress=False, n_prompts=1, n_shots=1),
}  # fmt: skip


def test_no_number_comes_of_nan(model, word, subtests):
    """Generation (argmax of NaN is a token), log-probs, damage and head scores."""
    for name, run in RUNS.items():
        with subtests.test(name), pytest.raises(ModelError, match=word[2]):
            run(model)


def test_training_says_that_the_model_is_at_fault(model, word, subtests):
    """At the first step nothing was learned, so that no learning rate is to blame."""
    for train, task in ((ll.tune_scalings, SFT), (partial(ll.tune_offsets, heads=["L1H0"]), DPO)):
        with subtests.test(task.name):
            with pytest.raises(TrainingDiverged, match=word[2]) as stop:
                train(model, task, config=QUICK, progress=False)
            assert "nothing was learned yet" in str(stop.value)
            assert "learning rate" not in str(stop.value)


def test_other_prompts_run(model):
    """What does not meet the word is as ever."""
    assert len(generate(model, [GOOD, "Ann asked her son"], max_new_tokens=2)) == 2
    assert gaps_are_exact(model) in (True, False)


def test_what_is_attached_is_named(bridge_llama):
    """An edit that is too strong: the adapter is named, not the weights."""
    lofit = random_adapter(bridge_llama, v=torch.nan)
    with lofit.attached(bridge_llama), pytest.raises(ModelError, match=r"what is attached \(LoFiT\) may be too strong"):
        generate(bridge_llama, GOOD)


def test_a_cache_check_names_the_overflow(checkpoint, backend, monkeypatch):
    """A model that overflows on any token is not called a defect of TransformerLens."""
    model = load_model(checkpoint("llama"), backend=backend, dtype="float16", device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.inf)
    with pytest.raises(ModelError, match=FLOAT16):
        gaps_are_exact(model)
