"""The training loop: order, schedule, clipping, AdamW to the bit, stop and resume, and what happens at NaN."""

import logging
import os
import signal
import threading

import pytest
import torch
from torch import nn

from lofit_lens import io
from lofit_lens.errors import AdapterError, InputError, TrainingDiverged
from lofit_lens.training import TrainConfig
from lofit_lens.training.loop import FitSpec, Training, row_order, train_together

ROWS = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
CONFIG = TrainConfig(lr=0.1, epochs=3, batch_size=4, weight_decay=0.01, clip=0.5, l1=0.01)  # 3 epochs of 3 steps


@pytest.fixture(autouse=True)
def _ctrl_c():
    """Python's own handler of Ctrl-C, also where the tests run in the background and a shell has switched it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Toy(nn.Module):
    """Learns to point along the rows; one parameter is frozen."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 4))
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, rows):
        return ((ROWS[list(rows)] @ self.w - 1) ** 2).mean()

    def penalty(self):
        return self.w.abs().sum()


def fit(toy, *, loss=None, config=CONFIG, n_rows=10, penalty=None, order=None, seed=5, identity=None, **options):
    """Train it in the loop, and return the records."""

    def step_of(shares):
        value = (loss or toy.loss)(shares[0][1])
        value.backward()
        return [value.detach()]

    run = Training(
        FitSpec(toy, None, config, seed, penalty=penalty or toy.penalty, order=order), n_rows, identity or {}
    )
    train_together([run], step_of, progress=False, **options)
    if run.error is not None:
        raise run.error
    return run.history


# -------------------------------------------------------------------------------------------- order and schedule


def test_rows_are_visited_in_the_official_order():
    """Epoch e: torch.randperm of a generator seeded with seed + e, in consecutive batches; the last one is short."""
    seen = []

    def loss(rows):
        seen.append(list(rows))
        return toy.loss(rows)

    toy = Toy()
    fit(toy, loss=loss)
    for epoch in range(3):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        assert seen[3 * epoch : 3 * epoch + 3] == [order[:4], order[4:8], order[8:]]
        assert row_order(10, seed=5, epoch=epoch) == order


def test_the_learning_rate_falls_linearly_to_zero():
    """Step i of 9 runs at 0.1 * (1 - i / 9): 0.1 first, 0.1 / 9 last; records count from 1."""
    records = fit(Toy())
    assert [r["lr"] for r in records] == pytest.approx([0.1 * (9 - i) / 9 for i in range(9)])
    assert [r["step"] for r in records] == list(range(1, 10))
    assert [r["epoch"] for r in records] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_max_steps_stops_early_on_the_same_schedule():
    """The first four steps of a bounded run are those of the whole run."""
    whole, bounded = Toy(), Toy()
    assert fit(bounded, config=CONFIG.with_changes(max_steps=4)) == fit(whole)[:4]


def test_a_schedule_of_its_own_falls_to_zero_at_its_end():
    """Over 18 steps half of the learning rate is left after 9; one that ends before the training is refused."""
    records = fit(Toy(), config=CONFIG.with_changes(schedule_steps=18))
    assert [r["lr"] for r in records] == pytest.approx([0.1 * (18 - i) / 18 for i in range(9)])
    short = CONFIG.with_changes(schedule_steps=4)
    with pytest.raises(InputError, match=r"schedule_steps=4 of 9 steps.*max_steps=4"):
        fit(Toy(), config=short)
    assert [r["lr"] for r in fit(Toy(), config=short.with_changes(max_steps=4))][-1] == pytest.approx(0.1 / 4)
    assert "schedule_steps" not in CONFIG.to_dict()
    assert short.to_dict()["schedule_steps"] == 4


def test_a_given_order_is_followed():
    """Two epochs of five of ten rows in batches of four; the usual order, given, is the usual training."""
    seen, toy, two = [], Toy(), CONFIG.with_changes(epochs=2)

    def loss(rows):
        seen.append(list(rows))
        return toy.loss(rows)

    records = fit(toy, loss=loss, config=two, order=[[9, 8, 7, 6, 5], [0, 0, 1, 1, 2]])
    assert seen == [[9, 8, 7, 6], [5], [0, 0, 1, 1], [2]]
    assert [r["epoch"] for r in records] == [1, 1, 2, 2]
    assert [r["lr"] for r in records] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    same, usual = Toy(), Toy()
    fit(same, config=two, order=[row_order(10, seed=5, epoch=e) for e in range(2)])
    fit(usual, config=two)
    assert torch.equal(same.w, usual.w)


@pytest.mark.parametrize("order", [[], [[1]], [[1], [2, 3]], [[], []], [[1], [10]], [[1], [-1]], [[1], [True]]])
def test_an_order_that_does_not_fit_is_refused(order):
    """Another number of epochs, lists of several lengths or none, rows that are not there."""
    with pytest.raises(InputError, match="order"):
        fit(Toy(), config=CONFIG.with_changes(epochs=2), order=order)


def test_the_loop_is_plain_adamw_to_the_bit():
    """Loss + l1 * penalty, clip 0.5, then torch's AdamW under the schedule: every number of every step is equal."""
    toy, w = Toy(), nn.Parameter(torch.linspace(-1, 1, 4))
    records = fit(toy)
    optimizer = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 9)
    norms = []
    for epoch in range(3):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        for first in range(0, 10, 4):
            rows = order[first : first + 4]
            optimizer.zero_grad()
            task, l1 = ((ROWS[rows] @ w - 1) ** 2).mean(), w.abs().sum()
            (task + 0.01 * l1).backward()
            norms.append(nn.utils.clip_grad_norm_([w], 0.5).item())
            record = records[len(norms) - 1]
            assert (record["loss"], record["l1"], record["grad_norm"]) == (task.item(), l1.item(), norms[-1])
            optimizer.step()
            schedule.step()
    assert torch.equal(toy.w, w)
    assert max(norms) > 0.5  # so that clipping matters
    assert torch.equal(toy.still, torch.ones(2))
    assert toy.w.grad is None


def test_the_clip_bounds_the_update():
    """With a clip of 1e-12 the first AdamW step is lr * g / (g + eps) with g near 1e-12 and eps 1e-8: next to nothing."""
    free, bound = Toy(), Toy()
    fit(free, config=CONFIG.with_changes(max_steps=1, weight_decay=0.0))
    fit(bound, config=CONFIG.with_changes(max_steps=1, weight_decay=0.0, clip=1e-12))
    start = Toy().w
    assert (free.w - start).abs().max() > 0.09  # Adam's first step is lr in every coordinate
    assert (bound.w - start).abs().max() < 1e-4


def test_two_runs_are_bit_equal_and_the_seed_matters():
    """Same seed, same records and numbers; another seed visits rows in another order."""
    a, b, c = Toy(), Toy(), Toy()
    assert fit(a) == fit(b)
    assert torch.equal(a.w, b.w)
    fit(c, seed=6)
    assert not torch.equal(a.w, c.w)


def test_nothing_to_train_is_refused():
    """No trainable parameter, and no row."""
    toy = Toy()
    with pytest.raises(InputError, match="0 rows"):
        fit(toy, n_rows=0)
    toy.requires_grad_(False)
    with pytest.raises(InputError, match="requires_grad"):
        fit(toy)


# ------------------------------------------------------------------------------------------------ stop and resume


def interrupting(toy, at):
    """A loss that presses Ctrl-C while step `at` runs."""
    count = []

    def loss(rows):
        count.append(1)
        if len(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return toy.loss(rows)

    return loss


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_run_resumed_after_ctrl_c_is_the_undisturbed_run(tmp_path, at):
    """Ctrl-C within an epoch and at its border: the step is finished, and the resumed run is equal to the bit."""
    whole, first, second = Toy(), Toy(), Toy()
    records = fit(whole)
    with pytest.raises(KeyboardInterrupt, match=rf"after step {at} of 9.*state"):
        fit(first, loss=interrupting(first, at), checkpoint=tmp_path / "state")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ran = []
    resumed = fit(second, loss=lambda rows: (ran.append(1), second.loss(rows))[1], checkpoint=tmp_path / "state")
    assert len(ran) == 9 - at
    assert resumed == records
    assert torch.equal(second.w, whole.w)


def test_ctrl_c_without_a_checkpoint_still_ends_between_steps():
    """The module holds whole steps; the error says after which."""
    toy, same = Toy(), Toy()
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 9"):
        fit(toy, loss=interrupting(toy, 2))
    fit(same, config=CONFIG.with_changes(max_steps=2))
    assert torch.equal(toy.w, same.w)


def test_a_second_ctrl_c_stops_at_once():
    """Pressed twice within one step, the second one is the usual KeyboardInterrupt, before the step is done."""
    toy, start = Toy(), Toy().w

    def loss(rows):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return toy.loss(rows)

    with pytest.raises(KeyboardInterrupt):
        fit(toy, loss=loss)
    assert torch.equal(toy.w, start)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_loss_gives_ctrl_c_back():
    """Whatever ends the loop, the signal handler is the one from before."""

    def loss(rows):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fit(Toy(), loss=loss)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_runs_outside_the_main_thread():
    """Where signals cannot be caught, training goes on without."""
    toy, same, found = Toy(), Toy(), []
    thread = threading.Thread(target=lambda: found.append(fit(toy)))
    thread.start()
    thread.join()
    assert found == [fit(same)]


def test_a_finished_run_is_not_run_again(tmp_path):
    """With its checkpoint there, a second call returns the same records and numbers without a step."""
    first, second = Toy(), Toy()
    records = fit(first, checkpoint=tmp_path / "state")

    def never(rows):
        raise AssertionError("a step was run")

    assert fit(second, loss=never, checkpoint=tmp_path / "state") == records
    assert torch.equal(first.w, second.w)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 6}, "seed"), ({"config": CONFIG.with_changes(lr=0.2)}, "config"), ({"identity": {"task": "b"}}, "task"),
     ({"identity": {}}, "task"), ({"order": [[0]] * 3}, "order")],
)  # fmt: skip
def test_the_state_of_another_run_is_refused(tmp_path, change, named):
    """Another seed, setting or task: what differs is named, and nothing is trained."""
    state, toy = tmp_path / "state", Toy()
    fit(Toy(), checkpoint=state, identity={"task": "a"})
    before = state.read_bytes()
    with pytest.raises(InputError, match=rf"another run \(it differs in {named}\)"):
        fit(toy, **{"checkpoint": state, "identity": {"task": "a"}, **change})
    assert torch.equal(toy.w, Toy().w)
    assert state.read_bytes() == before


def test_a_damaged_state_is_refused(tmp_path):
    """A truncated state file, and one that lacks the parameter, are refused by name."""
    state = tmp_path / "state"
    fit(Toy(), checkpoint=state)
    whole, record = state.read_bytes(), io.tensor_metadata(state)
    state.write_bytes(whole[:-20])
    with pytest.raises(AdapterError, match="state"):
        fit(Toy(), checkpoint=state)
    io.save_tensors(state, {"0/parameter/other": torch.ones(4)}, record)
    with pytest.raises(AdapterError, match="lacks parameter w"):
        fit(Toy(), checkpoint=state)


# --------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("how", ["loss", "gradient", "penalty"])
def test_nan_stops_with_step_rows_and_the_last_good_state(tmp_path, how):
    """A NaN loss, an infinite gradient or penalty at step 5: step, epoch and rows are named, step 4's numbers kept."""
    toy, good, count = Toy(), Toy(), []
    fit(good, config=CONFIG.with_changes(max_steps=4))

    def loss(rows):
        count.append(list(rows))
        value = toy.loss(rows)
        if len(count) < 5 or how == "penalty":
            return value
        if how == "loss":
            return value * float("nan")
        return value + torch.sqrt(toy.w[0] - toy.w[0].detach())  # 0, with an infinite slope

    def penalty():
        return toy.penalty() * (float("inf") if how == "penalty" and len(count) == 5 else 1.0)

    with pytest.raises(TrainingDiverged) as e:
        fit(toy, loss=loss, penalty=penalty, checkpoint=tmp_path / "run.state")
    message = str(e.value)
    assert "at step 5 (epoch 2)" in message
    assert str(count[4]) in message
    assert "lower learning rate than 0.1" in message
    assert torch.equal(toy.w, good.w)
    kept = tmp_path / "run.last_good.state"
    assert str(kept) in message
    assert torch.equal(io.load_tensors(kept)["0/parameter/w"], good.w.detach())


def test_resuming_is_logged(tmp_path, caplog):
    """A resumed run says from where."""
    first = Toy()
    with pytest.raises(KeyboardInterrupt):
        fit(first, loss=interrupting(first, 4), checkpoint=tmp_path / "state")
    with caplog.at_level(logging.INFO, logger="lofit_lens"):
        fit(Toy(), checkpoint=tmp_path / "state")
    assert "step 4" in caplog.text
