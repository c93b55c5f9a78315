"""Many trainings in one pass: what each learns is what it learns alone."""

import os
import signal

import pytest
import torch

import lofit_lens as ll
from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import AdapterError, InputError, TrainingDiverged
from lofit_lens.interventions.side_by_side import edit_rows, side_by_side
from lofit_lens.models import Borders, Positions, logits_of
from lofit_lens.training import FAST, PLAIN, LofitRun, Passes, passes, tune_many
from lofit_lens.training.lofit import learned_scores
from lofit_lens.training.objective import Steps
from tests import golden
from tests.adapters import CHOSEN, random_adapter
from tests.conftest import BACKENDS

SFT, DPO = golden.sft_task(), golden.dpo_task()
SELECT, TUNE = golden.SELECT.with_changes(max_steps=8), golden.TUNE.with_changes(max_steps=8)
TOKENS = torch.randint(3, 400, (5, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
MASK[1, 6:] = MASK[4, 3:] = 0


def runs() -> list[LofitRun]:
    """Seeds, tasks with SFT and DPO, both components, head sets, K, learning rates, L1, data sizes, lengths and ends."""
    return [
        LofitRun(SFT, "A", seed=0, config=SELECT),
        LofitRun(SFT, "A", seed=1, config=SELECT.with_changes(l1=5e-2, lr=1e-1)),
        LofitRun(DPO, "A", seed=0, config=SELECT.with_changes(beta=0.2)),
        LofitRun(DPO, "v", CHOSEN, seed=2, config=TUNE),
        LofitRun(SFT, "v", HeadSet(["L1H2"]), seed=3, config=TUNE.with_changes(epochs=2, max_steps=5)),
        LofitRun(SFT, "v", None, seed=4, config=TUNE.with_changes(batch_size=3, epochs=2), n_train=7),
        LofitRun(DPO, "A", HeadSet(["L0H0", "L2H3"]), seed=5, config=SELECT.with_changes(clip=0.1, weight_decay=0.1)),
    ]


@pytest.fixture(scope="module")
def apart(loaded):
    """Class -> what each of the runs learns alone, by the plain path."""
    made = {}

    def alone(on):
        if on not in made:
            made[on] = [tune_many(loaded("llama", on), [run], passes=PLAIN, progress=False)[0] for run in runs()]
        return made[on]

    return alone


def assert_equal_runs(got, want, within=5e-5):
    for one, other in zip(got, want, strict=True):
        assert len(one.meta.history) == len(other.meta.history)
        for a, b in zip(one.meta.history, other.meta.history, strict=True):
            assert a == pytest.approx(b, abs=within)
        for name in ("A", "v"):
            assert (getattr(one, name) - getattr(other, name)).abs().max() <= within
        assert one.heads.heads == other.heads.heads


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize(
    "how",
    [
        FAST,
        pytest.param(PLAIN, marks=pytest.mark.slow),
        pytest.param(Passes(100), marks=pytest.mark.slow),
        pytest.param(Passes(1), marks=pytest.mark.slow),
        pytest.param(Passes(checkpointing=True), marks=pytest.mark.slow),
    ],
    ids=["fast", "plain", "100 tokens", "one example a pass", "checkpointing"],
)
def test_each_run_learns_what_it_learns_alone(loaded, apart, monkeypatch, on, how):
    """Seven different runs at once, however their rows are spread over passes: to 1e-5, and the same heads are chosen."""
    monkeypatch.setattr(passes, "WASTE", 0)
    want = apart(on)
    got = tune_many(loaded("llama", on), runs(), passes=how, progress=False)
    assert_equal_runs(got, want)
    for one, other, run in zip(got, want, runs(), strict=True):
        scores = [learned_scores(x, run.component, kind="") for x in (one, other)]
        assert scores[0].top(2).heads == scores[1].top(2).heads
        assert (one.meta.task, one.meta.seed, one.meta.n_train) == (run.task.name, run.seed, run.n_train or 10)
        assert one.meta.config == run.config.to_dict()
        assert not one.A.requires_grad
        assert not one.v.requires_grad


def test_one_run_alone_is_the_usual_training_to_the_bit(llama):
    """tune_many of one run, tune_scalings and tune_offsets give the same bytes."""
    (a,) = tune_many(llama, [LofitRun(DPO, "A", seed=3, config=SELECT)], progress=False)
    b = ll.tune_scalings(llama, DPO, seed=3, config=SELECT, progress=False)
    assert torch.equal(a.A, b.A)
    assert a.meta.history == b.meta.history
    (v,) = tune_many(llama, [LofitRun(SFT, "v", CHOSEN, config=TUNE)], progress=False)
    assert torch.equal(v.v, ll.tune_offsets(llama, SFT, CHOSEN, config=TUNE, progress=False).v)


def test_presets_are_those_of_the_steps(bridge_llama):
    """Without a config, A takes step 1's preset of the task and v step 2's."""
    few = [LofitRun(SFT, "A", n_train=2), LofitRun(SFT, "v", CHOSEN, n_train=2)]
    a, v = tune_many(bridge_llama, few, progress=False)
    alone = [
        ll.tune_scalings(bridge_llama, SFT, n_train=2, progress=False),
        ll.tune_offsets(bridge_llama, SFT, CHOSEN, n_train=2, progress=False),
    ]
    assert [a.meta.config, v.meta.config] == [x.meta.config for x in alone]


def test_the_same_runs_give_the_same_bits(llama):
    """Twice the same call."""
    first, second = (tune_many(llama, runs(), progress=False) for _ in range(2))
    assert all(torch.equal(a.A, b.A) and torch.equal(a.v, b.v) for a, b in zip(first, second, strict=True))


def test_gradients_of_many_rows_are_the_same_bits_on_several_threads():
    """Large enough that torch splits the work: 80 rows of 5 runs, 32 heads of 128, on two threads."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    A, v = (torch.randn(5, 32, 128, generator=generator, requires_grad=True) for _ in range(2))
    z, owner = torch.randn(80, 2, 32, 128, generator=generator), torch.arange(80) // 16
    slope = torch.randn(z.shape, generator=generator)
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad((edit_rows(z, A, v, owner) * slope).sum(), (A, v)) for _ in range(30)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_an_adapter_at_certain_positions_is_refused(bridge_llama):
    """Side by side all act at every position."""
    one = random_adapter(bridge_llama)
    one.positions = Positions.parse("answer")
    with pytest.raises(InputError, match="acts at answer"), side_by_side(bridge_llama, [one]):
        pass


def test_the_model_is_left_as_it_was(llama):
    """Nothing hooked, nothing trainable, the same logits."""
    before = logits_of(llama, TOKENS, MASK)
    tune_many(llama, runs()[:2], progress=False)
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())
    assert not any(p.requires_grad for p in llama.parameters())
    assert torch.equal(logits_of(llama, TOKENS, MASK), before)


def test_every_run_has_its_own_reader(bridge_llama):
    """on_step gets the records of its run alone."""
    seen = [[], []]
    listed = [LofitRun(SFT, "v", CHOSEN, seed=i, config=TUNE, on_step=seen[i].append) for i in range(2)]
    got = tune_many(bridge_llama, listed, progress=False)
    assert seen == [x.meta.history for x in got]
    assert seen[0] != seen[1]


# ----------------------------------------------------------------------------------------------- how they end


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_run_that_diverges_drops_out_and_the_others_go_on(llama, monkeypatch, bad):
    """NaN in the sixth step of one of three: its place holds the error and its last good values; the others are undisturbed."""
    listed = [LofitRun(SFT, "A", seed=i, config=SELECT) for i in range(3)]
    want, inner, count = tune_many(llama, listed, progress=False), Steps.__call__, []

    def breaking(self, shares):
        losses = inner(self, shares)
        count.append([i for i, _ in shares])
        if len(count) == 6:
            losses[bad] = losses[bad] * float("nan")
        return losses

    monkeypatch.setattr(Steps, "__call__", breaking)
    got = tune_many(llama, listed, progress=False)
    assert isinstance(got[bad], TrainingDiverged)
    assert "loss is nan at step 6" in str(got[bad])
    assert len(got[bad].adapter.meta.history) == 5
    assert count[5] == [0, 1, 2]
    assert count[6] == [i for i in range(3) if i != bad]
    others = [i for i in range(3) if i != bad]
    assert_equal_runs([got[i] for i in others], [want[i] for i in others])


def test_a_run_that_ends_early_leaves_the_pass(llama, monkeypatch):
    """Five steps and eight: from the sixth on, the pass holds the longer run's rows alone."""
    inner, seen = Steps.__call__, []
    monkeypatch.setattr(
        Steps, "__call__", lambda self, shares: (seen.append([i for i, _ in shares]), inner(self, shares))[1]
    )
    short = LofitRun(SFT, "v", CHOSEN, config=TUNE.with_changes(max_steps=5))
    tune_many(llama, [short, LofitRun(SFT, "v", CHOSEN, config=TUNE)], progress=False)
    assert seen == [[0, 1]] * 5 + [[1]] * 3


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6))])
def test_stopped_and_resumed_all_runs_end_in_the_same_bits(llama, tmp_path, monkeypatch, ctrl_c, at):
    """Ctrl-C in some step; one file holds all runs, those that ended too."""
    inner, count = Steps.__call__, []

    def stopping(self, shares):
        count.append(1)
        if len(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, shares)

    want = tune_many(llama, runs(), progress=False)
    monkeypatch.setattr(Steps, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt, match=f"after step {at} of 8"):
        tune_many(llama, runs(), checkpoint=tmp_path / "state", progress=False)
    got = tune_many(llama, runs(), checkpoint=tmp_path / "state", progress=False)
    assert len(count) == 8
    assert all(torch.equal(a.A, b.A) and torch.equal(a.v, b.v) for a, b in zip(got, want, strict=True))
    assert [x.meta.history for x in got] == [x.meta.history for x in want]


def test_a_run_that_diverged_stays_out_after_a_resume(llama, tmp_path, monkeypatch, ctrl_c):
    """NaN in step 2, Ctrl-C in step 4: the resumed runs know what became of it."""
    listed = [LofitRun(SFT, "A", seed=i, config=SELECT) for i in range(2)]
    inner, count = Steps.__call__, []

    def breaking(self, shares):
        count.append(len(shares))
        losses = inner(self, shares)
        if len(count) == 2:
            losses[0] = losses[0] * float("nan")
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    monkeypatch.setattr(Steps, "__call__", breaking)
    with pytest.raises(KeyboardInterrupt):
        tune_many(llama, listed, checkpoint=tmp_path / "state", progress=False)
    got = tune_many(llama, listed, checkpoint=tmp_path / "state", progress=False)
    assert isinstance(got[0], TrainingDiverged)
    assert "step 2" in str(got[0])
    assert (tmp_path / "state.0.last_good").is_file()
    assert len(got[0].adapter.meta.history) == 1
    assert len(got[1].meta.history) == 8
    assert count == [2, 2] + [1] * 6


def test_the_state_of_other_runs_is_refused(bridge_llama, tmp_path):
    """Another seed in one of the runs, or another number of them."""
    short = TUNE.with_changes(max_steps=1)
    listed = [LofitRun(SFT, "v", CHOSEN, seed=i, config=short) for i in range(3)]
    tune_many(bridge_llama, listed[:2], checkpoint=tmp_path / "state", progress=False)
    with pytest.raises(InputError, match="differs in seed"):
        tune_many(bridge_llama, listed[1:], checkpoint=tmp_path / "state", progress=False)
    with pytest.raises(InputError, match="2 runs, not 3"):
        tune_many(bridge_llama, listed, checkpoint=tmp_path / "state", progress=False)


def test_no_run_is_refused(bridge_llama):
    """By name."""
    with pytest.raises(InputError, match=r"runs is \[\]; give one or more"):
        tune_many(bridge_llama, [], progress=False)


# ---------------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("on", BACKENDS)
def test_each_row_is_edited_by_its_owner_alone(loaded, on):
    """Logits of every row against its own adapter attached alone, padding and a row twice included."""
    model = loaded("llama", on)
    adapters = [
        random_adapter(model, CHOSEN, seed=0),
        random_adapter(model, HeadSet(["L1H0"]), seed=1),
        random_adapter(model, HeadSet.all((3, 4)), seed=2),
    ]
    owner = torch.tensor([2, 0, 1, 0, 2])
    borders = Borders(torch.full((5,), 2), MASK.sum(dim=1), owner)
    with side_by_side(model, adapters), torch.no_grad():
        together = logits_of(model, TOKENS, MASK, borders)
    for row, who in enumerate(owner.tolist()):
        with adapters[who].attached(model), torch.no_grad():
            alone = logits_of(model, TOKENS, MASK)[row]
        keep = MASK[row].bool()
        assert (together[row] - alone)[keep].abs().max() < 1e-5 * alone.abs().max()


def test_heads_outside_an_adapter_learn_nothing(bridge_llama):
    """Another run edits them in the same layer; this one's entries stay exactly zero."""
    listed = [LofitRun(SFT, "v", HeadSet([h]), config=TUNE.with_changes(max_steps=3)) for h in ("L1H0", "L1H3")]
    for lofit, head in zip(tune_many(bridge_llama, listed, progress=False), ("L1H0", "L1H3"), strict=True):
        assert lofit.v[HeadSet([head]).heads[0]].abs().max() > 0.1
        assert not lofit.v[~lofit.mask].any()


def test_a_pass_without_owners_is_refused(bridge_llama):
    """A plain call of the model cannot say whose its rows are."""
    with side_by_side(bridge_llama, [Lofit.for_model(bridge_llama)]), pytest.raises(InputError, match="whose"):
        bridge_llama(TOKENS)
    assert not any(p.fwd_hooks for p in bridge_llama.hook_dict.values())


def test_an_adapter_twice_and_none_are_refused(bridge_llama):
    """Nothing stays attached."""
    one = Lofit.for_model(bridge_llama)
    with pytest.raises(AdapterError, match="already attached"), side_by_side(bridge_llama, [one, one]):
        pass
    with pytest.raises(InputError, match="no adapter"), side_by_side(bridge_llama, []):
        pass
    with one.attached(bridge_llama):
        pass
