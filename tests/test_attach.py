"""Adapters without a `with` block: `attach` and `detach`, and that nothing is left behind."""

import copy
import gc
import weakref

import pytest
import torch
from transformer_lens import patching

import lofit_lens as ll
from lofit_lens.errors import AdapterError
from lofit_lens.models import positions_of
from tests.adapters import random_adapter
from tests.shift import MLPShift, Shift, shift_of
from tests.test_adapters_base import TOKENS, run


def test_attach_and_detach(llama):
    """The edit stays until `detach`, which leaves the model bit-equal; the pair can be repeated, and a block be had after it."""
    adapter, before = shift_of(llama), run(llama)
    inside = run(llama, adapter)
    for _ in range(2):
        assert adapter.attach(llama) is adapter
        llama.reset_hooks()  # of the user's own work
        assert torch.equal(run(llama), inside)
        adapter.detach()
        assert torch.equal(run(llama), before)
    assert torch.equal(run(llama, adapter), inside)
    assert not positions_of(llama)


def test_two_adapters_go_in_any_order(llama):
    """They act in the order of attaching; whichever goes first leaves the other one's edit alone."""
    one, other, before = shift_of(llama), shift_of(llama, kind=MLPShift, scale=0.5), run(llama)
    with ll.attached(llama, one, other):
        both = run(llama)
    for first, last in ((one, other), (other, one)):
        one.attach(llama)
        other.attach(llama)
        assert torch.equal(run(llama), both)
        first.detach()
        assert torch.equal(run(llama), (last.detach(), run(llama, last))[1])
        assert torch.equal(run(llama), before)


def test_wrong_attaching_is_refused(llama):
    """Twice, by both ways; detaching what is not attached, or by a block; another shape. Each leaves things as they were."""
    adapter, before = shift_of(llama), run(llama)
    with pytest.raises(AdapterError, match=r"not attached; attach\(model\)"):
        adapter.detach()
    with adapter.attached(llama):
        inside = run(llama)
        with pytest.raises(AdapterError, match="by a `with` block"):
            adapter.detach()
        with pytest.raises(AdapterError, match="already attached"):
            adapter.attach(llama)
        assert torch.equal(run(llama), inside)
    adapter.attach(llama)
    with pytest.raises(AdapterError, match=r"already attached; detach\(\) it"):
        adapter.attach(llama)
    with pytest.raises(AdapterError, match="already attached"), adapter.attached(llama):
        pass
    assert torch.equal(run(llama), inside)
    adapter.detach()
    wrong = Shift(torch.zeros(1, 31), [0], 3)
    with pytest.raises(AdapterError, match="width 31"):
        wrong.attach(llama)
    with pytest.raises(AdapterError, match="not attached"):
        wrong.detach()
    assert torch.equal(run(llama), before)
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())


def test_a_copy_of_what_is_attached_is_not_attached(llama):
    """It can be attached beside it, and detaches alone; files are the same."""
    adapter = shift_of(llama).attach(llama)
    try:
        once, twin = run(llama), copy.deepcopy(adapter)
        with pytest.raises(AdapterError, match="not attached"):
            twin.detach()
        twin.attach(llama)
        assert not torch.equal(run(llama), once)
        twin.detach()
        assert torch.equal(run(llama), once)
    finally:
        adapter.detach()


def test_what_is_attached_goes_with_its_model(checkpoint, backend):
    """Nothing keeps a model or an adapter alive, or leaves an adapter counted as attached, once nobody holds them."""
    model = ll.load_model(checkpoint("llama"), backend=backend, device="cpu")
    gone = [weakref.ref(model), weakref.ref(shift_of(model).attach(model))]
    del model
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_transformer_lens_own_tools_see_the_edit(llama):
    """`run_with_cache` gives the edited logits and z; patching puts one head's edited z into the model without the adapter."""
    lofit = random_adapter(llama, ll.HeadSet(["L0H3"]), v=2.0).attach(llama)
    try:
        edited, cache = llama.run_with_cache(TOKENS)
        assert torch.equal(edited, llama(TOKENS))
    finally:
        lofit.detach()
    bare = llama(TOKENS)
    assert not torch.equal(bare, edited)
    found = patching.get_act_patch_attn_head_out_all_pos(
        llama, TOKENS, cache, lambda logits: (logits - bare).abs().max()
    )
    assert found.shape == (3, 4)
    assert found[0, 3] == pytest.approx((edited - bare).abs().max().item(), rel=1e-5)  # all that was edited
    assert found[0, :3].max() < 1e-6
    assert torch.equal(llama(TOKENS), bare)


def test_hooks_that_were_reset_are_no_error(llama):
    """`reset_hooks(including_permanent=True)` takes the edit away; detaching is quiet all the same."""
    before, adapter = run(llama), shift_of(llama).attach(llama)
    llama.reset_hooks(including_permanent=True)
    assert torch.equal(run(llama), before)
    adapter.detach()
    assert torch.equal(run(llama, adapter), run(llama, copy.deepcopy(adapter)))
