"""Silenced heads: constants where their outputs were, as on the plain model; means over real tokens only."""

import contextlib

import pytest
import torch

from lofit_lens import HeadSet, attached
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.interventions import HeadAblation, mean_z
from lofit_lens.models import hook_z, hooked, logits_of
from tests import tiny
from tests.adapters import edited, output_projection, random_adapter
from tests.conftest import PAIRS

HEADS = HeadSet(["L2H1", "L0H3", "L2H0"])
PROMPTS = ["Q: In what country was the person born? A:", "Ann asked", "Rome"]
IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(4))


def ids_of(prompt):
    return torch.tensor([[1, *tiny.tokenizer()(prompt, add_special_tokens=False)["input_ids"]]])


@contextlib.contextmanager
def silenced(plain, ablation):
    """The same on plain Hugging Face, by pre-hooks on W_O."""

    def put(layer):
        def hook(module, args):
            z = args[0].unflatten(-1, ablation.shape[1:]).clone()
            for head, value in zip(ablation.heads, ablation.values, strict=True):
                if head.layer == layer:
                    z[:, :, head.head] = value
            return (z.flatten(-2),)

        return hook

    handles = [output_projection(plain, n).register_forward_pre_hook(put(n)) for n in range(3)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_means(plain, shape):
    """Mean input of W_O over all tokens of all prompts, one prompt at a time."""
    seen = {n: [] for n in range(3)}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for n in range(3):
            hook = lambda module, args, n=n: seen[n].append(args[0][0].unflatten(-1, shape[1:]))
            stack.callback(output_projection(plain, n).register_forward_pre_hook(hook).remove)
        for prompt in PROMPTS:
            plain(ids_of(prompt))
    return torch.stack([torch.cat(seen[n]).mean(dim=0) for n in range(3)])


@pytest.mark.parametrize(("architecture", "backend"), PAIRS)
def test_means_and_ablation_are_the_plain_models(loaded, hf, architecture, backend):
    """Means over the tokens of texts of different lengths (padding would shift them), and the logits with heads at them."""
    model, plain = loaded(architecture, backend), hf(architecture)
    means = mean_z(model, PROMPTS)
    torch.testing.assert_close(means, plain_means(plain, means.shape), atol=1e-5, rtol=1e-4)
    for ablation in (HeadAblation.of(model, HEADS, means=means), HeadAblation.of(model, HEADS)):
        with torch.no_grad(), silenced(plain, ablation):
            expected = plain(IDS).logits
        with torch.no_grad(), ablation.attached(model):
            found = logits_of(model, IDS, torch.ones_like(IDS))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert ablation.how == "zero"
    assert not ablation.values.any()


def test_other_heads_stay_bit_equal(llama):
    """In an edited layer only the silenced heads' z changes."""
    seen = []
    keep = lambda z, hook: seen.append(z.clone())
    for adapters in ((), (HeadAblation.of(llama, HeadSet(["L1H2"])),)):
        with torch.no_grad(), attached(llama, *adapters), hooked(hook_z(llama, 1), keep):
            llama(IDS)
    assert torch.equal(seen[0][:, :, [0, 1, 3]], seen[1][:, :, [0, 1, 3]])
    assert not seen[1][:, :, 2].any()


def test_order_of_attachment_decides(llama, hf):
    """Behind an adapter, the ablation undoes it; in front of it, its offset is added to the constant."""
    lofit, ablation = random_adapter(llama, HeadSet(["L1H2"])), HeadAblation.of(llama, HeadSet(["L1H2"]))

    def logits(*adapters):
        with torch.no_grad(), attached(llama, *adapters):
            return logits_of(llama, IDS, torch.ones_like(IDS))

    alone = logits(ablation)
    assert torch.equal(logits(lofit, ablation), alone)
    with torch.no_grad(), silenced(hf("llama"), ablation), edited(hf("llama"), lofit):
        expected = hf("llama")(IDS).logits
    torch.testing.assert_close(logits(ablation, lofit), expected, atol=1e-4, rtol=1e-4)
    assert (logits(ablation, lofit) - alone).abs().max() > 1e-3


def test_means_count_as_estimated_numbers_and_zeros_do_not(llama):
    """24 and 0."""
    assert HeadAblation.of(llama, HEADS, means=mean_z(llama, PROMPTS)).n_parameters == 24
    assert HeadAblation.of(llama, HEADS).n_parameters == 0


def test_a_subset_of_layers_can_be_asked_for(llama):
    """Means of the other layers stay 0."""
    every, some = mean_z(llama, PROMPTS), mean_z(llama, PROMPTS, layers=[1])
    assert torch.equal(some[1], every[1])
    assert not some[[0, 2]].any()


def test_bad_requests_say_what_to_give(llama, loaded, backend, unchecked):
    """No head, wrong values, unknown ways, another model, prompts that are none or too long."""
    with pytest.raises(InputError, match="at least one head"):
        HeadAblation.of(llama, HeadSet([]))
    with pytest.raises(InputError, match="means of shape"):
        HeadAblation.of(llama, HEADS, means=torch.zeros(3, 4, 9))
    with pytest.raises(InputError, match="one row per head"):
        HeadAblation((3, 4, 8), HEADS, values=torch.zeros(2, 8))
    with pytest.raises(InputError, match="NaN or infinite"):
        HeadAblation((3, 4, 8), HEADS, values=torch.full((3, 8), torch.nan))
    with pytest.raises(InputError, match=r"unknown ablation 'men'.*'mean'"):
        HeadAblation((3, 4, 8), HEADS, values=torch.zeros(3, 8), how="men")
    with (
        pytest.raises(AdapterError, match="d_head"),
        HeadAblation.of(llama, HEADS).attached(loaded("mistral", backend)),
    ):
        pass
    with pytest.raises(InputError, match="no prompt"):
        mean_z(llama, [])
    with pytest.raises(DataError, match="prompt 1 has"):
        mean_z(llama, ["x", "x " * 3000])
