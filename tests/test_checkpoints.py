"""A plain checkpoint read tensor by tensor, attention's output projection in it, and edits that fit into that."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofit_lens as ll
from lofit_lens.cli.bring_in import format_of
from lofit_lens.errors import AdapterError, DataError, InputError, ModelError
from lofit_lens.interventions import HeadAblation, Red
from lofit_lens.models import head_output_matrix, weights_revision
from lofit_lens.sharing import affine, open_checkpoint, outputs_of
from lofit_lens.sharing.checkpoints import CONFIG, INDEX, WEIGHTS
from tests import tiny
from tests.adapters import CHOSEN, output_projection, random_adapter

UNIT = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A Llama in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "m"
    tiny.hf_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def broken(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "m")


def reindexed(folder, **where):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= where
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_output_projection_of_every_architecture(checkpoint, architecture):
    """Weight and bias of each layer as the Hugging Face module has them, `[d_model, n_heads * d_head]`, and back."""
    plain, found = tiny.hf_model(architecture), outputs_of(open_checkpoint(checkpoint(architecture)))
    for layer in range(3):
        module = output_projection(plain, layer)
        weight = module.weight.T if architecture == "gpt2" else module.weight
        assert torch.equal(found.weight(layer), weight)
        assert torch.equal(found.raw(found.weight(layer)), module.weight)
        assert (found.bias(layer) is None) == (module.bias is None)
        if module.bias is not None:
            assert torch.equal(found.bias(layer), module.bias)
        assert plain.get_submodule(found.names[layer]) is module
    model = ll.load_model(checkpoint(architecture), backend="bridge", device="cpu")
    W_O = head_output_matrix(model, 1)
    assert found.shape == (3, *W_O.shape[:2])
    assert torch.allclose(found.weight(1).T.reshape(W_O.shape), W_O)


def test_many_files_are_read_like_one(sharded, checkpoint):
    """Every tensor, its shape and type, wherever it lies; the embedded model too."""
    one, many = open_checkpoint(checkpoint("llama")), open_checkpoint(sharded)
    assert len(many.files) > 3
    assert one.files == (WEIGHTS,)
    assert set(one.where) == set(many.where) == {n for file in many.files for n in load_file(sharded / file)}
    for name in one.where:
        assert torch.equal(one.read(name), many.read(name))
        assert one.shape(name) == tuple(one.read(name).shape)
    assert (many.name, many.revision) == (sharded.name, weights_revision(sharded, None))
    assert (many.architecture, many.config["num_hidden_layers"]) == ("LlamaForCausalLM", 3)
    organism = open_checkpoint("organism")
    assert (organism.name, outputs_of(organism).shape) == ("organism", (6, 16, 8))


@pytest.mark.parametrize(
    "name", ["../model-x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "x.bin", "..\\\\x.safetensors"]
)
def test_an_index_that_leaves_its_folder_is_refused(broken, name):
    """Or that names a file which may be a pickle; the file is not looked at."""
    reindexed(broken, **{"lm_head.weight": name})
    with pytest.raises(ModelError, match=r"names the file .*only .safetensors files of its own folder"):
        open_checkpoint(broken)


def test_an_index_that_does_not_match_is_refused(broken):
    """A file that is missing, a tensor that lies elsewhere, one that no file holds, one that the index forgets; no table."""
    files = sorted(p.name for p in broken.glob("*.safetensors"))
    where = json.loads((broken / INDEX).read_text())["weight_map"]
    for wrong, message in (
        ({"lm_head.weight": "model-9.safetensors"}, "has no file model-9.safetensors"),
        ({"lm_head.weight": next(f for f in files if f != where["lm_head.weight"])}, "does not match its files"),
        ({"extra": files[0]}, "does not match its files, e.g. at extra"),
    ):
        reindexed(broken, **wrong)
        with pytest.raises(ModelError, match=message):
            open_checkpoint(broken)
        (broken / INDEX).write_text(json.dumps({"weight_map": where}))
    open_checkpoint(broken)
    forgotten = next(k for k, file in where.items() if list(where.values()).count(file) > 1)
    for weight_map in ({k: v for k, v in where.items() if k != forgotten}, {}, [], {"a": 3}):
        (broken / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=r"does not match|no weight_map"):
            open_checkpoint(broken)


def test_damaged_and_foreign_checkpoints_are_refused(broken, checkpoint, tmp_path):
    """A truncated shard, pickles alone, quantized weights, no configuration, no architecture, a layer too few."""
    file = sorted(broken.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ModelError, match=f"{file.name} is not a complete safetensors file"):
        open_checkpoint(broken)
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "x")
    config = json.loads((folder / CONFIG).read_text())
    for changes, message in (
        ({"quantization_config": {"bits": 4}}, "quantized weights.*in full precision"),
        ({"architectures": None, "model_type": "nothing"}, "names the architectures None"),
        ({"architectures": ["MambaForCausalLM"]}, r"into a MambaForCausalLM is not supported.*\(supported: LlamaForCausalLM"),
        ({"num_hidden_layers": 4}, r"of the layers \[0, 1, 2\], but its configuration says 4"),
    ):  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            outputs_of(open_checkpoint(folder))
    (folder / CONFIG).write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(ModelError, match="5 heads, but their concatenated outputs have width 32"):
        outputs_of(open_checkpoint(folder)).shape  # noqa: B018
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        open_checkpoint(folder)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        open_checkpoint(folder)
    with pytest.raises(InputError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_class_that_is_not_named_is_that_of_the_type(checkpoint, tmp_path):
    """As transformers finds it; load_model reads such a folder too."""
    folder = shutil.copytree(checkpoint("pythia"), tmp_path / "x")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: x for k, x in config.items() if k != "architectures"}))
    assert open_checkpoint(folder).architecture == "GPTNeoXForCausalLM"
    assert open_checkpoint(folder).config == config
    assert ll.load_model(folder, backend="bridge", device="cpu").cfg.n_layers == 3


def test_folders_of_something_else_are_refused(sharded, tmp_path):
    """An adapter's, a model's with an adapter in it, an empty one, and one with other weights beside its index."""
    folder = tmp_path / "x"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json; give a folder written by"):
        open_checkpoint(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is an adapter's folder, .* nothing to import; load_adapter"):
        open_checkpoint(folder)
    shutil.copytree(sharded, folder, dirs_exist_ok=True)
    with pytest.raises(ModelError, match=r"holds an adapter too .*; move it out"):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()
    open_checkpoint(folder)
    save_file({"lm_head.weight": torch.zeros(400, 32)}, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"beside model\.safetensors\.index\.json.*delete the stale one"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("architecture", "name", "shape"),
    [("llama", "model.layers.2.self_attn.o_proj.weight", (32, 24)), ("llama", "model.layers.0.self_attn.o_proj.weight", (32,)),
     ("gpt2", "transformer.h.1.attn.c_proj.bias", (31,)), ("gpt2", "transformer.h.2.attn.c_proj.bias", (32, 1))],
)  # fmt: skip
def test_layers_of_another_shape_are_refused(checkpoint, tmp_path, architecture, name, shape):
    """Weight or bias, in whatever layer; nothing but headers is read."""
    folder = shutil.copytree(checkpoint(architecture), tmp_path / "x")
    save_file(load_file(folder / WEIGHTS) | {name: torch.zeros(shape)}, folder / WEIGHTS)
    with pytest.raises(ModelError, match=rf"{name} has shape \[{', '.join(map(str, shape))}\]"):
        outputs_of(open_checkpoint(folder))


def test_types_below_32_bits_alone_are_widened(checkpoint, tmp_path):
    """Double precision stays, half becomes float32."""
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        folder = shutil.copytree(checkpoint("gpt2"), tmp_path / str(dtype))
        save_file({name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
        found = outputs_of(open_checkpoint(folder))
        assert found.weight(1).dtype == found.bias(1).dtype == expected
        assert found.d_model == 32


def test_an_affine_edit_is_the_hooks_edit(bridge_llama):
    """Scale and shift of LoFiT, ITI and ablations do to z what the adapters themselves do, to rounding; other heads: 1 and 0."""
    z = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    lofit = random_adapter(bridge_llama)
    iti = ll.ITI((3, 4, 8), CHOSEN, directions=UNIT, sigma=torch.tensor([0.5, 1.0, 0.0]), alpha=-3, positions="all")
    silence = HeadAblation((3, 4, 8), CHOSEN, values=torch.randn(3, 8))
    for adapter in (lofit, iti, silence):
        scale, shift = affine(adapter)
        for layer in CHOSEN.layers:
            assert torch.allclose(scale[layer] * z + shift[layer], adapter._edit(layer)(z), atol=1e-6)
        others = ~CHOSEN.mask((3, 4))
        assert bool((scale[others] == 1).all() and (shift[others] == 0).all())


def test_other_edits_are_not_affine(bridge_llama):
    """A method of the residual stream, or positions: what can be done instead is said."""
    with pytest.raises(AdapterError, match="RED does not edit single heads' outputs"):
        affine(Red.for_model(bridge_llama))
    iti = ll.ITI((3, 4, 8), CHOSEN, directions=UNIT, sigma=torch.ones(3))
    with pytest.raises(AdapterError, match=r"only at the positions 'answer', .*with_positions\(\"all\"\)"):
        affine(iti)
    affine(iti.with_positions("all"))


def test_the_form_of_a_source_is_told(checkpoint, tmp_path):
    """By the file's name, or by what a checkpoint holds."""
    assert format_of("a.svec") == "svec"
    (tmp_path / "a.pt").write_bytes(b"\x80\x04")
    with pytest.raises(DataError, match="leave pickles where they are"):
        format_of(tmp_path / "a.pt")
    assert format_of(checkpoint("gpt2")) == "folded"
    with pytest.raises(ModelError, match=r"nothing can be read without the base .*--format folded --model BASE"):
        format_of(checkpoint("llama"))
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "official")
    save_file(load_file(folder / WEIGHTS) | {"model.layers.0.self_attn.attn_A.0": torch.zeros(8)}, folder / WEIGHTS)
    assert format_of(folder) == "lofit"
