"""A ranking of heads that is mostly the random start is told from one that training made."""

import logging

import numpy as np
import pytest
import torch

from lofit_lens import HeadSet, Lofit, TrainConfig, load_model, load_task, select_heads
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.training.config import PAPER
from lofit_lens.training.lofit import learned_scores, trained_share


def moved(steps, *, std=0.1, seed=3, shape=(2, 2, 4)):
    """An adapter whose A is its random start and, head by head, a step of this size away from it; every entry alike."""
    lofit = Lofit(shape, HeadSet.all(shape[:2]), meta=AdapterMeta(seed=seed, config={"init_std": std}))
    lofit.init_("A", seed=seed, std=std)
    with torch.no_grad():
        for head, step in zip(lofit.heads, steps, strict=True):
            lofit.A[head] += step
    return lofit


def test_the_share_by_hand():
    """Squared correlation of |A| with |A - A_0|, where A_0 is drawn anew; |A - A_0| of a head is twice its step (4 entries)."""
    lofit, steps = moved([0.0, 0.1, 0.2, 0.4]), np.array([0.0, 0.1, 0.2, 0.4])
    norms = lofit.A.detach().norm(dim=-1).flatten().numpy()
    assert trained_share(lofit, "A") == pytest.approx(np.corrcoef(norms, 2 * steps)[0, 1] ** 2, rel=1e-5)
    assert trained_share(moved([1.0, 2.0, 3.0, 4.0]), "A") > 0.99
    assert trained_share(moved([0.0] * 4), "A") == 0.0
    again = moved([3.0, 2.0, 1.0, 0.5], std=5.0)
    start = again.A.detach().clone().norm(dim=-1)
    assert trained_share(again, "A") == pytest.approx(
        max(0.0, np.corrcoef(start.flatten().numpy(), [6.0, 4.0, 2.0, 1.0])[0, 1]) ** 2, rel=1e-4
    )


def test_an_unknown_start_says_nothing(caplog):
    """No seed or no spread of the start in the provenance, or two heads: there is nothing to compare, and no warning."""
    two = Lofit((2, 2, 4), ["L0H0", "L1H1"], meta=AdapterMeta(seed=0, config={"init_std": 0.1}))
    for lofit in (Lofit((2, 2, 4), HeadSet.all((2, 2))), two):
        assert trained_share(lofit, "A") is None
        assert "trained_share" not in learned_scores(lofit, "A", kind="A-norm").meta
    assert not caplog.records


def test_one_step_at_a_tiny_rate_is_said(llama, caplog):
    """Epochs and learning rate are named, with what they are; the scores keep the share. A step of any size is no ranking."""
    task = load_task("organism/truth")
    for lr in (1e-6, 1e-2):
        caplog.clear()
        scores = select_heads(
            llama, task, seed=0, n_train=8, config=TrainConfig(lr=lr, epochs=2, max_steps=1), progress=False
        )
        (said,) = [r.getMessage() for r in caplog.records if "scores of heads by A-norm" in r.getMessage()]
        assert "train for more epochs (epochs=2, max_steps=1) or with a higher learning rate" in said
        assert f"(lr={lr:g})" in said
        assert 0 <= scores.meta["trained_share"] < 0.5


@pytest.fixture(scope="module")
def organism():
    return load_model("organism", device="cpu")


def silent(caplog, scores):
    return scores.meta["trained_share"] > 0.9 and not any("scores of heads" in r.getMessage() for r in caplog.records)


def test_a_usual_run_of_the_embedded_model_is_silent(organism, caplog):
    """With a part of the rows, 6 steps."""
    with caplog.at_level(logging.WARNING):
        assert silent(caplog, select_heads(organism, "organism/truth", seed=0, n_train=16, progress=False))


@pytest.mark.slow
def test_the_presets_usual_runs_are_silent(organism, caplog):
    """The embedded model's own on its three tasks, and all of the paper's rates and penalties on 152 rows of five epochs."""
    usual = [(f"organism/{t}", None) for t in ("truth", "kinship", "edits")]
    paper = {(p.select.lr, p.select.l1) for models in PAPER.values() for p in models.values()}
    with caplog.at_level(logging.WARNING):
        for task, config in [*usual, *(("organism/truth", TrainConfig(lr=lr, l1=l1)) for lr, l1 in paper)]:
            assert silent(caplog, select_heads(organism, task, seed=0, config=config, progress=False)), (task, config)
