"""JoLA against recorded numbers of the authors' own code: `jola_trace.json` says which code, and how they were recorded.

Where our training differs on purpose, the record was made without the difference: see "how" there. The batches and the noise are
theirs; all else is computed here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from lofit_lens.models import load_model, logits_of
from lofit_lens.tasks import Task
from lofit_lens.tasks.collate import encode_training
from lofit_lens.training import TrainConfig, fit
from lofit_lens.training.jola import CONFIG, Gated, gate
from tests.conftest import BACKENDS

TRACE = json.loads(Path(__file__).with_name("jola_trace.json").read_text())
WITHIN = 1e-4  # of the largest number of its kind
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = [*SPECIAL.values(), *(f"t{i}" for i in range(len(SPECIAL), TRACE["config"]["vocab_size"]))]


class Replayed(Gated):
    """Starts where the record starts, takes its noise, and keeps the gates of each step."""

    gates: list

    def start_(self, seed, std):
        super().start_(seed, std)
        with torch.no_grad():
            self.A.copy_(torch.tensor(TRACE["start"]["A"]))
            self.v.copy_(torch.tensor(TRACE["start"]["v"]))
            self.phi.copy_(gates_of(TRACE["start"], "phi"))
        self.gates = []
        return self

    def begin_step(self, done):
        super().begin_step(done)
        self.u = gates_of(TRACE["steps"][done], "u")
        self.gates.append(gate(self.phi.detach(), self.u))


def gates_of(record, name):
    """Numbers of every gate, [2, n_layers, n_heads], of A first."""
    return torch.tensor([record[f"{name}_A"], record[f"{name}_v"]])


def close(found, wanted):
    wanted = torch.as_tensor(wanted)
    return (torch.as_tensor(found) - wanted).abs().max() <= WITHIN * wanted.abs().max()


def words(ids):
    return " ".join(WORDS[i] for i in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recorded model, and a tokenizer that knows its words by their numbers."""
    path, config = tmp_path_factory.mktemp("jola"), dict(TRACE["config"])
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    hf, generator = tf.LlamaForCausalLM(tf.LlamaConfig(**config)), np.random.RandomState(1)
    with torch.no_grad():
        for _, p in sorted(hf.named_parameters()):
            if p.ndim == 2:
                p.copy_(torch.tensor(generator.normal(0, 0.15, tuple(p.shape)), dtype=torch.float32))
    hf.save_pretrained(path)
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tf.PreTrainedTokenizerFast(tokenizer_object=known, **SPECIAL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def task():
    """The recorded rows; the end token is not written, as training adds it."""
    rows = [{"prompt": words(r["prompt"]), "answer": f" {words(r['answer'][:-1])}"} for r in TRACE["rows"]]
    return Task.from_records("official", train=rows, test=rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_of_the_authors_code(folder, task, backend):
    """Gates, losses, penalties, norms and rates of twelve steps; A, v, phi and gates after them; logits of the fitted adapter."""
    model, seen, given = load_model(folder, backend=backend, device="cpu"), [], TRACE["training"]
    examples = task.training_examples("train", seed=0)
    encoded = [encode_training(model.tokenizer, e)[0] for e in examples]
    wanted = [tuple(r["prompt"] + r["answer"]) for r in TRACE["rows"]]
    assert sorted(row.ids for row in encoded) == sorted(wanted)
    assert all(row.n_labels == len(TRACE["rows"][wanted.index(row.ids)]["answer"]) for row in encoded)

    place = {wanted.index(row.ids): i for i, row in enumerate(encoded)}
    visited = [place[row] for step in TRACE["steps"] for row in step["rows"]]
    order = [visited[i : i + 12] for i in range(0, 48, 12)]
    config = TrainConfig(l1=1.0, **given)
    gated = Replayed.for_model(model).start_(0, config.init_std)
    fit(gated, model, task, config, seed=0, penalty=gated.penalty, order=order, on_step=seen.append, progress=False)

    for found, gates, step in zip(seen, gated.gates, TRACE["steps"], strict=True):
        assert close(gates, gates_of(step, "g"))
        assert found["loss"] == pytest.approx(step["loss"], rel=WITHIN)
        assert found["l1"] == pytest.approx(step["total"] - step["loss"], rel=WITHIN)
        assert found["grad_norm"] == pytest.approx(step["grad_norm"], rel=WITHIN)
        assert found["lr"] == pytest.approx(step["lr"], rel=WITHIN, abs=1e-9)
    assert close(gated.A, TRACE["end"]["A"])
    assert close(gated.v, TRACE["end"]["v"])
    assert close(gated.phi, gates_of(TRACE["end"], "phi"))
    assert close(gate(gated.phi), gates_of(TRACE["afterwards"], "g"))

    lofit, _ = gated.fitted()
    for row, logits in zip(TRACE["afterwards"]["rows"], TRACE["afterwards"]["logits"], strict=True):
        tokens = torch.tensor([wanted[row]])
        with torch.no_grad(), lofit.attached(model):
            assert close(logits_of(model, tokens, torch.ones_like(tokens))[0, -3:], logits)


def test_the_start(folder):
    """A and v are normal with the authors' deviation, phi is uniform as Xavier has it: within sqrt(6 / (1 + heads))."""
    model = load_model(folder, backend="bridge", device="cpu")
    drawn = [Gated.for_model(model).start_(seed, CONFIG.init_std) for seed in range(200)]
    phi, bound = torch.stack([g.phi.detach() for g in drawn]), (6 / 5) ** 0.5
    assert 0.99 * bound < phi.abs().max() <= bound
    assert phi.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert gates_of(TRACE["start"], "phi").abs().max() <= bound
    assert torch.stack([g.A.detach() for g in drawn]).std() == pytest.approx(1e-3, rel=0.05)
    assert torch.tensor(TRACE["start"]["A"]).std() == pytest.approx(1e-3, rel=0.2)
