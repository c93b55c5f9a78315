"""RED alone: its formula, counts and start; what it has in common with LoReFT and LoRA is in test_trained_methods."""

import torch

from lofit_lens.interventions import Red
from lofit_lens.interventions.red import scale_and_shift
from lofit_lens.models import hooked, logits_of, residual_point

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))


def test_the_edit_by_hand():
    """s = (2, 0), b = (-1, 3): (5, 7) becomes (2 * 5 - 1, 0 * 7 + 3) at every position."""
    x = torch.tensor([[[5.0, 7.0], [1.0, 1.0]]])
    out = scale_and_shift(x, torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 3.0]))
    assert out.tolist() == [[[9.0, 3.0], [1.0, 3.0]]]


def test_half_precision_is_rounded_once():
    """1.001 * 3 + 0.01 over bfloat16 is the float32 result rounded; s itself would be 1 in bfloat16."""
    x = torch.full((1, 1, 1), 3.0, dtype=torch.bfloat16)
    out = scale_and_shift(x, torch.tensor([1.004]), torch.tensor([0.01]))
    assert out.dtype == torch.bfloat16
    assert out.item() == torch.tensor(3.0 * 1.004 + 0.01).bfloat16().item() != 3.0


@torch.no_grad()
def test_it_acts_on_the_mlp_output_of_each_layer_with_its_own_numbers(llama):
    """What a later hook sees at hook_mlp_out is s x + b of that layer; the residual stream before it is untouched."""
    red, seen = Red.for_model(llama, layers=[1]), {}
    red.s.normal_(generator=torch.Generator().manual_seed(0))
    red.b.normal_(generator=torch.Generator().manual_seed(1))

    def record(name):
        def hook(x, hook):
            seen.setdefault(name, []).append(x.clone())

        return hook

    at = {f"{n} {site}": residual_point(llama, n, site) for n in (0, 1) for site in ("hook_mlp_out", "hook_resid_post")}
    with hooked(at["0 hook_resid_post"], record("below")), hooked(at["1 hook_mlp_out"], record("bare")):
        logits_of(llama, TOKENS, torch.ones_like(TOKENS))
    with (
        red.attached(llama),
        hooked(at["0 hook_resid_post"], record("below")),
        hooked(at["1 hook_mlp_out"], record("edited")),
    ):
        logits_of(llama, TOKENS, torch.ones_like(TOKENS))
    assert torch.equal(*seen["below"])
    assert torch.allclose(seen["edited"][0], seen["bare"][0] * red.s[0] + red.b[0], atol=1e-6)


def test_the_start_and_the_count():
    """s = 1, b = 0, both trainable; Llama-2-7B has 2 * 4096 * 32 = 262,144 of them, one layer 8,192."""
    red = Red(32, 4096)
    assert (red.s == 1).all()
    assert not red.b.any()
    assert red.s.requires_grad
    assert red.b.requires_grad
    assert (red.n_parameters, Red(32, 4096, layers=[5]).n_parameters) == (262_144, 8_192)
    assert (red.layers, red.method, red.title) == (tuple(range(32)), "red", "RED")
