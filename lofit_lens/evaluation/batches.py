"""Group prompts into passes: neighbors in length run together, within a budget of tokens."""

from collections.abc import Sequence

TOKEN_BUDGET = 8192  # padded tokens of one forward pass, including those in the KV cache


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
    """Group consecutive items to run together: within the budget, with little padding. A single item may exceed the budget.

    Args:
        order: numbers of the items, sorted by length.
        lengths: tokens of each item.
        budget: padded tokens of a group, including cached ones.
        padding: padding tokens that a group may waste.
        cached: further tokens that the cache finally holds for each item, besides its own.
        after: tokens that follow each item. They start after the longest item of its group, which must leave room for them.
        limit: positions that a group has in all, including the tokens that follow.
        most: largest number of items in a group; None = any number.
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
