"""Numbers of parameters from configurations alone: the paper's three models, by hand, and the tiny ones, as loaded."""

import pytest
import torch
import transformers as tf

from lofit_lens import Lofit, load_model, model_info
from lofit_lens.errors import InputError, ModelError
from lofit_lens.interventions import Lora, LoReft, Red
from lofit_lens.training.config import LORA, LOREFT, POST_BLOCK, RED, TrainConfig, method_config, preset
from lofit_lens.training.counts import parameter_counts
from tests.conftest import ARCHITECTURES

CONFIGS = {
    "Llama-2-7b": tf.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000,
        name_or_path="meta-llama/Llama-2-7b-hf",
    ),
    "Llama-2-13b": tf.LlamaConfig(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824, vocab_size=32000,
        name_or_path="meta-llama/Llama-2-13b-hf",
    ),
    "gemma-7b": tf.GemmaConfig(
        hidden_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16, head_dim=256,
        intermediate_size=24576, vocab_size=256000, name_or_path="google/gemma-7b",
    ),
}  # fmt: skip
BY_HAND = {
    "Llama-2-7b": {
        "ITI": 4_096,  # 32 heads of 128
        "RepE": 131_072,  # 32 layers of 4096
        "LoFiT step 1": 131_072,  # 32 layers of 32 heads of 128
        "LoFiT 3 %": 4_096,  # 32 heads of 128
        "LoFiT 10 %": 12_288,  # 96 heads of 128
        "LoRA": 4_194_304,  # 32 layers of 2 projections of 8 * (4096 + 4096)
        "RED": 262_144,  # 32 layers of 2 * 4096
        "LoReFT": 2_097_408,  # 32 layers of 2 * 8 * 4096 + 8
        "post-block": 2_097_152,  # 32 layers of 2 * 8 * 4096
        "JoLA": 262_144,  # 32 layers of 32 heads of 2 * 128
    },
    "Llama-2-13b": {
        "ITI": 6_144,  # 48 heads of 128
        "RepE": 204_800,  # 40 layers of 5120
        "LoFiT step 1": 204_800,  # 40 layers of 40 heads of 128
        "LoFiT 3 %": 6_144,  # 48 heads of 128
        "LoFiT 10 %": 18_432,  # 144 heads of 128
        "LoRA": 6_553_600,  # 40 layers of 2 projections of 8 * (5120 + 5120)
        "RED": 409_600,  # 40 layers of 2 * 5120
        "LoReFT": 3_277_120,  # 40 layers of 2 * 8 * 5120 + 8 = 81,928
        "post-block": 3_276_800,  # 40 layers of 2 * 8 * 5120
        "JoLA": 409_600,  # 40 layers of 40 heads of 2 * 128
    },
    "gemma-7b": {
        "ITI": 4_096,  # 16 heads of 256
        "RepE": 86_016,  # 28 layers of 3072
        "LoFiT step 1": 114_688,  # 28 layers of 16 heads of 256
        "LoFiT 3 %": 4_096,  # 16 heads of 256
        "LoFiT 10 %": 12_288,  # 48 heads of 256
        "LoRA": 3_211_264,  # 28 layers of 2 projections of 8 * (3072 + 4096)
        "RED": 172_032,  # 28 layers of 2 * 3072
        "LoReFT": 1_376_480,  # 28 layers of 2 * 8 * 3072 + 8 = 49,160
        "post-block": 1_376_256,  # 28 layers of 2 * 8 * 3072
        "JoLA": 229_376,  # 28 layers of 16 heads of 2 * 256
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_paper_s_models(name):
    """Every figure as computed by hand, in the table's order."""
    assert list(parameter_counts(CONFIGS[name]).items()) == list(BY_HAND[name].items())


def test_settings_change_what_they_name():
    """Another K, ranks and targets: 10 % has three times K; LoRA and LoReFT have ranks of their own."""
    base = parameter_counts(CONFIGS["Llama-2-7b"])
    found = parameter_counts(CONFIGS["Llama-2-7b"], k=10, rank=4, lora_rank=2, targets=("q", "k", "v", "o_proj"))
    changed = {"ITI": 1280, "LoFiT 3 %": 1280, "LoFiT 10 %": 3840, "LoRA": 2_097_152, "LoReFT": 32 * (2 * 4 * 4096 + 4)}
    assert found == {**base, **changed}  # LoRA: 32 layers of 4 projections of 2 * 8192


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_are_those_of_the_adapters(loaded, checkpoint, architecture):
    """From config.json alone, what adapters of the loaded model hold: grouped queries, wide heads, fused projections."""
    model = loaded(architecture, "bridge")
    found = parameter_counts(checkpoint(architecture), k=2)
    assert found["LoRA"] == Lora.for_model(model, seed=0).n_parameters
    assert found["RED"] == Red.for_model(model).n_parameters
    assert found["LoReFT"] == LoReft.for_model(model, seed=0).n_parameters
    assert found["LoFiT step 1"] == Lofit.for_model(model).train_only("A").n_parameters
    assert found["LoFiT 3 %"] * 3 == found["LoFiT 10 %"] == 6 * Lofit.for_model(model).d_head
    assert found["ITI"] == found["LoFiT 3 %"]
    assert found["RepE"] == found["RED"] // 2


def test_the_default_k_is_the_preset_s(checkpoint):
    """3 % of 12 heads is none, so one; an unnamed 32 x 32 has round(30.72) = 31; the embedded model three."""
    assert parameter_counts(checkpoint("llama"))["LoFiT 3 %"] == 8
    unnamed = tf.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    assert parameter_counts(unnamed)["LoFiT 3 %"] == 31 * 128
    found, model = parameter_counts("organism"), load_model("organism", backend="bridge", device="cpu")
    assert found["LoFiT 3 %"] == preset(model_info(model), "organism/truth", "sft").k * 8
    assert found["LoRA"] == Lora.for_model(model, seed=0).n_parameters


def test_nothing_is_built_and_no_random_number_drawn():
    """Twice a 13B model in moments, with the random state and the default device left as they were."""
    before = torch.get_rng_state()
    parameter_counts(CONFIGS["Llama-2-13b"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.zeros(1).device.type == "cpu"


def test_what_cannot_be_counted_is_refused(tmp_path, hub):
    """No configuration, no language model, and more heads than there are."""
    with pytest.raises(ModelError, match="no configuration 'nobody/nothing'"):
        parameter_counts("nobody/nothing")
    with pytest.raises(ModelError, match="no configuration"):
        parameter_counts(tmp_path)
    with pytest.raises(ModelError, match="no language model from a ViTConfig"):
        parameter_counts(tf.ViTConfig(), k=1)
    with pytest.raises(ModelError, match="no attention heads"):
        parameter_counts(tf.MambaConfig())
    with pytest.raises(InputError, match="has 1024"):
        parameter_counts(CONFIGS["Llama-2-7b"], k=400)
    with pytest.raises(InputError, match="unknown target"):
        parameter_counts(CONFIGS["Llama-2-7b"], targets=("mlp",))


def test_starting_points_for_tuning(bridge_llama):
    """One record a method, the embedded model's own rates for it; the rest is LoFiT's."""
    info = model_info(bridge_llama)
    organism = model_info(load_model("organism", backend="bridge", device="cpu"))
    assert (LOREFT.lr, LORA.lr, POST_BLOCK.lr) == (9e-4, 2e-4, 9e-4)
    for method, config in (("loreft", LOREFT), ("lora", LORA), ("red", RED), ("post-block", POST_BLOCK)):
        assert method_config(method, info) == config == TrainConfig(lr=config.lr)
        there = method_config(method, organism)
        assert there.lr > config.lr
        assert there.epochs == preset(organism, "organism/truth", "sft").tune.epochs
    with pytest.raises(InputError, match="unknown method 'lofit'"):
        method_config("lofit", info)
