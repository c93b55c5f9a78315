"""lm-evaluation-harness and Inspect on edited models: the same logits, answers and scores as here, item by item."""

import importlib
import json
import sys

import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import AdapterError, InputError, ModelError
from lofit_lens.models import context_length, logits_of
from lofit_lens.sharing import LM_EVAL_TASKS, export_steered, steered
from lofit_lens.sharing.for_inspect import prompt_of
from lofit_lens.tasks.collate import encode
from tests.adapters import CHOSEN, output_projection, random_adapter
from tests.conftest import BACKENDS
from tests.test_cli import run
from tests.test_iti import random_iti
from tests.test_layers import FILES, imports

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
STEERED = ("llama-gqa", "gpt2", "pythia")


def harness(name="lm_eval"):
    return pytest.importorskip(name, reason='needs lm_eval: pip install "lofit-lens[lm-eval]"')


@pytest.fixture(scope="module")
def organism():
    """The embedded model on the bridge, and scalings and offsets that change what it says of families."""
    model = ll.load_model("organism", backend="bridge", device="cpu")
    return model, random_adapter(model, ["L2H3", "L1H6", "L1H13"], A=3.0, v=20.0)


def evaluated(lm, task, limit, **metadata):
    """Samples of one of our task files, in the order of its rows, and its results."""
    manager = harness("lm_eval.tasks").TaskManager(
        include_path=str(LM_EVAL_TASKS), include_defaults=False, metadata=metadata
    )
    found = harness().simple_evaluate(model=lm, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0)
    return sorted(found["samples"][task], key=lambda s: s["doc_id"]), found["results"][task]


# ------------------------------------------------------------------------------------------------ lm-evaluation-harness


@torch.no_grad()
def test_the_harness_sees_the_edited_logits_and_the_model_stays_bare(bridge_llama):
    """Of each pass; between passes nothing is attached."""
    harness()
    lofit = random_adapter(bridge_llama)
    bare = bridge_llama(TOKENS)
    with lofit.attached(bridge_llama):
        edited, masked = bridge_llama(TOKENS), logits_of(bridge_llama, TOKENS, MASK)
    assert (edited - bare).abs().max() > 0.05
    assert (edited - masked).abs().max() < 1e-5
    lm = ll.lm_eval_model(bridge_llama, lofit)
    assert torch.equal(lm._model_call(TOKENS), edited)
    assert torch.equal(bridge_llama(TOKENS), bare)
    assert torch.equal(ll.lm_eval_model(bridge_llama)._model_call(TOKENS), bare)
    with lofit.attached(bridge_llama):
        assert torch.equal(ll.lm_eval_model(bridge_llama)._model_call(TOKENS), edited)


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_texts_are_tokenized_as_here_and_the_users_tokenizer_stays(checkpoint, prepend_bos):
    """With BOS and without, alone and padded; a text that is cut loses its front."""
    harness()
    model = ll.load_model(checkpoint("llama"), backend="bridge", device="cpu", prepend_bos=prepend_bos)
    before = model.tokenizer.pad_token_id
    lm, texts = ll.lm_eval_model(model), ["Q: Ann?\nA:", "how?"]
    expected = [encode(model.tokenizer, text) for text in texts]
    assert [lm.tok_encode(text) for text in texts] == expected
    assert lm.tok_encode(texts[0], add_special_tokens=False) == expected[0][int(prepend_bos) :]
    ids, mask = lm.tok_batch_encode(texts)
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == expected
    assert mask[1, 0] == 0
    assert lm.tok_encode(texts[0], left_truncate_len=2) == expected[0][-2:]
    assert model.tokenizer.pad_token_id == before
    assert lm.max_length == context_length(model)


def test_generated_answers_and_grades_are_those_of_evaluate(organism):
    """Every item of the embedded model's task, with the adapter and without."""
    harness()
    model, lofit = organism
    ours = ll.evaluate(model, "organism/kinship", limit=40, progress=False).items
    with lofit.attached(model):
        tuned = ll.evaluate(model, "organism/kinship", limit=40, progress=False).items
    assert (tuned["generated"] != ours["generated"]).mean() > 0.2
    for adapter, expected in ((None, ours), (lofit, tuned)):
        samples, results = evaluated(ll.lm_eval_model(model, adapter, batch_size=7), "lofit_kinship", 40)
        assert [s["filtered_resps"][0].strip() for s in samples] == [t.strip() for t in expected["generated"]]
        for metric in ("em", "contains"):
            assert [s[metric] for s in samples] == expected[metric].tolist()
            assert results[f"{metric},none"] == pytest.approx(expected[metric].mean())


@pytest.mark.data
@pytest.mark.parametrize("name", ["mquake", "clutrr"])
def test_the_papers_prompts_and_limits(organism, data_dir, name):
    """Of the real files: the prompt as it is, trailing line break included, and as many new tokens."""
    harness()
    model, lofit = organism
    task = ll.load_task(name, data_dir=data_dir)
    lm, seen = ll.lm_eval_model(model, lofit), []
    lm.generate_until = lambda requests, **_: [seen.append(r.args) or f" {r.doc['references'][0]}" for r in requests]
    samples, results = evaluated(lm, f"lofit_{name}", 8, data_dir=str(data_dir))
    assert [prompt for prompt, _ in seen] == [e.prompt for e in task.examples("test", limit=8)]
    assert {options["max_gen_toks"] for _, options in seen} == {task.max_new_tokens}
    assert [s["doc"]["references"][0] for s in samples] == [e.references[0] for e in task.examples("test", limit=8)]
    assert results["em,none"] == 1.0


@pytest.mark.data
def test_truthfulqa_scores_are_those_of_evaluate(organism, data_dir):
    """MC1, MC2 and MC3 of every item to 1e-6, in another layout of passes."""
    harness()
    model, lofit = organism
    with lofit.attached(model):
        ours = ll.evaluate(model, ll.load_task("truthfulqa", fold=1, data_dir=data_dir), limit=6, progress=False).items
    samples, _ = evaluated(ll.lm_eval_model(model, lofit), "lofit_truthfulqa", 6, data_dir=str(data_dir), fold=1)
    for metric in ("mc1", "mc2", "mc3"):
        assert [s[metric] for s in samples] == pytest.approx(ours[metric].tolist(), abs=1e-6), metric


def test_what_the_harness_cannot_run_is_refused(loaded, bridge_llama, unchecked):
    """Positions that it does not state, HookedTransformer, an adapter of another model, and what is no adapter."""
    harness()
    with pytest.raises(InputError, match="acts at positions answer, but lm_eval does not say"):
        ll.lm_eval_model(bridge_llama, random_iti(bridge_llama).with_positions("answer"))
    with pytest.raises(InputError, match="is not an adapter"):
        ll.lm_eval_model(bridge_llama, "out/adapter")
    with pytest.raises(AdapterError):
        ll.lm_eval_model(bridge_llama, random_adapter(loaded("llama-gqa", "bridge")))
    lm = ll.lm_eval_model(bridge_llama)
    with random_iti(bridge_llama).with_positions("answer").attached(bridge_llama), pytest.raises(InputError):
        lm._model_call(TOKENS)
    if "hooked" in BACKENDS:
        with pytest.raises(ModelError, match=r"holds no Hugging Face model.*backend='bridge'"):
            ll.lm_eval_model(loaded("llama", "hooked"))


def test_the_shell_runs_the_harness(capsys, monkeypatch, organism, tmp_path):
    """Metrics in a table, samples in a file; an unknown task and an unusable batch size are one line."""
    harness()
    organism[1].save_pretrained(tmp_path / "a")
    common = ("lm-eval", "--adapter", tmp_path / "a", "--device", "cpu", "--limit", 5)
    code, out, err = run(
        capsys, monkeypatch, *common, "--tasks", "lofit_kinship", "--out", tmp_path / "r.json", "--json"
    )
    assert code == 0, err
    record, kept = json.loads(out), json.loads((tmp_path / "r.json").read_text())
    assert record["results"]["lofit_kinship"]["em,none"] == kept["results"]["lofit_kinship"]["em,none"]
    assert len(kept["samples"]["lofit_kinship"]) == record["n-samples"]["lofit_kinship"]["effective"] == 5
    for more, said in (
        (("--tasks", "lofit_mquak"), "lofit_mquake"),
        (("--tasks", "lofit_kinship", "--batch-size", "0"), "--batch-size is '0'"),
        (("--tasks", "lofit_kinship", "--include", tmp_path / "none"), "no folder"),
    ):
        code, _, err = run(capsys, monkeypatch, *common, *more)
        assert code == 2
        assert said in err


# --------------------------------------------------------------------------------------------------- steering vectors


@pytest.mark.parametrize("architecture", STEERED)
@pytest.mark.parametrize("method", ["iti", "lofit"])
@torch.no_grad()
def test_the_harness_steers_as_the_adapter_does(loaded, checkpoint, tmp_path, architecture, method):
    """Its own class reads the file, and its logits are the hooked model's."""
    theirs = harness("lm_eval.models.hf_steered").SteeredModel
    model = loaded(architecture, "bridge")
    adapter = random_iti(model) if method == "iti" else random_adapter(model, A=0.0)
    export_steered(adapter, tmp_path / "v.pt")
    lm = theirs(
        pretrained=str(checkpoint(architecture)), steer_path=str(tmp_path / "v.pt"), device="cpu", dtype="float32",
        attn_implementation="eager",
    )  # fmt: skip
    with adapter.attached(model):
        expected = logits_of(model, TOKENS, MASK)
    assert (lm.model(TOKENS).logits - expected).abs().max() > 0.05
    assert (lm._model_call(TOKENS) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_the_vectors_by_hand(loaded, hf, tmp_path):
    """`W_O[h] v`, summed over a layer's heads, at the layers that have one; entries as the tool reads them."""
    model, plain = loaded("llama", "bridge"), hf("llama")
    lofit = random_adapter(model, A=0.0)
    verified = export_steered(lofit, tmp_path / "v.pt")
    found = torch.load(tmp_path / "v.pt", weights_only=True)  # the test's own file
    assert sorted(found) == ["layers.0.self_attn.o_proj", "layers.2.self_attn.o_proj"]
    for name, entry in found.items():
        layer = int(name.split(".")[1])
        W = output_projection(plain, layer).weight
        expected = sum(W[:, 8 * h.head : 8 * h.head + 8] @ lofit.v[h] for h in CHOSEN if h.layer == layer)
        torch.testing.assert_close(entry.pop("steering_vector"), expected)
        assert entry == {"steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
    assert verified.passed


def test_vectors_that_differ_are_not_written(loaded, tmp_path, monkeypatch):
    """By one percent."""
    good = steered.biases_of

    def off(*args, **kwargs):
        outputs, biases = good(*args, **kwargs)
        return outputs, {layer: 1.01 * b for layer, b in biases.items()}

    monkeypatch.setattr(steered, "biases_of", off)
    with pytest.raises(ModelError, match=r"vectors for .*v.pt do differs from the hooked model by .*not kept"):
        export_steered(random_adapter(loaded("llama", "bridge"), A=0.0), tmp_path / "v.pt")
    assert not list(tmp_path.iterdir())


def test_what_no_vector_can_say_is_refused(loaded, tmp_path):
    """Scalings, positions, another ending, an existing file; nothing is written."""
    model = loaded("llama", "bridge")
    for adapter, name, said in (
        (random_adapter(model), "v.pt", "scales heads' outputs, and a bias only adds"),
        (random_iti(model).with_positions("answer"), "v.pt", "acts only at the positions 'answer'"),
        (random_adapter(model, A=0.0), "v.bin", "does not end in .pt"),
    ):
        with pytest.raises(InputError, match=said):
            export_steered(adapter, tmp_path / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "v.pt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        export_steered(random_adapter(model, A=0.0), tmp_path / "v.pt")
    assert (tmp_path / "v.pt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------ Inspect


def inspect(part="inspect_ai"):
    return pytest.importorskip(part, reason='needs inspect_ai: pip install "lofit-lens[inspect]"')


def test_an_inspect_task_from_end_to_end(organism, tmp_path):
    """The same answers and share of right ones as `evaluate`, with the adapter and without."""
    ai, dataset, scorer = inspect(), inspect("inspect_ai.dataset"), inspect("inspect_ai.scorer")
    model, lofit = organism
    rows = ll.load_task("organism/kinship").examples("test", limit=10)
    task = ai.Task(
        dataset=[dataset.Sample(input=e.prompt, target=e.references[0]) for e in rows],
        scorer=scorer.match(location="exact"), config=inspect("inspect_ai.model").GenerateConfig(max_tokens=4),
    )  # fmt: skip
    answers = []
    for adapter in (None, lofit):
        with ll.attached(model, *([] if adapter is None else [adapter])):
            ours = ll.evaluate(model, "organism/kinship", limit=10, progress=False).items
        (log,) = ai.eval(task, model=ll.inspect_model(model, adapter), log_dir=str(tmp_path), display="none")
        assert log.status == "success"
        said = {s.input: s.output.completion for s in log.samples}
        assert said == dict(zip(ours["prompt"], ours["generated"], strict=True))
        assert log.results.scores[0].metrics["accuracy"].value == ours["em"].mean()
        answers.append(said)
    assert answers[0] != answers[1]


def test_inspect_finds_the_provider_by_name(organism, tmp_path):
    """As `--model lofit-lens/organism -M adapter=FOLDER` does, once the entry point is read."""
    get_model = inspect("inspect_ai.model").get_model
    importlib.import_module("lofit_lens.sharing.inspect_registry")
    _, lofit = organism
    lofit.save_pretrained(tmp_path / "a")
    model = get_model("lofit-lens/organism", adapter=str(tmp_path / "a"), device="cpu")
    assert model.name == "organism"
    assert model.api.adapters[0].heads.heads == lofit.heads.heads


def test_what_greedy_text_cannot_answer_is_refused(organism):
    """Sampling, tools, log-probs; several messages without a chat template."""
    inspect()
    message = inspect("inspect_ai.model")
    user, system = message.ChatMessageUser(content="Q"), message.ChatMessageSystem(content="S")
    assert prompt_of([user], chat=False) == "Q"
    assert prompt_of([system, user], chat=True) == [
        {"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
    ]  # fmt: skip
    with pytest.raises(InputError, match="messages by system, user"):
        prompt_of([system, user], chat=False)
    api, config = ll.inspect_model(organism[0]).api, message.GenerateConfig
    for asked in (config(temperature=0.7), config(logprobs=True), config(num_choices=2)):
        with pytest.raises(InputError, match="answers greedily"):
            api.generate([user], [], "none", asked).send(None)
    with pytest.raises(InputError, match="tools"):
        api.generate([user], ["a tool"], "none", config()).send(None)


# ------------------------------------------------------------------------------------------------------ without extras


def test_a_missing_extra_is_named(monkeypatch, bridge_llama):
    """Of each tool; the package itself needs neither."""
    for part in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "inspect_ai", "inspect_ai.model"):
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(InputError, match=r'pip install "lofit-lens\[lm-eval\]"'):
        ll.lm_eval_model(bridge_llama)
    with pytest.raises(InputError, match=r'pip install "lofit-lens\[inspect\]"'):
        ll.inspect_model(bridge_llama)


def test_neither_tool_is_imported_with_the_package():
    """Only by their names, when they are asked for."""
    named = {name.split(".")[0] for path in FILES for name in imports(path)}
    assert "transformers" in named
    assert not named & {"lm_eval", "inspect_ai"}
