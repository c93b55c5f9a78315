"""Head selectors: each is the number that it says, finds planted heads, and leaves the model as it was."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import lofit_lens as ll
from lofit_lens import HeadScores, HeadSet, Task, TrainConfig, probing
from lofit_lens.errors import DataError, InputError
from lofit_lens.models import hook_z, load_model
from lofit_lens.tasks.base import PairExample, SFTExample
from lofit_lens.tasks.collate import encode
from lofit_lens.tasks.statements import statements
from lofit_lens.training import patching
from lofit_lens.training.patching import few_shot_prompts, patch_effects, replace_head
from lofit_lens.training.selectors import (
    SELECTORS,
    attribution_scores,
    bias_scores,
    patching_scores,
    probe_scores,
    probing_layers,
    random_scores,
)
from tests import tiny
from tests.adapters import output_projection
from tests.test_planted import D_HEAD, DECIDE, RIGHT, SHAPE, always_right, planted_model, planted_of

PLACES = ("France", "Rome", "Ann", "Bob", "Eve", "a book", "the author", "an uncle")
ANSWERS = (" of", " the capital", " a sister in law", " Rome")
SFT = Task.from_records(
    "plain",
    train=[{"prompt": f"Q: where is {p}? A:", "answer": ANSWERS[i % 4]} for i, p in enumerate(PLACES)],
    test=[{"prompt": "Q: who? A:", "answer": " Ann"}],
)
DPO = Task.from_records(
    "pairs",
    train=[
        {"prompt": f"Q: where is {p}? A:", "chosen": ANSWERS[i % 4], "rejected": ANSWERS[(i + 1 + i // 4) % 4]}
        for i, p in enumerate(PLACES)
    ],
    test=[{"prompt": "Q: who? A:", "chosen": " Ann", "rejected": " Bob"}],
)
TASKS = pytest.mark.parametrize("task", [SFT, DPO], ids=["sft", "dpo"])


def quick(name, model, task, **settings):
    return SELECTORS[name](model, task, progress=False, **settings)


def answer_log_prob(plain, tokenizer, prompt, answer, *, eos):
    """Summed log-prob by plain Hugging Face; `tokenizer` must not merge across the border."""
    front, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    assert whole[: len(front)] == front
    ids = torch.tensor([whole + ([tokenizer.eos_token_id] if eos else [])])
    values = plain(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return values[len(front) - 1 :].sum()


def answers_of(example):
    return [example.answer] if isinstance(example, SFTExample) else [example.chosen, example.rejected]


def no_hooks(model):
    return not any(p.fwd_hooks or p._forward_hooks for p in model.hook_dict.values())


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
    """Answers of one to four tokens, one example at a time, three, and all at once: the same to 1e-5."""
    one, three, eight = (attribution_scores(llama, task, batch_size=n, progress=False).values for n in (1, 3, 8))
    assert torch.allclose(one, eight, rtol=1e-5, atol=1e-6)
    assert torch.allclose(one, three, rtol=1e-5, atol=1e-6)


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


def test_attribution_on_a_half_precision_base(checkpoint, backend):
    """bfloat16 gives float32's scores roughly."""
    exact, rough = (
        attribution_scores(load_model(checkpoint("llama"), backend=backend, dtype=d, device="cpu"), SFT, progress=False)
        for d in ("float32", "bfloat16")
    )
    assert torch.corrcoef(torch.stack([exact.values.flatten(), rough.values.flatten()]))[0, 1] > 0.95


# ------------------------------------------------------------------------------------------------------ patching


def z_at_end(plain, ids, at=-1):
    """z of all heads at one position, `[n_layers, n_heads * d_head]`, by pre-hooks on W_O of plain Hugging Face."""
    seen, n = [], plain.config.num_hidden_layers
    handles = [
        output_projection(plain, i).register_forward_pre_hook(lambda m, args: seen.append(args[0][0, at].clone()))
        for i in range(n)
    ]
    plain(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


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
    newline = encode(bridge_llama.tokenizer, "\n")[1:]
    for long, short in zip(donors, shorter, strict=True):
        text, kept = (bridge_llama.tokenizer.decode(ids).split("\n") for ids in (long, short))
        assert kept == [*text[:2], text[3]]
    assert len(newline) == 1
    monkeypatch.setattr(patching, "context_length", lambda model: max(map(len, shorter)))
    assert set(made()[1]) == {2, 3} or set(made()[1]) == {2}
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


@torch.no_grad()
def test_patch_effects_by_hand(llama):
    """The outcome is the sum of layer 2's z of a row, and a patch adds 1 to a head: d_head for layer 2, per row."""
    tokens = torch.randint(3, 400, (2, 5), generator=torch.Generator().manual_seed(0))
    held = []

    def measure():
        with ll.models.hooked(hook_z(llama, 2), lambda z, hook: held.append(z)):
            llama(tokens, attention_mask=torch.ones_like(tokens))
        return held[-1].sum(dim=(1, 2, 3))

    def plus_one(head):
        asked.append(head)
        return lambda z, hook: (
            z + (torch.arange(4) == head.head)[:, None] * torch.tensor([1.0, 2.0])[:, None, None, None]
        )

    asked = []
    effects = patch_effects(llama, measure, patch=plus_one, progress=False)
    assert effects.shape == (3, 4, 2)
    assert asked == list(HeadSet.all((3, 4)))
    assert torch.allclose(
        effects[2], torch.tensor([[40.0, 80.0]]).double().expand(4, 2), atol=1e-4
    )  # 5 positions * 8 * 1
    assert not torch.allclose(effects[0], effects[0, :1].expand(4, 2), atol=1e-4)
    assert no_hooks(llama)


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


# ------------------------------------------------------------------------------------------------- planted truth


@pytest.fixture(scope="module")
def planted_on(tmp_path_factory):
    """(seed, class, change) -> the planted model of test_planted, changed, through a checkpoint."""

    def load(seed, backend, change=lambda plain, planted: None):
        folder, plain = tmp_path_factory.mktemp("planted"), planted_model(planted_of(seed), seed)
        with torch.no_grad():
            change(plain, planted_of(seed))
        plain.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        return load_model(folder, backend=backend, device="cpu")

    return load


@pytest.mark.parametrize("seed", range(2))
def test_attribution_and_bias_norm_rank_exactly_the_planted_heads_first(planted_on, backend, seed):
    """Where only three heads reach the answer, the others have no slope, and their v stays at its start."""
    model, planted = planted_on(seed, backend), planted_of(seed)
    config = TrainConfig(lr=5e-2, epochs=2, batch_size=8)
    for scores in (
        attribution_scores(model, always_right(), progress=False),
        bias_scores(model, always_right(), config=config, progress=False),
    ):
        assert set(scores.top(3)) == set(planted)
        assert min(scores[h] for h in planted) > 10 * max(scores[h] for h in HeadSet.all(SHAPE) - planted)


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
def test_patching_ranks_exactly_the_planted_heads_first(planted_on, backend, seed):
    """Heads that carry what solved examples say raise the right answer; no other head's z does anything."""
    model, planted = planted_on(seed, backend, reading_the_answer), planted_of(seed)
    scores = patching_scores(model, always_right(), n_prompts=3, n_shots=3, seed=seed, progress=False)
    assert set(scores.top(3)) == set(planted)
    assert min(scores[h] for h in planted) > 0.005
    assert all(abs(scores[h]) < 1e-5 for h in HeadSet.all(SHAPE) - planted)


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
    scores, again = (quick(name, llama, DPO, seed=7, **settings) for _ in range(2))
    assert scores.shape == (3, 4)
    assert torch.equal(scores.values, again.values)
    assert (scores.kind, scores.task) == (name, "pairs")
    assert scores.model == ll.model_info(llama).name
    assert scores.meta["seed"] == 7
    assert scores.meta["n_train"] == {"random": 0, "probe accuracy": 7, "probing layers": 7}.get(
        name, 8
    )  # one held out
    assert scores.meta["data_hash"] == DPO.data_hash
    assert scores.meta["model"] == ll.model_info(llama).to_dict()
    assert scores.meta["versions"]["torch"] == torch.__version__
    lofit = ll.tune_offsets(llama, DPO, scores.top(2), config=ONE_STEP, progress=False)
    assert all(bool(lofit.v[h].any()) for h in scores.top(2))
    assert {n: p.requires_grad for n, p in llama.named_parameters()} == before
    assert no_hooks(llama)


def test_scores_survive_a_file(bridge_llama, tmp_path):
    """What stands in meta is JSON-able."""
    for name in ("gradient attribution", "activation patching", "random"):
        scores = quick(name, bridge_llama, SFT)
        kept = HeadScores.load(scores.save(tmp_path / f"{name}.json"))
        assert torch.equal(kept.values, scores.values)
        assert kept.meta == scores.meta


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
def test_a_bar_can_be_seen_or_not(bridge_llama, capsys, name):
    """progress=False is silent; True shows a bar."""
    quick(name, bridge_llama, SFT, n_train=3)
    assert capsys.readouterr().err == ""
    SELECTORS[name](bridge_llama, SFT, n_train=3)
    assert "%" in capsys.readouterr().err


def test_wrong_numbers_are_named(bridge_llama):
    """Each names what was given and what is allowed."""
    for settings in ({"batch_size": 0}, {"beta": 0.0}, {"beta": float("nan")}):
        with pytest.raises(InputError, match=rf"{next(iter(settings))} is .*; it must be"):
            attribution_scores(bridge_llama, SFT, progress=False, **settings)
    for settings in ({"batch_size": 0}, {"n_prompts": 0}, {"n_shots": 0}):
        with pytest.raises(InputError, match=rf"{next(iter(settings))} is 0; it must be 1 or above"):
            patching_scores(bridge_llama, SFT, progress=False, **settings)


def test_a_row_without_room_is_named(bridge_llama, monkeypatch):
    """Measured rows must fit the context, and have a token before the prompt's last one."""
    rows = patching.answer_rows(bridge_llama.tokenizer, PairExample("Ann:", " Bob", " Eve"))
    assert len(rows) == 2
    with pytest.raises(DataError, match="row 1 has a prompt of one token"):
        patching.AnswerLogProbs(bridge_llama, [rows[0], patching.Encoded(rows[0].ids, 1)])
    monkeypatch.setattr(patching, "context_length", lambda model: 3)
    with pytest.raises(DataError, match=r"row 0 has \d+ tokens; the context of .* is 3"):
        patching.AnswerLogProbs(bridge_llama, rows)
