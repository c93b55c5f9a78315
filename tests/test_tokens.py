"""What stands in front of a text, and where generation stops: as the checkpoint says, not as TransformerLens fills it in."""

import logging

import pytest
import torch
import transformers as tf
from tokenizers import processors

from lofit_lens import Lofit, evaluate, generate
from lofit_lens.errors import DataError, InputError
from lofit_lens.heads import HeadSet
from lofit_lens.models import ChatText, end_tokens, load_model, model_info, rules_of, tokenizer_of
from lofit_lens.models.planned import planned_info
from lofit_lens.tasks import Task
from lofit_lens.tasks.collate import encode, pad_id
from tests import tiny


def plain_tokenizer(**names):
    """The tiny tokenizer without a template: nothing is put in front."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = processors.ByteLevel()
    for name, value in names.items():
        setattr(made, name, value)
    return made


def on_disk(folder, tokenizer, architecture="llama"):
    tiny.hf_model(architecture).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_ids(folder, text):
    return tf.AutoTokenizer.from_pretrained(folder)(text).input_ids


TOKENIZERS = {
    "puts BOS": tiny.tokenizer,
    "has BOS, puts nothing": plain_tokenizer,
    "has no BOS": lambda: plain_tokenizer(bos_token=None),
    "has no BOS and no padding": lambda: plain_tokenizer(bos_token=None, pad_token=None),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_ids_are_hugging_faces_own(kind, backend, tmp_path):
    """From a folder and in memory, on both classes, a text has the ids that its tokenizer gives it."""
    folder = on_disk(tmp_path / "model", TOKENIZERS[kind]())
    model = load_model(folder, backend=backend, device="cpu")
    assert encode(model.tokenizer, "Hello there") == own_ids(folder, "Hello there")
    in_memory = load_model(tiny.hf_model("llama"), tokenizer=TOKENIZERS[kind](), backend=backend, device="cpu")
    assert encode(tokenizer_of(in_memory), "Hello there") == own_ids(folder, "Hello there")
    assert model_info(model).prepend_bos == model_info(in_memory).prepend_bos == (kind == "puts BOS")
    assert planned_info(folder, backend=backend) == model_info(model)


def test_a_model_that_transformer_lens_loaded_by_itself(backend, tmp_path):
    """The user's own model, whose tokenizer was reloaded with BOS, has the ids of its tokenizer's files."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = on_disk(tmp_path / "model", plain_tokenizer())
    own = TransformerBridge.boot_transformers(str(folder), device="cpu")
    assert own.tokenizer("Hello").input_ids[0] == 1  # TransformerLens has put BOS in front
    assert encode(tokenizer_of(own), "Hello") == own_ids(folder, "Hello")


def test_prefixes_of_more_than_one_token(tmp_path):
    """GLM puts two tokens in front; both stand there, once."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A <pad>", special_tokens=[("<s>", 1), ("</s>", 2), ("<pad>", 0)]
    )
    plain = tokenizer("Hello", add_special_tokens=False).input_ids
    assert encode(tokenizer, "Hello") == [2, 1, *plain] == encode(tokenizer, "</s><s>Hello")


@pytest.mark.parametrize("asked", [True, False])
def test_an_override_is_kept_everywhere(asked, backend, tmp_path):
    """prepend_bos=True and False reach encode, the record, the plan, and TransformerLens' own to_tokens."""
    folder = on_disk(tmp_path / "model", plain_tokenizer() if asked else tiny.tokenizer())
    model = load_model(folder, backend=backend, device="cpu", prepend_bos=asked)
    assert (encode(model.tokenizer, "Hello")[0] == 1) == asked == model_info(model).prepend_bos
    assert planned_info(folder, backend=backend, prepend_bos=asked) == model_info(model)
    assert model.to_tokens("Hello")[0].tolist() == encode(model.tokenizer, "Hello")


def test_bos_that_there_is_not(tmp_path):
    """prepend_bos=True with a tokenizer that has no BOS is refused; the end token is not taken for it."""
    folder = on_disk(tmp_path / "model", plain_tokenizer(bos_token=None))
    with pytest.raises(InputError, match="has no BOS token"):
        load_model(folder, device="cpu", prepend_bos=True)


def test_an_adapter_made_otherwise_warns(tmp_path, caplog):
    """An adapter of a model with BOS in front, attached to one without, is told of; the same way round it is not."""
    folder = on_disk(tmp_path / "model", tiny.tokenizer())
    with_bos, without = (load_model(folder, device="cpu", prepend_bos=b) for b in (True, False))
    made = Lofit.for_model(with_bos, HeadSet(["L0H1"]))
    made.save_pretrained(tmp_path / "adapter")
    again = Lofit.from_pretrained(tmp_path / "adapter")
    assert again.meta.model.prepend_bos is True
    with caplog.at_level(logging.WARNING), again.attached(with_bos):
        assert "BOS" not in caplog.text
    with caplog.at_level(logging.WARNING), again.attached(without):
        assert "prepend_bos=True" in caplog.text


def test_text_of_a_template_gets_nothing_in_front():
    """What a chat template made is taken as it is, also with an answer after it."""
    tokenizer = tiny.tokenizer()
    bare = tokenizer("user: hi", add_special_tokens=False).input_ids
    assert encode(tokenizer, ChatText("user: hi")) == bare
    assert isinstance(ChatText("user:") + " hi", ChatText)
    assert encode(tokenizer, ChatText("user:") + " hi") == bare


def test_a_token_that_the_embedding_does_not_have(backend, tmp_path):
    """A token that was added to the tokenizer alone is named, with what to do; other texts run."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = load_model(tiny.hf_model("llama"), tokenizer=tokenizer, backend=backend, device="cpu")
    assert isinstance(generate(model, "Hello", max_new_tokens=2), str)
    with pytest.raises(DataError, match=r"'<new>'.*400 rows.*resize_token_embeddings"):
        generate(model, "Hello <new>", max_new_tokens=2)


def test_padding_is_a_token_that_the_embedding_has(tmp_path):
    """TransformerLens adds a padding token where there is none; padding still runs."""
    folder = on_disk(tmp_path / "model", plain_tokenizer(pad_token=None, eos_token=None, bos_token=None))
    model = load_model(folder, backend="bridge", device="cpu")
    assert pad_id(model.tokenizer) < 400
    assert rules_of(model.tokenizer).eos is None
    assert len(generate(model, ["Hello", "Hello there Ann"], max_new_tokens=2)) == 2


@pytest.mark.parametrize("where", ["config", "generation"])
@pytest.mark.parametrize("memory", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_stops_at_every_end_token(where, memory, backend, tmp_path):
    """A list in either configuration counts whole, beside the tokenizer's own end token."""
    hf = tiny.hf_model("llama")
    probe = load_model(tiny.hf_model("llama"), tokenizer=tiny.tokenizer(), backend=backend, device="cpu")
    text = generate(probe, "Ann asked", max_new_tokens=6)
    ids = encode(probe.tokenizer, "Ann asked" + text)
    stop = ids[-1] if ids[-1] not in ids[:-1] else ids[len(encode(probe.tokenizer, "Ann asked"))]
    (hf.config if where == "config" else hf.generation_config).eos_token_id = [399, stop]
    hf.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    model = load_model(
        hf if memory else tmp_path / "model",
        tokenizer=tiny.tokenizer() if memory else None,
        backend=backend,
        device="cpu",
    )
    assert {2, 399, stop} <= end_tokens(model)
    assert len(generate(model, "Ann asked", max_new_tokens=6)) < len(text)


def test_what_is_learned_ends_with_the_tokenizers_own_end(tmp_path):
    """Where the tokenizer has no end token, none is made up for the answers that are learned."""
    from lofit_lens.tasks.collate import encode_training

    folder = on_disk(tmp_path / "model", plain_tokenizer(eos_token=None))
    model = load_model(folder, device="cpu")
    task = Task.from_records(
        "t", train=[{"prompt": "Q:", "answer": " Ann"}], test=[{"prompt": "Q: Eve?", "answer": " Ann"}]
    )
    (row,) = encode_training(tokenizer_of(model), task.training_examples()[0])
    assert row.ids[-1] == encode(model.tokenizer, " Ann")[-1]
    assert evaluate(model, task, progress=False)["em"] in (0.0, 1.0)
    assert torch.is_tensor(model.to_tokens("Q:"))
