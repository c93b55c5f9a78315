"""Which sequences are run in one padded pass: those of near lengths, within a budget of tokens."""

from collections.abc import Sequence


def near_lengths(
    sizes: Sequence[tuple[int, int]], *, budget: int | None = None, waste: int | None = None
) -> list[list[int]]:
    """Group items for padded passes.

    From the longest down, an item joins the group before it unless the group would then pad more than `waste` tokens or hold more
    than `budget` padded ones.

    Args:
        sizes: of each item: number of sequences, and tokens of the longest.
        budget: padded tokens of one group; an item alone may exceed it. None = no bound.
        waste: padding that one group may hold: about what a further pass costs. None = no bound.

    Returns:
        Groups of item numbers, longest first; within a group in the order given. Each item stands in one group.
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
