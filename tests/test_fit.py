"""`fit`: any adapter learns a task at its positions, inside or outside of the model, and nothing is left behind."""

import pytest
import torch
from torch import nn

from lofit_lens import Task, TrainConfig
from lofit_lens.errors import AdapterError, DataError, InputError, TrainingDiverged
from lofit_lens.training import FAST, reference_log_probs, row_order
from lofit_lens.training.fitting import fit
from lofit_lens.training.objective import Steps
from tests import golden
from tests.shift import Shift, shift_of
from tests.test_adapters_base import run

CONFIG = TrainConfig(lr=5e-2, epochs=2, batch_size=4)  # 3 steps an epoch


def fitted(model, task=None, positions="all", config=CONFIG, **options):
    adapter = shift_of(model, positions, scale=0.0).requires_grad_(True)
    fit(adapter, model, task or golden.sft_task(), config, seed=1, progress=False, **options)
    return adapter


@pytest.mark.parametrize("positions", ["all", "answer", "predicting", "f3+l2"])
@pytest.mark.parametrize("kind", golden.TASKS)
def test_any_adapter_learns_at_its_positions(llama, kind, positions):
    """The loss falls, the model is bit-equal afterwards, nothing is left trainable or with gradients, and `meta` tells all."""
    before, task = run(llama), golden.TASKS[kind]()
    adapter = fitted(llama, task, positions, CONFIG.with_changes(epochs=6), n_train=8)
    losses = [r["loss"] for r in adapter.meta.history]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.03
    if kind == "dpo":
        assert losses[0] == pytest.approx(
            0.693147, abs=1e-5
        )  # the reference is the model without it, and it starts at zero
    assert (adapter.c.detach().abs().amax(dim=1) > 0.05).all()
    assert not any(p.requires_grad or p.grad is not None for p in (*adapter.parameters(), *llama.parameters()))
    assert torch.equal(run(llama), before)
    meta = adapter.meta
    assert (meta.task, meta.data_hash, meta.seed, meta.n_train) == (task.name, task.data_hash, 1, 8)
    assert meta.config == CONFIG.with_changes(epochs=6).to_dict()
    assert meta.model.name == shift_of(llama).meta.model.name


def test_the_same_seed_learns_the_same(llama):
    """Bit for bit; another seed visits rows in another order."""
    one, two, other = (shift_of(llama, "predicting", scale=0.0).requires_grad_(True) for _ in range(3))
    for adapter, seed in ((one, 3), (two, 3), (other, 4)):
        fit(adapter, llama, golden.sft_task(), CONFIG, seed=seed, progress=False)
    assert torch.equal(one.c, two.c)
    assert not torch.equal(one.c, other.c)


def test_the_penalty_has_its_weight(bridge_llama):
    """config.l1 * penalty() is added to the loss: a large one keeps the vectors small, and its raw value is in the history."""
    sizes = []
    for l1 in (0.0, 5.0):
        adapter = shift_of(bridge_llama, scale=0.0).requires_grad_(True)
        config = CONFIG.with_changes(l1=l1)
        fit(
            adapter,
            bridge_llama,
            golden.sft_task(),
            config,
            seed=1,
            penalty=lambda c=adapter.c: c.abs().sum(),
            progress=False,
        )
        sizes.append(adapter.c.abs().sum().item())
        assert adapter.meta.history[-1]["l1"] > 0
    assert sizes[1] < 0.7 * sizes[0]


class Inside(Shift):
    """A stand-in for LoRA: its parameters are the model's own."""

    def __init__(self, model):
        like = shift_of(model, scale=0.0)
        super().__init__(like.c.detach(), like.layers, like.n_layers, "all", like.meta)
        self.requires_grad_(True)
        home_of(model).register_parameter("inside", self.c)


def home_of(model):
    """The module that holds the weights: on the bridge the Hugging Face model inside it."""
    return getattr(model, "original_model", model)


@pytest.fixture
def inside(llama):
    """Such an adapter; the model has its parameter while the test runs."""
    made = Inside(llama)
    assert any(p is made.c for p in llama.parameters())
    yield made
    del home_of(llama)._parameters["inside"]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_an_adapter_inside_the_model_learns_though_the_model_is_frozen(llama, inside):
    """The model's other weights get no gradient; at the end nothing is left trainable; the numbers are those of one outside."""
    other = next(p for p in llama.parameters() if p is not inside.c)
    other.requires_grad_(True)
    try:
        fit(inside, llama, golden.sft_task(), CONFIG, seed=1, progress=False)
        assert trainable(llama) == [other]
        assert other.grad is None
    finally:
        other.requires_grad_(False)
    assert inside.c.abs().max() > 0.05
    assert torch.equal(inside.c, fitted(llama).c)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, "nan"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_what_stops_training_carries_the_adapter(llama, inside, monkeypatch, stop, where):
    """In the third step: the numbers are those after the second, and nothing is left trainable, attached or hooked."""
    expected = fitted(llama, config=CONFIG.with_changes(max_steps=2))
    adapter = inside if where == "inside" else shift_of(llama, scale=0.0).requires_grad_(True)
    if where == "outside":
        inside.requires_grad_(False)
    plain, calls = Steps.__call__, []

    def breaking(steps, shares):
        calls.append(1)
        if len(calls) < 3:
            return plain(steps, shares)
        if stop == "nan":
            return [loss * float("nan") for loss in plain(steps, shares)]
        raise stop

    monkeypatch.setattr(Steps, "__call__", breaking)
    with pytest.raises(TrainingDiverged if stop == "nan" else stop) as e:
        fit(adapter, llama, golden.sft_task(), CONFIG, seed=1, progress=False)
    assert e.value.adapter is adapter
    assert torch.equal(adapter.c, expected.c)
    assert len(adapter.meta.history) == 2
    assert trainable(llama) == []
    assert not adapter.c.requires_grad
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())
    run(llama, adapter)


def test_what_cannot_be_learned_is_refused_before_it_runs(bridge_llama, monkeypatch):
    """The last position alone, another shape (`meta` stays as it was), nothing trainable, a row too long: by name."""
    adapter = shift_of(bridge_llama, "last").requires_grad_(True)
    meta = adapter.meta
    with pytest.raises(InputError, match=r"positions 'last' learns nothing.*'predicting', 'all'"):
        fit(adapter, bridge_llama, golden.sft_task(), CONFIG, seed=1, progress=False)
    assert adapter.meta is meta
    wrong = Shift(torch.zeros(1, 32), [0], 4, "all", meta).requires_grad_(True)
    with pytest.raises(AdapterError, match="4 layers"):
        fit(wrong, bridge_llama, golden.sft_task(), CONFIG, seed=1, progress=False)
    assert wrong.meta is meta
    with pytest.raises(InputError, match="nothing to train: no parameter"):
        fit(shift_of(bridge_llama), bridge_llama, golden.sft_task(), CONFIG, seed=1, progress=False)
    short = {"prompt": "a", "answer": "b"}
    long = Task.from_records("long", train=[{"prompt": "?!" * 1100, "answer": "b"}], test=[short])
    with pytest.raises(DataError, match="context"):
        fitted(bridge_llama, long)
    assert not any(p.requires_grad for p in bridge_llama.parameters())


class Scale(Shift):
    """Another method with a parameter of the same name and shape."""

    method = "scale"


def test_a_checkpoint_belongs_to_its_method_and_positions(bridge_llama, tmp_path):
    """A finished state is taken up by the same run; another method's, other positions' and another identity's are refused."""
    state = tmp_path / "state"
    first = fitted(bridge_llama, checkpoint=state, identity={"rank": 1})
    assert torch.equal(fitted(bridge_llama, checkpoint=state, identity={"rank": 1}).c, first.c)
    with pytest.raises(InputError, match=r"differs in positions\)"):
        fitted(bridge_llama, positions="predicting", checkpoint=state, identity={"rank": 1})
    with pytest.raises(InputError, match=r"differs in rank\)"):
        fitted(bridge_llama, checkpoint=state, identity={"rank": 2})
    other = shift_of(bridge_llama, kind=Scale).requires_grad_(True)
    with pytest.raises(InputError, match=r"differs in method\)"):
        fit(
            other,
            bridge_llama,
            golden.sft_task(),
            CONFIG,
            seed=1,
            identity={"rank": 1},
            checkpoint=state,
            progress=False,
        )


def test_an_adapter_without_positions_may_be_fitted(llama):
    """A method that is no sub-class of Adapter and says nothing of positions."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = shift_of(llama, scale=0.0).requires_grad_(True)

        def attach_check(self, model):
            self.inner.attach_check(model)

        def attached(self, model):
            return self.inner.attached(model)

    own = Own()
    fit(own, llama, golden.sft_task(), CONFIG, seed=1, progress=False)
    assert torch.equal(own.inner.c, fitted(llama).c)
    assert own.meta.task == "golden-sft"


# ----------------------------------------------------------------------------------------- an order and a reference


def test_the_usual_order_and_reference_given_are_the_usual_training(llama):
    """To the bit; turned around, what is learned is another; the record says that they were given."""
    task = golden.dpo_task()
    usual = fitted(llama, task)
    order = [row_order(10, seed=1, epoch=epoch) for epoch in range(2)]
    same = fitted(llama, task, order=order)
    assert torch.equal(same.c, usual.c)
    assert {"order", "reference"} & {*usual.meta.config} == set()
    assert set(same.meta.config) - set(usual.meta.config) == {"order"}
    reference = reference_log_probs(llama, task.training_examples(seed=1), passes=FAST, batch_size=4)
    again = fitted(llama, task, reference=reference)
    assert (again.c - usual.c).abs().max() < 1e-5
    assert set(again.meta.config) - set(usual.meta.config) == {"reference"}
    assert not torch.equal(fitted(llama, task, order=order[::-1]).c, usual.c)


def test_dpo_against_another_model(llama):
    """The first loss is -log sigmoid(beta * (margin - the reference's margin)), by hand from both models' log-probs."""
    task, first = golden.dpo_task(), shift_of(llama, scale=1.0)
    examples, config = task.training_examples(seed=1), CONFIG.with_changes(epochs=1, batch_size=10)
    bare = reference_log_probs(llama, examples)
    with first.attached(llama):
        moved = reference_log_probs(llama, examples)
    assert (bare - moved).abs().max() > 0.1
    margin = (bare[:, 0] - bare[:, 1]) - (moved[:, 0] - moved[:, 1])
    expected = -torch.nn.functional.logsigmoid(config.beta * margin).mean().item()
    history = fitted(llama, task, config=config, reference=moved).meta.history
    assert history[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_a_reference_that_does_not_fit_is_refused(bridge_llama, tmp_path):
    """Rows too few, NaN, a task without pairs; and a checkpoint belongs to its reference."""
    task, state = golden.dpo_task(), tmp_path / "state"
    good = reference_log_probs(bridge_llama, task.training_examples(seed=1))
    for reference in (good[1:], good * float("nan")):
        with pytest.raises(InputError, match=r"give finite numbers of shape \[10, 2\]"):
            fitted(bridge_llama, task, reference=reference)
    with pytest.raises(InputError, match="this task has no pairs"):
        fitted(bridge_llama, golden.sft_task(), reference=good)
    with pytest.raises(InputError, match="these examples have one answer"):
        reference_log_probs(bridge_llama, golden.sft_task().training_examples())
    fitted(bridge_llama, task, reference=good, checkpoint=state)
    with pytest.raises(InputError, match=r"differs in reference\)"):
        fitted(bridge_llama, task, reference=good + 1, checkpoint=state)
