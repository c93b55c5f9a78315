"""A model's description before it is loaded is the one after, on every architecture and class; its refusals are the same."""

import os
import shutil

import pytest

from lofit_lens import io
from lofit_lens.errors import InputError, ModelError
from lofit_lens.models import hooked_class, load_model, model_info, planned_info
from tests import tiny
from tests.conftest import ARCHITECTURES, ON_HOOKED, PAIRS, needs_hooked


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_the_plan_is_what_loading_gives(loaded, checkpoint, architecture, on):
    """Every field: name, revision, class, sizes."""
    planned = planned_info(checkpoint(architecture), backend=on)
    assert planned == model_info(loaded(architecture, on))
    assert planned.backend == on


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama-bias", "mamba"])
def test_auto_plans_the_class_that_auto_loads(checkpoint, architecture):
    """Where HookedTransformer cannot (Gemma from a folder, attention biases, no attention at all): the bridge."""
    planned = planned_info(str(checkpoint(architecture)))
    assert planned == model_info(load_model(checkpoint(architecture), device="cpu"))
    if hooked_class() is not None:
        assert (planned.backend == "hooked") == (architecture in ON_HOOKED)


@pytest.mark.parametrize("dtype", ["bf16", "float16"])
def test_the_dtype_is_the_one_asked_for(checkpoint, backend, dtype):
    """Short names become torch's own."""
    planned = planned_info(checkpoint("llama"), backend=backend, dtype=dtype)
    assert planned == model_info(load_model(checkpoint("llama"), backend=backend, dtype=dtype, device="cpu"))


def test_the_embedded_model(backend):
    """Under its name."""
    planned = planned_info("organism", backend=backend)
    assert planned == model_info(load_model("organism", backend=backend, device="cpu"))
    assert planned.name == "organism"


COMMITS = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef")


def test_a_hub_id_needs_its_configuration_alone(hub, backend):
    """A commit whose weights were never fetched is planned; the revision is the commit that the name stands for."""
    folder = hub / "models--someone--tiny-llama"
    (folder / "refs").mkdir(parents=True)
    for ref, commit, n_layers in zip(("main", "old"), COMMITS, (3, 5), strict=True):
        config = tiny.configs()["llama"]
        config.update({"num_hidden_layers": n_layers, "architectures": ["LlamaForCausalLM"]})
        config.save_pretrained(folder / "snapshots" / commit)
        (folder / "refs" / ref).write_text(commit)
    planned = planned_info("someone/tiny-llama", backend=backend)
    assert (planned.name, planned.revision, planned.n_layers) == ("someone/tiny-llama", COMMITS[0], 3)
    old = planned_info("someone/tiny-llama", backend=backend, revision="old")
    assert (old.revision, old.n_layers) == (COMMITS[1], 5)


@needs_hooked
def test_a_hub_name_that_hookedtransformer_knows(hub, hf):
    """Gemma by its hub name is HookedTransformer's, in the sizes that the class itself has for it."""
    snapshot = hub / "models--google--gemma-2b" / "snapshots" / COMMITS[0]
    hf("gemma").config.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMITS[0])
    planned = planned_info("google/gemma-2b")
    assert (planned.backend, planned.n_layers, planned.n_heads, planned.d_vocab) == ("hooked", 18, 8, 256000)


def test_a_model_of_any_size_is_planned(tmp_path):
    """70 billion weights are a configuration here, and above the limit a sample of them stands for all."""
    config = tiny.configs()["llama-gqa"]
    config.update({"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192, "head_dim": 128,
                   "intermediate_size": 28672, "vocab_size": 32000, "architectures": ["LlamaForCausalLM"]})  # fmt: skip
    config.save_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.truncate(2**30 + 1)  # a file with nothing in it
    planned = planned_info(tmp_path, dtype="bfloat16")
    assert (planned.n_layers, planned.n_heads, planned.d_model, planned.d_vocab) == (80, 64, 8192, 32000)
    assert planned.revision.startswith("sha256:sample:")
    places = (0, 2**29, 2**30)  # front, middle, last byte
    seen = {planned.revision}
    for place in places:
        with open(tmp_path / "model.safetensors", "r+b") as f:
            f.seek(place)
            f.write(b"x")
        seen.add(planned_info(tmp_path, dtype="bfloat16").revision)
    assert len(seen) == 4
    assert planned.backend == ("bridge" if hooked_class() is None else "hooked")


def test_what_hookedtransformer_cannot_configure_goes_to_the_bridge(checkpoint, monkeypatch):
    """An error while the configuration is read sends `auto` to the bridge and stops `hooked`, as on loading."""
    if hooked_class() is None:
        pytest.skip("this TransformerLens has no HookedTransformer")
    from transformer_lens import loading_from_pretrained as loading

    def refuse(*_, **__):
        raise ValueError("rope_scaling of a kind that it does not know")

    monkeypatch.setattr(loading, "get_pretrained_model_config", refuse)
    assert planned_info(checkpoint("llama")) == model_info(load_model(checkpoint("llama"), device="cpu"))
    assert planned_info(checkpoint("llama")).backend == "bridge"
    with pytest.raises(ModelError, match="does not know"):
        planned_info(checkpoint("llama"), backend="hooked")


def both_refuse(*arguments, **options):
    """The one message with which planning and loading refuse."""
    messages = set()
    for ask in (planned_info, load_model):
        with pytest.raises(InputError) as e:
            ask(*arguments, **options)
        messages.add((type(e.value), str(e.value)))
    (kind, message), = messages  # fmt: skip
    return kind, message


@pytest.mark.parametrize("architecture", ["gemma", "llama-bias", "mamba"])
def test_planning_refuses_what_loading_refuses(checkpoint, architecture):
    """backend="hooked" that cannot: the same error in the same words."""
    kind, message = both_refuse(checkpoint(architecture), backend="hooked")
    assert kind is ModelError
    assert message.endswith("Use backend='bridge'")


def test_bad_requests_are_refused_alike(hub, checkpoint, tmp_path):
    """Unknown backend, dtype and model, a folder without configuration or weights."""
    assert "Did you mean 'hooked'" in both_refuse(checkpoint("llama"), backend="hook")[1]
    assert "'float31'; allowed" in both_refuse(checkpoint("llama"), dtype="float31")[1]
    assert "unknown model 'no/such-model'" in both_refuse("no/such-model")[1]
    assert "no config.json" in both_refuse(tmp_path)[1]
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    assert "no .safetensors file" in both_refuse(tmp_path)[1]


def test_a_folders_checksum_is_made_once_and_again_when_it_changes(checkpoint, tmp_path, monkeypatch):
    """The second plan reads no weights; other weights at the same place are another revision."""
    read = []
    digest = io.file_digest
    monkeypatch.setattr(io, "file_digest", lambda path: read.append(path) or digest(path))
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "mine")
    first = planned_info(folder, backend="bridge")
    assert planned_info(folder, backend="bridge") == first
    assert len(read) == 1
    before = (folder / "model.safetensors").stat()
    shutil.copy(tiny.save(tmp_path / "other", "llama", seed=1) / "model.safetensors", folder)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert planned_info(folder, backend="bridge").revision not in (first.revision, None)
    assert len(read) == 2
