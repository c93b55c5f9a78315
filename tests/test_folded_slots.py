"""Room for a bias: where there is none the export is refused, and a class is changed only where nothing else changes."""

import json
import shutil

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from lofit_lens.errors import ModelError
from lofit_lens.sharing import slots
from lofit_lens.sharing.slots import as_llama
from lofit_lens.sharing.tokenizers import keep_tokenizer
from tests import tiny
from tests.folding import RELABELLED, change_config, config, drawn, fold, quick_collection  # noqa: F401


@pytest.mark.parametrize(
    ("architecture", "more"),
    [("mistral", {"sliding_window": 16}), ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1})],
)  # fmt: skip
def test_a_sliding_window_is_refused_and_scalings_alone_are_not(tmp_path, architecture, more):
    settings = {k: v for k, v in tiny.configs()[architecture].to_dict().items() if k != "layer_types"}
    torch.manual_seed(0)
    base = tmp_path / "base"
    tf.AutoModelForCausalLM.from_config(tf.CONFIG_MAPPING[architecture].from_dict(settings | more)).save_pretrained(
        base
    )
    tiny.tokenizer().save_pretrained(base)
    with pytest.raises(ModelError, match="attends to the last 16 tokens only"):
        fold(drawn(base), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    found = fold(drawn(base, A=5.0, v=0.0), tmp_path / "out")
    assert found.architecture == found.was == RELABELLED[architecture]
    assert config(found.folder) == config(base)
    assert not found.added


def test_defaults_that_differ_are_spelt_out():
    """The classes fill in other numbers for what a configuration does not say: 8 key-value heads here, one a head there."""
    said = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None, "rope_theta": 1e6}
    made = as_llama(said | {"mlp_bias": True, "pretraining_tp": 2, "attention_bias": False}, "x")
    theirs, ours = tf.MistralConfig.from_dict(dict(said)), tf.LlamaConfig.from_dict(dict(made))
    for field in ("num_key_value_heads", "max_position_embeddings", "intermediate_size", "head_dim", "rope_parameters"):
        assert getattr(theirs, field) == getattr(ours, field)
    assert made["num_key_value_heads"] == 8
    assert made["max_position_embeddings"] == 131072
    assert "sliding_window" not in made
    assert (ours.attention_bias, ours.mlp_bias, ours.pretraining_tp) == (True, False, 1)
    with pytest.raises(ModelError, match="attends to the last 4096 tokens only"):  # what Mistral's class fills in
        as_llama({k: v for k, v in said.items() if k != "sliding_window"}, "x")
    with pytest.raises(ModelError, match="not a multiple"):  # a Llama's check
        as_llama(said | {"hidden_size": 40, "num_attention_heads": 3, "head_dim": 8}, "x")


def test_a_field_that_a_llama_does_not_have_is_refused(monkeypatch):
    """Were Mistral's class to get a new field, nobody would know what it does."""
    said = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    before = tf.MistralConfig.to_dict
    monkeypatch.setattr(tf.MistralConfig, "to_dict", lambda self: before(self) | {"new_scaling": 2})
    with pytest.raises(ModelError, match="because of new_scaling"):
        as_llama(said, "x")


def test_a_class_without_room_is_refused(checkpoint, tmp_path, monkeypatch):
    """What the built model has counts, not a list: a class that ignores attention_bias is found out."""
    monkeypatch.setattr(slots, "AS_LLAMA", ())
    monkeypatch.setitem(slots.SWITCHES, "MistralForCausalLM", "attention_bias")
    with pytest.raises(ModelError, match="has no bias in attention's output projection"):
        fold(drawn(checkpoint("mistral")), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_tokenizers_code_is_neither_run_nor_named(checkpoint, tmp_path):
    """Nobody is asked whether to trust it: refused where nothing else reads it, left out of the copy where something does."""
    base = shutil.copytree(checkpoint("mistral"), tmp_path / "base")
    made = shutil.copytree(base, tmp_path / "made")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}}
    for folder in (base, made):
        (folder / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings | own | {"tokenizer_class": "PreTrainedTokenizerFast"})
        )
    keep_tokenizer(base, made)
    left = json.loads((made / "tokenizer_config.json").read_text())
    assert "auto_map" not in left
    assert left["eos_token"] == settings["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings | own | {"tokenizer_class": "Own"}))
    change_config(base, model_type="own")
    with pytest.raises(ModelError, match=r"tokenizer in .*base cannot be read, or only with code of its own"):
        keep_tokenizer(base, made)
    assert not (tmp_path / "ran").exists()


def test_the_tokenizer_stays_when_the_class_changes(checkpoint, tmp_path):
    """A declared LlamaTokenizer is read from its file beside a Mistral, and rebuilt with other rules beside a Llama."""
    base = shutil.copytree(checkpoint("mistral"), tmp_path / "base")
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz?:"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(base)
    settings = base / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    read = lambda folder: tf.AutoTokenizer.from_pretrained(folder)(tiny.CORPUS[0]).input_ids
    found = fold(drawn(base), tmp_path / "out")
    assert read(found.folder) == read(base)
    shutil.copy(settings, found.folder / settings.name)
    assert read(found.folder) != read(base)  # what would have happened
