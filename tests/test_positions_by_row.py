"""Positions that each row names: characters of a prompt to tokens, and the edit there in scores, training and generation."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

import lofit_lens as ll
from lofit_lens import Task, load_task
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation import damage, generate, score_continuations
from lofit_lens.experiments.grid.keys import task_key
from lofit_lens.interventions.loreft import LoReft
from lofit_lens.interventions.side_by_side import side_by_side
from lofit_lens.models import Positions
from lofit_lens.tasks import Marked
from lofit_lens.tasks.chat import turn_of
from lofit_lens.tasks.collate import encode, encode_continuations, encode_training, marks_of
from lofit_lens.training import FAST, PLAIN
from lofit_lens.training.objective import Steps, objective
from tests import chats, slow, tiny
from tests.shift import MLPShift, edited_at, shift_of
from tests.test_steps import WAYS

FRONT = "Q: Imagine that the capital of France is Rome. What is "
# Marks in what all prompts share (France), and in what each has of its own; several, one behind BOS, one at the end.
PROMPTS = [
    Marked(FRONT + "the capital of the country where Ann was born? A:", ["France", "Ann was"]),
    Marked(FRONT + "it? A:", ["France", "A:"]), Marked(FRONT, [[0, 6], "France"]),
]  # fmt: skip
ANSWERS = [[" Rome", " I have"], [" mother aunt uncle", " a"], ["x y"]]


def named(prompt, tokenizer=None):
    """Places of the tokens that overlap a mark, BOS being place 0; characters are counted by decoding token after token."""
    ids, at, found = (tokenizer or tiny.tokenizer())(str(prompt), add_special_tokens=False)["input_ids"], 0, []
    for place, token in enumerate(ids, start=1):
        end = at + len(tiny.tokenizer().decode([token]))
        found += [place] * any(at < last and end > first for first, last in prompt.spans)
        at = end
    assert at == len(prompt)
    return found


# --------------------------------------------------------------------------------------------------------- marks


def test_what_is_marked():
    """Spans, texts, or both; the text is the prompt's own, and equal prompts with other marks are told apart by their repr."""
    assert Marked("The capital of Peru is", ["Peru", [0, 3]]).spans == ((15, 19), (0, 3))
    assert Marked("abc", [1, 3]).spans == Marked("abc", [(1, 3)]).spans == Marked("abc", "bc").spans == ((1, 3),)
    one, other = Marked("abc", "a"), Marked("abc", "b")
    assert one == other == "abc"
    assert repr(one) == "Marked('abc', [[0, 1]])" != repr(other)
    again = pickle.loads(pickle.dumps(one))
    assert (again, again.spans) == ("abc", ((0, 1),))


def test_text_around_a_prompt_leaves_its_marks():
    """In front, behind, both."""
    made = "x: " + Marked("The capital of Peru", "Peru") + "?"
    assert [made[start:end] for start, end in made.spans] == ["Peru"]
    assert made == "x: The capital of Peru?"


@pytest.mark.parametrize(
    ("positions", "said"),
    [([[0, 99]], r"positions hold \[0, 99\]; give \[start, end\] with 0 <= start < end <= 7"), ([[3, 3]], r"hold \[3, 3\]"),
     ([[-1, 2]], r"hold \[-1, 2\]"), ([[0, 1, 2]], "hold"), ([True], "hold True"), ([1.5], "hold 1.5"),
     ("a", "'a' occurs 2 times"),
     ("z", "'z' occurs 0 times"),
     ([], r"positions are \[\]"), (3, "positions are 3"), ("", "hold ''")],
)  # fmt: skip
def test_marks_that_are_none(positions, said):
    """Each is refused; in a row, with its place."""
    with pytest.raises(InputError, match=said):
        Marked("a b a c", positions)
    row = {"prompt": "a b a c", "answer": " x", "positions": positions}
    with pytest.raises(DataError, match=rf"t train row 1: .*{said}"):
        Task.from_records("t", train=[row], test=[row])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_characters_become_the_tokens_that_overlap_them(prompt):
    """BOS is never among them; part of a token is the token."""
    turn = turn_of(tiny.tokenizer(), prompt)
    ids = encode(tiny.tokenizer(), turn.prompt)
    marks = marks_of(tiny.tokenizer(), turn, ids)
    assert [i for i, yes in enumerate(marks) if yes] == named(prompt)
    assert len(marks) == len(ids)
    part = Marked(str(prompt), [[9, 10]])
    assert marks_of(tiny.tokenizer(), turn_of(tiny.tokenizer(), part), ids).index(True) == named(part)[0]


def test_tokens_that_cannot_be_found():
    """The answer's token holds the mark; and a tokenizer without offsets."""
    with pytest.raises(DataError, match=r"merges the marked end of 'In what countr' and the answer 'y' into one token"):
        encode_continuations(tiny.tokenizer(), Marked("In what countr", "countr"), ["y"])
    assert encode_continuations(tiny.tokenizer(), Marked("In what countr", "In"), ["y"])[0].marks[1]

    class Slow:
        is_fast = False

    turn = replace(turn_of(tiny.tokenizer(), "a"), spans=((0, 1),))
    with pytest.raises(InputError, match="this tokenizer does not say which characters a token covers"):
        marks_of(Slow(), turn, [1])


# ---------------------------------------------------------------------------------------------------------- rows


def test_rows_with_positions(tmp_path):
    """From records and from files (in CSV as a text or as JSON), part of the hash and of a grid's key."""
    rows = [{"prompt": f"The capital of Peru {i} is", "answer": " x", "positions": "Peru"} for i in range(3)]
    task = Task.from_records("t", train=rows, test=rows)
    assert task.training["train"][0].prompt.spans == task.examples("test")[0].prompt.spans == ((15, 19),)
    others = Task.from_records("t", train=rows, test=[*rows[:2], {**rows[2], "positions": [[0, 3]]}])
    bare = Task.from_records("t", train=rows, test=[{k: r[k] for k in ("prompt", "answer")} for r in rows])
    assert len({t.data_hash for t in (task, others, bare)}) == 3
    assert len({json.dumps(task_key(t)) for t in (task, others, bare)}) == 3
    (tmp_path / "t.csv").write_text(
        'prompt,chosen,rejected,subject,split\nA Peru,x,y,Peru,train\nB Peru,x,y,"[[0, 1], ""Peru""]",test\n'
    )
    read = load_task(tmp_path / "t.csv", columns={"positions": "subject"})
    assert read.examples("test")[0].prompt.spans == ((0, 1), (2, 6))
    assert read.few_shot(1).examples("test")[0].prompt[-6:] == "B Peru"
    shot = read.few_shot(1).examples("test")[0].prompt
    assert [shot[start:end] for start, end in shot.spans] == ["B", "Peru"]


@pytest.mark.parametrize("style", chats.STYLES)
def test_in_a_chat(style):
    """The user's last turn holds the marks, wherever the template puts it; also where what it says is the template's own word."""
    tokenizer = chats.tokenizer(style)
    rows = [
        {"messages": [{"role": "user", "content": text}], "answer": "x", "positions": text[:6]}
        for text in ("assistant", " user")
    ]
    for row in rows:
        prompt = Task.from_records("t", train=[row], test=[row]).examples("test")[0].prompt
        turn = turn_of(tokenizer, prompt)
        before = turn_of(tokenizer, prompt.with_asked("#")).prompt
        (span,) = turn.spans
        assert turn.prompt[slice(*span)] == row["positions"].strip() or turn.prompt[slice(*span)] == row["positions"]
        assert abs(span[0] - before.rindex("#")) <= 1
    as_chat = Task.from_records("t", train=[{"prompt": "The Peru", "answer": "x", "positions": "Peru"}], test=[
        {"prompt": "The Peru", "answer": "x", "positions": "Peru"}]).as_chat(tokenizer)  # fmt: skip
    (encoded,) = encode_training(tokenizer, as_chat.training["train"][0])
    text = tokenizer.decode([i for i, yes in zip(encoded.ids, encoded.marks, strict=False) if yes])
    assert "Peru" in text
    assert len(text) < 8


def test_a_template_that_changes_the_text_is_refused():
    """Upper case: the marked characters are not there."""
    tokenizer = chats.tokenizer("plain", template="{% for m in messages %}{{ m.content + m.content }}{% endfor %}")
    row = {"messages": [{"role": "user", "content": "The Peru"}], "answer": "x", "positions": "Peru"}
    task = Task.from_records("t", train=[row], test=[row])
    with pytest.raises(InputError, match=r"template changes the user's text 'The Peru'.*edit other positions"):
        turn_of(tokenizer, task.examples("test")[0].prompt)


# -------------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def slow_scores(plain, adapter, prompts=PROMPTS, answers=ANSWERS):
    """One full forward an answer, the edit at the places that the prompt names."""
    found = []
    for prompt, listed in zip(prompts, answers, strict=True):
        for answer in listed:
            whole, start = slow.joined_ids(tiny.tokenizer(), str(prompt), answer)
            with edited_at(plain, adapter, named(prompt)):
                logs = slow.log_probs(plain, whole)
            found.append(sum(logs[i - 1, whole[i]].item() for i in range(start, len(whole))))
    return found


def flat(scores):
    return [s for listed in scores for s in listed]


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("budget", [4096, 1])
def test_scores_are_those_of_the_slow_loop(loaded, backend, hf, architecture, budget):
    """Ragged prompts behind a shared front whose marks they share, in two orders and one sequence a pass."""
    model = loaded(architecture, backend)
    for kind in (None, MLPShift):
        adapter = shift_of(model, "row", **({"kind": kind} if kind else {}))
        expected = slow_scores(hf(architecture), adapter)
        with adapter.attached(model):
            assert flat(score_continuations(model, PROMPTS, ANSWERS, token_budget=budget)) == pytest.approx(
                expected, abs=1e-4
            )
            turned = score_continuations(model, PROMPTS[::-1], ANSWERS[::-1], token_budget=budget)
            assert flat(turned[::-1]) == pytest.approx(expected, abs=1e-4)
        bare = flat(score_continuations(model, PROMPTS, ANSWERS))
        assert min(abs(a - b) for a, b in zip(bare, expected, strict=True)) > 1e-3


def test_prompts_that_differ_only_in_their_marks(llama, hf):
    """The same text three times: what is marked otherwise is not shared."""
    prompts = [Marked(FRONT, "Imagine"), Marked(FRONT, "France"), Marked(FRONT, "What")]
    adapter, answers = shift_of(llama, "row"), [[" Rome", " I"]] * 3
    with adapter.attached(llama):
        found = flat(score_continuations(llama, prompts, answers))
    assert found == pytest.approx(slow_scores(hf("llama"), adapter, prompts, answers), abs=1e-4)
    assert len({round(f, 3) for f in found}) == 6


def test_multiple_choice_with_several_answers(llama, hf):
    """evaluate, with a shared front; the same as the mc metrics of the slow loop's scores."""
    rows = [
        {"prompt": str(p), "chosen": [" Rome", " aunt"], "rejected": [" I have", " mother", " a"],
         "positions": [list(s) for s in p.spans]} for p in PROMPTS
    ]  # fmt: skip
    adapter = shift_of(llama, "row")
    with adapter.attached(llama):
        result = ll.evaluate(llama, Task.from_records("t", train=rows, test=rows), progress=False)
    answers = [[" Rome", " aunt", " I have", " mother", " a"]] * 3
    assert flat(
        [*t, *f] for t, f in zip(result.items["scores_true"], result.items["scores_false"], strict=True)
    ) == pytest.approx(slow_scores(hf("llama"), adapter, PROMPTS, answers), abs=1e-4)


# ------------------------------------------------------------------------- the same tokens, said in another way


@pytest.fixture
def no_bos(checkpoint, backend):
    """A tiny Llama without BOS, so that characters stand for all tokens of a prompt."""
    return ll.load_model(checkpoint("llama"), backend=backend, device="cpu", prepend_bos=False)


def whole(prompt):
    return Marked(str(prompt), [[0, len(prompt)]])


def ends(prompt, first, final):
    """The first and last tokens of a prompt, marked by their characters."""
    offsets = tiny.tokenizer()(str(prompt), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return Marked(str(prompt), [list(span) for span in (*offsets[:first], *offsets[len(offsets) - final :])])


def test_the_whole_text_is_all_positions(no_bos):
    """For answers of one token, which is predicted from the prompt: scores and first new tokens."""
    answers = [[" a", " Rome"], [" a"], ["x"]]
    with shift_of(no_bos, "all").attached(no_bos):
        expected = score_continuations(no_bos, PROMPTS, answers), generate(no_bos, PROMPTS, max_new_tokens=1)
    with shift_of(no_bos, "row").attached(no_bos):
        marked = [whole(p) for p in PROMPTS]
        found = score_continuations(no_bos, marked, answers), generate(no_bos, marked, max_new_tokens=1)
    assert flat(found[0]) == pytest.approx(flat(expected[0]), abs=1e-5)
    assert found[1] == expected[1]


@pytest.mark.parametrize(("name", "first", "final"), [("f3+l2", 3, 2), ("f0+l4", 0, 4), ("f5+l0", 5, 0)])
def test_ends_are_first_and_last_tokens(no_bos, name, first, final):
    """Scores of longer answers, and generation in one batch, padded on the left, with a cache."""
    marked = [ends(p, first, final) for p in PROMPTS]
    with shift_of(no_bos, name, scale=2.0).attached(no_bos):
        expected = score_continuations(no_bos, PROMPTS, ANSWERS), generate(no_bos, PROMPTS, max_new_tokens=6)
    with shift_of(no_bos, "row", scale=2.0).attached(no_bos):
        found = score_continuations(no_bos, marked, ANSWERS), generate(no_bos, marked, max_new_tokens=6)
    assert flat(found[0]) == pytest.approx(flat(expected[0]), abs=1e-5)
    assert found[1] == expected[1] != generate(no_bos, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_gradients_are_those_of_the_same_tokens(checkpoint, backend, kind, way, monkeypatch):
    """Loss and gradients of rows padded on the right (and prompts on the left, shared): named by row, and as f3+l2."""
    monkeypatch.setattr("lofit_lens.training.passes.WASTE", 0)
    model = ll.load_model(checkpoint("llama"), backend=backend, device="cpu", prepend_bos=False)
    learned = {"answer": " Rome is"} if kind == "sft" else {"chosen": " Rome is", "rejected": " mother aunt uncle"}
    texts = [*map(str, PROMPTS), "Q: it? Where? A:"]
    rows = [{"prompt": t, "positions": [list(s) for s in ends(t, 3, 2).spans], **learned} for t in texts]
    task, how = Task.from_records("t", train=rows, test=rows), PLAIN if way == "plain" else WAYS[way]
    known, found = objective(model, task.training_examples(), beta=0.5, passes=how), {}
    for positions in ("row", "f3+l2", "all"):
        adapter = shift_of(model, positions)
        adapter.c.requires_grad_(True)
        steps = Steps(model, [known], how, owned=False)
        with how.ready(model), adapter.attached(model):
            (loss,) = steps([(0, [0, 1, 2, 3])])
        found[positions] = loss.item(), adapter.c.grad
    assert found["row"][0] == pytest.approx(found["f3+l2"][0], abs=1e-6)
    torch.testing.assert_close(found["row"][1], found["f3+l2"][1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found["row"][1], found["all"][1], atol=1e-3)


def test_loreft_learns_at_the_rows_own_positions(llama, tmp_path):
    """Trained, saved, read; only marked tokens change, and the loss falls."""
    rows = [{"prompt": str(p), "answer": " Rome is", "positions": [list(s) for s in p.spans]} for p in PROMPTS]
    task = Task.from_records("t", train=rows, test=rows)
    adapter = LoReft.for_model(llama, rank=2, positions="row", seed=0)
    ll.training.fit(adapter, llama, task, ll.TrainConfig(lr=0.1, epochs=20, batch_size=2), seed=0, progress=False)
    losses = [step["loss"] for step in adapter.meta.history]
    assert losses[-1] < 0.9 * losses[0]
    adapter.save_pretrained(tmp_path / "a")
    read = LoReft.from_pretrained(tmp_path / "a", model=llama)
    assert str(read.positions) == "row"
    with adapter.attached(llama):
        expected = score_continuations(llama, PROMPTS, ANSWERS)
    with read.attached(llama):
        assert score_continuations(llama, PROMPTS, ANSWERS) == expected


# ------------------------------------------------------------------------------------------------------- refused


def test_a_text_that_names_none_is_refused(llama):
    """In training, scores, generation, damage, and a call of the model itself: what is missing, and what to do."""
    said = r"names no positions, and what is attached acts at positions 'row'.*Marked\(text, positions\), or its row a field"
    rows = [{"prompt": str(p), "answer": " Rome", "positions": [list(s) for s in p.spans]} for p in PROMPTS]
    del rows[1]["positions"]
    task = Task.from_records("t", train=rows, test=rows)
    adapter = shift_of(llama, "row")
    adapter.c.requires_grad_(True)
    with pytest.raises(InputError, match=rf"training example 2 {said}"):
        ll.training.fit(adapter, llama, task, ll.TrainConfig(lr=1e-2, epochs=1, batch_size=4), seed=0, progress=False)
    mixed = [PROMPTS[0], str(PROMPTS[1]), PROMPTS[2]]
    with adapter.attached(llama):
        for call in (
            lambda: score_continuations(llama, mixed, ANSWERS), lambda: ll.evaluate(llama, task, progress=False),
            lambda: generate(llama, mixed),
        ):  # fmt: skip
            with pytest.raises(InputError, match=rf"(question|prompt) 2 {said}"):
                call()
        with pytest.raises(InputError, match=f"a text {said}"):
            llama(torch.tensor([[1, 2, 3]]))
    with pytest.raises(InputError, match=f"a text {said}"):
        damage(llama, [adapter], ["Rome is the capital", "of France"], progress=False)
    lofit = ll.Lofit.for_model(llama, ["L0H1"])
    lofit.positions = Positions.parse("row")
    with pytest.raises(InputError, match="adapters side by side act at every position"), side_by_side(llama, [lofit]):
        pass


def test_others_do_not_mind_marks(llama):
    """Adapters at other positions, and the bare model, read marked prompts as their text; some rows may name none."""
    mixed = [PROMPTS[0], str(PROMPTS[1]), PROMPTS[2]]
    for positions in (None, "all", "f3+l2"):
        if positions:
            with shift_of(llama, positions).attached(llama):
                found = [
                    (score_continuations(llama, p, ANSWERS), generate(llama, p)) for p in (mixed, [*map(str, PROMPTS)])
                ]
        else:
            found = [
                (score_continuations(llama, p, ANSWERS), generate(llama, p)) for p in (mixed, [*map(str, PROMPTS)])
            ]
        assert found[0] == found[1]
    assert FAST.share_prompts
