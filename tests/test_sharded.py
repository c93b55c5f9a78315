"""Models whose layers lie on several devices: how they are asked for, what is refused, what is told of them.

What they find is compared with one device in test_devices.py, case by case.
"""

import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import InputError, ModelError
from lofit_lens.interventions import Lora
from lofit_lens.models import device_of, fused_refusal, load_model, logits_of, model_info
from lofit_lens.models.devices import check_placed
from tests import pretend, tiny
from tests.device_cases import CONFIG, MAP, MASK, QUIET, TOKENS, in_two
from tests.selecting import SFT


@pytest.fixture(autouse=True)
def devices():
    with pretend.devices():
        yield


@pytest.fixture(scope="module")
def spread(checkpoint):
    with pretend.devices():
        return in_two(checkpoint("llama"))


def test_layers_lie_where_the_map_says(spread, loaded):
    """Tokens go in at the embedding; the model is the same one to all records; attention is fused."""
    where = {name: str(p.device) for name, p in spread.original_model.named_parameters()}
    assert {d for name, d in where.items() if "layers.0" in name or "embed" in name} == {"pretend:0"}
    assert {d for name, d in where.items() if "layers.2" in name or "lm_head" in name} == {"pretend:1"}
    assert str(device_of(spread)) == "pretend:0"
    assert model_info(spread) == model_info(loaded("llama", "bridge"))
    assert fused_refusal(spread) is None


def test_tokens_go_to_the_embedding_wherever_it_lies(checkpoint):
    """Here the embedding is not on the first device, nor where the last layer is."""
    turned = {name: f"pretend:{1 - int(place[-1])}" for name, place in MAP.items()}
    model = load_model(checkpoint("llama"), device_map=turned)
    assert str(device_of(model)) == "pretend:1"
    with torch.no_grad():
        assert logits_of(model, TOKENS.to("pretend:1"), MASK.to("pretend:1")).device == device_of(model)


def test_parameters_on_two_devices_are_trained(spread):
    """LoRA's lie with their projections; one clip and one optimizer serve them all."""
    adapter = Lora.for_model(spread, rank=2, seed=0)
    ll.fit(adapter, spread, SFT, config=CONFIG, seed=0, **QUIET)
    assert {str(p.device) for p in adapter.parameters()} == {"pretend:0", "pretend:1"}
    assert all(bool(B.any()) for B in adapter.B.values())


def test_without_gpus_all_lies_on_the_cpu(checkpoint, loaded):
    """`auto` on a machine that has none."""
    model = load_model(checkpoint("llama"), device_map="auto")
    assert device_of(model).type == "cpu"
    with torch.no_grad():
        assert torch.equal(logits_of(model, TOKENS, MASK), logits_of(loaded("llama", "bridge"), TOKENS, MASK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": MAP, "device": "cpu"}, "device='cpu' and device_map are both given"),
        ({"device_map": "auto", "backend": "hooked"}, "HookedTransformer rebuilds the weights on one device"),
        ({"max_memory": {0: "1GiB"}}, 'max_memory bounds what device_map="auto"'),
        ({"device_map": "even"}, "device_map is 'even'; give one of auto, balanced"),
        ({"device_map": {}}, "device_map is {}"),
        ({"device_map": {"": "gpu"}}, "unknown device 'gpu'"),
        ({"device_map": {"": 99}}, "no device cuda:99 here"),
        ({"device_map": MAP | {"model.layers.1": "cpu"}}, "puts 1 modules .first: model.layers.1. on cpu"),
        ({"device_map": MAP | {"lm_head": "disk"}}, "puts 1 modules .first: lm_head. on disk"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(checkpoint, options, message):
    with pytest.raises(InputError, match=message):
        load_model(checkpoint("llama"), **options)


def test_a_model_in_memory_is_placed_already(hf):
    with pytest.raises(InputError, match="give device_map to Hugging Face's from_pretrained"):
        load_model(hf("llama"), tokenizer=tiny.tokenizer(), device_map="auto")


def test_a_map_that_leaves_a_layer_out_is_refused(checkpoint):
    with pytest.raises(ModelError, match="lm_head"):
        load_model(checkpoint("llama"), device_map={k: v for k, v in MAP.items() if k != "lm_head"})


def test_weights_left_on_disk_are_refused(checkpoint):
    """`auto` offloads what it finds no room for; the same of a GPU's layers on the CPU."""
    with pytest.raises(ModelError, match=r"does not fit.* on .*disk.*offloaded weights are not supported.*max_memory"):
        load_model(checkpoint("llama"), device_map="auto", max_memory={"cpu": 90_000})

    class Placed:
        hf_device_map = {"model": 0, "lm_head": "cpu"}  # noqa: RUF012

    with pytest.raises(ModelError, match=r"x does not fit: its device map puts 1 modules .first: lm_head. on cpu"):
        check_placed(Placed(), "x")
