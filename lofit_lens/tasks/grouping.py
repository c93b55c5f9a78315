"""Group sequences of similar length into padded passes, within a budget of tokens."""

from collections.abc import Sequence


def near_lengths(
    sizes: Sequence[tuple[int, int]], *, budget: int | None = None, waste: int | None = None
) -> list[list[int]]:
    """Group items for padded passes.

    From the longest down, an item joins the previous group unless that group would then pad more than `waste` tokens or hold
    more than `budget` tokens with padding.

    Args:
        sizes: for each item, its number of sequences and the tokens of the longest.
        budget: tokens of one group with padding; a single item may exceed it. None = no bound.
        waste: padding tokens that one group may hold, about the cost of one more pass. None = no bound.

    Returns:
        Groups of item numbers, longest first; within a group in the order given. Each item is in one group.
    """
    groups: list[list[int]] = []
    width = rows = padding = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        n, length = sizes[i]
        padding += n * (width - length)
        fits = bool(groups) and (budget is None or (rows + n) * width <= budget)
        if fits and (waste is None or padding <= waste):
            groups[-1].append(i)
            rows += n
        else:
            groups.append([i])
            width, rows, padding = length, n, 0
    return [sorted(group) for group in groups]
