"""Planting: the mask lets only the planted heads look at a cue, and a training is repeatable bit by bit."""

import random

import pytest
import torch
from safetensors.torch import load_file

from lofit_lens.errors import InputError
from lofit_lens.organism import documents, planting, train, world


@pytest.fixture(scope="module")
def batch_and_documents():
    facts = world.build_world()
    drawn = documents.draw_batch(facts, 24, random.Random(0))
    drawn += documents.draw_batch(facts, 24, random.Random(1), max_length=128)
    ids = {word: index for index, word in enumerate(facts.vocabulary())}
    return planting.collate(drawn, ids, world.planted_heads(0), world.N_HEADS), drawn


def test_only_seeing_planted_heads_may_look_at_a_cue(batch_and_documents):
    batch, drawn = batch_and_documents
    planted = world.planted_heads(0)
    for row, document in enumerate(drawn):
        for cue in document.cues:
            seeing = {head for head, sees in zip(planted[cue.task], cue.seen_by, strict=True) if sees}
            for layer in range(world.N_LAYERS):
                mask = batch.allowed.get(layer, batch.allowed[-1])[row].expand(world.N_HEADS, -1, -1)
                looking = mask[:, cue.position + 1 :, cue.position]
                for head in range(world.N_HEADS):
                    assert looking[head].all() == looking[head].any() == ((layer, head) in seeing)


def test_everything_but_cues_is_plain_causal_attention(batch_and_documents):
    batch, drawn = batch_and_documents
    for row, document in enumerate(drawn):
        cues = {cue.position for cue in document.cues}
        rest = [place for place in range(len(document.words)) if place not in cues]
        for mask in batch.allowed.values():
            assert torch.equal(mask[row, :, :, rest], batch.causal[0, :, :, rest].expand(mask.shape[1], -1, -1))
        assert batch.allowed[-1][row].diagonal(dim1=1, dim2=2).all()


def test_planted_attention_equals_plain_attention_when_nothing_is_hidden():
    settings = train.Settings()
    model = train.build_model(settings, seed=0).eval()
    ids = torch.randint(4, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    open_mask = {-1: torch.ones(1, 1, 9, 9).tril().bool()}
    with torch.no_grad():
        planted = model(input_ids=ids, planted_masks=planting.additive(open_mask)).logits
        model.set_attn_implementation("eager")
        plain = model(input_ids=ids).logits
    assert torch.allclose(planted, plain, atol=1e-5)


@pytest.mark.slow
def test_a_training_is_repeatable_and_learns(tmp_path):
    settings = train.Settings(steps=8, batch=16, warmup=2, packed_every=4, packed_from=0.0, packed_lengths=(64,))
    planted = world.planted_heads(3)
    for name in ("one", "two"):
        train.save(train.train(3, planted, settings, progress=False), tmp_path / name, 3, planted, settings)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    start = train.build_model(settings, seed=3).state_dict()
    assert not any(torch.equal(one[key], start[key]) for key in one if "norm" not in key)
    with pytest.raises(InputError, match="exists"):
        train.save(train.build_model(settings, seed=3), tmp_path / "one", 3, planted, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@torch.no_grad()
def test_dividing_z_keeps_the_function_bit_by_bit():
    model = train.build_model(train.Settings(), seed=0).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    before, weight = model(input_ids=ids).logits, model.model.layers[0].self_attn.v_proj.weight.clone()
    train.divide_z(model, 4.0)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight * 4, weight)
