"""Offsets as BEFT or LoRA: stock PEFT gives the hooked model's logits and texts, edits nothing else; the rest is refused."""

import json
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import AdapterError, ModelError
from lofit_lens.interventions import HeadAblation, LoReft, PostBlock
from lofit_lens.models import load_model, logits_of
from lofit_lens.sharing import carrier
from lofit_lens.sharing.carrier import beft_tensors, export_peft, lora_tensors
from tests import tiny
from tests.adapters import CHOSEN, edited, output_projection, random_adapter
from tests.test_iti import as_offsets, random_iti

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
ROW = TOKENS[:1]
slow = pytest.mark.slow
FAST = ("llama-gqa", "gpt2")
CONV1D = ("gpt2",)  # whose projections are no torch.nn.Linear
# Every one of tests/tiny.py but Mamba, which has no heads.
EVERY = [pytest.param(a, marks=() if a in FAST else slow) for a in tiny.configs() if a != "mamba"]
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lofit_lens_export.json"


def offsets(model, heads=CHOSEN):
    return random_adapter(model, heads, A=0.0)


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory):
    """Architecture -> an adapter of offsets for its tiny model, and its carrier, written once; tests must not change them."""
    made = {}

    def of(architecture):
        if architecture not in made:
            lofit = offsets(loaded(architecture, "bridge"))
            made[architecture] = lofit, export_peft(lofit, tmp_path_factory.mktemp("carrier") / "made")
        return made[architecture]

    return of


def stock(base, folder):
    """Plain transformers and plain PEFT, nothing of ours."""
    plain = tf.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # PEFT warns of keys that it lacks or cannot place
        warnings.filterwarnings("ignore", message=".*(merging LoRA weights won't be possible|has no bias term)")
        return peft.PeftModel.from_pretrained(plain, str(folder)).eval()


def adapted(model):
    """Names of the modules that PEFT put itself around."""
    front = "base_model.model."
    layers = (peft.tuners.lora.LoraLayer, peft.tuners.beft.BeftLayer)
    return {n.removeprefix(front) for n, m in model.named_modules() if isinstance(m, layers)}


@torch.no_grad()
def hooked(model, adapter, tokens=TOKENS):
    with adapter.attached(model):
        return logits_of(model, tokens, torch.ones_like(tokens))


def greedy(model, adapter, prompt, n=6, eos=2):
    """The hooked model's greedy answer, one full pass a token."""
    tokens = prompt
    for _ in range(n):
        tokens = torch.cat([tokens, hooked(model, adapter, tokens)[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == eos:
            break
    return tokens


# ------------------------------------------------------------------------------------------------------------ it works


def test_the_tensors_by_hand():
    """For a bias (12, 34, 56) behind a W_O of width 2; LoRA's A and B are zeros of their shapes."""
    bias, front = torch.tensor([12.0, 34.0, 56.0]), "base_model.model.h.0.attn."
    beft, lora = beft_tensors("h.0.attn", bias), lora_tensors("h.0.attn", bias, 2)
    assert {name: t.tolist() for name, t in beft.items()} == {f"{front}beft_bias": [[12.0, 34.0, 56.0]]}
    assert {name: t.tolist() for name, t in lora.items()} == {
        f"{front}lora_A.weight": [[0.0, 0.0]], f"{front}lora_B.weight": [[0.0]] * 3, f"{front}lora_B.bias": [12.0, 34.0, 56.0],
    }  # fmt: skip


@pytest.mark.parametrize("architecture", EVERY)
@torch.no_grad()
def test_stock_peft_says_what_the_hooked_model_says(loaded, hf, checkpoint, exported, architecture):
    """Logits to 1e-5 of hooks, here and on plain Hugging Face, the same greedy text, only the edited layers' W_O adapted."""
    model = loaded(architecture, "bridge")
    lofit, folder = exported(architecture)
    found = stock(checkpoint(architecture), folder)
    got = found(input_ids=TOKENS).logits
    assert (got - hooked(model, lofit)).abs().max() < 1e-5
    with edited(hf(architecture), lofit):
        assert (got - hf(architecture)(TOKENS).logits).abs().max() < 1e-5
    assert (got - hf(architecture)(TOKENS).logits).abs().max() > 0.05
    said = found.generate(input_ids=ROW, attention_mask=torch.ones_like(ROW), max_new_tokens=6, do_sample=False)
    assert torch.equal(said, greedy(model, lofit, ROW))
    inner = found.base_model.model
    names = {m: n for n, m in inner.named_modules()}
    assert found.peft_config["default"].peft_type == ("LORA" if architecture in CONV1D else "BEFT")
    assert adapted(found) == {names[output_projection(inner, layer)] for layer in (0, 2)}
    assert (folder / WEIGHTS).stat().st_size < 4000


@pytest.mark.parametrize(
    "architecture", ["gpt2", *(pytest.param(a, marks=slow) for a in ("pythia", "opt", "llama-bias"))]
)
@torch.no_grad()
def test_peft_merges_it_where_the_base_has_the_bias(loaded, checkpoint, exported, architecture):
    """GPT-2, NeoX, OPT: the merged model says the same."""
    lofit, folder = exported(architecture)
    merged = stock(checkpoint(architecture), folder).merge_and_unload()
    assert (merged(TOKENS).logits - hooked(loaded(architecture, "bridge"), lofit)).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", ["llama-gqa", pytest.param("pythia", marks=slow)])
@torch.no_grad()
def test_an_older_peft_writes_a_lora(loaded, checkpoint, tmp_path, monkeypatch, architecture):
    """PEFT before 0.20 has no BEFT; what it writes is read by any PEFT, and says the same."""
    model = loaded(architecture, "bridge")
    lofit = offsets(model)
    with monkeypatch.context() as older:
        older.delattr(peft, "BeftConfig")
        folder = export_peft(lofit, tmp_path / "x")
    config = json.loads((folder / CONFIG).read_text())
    wanted = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_bias": True, "bias": "none", "use_rslora": False}
    assert {key: config[key] for key in wanted} == wanted
    got = stock(checkpoint(architecture), folder)(input_ids=TOKENS).logits
    assert (got - hooked(model, lofit)).abs().max() < 1e-5


@torch.no_grad()
def test_iti_at_all_positions_is_an_offset(bridge_llama, checkpoint, tmp_path):
    """alpha * sigma * d."""
    iti = random_iti(bridge_llama)
    got = stock(checkpoint("llama"), export_peft(iti, tmp_path / "x"))(input_ids=TOKENS).logits
    assert (got - hooked(bridge_llama, as_offsets(iti))).abs().max() < 1e-5


@slow
@torch.no_grad()
def test_many_layers(tmp_path):
    """From 20 modules on PEFT shortens their names by itself: the right ones are adapted all the same, and no other layer."""
    config = tiny.configs()["gpt2"]
    config.n_layer = 23
    torch.manual_seed(0)
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", backend="bridge", device="cpu")
    layers = [i for i in range(23) if i not in (1, 11, 21)]
    assert len(layers) == 20
    lofit = offsets(model, HeadSet([(layer, layer % 4) for layer in layers]))
    found = stock(tmp_path / "base", export_peft(lofit, tmp_path / "x"))
    assert (found(input_ids=TOKENS).logits - hooked(model, lofit)).abs().max() < 1e-5
    assert adapted(found) == {f"transformer.h.{layer}.attn.c_proj" for layer in layers}


@torch.no_grad()
def test_keys_of_the_hub_without_a_front(checkpoint, tmp_path):
    """GPT-2's checkpoint on the hub has `h.0.attn`, and its model `transformer.h.0.attn`."""
    tiny.save(tmp_path / "base", "gpt2")
    file = tmp_path / "base" / "model.safetensors"
    save_file({n.removeprefix("transformer."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    model = load_model(tmp_path / "base", backend="bridge", device="cpu")
    lofit = offsets(model)
    got = stock(tmp_path / "base", export_peft(lofit, tmp_path / "x"))(input_ids=TOKENS).logits
    assert (got - hooked(model, lofit)).abs().max() < 1e-5


def test_half_precision_is_compared_on_demand(exported, tmp_path):
    """In the type asked for; the carrier is float32 and the same file."""
    lofit, full = exported("llama")
    half = export_peft(lofit, tmp_path / "half", dtype="bfloat16")
    assert (half / WEIGHTS).read_bytes() == (full / WEIGHTS).read_bytes()
    found = [json.loads((folder / RECORD).read_text())["verified"]["dtype"] for folder in (half, full)]
    assert found == ["bfloat16", "float32"]


def test_the_files(checkpoint, exported, tmp_path):
    """The settings that make PEFT add W_O v and nothing else, in an order that is always the same; what it was made of."""
    lofit, folder = exported("llama")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, RECORD]
    config = json.loads((folder / CONFIG).read_text())
    wanted = {
        "peft_type": "BEFT", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": str(checkpoint("llama")), "revision": None,
        "target_modules": ["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"],
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    record = json.loads((folder / RECORD).read_text())
    assert record["base"] == {
        "name": checkpoint("llama").name, "revision": lofit.meta.model.revision, "architecture": "LlamaForCausalLM"
    }  # fmt: skip
    assert record["adapter"]["method"] == "lofit"
    assert record["verified"]["error"] < 1e-5 < record["verified"]["effect"]
    assert "peft" in record["versions"]
    again = export_peft(lofit, tmp_path / "again")
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in (CONFIG, WEIGHTS))


def test_of_gpt2_the_mlp_is_left_alone(exported):
    """Its `c_proj` has the name of attention's; Conv1D is told to PEFT, which would otherwise warn and mend it."""
    config = json.loads((exported("gpt2")[1] / CONFIG).read_text())
    assert config["target_modules"] == ["transformer.h.0.attn.c_proj", "transformer.h.2.attn.c_proj"]
    assert config["fan_in_fan_out"] is True


# --------------------------------------------------------------------------------------------------------- refused


def test_what_a_bias_cannot_carry_is_refused(bridge_llama, tmp_path):
    """Scalings, ablations, edits at some positions, other methods, nothing at all, NaN: with the reason, nothing written."""
    broken = offsets(bridge_llama)
    with torch.no_grad():
        broken.v[0, 3, 0] = torch.nan
    refused = {
        "scales heads.*export_folded": [
            random_adapter(bridge_llama), HeadAblation((3, 4, 8), CHOSEN, values=torch.zeros(3, 8))
        ],
        "only at the positions 'answer'": [random_iti(bridge_llama, positions="answer")],
        "changes nothing": [Lofit.for_model(bridge_llama, CHOSEN), random_iti(bridge_llama, alpha=0.0)],
        "NaN": [broken],
        "LoReFT": [LoReft.for_model(bridge_llama, seed=0)],
        "post-block steering does not .* attach": [PostBlock.for_model(bridge_llama, seed=0)],
    }  # fmt: skip
    for message, adapters in refused.items():
        for adapter in adapters:
            with pytest.raises(AdapterError, match=message):
                export_peft(adapter, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_base_can_be_named(bridge_llama, tmp_path):
    """For an adapter that names none, or to read the same weights elsewhere."""
    lofit = offsets(bridge_llama)
    lofit.meta.model = None
    base = tiny.save(tmp_path / "base", seed=0)
    got = stock(base, export_peft(lofit, tmp_path / "x", base=base))(input_ids=TOKENS).logits
    assert (got - hooked(bridge_llama, lofit)).abs().max() < 1e-5


@pytest.mark.parametrize("wrong", ["another vector", pytest.param("a layer less", marks=slow), "an invalid name"])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # as PEFT says of the last
def test_a_carrier_that_differs_is_deleted(bridge_llama, tmp_path, monkeypatch, wrong):
    """The comparison runs on what PEFT makes of the files: a wrong bias, a missing one, one that PEFT does not place."""
    good = beft_tensors

    def bad(module, bias):
        if wrong == "another vector":
            return good(module, bias * 1.01)
        if wrong == "a layer less":
            return good(module, bias * (0 if "layers.2" in module else 1))
        return good(module.replace("layers.2", "layers.1"), bias)

    monkeypatch.setattr(carrier, "beft_tensors", bad)
    with pytest.raises(ModelError, match=r"carrier for .*x differs from the hooked model by .*not kept"):
        export_peft(offsets(bridge_llama), tmp_path / "x")
    assert not list(tmp_path.iterdir())
