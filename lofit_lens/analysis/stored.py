"""Restore readings from the records of `to_dict`, so that figures can be drawn from them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from lofit_lens.analysis.answers import AnswerPatching
from lofit_lens.analysis.attention import AttentionPatterns
from lofit_lens.analysis.drift import Drift
from lofit_lens.analysis.interference import Interference, LongContext
from lofit_lens.analysis.logit_lens import HeadTokens
from lofit_lens.analysis.needed import KeepOnly, LeaveOneOut, Removal
from lofit_lens.errors import DataError
from lofit_lens.heads import HeadSet

Record = Mapping[str, Any]


def restored(record: Record, where: str) -> Any:
    """Rebuild the object that `to_dict` wrote; `where` names the file in errors.

    Raises:
        DataError: an unknown kind, a newer schema or a missing field.
    """
    kind = record.get("kind")
    if kind not in KINDS:
        raise DataError(f"{where}: unknown kind of record {kind!r}; allowed: {', '.join(KINDS)}")
    if record.get("schema") != 1:
        raise DataError(f"{where}: {kind} has schema {record.get('schema')!r}; this version reads 1: update lofit-lens")
    try:
        return KINDS[kind](record)
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{where}: {kind} is incomplete: {e!r}") from e


def frame_of(rows: Sequence[Record]) -> pd.DataFrame:
    """Rows as a table; None becomes NaN."""
    frame = pd.DataFrame(list(rows))
    for column in frame.columns[frame.isna().all()]:
        frame[column] = frame[column].astype(float)
    return frame


def _curve(r: Record) -> pd.DataFrame:
    """Chosen and random heads. Older records, without p, lose their intervals, which did not keep their level."""
    frame = frame_of(r["curve"])
    return frame if "p" in frame else frame.assign(low=float("nan"), high=float("nan"), p=float("nan"))


def _items(listed: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(i) for i in listed)


def _heads(r: Record) -> HeadSet:
    return HeadSet.from_dict(r["heads"])


def _tokens(r: Record) -> HeadTokens:
    return HeadTokens(frame_of(r["rows"]), _heads(r), r["scale"], r["n_prompts"], r["model"], r["task"])


def _patterns(r: Record) -> AttentionPatterns:
    tokens = tuple(tuple(t) for t in r["tokens"])
    return AttentionPatterns(
        _heads(r), tuple(r["prompts"]), tokens, tuple(torch.tensor(p) for p in r["patterns"]), r["model"]
    )


def _leave_one_out(r: Record) -> LeaveOneOut:
    return LeaveOneOut(
        frame_of(r["rows"]), tuple(r["full"]), _items(r["without"]), tuple(r["bare"]), r["task"], r["metric"], r["split"]
    )  # fmt: skip


def _keep_only(r: Record) -> KeepOnly:
    return KeepOnly(
        frame_of(r["rows"]), _items(r["items"]), _curve(r), r["task"], r["metric"], r["split"], r["draws"], r["seed"]
    )  # fmt: skip


def _removal(r: Record) -> Removal:
    return Removal(
        frame_of(r["rows"]), _items(r["items"]), _curve(r), r["task"], r["metric"], r["split"], r["how"], r["draws"],
        r["seed"],
    )  # fmt: skip


def _drift(r: Record) -> Drift:
    return Drift(
        frame_of(r["layers"]), frame_of(r["heads"]), frame_of(r["positions"]), r["n_texts"], r["n_tokens"], r["cut"], r["model"],
        tuple(r["adapters"]),
    )  # fmt: skip


def _interference(r: Record) -> Interference:
    return Interference(frame_of(r["rows"]), _items(r["items"]), frame_of(r["tests"]), tuple(r["order"]), r["split"])


def _long_context(r: Record) -> LongContext:
    return LongContext(
        frame_of(r["rows"]), _items(r["items"]), frame_of(r["tests"]), r["task"], r["metric"], r["split"], r["seed"]
    )


def _answers(r: Record) -> AnswerPatching:
    return AnswerPatching(frame_of(r["rows"]), _items(r["items"]), r["task"], r["split"], r["draws"], r["seed"])


KINDS: dict[str, Callable[[Record], Any]] = {
    "lofit_lens.HeadTokens": _tokens, "lofit_lens.AttentionPatterns": _patterns, "lofit_lens.LeaveOneOut": _leave_one_out,
    "lofit_lens.KeepOnly": _keep_only, "lofit_lens.Removal": _removal, "lofit_lens.Drift": _drift,
    "lofit_lens.Interference": _interference, "lofit_lens.LongContext": _long_context,
    "lofit_lens.AnswerPatching": _answers,
}  # fmt: skip
