"""Loading: every architecture on every class gives Hugging Face's own logits, or a refusal with the reason."""

import logging
import shutil
import warnings

import pytest
import torch
import transformers as tf

from lofit_lens.errors import InputError, ModelError
from lofit_lens.models import (
    bridge_class,
    hooked_class,
    hooked_refusal,
    load_model,
    logits_of,
    model_info,
    parse_device,
    tokenizer_of,
)
from lofit_lens.models.loading import chosen_dtype
from tests import tiny
from tests.conftest import ALL_PAIRS, BACKENDS, needs_hooked

TOKENS = torch.randint(3, 400, (1, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model, plain, tokens=TOKENS):
    """Largest difference of the logits from plain Hugging Face's."""
    return (logits_of(model, tokens, torch.ones_like(tokens)).float() - plain(tokens).logits.float()).abs().max().item()


# ---------------------------------------------------------------------------------------- what can be loaded


@pytest.mark.parametrize(("architecture", "on"), ALL_PAIRS)
def test_logits_equal_plain_hugging_face(loaded, hf, architecture, on):
    """A model loaded without processing is the Hugging Face model, and it is of the class asked for."""
    model = loaded(architecture, on)
    assert difference(model, hf(architecture)) < 1e-5
    assert isinstance(model, hooked_class() if on == "hooked" else bridge_class())


def test_auto_takes_hookedtransformer_where_it_exists(checkpoint):
    """backend="auto" is HookedTransformer on 3.x and the bridge on 4.x."""
    model = load_model(checkpoint("llama"), device="cpu")
    assert model_info(model).backend == ("bridge" if hooked_class() is None else "hooked")
    assert isinstance(model, hooked_class() or bridge_class())


@pytest.mark.parametrize("architecture", ["gpt2", "mistral"])
@pytest.mark.parametrize("on", BACKENDS)
def test_a_folder_may_have_any_name(checkpoint, hf, tmp_path, architecture, on):
    """TransformerLens reads architectures from names; a folder called after other models loads all the same."""
    trap = shutil.copytree(checkpoint(architecture), tmp_path / "my-llama-7b" / "gemma-2-chat-pythia")
    assert difference(load_model(trap, backend=on, device="cpu"), hf(architecture)) < 1e-5
    assert difference(load_model(str(trap), backend=on, device="cpu"), hf(architecture)) < 1e-5


@pytest.mark.parametrize("on", BACKENDS)
def test_a_model_in_memory(on, hf, checkpoint):
    """A Hugging Face model that was read before, with its tokenizer, loads on each class."""
    from transformers import AutoModelForCausalLM

    mine = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager")
    model = load_model(mine, tokenizer=tiny.tokenizer(), backend=on, device="cpu")
    assert difference(model, hf("llama")) < 1e-5
    assert tokenizer_of(model).eos_token_id == 2


@pytest.mark.parametrize("on", BACKENDS)
def test_a_model_in_memory_that_was_never_saved(on, hf):
    """A model made from a configuration alone names no architecture in it; its class does."""
    model = load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer(), backend=on, device="cpu")
    assert difference(model, hf("llama")) < 1e-5


def test_a_model_in_memory_needs_its_tokenizer():
    """Without a tokenizer the error says how to give one."""
    with pytest.raises(ModelError, match="tokenizer="):
        load_model(tiny.hf_model("llama"), device="cpu")


@pytest.mark.parametrize("on", BACKENDS)
def test_a_loaded_model_is_frozen_and_in_eval_mode(loaded, on):
    """No weight asks for gradients, no module trains."""
    model = loaded("gpt2", on)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for_is_the_weights_dtype(checkpoint, hf, on, dtype):
    """Half precision weights, logits near the float32 ones (3 significant digits of logits of order 1)."""
    model = load_model(checkpoint("llama"), backend=on, dtype=dtype, device="cpu")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert model_info(model).dtype == dtype
    assert difference(model, hf("llama")) < 0.1


@pytest.mark.parametrize(
    ("found", "dtype", "words"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "bfloat16, since this processor has AMX"),
        ({"avx512_bf16": True}, torch.bfloat16, "bfloat16, since this processor has AVX512-BF16"),
        (
            {"amx_bf16": False},
            torch.float32,
            "float32 and not bfloat16, since this processor has neither AMX nor AVX512-BF16",
        ),
    ],
)
def test_dtype_auto_is_bfloat16_where_it_is_native(checkpoint, monkeypatch, caplog, found, dtype, words):
    """It says what it took and why; without it, float32 wherever it runs."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    model = load_model(checkpoint("llama"), backend="bridge", device="cpu", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert words in caplog.text
    assert chosen_dtype(torch.device("cpu")) == dtype
    assert next(load_model(checkpoint("llama"), backend="bridge", device="cpu").parameters()).dtype == torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_dtype_auto_on_a_gpu(monkeypatch, caplog, capability, dtype):
    """Ampere and later multiply bfloat16; before, it is emulated."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "G")
    assert chosen_dtype(torch.device("cuda:0")) == dtype
    assert "since G" in caplog.text


def test_the_revision_of_a_folder_is_the_hash_of_its_weights(checkpoint, loaded, tmp_path):
    """Same weights under another path have the same revision; another seed's have another."""
    copy = shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    other = tiny.save(tmp_path / "other", "llama", seed=1)
    revisions = [model_info(load_model(p, backend="bridge", device="cpu")).revision for p in (copy, other)]
    here = model_info(loaded("llama", "bridge"))
    assert here.revision == revisions[0] != revisions[1]
    assert here.revision.startswith("sha256:")
    assert (here.n_layers, here.n_heads, here.d_model, here.d_vocab) == (3, 4, 32, 400)


@pytest.mark.parametrize("on", BACKENDS)
def test_a_hub_id_is_read_through_the_hub_cache(hub, hf, on):
    """A hub name loads on each class, keeps its name, and its revision is the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = hub / "models--someone--tiny-llama"
    tiny.save(folder / "snapshots" / commit, "llama")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    model = load_model("someone/tiny-llama", backend=on, device="cpu")
    assert difference(model, hf("llama")) < 1e-5
    assert (model_info(model).name, model_info(model).revision) == ("someone/tiny-llama", commit)


# ------------------------------------------------------------------------------------------ what is refused

REFUSED = {"gemma": "GemmaForCausalLM", "llama-bias": "attention_bias"}


@needs_hooked
@pytest.mark.parametrize("architecture", REFUSED)
def test_what_hookedtransformer_gets_wrong_is_refused(checkpoint, architecture):
    """Gemma from a folder and Llama with attention biases: refused with the reason and the way out."""
    with pytest.raises(ModelError, match=rf"{REFUSED[architecture]}.*backend='bridge'"):
        load_model(checkpoint(architecture), backend="hooked", device="cpu")


@pytest.mark.parametrize("architecture", REFUSED)
def test_auto_falls_back_to_the_bridge_and_says_why(checkpoint, hf, caplog, architecture):
    """The fallback gives the right logits and logs its reason (on 4.x there is nothing to fall back from)."""
    with caplog.at_level(logging.INFO, logger="lofit_lens.models"):
        model = load_model(checkpoint(architecture), device="cpu")
    assert model_info(model).backend == "bridge"
    assert difference(model, hf(architecture)) < 1e-5
    assert "TransformerBridge" in caplog.text
    assert (REFUSED[architecture] in caplog.text) == (hooked_class() is not None)


@pytest.mark.skipif(hooked_class() is not None, reason="this TransformerLens has HookedTransformer")
def test_without_the_class_hooked_is_refused(checkpoint):
    """On TransformerLens 4.x backend="hooked" says that the class is gone."""
    with pytest.raises(ModelError, match=r"no HookedTransformer.*backend='bridge'"):
        load_model(checkpoint("llama"), backend="hooked", device="cpu")


@needs_hooked
def test_gemma_by_its_hub_name_is_not_refused(hf):
    """HookedTransformer has its own configuration for a hub name it knows, not for one it does not."""
    assert hooked_refusal(hf("gemma").config, "google/gemma-2b") is None
    assert "GemmaForCausalLM" in hooked_refusal(hf("gemma").config, "someone/else")


@needs_hooked
def test_a_conversion_that_went_wrong_is_not_returned(checkpoint, monkeypatch):
    """If the built model's logits differ from Hugging Face's, "hooked" refuses and "auto" takes the bridge."""
    from transformer_lens import loading_from_pretrained as loading

    convert = loading.get_pretrained_state_dict

    def wrong(*args, **kwargs):
        weights = convert(*args, **kwargs)
        weights["blocks.1.attn.W_O"] = weights["blocks.1.attn.W_O"] * 0.5
        return weights

    monkeypatch.setattr(loading, "get_pretrained_state_dict", wrong)
    with pytest.raises(ModelError, match="logits differ"):
        load_model(checkpoint("llama"), backend="hooked", device="cpu")
    assert model_info(load_model(checkpoint("llama"), device="cpu")).backend == "bridge"


def test_an_unknown_model_is_refused_with_what_is_allowed(hub, tmp_path):
    """A name that is neither folder nor hub id, and a folder without a model."""
    with pytest.raises(ModelError, match=r"unknown model 'no/such-model'.*organism"):
        load_model("no/such-model", device="cpu")
    with pytest.raises(ModelError, match="unknown model"):
        load_model(tmp_path / "missing", device="cpu")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("on", BACKENDS)
def test_truncated_weights_are_refused(checkpoint, tmp_path, on):
    """Half a weights file is ModelError with the folder's name, on each class."""
    broken = shutil.copytree(checkpoint("llama"), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20000])
    with pytest.raises(ModelError, match="broken"):
        load_model(broken, backend=on, device="cpu")


def test_a_folder_without_weights_or_tokenizer_is_refused(checkpoint, tmp_path):
    """What is missing is said."""
    for missing, what in (("model.safetensors", "weights|load"), ("tokenizer.json", "tokenizer")):
        broken = shutil.copytree(checkpoint("llama"), tmp_path / missing)
        (broken / missing).unlink()
        if what == "tokenizer":
            (broken / "tokenizer_config.json").unlink()
        with pytest.raises(ModelError, match=what):
            load_model(broken, backend="bridge", device="cpu")


def test_unknown_backend_dtype_and_device_are_refused(checkpoint, monkeypatch):
    """Each names what was given and what is allowed."""
    with pytest.raises(InputError, match=r"'hook'; allowed: auto, hooked, bridge. Did you mean 'hooked'"):
        load_model(checkpoint("llama"), backend="hook")
    with pytest.raises(InputError, match="'float31'; allowed: float32"):
        load_model(checkpoint("llama"), dtype="float31")
    with pytest.raises(InputError, match="'gpu'; allowed: cpu, cuda"):
        load_model(checkpoint("llama"), device="gpu")
    with pytest.raises(InputError, match="mps"):
        parse_device("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="cuda:1 here: this machine has 1"):
        parse_device("cuda:1")
    assert parse_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device(None) == torch.device("cpu")


# --------------------------------------------------------------------------- models that a user loaded himself


def test_a_bridge_booted_by_hand_works(checkpoint, hf):
    """model_info knows class and shape of a model this library did not load; its revision is a fingerprint."""
    model = bridge_class().boot_transformers(str(checkpoint("llama")), device="cpu", dtype=torch.float32)
    info = model_info(model)
    assert (info.backend, info.processed, info.n_layers, info.n_heads) == ("bridge", False, 3, 4)
    assert info.revision.startswith("memory:bridge:")
    assert difference(model, hf("llama")) < 1e-5


@needs_hooked
def test_a_hookedtransformer_built_by_hand_works(loaded):
    """So does one that a user built from a configuration."""
    like = loaded("llama", "hooked")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hooked_class()(like.cfg, like.tokenizer, move_to_device=False)
    model.load_state_dict(like.state_dict(), strict=False)
    assert (model_info(model).backend, model_info(model).processed) == ("hooked", False)
    assert model_info(model).revision.startswith("memory:hooked:")
    with torch.no_grad():
        assert torch.equal(
            logits_of(model, TOKENS, torch.ones_like(TOKENS)), logits_of(like, TOKENS, torch.ones_like(TOKENS))
        )


def test_a_model_without_a_tokenizer_says_so(checkpoint):
    """Text cannot go in: the error says what to set."""
    model = bridge_class().boot_transformers(str(checkpoint("llama")), device="cpu", dtype=torch.float32)
    model.tokenizer = None
    with pytest.raises(ModelError, match="tokenizer"):
        tokenizer_of(model)


@needs_hooked
def test_sliding_windows_that_hooked_ignores_are_refused(tmp_path):
    """Qwen with a sliding window would be silently wrong behind the window: the bridge takes it."""
    model = tiny.hf_model("qwen2")
    model.config.use_sliding_window, model.config.sliding_window = True, 16
    with pytest.raises(ModelError, match="sliding window"):
        load_model(model, tokenizer=tiny.tokenizer(), backend="hooked", device="cpu")


@needs_hooked
def test_a_model_in_memory_in_train_mode_is_judged_without_dropout():
    """Dropout of the model at hand is no difference between the classes; its mode is left as it was."""
    model = tiny.hf_model("gpt2").train()
    assert model_info(load_model(model, tokenizer=tiny.tokenizer(), backend="hooked", device="cpu")).backend == "hooked"
    assert model.training


def test_pickled_weights_are_not_read(tmp_path):
    """A folder with pytorch_model.bin alone is refused before anything of it is opened."""
    folder = tiny.save(tmp_path / "old", "llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load_model(folder, backend="bridge", device="cpu")


def test_a_model_in_memory_that_was_never_saved_names_its_architecture_to_the_bridge():
    """Gemma 3 has no entry by model type alone: the class of the model at hand says what it is."""
    config = tf.Gemma3TextConfig(**tiny.WIDE, num_key_value_heads=2, head_dim=16)
    config._attn_implementation = "eager"
    plain = tf.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(3, 12)[None]
    expected = plain(tokens).logits.detach()
    model = load_model(plain, tokenizer=tiny.tokenizer(), backend="bridge", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, tokens, torch.ones_like(tokens)), expected, atol=1e-5, rtol=0)
