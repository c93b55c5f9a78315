"""LoFiT's laws: what the edit is, that it comes and goes without a trace, and that only chosen heads learn."""

import copy

import pytest
import torch

from lofit_lens import HeadSet, Lofit, attached, edit_z, generate
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.models import extend, frozen, hook_z, load_model, logits_of, model_info, prefill, step
from tests import tiny
from tests.adapters import CHOSEN, edited, random_adapter
from tests.conftest import PAIRS, needs_hooked
from tests.test_hook_access import processed_gpt2

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)


@torch.no_grad()
def run(model):
    return logits_of(model, TOKENS, MASK)


# -------------------------------------------------------------------------------------------------- the edit


def test_the_edit_by_hand():
    """z = 2, A = 0.5, v = -1: (1 + 0.5) * 2 - 1 = 2; each head has its own A and v."""
    z = torch.full((1, 1, 2, 1), 2.0)
    out = edit_z(z, torch.tensor([[0.5], [0.0]]), torch.tensor([[-1.0], [3.0]]))
    assert out.flatten().tolist() == [2.0, 5.0]  # and 2 * 1 + 3 = 5


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
@torch.no_grad()
def test_a_hooked_run_is_plain_hugging_face_with_the_edit_at_w_o(loaded, hf, architecture, on):
    """With random A and v, logits equal those of plain Hugging Face edited at W_O's input, on every architecture."""
    model, plain = loaded(architecture, on), hf(architecture)
    lofit = random_adapter(model)
    with lofit.attached(model):
        got = run(model)
    with edited(plain, lofit):
        expected = plain(TOKENS).logits
    assert (got - expected).abs().max() < 1e-5
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05  # the edit is worth comparing


@pytest.mark.parametrize("heads", [None, CHOSEN])
def test_the_zero_adapter_is_bit_equal(llama, heads):
    """A = v = 0 changes not a bit, on some heads and on all."""
    before = run(llama)
    with Lofit.for_model(llama, heads).attached(llama):
        assert torch.equal(run(llama), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_adapter_on_a_half_precision_base(checkpoint, backend, dtype):
    """The zero adapter is bit-equal, z keeps its dtype, and gradients arrive in float32."""
    model = load_model(checkpoint("llama"), backend=backend, dtype=dtype, device="cpu")
    before, lofit = run(model), Lofit.for_model(model, CHOSEN).train_only("v")
    with lofit.attached(model):
        assert torch.equal(run(model), before)
        logits_of(model, TOKENS, MASK).float().logsumexp(-1).sum().backward()
    assert lofit.v.dtype == lofit.v.grad.dtype == torch.float32
    assert all(lofit.v.grad[h].abs().sum() > 0 for h in lofit.heads)
    with random_adapter(model).attached(model):
        assert (run(model) - before).abs().max() > 0.05


# ------------------------------------------------------------------------------------------- coming and going


class _Fails(Exception):
    pass


def test_detaching_is_bit_equal_after_success_and_after_an_exception(llama):
    """The edit shows inside and leaves nothing behind, whatever ends the block."""
    before, lofit = run(llama), random_adapter(llama)
    with lofit.attached(llama):
        inside = run(llama)
    assert torch.equal(run(llama), before)
    with pytest.raises(_Fails, match="True"), lofit.attached(llama):
        raise _Fails(torch.equal(run(llama), inside))
    assert torch.equal(run(llama), before)
    assert (inside - before).abs().max() > 0.05
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())


def test_the_users_own_hooks_survive(llama):
    """Hooks put on before, permanent or not, are there during and after, and reset_hooks() leaves the edit in."""
    seen, point, lofit = [], hook_z(llama, 2), random_adapter(llama)
    point.add_hook(lambda z, hook: seen.append("temporary"))
    point.add_hook(lambda z, hook: seen.append("permanent"), is_permanent=True)
    try:
        with lofit.attached(llama):
            inside = run(llama)
            assert seen == ["temporary", "permanent"]
        run(llama)
        assert seen == ["temporary", "permanent"] * 2
        with lofit.attached(llama):
            llama.reset_hooks()
            assert torch.equal(run(llama), inside)
        assert seen == [*["temporary", "permanent"] * 2, "permanent"]
        with lofit.attached(llama):
            llama.reset_hooks(including_permanent=True)  # the user's decision: the edit is gone, and leaving is quiet
            assert not torch.equal(run(llama), inside)
    finally:
        llama.reset_hooks(including_permanent=True)


@torch.no_grad()
def test_run_with_cache_sees_the_edited_z(llama):
    """The cache holds z after the edit in edited layers: (1 + A) z + v."""
    name, lofit = "blocks.0.attn.hook_z", random_adapter(llama, HeadSet(["L0H3"]))
    _, before = llama.run_with_cache(TOKENS)
    with lofit.attached(llama):
        _, after = llama.run_with_cache(TOKENS)
    assert torch.allclose(after[name], edit_z(before[name], lofit.A[0], lofit.v[0]), atol=1e-6)
    assert not torch.allclose(after[name], before[name], atol=0.1)


def test_attaching_twice_is_refused_and_the_first_stays(llama):
    """An adapter is on one model at a time; a copy may go beside it."""
    lofit = random_adapter(llama)
    with lofit.attached(llama):
        inside = run(llama)
        with pytest.raises(AdapterError, match="already attached"), lofit.attached(llama):
            pass
        assert torch.equal(run(llama), inside)
    with lofit.attached(llama):
        assert torch.equal(run(llama), inside)


def test_a_copy_may_be_attached_beside_the_original(llama):
    """As the error of attaching twice says: a copy is not attached, and does not hold a copy of the model."""
    lofit = random_adapter(llama)
    with lofit.attached(llama):
        twin = copy.deepcopy(lofit)
        with twin.attached(llama):
            twice = run(llama)
    with attached(llama, lofit, random_adapter(llama)):
        assert torch.equal(run(llama), twice)


def test_an_attached_adapter_does_not_own_the_model(llama):
    """parameters() and state_dict() are A and v alone, attached or not; .train() does not reach the model."""
    lofit = random_adapter(llama)
    for _ in range(2):
        with lofit.attached(llama):
            assert {n for n, _ in lofit.named_parameters()} == set(lofit.state_dict()) == {"A", "v"}
            lofit.train()
            assert not any(m.training for m in llama.modules())


def test_an_adapter_of_another_shape_is_refused(llama, loaded, backend):
    """Layers or heads, or d_head, that do not fit are named, and nothing is attached."""
    before = run(llama)
    other = Lofit((4, 4, 8), HeadSet(["L0H0"]))
    with pytest.raises(AdapterError, match=r"4 layers of 4 heads.* has 3 of 4"), other.attached(llama):
        pass
    wide = random_adapter(loaded("mistral", backend))  # d_head 12
    with pytest.raises(AdapterError, match=r"d_head 12; .* has 8"), wide.attached(llama):
        pass
    assert torch.equal(run(llama), before)


def test_another_base_model_of_the_same_shape_is_told(bridge_llama, tmp_path, recwarn, caplog):
    """Attaching to a model of another name and other weights is possible, and both are named in a warning."""
    other = load_model(tiny.save(tmp_path / "another-llama", seed=1), backend="bridge", device="cpu")
    with random_adapter(bridge_llama).attached(other):
        pass
    assert "another-llama" in caplog.text + " ".join(str(w.message) for w in recwarn)


@needs_hooked
def test_scaling_a_model_with_folded_value_biases_is_refused(loaded):
    """A means something else there: refused. v alone is the same edit: a warning, and the same change of logits."""
    model, plain = processed_gpt2(loaded, fold_ln=True), loaded("gpt2", "hooked")
    with pytest.raises(AdapterError, match="folded into b_O"), random_adapter(model).attached(model):
        pass
    offsets = random_adapter(plain, A=0.0)
    with offsets.attached(plain):
        expected = run(plain).log_softmax(-1)
    offsets.meta.model = model_info(model)
    with pytest.warns(UserWarning, match="processed weights"), offsets.attached(model):
        assert torch.allclose(run(model).log_softmax(-1), expected, atol=1e-4)


def test_several_adapters_act_in_the_order_given(llama, hf):
    """attached(model, a, b): z -> (1 + A_b) ((1 + A_a) z + v_a) + v_b, and none is left afterwards."""
    a, b = random_adapter(llama, HeadSet(["L1H2"]), seed=1), random_adapter(llama, HeadSet(["L1H2"]), seed=2)
    folded = Lofit.for_model(llama, a.heads)
    with torch.no_grad():
        folded.A.copy_(torch.where(a.mask[..., None], (1 + a.A) * (1 + b.A) - 1, 0))
        folded.v.copy_((1 + b.A) * a.v + b.v)
        before = run(llama)
        with folded.attached(llama):
            expected = run(llama)
        with attached(llama, a, b):
            assert torch.allclose(run(llama), expected, atol=1e-5)
        with attached(llama, b, a):
            assert not torch.allclose(run(llama), expected, atol=1e-3)
        with pytest.raises(AdapterError), attached(llama, a, Lofit((1, 1, 1))):
            pass
        assert torch.equal(run(llama), before)


# --------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(("architecture", "on"), [p for p in PAIRS if p.values[0] in ("llama-gqa", "gemma", "gpt2")])
@torch.no_grad()
def test_cached_decoding_equals_the_full_pass_with_an_adapter(loaded, architecture, on):
    """Prefill, an extension and steps give the full pass's logits while the edit is on."""
    model = loaded(architecture, on)
    with random_adapter(model).attached(model):
        whole = run(model)
        first, state = prefill(model, TOKENS[:, :5], MASK[:, :5])
        middle, state = extend(model, state, TOKENS[:, 5:8])
        parts = [first, middle]
        for i in (8, 9):
            logits, state = step(model, state, TOKENS[:, i])
            parts.append(logits[:, None])
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_training_works_after_generating_in_inference_mode(llama):
    """Nothing made in inference mode is kept: gradients flow, and they are those of a fresh adapter."""
    gradients = []
    for generate_first in (True, False):
        lofit = random_adapter(llama).train_only("v")
        with lofit.attached(llama):
            if generate_first:
                with torch.inference_mode():
                    generate(llama, ["Ann"], max_new_tokens=3)
                with torch.no_grad():
                    run(llama)
            logits_of(llama, TOKENS, MASK).logsumexp(-1).sum().backward()
        gradients.append(lofit.v.grad)
    assert torch.equal(*gradients)


# --------------------------------------------------------------------------------------- who learns, who does not


@pytest.mark.parametrize("component", ["A", "v"])
def test_only_the_chosen_heads_learn(checkpoint, backend, component):
    """Inside the mask every head gets a gradient; outside it none and no step moves it; the base gets none."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    model.requires_grad_(True)
    lofit = Lofit.for_model(model, CHOSEN).init_(component, seed=1).train_only(component)
    trained = getattr(lofit, component)
    optimizer = torch.optim.AdamW([trained], lr=0.1, weight_decay=0.1)
    with frozen(model), lofit.attached(model):
        for _ in range(3):
            optimizer.zero_grad()
            logits_of(model, TOKENS, MASK).logsumexp(-1).sum().backward()
            assert bool((trained.grad[~lofit.mask] == 0).all())
            assert all(bool((trained.grad[h] != 0).any()) for h in lofit.heads)
            optimizer.step()
    assert bool((trained[~lofit.mask] == 0).all())
    assert bool((trained[lofit.mask].abs() > 0.05).all())
    other = lofit.v if component == "A" else lofit.A
    assert other.grad is None
    assert not bool(other.any())
    assert all(p.grad is None for p in model.parameters())


def test_numbers_outside_the_mask_have_no_effect(llama):
    """Whatever stands outside the chosen heads is not applied."""
    lofit = random_adapter(llama)
    with lofit.attached(llama):
        expected = run(llama)
        with torch.no_grad():
            lofit.A[~lofit.mask] = 7.0
            lofit.v[~lofit.mask] = float("nan")
        assert torch.equal(run(llama), expected)


def test_a_head_outside_or_no_head_is_refused(llama):
    """The head is named; an empty set says what to give."""
    with pytest.raises(InputError, match="L3H0"):
        Lofit.for_model(llama, HeadSet(["L3H0"]))
    with pytest.raises(InputError, match="at least one head"):
        Lofit.for_model(llama, HeadSet([]))


def test_small_scalings_count_over_half_precision():
    """A = 0.003 changes a bfloat16 z, although 1 + 0.003 is 1 in bfloat16 (its step above 1 is 1/128)."""
    z = torch.full((1, 1, 1, 64), 1.0, dtype=torch.bfloat16) * torch.linspace(1, 2, 64).bfloat16()
    A, v = torch.full((1, 64), 0.003), torch.zeros(1, 64)
    assert (1 + A.bfloat16() == 1).all()
    changed = edit_z(z, A, v)
    assert changed.dtype == torch.bfloat16
    assert (changed != z).any(), "some entries are rounded to the next number"
    assert torch.equal(edit_z(z, 0 * A, v), z)


def test_heads_of_another_model_are_refused(bridge_llama):
    """A head set that names another grid does not fit, even where its heads exist here."""
    with pytest.raises(InputError, match=r"32 layers x 32 heads; this one has 3 x 4"):
        Lofit.for_model(bridge_llama, HeadSet(["L0H0"], shape=(32, 32)))


def test_a_sum_says_what_it_is(bridge_llama):
    """Algebra makes an adapter of its own, which does not pass for one of its parts."""
    one, other = random_adapter(bridge_llama), random_adapter(bridge_llama, seed=1)
    one.meta.task, one.meta.seed, other.meta.task = "a", 7, "b"
    joint = one + 0.5 * other
    assert (joint.meta.task, joint.meta.seed) == ("a and b", None)
    assert joint.meta.config["made_by"] == "sum"
    assert one.meta.seed == 7
