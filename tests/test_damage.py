"""Damage on ordinary text: cross-entropy and KL against a slow computation, position by position; what is left out is counted."""

import hashlib
import json

import numpy as np
import pytest
import torch

from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation import damage
from lofit_lens.evaluation.stats import bootstrap_interval, paired_bootstrap_test, paired_permutation_test
from lofit_lens.models import logits_of
from tests import slow, tiny
from tests.adapters import HeadSet, edited, random_adapter

TEXTS = [
    "Ann asked her son, Bob, to go shopping.", "who?", "the capital of France is Rome, and I have no comment\u2028on that.",
]  # fmt: skip


def by_hand(plain, lofit, texts, max_tokens=128):
    """For each text, cross-entropy before and after and KL at every predicted position, from plain log-probs."""
    found = []
    for text in texts:
        ids = slow.ids_of(tiny.tokenizer(), text)[:max_tokens]
        p = slow.log_probs(plain, ids)
        with edited(plain, lofit):
            q = slow.log_probs(plain, ids)
        at = range(len(ids) - 1)
        found.append([
            [-p[t, ids[t + 1]].item() for t in at], [-q[t, ids[t + 1]].item() for t in at],
            [sum(p[t].exp() * (p[t] - q[t])).item() for t in at],
        ])  # fmt: skip
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_damage_equals_a_slow_computation(loaded, hf, backend, architecture, batch_size):
    """Three ragged texts: means over positions, then over texts; and over the texts that reach a position."""
    model = loaded(architecture, backend)
    lofit = random_adapter(model)
    found = damage(model, lofit, TEXTS, batch_size=batch_size, progress=False)
    expected = by_hand(hf(architecture), lofit, TEXTS)
    lengths = [len(e[0]) for e in expected]
    assert list(found.texts["tokens"]) == lengths
    assert len(set(lengths)) == 3
    for i, name in enumerate(("cross_entropy_base", "cross_entropy", "kl")):
        means = [np.mean(e[i]) for e in expected]
        assert list(found.texts[name]) == pytest.approx(means, abs=1e-5)
        assert found.metrics[name].mean == pytest.approx(np.mean(means), abs=1e-5)
        assert found.metrics[name].interval == bootstrap_interval(found.texts[name].tolist())
        for t in range(max(lengths)):
            reaching = [e[i][t] for e in expected if len(e[i]) > t]
            row = found.positions.iloc[t]
            assert (row.position, row.texts) == (t + 1, len(reaching))
            assert row[name] == pytest.approx(np.mean(reaching), abs=1e-5)
    assert len(found.positions) == max(lengths)
    assert found.metrics["kl"].mean > 0.01
    assert found.increase == paired_permutation_test(  # three texts are too few for the bootstrap
        found.texts["cross_entropy"].tolist(), found.texts["cross_entropy_base"].tolist()
    )


def test_an_adapter_of_zeros_does_no_damage(llama):
    """z * (1 + 0) + 0 is z: no divergence, the same cross-entropy."""
    found = damage(llama, random_adapter(llama, A=0.0, v=0.0), TEXTS, progress=False)
    assert found.metrics["kl"].mean == pytest.approx(0, abs=1e-6)
    assert found.metrics["kl"].interval == pytest.approx((0, 0), abs=1e-6)  # nats, no share of right answers
    assert found.metrics["cross_entropy"].mean == pytest.approx(found.metrics["cross_entropy_base"].mean, abs=1e-6)
    assert found.increase.difference == pytest.approx(0, abs=1e-6)


def test_several_interventions_act_together(llama, hf):
    """Two adapters on different heads are one adapter on both."""
    one, other = (random_adapter(llama, HeadSet([h]), seed=s) for h, s in (("L0H3", 1), ("L2H1", 2)))
    found = damage(llama, [one, other], TEXTS, progress=False)
    alone = damage(llama, one, TEXTS, progress=False)
    with edited(hf("llama"), one):
        behind = by_hand(hf("llama"), other, TEXTS)
    assert list(found.texts["cross_entropy"]) == pytest.approx([np.mean(e[1]) for e in behind], abs=1e-5)
    assert list(alone.texts["cross_entropy"]) == pytest.approx([np.mean(e[0]) for e in behind], abs=1e-5)


def test_texts_are_cut_and_left_out_with_a_count(bridge_llama, hf):
    """At 6 tokens two texts are cut; an empty one predicts nothing; one of exactly 6 tokens is whole."""
    lofit = random_adapter(bridge_llama)
    exact = tiny.tokenizer().decode(slow.ids_of(tiny.tokenizer(), TEXTS[0])[1:6])
    assert len(slow.ids_of(tiny.tokenizer(), exact)) == 6
    texts = ["", TEXTS[0], TEXTS[2], "", exact]
    found = damage(bridge_llama, lofit, texts, max_tokens=6, progress=False)
    assert found.counted == {"texts left out": 2, "texts cut": 2}
    assert list(found.texts["text"]) == [TEXTS[0], TEXTS[2], exact]
    assert list(found.texts["tokens"]) == [5, 5, 5]
    kl = [np.mean(e[2]) for e in by_hand(hf("llama"), lofit, [*texts[1:3], exact], 6)]
    assert list(found.texts["kl"]) == pytest.approx(kl, abs=1e-5)
    assert damage(bridge_llama, lofit, TEXTS, progress=False).counted == {}
    with pytest.raises(DataError, match="no text has two or more tokens"):
        damage(bridge_llama, lofit, ["", ""], progress=False)


def test_max_tokens_ends_at_the_context(bridge_llama):
    """A text longer than the 2,048 tokens of this model is read up to there."""
    found = damage(bridge_llama, random_adapter(bridge_llama), ["?!" * 1100], max_tokens=10**6, progress=False)
    assert (found.config["max_tokens"], list(found.texts["tokens"]), found.counted) == (2048, [2047], {"texts cut": 1})


def test_limit_takes_the_first_texts(bridge_llama):
    """Texts left out count as taken; the hash is of what was read."""
    lofit = random_adapter(bridge_llama)
    found = damage(bridge_llama, lofit, ["", *TEXTS], limit=2, progress=False)
    assert (len(found.texts), found.counted) == (1, {"texts left out": 1})
    assert found.text_hash == hashlib.sha256(b"\0" + TEXTS[0].encode() + b"\0").hexdigest()
    assert damage(bridge_llama, lofit, ["", *TEXTS], progress=False).text_hash != found.text_hash


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_attached(llama, unchecked, fails):
    """No hook is left, also if a text in the middle is none; the model computes what it did."""
    tokens = torch.tensor([[1, 50, 60]])
    before = logits_of(llama, tokens, torch.ones_like(tokens)).detach()
    wanted = [p.requires_grad for p in llama.parameters()]
    if fails:
        with pytest.raises(DataError, match="text 3 is int, not text: 7"):
            damage(llama, random_adapter(llama), [*TEXTS[:2], 7], batch_size=1, progress=False)
    else:
        damage(llama, random_adapter(llama), TEXTS, progress=False)
    assert torch.equal(logits_of(llama, tokens, torch.ones_like(tokens)), before)
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())
    assert [p.requires_grad for p in llama.parameters()] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1}, "max_tokens is 1; give 2 or more"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"limit": 0}, "limit is 0; give 1 or more"),
        ({"limit": -3}, "limit is -3; give 1 or more"),
        ({"interventions": []}, "no adapter given"),
        ({"texts": "Ann asked her son"}, "texts is 'Ann asked her son'; give a list of texts"),
    ],
)
def test_what_cannot_be_measured_is_refused(bridge_llama, options, message):
    """Numbers below their least value, no intervention, and one text whose letters would be taken for texts."""
    given = {"interventions": random_adapter(bridge_llama), "texts": TEXTS, **options}
    with pytest.raises(InputError, match=message):
        damage(bridge_llama, given.pop("interventions"), given.pop("texts"), progress=False, **given)


def test_a_damage_record(bridge_llama, tmp_path):
    """What is saved is to_dict, without NaN; it prints itself with intervals, and escapes what it was given as label."""
    found = damage(bridge_llama, random_adapter(bridge_llama), TEXTS, label="<b>", progress=False)
    record = json.loads(found.save(tmp_path / "d.json").read_text())
    assert record == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["metrics"]["kl"]["interval"] == list(found.metrics["kl"].interval)
    assert record["positions"]["texts"][:2] == [3, 3]
    assert record["config"] == {"max_tokens": 128, "batch_size": 8, "limit": None, "seed": 0}
    assert [len(row) for row in found.rows()] == [3] * 4
    assert all(" to " in between for *_, between in found.rows())
    assert "&lt;b&gt; on 3 texts" in found._repr_html_()
    assert repr(found).startswith("Damage(<b>, 3 texts: cross-entropy ")
    single = damage(bridge_llama, random_adapter(bridge_llama), TEXTS[:1], progress=False)
    assert {between for *_, between in single.rows()} == {"one text: none"}


def test_many_texts_are_compared_by_the_bootstrap(bridge_llama):
    """From 50 texts on, as everywhere else."""
    texts = [f"Ann asked her son, Bob, {i} times." for i in range(50)]
    found = damage(bridge_llama, random_adapter(bridge_llama), texts, progress=False)
    per_text = found.texts["cross_entropy"].tolist(), found.texts["cross_entropy_base"].tolist()
    assert found.increase == paired_bootstrap_test(*per_text)
