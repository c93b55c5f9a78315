"""Every shortcut of a training step against the plain path: one padded batch, full logits, the class's own attention."""

import itertools
import math

import pytest
import torch

import lofit_lens as ll
from lofit_lens import HeadSet, Lofit, Task, TrainConfig
from lofit_lens.errors import ModelError
from lofit_lens.models import before_each_pass, logits_of
from lofit_lens.tasks.collate import Encoded
from lofit_lens.training import FAST, PLAIN, Passes, objective, passes
from lofit_lens.training.objective import Steps
from lofit_lens.training.objective import objective as objective_of
from tests import golden
from tests.adapters import CHOSEN
from tests.conftest import BACKENDS, HAS_HOOKED, needs_hooked

SELECT, TUNE = golden.SELECT.with_changes(max_steps=8), golden.TUNE.with_changes(max_steps=8)
WAYS = {
    "near lengths": Passes(None, True, False, False, False),
    "fused": Passes(None, False, True, False, False),
    "scored only": Passes(None, False, False, True, False),
    "shared prompts": Passes(None, False, False, False, True),
    "checkpointing": Passes(None, False, False, False, False, True),
    "tight budget": Passes(40, False, False, False, False),
    "one example a pass": Passes(1, False, False, False, False),
    "all": FAST,
    "all, checkpointing": Passes(checkpointing=True),
}


@pytest.fixture(autouse=True)
def _every_shortcut_pays(monkeypatch):
    """On tiny texts too."""
    monkeypatch.setattr(passes, "WASTE", 0)


@pytest.fixture(scope="module")
def trained(loaded):
    """(class, task, component) -> the adapter that the plain path learns, once."""
    made = {}

    def plain(on, kind, component):
        if (on, kind, component) not in made:
            made[on, kind, component] = learn(loaded("llama", on), kind, component, PLAIN)
        return made[on, kind, component]

    return plain


def learn(model, kind, component, how):
    task = golden.TASKS[kind]()
    if component == "A":
        return ll.tune_scalings(model, task, config=SELECT, passes=how, progress=False)
    return ll.tune_offsets(model, task, CHOSEN, config=TUNE, passes=how, progress=False)


def trainings():
    """(class, task, component): each two of them are together once in the quick ones; the others are slow."""
    quick = {("hooked", "sft", "v"), ("hooked", "dpo", "A"), ("bridge", "sft", "A"), ("bridge", "dpo", "v")}
    for of in itertools.product(("hooked", "bridge"), golden.TASKS, ("A", "v")):
        marks = [needs_hooked] * (of[0] == "hooked") + [pytest.mark.slow] * (HAS_HOOKED and of not in quick)
        yield pytest.param(*of, marks=marks, id="-".join(of))


@pytest.mark.parametrize(("on", "kind", "component"), trainings())
@pytest.mark.parametrize("way", WAYS)
def test_each_shortcut_learns_what_the_plain_path_learns(loaded, trained, on, kind, component, way):
    """Eight steps: every record and every number to 1e-5, and the same ranking of heads."""
    want, got = trained(on, kind, component), learn(loaded("llama", on), kind, component, WAYS[way])
    for a, b in zip(got.meta.history, want.meta.history, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for name in ("A", "v"):
        assert (getattr(got, name) - getattr(want, name)).abs().max() < 1e-5
    assert got.norms(component).top(4).heads == want.norms(component).top(4).heads
    assert want.meta.history[0]["loss"] > 0.1


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kind", golden.TASKS)
def test_bfloat16_weights_with_a_float32_adapter(checkpoint, on, kind):
    """Shortcuts or not, the losses agree as well as bfloat16 does; the adapter stays float32 and finite."""
    model = ll.load_model(checkpoint("llama"), backend=on, device="cpu", dtype="bfloat16")
    short = SELECT.with_changes(max_steps=4)
    task = golden.TASKS[kind]()
    runs = [ll.tune_scalings(model, task, config=short, passes=how, progress=False) for how in (PLAIN, FAST)]
    losses = [[r["loss"] for r in run.meta.history] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.05)
    assert all(run.A.dtype == torch.float32 and bool(run.A.isfinite().all()) for run in runs)


# ------------------------------------------------------------------------------------------------ what was run


@pytest.fixture
def counted(bridge_llama):
    """Places and real tokens of each pass; what is tried once a model was tried before."""
    for kind in golden.TASKS:
        learn(bridge_llama, kind, "v", FAST)
    seen = []
    with before_each_pass(bridge_llama, lambda of: seen.append((of.place.numel(), int((of.place >= 0).sum())))):
        yield seen


def sizes(kind):
    """Tokens of each sequence of the task's rows, by the tiny tokenizer, with BOS and EOS."""
    from tests import tiny

    tokenizer, rows = tiny.tokenizer(), golden.TASKS[kind]().training_examples()
    texts = [[e.prompt + a for a in ([e.answer] if kind == "sft" else [e.chosen, e.rejected])] for e in rows]
    return [[len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 2 for t in forms] for forms in texts]


@pytest.mark.parametrize("kind", golden.TASKS)
def test_near_lengths_pad_less_and_run_the_same_tokens(bridge_llama, counted, kind):
    """One pass over the data: all real tokens once; the plain path pads each batch to its longest."""
    one, task, found = TUNE.with_changes(epochs=1), golden.TASKS[kind](), {}
    for name, how in (("plain", PLAIN), ("near", WAYS["near lengths"])):
        objective_of(bridge_llama, task.training_examples(), beta=one.beta, passes=how, batch_size=one.batch_size)
        counted.clear()  # the reference's passes
        ll.tune_offsets(bridge_llama, task, CHOSEN, config=one, passes=how, progress=False)
        found[name] = list(counted)
        assert sum(n for _, n in counted) == sum(sum(forms) for forms in sizes(kind))
    assert len(found["plain"]) == 3
    assert len(found["near"]) > 3
    assert sum(places for places, _ in found["near"]) < sum(places for places, _ in found["plain"])


def test_no_pass_exceeds_the_budget_but_an_example_alone(bridge_llama, counted):
    """With 60 tokens no pass has more than 60 places; with 1 each example runs alone."""
    one = TUNE.with_changes(epochs=1)
    for budget, limit in ((60, 60), (1, max(map(max, sizes("sft"))))):
        counted.clear()
        ll.tune_offsets(bridge_llama, golden.sft_task(), CHOSEN, config=one, passes=Passes(budget), progress=False)
        assert max(p for p, _ in counted) <= limit
    assert len(counted) == 10


def test_prompts_of_pairs_run_once(bridge_llama, counted):
    """Prompts, then answers without their last token, behind them; the last token of an answer predicts nothing."""
    rows = [{"prompt": "Q: " + "of the country " * 3 + "A:", "chosen": "brother", "rejected": "uncle no"}] * 4
    task = Task.from_records("pairs", train=rows, test=rows)
    forms = objective_of(bridge_llama, task.training_examples(), beta=0.5).rows[0]
    config = TUNE.with_changes(epochs=1, max_steps=1)
    ll.tune_offsets(bridge_llama, task, CHOSEN, config=config, passes=WAYS["shared prompts"], progress=False)
    prompts, answers = counted[-2:]
    assert prompts == (4 * forms[0].start, 4 * forms[0].start)
    assert answers[1] == 4 * sum(f.n_labels - 1 for f in forms)


def test_prompts_are_not_shared_where_it_does_not_pay(bridge_llama, counted, monkeypatch):
    """With a pass worth a thousand tokens each step is one pass."""
    monkeypatch.setattr(passes, "WASTE", 1000)
    config = TUNE.with_changes(epochs=1, max_steps=2)
    objective_of(bridge_llama, golden.dpo_task().training_examples(), beta=0.5, passes=FAST, batch_size=4)
    counted.clear()
    ll.tune_offsets(bridge_llama, golden.dpo_task(), CHOSEN, config=config, progress=False)
    assert len(counted) == 2


def test_a_model_whose_cache_is_wrong_shares_nothing(bridge_llama, monkeypatch, trained):
    """Where going on from cached keys fails, pairs run side by side, to the very numbers of the plain path."""

    def wrong(model):
        raise ModelError("logits from the KV cache are off")

    monkeypatch.setattr(passes, "gaps_are_exact", wrong)
    got = learn(bridge_llama, "dpo", "v", WAYS["shared prompts"])
    assert torch.equal(got.v, trained("bridge", "dpo", "v").v)


@pytest.mark.parametrize("kind", ["TransformerLens", "torch"])
def test_under_somebodys_hook_pairs_run_whole(llama, monkeypatch, trained, kind):
    """A hook that counts places sees every sequence from its start: the loss and what is learned are the plain path's."""

    def early(x):
        return torch.cat([-3.0 * x[:, :3], x[:, 3:]], dim=1)

    point = llama.hook_dict["blocks.1.hook_resid_post"]
    if kind == "torch":
        handle = point.register_forward_hook(lambda module, args, out: early(out))
    else:
        point.add_hook(lambda x, hook: early(x), is_permanent=True)
        handle = point.fwd_hooks[-1].hook
    try:
        got, want = (learn(llama, "dpo", "v", how) for how in (WAYS["shared prompts"], PLAIN))
    finally:
        handle.remove()
        point.fwd_hooks.clear()
    assert torch.equal(got.v, want.v)
    assert (got.meta.history[-1]["loss"] - learn(llama, "dpo", "v", PLAIN).meta.history[-1]["loss"]) != pytest.approx(
        0, abs=1e-4
    )


METHODS = {
    "lora": lambda model: ll.Lora.for_model(model, seed=0),
    "red": ll.Red.for_model,
    "loreft": lambda model: ll.LoReft.for_model(model, positions="f3+l3", seed=0),
}


@pytest.mark.parametrize(
    "way",
    [
        "all",
        "all, checkpointing",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("shared prompts", "tight budget")),
    ],
)
@pytest.mark.parametrize("kind", golden.TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_learn_what_the_plain_path_teaches_them(bridge_llama, method, kind, way):
    """LoRA inside the model, RED, and LoReFT at certain positions, after three steps."""
    config = TrainConfig(lr=1e-2, epochs=1, batch_size=4)
    got, want = METHODS[method](bridge_llama), METHODS[method](bridge_llama)
    for adapter, how in ((got, WAYS[way]), (want, PLAIN)):
        ll.fit(adapter, bridge_llama, golden.TASKS[kind](), config, seed=0, passes=how, progress=False)
    assert [r["loss"] for r in got.meta.history] == pytest.approx([r["loss"] for r in want.meta.history], abs=1e-5)
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_the_loss_is_the_mean_over_all_label_tokens_of_the_step(llama):
    """Three rows in three passes against -log p of every label, one plain forward a row."""
    with torch.no_grad():
        known = objective_of(llama, golden.sft_task().training_examples(), beta=0.5)
        total = n = 0
        for (row,) in [known.rows[r] for r in (0, 3, 7)]:
            ids = torch.tensor([row.ids])
            scores = logits_of(llama, ids, torch.ones_like(ids))[0].log_softmax(-1)
            total -= sum(scores[i - 1, row.ids[i]].item() for i in range(row.start, len(row.ids)))
            n += row.n_labels
    lofit = Lofit.for_model(llama).train_only("A")
    with lofit.attached(llama):
        (loss,) = Steps(llama, [known], Passes(1), owned=False)([(0, [0, 3, 7])])
    assert loss.item() == pytest.approx(total / n, abs=1e-5)
    assert math.isfinite(float(lofit.A.grad.abs().sum()))


# -------------------------------------------------------------------------------------------------- memory


def saved_bytes(work):
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""
    found = {}

    def pack(t):
        if not t.is_leaf:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work()
    return sum(found.values())


@pytest.mark.parametrize("on", BACKENDS)
def test_the_backward_pass_stops_at_the_lowest_edited_layer(loaded, on):
    """Heads of the last of three layers alone: below it nothing is kept, so that less than half is."""
    model, kept = loaded("llama", on), []
    known = objective_of(model, golden.sft_task().training_examples(), beta=0.5)
    for layer in (0, 2):
        lofit = Lofit.for_model(model, HeadSet([(layer, 1)])).train_only("v")
        with lofit.attached(model), FAST.ready(model):
            step = Steps(model, [known], FAST, owned=False)
            kept.append(saved_bytes(lambda: step([(0, [0, 1, 2, 3])])))  # noqa: B023
    assert kept[1] < 0.55 * kept[0]


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("way", ["near lengths", "scored only", "fused", "checkpointing", "all"])
def test_no_shortcut_keeps_more_for_the_backward_pass(loaded, on, way):
    """Bytes kept by a step of SFT rows, against the plain path's; several passes keep theirs one after the other."""
    model = loaded("llama", on)
    known = objective_of(model, golden.sft_task().training_examples(), beta=0.5)
    lofit = Lofit.for_model(model).train_only("A")
    kept = {}
    for name, how in (("plain", PLAIN), (way, WAYS[way])):
        with lofit.attached(model), how.ready(model):
            step = Steps(model, [known], how, owned=False)
            kept[name] = saved_bytes(lambda: step([(0, list(range(8)))]))  # noqa: B023
    assert kept[way] <= kept["plain"]


def test_shared_prompts_keep_no_more_than_both_sequences(bridge_llama):
    """Pairs with a long prompt: prompt and answers apart keep less than both whole sequences."""
    rows = [{"prompt": "Q: " + "of the country " * 8 + "A:", "chosen": "brother", "rejected": "uncle no"}] * 4
    task = Task.from_records("pairs", train=rows, test=rows)
    known = objective_of(bridge_llama, task.training_examples(), beta=0.5)
    lofit, kept = Lofit.for_model(bridge_llama).train_only("A"), {}
    for name, how in (("plain", PLAIN), ("shared", WAYS["shared prompts"])):
        step = Steps(bridge_llama, [known], how, owned=False)
        with lofit.attached(bridge_llama):
            kept[name] = saved_bytes(lambda: step([(0, [0, 1, 2, 3])]))  # noqa: B023
    assert kept["shared"] < kept["plain"]


# -------------------------------------------------------------------------------------------- DPO's reference


@pytest.fixture
def computed(monkeypatch):
    """Rows of each computation of reference log-probs."""
    calls, inner = [], objective._reference

    def spy(model, rows, *options):
        calls.append(len(rows))
        return inner(model, rows, *options)

    monkeypatch.setattr(objective, "_reference", spy)
    objective._references.clear()
    return calls


def test_the_reference_is_kept_by_content(llama, computed):
    """The same rows in any order, and twice the same row, cost nothing again; bits are equal. Other rows do cost."""
    examples = golden.dpo_task().training_examples()
    first = objective_of(llama, examples, beta=0.5)
    turned = objective_of(llama, examples[::-1], beta=0.1)
    assert torch.equal(first.reference, turned.reference.flip(0))
    assert torch.equal(objective_of(llama, [*examples, examples[0]], beta=0.5).reference[-1], first.reference[0])
    assert computed == [10]
    objective_of(llama, examples[:4], beta=0.5)
    assert computed == [10, 4]


def test_other_weights_have_another_reference(fresh, computed):
    """A weight changed in place is seen; put back, the old values come back at no cost."""
    examples, weight = golden.dpo_task().training_examples(), next(fresh.parameters())
    before = objective_of(fresh, examples, beta=0.5).reference
    old = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    try:
        assert not torch.equal(objective_of(fresh, examples, beta=0.5).reference, before)
    finally:
        weight.data.copy_(old)
    assert torch.equal(objective_of(fresh, examples, beta=0.5).reference, before)
    assert computed == [10, 10]


def test_under_somebodys_hook_nothing_is_kept(llama, computed):
    """What a hook does cannot be seen: the reference is that of the model with it, and is computed each time."""
    examples = golden.dpo_task().training_examples()
    bare = objective_of(llama, examples, beta=0.5).reference
    with Lofit.for_model(llama, CHOSEN).init_("v", seed=0, std=1.0).attached(llama):
        hooked = [objective_of(llama, examples, beta=0.5).reference for _ in range(2)]
    assert torch.equal(*hooked)
    assert (hooked[0] - bare).abs().max() > 0.01
    assert computed == [10, 10, 10]
    assert torch.equal(objective_of(llama, examples, beta=0.5).reference, bare)


@pytest.mark.parametrize("how", ["torch hook", "training mode"])
def test_what_no_key_tells_is_not_kept(llama, computed, how):
    """Torch's own hooks, and dropout: the reference is computed each time."""
    examples = golden.dpo_task().training_examples()
    bare = objective_of(llama, examples, beta=0.5).reference
    handle = llama.blocks[1].register_forward_hook(lambda module, args, out: 0.5 * out) if how == "torch hook" else None
    llama.blocks[1].training = how == "training mode"
    try:
        found = [objective_of(llama, examples, beta=0.5).reference for _ in range(2)]
    finally:
        llama.blocks[1].training = False
        if handle is not None:
            handle.remove()
    assert torch.equal(*found)
    assert torch.equal(found[0], bare) == (how == "training mode")
    assert computed == [10, 10, 10]


def test_the_reference_keeps_the_budget(bridge_llama, computed, counted):
    """No pass of it has more places than the budget, and values are those of one pass."""
    examples = golden.dpo_task().training_examples()
    whole = objective_of(bridge_llama, examples, beta=0.5, batch_size=64).reference
    assert len(counted) == 1
    counted.clear()
    parts = objective_of(bridge_llama, examples, beta=0.5, batch_size=64, passes=Passes(60)).reference
    assert max(places for places, _ in counted) <= 60
    assert (parts - whole).abs().max() < 1e-4


def test_the_number_of_kept_references_is_bounded(llama, computed, monkeypatch):
    """The oldest goes first."""
    monkeypatch.setattr(objective, "REFERENCE_SETS", 2)
    examples = golden.dpo_task().training_examples()
    for n in (3, 4, 5, 5, 4, 3):
        objective_of(llama, examples[:n], beta=0.5)
    assert computed == [3, 4, 5, 3]


def test_a_pair_behind_a_merged_border_is_run_whole(monkeypatch):
    """Prompts that end at different places for chosen and rejected are not shared; nor answers of one token."""
    pair = lambda starts, lengths: tuple(Encoded(tuple(range(n)), s) for s, n in zip(starts, lengths, strict=True))
    assert passes.sharing_pays([pair((20, 20), (24, 25))], 0)
    assert not passes.sharing_pays([pair((20, 19), (24, 25))], 0)
    assert not passes.sharing_pays([pair((20, 20), (21, 25))], 0)
    assert not passes.sharing_pays([pair((20, 20), (24, 25)), (Encoded((1, 2, 3), 1),)], 0)
    # 2 x 25 places against 20 + 2 x 4: 22 saved.
    assert passes.sharing_pays([pair((20, 20), (24, 25))], 21)
    assert not passes.sharing_pays([pair((20, 20), (24, 25))], 22)
