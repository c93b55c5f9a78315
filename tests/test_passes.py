"""What passes say to whom: answers that no edit reaches are counted, each pass is told, and nothing is left behind."""

import logging

import pytest
import torch

import lofit_lens as ll
from lofit_lens import Task, attached
from lofit_lens.errors import AdapterError
from lofit_lens.evaluation import generate, score_continuations
from lofit_lens.evaluation.scoring import count_unreached
from lofit_lens.models import (
    Borders,
    before_each_pass,
    extend,
    gaps_are_exact,
    hook_z,
    hooked,
    logits_of,
    peek,
    positions_of,
    prefill,
    step,
    tokenizer_of,
)
from lofit_lens.models import positions as inner
from lofit_lens.tasks.collate import encode_continuations
from tests import slow, tiny
from tests.shift import POSITIONS, shift_of
from tests.test_borders import ANSWERS, PROMPTS

# --------------------------------------------------------------------------------------- answers that are out of reach

UNREACHED = {"last": 3, "answer": 2, "second": 3}  # of the answers below: one of two tokens, two of one token

CHOICES = [
    {"prompt": "Q: Ann?", "options": [" Rome is", " a"], "answer": " a"},
    {"prompt": "Q: who?", "options": [" b", " c d e"], "answer": " b"},
]


@pytest.mark.parametrize("name", POSITIONS)
def test_answers_out_of_reach_are_counted(llama, caplog, name):
    """An edit of the last position never counts, one from the answer on not for answers of one token, one after its first not
    for those of two; others reach them all."""
    tokenizer, asked = tokenizer_of(llama), [[" Rome is", " a"], [" b"]]
    encoded = [encode_continuations(tokenizer, p, a) for p, a in zip(["Q: Ann?", "Q: who?"], asked, strict=True)]
    assert [[e.n_labels for e in answers] for answers in encoded] == [[2, 1], [1]]
    with shift_of(llama, name).attached(llama), caplog.at_level(logging.WARNING, logger="lofit_lens"):
        n = count_unreached(llama, encoded)
        found = score_continuations(llama, ["Q: Ann?", "Q: who?"], asked)
    bare = score_continuations(llama, ["Q: Ann?", "Q: who?"], asked)
    assert n == UNREACHED.get(name, 0)
    assert n == sum(
        f == pytest.approx(b, abs=1e-6)
        for one, two in zip(found, bare, strict=True)
        for f, b in zip(one, two, strict=True)
    )
    said = [r.message for r in caplog.records]
    assert len(said) == 2 * (n > 0)
    for message in said:
        assert f"{n} of 3 answers keep the unmodified model's score" in message
        assert f"acts on positions {name}," in message
        assert "use positions 'predicting' or 'all'" in message


def test_nothing_is_counted_where_something_acts_everywhere(llama, caplog):
    """Two edits: one everywhere, so that every answer is reached; and nothing attached."""
    encoded = [encode_continuations(tokenizer_of(llama), "Q: Ann?", [" Rome is", " a"])]
    one, two = shift_of(llama, "last"), shift_of(llama, "all")
    with caplog.at_level(logging.WARNING, logger="lofit_lens"):
        assert count_unreached(llama, encoded) == 0
        with attached(llama, one, two):
            assert count_unreached(llama, encoded) == 0
        assert not caplog.records
        with attached(llama, one, shift_of(llama, "answer")):
            assert count_unreached(llama, [*encoded, ()]) == 1
    assert "1 of 2 answers" in caplog.text
    assert "positions answer, last," in caplog.text


@pytest.mark.parametrize("name", POSITIONS)
def test_results_hold_the_count(llama, name):
    """EvalResult.counted: 4 options, two of one token, one of two."""
    task = Task.from_records("t", train=CHOICES, test=CHOICES)
    with shift_of(llama, name).attached(llama):
        result = ll.evaluate(llama, task, progress=False)
    expected = {"last": 4, "answer": 2, "second": 3}.get(name)
    assert result.counted.get("answers that the edit cannot reach") == expected
    assert "answers that the edit cannot reach" not in ll.evaluate(llama, task, progress=False).counted


def test_merged_answers_are_reached_by_their_own_start(llama, caplog):
    """`y` is one merged token, whatever other answers the question has: from its start on, nothing reaches it."""
    encoded = [encode_continuations(tokenizer_of(llama), "In what countr", ["y was", "y", ","])]
    assert [e.n_labels for e in encoded[0]] == [2, 1, 1]
    assert encoded[0][1].start < encoded[0][2].start
    with shift_of(llama, "answer").attached(llama), caplog.at_level(logging.WARNING, logger="lofit_lens"):
        assert count_unreached(llama, encoded) == 2


# ------------------------------------------------------------------------------------------ nothing is left behind


class _Fails(Exception):
    pass


def no_trace(model):
    hooks = [p for p in model.hook_dict.values() if p.fwd_hooks or p._forward_hooks]
    return not hooks and positions_of(model) == () and not len(inner._running) and not inner._before.get(model)


@pytest.mark.parametrize("what", ["score", "generate", "full"])
def test_an_exception_inside_a_pass_leaves_nothing(llama, monkeypatch, what):
    """An edit that fails in the third layer's hook: no layout, no declared positions, no hooks; afterwards all is as before."""
    bare = score_continuations(llama, PROMPTS, ANSWERS)
    adapter, calls = shift_of(llama, "predicting"), []

    def fails(layer):
        def edit(x):
            calls.append(len(inner._running))
            raise _Fails

        return edit

    monkeypatch.setattr(adapter, "_edit", fails)
    gaps_are_exact(llama)
    tokens = torch.ones(1, 3, dtype=torch.long)
    run = {
        "score": lambda: score_continuations(llama, PROMPTS, ANSWERS),
        "generate": lambda: generate(llama, PROMPTS, max_new_tokens=2),
        "full": lambda: logits_of(llama, tokens, tokens, Borders(torch.tensor([1]))),
    }[what]
    with before_each_pass(llama, lambda layout: None), adapter.attached(llama):
        with pytest.raises(_Fails):
            run()
        assert len(inner._running) == 0
    assert calls == [1]
    assert no_trace(llama)
    assert score_continuations(llama, PROMPTS, ANSWERS) == bare


def test_adapters_come_and_go_in_any_order(llama):
    """Two of equal positions: the declared ones are those still attached; an adapter that cannot be attached leaves none."""
    one, two = shift_of(llama, "answer"), shift_of(llama, "answer", seed=1)
    first, second = one.attached(llama), two.attached(llama)
    first.__enter__()
    second.__enter__()
    assert list(map(str, positions_of(llama))) == ["answer", "answer"]
    first.__exit__(None, None, None)
    assert list(map(str, positions_of(llama))) == ["answer"]
    with pytest.raises(AdapterError), two.attached(llama):
        pass
    assert list(map(str, positions_of(llama))) == ["answer"]
    second.__exit__(None, None, None)
    assert no_trace(llama)


@torch.no_grad()
def test_a_pass_within_a_pass_gives_the_outer_one_its_layout_back(llama):
    """A hook in the second layer runs the model: the edit in the first sees the inner pass's borders, the third's the outer's."""
    tokens = torch.tensor([[1, 50, 60, 70, 80]])
    inside, run = [], lambda n: logits_of(llama, tokens, torch.ones_like(tokens), Borders(torch.tensor([n])))

    def look(z, hook):
        if not inside:
            inside.append(None)
            inside[0] = run(4)

    with shift_of(llama, "answer").attached(llama):
        alone = [run(n) for n in (2, 4)]
        with hooked(hook_z(llama, 1), look):
            outer = run(2)
    assert torch.equal(outer, alone[0])
    assert torch.equal(inside[0], alone[1])
    assert not torch.equal(*alone)
    assert no_trace(llama)


# ------------------------------------------------------------------------------------------- told before each pass


def test_each_pass_is_told_once_with_its_sequences(llama):
    """Scoring: front, prompts, answers; the layout's tokens are whole sequences so far, those of the pass last."""
    gaps_are_exact(llama)
    told, tokenizer = [], tokenizer_of(llama)
    with before_each_pass(llama, told.append):
        score_continuations(llama, PROMPTS[:2], [[" Rome is", " a"], [" Ann was"]])
        assert len(told) == 3
    score_continuations(llama, PROMPTS[:2], [[" Rome is"], [" Ann was"]])
    assert len(told) == 3
    prompts = [slow.ids_of(tokenizer, p) for p in PROMPTS[:2]]
    ids = [slow.ids_of(tokenizer, t) for t in (PROMPTS[0] + " Rome is", PROMPTS[1] + " Ann was")]
    shorter, longer = 1, 0
    front = len([1 for a, b in zip(*prompts, strict=False) if a == b])
    whole = lambda layout: [t[m.bool()].tolist() for t, m in zip(layout.tokens, layout.mask, strict=True)]
    assert whole(told[0]) == [prompts[0][:front]]
    assert whole(told[1]) == [prompts[shorter], prompts[longer]]
    assert sorted(whole(told[2])) == sorted([ids[0][:-1], ids[1][:-1]])
    assert told[0].place.tolist() == [list(range(front))]
    for layout, n in zip(told[1:], (2, 2), strict=True):
        assert layout.place.shape[0] == n
        for tokens, mask, place, row in zip(layout.tokens, layout.mask, layout.place, whole(layout), strict=True):
            new = [i for i in place.tolist() if i >= 0]
            assert new == list(range(len(row) - len(new), len(row)))
            here = slice(tokens.shape[0] - place.shape[0], None)
            assert tokens[here][mask[here].bool()].tolist() == [row[i] for i in new]
    assert told[1].borders.prompt.tolist() == [len(prompts[shorter]), len(prompts[longer])]
    assert (told[1].end[:, 0] > told[1].borders.prompt).all()  # an answer follows
    assert sorted(told[2].end[:, 0].tolist()) == sorted(map(len, ids))
    ends = {tuple(ids[0][:-1]): len(prompts[0]), tuple(ids[1][:-1]): len(prompts[1])}
    assert told[2].borders.prompt.tolist() == [ends[tuple(row)] for row in whole(told[2])]


def test_each_step_of_decoding_is_told(llama):
    """The first pass has the prompts, each step one token more; no length is known."""
    told, ids = [], [slow.ids_of(tiny.tokenizer(), p) for p in ("Ann", "Q: who?")]
    ids.sort(key=len)
    with before_each_pass(llama, told.append):
        gaps_are_exact(llama)
        generate(llama, ["Ann", "Q: who?"], max_new_tokens=3)  # whatever is proven first is proven here
        told.clear()
        generate(llama, ["Ann", "Q: who?"], max_new_tokens=3)
    assert len(told) == 3
    for i, layout in enumerate(told):
        assert layout.borders.length is None
        assert layout.borders.prompt.tolist() == [len(p) for p in ids]
        assert layout.end[:, 0].tolist() == [len(p) + i for p in ids]
        for tokens, mask, prompt in zip(layout.tokens, layout.mask, ids, strict=True):
            assert tokens[mask.bool()].tolist()[: len(prompt)] == prompt


def test_borders_stay_with_a_state_and_its_rows(llama):
    """Given once at prefill, they hold for later passes, row by row; a later pass may give them anew."""
    told, ones = [], lambda n: torch.ones(2, n, dtype=torch.long)
    tokens = torch.randint(3, 400, (2, 6), generator=torch.Generator().manual_seed(0))
    with before_each_pass(llama, told.append), torch.no_grad():
        state = prefill(llama, tokens[:, :4], ones(4), Borders(torch.tensor([3, 4]), torch.tensor([6, 5])))[1]
        rows = state.select(torch.tensor([1, 1, 0]))
        extend(llama, rows, tokens[[1, 1, 0], 4:])
        peek(llama, state, torch.tensor([1]), tokens[1:, 4:], ones(2)[:1], Borders(torch.tensor([1])))
        step(llama, state, tokens[:, 4])
    assert [t.borders.prompt.tolist() for t in told] == [[3, 4], [4, 4, 3], [1], [3, 4]]
    lengths = [None if t.borders.length is None else t.borders.length.tolist() for t in told]
    assert lengths == [[6, 5], [5, 5, 6], None, [6, 5]]
