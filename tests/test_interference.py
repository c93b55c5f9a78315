"""Adapters that get in each other's way, and that do not: planted ones, with the metrics known beforehand.

In the planted model (see `planted_truth`) an offset `+2 STRENGTH d` on L2H1 makes all true answers win, and without it all false
ones do. The task `false` asks for these.
"""

import json
import random
import sys

import pytest
import torch

from lofit_lens import HeadSet, Lofit, Task, TrainConfig
from lofit_lens.analysis.interference import interference, learned_in_turn, long_context
from lofit_lens.analysis.measure import items_of
from lofit_lens.errors import DataError, InputError
from lofit_lens.models import load_model
from tests import planted_truth, tiny

KEY = "L2H1"
module = sys.modules["lofit_lens.analysis.interference"]  # its name in the package is the function's
N = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = load_model(planted_truth.save(tmp_path_factory.mktemp("planted")), backend="bridge", device="cpu")
    with planted_truth.planted(made):
        yield made


@pytest.fixture(scope="module")
def tasks():
    """The planted task, and the same with right and wrong exchanged, both with two options and trained by SFT."""
    true = planted_truth.task()

    def rows(split, chosen, rejected):
        return [
            {"prompt": e.prompt, "answer": getattr(e, chosen), "options": [getattr(e, chosen), getattr(e, rejected)]}
            for e in true.training[split][:N]
        ]

    made = {}
    for name, fields in (("true", ("chosen", "rejected")), ("false", ("rejected", "chosen"))):
        made[name] = Task.from_records(name, **{s: rows(s, *fields) for s in ("train", "val", "test")})
    return made


def turned(model, factor, head=KEY):
    lofit = Lofit.for_model(model, [head])
    with torch.no_grad():
        lofit.v[lofit.heads[0]] = factor * planted_truth.STRENGTH * planted_truth.directions()[1]
    return lofit


def test_adapters_that_cancel_interfere(model, tasks):
    """Together, +2 and -2 leave the bare model: the true task falls from 1 to 0, the false one stays at 1."""
    pairs = {"true": (tasks["true"], turned(model, 2)), "false": (tasks["false"], turned(model, -2))}
    found = interference(model, pairs, progress=False)
    values = {(r.task, r.condition): r.value for r in found.frame.itertuples()}
    assert values == {
        ("true", "no adapter"): 0, ("true", "own adapter"): 1, ("true", "adapter of false"): 0,
        ("true", "all together"): 0, ("true", "sum"): 0,
        ("false", "no adapter"): 1, ("false", "own adapter"): 1, ("false", "adapter of true"): 0,
        ("false", "all together"): 1, ("false", "sum"): 1,
    }  # fmt: skip
    tests = found.tests.set_index(["task", "first"])
    row = tests.loc[("true", "all together")]
    assert (row["second"], row["difference"], row["n"]) == ("own adapter", -1, N)
    assert row["p"] == 2 / 2**N, "few items: the exact permutation test"
    assert row["p_holm"] == pytest.approx(4 * row["p"])
    assert tests.loc[("false", "all together"), "difference"] == 0
    assert tests.loc[("false", "adapter of true"), ["second", "difference"]].tolist() == ["no adapter", -1]
    assert found.order == ("true", "false")
    assert found.value("true", "own adapter") == 1
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="no run of 'true' with 'x'"):
        found.value("true", "x")


def test_learned_in_turn_forgets_what_the_next_one_takes_away(model, tasks, monkeypatch):
    """Each is tuned while the ones before act; the second one's -2 on the same head undoes the first one's +2."""
    asked = []

    def tune(model, task, heads, *, seed, config, progress):
        asked.append((task.name, str(heads), seed, config, sum(items_of(model, tasks["true"])) / N))
        return turned(model, 2 if task.name == "true" else -2)

    monkeypatch.setattr(module, "tune_offsets", tune)
    config = TrainConfig(lr=0.5)
    found, learned = learned_in_turn(
        model, tasks, {"true": HeadSet([KEY]), "false": HeadSet(["L0H0"])}, seed=7, config=config, progress=False
    )
    # When the second was tuned, the first acted: the true task was solved.
    assert asked == [("true", KEY, 7, config, 0.0), ("false", "L0H0", 7, config, 1.0)]
    values = {(r.task, r.condition): r.value for r in found.frame.itertuples()}
    assert values == {
        ("true", "no adapter"): 0, ("true", "after true"): 1, ("true", "after false"): 0,
        ("false", "no adapter"): 1, ("false", "after true"): 0, ("false", "after false"): 1,
    }  # fmt: skip
    assert found.tests[["task", "first", "second", "difference"]].values.tolist() == [
        ["true", "after false", "after true", -1.0]
    ]
    assert list(learned) == ["true", "false"]


def test_learned_in_turn_really_tunes(model, tasks):
    """Two adapters of the heads asked for, with offsets, and nothing left on the model."""
    heads = {"true": HeadSet([KEY]), "false": HeadSet(["L0H0", "L1H1"])}
    config = TrainConfig(lr=0.1, epochs=1, max_steps=1)
    _, learned = learned_in_turn(model, tasks, heads, config=config, limit=2, progress=False)
    assert [str(a.heads) for a in learned.values()] == [KEY, "L0H0 L1H1"]
    assert all(a.v.abs().max() > 0.01 for a in learned.values())


FILLERS = ["Rome", "Ann asked her son, Bob, to go", "In what country?", "the author of the book"]


def test_long_contexts_stand_in_front_and_grow_upwards(model, tasks, monkeypatch):
    """Each item has its own order of documents and no more tokens than the length; longer contexts end in the shorter ones."""
    seen = []
    monkeypatch.setattr(module, "items_of", lambda model, task, *a, **k: seen.append((task, a)) or (1.0, 0.0))
    adapter = turned(model, 2)
    found = long_context(model, tasks["true"], adapter, FILLERS, [12, 30], separator=" ", seed=3, progress=False)
    assert [len(a) for _, a in seen] == [0, 1] * 3
    prompts = [[e.prompt for e in task.examples("test")] for task, _ in seen[::2]]
    bare = [e.prompt for e in tasks["true"].examples("test")]
    assert prompts[0] == bare
    size = lambda text: len(tiny.tokenizer()(text, add_special_tokens=False)["input_ids"])
    for length, these, shorter in zip((12, 30), prompts[1:], prompts, strict=False):
        for long, short, question in zip(these, shorter, bare, strict=True):
            assert long.endswith(short)
            assert size(long.removesuffix(question)) <= length
    order = random.Random("3 0").sample(range(4), 4)
    first = prompts[2][0].removesuffix(bare[0])
    assert first.endswith(FILLERS[order[0]] + " ")
    assert len({p.removesuffix(q) for p, q in zip(prompts[2], bare, strict=True)}) > 1, "not the same for every item"
    assert found.frame["tokens"].tolist()[::2] == sorted(found.frame["tokens"].tolist()[::2])


def test_long_context_metrics_and_tests(model, tasks):
    """What stands in front changes nothing for the planted head: gain 1 at every length, no loss."""
    found = long_context(
        model, tasks["true"], turned(model, 2), FILLERS, [12], separator=" ", limit=6, progress=False
    )  # fmt: skip
    assert found.frame[["length", "adapter", "value"]].values.tolist() == [
        [0, False, 0.0], [0, True, 1.0], [12, False, 0.0], [12, True, 1.0]
    ]  # fmt: skip
    assert found.tests["gain"].tolist() == [1, 1]
    assert found.tests["loss"].tolist() == [0, 0]
    assert found.tests["n"].tolist() == [6, 6]
    assert found.tests["p_holm"][0] == pytest.approx(3 * found.tests["p"][0])
    assert found.tests["loss_p"].isna().tolist() == [True, False]
    json.dumps(found.to_dict(), allow_nan=False)


def test_bad_requests_say_what_to_give(model, tasks):
    """One task alone, no heads, no filler, lengths below 0, beyond the context, or that no document fits."""
    true, adapter = tasks["true"], turned(model, 2)
    with pytest.raises(InputError, match="cannot interfere"):
        interference(model, {"a": (true, adapter)})
    with pytest.raises(InputError, match="cannot be learned in turn"):
        learned_in_turn(model, {"a": true}, {})
    with pytest.raises(InputError, match="no heads for false"):
        learned_in_turn(model, tasks, {"true": HeadSet([KEY])})
    for fillers, lengths, message in (
        ([], [5], r"0 fillers and lengths \[5\]; give at least one of both"),
        (FILLERS, [], r"lengths \[\]; give at least one of both"),
        (FILLERS, [-1], "length is -1; give 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            long_context(model, true, adapter, fillers, lengths)
    with pytest.raises(DataError, match="no room"):
        long_context(model, true, adapter, FILLERS, [2048])
    with pytest.raises(DataError, match="no more tokens at length 1 than at 0"):
        long_context(model, true, adapter, FILLERS, [1])
