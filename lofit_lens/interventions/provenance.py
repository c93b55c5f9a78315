"""An adapter's provenance, and what was measured with it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lofit_lens.errors import AdapterError, InputError
from lofit_lens.interventions.files import read_base_model
from lofit_lens.models import ModelInfo, same_weights

logger = logging.getLogger(__name__)

KEPT = (
    "task",
    "data_hash",
    "n_train",
    "seed",
    "config",
    "metrics",
    "versions",
    "history",
)  # as an adapter's file names them


@dataclass
class AdapterMeta:
    """Where an adapter comes from: base model, task, seed, hyperparameters, versions, training history.

    `attached` names what else acted on the model while it was made (see `models.attached_to`); without that the adapter's numbers
    may mean little. `metrics` holds what was measured with it, one record per metric (see `Adapter.add_metrics`). `source` is the
    place on the hub from which it was read, `"user/repo@commit"`.
    """

    model: ModelInfo | None = None
    task: str = ""
    data_hash: str = ""
    seed: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    n_train: int | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""
    attached: list[str] = field(default_factory=list)


def meta_of(record: Mapping[str, Any], source: str = "") -> AdapterMeta:
    """Read the provenance from the record of an adapter's files; raise KeyError or TypeError if it is incomplete."""
    told = {name: record[name] for name in KEPT}
    return AdapterMeta(model=read_base_model(record), source=source, attached=record.get("attached", []), **told)


def with_metrics(meta: AdapterMeta, result: Any) -> list[dict[str, Any]]:
    """Add the metrics of one more `EvalResult` to an adapter's, replacing those of the same task, split and form.

    Raises:
        InputError: the result was measured on other weights than those the adapter was made for.
    """
    if result.model and meta.model and not same_weights(meta.model, result.model):
        raise InputError(
            f"this result was measured on {described(result.model)}, and the adapter was made for {described(meta.model)}; give "
            "one that was measured with it"
        )
    of = {"task": result.task, "split": result.split, "form": result.form}
    kept = [m for m in meta.metrics if {k: m[k] for k in of} != of]
    return kept + [
        {
            **of, "data_hash": result.data_hash, "metric": name, "mean": m.mean,
            "interval": list(m.interval) if m.interval else None, "n": m.n, "seeds": m.seeds,
        }
        for name, m in result.metrics.items()
    ]  # fmt: skip


def described(model: ModelInfo) -> str:
    """Return a model's name and, if known, its revision."""
    return f"{model.name} ({model.revision})" if model.revision else model.name


def check_weights(made_for: ModelInfo, info: ModelInfo) -> None:
    """Raise AdapterError if a model has other weights than those that an adapter was made for."""
    if not same_weights(made_for, info):
        raise AdapterError(
            f"this adapter was made for {described(made_for)}, and the model is {described(info)}: other weights. Load the "
            "model it was made for, or use it there on purpose: strict=False (--other-model)"
        )


def warn_of_other(made_for: ModelInfo, info: ModelInfo) -> None:
    """Warn if an adapter meets other weights than those it was made for, or another BOS setting."""
    if not same_weights(made_for, info):
        logger.warning("this adapter was made for %s; it is now attached to %s", made_for.name, info.name)
    if None not in (made_for.prepend_bos, info.prepend_bos) and made_for.prepend_bos != info.prepend_bos:
        with_bos, without = ("with", info.name, "without"), ("without", info.name, "with")
        logger.warning(
            "this adapter was made %s BOS before every text, and %s runs %s it; load the model with prepend_bos=%s",
            *(with_bos if made_for.prepend_bos else without), made_for.prepend_bos,
        )  # fmt: skip
