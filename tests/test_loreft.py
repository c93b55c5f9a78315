"""LoReFT alone: its formula, the coordinates of R, its random start, its files; the rest is in test_trained_methods."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations

from lofit_lens import TrainConfig
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.interventions import LoReft
from lofit_lens.interventions.files import WEIGHTS_FILE
from lofit_lens.interventions.loreft import coordinates, edit_subspace, orthonormal_rows
from lofit_lens.models import Borders, hooked, logits_of, residual_point
from lofit_lens.training.fitting import fit
from tests import golden


def rows(rank, d_model, seed=0):
    return torch.linalg.qr(torch.randn(d_model, rank, generator=torch.Generator().manual_seed(seed))).Q.mT.contiguous()


def off(R):
    """How far rows are from orthonormal."""
    return (R @ R.mT - torch.eye(R.shape[-2])).abs().max()


# ------------------------------------------------------------------------------------------------------- the edit


def test_the_edit_by_hand():
    """R = (0.6, 0.8), W = (2, 3), b = 0.5, h = (1, 4): W h + b = 14.5, R h = 3.8, so h + 10.7 R = (7.42, 12.56)."""
    R, W, b = torch.tensor([[0.6, 0.8]]), torch.tensor([[2.0, 3.0]]), torch.tensor([0.5])
    assert torch.allclose(edit_subspace(torch.tensor([1.0, 4.0]), R, W, b), torch.tensor([7.42, 12.56]))


def test_only_the_subspace_changes():
    """R of the new h is W h + b; what is orthogonal to R's rows stays."""
    generator = torch.Generator().manual_seed(2)
    R, W, b, h = rows(3, 8), *(torch.randn(*n, generator=generator) for n in ((3, 8), (3,), (5, 8)))
    new = edit_subspace(h, R, W, b)
    assert torch.allclose(new @ R.T, h @ W.T + b, atol=1e-5)
    rest = torch.eye(8) - R.T @ R
    assert torch.allclose(new @ rest, h @ rest, atol=1e-5)


def test_the_paper_s_formula_in_float64():
    """h + R^T (W h + b - R h) term by term; numbers are float32, the result is of h's type."""
    generator = torch.Generator().manual_seed(3)
    R, W, b = rows(4, 16), torch.randn(4, 16, generator=generator), torch.randn(4, generator=generator)
    h = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    wide = [t.double() for t in (R, W, b)]
    expected = h + (h @ wide[1].T + wide[2] - h @ wide[0].T) @ wide[0]
    assert torch.allclose(edit_subspace(h, R, W, b), expected, rtol=0, atol=1e-12)


def test_half_precision_is_rounded_once():
    """Over bfloat16 the result is the float32 one of the same h, rounded."""
    generator = torch.Generator().manual_seed(3)
    R, W, b = rows(4, 16), torch.randn(4, 16, generator=generator), torch.randn(4, generator=generator)
    h = torch.randn(2, 5, 16, generator=generator).bfloat16()
    assert torch.equal(edit_subspace(h, R, W, b), edit_subspace(h.float(), R, W, b).bfloat16())


def test_the_edit_is_pyreft_s():
    """The public implementation (pyreft), given the same R, W and b, where it is installed."""
    pyreft = pytest.importorskip("pyreft")
    generator = torch.Generator().manual_seed(4)
    R, W, b = rows(8, 64), torch.randn(8, 64, generator=generator), torch.randn(8, generator=generator)
    theirs = pyreft.LoreftIntervention(embed_dim=64, low_rank_dimension=8, dtype=torch.float32)
    theirs.rotate_layer.weight = R.T
    theirs.learned_source.load_state_dict({"weight": W, "bias": b})
    h = torch.randn(2, 5, 64, generator=generator)
    difference = (theirs(h) - edit_subspace(h, R, W, b)).abs().max()
    assert difference < 1e-5


# -------------------------------------------------------------------------------------------------- coordinates of R


@pytest.mark.parametrize(("d_model", "rank"), [(1, 1), (6, 1), (6, 6), (40, 8)])
def test_coordinates_give_back_the_rows(d_model, rank):
    """R -> X -> R to rounding, for random rows and for rows of +- the identity, where there is nothing to reflect."""
    for R in (
        rows(rank, d_model),
        torch.eye(rank, d_model),
        -torch.eye(rank, d_model),
        torch.eye(d_model).flip(0)[:rank],
    ):
        X = coordinates(R)
        assert X.shape == (d_model, rank)
        assert torch.allclose(orthonormal_rows(X), R, atol=1e-5)


def test_rows_are_the_product_of_reflections():
    """By the definition, one reflection after the other; above the diagonal X has no say, on it only its sign."""
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(7, 3, generator=generator)
    product = torch.eye(7)
    for i in range(3):
        v = X[:, i].clone()
        v[:i], v[i] = 0, 1
        product = product @ (torch.eye(7) - 2 * torch.outer(v, v) / v.dot(v))
    assert torch.allclose(orthonormal_rows(X), (product[:, :3] * X.diagonal().sign()).T, atol=1e-6)
    other = X + torch.triu(torch.ones(7, 3), 1)
    other[torch.arange(3), torch.arange(3)] *= 5
    assert torch.equal(orthonormal_rows(other), orthonormal_rows(X))


def test_rows_are_those_of_pytorch_s_parametrization():
    """`orthogonal(..., "householder", use_trivialization=False)` with the same coordinates."""
    layer = torch.nn.Linear(8, 30, bias=False)
    parametrizations.orthogonal(layer, orthogonal_map="householder", use_trivialization=False)
    X = layer.parametrizations.weight.original
    assert torch.allclose(orthonormal_rows(X), layer.weight.mT, atol=1e-5)
    with torch.no_grad():
        X.add_(torch.randn(30, 8, generator=torch.Generator().manual_seed(6)).tril(-1))
    assert torch.allclose(orthonormal_rows(X), layer.weight.mT, atol=1e-5)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_rows_are_orthonormal_whatever_the_coordinates(size):
    """Small, middling, large numbers, at a width of 1024: R R^T = I to 1e-5."""
    X = torch.randn(1024, 8, generator=torch.Generator().manual_seed(7)) * size
    assert off(orthonormal_rows(X)) < 1e-5


def test_gradients_of_the_rows():
    """Against finite differences in float64; the signs on the diagonal get none."""
    X = coordinates(rows(3, 6).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: orthonormal_rows(x + torch.zeros_like(x).triu()), X)
    orthonormal_rows(X).pow(3).sum().backward()
    assert (X.grad.tril(-1) != 0).sum() == 3 * 6 - 6
    assert not X.grad.triu().any()


def test_rows_stay_orthonormal_in_training(bridge_llama):
    """After steps of a large rate R has moved, and R R^T = I to 1e-5 in every layer."""
    adapter = LoReft.for_model(bridge_llama, seed=0)
    before = adapter.R.detach()
    assert off(before) < 1e-5
    fit(adapter, bridge_llama, golden.sft_task(), TrainConfig(lr=0.1, epochs=5), seed=0, progress=False)
    assert off(adapter.R) < 1e-5
    assert ((adapter.R - before).flatten(1).norm(dim=1) > 0.3).all()


# -------------------------------------------------------------------------------------------------- start, counts, files


def test_the_start_is_that_of_linear_layers_and_random_rows():
    """W and b within 1 / sqrt(d_model) and filling that range, R orthonormal, each layer its own; trainable."""
    adapter = LoReft(3, 64, rank=4).reset_(0)
    for p in (adapter.W, adapter.b):
        assert 0.09 < p.abs().max() <= 1 / 8
    assert adapter.W.mean().abs() < 0.01
    assert off(adapter.R) < 1e-5
    assert not torch.equal(adapter.R[0], adapter.R[1])
    assert not torch.equal(adapter.W[0], adapter.W[1])
    assert all(p.requires_grad for p in adapter.parameters())


def test_the_seed_makes_the_start(bridge_llama):
    """The same seed the same numbers, another seed others; a second draw forgets the first, and training may begin again."""
    adapter = LoReft(2, 16, rank=2).reset_(1)
    first = {n: p.clone() for n, p in adapter.named_parameters()}
    adapter.requires_grad_(False).reset_(2)
    assert all(not torch.equal(p, first[n]) and p.requires_grad for n, p in adapter.named_parameters())
    adapter.reset_(1)
    assert all(torch.equal(p, first[n]) for n, p in adapter.named_parameters())
    made, wanted = LoReft.for_model(bridge_llama, seed=5, rank=2), LoReft(3, 32, rank=2).reset_(5)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), wanted.parameters(), strict=True))
    assert (made.meta.seed, made.meta.model.n_layers) == (5, 3)


@pytest.mark.parametrize("rank", [0, 17])
def test_ranks_that_cannot_be_are_refused(rank):
    """Below 1, above the width."""
    with pytest.raises(InputError, match=f"rank is {rank}; give 1 to 16"):
        LoReft(2, 16, rank=rank)


def test_unknown_positions_are_refused(bridge_llama):
    """Before anything is made."""
    with pytest.raises(InputError, match="f7"):
        LoReft.for_model(bridge_llama, seed=0, positions="first")


def test_files_hold_plain_matrices(bridge_llama, tmp_path):
    """R itself, and its coordinates, by which it comes back bit for bit.

    Rows that are not orthonormal, and coordinates of another R, are refused; rank and positions are kept.
    """
    adapter = LoReft.for_model(bridge_llama, seed=0, rank=3, positions="f2+l1")
    file = adapter.save_pretrained(tmp_path / "x") / WEIGHTS_FILE
    tensors = load_file(file)
    assert torch.equal(tensors["R"], adapter.R)
    read = LoReft.from_pretrained(tmp_path / "x")
    assert torch.equal(read.R, adapter.R)
    assert torch.equal(read.W, adapter.W)
    assert (read.rank, str(read.positions)) == (3, "f2+l1")
    for changed, message in (
        ({"R": tensors["R"] * 1.01}, "R is not orthonormal"), ({"X": tensors["X"].flip(0)}, "its coordinates X are another's"),
        ({"X": tensors["X"] * float("inf")}, "NaN or infinity"), ({"X": tensors["X"].mT.contiguous()}, "X is .* expected"),
    ):  # fmt: skip
        save_file({**tensors, **changed}, file)
        with pytest.raises(AdapterError, match=message):
            LoReft.from_pretrained(tmp_path / "x")


@torch.no_grad()
def test_the_prompt_s_first_and_last_tokens_are_edited(llama):
    """Two rows, padded on the right: of 6 prompt tokens f2+l1 edits 0, 1 and 5; of 2 both; never answer or padding."""
    adapter, seen = LoReft.for_model(llama, seed=0, layers=[0], positions="f2+l1"), []
    tokens = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(8))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    borders = Borders(torch.tensor([6, 2]), torch.tensor([9, 4]))
    point = residual_point(llama, 0, "hook_resid_post")

    def look():
        with hooked(point, lambda x, hook: seen.append(x.clone())):
            logits_of(llama, tokens, mask, borders)

    look()
    with adapter.attached(llama):
        look()
    changed = (seen[0] != seen[1]).any(dim=-1)
    assert [torch.nonzero(row).flatten().tolist() for row in changed] == [[0, 1, 5], [0, 1]]
    expected = edit_subspace(seen[0], adapter.R[0], adapter.W[0], adapter.b[0])
    assert torch.allclose(seen[1][changed], expected[changed], atol=1e-6)
