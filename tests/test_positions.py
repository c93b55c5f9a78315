"""Where an edit acts: names, and masks written by hand for text, prompts, answers and decoding, padded on either side."""

import pytest
import torch

from lofit_lens.errors import InputError
from lofit_lens.models import (
    ALL,
    Borders,
    Layout,
    Positions,
    before_each_pass,
    declared,
    layout_of,
    logits_of,
    positions_of,
)
from lofit_lens.models.positions import names_of

NAMES = ("all", "answer", "second", "predicting", "last", "f3+l2", "f0+l2", "f3+l0")
# Rows of masks: "." padding, "0" left alone, "1" edited.
LEFT = ["..######", "########"]  # 6 and 8 tokens
RIGHT = ["######..", "########"]
WHOLE = Borders(torch.tensor([4, 5]), torch.tensor([6, 8]))  # answers of 2 and 3 tokens
PROMPT = Borders(torch.tensor([6, 8]), torch.tensor([7, 12]))  # nothing but prompts in the pass
DECODING = Borders(torch.tensor([6, 8]))
SHORT = Borders(torch.tensor([1, 4]), torch.tensor([6, 8]))  # prompts shorter than 5


def layout(rows, borders=None, n_new=None):
    """A layout of rows of `#` (token) and `.` (padding)."""
    mask = torch.tensor([[int(c == "#") for c in row] for row in rows])
    tokens = torch.arange(mask.numel()).view(mask.shape)
    return Layout.of(tokens, mask, n_new or mask.shape[1], borders)


def shown(name, of):
    """The mask as text."""
    mask = Positions.parse(name).mask(of)
    assert (mask.dtype, mask.shape) == (torch.bool, of.place.shape)
    assert Positions.parse(name).acts(of) == bool(mask.any())
    return [
        "".join("." if p < 0 and not m else str(int(m)) for p, m in zip(place, row, strict=True))
        for place, row in zip(of.place.tolist(), mask.tolist(), strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- names


def test_names_are_read():
    """Five words, and first and last prompt tokens of any numbers; what is read already stays as it is."""
    for name in NAMES:
        read = Positions.parse(name)
        assert (str(read), read.name, Positions.parse(read)) == (name, name, read)
    seven = Positions.parse("f7+l12")
    assert (seven.first, seven.final) == (7, 12)
    assert Positions.parse("all") == ALL != Positions.parse("last")
    assert [Positions.parse(n).everywhere for n in NAMES] == [True, *[False] * 7]


@pytest.mark.parametrize("name", ["", "ALL", "first", "f7", "l7", "f0+l0", "f-1+l2", "f7+l7 ", "7+7", "f1.5+l2", "f+l"])
def test_other_names_are_refused(name):
    """The error says what was given, what is allowed, and what f7+l7 means."""
    with pytest.raises(InputError, match=r"allowed: all, answer, second, predicting, last, row, f7\+l7") as e:
        Positions.parse(name)
    assert str(e.value).startswith(f"unknown positions {name!r}")
    assert str(e.value).endswith("f7+l7: the prompt's first 7 and last 7 tokens.")


def test_a_near_name_is_offered():
    """A slip of one letter."""
    with pytest.raises(InputError, match="Did you mean 'answer'"):
        Positions.parse("answers")


def test_the_tail_is_what_may_be_edited_at_a_prompts_end():
    """ReFT's last tokens, the last one for all others but those that treat every token alike."""
    tails = {name: Positions.parse(name).tail for name in (*NAMES, "f3+l9")}
    assert tails == {
        "all": 0, "answer": 1, "second": 1, "predicting": 1, "last": 1, "f3+l2": 2, "f0+l2": 2, "f3+l0": 1, "f3+l9": 9
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ one whole pass


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("all", ["111111", "11111111"]), ("answer", ["111111", "11111111"]), ("predicting", ["111111", "11111111"]),
        ("second", ["111111", "11111111"]),
        ("last", ["000001", "00000001"]), ("f3+l2", ["111011", "11100011"]), ("f0+l2", ["000011", "00000011"]),
        ("f3+l0", ["111000", "11100000"]),
    ],
)  # fmt: skip
def test_plain_text_has_no_prompt(name, rows):
    """Without borders; padding on either side is left alone."""
    assert shown(name, layout(LEFT)) == [".." + rows[0], rows[1]]
    assert shown(name, layout(RIGHT)) == [rows[0] + "..", rows[1]]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("all", ["111111", "11111111"]), ("answer", ["000011", "00000111"]), ("predicting", ["000111", "00001111"]),
        ("second", ["000001", "00000011"]),
        ("last", ["000001", "00000001"]), ("f3+l2", ["111100", "11111000"]), ("f0+l2", ["001100", "00011000"]),
        ("f3+l0", ["111000", "11100000"]), ("f1+l1", ["100100", "10001000"]),
    ],
)  # fmt: skip
def test_a_prompt_with_its_answer(name, rows):
    """4 + 2 and 5 + 3 tokens in one pass, as in training."""
    assert shown(name, layout(LEFT, WHOLE)) == [".." + rows[0], rows[1]]
    assert shown(name, layout(RIGHT, WHOLE)) == [rows[0] + "..", rows[1]]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("all", ["111111", "11111111"]), ("answer", ["011111", "00001111"]), ("predicting", ["111111", "00011111"]),
     ("second", ["001111", "00000111"]),
     ("last", ["000001", "00000001"]), ("f3+l2", ["100000", "11110000"]), ("f0+l2", ["100000", "00110000"]),
     ("f9+l9", ["100000", "11110000"])],
)  # fmt: skip
def test_prompts_shorter_than_what_is_edited_of_them(name, rows):
    """Prompts of 1 and 4 tokens: each token once, none of the answer."""
    assert shown(name, layout(RIGHT, SHORT)) == [rows[0] + "..", rows[1]]


# ------------------------------------------------------------------------------------------------- parts of a pass


@pytest.mark.parametrize(
    ("name", "rows"),
    [("all", ["111111", "11111111"]), ("answer", ["000000", "00000000"]), ("predicting", ["000001", "00000001"]),
     ("second", ["000000", "00000000"]),
     ("last", ["000000", "00000000"]), ("f3+l2", ["111011", "11100011"]), ("f0+l2", ["000011", "00000011"]),
     ("f3+l0", ["111000", "11100000"])],
)  # fmt: skip
def test_prompts_that_answers_will_follow(name, rows):
    """The scorer's first pass: the prompt's last token predicts, and is not the last of the sequence."""
    assert shown(name, layout(LEFT, PROMPT)) == [".." + rows[0], rows[1]]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("all", ["11.", "111"]), ("answer", ["11.", "111"]), ("second", ["01.", "011"]),
     ("predicting", ["11.", "111"]), ("last", ["01.", "001"]),
     ("f3+l2", ["00.", "000"]), ("f9+l9", ["00.", "000"])],
)  # fmt: skip
def test_answers_behind_cached_prompts(name, rows):
    """Answers of 2 and 3 tokens behind prompts of 4 and 5 with a gap between, right-padded."""
    behind = layout(["..####" + "##.", ".#####" + "###"], WHOLE, 3)
    assert behind.place.tolist() == [[4, 5, -1], [5, 6, 7]]
    assert shown(name, behind) == rows
    known = Borders(WHOLE.prompt, torch.tensor([9, 9]))  # the scorer leaves the last token of an answer out
    assert shown(name, layout(["..####" + "##.", ".#####" + "###"], known, 3)) == (
        ["00.", "000"] if name == "last" else rows
    )


def test_a_prompt_that_goes_on_behind_a_shared_front():
    """Prompts of 6 and 8 tokens, the first 4 of both cached: places go on from there."""
    rest = ["####" + "..##", "####" + "####"]
    assert layout(rest, PROMPT, 4).place.tolist() == [[-1, -1, 4, 5], [4, 5, 6, 7]]
    expected = {
        "all": ["..11", "1111"], "answer": ["..00", "0000"], "predicting": ["..01", "0001"], "f3+l2": ["..11", "0011"],
        "second": ["..00", "0000"],
        "f5+l0": ["..10", "1000"], "f0+l9": ["..11", "1111"], "last": ["..00", "0000"],
    }  # fmt: skip
    assert {name: shown(name, layout(rest, PROMPT, 4)) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "prompt", "step"),
    [("all", ["111111", "11111111"], "1"), ("answer", ["000001", "00000001"], "1"), ("second", ["000001", "00000001"], "1"),
     ("f3+l2", ["111011", "11100011"], "0"),
     ("predicting", ["000001", "00000001"], "1"), ("last", ["000001", "00000001"], "1"), ("f9+l9", ["111111", "11111111"], "0")],
)  # fmt: skip
def test_decoding(name, prompt, step):
    """The prompts' pass, then one new token a row, twice: from the prompt's last token on, each is the newest when it runs."""
    assert shown(name, layout(LEFT, DECODING)) == [".." + prompt[0], prompt[1]]
    for n in (1, 2):
        assert shown(name, layout([row + "#" * n for row in LEFT], DECODING, 1)) == [step, step]
    assert shown(name, layout([row + "###" for row in LEFT], DECODING, 3)) == [3 * step] * 2  # as when run one by one


def test_a_row_of_padding_alone_is_left_alone():
    """Nothing is edited in it, whatever the positions; a pass of such rows has nothing to edit."""
    for name in NAMES:
        assert shown(name, layout(["....", "####"]))[0] == "...."
        empty = layout(["####..", "####.."], Borders(torch.tensor([4, 4]), torch.tensor([6, 6])), 2)
        assert shown(name, empty) == ["..", ".."]


# ------------------------------------------------------------------------------------------------ layouts and borders


# --------------------------------------------------------------------------------------------------- what is stated


class _Fails(Exception):
    pass


def test_a_call_that_states_nothing_is_text(llama):
    """The model called directly, as TransformerLens' own tools do: no padding, no prompt."""
    found = layout_of(llama, 2, 3, torch.device("cpu"))
    assert found.place.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert found.borders is None
    assert shown("last", found) == ["001", "001"]
    seen = []
    with before_each_pass(llama, seen.append), torch.no_grad():
        llama(torch.ones(1, 3, dtype=torch.long))
    assert seen == []


def test_what_is_told_sees_the_layout_and_comes_and_goes(llama):
    """Several are told, in the order they came; each leaves alone, also after an exception; other models are not theirs."""
    said, tokens = [], torch.tensor([[5, 6, 7]])
    tell = lambda name: lambda layout: said.append((name, layout.tokens.tolist(), layout.mask.tolist()))
    run = lambda: logits_of(llama, tokens, torch.ones_like(tokens))
    with torch.no_grad(), before_each_pass(llama, tell("a")):
        with pytest.raises(_Fails, match="logits"), before_each_pass(llama, tell("b")):
            raise _Fails("logits", run())
        run()
    run()
    assert said == [(name, [[5, 6, 7]], [[1, 1, 1]]) for name in "aba"]


def test_what_is_declared_is_listed_while_it_holds(llama):
    """Two of the same name count as two."""
    answer = Positions.parse("answer")
    with declared(llama, answer, "one"), declared(llama, ALL, "other"):
        with pytest.raises(_Fails) as e, declared(llama, answer, "one"):
            raise _Fails(positions_of(llama), names_of(llama))
        assert e.value.args == ((answer, ALL, answer), ("one", "other", "one"))
        assert sorted(map(str, positions_of(llama))) == ["all", "answer"]
        assert sorted(names_of(llama)) == ["one", "other"]
    assert positions_of(llama) == names_of(llama) == ()
