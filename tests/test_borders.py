"""Edits of certain positions: scores, generated text and damage equal slow loops with the edit at places given by hand."""

import contextlib
import itertools
import logging

import pytest
import torch

import lofit_lens as ll
from lofit_lens import Task, attached
from lofit_lens.evaluation import generate, generation, score_continuations
from lofit_lens.models import (
    Positions,
    gaps_are_exact,
    logits_of,
    positions_of,
    running,
)
from lofit_lens.tasks.collate import encode_continuations
from tests import slow, tiny
from tests.adapters import random_adapter
from tests.conftest import PAIRS
from tests.shift import POSITIONS, MLPShift, decoded, edited_at, places, shift_of

# A front of 22 tokens with BOS, then prompts of 17, 4 and 0 tokens of their own; answers of 1 to 4 tokens.
FRONT = "Q: Imagine that the capital of France is Rome. What is "
PROMPTS = [FRONT + p for p in ("the capital of the country where Ann was born? A:", "it? A:", "")]
ANSWERS = [[" Rome", " I have"], [" mother aunt uncle", " a"], ["x y"]]


def z_edit(model, positions):
    """A LoFiT adapter at certain positions."""
    lofit = random_adapter(model)
    lofit.positions = Positions.parse(positions)
    return lofit


KINDS = {"z": z_edit, "stream": shift_of, "mlp": lambda model, name: shift_of(model, name, kind=MLPShift, seed=1)}


@torch.no_grad()
def slow_score(plain, prompt, answer, edits):
    """One full forward; each edit is a pair of adapter and name, its places worked out from the joined ids."""
    whole, start = slow.joined_ids(tiny.tokenizer(), prompt, answer)
    with contextlib.ExitStack() as stack:
        for adapter, name in edits:
            stack.enter_context(edited_at(plain, adapter, places(name, start, len(whole))))
        found = slow.log_probs(plain, whole)
    return sum(found[i - 1, whole[i]].item() for i in range(start, len(whole)))


def slow_scores(plain, prompts, answers, *edits):
    return [
        torch.tensor([slow_score(plain, p, a, edits) for a in listed])
        for p, listed in zip(prompts, answers, strict=True)
    ]


def difference(found, expected):
    """Largest difference of two lists of lists of scores, in nats."""
    assert [len(f) for f in found] == [len(e) for e in expected]
    return max((torch.as_tensor(f) - torch.as_tensor(e)).abs().max() for f, e in zip(found, expected, strict=True))


@pytest.fixture
def passes(monkeypatch):
    """Every cached pass from here on, as (whether it starts from nothing, real tokens it runs)."""
    ran, run = [], running._run

    def spy(model, state, tokens, mask, borders, **kwargs):
        ran.append((state is None, int(mask.sum())))
        return run(model, state, tokens, mask, borders, **kwargs)

    monkeypatch.setattr(running, "_run", spy)
    return ran


# ------------------------------------------------------------------------------------------------------- scores


MOST = ("answer", "predicting", "f3+l2", "f2+l9")
MAIN = ("llama-gqa", "gpt2", "pythia", "gemma")  # most positions for these, all for Llama, some for others
OTHER_SITES = [("z", "answer"), ("z", "f2+l9"), ("mlp", "f3+l2")]
SOME = [("stream", "f2+l9"), ("z", "predicting"), ("mlp", "f3+l2")]


def edits_on(architecture):
    """(where in the model, positions) to try on an architecture."""
    if architecture not in ("llama", *MAIN):
        return SOME
    return [*(("stream", name) for name in (POSITIONS if architecture == "llama" else MOST)), *OTHER_SITES]


@pytest.fixture(scope="module")
def expected_scores(hf):
    """(architecture, kind, name, adapter) -> the slow loop's scores; both classes' adapters have the same numbers."""
    made = {}

    def scores_of(architecture, kind="", name="", adapter=None):
        if (architecture, kind, name) not in made:
            edits = [(adapter, name)] if adapter else []
            made[architecture, kind, name] = slow_scores(hf(architecture), PROMPTS, ANSWERS, *edits)
        return made[architecture, kind, name]

    return scores_of


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_scores_are_those_of_the_slow_loop(loaded, expected_scores, architecture, on):
    """Ragged questions behind a shared front, edits of three places in the model at each kind of positions.

    The prompts' own ends are shorter than 9 tokens. Each edit gives scores of its own, and that of the last position the model's.
    """
    model, seen = loaded(architecture, on), [expected_scores(architecture)]
    for kind, name in edits_on(architecture):
        adapter = KINDS[kind](model, name)
        expected = expected_scores(architecture, kind, name, adapter)
        with adapter.attached(model):
            assert difference(score_continuations(model, PROMPTS, ANSWERS), expected) < 1e-4, (kind, name)
        if name == "last":
            assert difference(expected, seen[0]) < 1e-6
        else:
            assert all(difference(expected, other) > 0.005 for other in seen), (kind, name)
            seen.append(expected)


@pytest.mark.parametrize("budget", [1, 70])
@pytest.mark.parametrize("name", ["predicting", "f2+l9"])
def test_budgets_and_the_order_of_questions_change_nothing(llama, hf, name, budget):
    """One sequence a pass, or some; questions turned around."""
    adapter = shift_of(llama, name)
    expected = slow_scores(hf("llama"), PROMPTS, ANSWERS, (adapter, name))
    with adapter.attached(llama):
        assert difference(score_continuations(llama, PROMPTS, ANSWERS, token_budget=budget), expected) < 1e-4
        found = score_continuations(llama, PROMPTS[::-1], ANSWERS[::-1], token_budget=budget)
        assert difference(found[::-1], expected) < 1e-4


@pytest.mark.parametrize("name", ["answer", "predicting", "f2+l9", "f0+l4", "f5+l0"])
@pytest.mark.parametrize("prompts", [["", "Q:"], [PROMPTS[1]] * 3], ids=["bos", "same"])
def test_short_prompts_and_equal_ones(llama, hf, prompts, name):
    """A prompt of BOS alone, one of few tokens, and three times the same one."""
    answers, adapter = [[" Rome is", " a"], [" mother"], ["x y z"]][: len(prompts)], shift_of(llama, name)
    with adapter.attached(llama):
        found = score_continuations(llama, prompts, answers)
    assert difference(found, slow_scores(hf("llama"), prompts, answers, (adapter, name))) < 1e-4


@pytest.mark.parametrize("name", ["all", "answer", "predicting", "f3+l2"])
def test_answers_that_merge_are_edited_from_their_own_start(llama, hf, name):
    """`countr` + `y` is one token, so that answers of one question start at different places: each has its own border."""
    prompts, answers = ["In what countr", "Q: Ann?", "In what countr"], [["y was Ann", " x y", "y"], [" a"], [" x y"]]
    encoded = encode_continuations(tiny.tokenizer(), prompts[0], answers[0])
    assert encoded[0].start == encoded[2].start == encoded[1].start - 3
    adapter = shift_of(llama, name)
    with adapter.attached(llama):
        found = score_continuations(llama, prompts, answers)
    assert difference(found, slow_scores(hf("llama"), prompts, answers, (adapter, name))) < 1e-4
    assert found[0][1] == pytest.approx(found[2][0], abs=1e-5)


def test_two_edits_at_different_positions(llama, hf):
    """A shift from the answer on and a z edit of the prompt's ends: each where it says."""
    one, two = shift_of(llama, "answer"), z_edit(llama, "f3+l2")
    expected = slow_scores(hf("llama"), PROMPTS, ANSWERS, (one, "answer"), (two, "f3+l2"))
    with attached(llama, one, two):
        assert set(map(str, positions_of(llama))) == {"answer", "f3+l2"}
        assert difference(score_continuations(llama, PROMPTS, ANSWERS), expected) < 1e-4
    assert positions_of(llama) == ()


def test_half_precision_keeps_its_type(checkpoint, backend):
    """Over a bfloat16 model an edit of certain positions runs, and shows."""
    model = ll.load_model(checkpoint("llama"), backend=backend, dtype="bfloat16", device="cpu")
    bare = score_continuations(model, PROMPTS, ANSWERS)
    for kind in KINDS.values():
        with kind(model, "predicting").attached(model):
            assert difference(score_continuations(model, PROMPTS, ANSWERS), bare) > 0.05


# ---------------------------------------------------------------------------------------------- what is still shared


@pytest.mark.parametrize(("name", "own"), [("all", 1), ("answer", 1), ("predicting", 1), ("f3+l2", 2), ("f2+l9", 9)])
def test_the_front_runs_once_and_leaves_each_prompt_its_end(llama, passes, name, own):
    """Real tokens run = the front, `own` shorter than the shortest prompt, + each prompt's rest + each answer but its last."""
    gaps_are_exact(llama)
    passes.clear()
    with shift_of(llama, name).attached(llama):
        score_continuations(llama, PROMPTS, ANSWERS)
    lengths = [len(slow.ids_of(tiny.tokenizer(), p)) for p in PROMPTS]
    joined = [len(slow.ids_of(tiny.tokenizer(), p + a)) for p, s in zip(PROMPTS, ANSWERS, strict=True) for a in s]
    labels = sum(joined) - sum(n * len(s) for n, s in zip(lengths, ANSWERS, strict=True))
    front = min(lengths) - own
    assert passes[0] == (True, front)
    assert not any(anew for anew, _ in passes[1:])
    assert sum(n for _, n in passes) == front + sum(n - front for n in lengths) + labels - len(joined)


def test_answers_that_merge_share_their_prompt_unless_positions_count(llama, passes):
    """Passes: the prompts of both questions and their longer answers; at certain positions one prompt more runs in the first."""
    gaps_are_exact(llama)
    ran = {}
    for name in ("all", "answer"):
        passes.clear()
        with shift_of(llama, name).attached(llama):
            score_continuations(llama, ["In what countr", "Q: Ann?"], [["y was Ann", " x y"], [" a"]])
        ran[name] = [n for _, n in passes]
    # <s> In w hat | country was Ann;  <s> In w hat cou nt r | _ x _ y;  <s> Q : Ann ? | a
    assert ran == {"all": [4 + 5, 2 + (3 + 3)], "answer": [4 + 7 + 5, 2 + 3]}


# --------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def slow_steps(plain, prompt, n, adapter, name):
    """A full forward of everything so far for each new token, the edit where passes with a cache have put it.

    Log-probs `[n, d_vocab]` of each step, and the text up to the end token.
    """
    tokenizer, rows = tiny.tokenizer(), []
    ids, new = slow.ids_of(tokenizer, prompt), []
    for _ in range(n):
        with edited_at(plain, adapter, decoded(name, len(ids), len(ids) + len(new))):
            rows.append(slow.log_probs(plain, ids + new)[-1])
        new.append(int(rows[-1].argmax()))
    said = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
    return torch.stack(rows), tokenizer.decode(said, skip_special_tokens=True)


@pytest.fixture
def steps(monkeypatch):
    """Log-probs of the next token after each pass of the decoder from here on."""
    seen = []

    def spied(inner):
        def run(*args):
            logits, state = inner(*args)
            seen.append(logits.float().log_softmax(-1))
            return logits, state

        return run

    for name in ("remember", "step"):
        monkeypatch.setattr(generation, name, spied(getattr(generation, name)))
    return seen


@pytest.mark.parametrize(("architecture", "on"), [p for p in PAIRS if p.values[0] in ("llama", *MAIN)])
def test_generation_is_that_of_the_slow_loop(loaded, hf, steps, architecture, on):
    """Four steps of three prompts behind a shared front: log-probs and texts, and each name's are its own."""
    model, seen = loaded(architecture, on), {}
    prompts = sorted(PROMPTS, key=lambda p: len(slow.ids_of(tiny.tokenizer(), p)))
    for name in POSITIONS if architecture == "llama" else ("answer", "f2+l9"):
        adapter = shift_of(model, name)
        expected = [slow_steps(hf(architecture), p, 4, adapter, name) for p in prompts]
        steps.clear()
        with adapter.attached(model):
            assert generate(model, prompts, max_new_tokens=4) == [text for _, text in expected], name
        seen[name] = torch.stack([rows for rows, _ in expected], dim=1)
        assert torch.allclose(torch.stack(steps), seen[name][: len(steps)], atol=1e-4), name
    for a, b in itertools.combinations(seen, 2):
        alike = {a, b} <= {"answer", "second", "predicting", "last"}
        assert torch.equal(seen[a], seen[b]) if alike else (seen[a] - seen[b]).abs().max() > 0.01


@pytest.mark.parametrize("prompts", [[""], ["Ann", "Q: who?"]], ids=["bos", "no front"])
@pytest.mark.parametrize("name", ["answer", "f2+l9", "f0+l4"])
def test_generation_from_short_prompts(llama, hf, prompts, name):
    """One prompt of BOS alone; two that share nothing, shorter than what is edited of them, one a batch."""
    adapter = shift_of(llama, name)
    with adapter.attached(llama):
        found = generate(llama, prompts, max_new_tokens=3, batch_size=1)
    assert found == [slow_steps(hf("llama"), p, 3, adapter, name)[1] for p in prompts]


# ------------------------------------------------------------------------------------------------ text, and training

TEXTS = ["daughter-in-law granddaughter nephew uncle", "Q: Imagine that the capital of France is Rome."]


@pytest.mark.parametrize("name", POSITIONS)
def test_text_without_borders_has_no_prompt(llama, hf, name):
    """Answer names mean every token; first and last tokens are the text's own; padding on either side changes nothing."""
    ids, adapter = [slow.ids_of(tiny.tokenizer(), t) for t in TEXTS], shift_of(llama, name)
    width = max(map(len, ids))
    meant = "all" if name in ("answer", "second", "predicting") else name
    for side in ("left", "right"):
        tokens, mask = torch.full((2, width), 77), torch.zeros(2, width, dtype=torch.long)
        for i, row in enumerate(ids):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            tokens[i, at], mask[i, at] = torch.tensor(row), 1
        with adapter.attached(llama), torch.no_grad():
            found = logits_of(llama, tokens, mask)
        for i, row in enumerate(ids):
            with edited_at(hf("llama"), adapter, places(meant, len(row), len(row))), torch.no_grad():
                expected = hf("llama")(torch.tensor([row])).logits[0]
            assert torch.allclose(found[i][mask[i].bool()], expected, atol=1e-5)


@pytest.mark.parametrize("name", POSITIONS)
def test_damage_is_measured_on_text(llama, hf, name, caplog):
    """KL is that of plain Hugging Face with the edit at the text's places; for the last token alone 0, and it says so."""
    adapter = shift_of(llama, name, scale=0.2)
    with caplog.at_level(logging.WARNING, logger="lofit_lens"):
        found = ll.damage(llama, adapter, TEXTS, progress=False)
    kl = []
    for text in TEXTS:
        ids = slow.ids_of(tiny.tokenizer(), text)
        base = slow.log_probs(hf("llama"), ids)[:-1]
        at = places("all" if name in ("answer", "second", "predicting") else name, len(ids), len(ids))
        with edited_at(hf("llama"), adapter, at):
            after = slow.log_probs(hf("llama"), ids)[:-1]
        kl.append((base.exp() * (base - after)).sum(-1).mean().item())
    assert found.texts["kl"].tolist() == pytest.approx(kl, abs=1e-5)
    assert (max(kl) < 1e-9) == (name == "last")
    assert found.counted.get("texts that the edit cannot reach", 0) == (2 if name == "last" else 0)
    assert ("its damage is 0" in caplog.text) == (name == "last")


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_training_sees_the_same_borders_as_scoring(llama, hf, objective):
    """The loss of a batch of ragged rows, EOS learned behind each answer, by the slow loop at each kind of positions."""
    rows = [("Q: Imagine that Ann is", " Rome"), ("Q:", " mother aunt"), ("", " x y z")]
    train = [
        {"prompt": p or "Ann", "answer": a} if objective == "sft" else {"prompt": p or "Ann", "chosen": a, "rejected": a + " b"}
        for p, a in rows
    ]  # fmt: skip
    task = Task.from_records("t", train=train, test=train)
    from lofit_lens.training.objective import task_loss

    def summed(answer, prompt, at=None):
        whole, start = slow.joined_ids(tiny.tokenizer(), prompt, answer)
        whole = [*whole, tiny.tokenizer().eos_token_id]
        with contextlib.ExitStack() as stack:
            if at:
                stack.enter_context(edited_at(hf("llama"), at[0], places(at[1], start, len(whole))))
            found = slow.log_probs(hf("llama"), whole)
        return sum(found[i - 1, whole[i]] for i in range(start, len(whole))), len(whole) - start

    loss_of = task_loss(llama, task.training_examples(), beta=0.3)
    for name in POSITIONS:
        adapter = shift_of(llama, name)
        at = (adapter, name)
        with adapter.attached(llama), torch.no_grad():
            loss = loss_of([2, 0, 1]).item()
        if objective == "sft":
            sums = [summed(r["answer"], r["prompt"], at) for r in train]
            expected = -sum(s for s, _ in sums) / sum(n for _, n in sums)
        else:
            margins = [
                summed(r["chosen"], r["prompt"], at)[0] - summed(r["rejected"], r["prompt"], at)[0]
                - summed(r["chosen"], r["prompt"])[0] + summed(r["rejected"], r["prompt"])[0]
                for r in train
            ]  # fmt: skip
            expected = -torch.nn.functional.logsigmoid(0.3 * torch.stack(margins)).mean()
        assert loss == pytest.approx(float(expected), abs=1e-5), name
