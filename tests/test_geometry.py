"""Sizes and angles of offsets: hand-made vectors with known answers, on both classes."""

import math

import numpy as np
import pytest
import torch

from lofit_lens import HeadScores, HeadSet, Lofit
from lofit_lens.analysis.geometry import geometry, offset_cosines
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import hook_z, hooked
from lofit_lens.probing import Probes, ReadingVectors
from tests import tiny
from tests.adapters import output_projection, random_adapter

HEADS = ["L2H1", "L0H3"]


def probes(mass_mean, probe, sigma):
    """Probes of a 3 x 4 model with given directions `[3, 4, 8]`, and one sigma everywhere."""
    scores = HeadScores(torch.zeros(3, 4))
    return Probes(
        scores, scores, scores, {"mass_mean": mass_mean, "probe": probe, "random": probe},
        dict.fromkeys(("mass_mean", "probe", "random"), torch.full((3, 4), sigma)), AdapterMeta(),
    )  # fmt: skip


def test_norms_and_angles_by_hand(llama):
    """v = (3, 4, 0, ...) has norm 5; its cosine with e1 is 0.6, with -e2 -0.8; along e1 it goes 3 / sigma = 6 sigmas."""
    lofit = Lofit.for_model(llama, HEADS)
    with torch.no_grad():
        lofit.v[2, 1, :2] = torch.tensor([3.0, 4.0])
        lofit.A[0, 3, 2] = 2.0
    e1, e2 = torch.zeros(3, 4, 8), torch.zeros(3, 4, 8)
    e1[..., 0], e2[..., 1] = 1, -1
    found = geometry(llama, lofit, probes=probes(e1, e2, 0.5)).set_index("head")
    assert found.index.tolist() == HEADS
    assert (found.loc["L2H1", "layer"], found.loc["L2H1", "index"]) == (2, 1)
    assert found["v_norm"].tolist() == [5.0, 0.0]
    assert found["A_norm"].tolist() == [0.0, 2.0]
    assert found.loc["L2H1", "cos_mass_mean"] == pytest.approx(0.6)
    assert found.loc["L2H1", "cos_probe"] == pytest.approx(-0.8)
    assert found.loc["L2H1", "sigmas_mass_mean"] == pytest.approx(6.0)
    assert found.loc["L2H1", "sigmas_probe"] == pytest.approx(-8.0)
    assert math.isnan(found.loc["L0H3", "cos_probe"]), "a zero vector has no direction"
    assert found["chance_sd_head"].tolist() == [8**-0.5] * 2
    assert "z_norm" not in found
    assert "cos_reading" not in found


def test_stream_side_and_reading_vectors(llama, hf):
    """u = v W_O by the plain model's weights; its cosine with u itself as reading vector is 1, with a layer left out NaN."""
    lofit = random_adapter(llama, HeadSet(HEADS))
    W = output_projection(hf("llama"), 2).weight.detach()
    u = W[:, 8:16] @ lofit.v.detach()[2, 1]
    vectors = torch.stack([torch.ones(32) / 32**0.5, -u / u.norm()])
    reading = ReadingVectors((1, 2), vectors, torch.ones(2), torch.ones(2), AdapterMeta())
    found = geometry(llama, lofit, reading=reading).set_index("head")
    assert found.loc["L2H1", "u_norm"] == pytest.approx(float(u.norm()), rel=1e-5)
    assert found.loc["L2H1", "cos_reading"] == pytest.approx(-1, abs=1e-5)
    assert math.isnan(found.loc["L0H3", "cos_reading"])
    assert found.loc["L2H1", "chance_sd_model"] == 32**-0.5


def test_offsets_beside_z(llama):
    """z_norm is the mean norm of the head's z at the last token of each prompt."""
    lofit, prompts, norms = random_adapter(llama, HeadSet(HEADS)), ["Q: Who? A:", "Rome"], []
    for prompt in prompts:
        ids = torch.tensor([[1, *tiny.tokenizer()(prompt, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad(), hooked(hook_z(llama, 2), lambda z, hook: norms.append(z[0, -1, 1].norm().item())):
            llama(ids)
    found = geometry(llama, lofit, prompts=prompts).set_index("head")
    assert found.loc["L2H1", "z_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert found.loc["L2H1", "v_share"] == pytest.approx(float(lofit.v[2, 1].norm()) / np.mean(norms), rel=1e-5)


def test_two_adapters(llama):
    """On the head they share: opposite offsets have cosine -1; heads of one alone are left out."""
    a = random_adapter(llama, HeadSet(["L0H0", "L1H1", "L2H2"]))
    b = -2.0 * a.restrict(HeadSet(["L1H1"])) + random_adapter(llama, HeadSet(["L2H0"]))
    found = offset_cosines(a, b)
    assert found["head"].tolist() == ["L1H1"]
    assert found["cosine"][0] == pytest.approx(-1)
    assert found["norm_b"][0] == pytest.approx(2 * found["norm_a"][0])
    assert found["chance_sd"][0] == 8**-0.5
    assert offset_cosines(a, random_adapter(llama, HeadSet(["L0H1"]))).empty


def test_what_does_not_fit_is_refused(llama, loaded, backend):
    """Another shape of adapter, probes, reading vectors or second adapter; an empty list of prompts."""
    lofit = random_adapter(llama)
    with pytest.raises(AdapterError):
        geometry(loaded("llama-gqa", backend), lofit)
    with pytest.raises(InputError, match=r"probes of shape \(3, 4, 12\)"):
        geometry(llama, lofit, probes=probes(torch.zeros(3, 4, 12), torch.zeros(3, 4, 12), 1.0))
    reading = ReadingVectors((1,), torch.ones(1, 16), torch.ones(1), torch.ones(1), AdapterMeta())
    with pytest.raises(InputError, match="width 16"):
        geometry(llama, lofit, reading=reading)
    with pytest.raises(InputError, match="empty list"):
        geometry(llama, lofit, prompts=[])
    with pytest.raises(InputError, match="different models"):
        offset_cosines(lofit, Lofit((2, 4, 8)))
