"""Heads: names, ordered sets and their algebra, files."""

import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lofit_lens.errors import DataError, InputError
from lofit_lens.heads import Grid, Head, HeadSet
from tests.records import edited_record

SHAPE = (3, 4)
heads_of_grid = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), unique=True)
sets_of_grid = heads_of_grid.map(lambda heads: HeadSet(heads, shape=SHAPE))
scored_sets = heads_of_grid.map(lambda heads: HeadSet(heads, [10.0 * layer + h for layer, h in heads], SHAPE))


# ----------------------------------------------------------------------------------------------- one head


@pytest.mark.parametrize("written", ["L12H7", "12.7", "12,7", "12:7", " L12H7 ", (12, 7), [12, 7], Head(12, 7)])
def test_a_head_is_read_from_every_notation(written):
    """Every notation of layer 12, head 7 gives the same head."""
    assert Head.parse(written) == Head(12, 7)


@pytest.mark.parametrize("wrong", ["", "L12", "H7L12", "L-1H2", "L1H2x", "12", (1,), (1, 2, 3), (-1, 0), (0, -1)])
def test_what_is_no_head_is_refused_by_name(wrong):
    """An error shows the value that was received."""
    with pytest.raises(InputError) as e:
        Head.parse(wrong)
    assert repr(wrong) in str(e.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [("a", "b"), (1.5, 2), 3, None])
def test_indices_that_are_no_whole_numbers_are_refused(wrong):
    """A head's indices are integers: a text is refused as bad input, a fraction is not cut off."""
    with pytest.raises(InputError, match="head"):
        HeadSet([wrong])


def test_heads_sort_layer_major_and_print_as_names():
    """Layer first, then head; printed LxHy, which is read back."""
    assert sorted([Head(1, 0), Head(0, 3), Head(0, 1)]) == [(0, 1), (0, 3), (1, 0)]
    assert str(Head(12, 7)) == "L12H7"
    assert Head.parse(str(Head(12, 7))) == Head(12, 7)


# --------------------------------------------------------------------------------------------- a head set


@given(sets_of_grid, sets_of_grid)
def test_set_algebra_is_that_of_sets(a, b):
    """`& | -` agree with Python's sets, whatever the order."""
    assert set(a & b) == set(a) & set(b)
    assert set(a | b) == set(a) | set(b)
    assert set(a - b) == set(a) - set(b)
    assert (a & b).shape == (a | b).shape == (a - b).shape == SHAPE


@given(scored_sets, sets_of_grid)
def test_algebra_keeps_the_left_sets_order_and_scores(a, b):
    """`&` and `-` keep the left set's order and each head's own score; `|` puts the right set's new heads behind."""
    for made in (a & b, a - b):
        assert [h for h in a if h in made] == list(made)
        assert made.scores == tuple(10.0 * h.layer + h.head for h in made)
    assert list(a | b) == list(a) + [h for h in b if h not in a]
    assert (a | b).scores is None


@given(sets_of_grid)
def test_algebra_with_itself(a):
    """a & a = a | a = a, and a - a is empty."""
    assert (a & a).heads == (a | a).heads == a.heads
    assert len(a - a) == 0


def test_sets_of_different_models_do_not_mix():
    """Two known and different shapes are refused, both named; an unknown one takes the other's."""
    with pytest.raises(InputError, match=r"\(3, 4\) and \(2, 4\)"):
        HeadSet([(0, 0)], shape=(3, 4)) & HeadSet([(0, 0)], shape=(2, 4))
    assert (HeadSet([(0, 0)]) | HeadSet([(1, 1)], shape=(2, 4))).shape == (2, 4)


def test_top_takes_the_first_heads_with_their_scores():
    """top(k) keeps order, scores, shape and label."""
    found = HeadSet(["L2H0", "L0H1", "L1H1"], [3, 2, 1], SHAPE, "mine").top(2)
    assert found == HeadSet(["L2H0", "L0H1"], [3, 2], SHAPE, "mine")


@pytest.mark.parametrize("k", [0, -1, 4])
def test_top_beyond_the_set_is_refused(k):
    """K outside 1..n names K and n."""
    with pytest.raises(InputError, match=rf"K = {k} .* 3"):
        HeadSet(["L2H0", "L0H1", "L1H1"]).top(k)


def test_restrict_and_layer_counts():
    """restrict keeps the heads of given layers; layer_counts counts them in each layer, empty ones too."""
    chosen = HeadSet(["L2H0", "L0H1", "L2H3"], [3, 2, 1], SHAPE)
    assert chosen.restrict([2]) == HeadSet(["L2H0", "L2H3"], [3, 1], SHAPE)
    assert chosen.layer_counts().tolist() == [1, 0, 2]
    assert HeadSet(["L1H0"]).layer_counts(4).tolist() == [0, 1, 0, 0]
    assert chosen.mean_layer == pytest.approx(4 / 3)  # (2 + 0 + 2) / 3
    assert chosen.layers == (0, 2)
    with pytest.raises(InputError, match="shape"):
        HeadSet(["L1H0"]).layer_counts()
    with pytest.raises(InputError, match="empty"):
        _ = HeadSet([]).mean_layer


@given(sets_of_grid)
def test_the_mask_is_true_at_the_heads_and_nowhere_else(a):
    """mask() and the set say the same of every head."""
    mask = a.mask()
    assert all(bool(mask[h]) == (h in a) for h in HeadSet.all(SHAPE))


def test_a_head_outside_the_model_is_named_with_the_set_it_came_from():
    """The error names head, model size and whom the set was made for."""
    with pytest.raises(InputError, match=r"L40H3 is outside this model \(32 layers of 32 heads.*Llama-2-13b"):
        HeadSet(["L40H3"], label="Llama-2-13b").check((32, 32))
    with pytest.raises(InputError, match="L0H4"):
        HeadSet(["L0H4"], shape=SHAPE)
    with pytest.raises(InputError, match="L3H0"):
        HeadSet(["L3H0"]).mask(SHAPE)


def test_a_head_twice_or_scores_of_another_number_are_refused():
    """The doubled head and both counts are named."""
    with pytest.raises(InputError, match="L0H1 is listed twice"):
        HeadSet(["L0H1", "L1H1", (0, 1)])
    with pytest.raises(InputError, match="3 scores for 2 heads"):
        HeadSet(["L0H1", "L1H1"], [1, 2, 3])


def test_random_sets_repeat_by_seed_and_respect_exclude():
    """The draw is random.Random(seed).sample over the layer-major list without the excluded heads."""
    out = HeadSet(["L0H0", "L2H3"])
    pool = [h for h in HeadSet.all(SHAPE) if h not in out]
    assert HeadSet.random(SHAPE, 5, seed=3, exclude=out).heads == tuple(random.Random(3).sample(pool, 5))
    assert HeadSet.random(SHAPE, 5, seed=3).heads != HeadSet.random(SHAPE, 5, seed=4).heads
    with pytest.raises(InputError, match="11"):
        HeadSet.random(SHAPE, 11, seed=0, exclude=out)  # 12 heads, two excluded: 10 are left


# -------------------------------------------------------------------------------------------------- files


@given(scored_sets)
def test_a_saved_set_is_read_back_the_same(tmp_path_factory, a):
    """save -> load is the identity, empty set and scores included."""
    path = tmp_path_factory.mktemp("set") / "heads.json"
    assert HeadSet.load(a.save(path)) == a
    plain = HeadSet(a.heads, label="a label")
    assert HeadSet.load(plain.save(path)) == plain


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"heads": "gone"}, "lacks the field 'heads'"), ({"schema": 2}, "schema 2"), ({"kind": "else"}, "not a lofit_lens.HeadSet"),
     ({"heads": [[9, 9]]}, "L9H9"), ({"heads": [["a", "b"]]}, "head")],
)  # fmt: skip
def test_a_damaged_head_set_is_refused(tmp_path, changes, message):
    """A missing field, a newer schema, another record, a head outside and an invalid head: each is InputError."""
    path = edited_record(tmp_path, HeadSet(["L0H1"], shape=SHAPE), **changes)
    with pytest.raises(InputError, match=message):
        HeadSet.load(path)


def test_official_head_files_are_read_in_order(tmp_path):
    """An int64 [k, 2] npy file gives the heads in the file's order, and its name as label."""
    np.save(tmp_path / "llama_truth.npy", np.array([[2, 3], [0, 1]]))
    found = HeadSet.load(tmp_path / "llama_truth.npy")
    assert found.heads == (Head(2, 3), Head(0, 1))
    assert found.label == "llama_truth"
    with pytest.raises(InputError, match="L2H3"):
        HeadSet.from_npy(tmp_path / "llama_truth.npy", shape=(2, 4))


class _Executes:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_python_objects_in_a_head_file_are_never_executed(tmp_path):
    """An object array, and a bare pickle named .npy, are refused, and what they hold does not run."""
    trace = tmp_path / "executed"
    np.save(tmp_path / "a.npy", np.array([_Executes(str(trace)), None]), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(_Executes(str(trace))))
    for name in ("a.npy", "b.npy"):
        with pytest.raises(DataError, match=name):
            HeadSet.load(tmp_path / name)
    assert not trace.exists()
    pickle.loads((tmp_path / "b.npy").read_bytes()).close()  # the trap works: unpickled, it runs
    assert trace.exists()


@pytest.mark.parametrize("content", [np.zeros((2, 3), int), np.zeros((2, 2)), np.zeros(4, int)])
def test_head_files_of_another_form_are_refused(tmp_path, content):
    """Another width, floats, and one dimension are refused with the file named."""
    np.save(tmp_path / "x.npy", content)
    with pytest.raises(DataError, match=r"x\.npy.*\[k, 2\]"):
        HeadSet.from_npy(tmp_path / "x.npy")


def test_a_missing_or_truncated_head_file_is_refused(tmp_path):
    """No file, an empty file and half a file are DataError."""
    np.save(tmp_path / "half.npy", np.arange(200).reshape(100, 2))
    (tmp_path / "half.npy").write_bytes((tmp_path / "half.npy").read_bytes()[:300])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("half.npy", "empty.npy", "none.npy"):
        with pytest.raises(DataError, match=name):
            HeadSet.load(tmp_path / name)


def test_matched_sets_keep_the_layers_of_another():
    """As many heads in each layer, each head of a layer equally often; layers without heads stay without."""
    like = HeadSet("L2H1 L0H3 L2H0 L4H2", shape=Grid((5, 4), layers=[0, 2, 4]))
    drawn = [HeadSet.matched(like, seed=seed) for seed in range(400)]
    assert all(s.layer_counts().tolist() == [1, 0, 2, 0, 1] and s.shape.head_layers == (0, 2, 4) for s in drawn)
    assert drawn[7].heads == HeadSet.matched(like, seed=7).heads != drawn[8].heads
    counts = [sum((2, head) in s for s in drawn) for head in range(4)]
    assert sum(counts) == 800
    assert all(160 < n < 240 for n in counts), "two of four: 200 each, standard deviation 10"
    with pytest.raises(InputError, match="does not know its model; give shape="):
        HeadSet.matched(HeadSet("L2H1"), seed=0)
    with pytest.raises(InputError, match="seed is -1"):
        HeadSet.matched(like, seed=-1)
