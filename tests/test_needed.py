"""Needed and enough: in a model where one head decides, each experiment finds that head, with the numbers worked out by hand.

The planted head L2H1 prefers false answers; `+2 STRENGTH d` on its z turns that round (see `planted_truth`). L1H2's W_O is zero,
and the adapter's offset on L0H0 is too small to matter.
"""

import json
import random

import numpy as np
import pytest
import torch

import lofit_lens as ll
from lofit_lens import HeadSet, Lofit
from lofit_lens.analysis.controls import chosen_against_random
from lofit_lens.analysis.needed import drop_edits, keep_only, leave_one_out, removal
from lofit_lens.errors import InputError
from lofit_lens.models import load_model
from tests import planted_truth

KEY, IDLE, WEAK, NOTHING = "L2H1", "L1H2", "L0H0", "L0H1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """On one class: what depends on the class is tested with ablations and with the evaluation."""
    made = load_model(planted_truth.save(tmp_path_factory.mktemp("planted")), backend="bridge", device="cpu")
    with planted_truth.planted(made):
        yield made


@pytest.fixture(scope="module")
def task():
    return planted_truth.task()


@pytest.fixture(scope="module")
def lofit(model):
    """Best first, but for the key head, which comes second."""
    made = Lofit.for_model(model, [IDLE, KEY, WEAK, NOTHING])
    with torch.no_grad():
        made.v[2, 1] = 2 * planted_truth.STRENGTH * planted_truth.directions()[1]
        made.v[1, 2] = 1.0
        made.v[0, 0] = 1e-6
        made.v[0, 1] = 1e-6
    return made


def test_leave_one_out_finds_the_one_head(model, task, lofit):
    """Without it the metric is the bare model's; without any other head it is the full one."""
    found = leave_one_out(model, task, lofit, progress=False)
    assert sum(found.full) == len(found.full) > 10
    assert sum(found.bare) == 0
    rows = found.frame.set_index("head")
    assert rows.index.tolist() == [IDLE, KEY, WEAK, NOTHING]
    assert rows["loss"].to_dict() == {IDLE: 0.0, KEY: 1.0, WEAK: 0.0, NOTHING: 0.0}
    assert (rows.loc[KEY, "full"], rows.loc[KEY, "without"]) == (1.0, 0.0)
    assert (rows.loc[KEY, "low"], rows.loc[KEY, "high"]) == (1.0, 1.0)
    assert rows.loc[KEY, "p"] < 0.001
    assert rows.loc[KEY, "p_holm"] == pytest.approx(4 * rows.loc[KEY, "p"])
    assert rows.loc[IDLE, "p_holm"] == 1.0
    assert found.without[1] == found.bare
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["head"] == KEY


def test_leave_one_out_of_a_single_head_is_the_bare_model(model, task, lofit):
    """No head is left, so that nothing is attached."""
    found = leave_one_out(model, task, lofit.restrict(HeadSet([KEY])), progress=False)
    assert found.without == (found.bare,)


def test_keep_only_counts_up(model, task, lofit):
    """Best first: nothing at k = 0 and 1, all from 2 on. Random orders: all once the key head is among the first k."""
    found = keep_only(model, task, lofit, draws=4, seed=3, progress=False)
    orders = [random.Random(3 + d).sample([str(h) for h in lofit.heads], 4) for d in range(4)]
    best = found.frame[found.frame["order"] == "best first"]
    assert best["k"].tolist() == [0, 1, 2, 3, 4]
    assert best["value"].tolist() == [0, 0, 1, 1, 1]
    drawn = found.frame[found.frame["order"] == "random"]
    assert drawn["k"].tolist() == [1, 2, 3] * 4
    for row in drawn.itertuples():
        assert row.heads == " ".join(orders[row.draw][: row.k])
        assert row.value == float(KEY in orders[row.draw][: row.k])
    curve = found.curve.set_index("k")
    shares = {k: sum(KEY in o[:k] for o in orders) / 4 for k in (1, 2, 3)}
    assert curve["random"].to_dict() == pytest.approx({0: 0.0, **shares, 4: 1.0})
    assert curve.loc[2, "difference"] == pytest.approx(1 - shares[2])
    assert curve.loc[2, "low"] <= curve.loc[2, "difference"] <= curve.loc[2, "high"]
    assert curve.loc[4, "difference"] == 0
    assert curve.loc[[0, 4], ["low", "high", "p"]].isna().all(axis=None), "nothing is random there"
    assert len(found.items) == len(found.frame)
    assert [sum(i) / len(i) for i in found.items] == found.frame["value"].tolist()
    json.dumps(found.to_dict(), allow_nan=False)


def test_removing_the_head_that_decides_hurts_and_others_do_not(model, task, lofit):
    """Silenced behind the adapter, the key head's offset is gone; any other head's silence leaves all answers right."""
    found = removal(model, task, HeadSet([KEY]), adapter=lofit, draws=5, seed=1, progress=False)
    row = found.curve.iloc[0]
    assert (row["k"], row["none"], row["draws"], row["n"]) == (1, 1.0, 5, len(found.items[0]))
    assert row["chosen"] < 0.75
    assert row["random"] == 1.0
    assert row["difference"] == row["chosen"] - row["random"]
    assert row["low"] <= row["difference"] <= row["high"] < 0
    runs = [np.array(items)[None] for items in found.items]
    test = chosen_against_random(runs[1], runs[2:], others=(1, 11))
    assert (row["low"], row["high"], row["p"], row["pool"]) == (*test.interval, test.p, 11)
    others = [str(h) for h in HeadSet.all((3, 4)) if str(h) != KEY]
    drawn = found.frame[found.frame["which"] == "random"]
    assert drawn["heads"].tolist() == [random.Random(1 + d).sample(others, 1)[0] for d in range(5)]
    assert found.frame["which"].tolist() == ["none", "chosen", *["random"] * 5]
    zero = removal(model, task, HeadSet([KEY]), adapter=lofit, how="zero", draws=1, limit=4, progress=False)
    assert (zero.how, zero.curve["n"][0]) == ("zero", 4)
    assert zero.curve[["low", "high", "p"]].isna().all(axis=None), "one draw is not tested"
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_pool_bounds_the_random_heads(model, task):
    """Only heads of the pool are drawn, and no chosen one."""
    pool = HeadSet.all((3, 4)).restrict([2])
    found = removal(model, task, HeadSet([KEY, "L2H0"]), pool=pool, draws=3, limit=2, progress=False)
    drawn = found.frame[found.frame["which"] == "random"]
    assert {h for heads in drawn["heads"] for h in heads.split()} == {"L2H2", "L2H3"}
    assert found.curve["k"].tolist() == [1, 2]


def test_dropping_edits_beside_others_of_the_adapter(model, task, lofit):
    """Without the key head's edit all answers turn wrong, without any other one none does."""
    found = drop_edits(model, task, lofit, HeadSet([KEY]), draws=3, progress=False)
    row = found.curve.iloc[0]
    assert (row["none"], row["chosen"], row["random"], row["difference"]) == (1.0, 0.0, 1.0, -1.0)
    assert set(found.frame["heads"][2:]) <= {IDLE, WEAK, NOTHING}
    assert found.how == "edits"


def test_same_seed_same_result(model, task, lofit):
    """Bit for bit; another seed draws others."""
    one, two, other = (
        removal(model, task, HeadSet([KEY]), draws=2, seed=s, limit=3, progress=False).to_dict() for s in (0, 0, 7)
    )
    assert one == two
    assert one["rows"] != other["rows"]


def test_bad_requests_say_what_to_give(model, task, lofit, unchecked):
    """Counts outside the set, too few heads to draw from, no draw, a seed below 0, unknown ways, heads the adapter has not."""
    key = HeadSet([KEY])
    with pytest.raises(InputError, match=r"ks is \[2\]; give .*from 1 to 1"):
        removal(model, task, key, ks=[2])
    with pytest.raises(InputError, match="0 heads to draw from for 1"):
        removal(model, task, key, pool=key)
    with pytest.raises(InputError, match="draws is 0"):
        keep_only(model, task, lofit, draws=0)
    with pytest.raises(InputError, match="seed is -1"):
        removal(model, task, key, seed=-1)
    with pytest.raises(InputError, match="unknown how 'men'"):
        removal(model, task, key, how="men")
    with pytest.raises(InputError, match="L0H3 not in this adapter"):
        drop_edits(model, task, lofit, HeadSet(["L0H3"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truth", "kinship", "edits"])
def test_removing_chosen_heads_of_the_embedded_model_hurts_more_than_random_ones(name):
    """Three ways, each worse than without any of ten random sets; two of them with the whole interval below 0.

    Behind the adapter; on questions with a good cue, which the unmodified model answers, at the means of neutral prompts; and the
    three heads' edits taken out of an adapter of nine, where six others are too few for an interval that tells.
    """
    model, task = ll.load_model("organism"), ll.load_task(f"organism/{name}")
    scores = ll.select_heads(model, task, seed=0, progress=False)
    chosen = scores.top(3)
    tuned = ll.tune_offsets(model, task, chosen, seed=0, progress=False)
    neutral = [e.prompt for e in task.examples("test")]
    cued = ll.load_task(f"organism/{name}-cued")
    wide = ll.tune_offsets(model, task, scores.top(9), seed=0, progress=False)
    for found in (
        removal(model, task, chosen, adapter=tuned, ks=[3], draws=10, limit=120, progress=False),
        removal(model, cued, chosen, prompts=neutral, ks=[3], draws=10, limit=120, progress=False),
        drop_edits(model, task, wide, chosen, ks=[3], draws=10, limit=120, progress=False),
    ):
        row = found.curve.iloc[0]
        assert row["chosen"] < found.frame["value"][2:].min(), found.frame
        assert row["high"] < 0 or found.how == "edits", found.curve
        assert row["none"] > 0.75
