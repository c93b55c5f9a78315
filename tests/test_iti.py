"""ITI's laws: what the shift is and where, that it flips planted answers, comes and goes without a trace, and lasts in files."""

import contextlib
import logging

import pytest
import torch

from lofit_lens import HeadSet, Lofit, Task, evaluate, generate
from lofit_lens.errors import InputError
from lofit_lens.evaluation import score_continuations
from lofit_lens.interventions import ITI
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.interventions.iti import shift_z
from lofit_lens.models import hook_z, hooked, load_model, logits_of, model_info, prefill, run_through, step
from lofit_lens.probing import fit_probes
from tests import planted_truth, slow, tiny
from tests.adapters import CHOSEN, edited
from tests.conftest import PAIRS, needs_hooked
from tests.shift import decoded, edited_at, places
from tests.test_hook_access import processed_gpt2

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
FRONT = "Q: Imagine that the capital of France is Rome. What is "
PROMPTS = [FRONT + p for p in ("the capital of the country where Ann was born? A:", "it? A:", "")]
ANSWERS = [[" Rome", " I have"], [" mother aunt uncle", " a"], ["x y"]]
NAMES = ("answer", "second", "predicting", "last", "all")


@torch.no_grad()
def run(model):
    return logits_of(model, TOKENS, MASK)


def numbers(k, d_head, seed=0):
    """Unit directions and spreads."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(k, d_head, generator=generator), dim=1)
    return {"directions": directions, "sigma": 0.1 + 0.2 * torch.rand(k, generator=generator)}


def random_iti(model, heads=CHOSEN, *, d_head=None, alpha=5.0, positions="all", seed=0):
    info = model_info(model)
    d_head = Lofit.for_model(model).d_head if d_head is None else d_head
    shape = (info.n_layers, info.n_heads, d_head)
    made = numbers(len(heads), d_head, seed)
    return ITI(shape, heads, **made, alpha=alpha, positions=positions, meta=AdapterMeta(info))


def as_offsets(iti):
    """The same shift as offsets v = alpha * sigma * d, which `edited` and `edited_at` put on plain Hugging Face."""
    lofit = Lofit(iti.shape, iti.heads)
    with torch.no_grad():
        for i, head in enumerate(iti.heads):
            lofit.v[head] = iti.alpha * iti.sigma[i] * iti.directions[i]
    return lofit


def small(alpha=2.0, **changes):
    """An adapter of a model of 3 layers of 4 heads of d_head 8, that does not exist."""
    return ITI((3, 4, 8), changes.pop("heads", CHOSEN), **{**numbers(3, 8), "alpha": alpha, **changes})


# -------------------------------------------------------------------------------------------------- the shift


def test_the_shift_by_hand():
    """z = 2 and 3, shift -0.5 and 0: 1.5 and 3, at every position."""
    z = torch.tensor([2.0, 3.0]).reshape(1, 1, 2, 1).repeat(1, 2, 1, 1)
    assert shift_z(z, torch.tensor([[-0.5], [0.0]])).flatten().tolist() == [1.5, 3.0, 1.5, 3.0]


def test_a_layers_shift_is_alpha_sigma_d():
    """alpha 2, sigma 3, d (0, 1): (0, 6) at L1H1; L1H0 has sigma 0.5 and d (1, 0): (1, 0); other heads and layers have none."""
    iti = ITI(
        (2, 3, 2), HeadSet(["L1H1", "L1H0"]), directions=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        sigma=torch.tensor([3.0, 0.5]), alpha=2.0,
    )  # fmt: skip
    assert iti.shift(1).tolist() == [[1.0, 0.0], [0.0, 6.0], [0.0, 0.0]]
    assert not iti.shift(0).any()
    assert iti.with_strength(-2.0).shift(1).tolist() == [[-1.0, 0.0], [0.0, -6.0], [0.0, 0.0]]


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
@torch.no_grad()
def test_a_hooked_run_is_plain_hugging_face_with_the_shift_at_w_o(loaded, hf, architecture, on):
    """At all positions, heads not in order of layers: logits of plain Hugging Face with alpha sigma d added at W_O's input."""
    model, plain = loaded(architecture, on), hf(architecture)
    iti = random_iti(model)
    with iti.attached(model):
        got = run(model)
    with edited(plain, as_offsets(iti)):
        expected = plain(TOKENS).logits
    assert (got - expected).abs().max() < 1e-5
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05  # the shift is worth comparing


def same_bits(one, other):
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("positions", NAMES)
def test_alpha_0_is_bit_equal(llama, positions):
    """Nothing changes, neither logits nor scores of answers; alpha 5 changes both where it can."""
    before, scores = run(llama), score_continuations(llama, PROMPTS[:2], ANSWERS[:2])
    for alpha in (0.0, 5.0):
        with random_iti(llama, alpha=alpha, positions=positions).attached(llama):
            assert same_bits(run(llama), before) == (alpha == 0)
            same = score_continuations(llama, PROMPTS[:2], ANSWERS[:2]) == scores
            assert same == (alpha == 0 or positions == "last")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_alpha_0_is_bit_equal_over_half_precision(checkpoint, backend, dtype):
    """The same with a float32 adapter on a base of 16 bits, whose z keeps its type; alpha 5 shows."""
    model = load_model(checkpoint("llama"), backend=backend, dtype=dtype, device="cpu")
    before = run(model)
    for alpha in (0.0, 5.0):
        with random_iti(model, d_head=8, alpha=alpha).attached(model):
            assert same_bits(run(model), before) == (alpha == 0)


def test_a_negative_zero_stays_one():
    """-0.0 + 0.0 would be +0.0: entries without a shift keep every bit, and so do all at alpha 0."""
    z = torch.tensor([-0.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    assert torch.signbit(shift_z(z, torch.tensor([[0.0, 0.0, 1.0]]))).flatten().tolist() == [True, False, False]
    assert torch.signbit(shift_z(z, torch.zeros(1, 3))).flatten().tolist() == [True, False, False]


def test_the_sum_over_half_precision_is_rounded_once():
    """z = 1 and shift 1/256 + 1/1024 in bfloat16, whose step above 1 is 1/128: the sum is nearer to 1 + 1/128 than to 1.

    Rounded first, the shift would be the same; added at half weight twice it would vanish. The sum keeps z's type.
    """
    z = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    out = shift_z(
        z, torch.tensor([[1 / 256 + 2**-20]])
    )  # in bfloat16 the shift itself is 1/256, a tie that goes to even: 1
    assert out.dtype == torch.bfloat16
    assert out.item() == 1 + 1 / 128
    assert (z + torch.tensor(1 / 256 + 2**-20).bfloat16()).item() == 1


# ------------------------------------------------------------------------------------------- coming and going


def test_nothing_is_trained_and_nothing_is_kept(llama):
    """No parameter; after a pass in inference mode a loss through the shift still has gradients."""
    iti, offsets = random_iti(llama), Lofit.for_model(llama, CHOSEN).init_("v", seed=1).train_only("v")
    assert list(iti.parameters()) == []
    assert set(iti.state_dict()) == {"directions", "sigma"}
    with iti.attached(llama), offsets.attached(llama):
        with torch.inference_mode():
            run(llama)
        logits_of(llama, TOKENS, MASK).logsumexp(-1).sum().backward()
    assert all(offsets.v.grad[h].abs().sum() > 0 for h in CHOSEN)


def test_other_heads_and_layers_keep_their_z_in_the_edited_layer(llama):
    """L0H3 alone is shifted: the other heads of layer 0 hold the same bits, L0H3 the shift."""
    iti, seen = random_iti(llama, HeadSet(["L0H3"])), []
    with torch.no_grad():
        for block in (contextlib.nullcontext(), iti.attached(llama)):
            keep = lambda z, hook: seen.append(z.clone())
            with block, hooked(hook_z(llama, 0), keep):
                run_through(llama, TOKENS, MASK)
    before, after = seen
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert torch.allclose(after[:, :, 3] - before[:, :, 3], 5 * iti.sigma[0] * iti.directions[0], atol=1e-6)


@needs_hooked
def test_folded_value_biases_change_nothing_for_a_shift(loaded):
    """Processing moves z by a constant: the shift gives the unprocessed model's log-probs."""
    model, plain = processed_gpt2(loaded, fold_ln=True), loaded("gpt2", "hooked")
    iti = random_iti(plain)
    with iti.attached(plain):
        expected = run(plain).log_softmax(-1)
    iti.meta.model = model_info(model)
    with iti.attached(model):
        assert torch.allclose(run(model).log_softmax(-1), expected, atol=1e-4)


def test_another_strength_or_other_positions_are_a_copy(llama):
    """The original keeps its own, provenance goes along, and a copy of an attached one can be attached beside it."""
    iti = random_iti(llama)
    strong, last = iti.with_strength(15), iti.with_positions("last")
    assert (iti.alpha, strong.alpha, last.alpha) == (5.0, 15.0, 5.0)
    assert (str(iti.positions), str(strong.positions), str(last.positions)) == ("all", "all", "last")
    assert strong.meta == iti.meta
    assert torch.allclose(strong.shift(2), 3 * iti.shift(2))
    with iti.attached(llama):
        once = run(llama)
        with iti.with_strength(5.0).attached(llama):
            twice = run(llama)
    with iti.with_strength(10.0).attached(llama):
        assert torch.allclose(run(llama), twice, atol=1e-5)
    assert not torch.allclose(once, twice, atol=1e-3)
    strong.directions.zero_()
    assert iti.directions.any()


# --------------------------------------------------------------------------------------------- where it acts


@torch.no_grad()
def slow_scores(plain, iti, name):
    """One answer at a time: one full forward with the shift at places worked out by hand."""
    found, offsets = [], as_offsets(iti)
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        found.append([])
        for answer in answers:
            whole, start = slow.joined_ids(tiny.tokenizer(), prompt, answer)
            with edited_at(plain, offsets, places(name, start, len(whole))):
                log_probs = slow.log_probs(plain, whole)
            found[-1].append(sum(log_probs[i - 1, whole[i]].item() for i in range(start, len(whole))))
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", NAMES)
def test_scores_are_those_of_the_slow_loop(loaded, hf, backend, architecture, positions):
    """Ragged prompts behind a shared front, answers of 1 to 4 tokens."""
    model = loaded(architecture, backend)
    iti = random_iti(model, positions=positions)
    with iti.attached(model):
        found = score_continuations(model, PROMPTS, ANSWERS)
    expected = slow_scores(hf(architecture), iti, positions)
    assert all(f == pytest.approx(e, abs=1e-4) for f, e in zip(found, expected, strict=True))
    bare = slow.scores(hf(architecture), tiny.tokenizer(), PROMPTS, ANSWERS)
    moved = [[abs(e - b) > 1e-4 for e, b in zip(*pair, strict=True)] for pair in zip(expected, bare, strict=True)]
    reached = {
        "answer": [[False, True], [True, False], [True]], "second": [[False, True], [True, False], [True]],
        "last": [[False, False], [False, False], [False]],
    }.get(positions, [[True, True], [True, True], [True]])  # fmt: skip
    assert moved == reached  # an answer of one token has no token of its own to be predicted from


@torch.no_grad()
def slow_ids(plain, iti, name, prompt, n):
    """Greedy ids, each from a full forward without a cache, shifted at all places that were shifted when they were new."""
    ids = slow.ids_of(tiny.tokenizer(), prompt)
    new, offsets = [], as_offsets(iti)
    for _ in range(n):
        with edited_at(plain, offsets, decoded(name, len(ids), len(ids) + len(new))):
            token = int(slow.log_probs(plain, ids + new)[-1].argmax())
        if token == tiny.tokenizer().eos_token_id:
            break
        new.append(token)
    return new


@pytest.fixture(scope="module")
def slow_texts(hf):
    """(adapter, positions; None: the bare model) -> the slow loop's ids; each is worked out once for both classes."""
    made = {}

    def of(iti, name):
        if name not in made:
            plain = hf("llama")
            made[name] = [
                slow_ids(plain, iti, name, p, 4) if name else slow.new_ids(plain, tiny.tokenizer(), p, 4)
                for p in PROMPTS
            ]
        return made[name]

    return of


@pytest.mark.parametrize("positions", NAMES)
def test_generated_text_is_that_of_the_slow_loop(llama, slow_texts, positions):
    """Ragged prompts decoded together with a cache; from the prompt's last token on, unless everything is shifted."""
    iti, tokenizer = random_iti(llama, alpha=20.0, positions=positions), tiny.tokenizer()
    with iti.attached(llama):
        found = generate(llama, PROMPTS, max_new_tokens=4)
    expected = slow_texts(iti, positions)
    assert found == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert expected != slow_texts(iti, None)
    assert (expected == slow_texts(iti, "all")) == (positions == "all")


def test_steps_with_a_cache_shift_each_new_token_once(llama):
    """Without borders (plain text) an edit of the answer acts on every token: prefill and steps are one full pass."""
    with random_iti(llama, positions="answer").attached(llama), torch.no_grad():
        whole = run(llama)
        first, state = prefill(llama, TOKENS[:, :9], MASK[:, :9])
        last, _ = step(llama, state, TOKENS[:, 9])
    assert torch.allclose(torch.cat([first, last[:, None]], dim=1), whole, atol=1e-5)


def test_an_edit_of_the_last_position_leaves_multiple_choice_as_it_is_and_says_so(llama, caplog):
    """The newest public code's mode: no score changes, the log warns, the result counts every answer; "predicting" is silent."""
    rows = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p, c, r in zip(PROMPTS, (" Rome is", " Ann", "x y"), (" I have", " a b", " cde f"), strict=True)
    ]
    task = Task.from_records("ends", train=rows, test=rows)
    bare = evaluate(llama, task, progress=False)
    scores = ["score_best", "scores_true", "scores_false"]
    with caplog.at_level(logging.WARNING), random_iti(llama, positions="last").attached(llama):
        last = evaluate(llama, task, progress=False)
    assert last.items[scores].equals(bare.items[scores])
    assert last.counted["answers that the edit cannot reach"] == 6
    assert "6 of 6 answers keep the unmodified model's score" in caplog.text
    assert "use positions 'predicting' or 'all'" in caplog.text
    caplog.clear()
    # " Ann" is one token; from the second on, answers of two (" a b", "x y") are out of reach as well.
    for positions, unreached in (("answer", 1), ("second", 3), ("predicting", 0), ("all", 0)):
        with random_iti(llama, positions=positions).attached(llama):
            found = evaluate(llama, task, progress=False)
        assert found.counted.get("answers that the edit cannot reach", 0) == unreached
        assert not found.items[scores].equals(bare.items[scores])
        assert ("unmodified" in caplog.text) == bool(unreached)
        caplog.clear()


# ---------------------------------------------------------------------------------------------- planted truth


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory):
    return planted_truth.save(tmp_path_factory.mktemp("planted") / "model")


def test_the_shift_flips_planted_answers(planted_folder, backend):
    """The model prefers the false answer of all 33 unseen rows. Shifted by 5 sigma towards true it prefers every true one.

    Shifted the other way, by nothing, or along a random direction, it does not; from the answer's one token on, it cannot.
    """
    model, task = load_model(planted_folder, backend=backend, device="cpu"), planted_truth.task()
    with planted_truth.planted(model):
        probes = fit_probes(model, task, progress=False)

        def right(alpha, positions="predicting", direction="mass_mean"):
            iti = probes.iti(2, alpha=alpha, positions=positions, direction=direction)
            with iti.attached(model):
                return evaluate(model, task, progress=False).metrics["mc1"].mean

        assert evaluate(model, task, progress=False).metrics["mc1"].mean == 0.0
        assert right(5.0) == right(5.0, "all") == right(5.0, direction="probe") == 1.0
        assert right(0.0) == right(-5.0) == right(5.0, "answer") == right(5.0, "last") == 0.0
        assert evaluate(model, task, progress=False).metrics["mc1"].mean == 0.0


# ----------------------------------------------------------------------------------------------------- files


def test_llama_2_7b_has_the_count():
    """48 heads of d_head 128: 6,144 estimated numbers."""
    heads = HeadSet.random((32, 32), 48, seed=0)
    assert ITI((32, 32, 128), heads, **numbers(48, 128)).n_parameters == 6144


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: small(float("nan")), "alpha is nan"), (lambda: small(float("inf")), "alpha is inf"),
     (lambda: small().with_strength(float("-inf")), "alpha is -inf"), (lambda: small().with_positions("first"), "positions"),
     (lambda: small(positions="first"), "positions"), (lambda: small(heads=HeadSet([])), "ITI needs at least one head"),
     (lambda: small(heads=HeadSet(["L3H0", "L0H0", "L1H0"])), "L3H0"),
     (lambda: small(heads=HeadSet(["L0H0"])), r"1 heads .*\(3, 8\).*\(3,\)"),
     (lambda: small(heads=HeadSet(CHOSEN.heads, shape=(32, 32))), "32 layers x 32 heads"),
     (lambda: small(directions=numbers(3, 9)["directions"]), r"\(3, 9\)"), (lambda: small(sigma=torch.ones(2)), r"\(2,\)"),
     (lambda: small(directions=2 * numbers(3, 8)["directions"]), "L2H1 has norm 2"),
     (lambda: small(directions=numbers(3, 8)["directions"] * float("nan")), "norm nan"),
     (lambda: small(sigma=torch.tensor([1.0, -1.0, 1.0])), "sigma of head L0H3 is -1"),
     (lambda: small(sigma=torch.tensor([1.0, 1.0, float("inf")])), "sigma of head L2H0 is inf")],
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(make, message):
    """Strength, positions, heads, shapes, norms and spreads."""
    with pytest.raises(InputError, match=message):
        make()


def test_a_head_without_a_direction_is_not_shifted():
    """Zero is no direction: taken as it is."""
    directions = numbers(3, 8)["directions"]
    directions[1] = 0
    assert not small(directions=directions).shift(0).any()
    assert small(directions=directions).shift(2)[:2].any(dim=1).all()
