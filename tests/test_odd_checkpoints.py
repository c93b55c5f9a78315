"""Checkpoints and models in memory that would give wrong answers in silence, or an error that says nothing."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from lofit_lens import Lofit
from lofit_lens.errors import AdapterError, InputError, ModelError
from lofit_lens.heads import HeadSet
from lofit_lens.models import bridge_class, hooked_class, load_model, logits_of, model_info
from tests import tiny
from tests.conftest import needs_hooked


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the tiny Llama to spoil."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "mine")


def changed(folder: Path, change) -> None:
    """Write the folder's tensors again after a change to them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reconfigured(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# ------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_tensors_are_named(folder, backend, name):
    """Hugging Face makes missing tensors up; here they are refused by their names, on both classes."""
    changed(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"lack 1 tensor.*{name}"):
        load_model(folder, backend=backend, device="cpu")


def test_a_checkpoint_under_other_names_is_refused(folder):
    """All tensors with another prefix: nothing of it would be used."""
    changed(folder, lambda t: [t.__setitem__(f"other.{n}", t.pop(n)) for n in list(t)])
    with pytest.raises(ModelError, match=r"lack \d+ tensor.* and \d+ more"):
        load_model(folder, device="cpu")


def test_a_longer_configuration_than_weights(folder):
    """More layers in the configuration than in the file."""
    reconfigured(folder, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lack .*model\.layers\.3"):
        load_model(folder, device="cpu")


def test_tensors_that_are_not_used_are_named(folder, caplog):
    """A configuration with fewer layers than the file is another model, and a warning says so."""
    reconfigured(folder, num_hidden_layers=2)
    with caplog.at_level(logging.WARNING):
        load_model(folder, device="cpu")
    assert "model.layers.2" in caplog.text
    assert "not used" in caplog.text


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "pythia", "llama", "gpt2"])
def test_a_folder_without_a_tokenizer_is_refused(checkpoint, tmp_path, architecture):
    """transformers makes up an empty tokenizer for some architectures; none is loaded with it."""
    mine = shutil.copytree(checkpoint(architecture), tmp_path / "mine")
    for file in mine.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer.*save_pretrained"):
        load_model(mine, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs_are_named(folder, name):
    """A clone without `git lfs pull` holds small text files in the place of the large ones."""
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_model(folder, device="cpu")


def test_a_file_of_the_index_that_is_not_there(folder):
    """A sharded checkpoint that was not fetched whole."""
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"no file model-00002-of-00002\.safetensors"):
        load_model(folder, device="cpu")


def test_an_adapter_beside_the_weights_is_refused(folder):
    """transformers would load it along, and the model would be another one."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json.*load with it"):
        load_model(folder, device="cpu")


def test_an_adapter_folder_is_no_model(tmp_path):
    """The error says what the folder is."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter but no model"):
        load_model(tmp_path, device="cpu")


def test_weights_that_are_not_finite(folder, backend):
    """NaN in the weights is refused on both classes."""
    changed(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match="not finite"):
        load_model(folder, backend=backend, device="cpu")


# -------------------------------------------------------------------------- what a class would compute otherwise


def cohere():
    """A random Cohere, whose rotary pairs the bridge of TransformerLens 3 turns otherwise."""
    torch.manual_seed(0)
    hf = tf.CohereForCausalLM(tf.CohereConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return hf


@pytest.mark.parametrize("memory", [False, True])
def test_what_the_bridge_gets_wrong_is_refused(tmp_path, monkeypatch, memory):
    """A model whose logits on the bridge are not Hugging Face's is not returned, from a folder and in memory.

    TransformerLens 3 has no right one for Cohere; 4 has, and there one weight is changed once the bridge has the model.
    """
    hf = cohere()
    hf.save_pretrained(tmp_path / "cohere")
    tiny.tokenizer().save_pretrained(tmp_path / "cohere")
    if hooked_class() is None:
        boot = bridge_class().boot_transformers

        def wrong(*args, **options):
            model = boot(*args, **options)
            next(model.parameters()).data.mul_(2)
            return model

        monkeypatch.setattr(bridge_class(), "boot_transformers", wrong)
    with pytest.raises(ModelError, match="differ from the Hugging Face model's"):
        load_model(hf if memory else tmp_path / "cohere", tokenizer=tiny.tokenizer() if memory else None, device="cpu")


def test_attention_in_memory_is_made_eager():
    """A latent-attention model as from_pretrained gives it (SDPA) would see the future on the bridge."""
    torch.manual_seed(0)
    hf = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )).eval()  # fmt: skip
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = hf(tokens).logits
        model = load_model(hf, tokenizer=tiny.tokenizer(), backend="bridge", device="cpu")
        assert (logits_of(model, tokens, torch.ones_like(tokens)) - expected).abs().max() < 1e-4


WINDOWED = {
    "phi3": lambda: tf.Phi3Config(**tiny.WIDE, num_key_value_heads=4, sliding_window=6),
    "mistral": lambda: tf.MistralConfig(**tiny.WIDE, num_key_value_heads=2, head_dim=12, sliding_window=300),
    "qwen2": lambda: tf.Qwen2Config(
        **tiny.WIDE, num_key_value_heads=2, use_sliding_window=True, sliding_window=300, max_window_layers=1
    ),
}
ROTARY = {
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


def distant(folder, config):
    """Load a random model of a configuration; the largest difference from Hugging Face over 700 tokens."""
    torch.manual_seed(0)
    hf = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    hf.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    model = load_model(folder, device="cpu")
    tokens = torch.randint(3, 400, (1, 700), generator=torch.Generator().manual_seed(1))
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        off = (logits_of(model, tokens, torch.ones_like(tokens)) - hf(tokens).logits).abs().max().item()
    return off / hf(tokens).logits.std().item()


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_hold_for_distant_tokens(kind, tmp_path):
    """A window that a probe of a few tokens cannot see: the class that ignores it is not taken."""
    assert distant(tmp_path / "model", WINDOWED[kind]()) < 1e-3


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_scaling_holds_for_distant_tokens(kind, tmp_path):
    """Rotary scaling shows at distant positions only: the class that ignores it is not taken."""
    config = tf.LlamaConfig(**tiny.WIDE, num_key_value_heads=4, head_dim=8, rope_parameters=ROTARY[kind])
    if kind == "dynamic":
        config.max_position_embeddings = 512
    assert distant(tmp_path / "model", config) < 1e-3


# ------------------------------------------------------------------------------------------------ models in memory


def test_adapters_know_models_in_memory_by_their_weights(backend, tmp_path):
    """An adapter of one random Llama in memory does not load on another; on the same weights it does."""
    one, same, other = (
        load_model(tiny.hf_model("llama", seed=s), tokenizer=tiny.tokenizer(), backend=backend, device="cpu")
        for s in (0, 0, 1)
    )
    Lofit.for_model(one, HeadSet(["L0H1"])).save_pretrained(tmp_path / "adapter")
    assert Lofit.from_pretrained(tmp_path / "adapter", model=same).k == 1
    with pytest.raises(AdapterError, match="other weights"):
        Lofit.from_pretrained(tmp_path / "adapter", model=other)


@needs_hooked
def test_both_classes_know_the_same_model_in_memory():
    """The fingerprint is of the Hugging Face model, so that it does not depend on the class."""
    revisions = {
        model_info(load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer(), backend=b, device="cpu")).revision
        for b in ("hooked", "bridge")
    }
    assert len(revisions) == 1
    assert revisions.pop().startswith("memory:")


def test_the_users_own_models_have_fingerprints(checkpoint):
    """Models that TransformerLens loaded by itself are told apart by their weights too."""
    from transformer_lens.model_bridge import TransformerBridge

    one, other = (TransformerBridge.boot_transformers(str(checkpoint("llama")), device="cpu") for _ in range(2))
    assert model_info(one).revision == model_info(other).revision
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    assert model_info(one).revision != model_info(other).revision


def test_weights_edited_after_loading_are_others(checkpoint, backend):
    """A folder's checksum no longer holds once its weights are changed in memory."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    before = model_info(model)
    assert model_info(model) == before
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    assert model_info(model).revision != before.revision
    assert model_info(model).name == before.name


def test_the_dtype_in_memory_stays(backend):
    """A bfloat16 model in memory is not made float32, unless asked."""
    mine = tiny.hf_model("llama").bfloat16()
    assert model_info(load_model(mine, tokenizer=tiny.tokenizer(), backend=backend, device="cpu")).dtype == "bfloat16"
    again = tiny.hf_model("llama").bfloat16()
    asked = load_model(again, tokenizer=tiny.tokenizer(), backend=backend, device="cpu", dtype="float32")
    assert model_info(asked).dtype == "float32"


def test_a_cast_on_loading_keeps_the_rotary_frequencies(backend):
    """float32 in memory, bfloat16 asked for: far from the start, logits are as near as those of a folder that is read so."""
    hf = tiny.hf_model("llama")
    model = load_model(hf, tokenizer=tiny.tokenizer(), backend=backend, device="cpu", dtype="bfloat16")
    tokens = torch.randint(3, 400, (1, 2000), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tiny.hf_model("llama")(tokens).logits[:, -200:]
        off = (logits_of(model, tokens, torch.ones_like(tokens)).float()[:, -200:] - expected).abs().mean()
    assert model_info(model).dtype == "bfloat16"
    assert off < 0.02 * expected.std()


def test_layers_cut_from_a_model_in_memory(backend):
    """Fewer layers than the configuration says: refused on both classes, with both numbers."""
    hf = tiny.hf_model("llama")
    hf.model.layers = hf.model.layers[:2]
    with pytest.raises(ModelError):
        load_model(hf, tokenizer=tiny.tokenizer(), backend=backend, device="cpu")
    with pytest.raises(ModelError, match=r"2 layers.*says 3"):
        load_model(hf, tokenizer=tiny.tokenizer(), device="cpu")


def test_settings_of_what_a_pass_gives(folder, backend):
    """`return_dict: false` in a saved configuration changes nothing."""
    reconfigured(folder, return_dict=False, output_hidden_states=True)
    model = load_model(folder, backend=backend, device="cpu")
    assert logits_of(model, torch.arange(3, 9)[None], torch.ones(1, 6, dtype=torch.long)).shape == (1, 6, 400)


def test_adapters_of_peft_in_memory_are_refused():
    """A PeftModel is not taken for a plain model, nor is a model that PEFT has put layers into."""
    import peft

    model = peft.get_peft_model(tiny.hf_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for one in (model, model.base_model):
        with pytest.raises(ModelError, match="merge_and_unload"):
            load_model(one, tokenizer=tiny.tokenizer(), device="cpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "not a Hugging Face model"),
        (3, "not a Hugging Face model"),
        (torch.nn.Linear(2, 2), "not a Hugging Face model"),
    ],
)
def test_other_things_are_no_models(given, said):
    """What is no model is named, with what is allowed."""
    with pytest.raises(ModelError, match=said):
        load_model(given, tokenizer=tiny.tokenizer(), device="cpu")


def test_a_loaded_model_is_not_loaded_again(llama):
    """A TransformerLens model is used as it is."""
    with pytest.raises(ModelError, match="use it as it is"):
        load_model(llama, tokenizer=tiny.tokenizer(), device="cpu")


def test_offloaded_models_are_refused(checkpoint):
    """Weights that are not in memory are named, with the way out."""
    hf = tiny.hf_model("llama")
    hf.lm_head.weight = torch.nn.Parameter(torch.empty(400, 32, device="meta"))
    with pytest.raises(ModelError, match=r"offloaded.*lm_head\.weight"):
        load_model(hf, tokenizer=tiny.tokenizer(), device="cpu")


def test_tokenizers_by_name_and_wrong_ones(checkpoint, folder):
    """A tokenizer may be given by where it lies; what is none is named."""
    named = load_model(tiny.hf_model("llama"), tokenizer=str(checkpoint("llama")), device="cpu")
    assert named.tokenizer("Hello").input_ids == tiny.tokenizer()("Hello").input_ids
    with pytest.raises(ModelError, match=r"cannot read the tokenizer of no/such"):
        load_model(folder, tokenizer="no/such", device="cpu")
    with pytest.raises(ModelError, match="int is not a tokenizer"):
        load_model(folder, tokenizer=3, device="cpu")


# ------------------------------------------------------------------------------------------------------------- names


def test_a_folder_is_known_by_its_own_name(folder, backend, tmp_path):
    """No path stands in records, messages and adapters; a name may be given."""
    model = load_model(folder, backend=backend, device="cpu")
    assert model_info(model).name == model.cfg.model_name == "mine"
    Lofit.for_model(model, HeadSet(["L0H1"])).save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    named = load_model(folder, backend=backend, device="cpu", name="my model")
    assert model_info(named).name == named.cfg.model_name == "my model"


def test_a_model_in_memory_is_known_by_its_folders_name(folder, backend):
    """The path that Hugging Face keeps is not shown."""
    hf = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert model_info(load_model(hf, tokenizer=tiny.tokenizer(), backend=backend, device="cpu")).name == "mine"


def test_a_local_folder_has_no_revision(folder):
    """A revision that would be passed over is refused."""
    with pytest.raises(InputError, match="no revision 'main'"):
        load_model(folder, revision="main", device="cpu")


# --------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def on_hub(remote, folder):
    """A tiny Llama as the repository ann/tiny on a hub of this machine."""
    remote.repo("ann/tiny", {f.name: f.read_bytes() for f in folder.iterdir()})
    return remote


def test_a_gated_model_says_how_to_log_in(on_hub, monkeypatch):
    """No access to a gated repository: ask for it, then `hf auth login`."""
    monkeypatch.delenv("HF_TOKEN")
    on_hub.repos["ann/tiny"].gated = True
    with pytest.raises(ModelError, match=r"gated.*hf auth login"):
        load_model("ann/tiny", device="cpu")


def test_a_revision_that_is_not_there(on_hub):
    """The error names the revision."""
    with pytest.raises(ModelError, match=r"at 'v9'.*no such revision"):
        load_model("ann/tiny", revision="v9", device="cpu")


def test_a_whole_cache_without_a_network(on_hub, monkeypatch, caplog):
    """The hub is asked once; where it cannot be reached the cache is read, and a warning says so."""
    from huggingface_hub import constants

    first = load_model("ann/tiny", device="cpu")
    for name, value in {
        "ENDPOINT": "http://127.0.0.1:9",
        "HUGGINGFACE_CO_URL_TEMPLATE": "http://127.0.0.1:9/{repo_id}",
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with caplog.at_level(logging.WARNING):
        again = load_model("ann/tiny", device="cpu")
    assert model_info(again) == model_info(first)
    assert "cannot be reached; ann/tiny is read from the cache" in caplog.text
    assert sum(waits) < 5  # Hugging Face waits longer and longer between its own attempts
    assert not constants.HF_HUB_OFFLINE


def test_no_cache_and_no_network(on_hub, monkeypatch):
    """Nothing to read from: the error says that the hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"cannot be reached.*check the network"):
        load_model("ann/tiny", device="cpu")
