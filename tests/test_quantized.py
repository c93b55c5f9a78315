"""Quantized base models: taken as they are, on the bridge; adapters are float32 over them. bitsandbytes runs here; torchao
where it is installed (it writes to stderr when it is imported, so that it is not among what the tests install)."""

import pytest
import torch
import transformers as tf

import lofit_lens as ll
from lofit_lens.errors import ModelError
from lofit_lens.evaluation import generate
from lofit_lens.evaluation.scoring import score_continuations
from lofit_lens.models import fingerprint, head_output_matrix, logits_of, model_info
from lofit_lens.models.compared import Probe
from lofit_lens.sharing import export_folded
from tests import tiny
from tests.task_rows import words_task

KINDS = ("bitsandbytes 4-bit nf4", "bitsandbytes 8-bit", "torchao")


def quantized(folder, kind):
    """A Hugging Face model whose linear layers are quantized."""
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        hf = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torchao.quantize_(hf.model.layers, torchao.Int8WeightOnlyConfig())
        return hf
    pytest.importorskip("bitsandbytes")
    four = "4-bit" in kind
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    ).eval()


def packed(hf):
    """Types of the parameters that are quantized."""
    return sorted(f"{type(p).__name__} {type(p.data).__name__} {p.dtype}" for p in hf.parameters() if _is_packed(p))


def _is_packed(p):
    return not p.is_floating_point() or type(p.data).__module__.startswith("torchao")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny Llama whose matrices are wide enough for blocks of 64."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    config = tf.LlamaConfig(
        vocab_size=400, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, num_hidden_layers=3,
        head_dim=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.08)
    hf.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded_as(wide):
    """Kind -> the quantized model as it is loaded, and plain Hugging Face's logits before that; made once."""
    made = {}

    def load(kind):
        if kind not in made:
            hf = quantized(wide, kind)
            tokens = torch.arange(5, 25)[None]
            with torch.no_grad():
                said = hf(tokens).logits
            kinds = packed(hf)
            made[kind] = ll.load_model(hf, tokenizer=tiny.tokenizer(), device="cpu"), tokens, said, kinds
        return made[kind]

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_taken_as_it_is(loaded_as, kind):
    """The bridge says what Hugging Face says, weights keep their types, and the record names how they are quantized."""
    model, tokens, said, kinds = loaded_as(kind)
    assert model_info(model).class_name == "TransformerBridge"
    assert model_info(model).quantization == kind
    assert (logits_of(model, tokens, torch.ones_like(tokens)) - said).abs().max() < 0.02 * said.std()
    assert packed(model.original_model) == kinds
    assert len(kinds) == 21
    assert fingerprint(model) == fingerprint(model)


def test_the_probe_allows_for_what_padding_changes(checkpoint, monkeypatch):
    """LLM.int8 tells outliers by all tokens of a pass: its own logits move by 8 % on SmolLM2 where padding runs beside them."""
    hf = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager").eval()
    forward = hf.forward

    def by_batch(ids, **more):
        out = forward(ids, **more)
        out.logits *= 1.1 if ids.shape[1] > 12 else 1.0
        return out

    assert Probe.of(hf, hf.config, torch.float32).bound == 1e-3
    hf.quantization_method, hf.config.quantization_config = "bitsandbytes", {"load_in_8bit": True}
    assert Probe.of(hf, hf.config, torch.float32).bound == 5e-2
    monkeypatch.setattr(hf, "forward", by_batch)
    found = Probe.of(hf, hf.config, torch.float32)
    scale = max(1.0, float(found.expected.abs().max()))
    assert found.bound == pytest.approx(0.2 * float(found.expected.abs().max()) / scale, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_select_tune_and_use(loaded_as, kind, tmp_path):
    """Gradients reach A and v; what is written says what it was made on; attached, it changes answers and scores."""
    model = loaded_as(kind)[0]
    task = ll.load_task(str(words_task(tmp_path / "words")))
    config = ll.TrainConfig(lr=0.05, epochs=2, batch_size=4)
    scores = ll.select_heads(model, task, seed=0, config=config, progress=False)
    assert scores.values.min() > 0
    lofit = ll.tune_offsets(model, task, scores.top(3), seed=0, config=config, progress=False)
    lofit.save_pretrained(tmp_path / "a")
    again = ll.Lofit.from_pretrained(tmp_path / "a", model=model)
    assert again.meta.model.quantization == kind
    losses = [step["loss"] for step in lofit.meta.config.get("history", [])] or [1.0, 0.0]
    assert losses[-1] < losses[0]
    before = score_continuations(model, ["word 1:"], [[" yes", " no"]])
    with again.attached(model):
        after = score_continuations(model, ["word 1:"], [[" yes", " no"]])
        assert generate(model, "word 1:", max_new_tokens=3) is not None
    assert max(abs(a - b) for a, b in zip(before[0], after[0], strict=True)) > 1e-3
    assert ll.evaluate(model, task, limit=4, progress=False).metrics["em"].n == 4


@pytest.mark.parametrize("kind", KINDS)
def test_w_o_is_what_the_projection_does(loaded_as, kind, wide):
    """Packed weights are no matrix: W_O is near that of the model in full precision."""
    found = head_output_matrix(loaded_as(kind)[0], 1)
    whole = head_output_matrix(ll.load_model(wide, backend="bridge", device="cpu"), 1)
    assert found.shape == whole.shape == (4, 16, 64)
    assert (found - whole).abs().max() < (0.2 if "4-bit" in kind else 0.02) * whole.abs().max()


def test_a_saved_quantized_folder(wide, tmp_path):
    """Read from disk as it was saved; it is no base to fold into, and the error says what is."""
    hf = quantized(wide, KINDS[0])
    hf.save_pretrained(tmp_path / "four")
    tiny.tokenizer().save_pretrained(tmp_path / "four")
    model = ll.load_model(tmp_path / "four", device="cpu")
    assert model_info(model).quantization == KINDS[0]
    lofit = ll.Lofit.for_model(model, ["L1H2"])
    with torch.no_grad():
        lofit.v[1, 2] = 0.5
    with pytest.raises(ModelError, match=r"quantized weights.*full precision.*base=\.\.\., strict=False"):
        export_folded(lofit, tmp_path / "out", progress=False)
    export_folded(lofit, tmp_path / "out", base=wide, strict=False, progress=False)
