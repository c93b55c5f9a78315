"""JoLA: gates, penalty and noise; the whole training against plain Hugging Face and torch; what it hands over."""

import math

import pytest
import torch
import transformers as tf

import lofit_lens as ll
from lofit_lens.models import load_model, logits_of
from lofit_lens.tasks.collate import encode_training
from lofit_lens.training import TrainConfig, fit_jola, row_order
from lofit_lens.training.jola import CONFIG, Gated, gate, jola_scores, penalty
from tests.task_rows import words_task

FEW = TrainConfig(lr=0.05, epochs=2, batch_size=4, l1=1.0, schedule="cosine", warmup_steps=2)


@pytest.fixture
def task(tmp_path):
    return ll.load_task(str(words_task(tmp_path / "words")))


def test_gates_by_hand():
    """Closed at phi <= -ln 11 and open from ln 11 on afterwards; in training by the noise."""
    edge = math.log(11)
    found = gate(torch.tensor([-edge - 1e-3, -edge + 1e-2, 0.0, edge + 1e-3]))
    assert found[0] == 0
    assert found[1] > 0
    assert found[2:].tolist() == [0.5, 1.0]
    u = torch.tensor([0.5, 0.9])
    wanted = 1.2 / (1 + torch.exp(-(torch.log(u / (1 - u)) + 0.2) / 0.33)) - 0.1
    assert torch.allclose(gate(torch.full((2,), 0.2), u), wanted.clamp(0, 1), atol=1e-5)


def test_the_penalty_by_hand():
    """Mean over heads, summed over layers, of how likely a gate is open."""
    phi = torch.tensor([[0.0, 1.0], [-2.0, -30.0]])
    likely = [1 / (1 + math.exp(-(x - 0.33 * math.log(0.1 / 1.1)))) for x in (0.0, 1.0, -2.0)]
    assert float(penalty(phi)) == pytest.approx((likely[0] + likely[1]) / 2 + (likely[2] + 1e-6) / 2, abs=1e-6)


def test_the_schedule():
    """Up to lr in the warm-up, then half a cosine; the linear one is as ever."""
    config = TrainConfig(lr=2.0, schedule="cosine", warmup_steps=4)
    assert [config.lr_at(i, 12) for i in (0, 2, 4, 8, 12)] == pytest.approx([0, 1, 2, 1, 0])
    assert [TrainConfig(lr=2.0).lr_at(i, 4) for i in range(5)] == [2, 1.5, 1, 0.5, 0]
    assert "schedule" not in TrainConfig(lr=1.0).to_dict()
    assert CONFIG.to_dict()["warmup_steps"] == 50


@pytest.mark.parametrize("on", ["bridge"])
def test_against_plain_hugging_face(checkpoint, task, on):
    """Losses, penalties, A, v and phi of six steps, with the same noise."""
    model = load_model(checkpoint("llama"), backend=on, device="cpu")
    seen = []
    lofit, scores = fit_jola(model, task, seed=3, config=FEW, on_step=seen.append, progress=False)

    hf = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()
    hf.requires_grad_(False)
    drawn = Gated.for_model(model).start_(3, FEW.init_std)
    A, v, phi = (p.detach().clone().requires_grad_() for p in (drawn.A, drawn.v, drawn.phi))
    noise = {}

    def edit(layer):
        def hook(module, args):
            g = gate(phi[:, layer], noise["u"][:, layer])
            z = args[0].unflatten(-1, (4, 8))
            return ((z * (1 + g[0, :, None] * A[layer]) + g[1, :, None] * v[layer]).flatten(-2),)

        return hook

    for i, layer in enumerate(hf.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(edit(i))
    rows = [encode_training(model.tokenizer, e)[0] for e in task.training_examples("train", seed=3)]
    optimizer = torch.optim.AdamW([A, v, phi], lr=FEW.lr, weight_decay=0.0)
    for step in range(6):
        drawn.begin_step(step)
        noise["u"] = drawn.u
        for group in optimizer.param_groups:
            group["lr"] = FEW.lr_at(step, 6)
        optimizer.zero_grad()
        epoch, place = divmod(step, 3)
        batch = [rows[i] for i in row_order(12, seed=3, epoch=epoch)[4 * place : 4 * place + 4]]
        total = 0.0
        for row in batch:
            ids = torch.tensor([row.ids])
            logp = hf(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[row.start - 1 :]
            total = total - logp.sum()
        loss = total / sum(row.n_labels for row in batch)
        weight = 0.1 * math.exp(-0.01 * step)
        extra = (weight * penalty(phi[1]) + (1 - weight) * penalty(phi[0])) / 12
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_([A, v, phi], 1.0)
        optimizer.step()
        assert seen[step]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
        assert seen[step]["l1"] == pytest.approx(float(extra.detach()), abs=1e-5)
    g = gate(phi.detach())
    assert torch.allclose(lofit.A, g[0, ..., None] * A.detach(), atol=1e-4)
    assert torch.allclose(lofit.v, g[1, ..., None] * v.detach(), atol=1e-4)
    assert torch.allclose(scores.values.float(), g.sum(0), atol=1e-4)


def test_what_it_hands_over_does_the_same(checkpoint, task, backend, tmp_path):
    """A LoFiT adapter on heads with an open gate: saved, loaded, and equal to the gated edit without noise."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    gated = Gated.for_model(model).start_(0, 0.5)
    with torch.no_grad():
        gated.phi[:, 1] = -5.0  # closed
    gated.requires_grad_(False)
    lofit, scores = gated.fitted()
    assert set(lofit.heads.layers) == {0, 2}
    assert scores.meta["open"] == {"A": 8, "v": 8}
    read = ll.Lofit.from_pretrained(lofit.save_pretrained(tmp_path / "a"), model=model)
    tokens = torch.arange(5, 15)[None]
    mask = torch.ones_like(tokens)
    g = gate(gated.phi)[..., None]
    whole = ll.Lofit.for_model(model)
    with torch.no_grad():
        whole.A.copy_(g[0] * gated.A)
        whole.v.copy_(g[1] * gated.v)
        with read.attached(model):
            found = logits_of(model, tokens, mask)
        with whole.attached(model):
            wanted = logits_of(model, tokens, mask)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_stopped_and_resumed(checkpoint, task, tmp_path):
    """The same noise after a stop: bit for bit what an uninterrupted run gives."""
    model = load_model(checkpoint("llama"), backend="bridge", device="cpu")
    wanted, _ = fit_jola(model, task, seed=1, config=FEW, progress=False)

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_jola(model, task, seed=1, config=FEW, checkpoint=tmp_path / "s", on_step=stop, progress=False)
    found, _ = fit_jola(model, task, seed=1, config=FEW, checkpoint=tmp_path / "s", progress=False)
    assert torch.equal(found.A, wanted.A)
    assert torch.equal(found.v, wanted.v)


def test_as_a_head_score_and_a_method(checkpoint, task):
    """Every head has a score; the method is known by its name, finds its heads itself, and has the settings of a trained one."""
    model = load_model(checkpoint("llama"), backend="bridge", device="cpu")
    scores = jola_scores(model, task, seed=0, config=FEW, progress=False)
    assert scores.kind == "JoLA gates"
    assert len(set(scores.values.flatten().tolist())) == 12
    table = ll.compare_methods(
        model, task, methods=["JoLA", "LoFiT 3 %"], seeds=(0,), progress=False,
        settings={"JoLA": {"lr": 0.05, "epochs": 1}, "LoFiT 3 %": {"lr": 0.01}},
    )  # fmt: skip
    assert table["JoLA"].n_parameters % 16 == 0
