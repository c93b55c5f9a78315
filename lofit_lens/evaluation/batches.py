"""Which prompts run together: neighbours in length, within a budget of tokens."""

from collections.abc import Sequence

TOKEN_BUDGET = 8192  # padded tokens of one forward pass, those in the key-value cache included


def grouped(
    order: Sequence[int],
    lengths: Sequence[int],
    budget: int,
    *,
    padding: int,
    cached: int = 0,
    after: Sequence[int] = (),
    limit: int = 0,
    most: int | None = None,
) -> list[list[int]]:
    """Consecutive items that are run together: within the budget, with little padding. An item may exceed the budget alone.

    Args:
        order: numbers of the items, sorted by length.
        lengths: tokens of each item.
        budget: padded tokens of a group, cached ones included.
        padding: padded tokens that a group may waste.
        cached: tokens that are in the cache for each item in the end, beside its own.
        after: what comes after each item; it starts behind the longest of its group, so that a group must leave room for it.
        limit: places that a group has in all, with what comes after.
        most: items of a group; None = any number.
    """
    groups: list[list[int]] = []
    width = tokens = tail = 0
    for i in order:
        own_tail = after[i] if after else 0
        width, tokens, tail = max(width, lengths[i]), tokens + lengths[i], max(tail, own_tail)
        n = len(groups[-1]) + 1 if groups else 0
        fits = (
            (cached + width) * n <= budget
            and (not after or cached + width + tail <= limit)
            and (most is None or n <= most)
        )
        if n and fits and width * n - tokens <= padding:
            groups[-1].append(i)
        else:
            groups.append([i])
            width, tail = lengths[i], own_tail
            tokens = width
    return groups
