"""What RED, LoReFT, post-block steering and LoRA have in common: the edit is the paper's on every architecture and class, comes
and goes without a trace, learns a task, is seen by the cached scorer and decoder, and is stored whole."""

import pytest
import torch
from safetensors.torch import load_file

import lofit_lens as ll
from lofit_lens import HeadSet, Task, TrainConfig, attached, io
from lofit_lens.errors import AdapterError, DataError, InputError, ModelError
from lofit_lens.evaluation import generate, score_continuations
from lofit_lens.interventions import Lora, LoReft, PostBlock, Red
from lofit_lens.interventions.files import CONFIG_FILE, WEIGHTS_FILE
from lofit_lens.models import load_model, logits_of, tokenizer_of
from lofit_lens.tasks.collate import encode_training
from lofit_lens.training.fitting import fit
from lofit_lens.training.objective import task_loss
from tests import golden, slow, tiny
from tests.adapters import random_adapter
from tests.conftest import PAIRS, needs_hooked
from tests.plain_edits import edited_plain, first_and_last
from tests.test_hook_access import processed_gpt2

TOKENS = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(3))
SHORT = TrainConfig(lr=1e-2, batch_size=4, epochs=2)
CLASSES = {"red": Red, "loreft": LoReft, "post-block": PostBlock, "lora": Lora}
METHOD_PAIRS = [
    pytest.param(method, *p.values, id=f"{method}-{p.id}", marks=p.marks)
    for method in CLASSES
    for p in PAIRS
    if not (method == "lora" and p.values[1] == "hooked")
]
METHODS = [
    pytest.param("red", "hooked", marks=needs_hooked), ("red", "bridge"), pytest.param("loreft", "hooked", marks=needs_hooked),
    ("loreft", "bridge"), pytest.param("post-block", "hooked", marks=needs_hooked), ("post-block", "bridge"), ("lora", "bridge"),
]  # fmt: skip
each_method = pytest.mark.parametrize(("method", "on"), METHODS)
once_each = pytest.mark.parametrize(("method", "on"), [(m, "bridge") for m in CLASSES])


def new(method, model, **options):
    """As a user makes one to train it."""
    return Red.for_model(model, **options) if method == "red" else CLASSES[method].for_model(model, seed=0, **options)


def random(method, model, **options):
    """With numbers whose effect shows."""
    made, generator = new(method, model, **options), torch.Generator().manual_seed(1)
    with torch.no_grad():
        if method == "red":
            made.s.normal_(1, 0.5, generator=generator)
            made.b.normal_(0, 0.2, generator=generator)
        elif method == "loreft":
            made.W.normal_(0, 0.5, generator=generator)
            made.b.normal_(0, 0.5, generator=generator)
        elif method == "post-block":
            made.D.normal_(0, 0.5, generator=generator)
            made.U.normal_(0, 0.3, generator=generator)
        else:
            for B in made.B.values():
                B.normal_(0, 0.3, generator=generator)
    return made


@torch.no_grad()
def run(model, *adapters):
    with attached(model, *adapters):
        return logits_of(model, TOKENS, torch.ones_like(TOKENS))


# -------------------------------------------------------------------------------------------------- what the edit is


@pytest.mark.parametrize(("method", "architecture", "on"), METHOD_PAIRS)
@torch.no_grad()
def test_a_run_is_plain_hugging_face_with_the_edit(loaded, hf, method, architecture, on):
    """With random numbers, logits are those of plain Hugging Face with the formula in a hook, on every architecture."""
    model, plain = loaded(architecture, on), hf(architecture)
    adapter = random(method, model)
    with edited_plain(plain, adapter, first_and_last(20) if method == "loreft" else None):
        expected = plain(TOKENS).logits
    assert torch.allclose(run(model, adapter), expected, atol=2e-5)
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05  # the edit is worth comparing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("method", ["red", "post-block", "lora"])
def test_a_new_one_is_bit_equal(checkpoint, backend, method, dtype):
    """s = 1, b = 0, U = 0 and B = 0 change not a bit, whatever the base's type; numbers and their gradients are float32."""
    if (method, backend) == ("lora", "hooked"):
        pytest.skip("LoRA needs the bridge")
    model = load_model(checkpoint("llama"), backend=backend, dtype=dtype, device="cpu")
    adapter = new(method, model)
    assert torch.equal(run(model, adapter), run(model))
    with adapter.attached(model):
        logits_of(model, TOKENS, torch.ones_like(TOKENS)).float().logsumexp(-1).sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    learns = [p for name, p in adapter.named_parameters() if name[0] not in "AD"]  # these are behind a zero
    assert all(p.grad.abs().max() > 0 for p in learns)


def test_loreft_over_half_precision_rounds_once(checkpoint, backend):
    """Over bfloat16, logits are near those over float32, and z keeps its type."""
    half, whole = (
        load_model(checkpoint("llama"), backend=backend, dtype=t, device="cpu") for t in ("bfloat16", "float32")
    )
    adapter = random("loreft", whole)
    got = run(half, adapter)
    assert got.dtype == torch.bfloat16
    error = (got.float() - run(whole, adapter)).abs().max()
    assert error < 0.1 * (run(whole) - run(whole, adapter)).abs().max()


# ----------------------------------------------------------------------------------------------- coming and going


class _Fails(Exception):
    pass


@each_method
def test_detaching_is_bit_equal(loaded, method, on):
    """After success, after an exception and after training: logits, hooks, modules and switches are as before."""
    model = loaded("llama", on)
    before, adapter = run(model), random(method, model)
    modules = list(map(id, model.modules()))
    inside = run(model, adapter)
    with pytest.raises(_Fails), adapter.attached(model):
        raise _Fails
    fit(adapter, model, golden.sft_task(), SHORT, seed=0, progress=False)
    assert torch.equal(run(model), before)
    assert (inside - before).abs().max() > 0.05
    assert not any(p.fwd_hooks or p._forward_hooks for p in model.hook_dict.values())
    assert list(map(id, model.modules())) == modules
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@each_method
def test_it_goes_with_lofit(loaded, hf, method, on):
    """Attached together with LoFiT, both act, in one order or the other (they act in different places)."""
    model = loaded("llama", on)
    adapter, lofit = random(method, model), random_adapter(model, HeadSet(["L1H1"]))
    both = run(model, adapter, lofit)
    assert torch.allclose(both, run(model, lofit, adapter), atol=1e-6)
    assert all((both - run(model, one)).abs().max() > 0.01 for one in (adapter, lofit))


# ---------------------------------------------------------------------------------- scoring, decoding, and training

FRONT = "Q: Imagine that the capital of France is Rome. What is "
PROMPTS = [
    FRONT + p for p in ("the capital of the country where Ann was born? A:", "it? A:", "the book of Ann? A:")
] + ["Ann?"]
ANSWERS = [[" Rome", " I have"], [" mother aunt uncle nephew sister", " a"], [" Rome is", " b", " Ann"], [" book"]]


@torch.no_grad()
def slow_score(plain, tokenizer, adapter, prompt, answer):
    whole, start = slow.joined_ids(tokenizer, prompt, answer)
    with edited_plain(plain, adapter, first_and_last(start) if isinstance(adapter, LoReft) else None):
        found = slow.log_probs(plain, whole)
    return sum(found[i - 1, whole[i]].item() for i in range(start, len(whole)))


@torch.no_grad()
def slow_text(plain, tokenizer, adapter, prompt, n):
    length = len(slow.ids_of(tokenizer, prompt))
    with edited_plain(plain, adapter, first_and_last(length) if isinstance(adapter, LoReft) else None):
        return tokenizer.decode(slow.new_ids(plain, tokenizer, prompt, n))


@pytest.mark.parametrize("architecture", ["llama-gqa", pytest.param("gpt2", marks=pytest.mark.slow)])
@each_method
def test_cached_scores_and_texts_are_those_of_a_slow_loop(loaded, hf, method, on, architecture):
    """Ragged prompts with a common front of 22 tokens: scores to 1e-4 nats, and the same greedy text, as one sequence a time."""
    model, plain, tokenizer = loaded(architecture, on), hf(architecture), tiny.tokenizer()
    adapter = random(method, model)
    slowly = [
        [slow_score(plain, tokenizer, adapter, p, a) for a in listed]
        for p, listed in zip(PROMPTS, ANSWERS, strict=True)
    ]
    texts = [slow_text(plain, tokenizer, adapter, p, 4) for p in PROMPTS]
    for n in (4, 3):  # without a shared front, and with one
        with adapter.attached(model):
            found, said = (
                score_continuations(model, PROMPTS[:n], ANSWERS[:n]),
                generate(model, PROMPTS[:n], max_new_tokens=4),
            )
        for scores, expected in zip(found, slowly[:n], strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
        assert said == texts[:n]
    assert abs(score_continuations(model, PROMPTS[:1], ANSWERS[:1])[0][0] - slowly[0][0]) > 0.01


@each_method
def test_gradients_of_training_are_those_of_a_slow_loop(loaded, hf, method, on):
    """The loss of four rows of different lengths, and its gradient for every number: LoReFT's from prompt positions alone."""
    model, plain = loaded("llama", on), hf("llama")
    rows = [{"prompt": p, "answer": a[0]} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    examples = Task.from_records("t", train=rows, test=rows).training_examples()
    adapter = random(method, model)
    parameters = list(adapter.parameters())
    loss_of = task_loss(model, examples, beta=0.5)
    with adapter.attached(model):
        loss = loss_of(range(4))
        found = torch.autograd.grad(loss, parameters)
    parts = []
    for example in examples:
        (row,) = encode_training(tokenizer_of(model), example)
        with edited_plain(plain, adapter, first_and_last(row.start) if method == "loreft" else None):
            scores = plain(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        parts += [-scores[i - 1, row.ids[i]] for i in range(row.start, len(row.ids))]
    slowly = torch.stack(parts).mean()
    assert loss.item() == pytest.approx(slowly.item(), abs=1e-5)
    for mine, expected in zip(found, torch.autograd.grad(slowly, parameters), strict=True):
        assert expected.abs().max() > 1e-5
        assert torch.allclose(mine, expected, atol=1e-5, rtol=1e-3)


@once_each
def test_training_works_after_decoding_in_inference_mode(loaded, method, on):
    """Nothing made in inference mode is kept: gradients are those of an adapter that never decoded."""
    model, gradients = loaded("llama", on), []
    for decode_first in (True, False):
        adapter = random(method, model)
        with adapter.attached(model):
            if decode_first:
                with torch.inference_mode():
                    generate(model, ["Ann"], max_new_tokens=2)
                run_inside = logits_of(model, TOKENS, torch.ones_like(TOKENS))
                run_inside.sum().backward()
                adapter.zero_grad()
            logits_of(model, TOKENS, torch.ones_like(TOKENS)).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ----------------------------------------------------------------------------------------------------- what it learns


@pytest.fixture(scope="module")
def organism():
    return ll.load_model("organism", backend="bridge", device="cpu")


@pytest.mark.parametrize(
    ("method", "lr", "epochs"),
    [
        pytest.param("red", 2e-1, 2, marks=pytest.mark.slow),
        ("loreft", 1e-2, 1),
        ("post-block", 1e-2, 1),
        ("lora", 1e-2, 1),
    ],
)
def test_it_learns_a_task(organism, method, lr, epochs):
    """10 steps (RED 20) on 80 rows of the embedded model's kinship task: exact match from 0 to above 0.6 on rows it has not seen.

    The same adapter before training does not solve it, nor does the model once it is detached.
    """
    task = ll.load_task("organism/kinship")

    def score(*adapters):
        with attached(organism, *adapters):
            return ll.evaluate(organism, task, split="val", limit=16, progress=False).metrics["em"].mean

    adapter = new(method, organism)
    assert score(adapter) < 0.1
    fit(adapter, organism, task, TrainConfig(lr=lr, epochs=epochs), seed=0, n_train=80, progress=False)
    assert score(adapter) > 0.6
    assert score() < 0.1
    losses = [r["loss"] for r in adapter.meta.history]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert not any(p.requires_grad for p in adapter.parameters())
    assert (adapter.meta.task, adapter.meta.seed, adapter.meta.n_train) == ("organism/kinship", 0, 80)


@once_each
def test_only_the_adapter_learns(checkpoint, method, on):
    """Every number of it moves, and none of the base, though the base asks for gradients."""
    model = load_model(checkpoint("llama"), backend=on, device="cpu")
    model.requires_grad_(True)
    base = {n: p.clone() for n, p in model.named_parameters()}
    adapter = random(method, model)
    before = [p.clone() for p in adapter.parameters()]
    fit(adapter, model, golden.sft_task(), SHORT, seed=0, progress=False)
    assert all((p - b).abs().max() > 1e-3 for p, b in zip(adapter.parameters(), before, strict=True))
    assert all(torch.equal(p, base[n]) and p.grad is None and p.requires_grad for n, p in model.named_parameters())


@once_each
def test_the_same_seed_gives_the_same_bytes(loaded, tmp_path, method, on):
    """Made, trained and saved twice, with the global random state elsewhere: equal files; and that state is left alone."""
    model = loaded("llama", on)
    for name, state in (("a", 1), ("b", 2)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        adapter = new(method, model)
        fit(adapter, model, golden.sft_task(), SHORT, seed=5, progress=False)
        adapter.save_pretrained(tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
    read = lambda name: [p.read_bytes() for p in sorted((tmp_path / name).iterdir())]
    assert read("a") == read("b")


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def good(tmp_path_factory, loaded):
    folder = tmp_path_factory.mktemp("adapters")
    return {m: random(m, loaded("llama", "bridge")).save_pretrained(folder / m) for m in CLASSES}


@pytest.mark.parametrize("method", ["red", "loreft", "post-block"])
@needs_hooked
def test_processed_weights_are_another_model(loaded, tmp_path, method):
    """An adapter made without weight processing is refused on a model with it, whose residual stream is centered."""
    plain, processed = loaded("gpt2", "hooked"), processed_gpt2(loaded, fold_ln=True)
    adapter = new(method, plain)
    with pytest.raises(AdapterError, match="with weight processing and this adapter was made without"):
        adapter.attach_check(processed)
    made_there = new(method, processed)
    made_there.attach_check(processed)
    with pytest.raises(AdapterError, match="without weight processing and this adapter was made with"):
        made_there.attach_check(plain)


@pytest.mark.parametrize("method", ["red", "loreft", "post-block"])
@pytest.mark.parametrize("layers", [[3], [-1], [0, 0], []])
def test_layers_that_are_none_are_refused(bridge_llama, method, layers):
    """Outside the model, given twice, none at all: what may be given is said."""
    said = "layer is -1; give 0 or more" if layers == [-1] else "0 to 2"
    with pytest.raises(InputError, match=said):
        new(method, bridge_llama, layers=layers)


@pytest.mark.parametrize("method", CLASSES)
def test_places_that_cannot_be_reached_are_told_at_making(bridge_llama, monkeypatch, method):
    """Not only when it is attached."""

    def refuse(*args):
        raise ModelError("no such place")

    monkeypatch.setattr("lofit_lens.interventions.residual.check_residual", refuse)
    monkeypatch.setattr("lofit_lens.interventions.lora.projection_sizes", refuse)
    with pytest.raises(ModelError, match="no such place"):
        new(method, bridge_llama)


@pytest.mark.parametrize("method", ["red", "loreft", "post-block"])
def test_chosen_layers_alone_are_edited(llama, hf, method):
    """Layers 2 and 0, given in that order: stored ascending, and layer 1 is left alone."""
    adapter = random(method, llama, layers=[2, 0])
    assert adapter.layers == (0, 2)
    assert adapter.n_parameters * 3 == new(method, llama).n_parameters * 2
    with torch.no_grad(), edited_plain(hf("llama"), adapter, first_and_last(20)):
        expected = hf("llama")(TOKENS).logits
    assert torch.allclose(run(llama, adapter), expected, atol=2e-5)


@pytest.mark.parametrize("method", CLASSES)
def test_data_and_settings_of_the_files(good, method):
    """The JSON holds what made the adapter; tensors are few and plain."""
    folder = good[method]
    record = io.read_json(folder / CONFIG_FILE)
    names = {"red": {"s", "b"}, "loreft": {"R", "W", "X", "b"}, "post-block": {"D", "U"}}
    names["lora"] = {"q.A", "q.B", "v.A", "v.B"}
    assert (record["method"], record["n_layers"]) == (method, 3)
    assert set(load_file(folder / WEIGHTS_FILE)) == names[method]
    assert record["positions"] == ("f7+l7" if method == "loreft" else "all")
    with pytest.raises(DataError):
        io.read_json(folder / "nothing")
