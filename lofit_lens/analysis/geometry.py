"""Geometry of an adapter's vectors: their norms relative to the activations', and their angles with ITI's and RepE's directions.

In d dimensions the cosine of a fixed vector with one of random direction has mean 0 and standard deviation 1 / sqrt(d), exactly:
the yardstick for every cosine here. (Activations are anisotropic, so two unrelated vectors that were both made from them may be
closer than that.)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lofit_lens.analysis.logit_lens import to_stream
from lofit_lens.checks import check_is, texts_of
from lofit_lens.errors import InputError
from lofit_lens.heads import Head
from lofit_lens.interventions.lofit import LOFIT, Lofit
from lofit_lens.models import model_info, tokenizer_of
from lofit_lens.probing.probes import Probes
from lofit_lens.probing.reading import ReadingVectors
from lofit_lens.probing.record import record
from lofit_lens.tasks.collate import encode

KINDS = ("mass_mean", "probe")


@torch.no_grad()
def geometry(
    model: Any,
    lofit: Lofit,
    *,
    prompts: Sequence[str] | None = None,
    probes: Probes | None = None,
    reading: ReadingVectors | None = None,
) -> pd.DataFrame:
    """Measure each head of an adapter, one row per head, in its order.

    Args:
        model: any HookedTransformer or TransformerBridge that the adapter fits.
        lofit: the adapter.
        prompts: texts whose z at the last token the offsets are compared with; attached interventions stay active.
        probes: probes of the same model, for ITI's directions.
        reading: reading vectors of the same model, for RepE's directions; heads in layers without one get NaN.

    Returns:
        `head`, `layer`, `index`, `A_norm`, `v_norm` (units of z), `u_norm` (norm of `v W_O`, units of the residual stream);
        with prompts `z_norm` (mean norm of z) and `v_share` (v_norm / z_norm); with probes, for `mass_mean` and `probe`,
        `cos_...` (of v with the direction, which points from false to true) and `sigmas_...` (v's part along it in standard
        deviations of the statements: ITI's alpha); `chance_sd_head` (1 / sqrt(d_head)); with reading vectors `cos_reading` (of
        `v W_O` with the layer's) and `chance_sd_model` (1 / sqrt(d_model)). NaN where v is zero or a direction is missing.

    Raises:
        AdapterError: an adapter for another shape.
        InputError: probes or reading vectors of another shape, or an empty list of prompts.
        ModelError: heads that have no direct path to the residual stream.
    """
    info = model_info(model)
    check_is(lofit, Lofit, "lofit", LOFIT)
    check_is(probes, (Probes, type(None)), "probes", "what fit_probes returns")
    check_is(reading, (ReadingVectors, type(None)), "reading", "what reading_vectors returns")
    lofit._check_shape(model)
    v = torch.stack([lofit.v.detach()[h].cpu() for h in lofit.heads]).double()
    A = torch.stack([lofit.A.detach()[h].cpu() for h in lofit.heads]).double()
    u = to_stream(model, v.float(), lofit.heads).double()
    frame = pd.DataFrame({
        "head": [str(h) for h in lofit.heads], "layer": [h.layer for h in lofit.heads], "index": [h.head for h in lofit.heads],
        "A_norm": _norm(A), "v_norm": _norm(v), "u_norm": _norm(u),
    })  # fmt: skip
    if prompts is not None:
        frame["z_norm"] = _z_norms(model, lofit, prompts)
        frame["v_share"] = frame["v_norm"] / frame["z_norm"]
    if probes is not None:
        for kind in KINDS:
            directions, sigma = probes.direction(kind), probes.sigma(kind)  # pyright: ignore[reportArgumentType]
            if tuple(directions.shape) != lofit.shape:
                raise InputError(
                    f"probes of shape {tuple(directions.shape)} for an adapter of {lofit.shape}; fit them on this model"
                )
            own = torch.stack([directions[h].cpu() for h in lofit.heads]).double()
            frame[f"cos_{kind}"] = cosines(v, own)
            spread = torch.stack([sigma[h].cpu() for h in lofit.heads]).double()
            frame[f"sigmas_{kind}"] = ((v * own).sum(dim=1) / spread.where(spread > 0, torch.nan)).numpy()
        frame["chance_sd_head"] = lofit.d_head**-0.5
    if reading is not None:
        if reading.directions.shape[1] != info.d_model:
            raise InputError(
                f"reading vectors of width {reading.directions.shape[1]} for {info.name} of {info.d_model}; recompute them"
            )
        rows = {layer: reading.directions[i].cpu().double() for i, layer in enumerate(reading.layers)}
        nothing = torch.zeros(info.d_model, dtype=torch.float64)
        frame["cos_reading"] = cosines(u, torch.stack([rows.get(h.layer, nothing) for h in lofit.heads]))
        frame["chance_sd_model"] = info.d_model**-0.5
    return frame


@torch.no_grad()
def offset_cosines(a: Lofit, b: Lofit) -> pd.DataFrame:
    """Cosine of two adapters' offsets on their shared heads, in `a`'s order.

    Returns:
        `head`, `layer`, `index`, `norm_a`, `norm_b`, `cosine`, `chance_sd` (1 / sqrt(d_head)); empty if they share no head.

    Raises:
        InputError: adapters of different shapes.
    """
    for name, one in (("a", a), ("b", b)):
        check_is(one, Lofit, name, LOFIT)
    if a.shape != b.shape:
        raise InputError(f"adapters of different models: shapes {a.shape} and {b.shape}")
    shared = list(a.heads & b.heads)

    def rows(lofit: Lofit) -> Tensor:
        found = [lofit.v.detach()[h].cpu() for h in shared]
        return torch.stack(found).double() if found else torch.zeros(0, a.d_head, dtype=torch.float64)

    return pd.DataFrame({
        "head": [str(Head(*h)) for h in shared], "layer": [h.layer for h in shared], "index": [h.head for h in shared],
        "norm_a": _norm(rows(a)), "norm_b": _norm(rows(b)), "cosine": cosines(rows(a), rows(b)),
        "chance_sd": np.full(len(shared), a.d_head**-0.5),
    })  # fmt: skip


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """Cosine of each pair of rows `[n, d]`, float64; NaN if a row is zero."""
    sizes = a.double().norm(dim=1) * b.double().norm(dim=1)
    return ((a.double() * b.double()).sum(dim=1) / sizes.where(sizes > 0, torch.nan)).numpy()


def _norm(rows: Tensor) -> np.ndarray:
    return torch.linalg.vector_norm(rows.double(), dim=1).numpy()


def _z_norms(model: Any, lofit: Lofit, prompts: Sequence[str]) -> list[float]:
    prompts = texts_of("prompts", prompts)
    if not prompts:
        raise InputError("prompts is an empty list; give at least one, or None to leave z out")
    tokenizer = tokenizer_of(model)
    with record(
        model, [encode(tokenizer, p) for p in prompts], what="z", layers=lofit.heads.layers, progress=False
    ) as z:
        return [
            float(np.linalg.norm(z.layer(h.layer)[:, h.head].astype(np.float64), axis=1).mean()) for h in lofit.heads
        ]
