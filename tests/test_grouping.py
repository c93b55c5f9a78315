"""Which items run in one padded pass."""

from hypothesis import given
from hypothesis import strategies as st

from lofit_lens.tasks.grouping import near_lengths

SIZES = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 60)), max_size=25)
BOUND = st.one_of(st.none(), st.integers(1, 300))


def padded(sizes, group):
    return sum(sizes[i][0] for i in group) * max(sizes[i][1] for i in group)


def real(sizes, group):
    return sum(sizes[i][0] * sizes[i][1] for i in group)


@given(SIZES, BOUND, BOUND)
def test_each_item_stands_in_one_group_within_the_bounds(sizes, budget, waste):
    """Every item once; a group of several keeps budget and waste; within a group the given order."""
    groups = near_lengths(sizes, budget=budget, waste=waste)
    assert sorted(i for g in groups for i in g) == list(range(len(sizes)))
    for group in groups:
        assert group == sorted(group)
        if len(group) > 1:
            assert budget is None or padded(sizes, group) <= budget
            assert waste is None or padded(sizes, group) - real(sizes, group) <= waste


@given(SIZES)
def test_without_bounds_all_run_together(sizes):
    """One group, in order; none for nothing."""
    assert near_lengths(sizes) == ([list(range(len(sizes)))] if sizes else [])


def test_near_lengths_by_hand():
    """Lengths 10, 9, 3, 2: 10 and 9 pad one token; 3 would pad 7 more, above 5; it goes with 2, which pads one."""
    sizes = [(1, 3), (1, 10), (1, 2), (1, 9)]
    assert near_lengths(sizes, waste=5) == [[1, 3], [0, 2]]
    assert near_lengths(sizes, waste=8) == [[0, 1, 3], [2]]
    assert near_lengths(sizes, waste=16) == [[0, 1, 2, 3]]


def test_sequences_of_an_item_count():
    """Two sequences of 6 tokens need 12 places: with one more of 5 tokens, 18."""
    assert near_lengths([(2, 6), (1, 5)], budget=18) == [[0, 1]]
    assert near_lengths([(2, 6), (1, 5)], budget=17) == [[0], [1]]
    assert near_lengths([(2, 6), (2, 5)], waste=1) == [[0], [1]]
    assert near_lengths([(2, 6), (2, 5)], waste=2) == [[0, 1]]
