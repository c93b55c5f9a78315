"""Head sets and scores by name, as comparisons and figures take them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lofit_lens.checks import shown
from lofit_lens.errors import InputError
from lofit_lens.heads.scores import HeadScores
from lofit_lens.heads.sets import Heads, HeadSet

Ranking = HeadScores | HeadSet
Sets = Mapping[str, Heads] | Sequence[HeadSet] | HeadSet
Scores = Mapping[str, HeadScores] | Sequence[HeadScores] | HeadScores
Rankings = Mapping[str, Ranking] | Sequence[Ranking] | Ranking


def named_sets(sets: Any) -> dict[str, HeadSet]:
    """Return a dictionary: name -> head set.

    Args:
        sets: a mapping, or head sets without names: they are named by their labels if these differ, else by their positions.

    Raises:
        InputError: anything else, or two names that are equal as text.
    """
    found = {}
    for name, heads in _named(sets, "head sets", "{'MQuAKE': scores.top(32)}").items():
        try:
            found[name] = HeadSet.of(heads)
        except InputError as e:
            raise InputError(f"{name!r}: {e}") from e
    return found


def named_scores(scores: Any) -> dict[str, HeadScores]:
    """Return a dictionary: name -> head scores; see `named_sets`."""
    return _of(_named(scores, "head scores", "{'LoFiT': scores}"), HeadScores, "HeadScores (select_heads)")


def named_rankings(rankings: Any) -> dict[str, Ranking]:
    """Return a dictionary: name -> head scores or head set; see `named_sets`."""
    found = _named(rankings, "rankings", "{'LoFiT': scores, 'ITI': probe_scores}")
    return _of(found, Ranking, "HeadScores (select_heads, probe_heads) or a HeadSet")


def _of(found: dict[str, Any], kind: Any, want: str) -> dict[str, Any]:
    for name, value in found.items():
        if not isinstance(value, kind):
            raise InputError(f"{name!r} is {shown(value)}; give {want}")
    return found


def _named(given: Any, what: str, example: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        named = {str(name): value for name, value in given.items()}
        if len(named) < len(given):
            raise InputError(f"names {list(given)}: two of them are equal as text; rename one")
        return named
    listed: list[Any] = (
        [given] if isinstance(given, Ranking) else list(given) if isinstance(given, list | tuple) else [None]
    )
    if not all(isinstance(one, Ranking) for one in listed):
        raise InputError(f"{shown(given)} is not {what} by name; give e.g. {example}")
    labels = [one.task or one.kind if isinstance(one, HeadScores) else one.label or "heads" for one in listed]
    return dict(
        zip(labels if len(set(labels)) == len(labels) else map(str, range(1, len(labels) + 1)), listed, strict=True)
    )
