"""LoRA alone: it is peft's, on any bridge, and nothing stays behind; the rest is in test_trained_methods."""

import ast
import copy
from pathlib import Path

import peft
import pytest
import torch

import lofit_lens
from lofit_lens import load_model, model_info
from lofit_lens.errors import AdapterError, InputError, ModelError
from lofit_lens.interventions import Lora, load_lora
from lofit_lens.interventions.lora import parse_targets
from lofit_lens.models import PROJECTIONS, attention_window, logits_of, projection
from tests import tiny
from tests.conftest import needs_hooked
from tests.plain_edits import edited_plain

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(model, lora=None):
    if lora is None:
        return logits_of(model, TOKENS, torch.ones_like(TOKENS))
    with lora.attached(model):
        return run(model)


def random(model, *, seed=0, **options):
    lora, generator = Lora.for_model(model, seed=seed, **options), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for B in lora.B.values():
            B.normal_(0, 0.3, generator=generator)
    return lora


# ------------------------------------------------------------------------------------------------------ it is peft's


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma", "opt"])
@torch.no_grad()
def test_logits_are_those_of_a_peft_model(loaded, architecture):
    """get_peft_model on the plain model, given the same numbers: the same logits, and as many parameters."""
    model = loaded(architecture, "bridge")
    lora = random(model, rank=3, alpha=5)
    plain = tiny.hf_model(architecture)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    theirs = peft.get_peft_model(plain, config)
    assert lora.n_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            parts = name.split(".")
            held = lora.A if "lora_A" in parts else lora.B
            p.copy_(held[f"L{parts[parts.index('layers') + 1]}_{parts[parts.index('self_attn') + 1][0]}"])
    expected = theirs(TOKENS).logits
    assert torch.allclose(run(model, lora), expected, atol=1e-5)
    assert (run(model) - expected).abs().max() > 0.05


def test_the_modules_in_place_are_peft_s(loaded):
    """While attached, each projection holds a peft layer with this adapter's own parameters; afterwards what it held before."""
    model = loaded("llama", "bridge")
    lora, own = random(model), projection(model, (1, "v"))
    with lora.attached(model):
        layer = projection(model, (1, "v"))
        assert isinstance(layer, peft.tuners.lora.LoraLayer)
        assert layer.lora_A["default"].weight is lora.A["L1_v"]
        assert layer.lora_B["default"].weight is lora.B["L1_v"]
        assert layer.scaling["default"] == 2.0
        assert layer.get_base_layer() is own
        assert projection(model, (1, "k")).__class__ is torch.nn.Linear
    assert projection(model, (1, "v")) is own


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_all_four_projections_of_a_deeper_model(loaded, hf, architecture):
    """q, k, v and o by either name, more modules than peft shortens the names of: each changes the logits as the formula says."""
    model, plain = loaded(architecture, "bridge"), hf(architecture)
    names = ("q", "k", "v") if architecture == "gpt2" else PROJECTIONS
    for targets in [(n,) for n in names] + [tuple(f"{n}_proj" for n in names)]:
        lora = random(model, targets=targets)
        with edited_plain(plain, lora):
            expected = plain(TOKENS).logits
        assert torch.allclose(run(model, lora), expected, atol=2e-5)
    organism = load_model("organism", backend="bridge", device="cpu")
    lora = random(organism, targets=PROJECTIONS)
    assert len(lora.A) == 24
    with lora.attached(organism):
        assert {hasattr(projection(organism, p), "lora_A") for p in lora._projections().values()} == {True}
        logits_of(organism, TOKENS, torch.ones_like(TOKENS))


# ------------------------------------------------------------------------------------------------ start and many of them


def test_the_start():
    """A uniform within 1 / sqrt(width in) = 1/8, each place its own; B 0; another seed another A; reset_ begins anew."""
    lora = Lora(2, {"q": (64, 32), "v": (64, 16)}, rank=4).reset_(0)
    assert {k: tuple(p.shape) for k, p in lora.A.items()} == dict.fromkeys(("L0_q", "L0_v", "L1_q", "L1_v"), (4, 64))
    assert {k: tuple(p.shape) for k, p in lora.B.items()} == {
        "L0_q": (32, 4),
        "L0_v": (16, 4),
        "L1_q": (32, 4),
        "L1_v": (16, 4),
    }
    assert all(0.12 < p.abs().max() <= 1 / 8 for p in lora.A.values())
    assert not any(p.any() for p in lora.B.values())
    assert not torch.equal(lora.A["L0_q"], lora.A["L1_q"])
    first = lora.A["L0_q"].clone()
    with torch.no_grad():
        lora.B["L0_q"].fill_(1.0)
    lora.requires_grad_(False).reset_(1)
    assert not torch.equal(lora.A["L0_q"], first)
    assert not lora.B["L0_q"].any()
    assert all(p.requires_grad for p in lora.parameters())
    assert torch.equal(lora.reset_(0).A["L0_q"], first)


def test_one_bridge_serves_several_adapters(bridge_llama):
    """Of other ranks, strengths and targets, one after the other, each as if it were alone; alpha scales the change."""
    before = run(bridge_llama)
    small, wide = (
        random(bridge_llama, rank=2, alpha=2),
        random(bridge_llama, rank=8, alpha=4, targets=("q", "o"), seed=1),
    )
    alone = run(bridge_llama, small), run(bridge_llama, wide)
    assert torch.equal(run(bridge_llama, small), alone[0])
    assert torch.equal(run(bridge_llama, wide), alone[1])
    assert torch.equal(run(bridge_llama), before)
    double = copy.deepcopy(small)
    with torch.no_grad():
        for B in double.B.values():
            B.mul_(0.5)
    double.alpha = 4.0
    assert torch.allclose(run(bridge_llama, double), alone[0], atol=1e-6)


def test_two_at_once_are_refused(bridge_llama):
    """Even with other targets where one of them is shared; the first stays."""
    one, other = random(bridge_llama), random(bridge_llama, targets=("v", "o"))
    with one.attached(bridge_llama):
        inside = run(bridge_llama)
        with pytest.raises(AdapterError, match="holds a LoRA adapter already"), other.attached(bridge_llama):
            pass
        with pytest.raises(AdapterError, match="holds a LoRA adapter already"):
            Lora.for_model(bridge_llama, seed=0)
        assert torch.equal(run(bridge_llama), inside)
    assert not torch.equal(run(bridge_llama, other), inside)


def test_the_base_keeps_its_switches(checkpoint):
    """Weights that asked for gradients ask for them inside and afterwards; so do modes; in training mode nothing is dropped."""
    model = load_model(checkpoint("llama"), backend="bridge", device="cpu")
    projection(model, (0, "q")).weight.requires_grad_(True)
    projection(model, (0, "q")).train()
    lora = random(model)
    asking = [n for n, p in model.named_parameters() if p.requires_grad]
    modes = [m.training for m in model.modules()]
    with lora.attached(model):
        assert projection(model, (0, "q")).get_base_layer().weight.requires_grad
        assert projection(model, (0, "q")).training
        assert not projection(model, (0, "v")).training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == asking
    assert [m.training for m in model.modules()] == modes
    assert sum(modes) == 1


def test_the_global_random_state_is_left_alone(bridge_llama):
    """Neither making nor attaching draws from it."""
    before = torch.get_rng_state()
    with Lora.for_model(bridge_llama, seed=3).attached(bridge_llama):
        pass
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------- loading


def test_load_lora_gives_an_ordinary_bridge(checkpoint):
    """Name, revision and logits are those of load_model; dtype and targets go where they belong."""
    folder = checkpoint("llama")
    plain = load_model(folder, backend="bridge", device="cpu")
    model, lora = load_lora(folder, rank=4, alpha=8, targets=("q_proj",), seed=5, device="cpu")
    assert model_info(model) == model_info(plain) == lora.meta.model
    assert torch.equal(run(model), run(plain))
    assert torch.equal(run(model, lora), run(plain))
    assert (lora.rank, lora.alpha, lora.targets, lora.meta.seed) == (4, 8.0, ("q",), 5)
    half, lora = load_lora("organism", dtype="bfloat16", device="cpu")
    assert (model_info(half).name, model_info(half).dtype) == ("organism", "bfloat16")
    assert {p.dtype for p in lora.parameters()} == {torch.float32}


def test_a_model_in_memory_and_the_shape_of_its_attention():
    """A Hugging Face model of one's own works too."""
    model, lora = load_lora(tiny.hf_model("qwen3"), tokenizer=tiny.tokenizer(), device="cpu")
    assert lora.sizes == {"q": (32, 48), "v": (32, 24)}  # 4 heads and 2 of 12
    assert attention_window(model) is None


# --------------------------------------------------------------------------------------------------------- refusals


@needs_hooked
def test_hooked_transformer_is_refused(loaded, tmp_path):
    """Made, attached or loaded for one: the error says what LoRA is and how to load the model."""
    model, bridge = loaded("llama", "hooked"), loaded("llama", "bridge")
    lora = random(bridge)
    folder = lora.save_pretrained(tmp_path / "x")
    for attempt in (
        lambda: Lora.for_model(model, seed=0), lambda: lora.attached(model).__enter__(),
        lambda: Lora.from_pretrained(folder, model=model),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=r"LoRA needs the projection modules.*backend='bridge'.*load_lora"):
            attempt()
    with pytest.raises(ModelError, match="HookedTransformer"):
        projection(model, (0, "q"))
    assert run(bridge, lora) is not None  # the failed attempts left it free


def test_projections_of_other_sizes_are_refused(loaded):
    """Mistral's q is 48 wide, this Llama's 32: place and both sizes are named."""
    lora = random(loaded("mistral", "bridge"))
    with pytest.raises(AdapterError, match=r"q of layer 0 has widths \(32, 32\); .* \(32, 48\)"):
        lora.attach_check(loaded("llama", "bridge"))


def test_layers_that_differ_are_refused(bridge_llama, monkeypatch):
    """One size a projection is kept, so a model whose layers differ is not for it."""
    monkeypatch.setattr(
        "lofit_lens.interventions.lora.projection_sizes",
        lambda model, places: {p: (32, 32 + 32 * p[0]) for p in places},
    )
    with pytest.raises(AdapterError, match=r"q of layer 1 has widths \(32, 64\)"):
        Lora.for_model(bridge_llama, seed=0)


def test_a_model_that_goes_round_its_projections_is_refused(checkpoint):
    """With split inputs TransformerLens computes q, k and v from the weights: LoRA would do nothing there."""
    model = load_model(checkpoint("gpt2"), backend="bridge", device="cpu")
    lora = random(model)
    model.set_use_split_qkv_input(True)
    with pytest.raises(ModelError, match=r"ran 0 times .*use_split_qkv_input"):
        lora.attach_check(model)


def test_attention_without_projections_is_refused():
    """Mamba has no attention: the layer and the projection are named."""
    model = load_model(tiny.hf_model("mamba"), backend="bridge", tokenizer=tiny.tokenizer(), device="cpu")
    with pytest.raises(ModelError, match=r"layer 0 .* has no projection q"):
        Lora.for_model(model, seed=0)


def test_processed_weights_are_refused(checkpoint):
    """In compatibility mode layer norms are folded into the projections."""
    model = load_model(checkpoint("llama"), backend="bridge", device="cpu")
    lora = random(model)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(AdapterError, match="processed weights"):
        lora.attach_check(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha is 0"), ({"alpha": float("inf")}, "alpha is inf"),
     ({"targets": ()}, "no target"), ({"targets": ("c_attn",)}, "unknown target 'c_attn'; allowed: q, k, v, o")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(bridge_llama, options, message):
    """Each is named with what is allowed."""
    with pytest.raises(InputError, match=message):
        Lora.for_model(bridge_llama, seed=0, **options)


def test_targets_are_read_once_each():
    """Both spellings, in the order given."""
    assert parse_targets(("v_proj", "q", "v")) == ("v", "q")


def test_peft_is_imported_only_where_it_is_used():
    """No module of the package imports it at its top."""
    for file in Path(lofit_lens.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "peft"], file
