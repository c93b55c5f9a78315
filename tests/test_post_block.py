"""Post-block steering alone: its formula and start, and a whole training against plain Hugging Face and torch; the rest is in
test_trained_methods."""

import math

import pytest
import torch
import transformers as tf

import lofit_lens as ll
from lofit_lens import io
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.interventions import PostBlock
from lofit_lens.interventions.files import CONFIG_FILE
from lofit_lens.interventions.post_block import FUNCTIONS, steer
from lofit_lens.models import load_model, logits_of
from lofit_lens.tasks.collate import encode_training
from lofit_lens.training import TrainConfig, row_order
from tests.plain_edits import edited_plain
from tests.task_rows import words_task

FEW = TrainConfig(lr=0.05, epochs=2, batch_size=4, warmup_steps=1)
TOKENS = torch.arange(5, 15)[None]


@pytest.fixture
def task(tmp_path):
    return ll.load_task(str(words_task(tmp_path / "words")))


def test_the_edit_by_hand():
    """h = (3, 4), D = (1, -1), U = (2, 10): D h = -1, SiLU(-1) = -1 / (1 + e), which is added times 2 and times 10."""
    h, D, U = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [10.0]])
    assert steer(h, D, U, FUNCTIONS["linear"]).tolist() == [[[1.0, -6.0]]]
    x = -1 / (1 + math.e)
    assert steer(h, D, U, FUNCTIONS["silu"]).flatten().tolist() == pytest.approx([3 + 2 * x, 4 + 10 * x])
    half = steer(h.bfloat16(), D, U, FUNCTIONS["silu"])
    assert torch.equal(half, steer(h, D, U, FUNCTIONS["silu"]).bfloat16())


def test_the_start_and_the_count():
    """U = 0; D uniform within 1e-3 / sqrt(d_model), another in each layer; Llama-2-7B has 2 * 8 * 4096 * 32 numbers."""
    made = PostBlock(2, 4096).reset_(3)
    assert not made.U.any()
    assert made.D.abs().max() <= 1e-3 / 64
    assert made.D.std().item() == pytest.approx(1e-3 / 64 / math.sqrt(3), rel=0.02)
    assert not torch.equal(*made.D)
    assert torch.equal(PostBlock(2, 4096).reset_(3).D, made.D)
    assert not torch.equal(PostBlock(2, 4096).reset_(4).D, made.D)
    assert PostBlock(32, 4096).n_parameters == 2_097_152


@pytest.mark.parametrize("f", FUNCTIONS)
def test_against_plain_hugging_face(checkpoint, backend, task, f):
    """Losses of six steps, then D, U and logits, to 1e-4."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    adapter = PostBlock.for_model(model, rank=3, f=f, seed=3)
    theirs = PostBlock.for_model(model, rank=3, f=f, seed=3)  # holds numbers; `edited_plain` has the formula
    ll.fit(adapter, model, task, FEW, seed=3, progress=False)

    hf = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()
    hf.requires_grad_(False)
    rows = [encode_training(model.tokenizer, e)[0] for e in task.training_examples("train", seed=3)]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=FEW.lr, weight_decay=0.0)
    schedule = tf.get_linear_schedule_with_warmup(optimizer, 1, 6)
    for step in range(6):
        epoch, place = divmod(step, 3)
        batch = [rows[i] for i in row_order(12, seed=3, epoch=epoch)[4 * place : 4 * place + 4]]
        total = torch.zeros(())
        with edited_plain(hf, theirs):
            for row in batch:
                ids = torch.tensor([row.ids])
                scores = hf(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                total = total - scores[row.start - 1 :].sum()
        loss = total / sum(row.n_labels for row in batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        assert adapter.meta.history[step]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert torch.allclose(adapter.D, theirs.D, atol=1e-4)
    assert torch.allclose(adapter.U, theirs.U, atol=1e-4)
    assert min(adapter.D.abs().max(), adapter.U.abs().max()) > 0.05
    with torch.no_grad():
        with edited_plain(hf, theirs):
            expected = hf(TOKENS).logits
        with adapter.attached(model):
            found = logits_of(model, TOKENS, torch.ones_like(TOKENS))
        assert (expected - hf(TOKENS).logits).abs().max() > 0.05
    assert torch.allclose(found, expected, atol=1e-4)


def test_wrong_functions_and_ranks(bridge_llama, tmp_path):
    """By hand and in a file: what may be given is said."""
    with pytest.raises(InputError, match="unknown f 'relu'; allowed: silu, linear"):
        PostBlock.for_model(bridge_llama, f="relu", seed=0)
    with pytest.raises(InputError, match="rank is 33"):
        PostBlock.for_model(bridge_llama, rank=33, seed=0)
    folder = PostBlock.for_model(bridge_llama, seed=0).save_pretrained(tmp_path / "a")
    io.write_json(folder / CONFIG_FILE, io.read_json(folder / CONFIG_FILE) | {"f": "relu"})
    with pytest.raises(AdapterError, match="unknown f 'relu'"):
        ll.load_adapter(folder)


def test_it_cannot_be_folded(bridge_llama, checkpoint, tmp_path):
    """No weight of a later layer holds it: refused, with what to do instead."""
    adapter = PostBlock.for_model(bridge_llama, f="linear", seed=0)
    with pytest.raises(
        AdapterError, match=r"post-block steering does not edit single heads.* Save this one as an adapter"
    ):
        ll.export_folded(adapter, tmp_path / "f", base=checkpoint("llama"))


def test_as_a_method(bridge_llama, task):
    """Known to comparisons by its name alone, with the settings of a trained method."""
    table = ll.compare_methods(
        bridge_llama, task, methods=["post-block", "RED"], reference="RED", seeds=(0,), progress=False,
        settings={"post-block": {"lr": 0.05, "epochs": 1}, "RED": {"lr": 0.01}},
    )  # fmt: skip
    assert table["post-block"].n_parameters == 2 * 8 * 32 * 3
