"""Activation patching: each head's effect is the slow computation's, donors do not know what is measured, planted heads win."""

import itertools

import pytest
import torch

from lofit_lens import HeadSet
from lofit_lens.errors import DataError
from lofit_lens.tasks.collate import encode
from lofit_lens.training import patching
from lofit_lens.training.patching import few_shot_prompts, replace_head
from lofit_lens.training.selectors import patching_scores
from tests import tiny
from tests.adapters import output_projection
from tests.selecting import SFT, TASKS, answer_log_prob, answers_of, planted_on_class, z_at_end
from tests.test_planted import D_HEAD, DECIDE, RIGHT, SHAPE, always_right, planted_of


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
@TASKS
@torch.no_grad()
def test_patching_is_the_slow_computation(loaded, hf, backend, architecture, task):
    """Every head: the mean z of donor prompts at one prompt's last token, whole sequences one by one, plain Hugging Face."""
    model, plain = loaded(architecture, backend), hf(architecture)
    scores = patching_scores(model, task, seed=5, n_prompts=2, n_shots=2, batch_size=3, progress=False)
    measured, donors, _ = few_shot_prompts(
        model, task.training_examples(), n_prompts=2, n_shots=2, separator="\n\n", seed=5
    )
    n_heads = plain.config.num_attention_heads
    mean = torch.stack([z_at_end(plain, ids) for ids in donors]).mean(dim=0).unflatten(1, (n_heads, -1))
    tokenizer, expected = model.tokenizer, torch.zeros(scores.shape)

    def outcomes(at_ends):
        sums = []
        for e, at in zip(measured, at_ends, strict=True):
            place[0] = at
            found = [answer_log_prob(plain, tokenizer, e.prompt, a, eos=False) for a in answers_of(e)]
            sums.append(found[0] - found[1] if len(found) == 2 else found[0])
        return torch.stack(sums)

    ends, place = [len(encode(tokenizer, e.prompt)) - 1 for e in measured], [0]
    base = outcomes(ends)
    for layer, head in itertools.product(range(3), range(n_heads)):

        def swap(module, args, layer=layer, head=head):
            z = args[0].unflatten(-1, (n_heads, -1)).clone()
            z[0, place[0], head] = mean[layer, head]
            return (z.flatten(-2),)

        handle = output_projection(plain, layer).register_forward_pre_hook(swap)
        expected[layer, head] = (outcomes(ends) - base).mean()
        handle.remove()
    assert torch.allclose(scores.values.float(), expected, atol=2e-5)
    assert expected.abs().max() > 0.005


def test_donor_prompts_hold_no_measured_example(bridge_llama):
    """20 seeds: measured and donor examples are disjoint; a donor prompt is solved examples, then an unsolved one."""
    examples, tokenizer = SFT.training_examples(), bridge_llama.tokenizer
    seen = set()
    for seed in range(20):
        measured, donors, shots = few_shot_prompts(
            bridge_llama, examples, n_prompts=3, n_shots=2, separator=" |", seed=seed
        )
        assert (len(measured), len(donors), shots) == (3, 3, [2, 2, 2])
        seen.add(tuple(e.prompt for e in measured))
        for ids in donors:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            *solved, asked = text.split(" |")
            assert len(set(solved)) == 2
            rows = {e.prompt + e.answer for e in examples if e not in measured}
            assert set(solved) <= rows
            assert asked in {e.prompt for e in examples if e not in measured}
            assert not any(s.startswith(asked) for s in solved)
            assert ids[0] == tokenizer.bos_token_id
    assert len(seen) == 20


def test_a_short_context_takes_fewer_shots(bridge_llama, monkeypatch):
    """As many as fit, the first ones drawn; none that fits is an error, and so are too few examples."""
    examples = SFT.training_examples()

    def made():
        return few_shot_prompts(bridge_llama, examples, n_prompts=4, n_shots=3, separator="\n", seed=0)[1:]

    donors, shots = made()
    assert shots == [3, 3, 3, 3]
    limit = min(map(len, donors)) - 1
    monkeypatch.setattr(patching, "context_length", lambda model: limit)
    shorter, fewer = made()
    assert set(fewer) == {2}
    assert max(map(len, shorter)) <= limit
    for long, short in zip(donors, shorter, strict=True):
        text, kept = (bridge_llama.tokenizer.decode(ids).split("\n") for ids in (long, short))
        assert kept == [*text[:2], text[3]]
    monkeypatch.setattr(patching, "context_length", lambda model: 20)
    with pytest.raises(DataError, match=r"longer than the context of .* \(20 tokens\)"):
        made()
    with pytest.raises(DataError, match="give 3 or more"):
        few_shot_prompts(bridge_llama, examples[:2], n_prompts=4, n_shots=3, separator="\n", seed=0)


def test_three_examples_are_enough(bridge_llama):
    """One is measured; each of the other two stands solved before the other."""
    measured, donors, shots = few_shot_prompts(
        bridge_llama, SFT.training_examples()[:3], n_prompts=9, n_shots=9, separator="\n", seed=0
    )
    assert (len(measured), len(donors), shots) == (1, 2, [1, 1])


def test_replace_head_by_hand():
    """One head at one position, or a head everywhere; the input stays, and so does its dtype."""
    z = torch.zeros(2, 3, 2, 1, dtype=torch.bfloat16)
    one = replace_head(1, torch.tensor([5.0]), at=0)(z, None)
    assert one.nonzero().tolist() == [[0, 0, 1, 0], [1, 0, 1, 0]]
    rows = replace_head(0, torch.arange(1.0, 7).view(2, 3, 1))(z, None)
    assert rows[..., 0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not rows[..., 1, 0].any()
    assert one.dtype == rows.dtype == z.dtype
    assert not z.any()


def reading_the_answer(plain, planted):
    """Planted heads read one coordinate, which the right answer's token alone has, and write it to DECIDE as it is.

    So their z is 0 in a zero-shot prompt, and speaks for the right answer behind solved examples.
    """
    own_token = tiny.tokenizer()(RIGHT, add_special_tokens=False)["input_ids"][0]
    embedding = plain.model.embed_tokens.weight
    embedding[:, 15] = 0
    embedding[own_token, 15] = 5
    for layer, head in planted:
        attention, own = plain.model.layers[layer].self_attn, slice(head * D_HEAD, (head + 1) * D_HEAD)
        attention.v_proj.weight[own] = 0
        attention.v_proj.weight[own, 15] = 10 * attention.o_proj.weight[DECIDE, own]


@pytest.mark.parametrize("seed", range(2))
def test_patching_ranks_exactly_the_planted_heads_first(tmp_path, backend, seed):
    """Heads that carry what solved examples say raise the right answer; no other head's z does anything."""
    model, planted = planted_on_class(tmp_path, seed, backend, reading_the_answer), planted_of(seed)
    scores = patching_scores(model, always_right(), n_prompts=3, n_shots=3, seed=seed, progress=False)
    assert set(scores.top(3)) == set(planted)
    assert min(scores[h] for h in planted) > 0.005
    assert all(abs(scores[h]) < 1e-5 for h in HeadSet.all(SHAPE) - planted)
