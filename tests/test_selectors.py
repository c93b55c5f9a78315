"""Head selectors: each is the number that it says, finds planted heads, and leaves the model as it was."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import lofit_lens as ll
from lofit_lens import HeadSet, Task, TrainConfig, io, probing
from lofit_lens.errors import InputError
from lofit_lens.models import load_model
from lofit_lens.tasks.collate import encode
from lofit_lens.tasks.statements import statements
from lofit_lens.training import patching
from lofit_lens.training.selectors import (
    SELECTORS,
    attribution_scores,
    bias_scores,
    patching_scores,
    probe_scores,
    probing_layers,
    random_scores,
)
from tests.adapters import output_projection
from tests.selecting import DPO, PLACES, SFT, TASKS, answer_log_prob, answers_of, no_hooks, planted_on_class, z_at_end
from tests.test_planted import SHAPE, always_right, planted_of


def quick(name, model, task, **settings):
    return SELECTORS[name](model, task, progress=False, **settings)


# --------------------------------------------------------------------------------------------------- attribution


@pytest.mark.parametrize("architecture", ["llama", "llama-gqa", "gpt2"])
@TASKS
def test_attribution_is_z_times_its_gradient(loaded, hf, backend, architecture, task):
    """mean |sum z . dL/dz|, z and dL/dz at W_O's input by plain Hugging Face and autograd, one example at a time.

    L: -sum log p with the end token; for a pair -log sigmoid(0.7 * (log p(c) - log p(r), minus the same as a constant)).
    """
    model, plain = loaded(architecture, backend), hf(architecture)
    scores = attribution_scores(model, task, n_train=3, seed=1, beta=0.7, progress=False)
    expected = torch.zeros(scores.shape, dtype=torch.float64)
    for e in task.training_examples(n=3, seed=1):
        seen = []

        def keep(module, args, seen=seen):
            args[0].retain_grad()
            seen.append(args[0])

        handles = [output_projection(plain, n).register_forward_pre_hook(keep) for n in range(3)]
        sums = [answer_log_prob(plain, model.tokenizer, e.prompt, a, eos=True) for a in answers_of(e)]
        for handle in handles:
            handle.remove()
        margin = sums[0] - sums[-1]
        loss = -sums[0] if task is SFT else -torch.nn.functional.logsigmoid(0.7 * (margin - margin.detach()))
        loss.backward()
        parts = torch.stack([(z * z.grad).unflatten(-1, (scores.shape[1], -1)).sum(dim=(0, 1, 3)) for z in seen])
        expected += parts.unflatten(0, (-1, 3)).sum(dim=0).abs().double() / 3
    assert torch.allclose(scores.values, expected, rtol=1e-4, atol=1e-6)
    assert expected.max() > 0.005
    plain.zero_grad()


@TASKS
def test_attribution_does_not_depend_on_the_batch_size(llama, task):
    """Answers of one to four tokens, one example at a time, two, and all at once: the same to 1e-5."""
    one, two, eight = (
        attribution_scores(llama, task, n_train=5, batch_size=n, progress=False).values for n in (1, 2, 8)
    )
    assert torch.allclose(one, eight, rtol=1e-5, atol=1e-6)
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_head_whose_examples_pull_both_ways_counts(llama):
    """The absolute value is taken in each example: two examples count as their mean, not as their sum's size."""
    both = attribution_scores(llama, SFT, n_train=2, seed=3, progress=False).values
    drawn = SFT.training_examples(n=2, seed=3)
    singles = []
    for e in drawn:
        task = Task.from_records(
            "one", train=[{"prompt": e.prompt, "answer": e.answer}], test=[{"prompt": "Q", "answer": "A"}]
        )
        singles.append(attribution_scores(llama, task, progress=False).values)
    assert torch.allclose(both, torch.stack(singles).mean(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_attribution_and_bias_norm_rank_exactly_the_planted_heads_first(tmp_path, backend, seed):
    """Where only three heads reach the answer, the others have no slope, and their v stays at its start."""
    model, planted = planted_on_class(tmp_path, seed, backend), planted_of(seed)
    config = TrainConfig(lr=5e-2, epochs=2, batch_size=8)
    for scores in (
        attribution_scores(model, always_right(), progress=False),
        bias_scores(model, always_right(), config=config, progress=False),
    ):
        assert set(scores.top(3)) == set(planted)
        assert min(scores[h] for h in planted) > 10 * max(scores[h] for h in HeadSet.all(SHAPE) - planted)


# ------------------------------------------------------------------------------------------------ probes of layers


@torch.no_grad()
def test_probing_layers_takes_whole_layers_by_one_probe_each(loaded, hf, backend):
    """Layers by scikit-learn's accuracy on all heads' z side by side (plain Hugging Face), heads within by their own."""
    model, plain = loaded("llama-gqa", backend), hf("llama-gqa")
    rows = [
        {"prompt": f"Q: {a} {b}? A:", "chosen": " yes" if i % 3 else " Rome", "rejected": " no" if i % 4 else " Ann"}
        for i, (a, b) in enumerate(itertools.permutations(PLACES[:7], 2))
    ]
    task = Task.from_records("probed", train=rows[:20], val=rows[20:], test=rows)
    scores = probing_layers(model, task, n_train=20, seed=3, progress=False)
    listed = [
        (s, fit) for part, fit in (("train", True), ("val", False)) for s in statements(task, part, n=None, seed=3)
    ]
    z = torch.stack([z_at_end(plain, encode(model.tokenizer, s.prompt + s.answer)) for s, _ in listed]).double().numpy()
    right, fitting = np.array([s.right for s, _ in listed]), np.array([fit for _, fit in listed])
    accuracy = [
        LogisticRegression(max_iter=1000, random_state=3)
        .fit(z[fitting, n], right[fitting])
        .score(z[~fitting, n], right[~fitting])
        for n in range(3)
    ]
    assert len(set(accuracy)) == 3, "layers that tie would show nothing"
    assert scores.meta["layer_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    order = np.argsort(accuracy)[::-1]
    assert [h.layer for h in scores.ranking()] == np.repeat(order, 4).tolist()
    own = probe_scores(model, task, n_train=20, seed=3, progress=False)
    for layer in range(3):
        expected = [h.head for h in own.ranking() if h.layer == layer]
        assert [h.head for h in scores.ranking() if h.layer == layer] == expected
    assert len({own[h] for h in HeadSet.all((3, 4))}) > 4


def test_layers_that_tie_keep_their_order_and_stay_whole(bridge_llama, monkeypatch):
    """A layer with the better own heads does not mix into another one of the same accuracy; the top heads fill layers."""
    own = np.array([[0.0, 0.1, 0.2, 0.3], [0.9, 1.0, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0]])
    whole = [0.8, 0.8, 0.9]
    fits = [
        SimpleNamespace(accuracy=a, score=a, unconverged=0) for n in range(3) for a in (own[n], np.array([whole[n]]))
    ]
    monkeypatch.setattr(probing.layers, "_each", lambda work, n_jobs: iter(fits))
    scores = probing_layers(bridge_llama, DPO, progress=False)
    assert str(scores.ranking()) == "L2H0 L2H1 L2H2 L2H3 L0H3 L0H2 L0H1 L0H0 L1H1 L1H3 L1H0 L1H2"
    assert scores.meta["layer_accuracy"] == whole


# -------------------------------------------------------------------------------------------------------- random


def test_random_scores_are_an_even_draw(bridge_llama, monkeypatch):
    """Over 240 seeds each of 12 heads is among three as often as any other: 60 times, give or take 4 deviations of 6.7."""
    monkeypatch.setattr(io, "environment", dict)  # looks up installed versions each time
    drawn = [random_scores(bridge_llama, SFT, seed=s).top(3) for s in range(240)]
    counts = [sum(h in d for d in drawn) for h in HeadSet.all((3, 4))]
    assert all(abs(n - 60) < 27 for n in counts)
    assert len({str(d) for d in drawn}) > 180


def test_random_scores_are_the_same_everywhere(bridge_llama):
    """The draw of seed 42, written down."""
    scores = random_scores(bridge_llama, SFT)
    assert str(scores.ranking()) == "L1H3 L1H1 L0H2 L2H0 L2H1 L1H2 L2H3 L0H3 L1H0 L0H0 L0H1 L2H2"
    assert sorted(scores.values.flatten().tolist()) == list(range(1, 13))


# --------------------------------------------------------------------------------------------- what all have in common


ONE_STEP = TrainConfig(lr=1e-2, max_steps=1)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_feeds_offset_tuning(llama, name):
    """Scores of every head, with their record; the same bit for bit again; the best two heads learn; the model is as it was."""
    settings = {"config": ONE_STEP} if name in ("A-norm", "bias norm") else {}
    before = {n: p.requires_grad for n, p in llama.named_parameters()}
    scores, again = (quick(name, llama, DPO, seed=7, n_train=5, **settings) for _ in range(2))
    assert scores.shape == (3, 4)
    assert torch.equal(scores.values, again.values)
    assert (scores.kind, scores.task) == (name, "pairs")
    assert scores.model == ll.model_info(llama).name
    assert scores.meta["seed"] == 7
    fitted = {"random": 0, "probe accuracy": 4, "probing layers": 4}  # these hold one row out
    assert scores.meta["n_train"] == fitted.get(name, 5)
    assert scores.meta["data_hash"] == DPO.data_hash
    assert scores.meta["model"] == ll.model_info(llama).to_dict()
    assert scores.meta["versions"]["torch"] == torch.__version__
    lofit = ll.tune_offsets(llama, DPO, scores.top(2), config=ONE_STEP, progress=False)
    assert all(bool(lofit.v[h].any()) for h in scores.top(2))
    assert {n: p.requires_grad for n, p in llama.named_parameters()} == before
    assert no_hooks(llama)


@pytest.mark.parametrize("name", ["gradient attribution", "activation patching"])
def test_the_model_is_as_it_was_after_an_exception(checkpoint, backend, monkeypatch, name):
    """Trainable parameters, training mode and hooks, when the work stops half-way."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    model.requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.train()
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("stopped")
        return kept(*args, **kwargs)

    where, what = (torch.autograd, "grad") if "grad" in name else (patching, "peek")
    kept = getattr(where, what)
    monkeypatch.setattr(where, what, fails)
    with pytest.raises(RuntimeError, match="stopped"):
        quick(name, model, SFT, batch_size=2)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(m.training for m in model.modules())
    assert no_hooks(model)


@pytest.mark.parametrize("name", ["gradient attribution", "activation patching"])
def test_scores_are_those_of_the_model_in_eval_mode(checkpoint, name):
    """GPT-2 has dropout, which the bridge turns on in training mode: scores know nothing of it."""
    model = load_model(checkpoint("gpt2"), backend="bridge", device="cpu")
    expected = quick(name, model, SFT, n_train=3).values
    model.train()
    assert torch.equal(quick(name, model, SFT, n_train=3).values, expected)


def test_wrong_numbers_are_named(bridge_llama):
    """Each names what was given and what is allowed."""
    for settings, allowed in (
        ({"batch_size": 0}, "give 1"), ({"beta": 0.0}, "it must be"), ({"beta": float("nan")}, "give a finite number")
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"{next(iter(settings))} is .*; {allowed}"):
            attribution_scores(bridge_llama, SFT, progress=False, **settings)
    for settings in ({"batch_size": 0}, {"n_prompts": 0}, {"n_shots": 0}):
        with pytest.raises(InputError, match=rf"{next(iter(settings))} is 0; give 1 or more"):
            patching_scores(bridge_llama, SFT, progress=False, **settings)
