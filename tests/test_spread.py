"""A model that computes the same, in which an offset at any head of a layer does what one at any other head of it does."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lofit_lens as ll
from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import InputError
from lofit_lens.experiments.localisation import localisation
from lofit_lens.experiments.organism import planted
from lofit_lens.models import ORGANISM, load_model
from lofit_lens.organism.spread import spread_evenly
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The spread organism as a checkpoint."""
    made = tmp_path_factory.mktemp("spread")
    spread_evenly(AutoModelForCausalLM.from_pretrained(ORGANISM)).save_pretrained(made)
    AutoTokenizer.from_pretrained(ORGANISM).save_pretrained(made)
    return made


@torch.no_grad()
def test_it_computes_the_same(folder):
    """Logits of random tokens, up to rounding; heads are 16 times as wide."""
    plain, spread = (AutoModelForCausalLM.from_pretrained(f) for f in (ORGANISM, folder))
    ids = torch.randint(4, plain.config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(0))
    assert (plain(ids).logits - spread(ids).logits).abs().max() < 1e-4
    assert spread.config.head_dim == 16 * 8


@torch.no_grad()
def test_every_head_of_a_layer_reaches_alike(folder):
    """The same offset gives the same logits at every head of a layer, and others in another layer."""
    model = load_model(folder, device="cpu")
    tokens = model.to_tokens("ann 's father is bob")
    v = torch.randn(128, generator=torch.Generator().manual_seed(1))

    def logits(head):
        lofit = Lofit.for_model(model, HeadSet([head]))
        lofit.v[HeadSet([head]).heads[0]] = v
        with lofit.attached(model):
            return model(tokens)

    first = logits("L1H0")
    assert torch.allclose(first, logits("L1H9"), atol=1e-4)
    assert (first - logits("L3H0")).abs().max() > 0.1


def test_a_model_that_cannot_be_spread_is_refused():
    """Fewer key-value heads than heads."""
    with pytest.raises(InputError, match="2 key-value heads of 4"):
        spread_evenly(tiny.hf_model("llama-gqa"))


@pytest.mark.slow
def test_the_battery_tells_the_two_apart(folder):
    """Where the task was planted the edit is localised; where heads of a layer reach alike there is no evidence of it."""
    options = {"k": 3, "draws": 6, "seeds": (0,), "points": [{"lr": 0.1}], "controls": False, "progress": False}
    task = ll.load_task("organism/kinship")
    known = localisation(load_model("organism", device="cpu"), task, **options)
    assert known.verdict == "localised"
    assert set(known.table["heads"][0].split()) == {str(h) for h in planted(ORGANISM)["kinship"]}
    spread = localisation(load_model(folder, device="cpu", name="organism"), task, **options)
    assert spread.verdict.startswith("no evidence of localisation")
    assert spread.test.random > 0.8
