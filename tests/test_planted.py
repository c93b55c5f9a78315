"""Planted truth, exact: in a model where only three known heads can decide the answer, head selection finds those three."""

import math

import pytest
import torch

import lofit_lens as ll
from lofit_lens import HeadSet, Task, TrainConfig
from tests import tiny

SHAPE, D_HEAD, D_MODEL = (3, 8), 8, 32
READ, DECIDE, IDLE = slice(0, 16), 16, slice(17, 32)  # three orthogonal parts of the residual stream
RIGHT, WRONG = " of", " the"
WORDS = (
    "brother",
    "country",
    "daughter",
    "author",
    "book",
    "capital",
    "uncle",
    "mother",
    "question",
    "story",
    "Q",
    "A",
)
EPS = 1e9


def planted_model(planted, seed):
    """A Llama whose answer only the planted heads can reach.

    The residual stream has three orthogonal parts: READ holds the token embeddings, DECIDE is one direction, IDLE the rest.
    The two answers' unembedding vectors are +-DECIDE and all other tokens' are zero, so every logit depends on the DECIDE
    coordinate alone. Only a planted head's W_O writes to DECIDE; every head's writes to IDLE; none writes to READ. Planted
    heads' Q, K and V read READ alone, so nothing that another head writes changes what they do. Unplanted heads may
    read IDLE, but what they write ends there. MLPs are zero. What is left is the scale of the RMS norms, which every head could
    change: with an epsilon of 1e9 (and weights sqrt(1e9) against it) the scale is the same constant for every input. So
    the loss has no gradient at an unplanted head. All embeddings lie at -1 on DECIDE: untouched, the model answers wrongly.
    """
    config = tiny.tf.LlamaConfig(
        **{**tiny.WIDE, "num_attention_heads": 8}, num_key_value_heads=8, head_dim=D_HEAD, rms_norm_eps=EPS,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    plain = tiny.tf.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny.tokenizer()
    right, wrong = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (RIGHT, WRONG))
    assert len(right) == len(wrong) == 1
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "norm" in name:
                p.fill_(math.sqrt(EPS))
            else:
                p.normal_(0, 0.25, generator=generator)
        embedding = plain.model.embed_tokens.weight
        embedding.normal_(0, 1, generator=generator)[:, 16:] = 0
        embedding[:, DECIDE] = -1
        plain.lm_head.weight.zero_()
        plain.lm_head.weight[right[0], DECIDE], plain.lm_head.weight[wrong[0], DECIDE] = 1, -1
        for number, layer in enumerate(plain.model.layers):
            attention = layer.self_attn
            layer.mlp.down_proj.weight.zero_()
            attention.o_proj.weight[READ] = 0
            for head in range(SHAPE[1]):
                own = slice(head * D_HEAD, (head + 1) * D_HEAD)
                if (number, head) not in planted:
                    attention.o_proj.weight[DECIDE, own] = 0
                    continue
                attention.o_proj.weight[DECIDE, own] *= 0.2  # too weak to turn the answer untrained
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                    projection.weight[own, 16:] = 0
    return plain


def always_right():
    """24 prompts to train on and 12 others to test; the right answer is always the same, and one token long."""
    prompts = [f"{a} {b}:" for a in WORDS for b in WORDS if a != b]
    draw = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"prompt": prompts[i], "answer": RIGHT} for i in draw[:36]]
    return Task.from_records("planted", train=rows[:24], test=rows[24:], max_new_tokens=1)


def planted_of(seed):
    return HeadSet.random(SHAPE, 3, seed=100 + seed)


@pytest.fixture(scope="module")
def planted_on(tmp_path_factory):
    """(seed, class) -> the planted model, through a checkpoint."""

    def load(seed, backend):
        folder = tmp_path_factory.mktemp("planted")
        planted_model(planted_of(seed), seed).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        return ll.load_model(folder, backend=backend, device="cpu")

    return load


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 10))])
def test_selection_ranks_exactly_the_planted_heads_first(planted_on, backend, seed):
    """Recall 1.0 for ten models with ten planted sets; unplanted heads do not even leave the size of their init."""
    planted = planted_of(seed)
    config = TrainConfig(lr=5e-2, l1=1e-4, epochs=5, batch_size=8)
    scores = ll.select_heads(planted_on(seed, backend), always_right(), seed=seed, config=config, progress=False)
    assert set(scores.top(3)) == set(planted)
    assert min(scores[h] for h in planted) > 10 * max(scores[h] for h in HeadSet.all(SHAPE) - planted)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_offsets_on_planted_heads_solve_the_task_and_on_others_do_not(planted_on, backend, seed):
    """Untuned every answer is wrong; v on the planted heads makes all right, v on all 21 others none."""
    model, task, planted = planted_on(seed, backend), always_right(), planted_of(seed)
    config = TrainConfig(lr=1e-1, epochs=20, batch_size=8)
    assert ll.evaluate(model, task, progress=False)["em"] == 0.0
    for heads, expected in ((planted, 1.0), (HeadSet.all(SHAPE) - planted, 0.0)):
        lofit = ll.tune_offsets(model, task, heads, seed=seed, config=config, progress=False)
        with lofit.attached(model):
            assert ll.evaluate(model, task, progress=False)["em"] == expected
