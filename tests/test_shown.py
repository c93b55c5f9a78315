"""What objects show of themselves: lines that fit a screen, names that Tab offers, progress in a log."""

import re

import pytest
from torch import nn

import lofit_lens as ll
from lofit_lens import progress
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.html import wrapped
from lofit_lens.interventions import Lofit

LARGE = HeadSet.all((40, 40))


def test_what_is_printed_fits_100_columns():
    """Heads of a large model, alone and inside what holds them; words stay whole; inside a sentence there is one line."""
    scores = HeadScores([[1.0] * 40] * 40, kind="A-norm", model="a/model-with-a-long-name" * 2, task="truthfulqa")
    lofit = Lofit((40, 40, 4), LARGE)
    lofit.meta.task = "a-task-with-a-long-name" * 2
    for made in (LARGE, scores, scores.top(48), lofit):
        for text in (str(made), repr(made)):
            assert max(map(len, text.split("\n"))) <= 100
    assert f"{LARGE}".count("\n") == 0
    assert wrapped("word " * 30).split() == ["word"] * 30


def test_printed_heads_can_be_pasted_back():
    """All of them, in order; the short form says that it leaves some out."""
    for heads in (LARGE, HeadSet(["L39H1", "L0H0"], shape=(40, 40), label="a label"), HeadSet(["L1H2"])):
        assert HeadSet(str(heads)).heads == heads.heads
        if len(heads) <= 12:
            assert HeadSet(repr(heads)).heads == heads.heads
    with pytest.raises(ll.errors.InputError, match="leaves heads out"):
        HeadSet(repr(LARGE))


def test_tab_offers_what_a_user_calls():
    """Of the package its names and parts; of an adapter its own names and a few of torch's."""
    assert set(dir(ll)) == {*ll.__all__, *ll._PARTS, "errors", "__doc__", "__version__"}
    for name in dir(ll):
        assert getattr(ll, name) is not None
    shown = {name for name in dir(Lofit((2, 2, 4), HeadSet(["L0H0"]))) if not name.startswith("_")}
    assert {"A", "v", "heads", "attached", "restrict", "save_pretrained", "to", "parameters"} <= shown
    assert len(shown & set(dir(nn.Module))) == 5
    assert len(shown) < 40


class Log:
    def __init__(self, tty):
        self.text, self.tty = "", tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.tty


def test_progress_in_a_log_is_a_line_every_ten_seconds(monkeypatch):
    """110 steps of half a second: lines at 10, 20, 30, 40, 50 s and at the end, each with a number; work of 9 s says nothing."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    log = Log(tty=False)
    monkeypatch.setattr("sys.stderr", log)
    with progress.tqdm(total=110, desc="tune") as bar:
        for _ in range(110):
            now[0] += 0.5
            bar.update()
    lines = log.text.split("\n")
    assert [int(re.search(r"(\d+)/110", line)[1]) for line in lines[:-1]] == [20, 40, 60, 80, 100, 110]
    assert all(line.startswith("tune: ") for line in lines[:-1])
    assert lines[-1] == ""
    log.text = ""
    for _ in progress.tqdm(range(90), desc="soon"):
        now[0] += 0.1
    for _ in progress.tqdm(range(900), desc="quiet", disable=True):
        now[0] += 0.1
    assert log.text == ""


def test_progress_on_a_terminal_stays_a_bar(monkeypatch):
    """One line that is drawn again."""
    log = Log(tty=True)
    monkeypatch.setattr("sys.stderr", log)
    for _ in progress.tqdm(range(3), desc="tune"):
        pass
    assert "\r" in log.text
    assert log.text.count("\n") == 1
