"""Both steps of LoFiT on a tiny Llama: what they learn, the same on every class, the same again, and what they refuse."""

import json
import random

import pytest
import torch

import lofit_lens as ll
from lofit_lens import HeadSet, Lofit, Task, TrainConfig
from lofit_lens.errors import DataError, InputError, TrainingDiverged
from lofit_lens.models import ModelInfo, hooked_class, logits_of, tokenizer_of
from lofit_lens.training import fitting, objective
from lofit_lens.training.config import preset
from tests import golden
from tests.adapters import CHOSEN

SELECT, TUNE = golden.SELECT, golden.TUNE
SHORT = TUNE.with_changes(max_steps=4)
TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(model):
    return logits_of(model, TOKENS, torch.ones_like(TOKENS))


@pytest.fixture(scope="module", params=golden.TASKS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def traces(loaded):
    """(class, task) -> both phases' numbers, run once."""
    made = {}

    def trace_of(on, kind):
        if (on, kind) not in made:
            made[on, kind] = golden.trace(loaded("llama", on), kind)
        return made[on, kind]

    return trace_of


# ------------------------------------------------------------------------------------- the same on every class


def assert_same(got, want):
    assert got["ranking"] == want["ranking"]
    for name in ("select_losses", "select_l1", "A_norms", "tune_losses", "v"):
        difference = torch.tensor(got[name], dtype=torch.float64) - torch.tensor(want[name], dtype=torch.float64)
        assert difference.abs().max() < 1e-5, name


def test_every_class_runs_the_golden_trace(traces, backend, kind):
    """20 steps of both phases: losses, A-norms, v and ranking are those of HookedTransformer under TransformerLens 3.9."""
    assert_same(traces(backend, kind), json.loads(golden.FILE.read_text())[kind])


@pytest.mark.skipif(hooked_class() is None, reason="needs both classes")
def test_both_classes_agree_on_every_number_of_A(loaded, kind):
    """All of A, not only its norms, after 20 steps; and every record of the history."""
    runs = [
        ll.tune_scalings(loaded("llama", on), golden.TASKS[kind](), config=SELECT, progress=False)
        for on in ("hooked", "bridge")
    ]
    assert (runs[0].A - runs[1].A).abs().max() < 1e-5
    for a, b in zip(runs[0].meta.history, runs[1].meta.history, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_losses_fall(traces, backend, kind):
    """Over the last pass the loss is below the first pass's (3 steps each), in both phases."""
    found = traces(backend, kind)
    for phase in ("select_losses", "tune_losses"):
        assert sum(found[phase][-3:]) < sum(found[phase][:3]) - 0.1


# ------------------------------------------------------------------------------------------ what each step does


def test_heads_are_ranked_by_the_norm_of_A(llama):
    """select_heads is tune_scalings' A, one L2 norm a head, with v = 0."""
    task = golden.sft_task()
    scores = ll.select_heads(llama, task, config=SHORT, progress=False)
    lofit = ll.tune_scalings(llama, task, config=SHORT, progress=False)
    assert torch.allclose(scores.values, lofit.A.detach().double().pow(2).sum(-1).sqrt())
    assert not lofit.v.any()
    assert (lofit.k, lofit.A.requires_grad) == (12, False)
    assert scores.meta["config"] == SHORT.to_dict()
    assert (scores.meta["n_train"], scores.meta["seed"], scores.task, scores.kind) == (10, 42, "golden-sft", "A-norm")


def test_offsets_start_from_the_unmodified_model(llama):
    """Step 2 trains v on the chosen heads alone; A stays zero, other heads stay zero."""
    lofit = ll.tune_offsets(llama, golden.sft_task(), CHOSEN, config=SHORT, progress=False)
    assert not lofit.A.any()
    assert not lofit.v[~lofit.mask].any()
    assert all(lofit.v[h].abs().max() > 0.1 for h in CHOSEN)  # four steps of about 0.1
    assert lofit.n_parameters == 24
    assert not lofit.v.requires_grad
    assert len(lofit.meta.history) == 4
    assert (lofit.meta.task, lofit.meta.seed, lofit.meta.n_train) == ("golden-sft", 42, 10)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(llama, monkeypatch, fails):
    """Logits, gradients' switches, modes and hooks are as before, also when training fails."""
    before = run(llama)
    wanted = next(llama.parameters())
    wanted.requires_grad_(True)
    llama.blocks[0].training = True
    if fails:
        monkeypatch.setattr(objective.Objective, "total", lambda self, rows, sums: sums.sum() * float("nan"))
    try:
        ll.tune_offsets(llama, golden.sft_task(), CHOSEN, config=SHORT, progress=False)
        assert not fails
    except TrainingDiverged:
        assert fails
    try:
        assert wanted.requires_grad
        assert wanted.grad is None
        assert llama.blocks[0].training
        assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())
    finally:
        wanted.requires_grad_(False)
        llama.blocks[0].training = False
    assert torch.equal(run(llama), before)


def test_the_same_seed_gives_the_same_bytes(llama, tmp_path, kind):
    """Trained twice and saved: equal files. Another seed: other numbers."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        lofit = ll.tune_offsets(llama, golden.TASKS[kind](), CHOSEN, seed=seed, config=SHORT, progress=False)
        lofit.save_pretrained(tmp_path / name)
    read = lambda name: [p.read_bytes() for p in sorted((tmp_path / name).iterdir())]
    assert read("a") == read("b")
    assert read("a") != read("c")


def test_the_penalty_counts_in_step_one_only(llama):
    """A large lambda shrinks A; in step 2 it changes nothing."""
    task, heavy = golden.sft_task(), SELECT.with_changes(l1=10.0)
    norms = [ll.select_heads(llama, task, config=c, progress=False).values.sum() for c in (SELECT, heavy)]
    assert norms[1] < 0.5 * norms[0]
    runs = [
        ll.tune_offsets(llama, task, CHOSEN, config=SHORT.with_changes(l1=weight), progress=False).v
        for weight in (0.0, 10.0)
    ]
    assert torch.equal(*runs)


# --------------------------------------------------------------------------------------------- DPO's reference


def test_the_reference_is_the_model_without_the_adapter(llama, monkeypatch):
    """Computed once, before training, with nothing attached: no init shows in it, however large."""
    calls, inner = [], objective._reference

    objective._references.clear()  # what other tests left

    def spy(model, *options):
        calls.append(sum(len(p.fwd_hooks) for p in model.hook_dict.values()))
        return inner(model, *options)

    monkeypatch.setattr(objective, "_reference", spy)
    large = SHORT.with_changes(init_std=0.5, max_steps=1)
    first = ll.tune_offsets(llama, golden.dpo_task(), CHOSEN, config=large, progress=False).meta.history[0]
    assert calls == [0]
    assert abs(first["loss"] - 0.6931) > 0.01  # log 2 would mean that the reference saw the init


def test_the_first_dpo_loss_by_a_slow_loop(llama):
    """-log sigmoid(beta * ((pi_c - pi_r) - (ref_c - ref_r))) from one plain forward a text, mean over the first batch."""
    config = SHORT.with_changes(init_std=0.3, beta=0.7, max_steps=1)
    task = golden.dpo_task()
    loss = ll.tune_offsets(llama, task, CHOSEN, seed=9, config=config, progress=False).meta.history[0]["loss"]
    tokenizer = tokenizer_of(llama)

    @torch.no_grad()
    def log_prob(prompt, answer):
        front = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        assert whole[: len(front)] == front
        ids = torch.tensor([[1, *whole, 2]])  # BOS in front, EOS behind the answer
        scores = logits_of(llama, ids, torch.ones_like(ids))[0].log_softmax(-1)
        return sum(scores[i - 1, ids[0, i]].item() for i in range(1 + len(front), ids.shape[1]))

    rows = torch.randperm(10, generator=torch.Generator().manual_seed(9)).tolist()[:4]
    examples = [task.training_examples()[r] for r in rows]
    reference = [log_prob(e.prompt, e.chosen) - log_prob(e.prompt, e.rejected) for e in examples]
    with Lofit.for_model(llama, CHOSEN).init_("v", seed=9, std=0.3).attached(llama):
        policy = [log_prob(e.prompt, e.chosen) - log_prob(e.prompt, e.rejected) for e in examples]
    margins = torch.tensor(policy) - torch.tensor(reference)
    assert loss == pytest.approx((-torch.nn.functional.logsigmoid(0.7 * margins)).mean().item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------ what is drawn


def test_training_examples_are_drawn_as_the_official_code_draws_them(llama, monkeypatch):
    """n_train rows are random.Random(seed).sample(rows, n), in that order; the count is recorded."""
    seen, inner = [], fitting.objective

    def spy(model, examples, **options):
        seen.append(examples)
        return inner(model, examples, **options)

    monkeypatch.setattr(fitting, "objective", spy)
    task = golden.sft_task()
    lofit = ll.tune_offsets(llama, task, CHOSEN, seed=3, n_train=6, config=SHORT, progress=False)
    assert list(seen[0]) == random.Random(3).sample(list(task.training["train"]), 6)
    assert lofit.meta.n_train == 6


def test_a_row_beyond_the_context_is_refused(bridge_llama):
    """The example and both lengths are named before anything is trained."""
    short = {"prompt": "a", "answer": "b"}
    long = Task.from_records("long", train=[short, {"prompt": "?!" * 1100, "answer": "b"}], test=[short])
    with pytest.raises(DataError, match=r"example 1 has 2\d\d\d tokens.* 2048"):
        ll.select_heads(bridge_llama, long, config=SHORT, progress=False)


def test_heads_outside_the_model_and_none_are_refused(bridge_llama):
    """Before training, by name."""
    with pytest.raises(InputError, match="L3H0"):
        ll.tune_offsets(bridge_llama, golden.sft_task(), HeadSet(["L3H0"]), config=SHORT, progress=False)
    with pytest.raises(InputError, match="1 to 10"):
        ll.select_heads(bridge_llama, golden.sft_task(), n_train=11, config=SHORT, progress=False)


def test_a_checkpoint_belongs_to_its_heads_and_task(bridge_llama, tmp_path):
    """A finished state is taken up by the same run and refused by another one."""
    go = lambda heads, **options: ll.tune_offsets(
        bridge_llama, golden.sft_task(), heads, config=SHORT, progress=False, checkpoint=tmp_path / "state", **options
    )
    assert torch.equal(go(CHOSEN).v, go(CHOSEN).v)
    with pytest.raises(InputError, match="differs in heads"):
        go(HeadSet(["L0H0"]))
    with pytest.raises(InputError, match="differs in"):
        go(CHOSEN, n_train=9)


# ---------------------------------------------------------------------------------------------------- presets

TABLE = {  # facts: lr A, lambda, lr v, K for Gemma-7B / Llama-2-7B / Llama-2-13B
    "truthfulqa": [(5e-3, 5e-4, 2e-2, 16), (5e-3, 5e-4, 1e-2, 32), (1e-3, 1e-3, 2e-2, 48)],
    "mquake": [(5e-3, 5e-4, 8e-3, 16), (5e-3, 1e-3, 1e-2, 32), (1e-3, 1e-3, 8e-3, 48)],
    "clutrr": [(5e-4, 5e-3, 1e-2, 16), (5e-4, 5e-3, 1e-2, 32), (1e-3, 1e-3, 1e-2, 48)],
}
SHAPES = {"google/gemma-7b": (28, 16), "meta-llama/Llama-2-7b-hf": (32, 32), "meta-llama/Llama-2-13b-hf": (40, 40)}


def info(name, shape):
    return ModelInfo(name, None, "bridge", False, "float32", *shape, d_model=8, d_vocab=8)


@pytest.mark.parametrize("family", TABLE)
def test_presets_are_the_official_table(family):
    """Learning rates, lambda and K of each task on each of the paper's models; the rest is common to all."""
    for (name, shape), (lr_A, l1, lr_v, k) in zip(SHAPES.items(), TABLE[family], strict=True):
        found = preset(info(name, shape), family, "dpo" if family == "truthfulqa" else "sft")
        assert (found.select.lr, found.select.l1, found.tune.lr, found.tune.l1, found.k) == (lr_A, l1, lr_v, 0.0, k)
        for c in (found.select, found.tune):
            assert (c.epochs, c.batch_size, c.clip, c.weight_decay, c.betas, c.eps, c.init_std, c.beta) == (
                5, 8, 1.0, 0.0, (0.9, 0.999), 1e-8, 1e-3, 0.5,
            )  # fmt: skip


def test_other_models_take_three_percent_of_their_heads():
    """Pythia-70m: 6 x 8 = 48 heads, 3 % = 1.44, so one; a task of one's own takes the row of its objective."""
    own = preset(info("EleutherAI/pythia-70m", (6, 8)), "my own", "dpo")
    assert (own.k, own.select.lr, own.tune.lr) == (1, 5e-3, 1e-2)
    assert preset(info("x", (12, 12)), "mine", "sft").k == 4  # 144 * 0.03 = 4.32
    assert preset(info("x", (12, 12)), "mine", "sft").select.l1 == 1e-3  # MQuAKE's row


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"lr": 0.0}, "lr is 0.0"), ({"lr": float("nan")}, "lr is nan"), ({"epochs": 0}, "epochs is 0"), ({"l1": -1.0}, "l1 is -1"),
     ({"batch_size": -8}, "batch_size"), ({"max_steps": 0}, "max_steps"), ({"clip": 0.0}, "clip"), ({"rate": 1.0}, "'rate'")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(changes, named):
    """A field that cannot be, and a field that is none."""
    with pytest.raises(InputError, match=named):
        TrainConfig(lr=0.1).with_changes(**changes)


def test_selection_may_be_restricted_to_some_heads(bridge_llama):
    """Heads that were left out score exactly 0 and come last."""
    task = Task.from_records("t", train=[{"prompt": "w:", "answer": " yes"}], test=[{"prompt": "w", "answer": "y"}])
    heads = HeadSet(["L1H0", "L1H3"])
    scores = ll.select_heads(bridge_llama, task, heads=heads, config=TrainConfig(lr=1e-2, epochs=1), progress=False)
    assert set(scores.top(2)) == set(heads)
    assert (scores.values > 0).sum() == 2
