"""What is attached while heads are scored or something is learned: named in a warning and kept with the result."""

import contextlib
import functools

import pytest

import lofit_lens as ll
from lofit_lens import TrainConfig
from lofit_lens.interventions import Lora
from lofit_lens.interventions.base import AdapterMeta
from lofit_lens.models import attached_to, load_model
from lofit_lens.probing import fit_probes, reading_vectors
from lofit_lens.training import LofitRun, tune_many
from lofit_lens.training.selectors import SELECTORS
from tests.adapters import random_adapter
from tests.selecting import DPO, SFT

QUICK = TrainConfig(lr=1e-2, l1=0.0, epochs=1, batch_size=8, max_steps=1)


def selected(name, task=SFT, **settings):
    return lambda model: SELECTORS[name](model, task, progress=False, **settings).meta["attached"]


FOUND = {
    "select": lambda model: ll.select_heads(model, SFT, config=QUICK, progress=False).meta["attached"],
    "tune": lambda model: ll.tune_offsets(model, SFT, ["L1H0"], config=QUICK, progress=False).meta.attached,
    "tune_many": lambda model: tune_many(
        model, [LofitRun(SFT, "v", ["L1H0"], config=QUICK), LofitRun(DPO, "A", config=QUICK)], progress=False
    )[1].meta.attached,
    "bias norm": selected("bias norm", config=QUICK),
    "probe accuracy": selected("probe accuracy", DPO), "probing layers": selected("probing layers", DPO),
    "gradient attribution": selected("gradient attribution", n_train=2),
    "activation patching": selected("activation patching", n_prompts=2, n_shots=1),
    "probes": lambda model: fit_probes(model, DPO, progress=False).iti(1).meta.attached,
    "reading vectors": lambda model: reading_vectors(model, DPO, progress=False).repe([0], coefficient=1.0).meta.attached,
}  # fmt: skip


def doubled(z, hook):
    """A hook of a user's own."""
    return 2 * z


@contextlib.contextmanager
def standing(model):
    """An adapter of a task, a TransformerLens hook on two layers, and a torch hook; and their names."""
    lofit = random_adapter(model)
    lofit.meta.task = "another"
    watched = model.blocks[2]
    handle = watched.register_forward_hook(lambda module, args, out: None)
    for layer in (0, 2):
        model.hook_dict[f"blocks.{layer}.attn.hook_z"].add_hook(functools.partial(doubled), is_permanent=True)
    try:
        with lofit.attached(model):
            yield ["LoFiT of another", "<lambda> on blocks.2", "doubled on blocks.0.attn.hook_z and 1 more"]
    finally:
        handle.remove()
        model.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("find", FOUND)
def test_what_is_attached_is_named_and_kept(llama, caplog, find):
    """Each selector, probe and training says what acts on the model beside it, once; and nothing of its own."""
    assert FOUND[find](llama) == []
    assert "attached" not in caplog.text
    with standing(llama) as names:
        assert sorted(FOUND[find](llama)) == sorted(names)
    (said,) = [m for m in caplog.messages if "is attached to the model" in m]
    assert all(name in said for name in names)
    assert "0x" not in said
    caplog.clear()
    assert FOUND[find](llama) == []
    assert "is attached" not in caplog.text


def test_an_adapter_without_hooks_is_named(bridge_llama):
    """LoRA stands in the model's projections."""
    with Lora.for_model(bridge_llama, seed=0).attached(bridge_llama):
        assert attached_to(bridge_llama, "a test") == ["LoRA"]
    assert attached_to(bridge_llama, "a test") == []


def test_what_was_attached_is_saved(llama, tmp_path):
    """Adapter files keep it; those of before have none."""
    lofit = random_adapter(llama)
    lofit.meta = AdapterMeta(attached=["ITI of truth", "doubled on blocks.0.hook_resid_post"])
    lofit.save_pretrained(tmp_path / "a")
    assert ll.Lofit.from_pretrained(tmp_path / "a").meta.attached == lofit.meta.attached


def test_the_embedded_model_brings_nothing_of_its_own(backend):
    """A model as it is loaded has nothing attached."""
    assert attached_to(load_model("organism", backend=backend, device="cpu"), "a test") == []
