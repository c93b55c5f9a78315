"""Decoding many prompts together says what decoding each alone says: caches are put together, ended prompts leave."""

import pytest
import torch

from lofit_lens.evaluation import generate, generation
from lofit_lens.models import (
    Borders,
    can_join,
    extend,
    fused_attention,
    load_model,
    prefill,
    proofs,
    running,
    together,
    tokenizer_of,
)
from lofit_lens.tasks.collate import encode
from tests import tiny
from tests.adapters import random_adapter
from tests.conftest import BACKENDS, ON_HOOKED, PAIRS, needs_hooked

# 3 to 40 tokens: together they would be padded by more than a group may waste.
PROMPTS = [
    "Q: who?", "Ann", "Q: Imagine that the capital of France is Rome. What is the capital of it? A:", "a b c d e f g",
    "Interpret each question literally, and as a question about the real world; carefully", "Q: it? A:", "Bob, go",
    "Read the following story about a family. Ann asked her son, Bob, to go shopping. how is Eve related to Ann?",
]  # fmt: skip


@pytest.fixture
def rows(monkeypatch):
    """Rows of every decoding step."""
    seen, own = [], generation.step
    monkeypatch.setattr(
        generation, "step", lambda model, state, token: (seen.append(len(token)), own(model, state, token))[1]
    )
    return seen


@pytest.mark.parametrize("adapted", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_together_as_alone(loaded, monkeypatch, rows, architecture, on, adapted):
    """The same ids whatever the batch; a prompt that has said its end is run no further."""
    model, n = loaded(architecture, on), 8
    monkeypatch.setattr(generation, "PADDING", 16)
    monkeypatch.setattr(generation, "end_tokens", lambda _: frozenset())
    ids, size = [encode(tokenizer_of(model), p) for p in PROMPTS], 0.5 if adapted else 0.0
    with random_adapter(model, v=size, A=size).attached(model):
        free = [generation.decode_ids(model, [p], n)[0] for p in ids]
        ends = [said[i % n] for i, said in enumerate(free)]  # each prompt has an end of its own
        expected = [said[: said.index(end)] for said, end in zip(free, ends, strict=True)]
        rows.clear()
        assert generation.decode_ids(model, ids, n, turn_ends=ends) == expected
        assert can_join(model)
        wanted = [sum(len(said) > i for said in expected) for i in range(n - 1)]
        assert rows == [count for count in wanted if count]
        texts = generate(model, PROMPTS, max_new_tokens=n)
        assert generate(model, PROMPTS, max_new_tokens=n, batch_size=3) == texts
        assert generate(model, PROMPTS, max_new_tokens=n, token_budget=60) == texts
        assert [generate(model, p, max_new_tokens=n) for p in PROMPTS[:3]] == texts[:3]


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_caches_of_other_kinds_are_not_put_together(loaded, architecture):
    """Windows: prompts of one batch are padded instead, and say what they say alone."""
    model = loaded(architecture, "bridge")
    assert not can_join(model)
    short = [p[:12] for p in PROMPTS]
    assert generate(model, short, max_new_tokens=5) == [generate(model, p, max_new_tokens=5) for p in short]


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_states_of_different_lengths_go_on_as_their_parts(llama, fused):
    """Logits behind the joined state, and borders and masks of both parts; the parts stay usable."""
    ids = torch.arange(3, 27).reshape(2, 12)
    with fused_attention(llama, cached=True) if fused else torch.no_grad():
        parts = [
            prefill(llama, t, torch.ones_like(t), Borders(torch.full((len(t),), t.shape[1])))[1]
            for t in (ids[:, :7], ids[:1, :4])
        ]
        new = torch.tensor([[30], [31], [32]])
        every = together(parts)
        assert every.mask.tolist() == [[1] * 7, [1] * 7, [0] * 3 + [1] * 4]
        assert every.borders.prompt.tolist() == [7, 7, 4]
        found, after = extend(llama, every, new)
        wanted = [extend(llama, p, n)[0] for p, n in zip(parts, (new[:2], new[2:]), strict=True)]
    assert torch.allclose(found, torch.cat(wanted), atol=1e-5)
    assert after.mask.shape == (3, 8)


# ------------------------------------------------------------------------------------------------------ kept proofs


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """Forward passes of a model from here on; proofs of models of any size are kept, in a folder of their own."""
    monkeypatch.setenv("LOFIT_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proofs, "LEAST", 0)

    def watch(model):
        seen, inner = [], getattr(model, "original_model", model)
        own = inner.forward
        monkeypatch.setitem(inner.__dict__, "forward", lambda *a, **k: (seen.append(1), own(*a, **k))[1])
        return seen

    return watch


@pytest.mark.parametrize("on", BACKENDS)
def test_a_proof_is_made_once_a_checkpoint(checkpoint, passes, on, tmp_path):
    """A model that is loaded again runs none of the trials: one pass a prompt, and one a further token."""
    counts = []
    for _ in range(2):
        model = load_model(checkpoint("llama"), backend=on, device="cpu")
        seen = passes(model)
        said = generate(model, PROMPTS[0], max_new_tokens=3)
        counts.append(len(seen))
    assert counts[1] == 3 < counts[0]
    kept = list((tmp_path / "cache" / "proofs").glob("*.json"))
    assert len(kept) == 4
    assert said == generate(model, PROMPTS[0], max_new_tokens=3)
    other = load_model(checkpoint("llama-gqa"), backend=on, device="cpu")
    seen = passes(other)
    generate(other, PROMPTS[0], max_new_tokens=3)
    assert len(seen) == counts[0]
    model.cfg.rms_norm_eps = model.cfg.eps = 1e-3  # the same weights in another configuration
    assert not proofs.is_proven(model, "fused attention") or on == "bridge"


@pytest.mark.parametrize("on", BACKENDS)
def test_a_refusal_is_found_out_again(checkpoint, passes, monkeypatch, on, tmp_path):
    """What was not proven is not kept."""
    model = load_model(checkpoint("llama"), backend=on, device="cpu")
    monkeypatch.setattr(running, "together", lambda states: states[0])
    assert not can_join(model)
    names = {p.name for p in (tmp_path / "cache" / "proofs").glob("*.json")}
    monkeypatch.undo()
    assert len(names) == 1  # of cached keys


def test_a_cache_that_cannot_be_written_is_passed_over(checkpoint, passes, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    model = load_model(checkpoint("llama"), backend="bridge", device="cpu")
    assert can_join(model)


# ---------------------------------------------------------------------------------------------- weights in memory


@needs_hooked
@pytest.mark.parametrize("architecture", ON_HOOKED)
def test_no_two_weights_share_memory(checkpoint, architecture):
    """Tied embeddings and fused matrices too: an edit of one weight leaves all others."""
    model = load_model(checkpoint(architecture), backend="hooked", device="cpu")
    places = [p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()]
    assert len(places) == len(set(places))


@needs_hooked
def test_a_users_own_model_keeps_its_weights():
    """HookedTransformer of a model in memory is a copy; an edit of either leaves the other."""
    hf = tiny.hf_model("llama")
    model = load_model(hf, backend="hooked", tokenizer=tiny.tokenizer(), device="cpu")
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
