"""Everything that takes a model runs on a device that is not the CPU, and on two, and finds there what it finds on the CPU."""

import importlib
import inspect
import math

import pytest

from lofit_lens.interventions import HeadAblation, Lofit, Lora, LoReft, PostBlock, Red
from lofit_lens.interventions.base import KNOWN
from lofit_lens.models import device_of, load_model, model_info
from tests import pretend
from tests.adapters import CHOSEN
from tests.conftest import needs_hooked
from tests.device_cases import CASES, in_two, plain


@pytest.fixture(autouse=True)
def devices(unchecked):
    """Without the type checks, which look at the same calls elsewhere: this is quicker."""
    with pretend.devices():
        yield


@pytest.fixture(scope="module")
def there(checkpoint):
    """Class -> a tiny Llama on a pretend device."""
    made = {}

    def model_of(backend):
        if backend not in made:
            with pretend.devices():
                made[backend] = load_model(checkpoint("llama"), backend=backend, device="pretend:0")
        return made[backend]

    return model_of


@pytest.fixture(scope="module")
def spread(checkpoint):
    """A tiny Llama of which a layer lies on one device and two on another."""
    with pretend.devices():
        return in_two(checkpoint("llama"))


@pytest.fixture(scope="module")
def on_cpu(loaded, tmp_path_factory):
    """(case, class) -> what it finds on the CPU, once."""
    found = {}

    def of(name, backend):
        if (name, backend) not in found:
            folder = tmp_path_factory.mktemp("cpu")
            found[name, backend] = plain(CASES[name].run(loaded("llama", backend), folder))
        return found[name, backend]

    return of


def assert_same(found, wanted, where=""):
    """Numbers to 1e-6, everything else as it is."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}/{i}")
    elif isinstance(wanted, float):
        close = math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-6) or (math.isnan(found) and math.isnan(wanted))
        assert close, f"{where}: {found} and {wanted}"
    else:
        assert found == wanted, where


PARTS = ("", ".analysis", ".evaluation", ".interventions", ".models", ".probing", ".training")
# They make no tensor, are run by every case, run nothing but other functions that have a case, or need other tools.
NEED_NONE = {
    "backend_of", "before_each_pass", "declared", "device_of", "explore", "export_circuit", "frozen", "head_layers",
    "inspect_model", "is_processed", "is_watched", "laid_out", "layout_of", "lm_eval_model", "load_results", "not_finite",
    "paper_grid", "positions_of", "tokenizer_of", "value_biases_folded", "why_not_finite",
}  # fmt: skip


def test_every_public_function_that_takes_a_model_has_a_case():
    """And every method that can be attached."""
    needed = {f"{kind.__name__}.attached" for kind in KNOWN.values() if kind.__module__.startswith("lofit_lens")}
    for part in PARTS:
        package = importlib.import_module(f"lofit_lens{part}")
        for name in package.__all__:
            found = getattr(package, name)
            if inspect.isfunction(found) and "model" in inspect.signature(found).parameters:
                needed.add(name)
    told = {name for case in CASES.values() for name in case.stands_for}
    assert not needed - told - NEED_NONE, needed - told - NEED_NONE


def test_a_model_is_loaded_onto_a_device(there, loaded, backend):
    """All of it, with the record that it has on the CPU."""
    model = there(backend)
    assert {str(t.device) for t in (*model.parameters(), *model.buffers())} == {"pretend:0"}
    assert str(device_of(model)) == "pretend:0"
    assert model_info(model) == model_info(loaded("llama", backend))


def test_adapters_are_made_on_the_models_device(there, backend):
    """Their numbers would else be sent there in every pass."""
    model = there(backend)
    made = [
        Lofit.for_model(model),
        Red.for_model(model),
        LoReft.for_model(model, seed=0),
        PostBlock.for_model(model, seed=0),
        HeadAblation.of(model, CHOSEN),
    ]
    for adapter in made if backend == "hooked" else [*made, Lora.for_model(model, seed=0)]:
        assert {t.device for t in adapter.state_dict().values()} == {device_of(model)}, adapter


ON_EACH_CLASS = [
    pytest.param(name, on, id=f"{name}-{on}", marks=needs_hooked if on == "hooked" else [])
    for name, told in CASES.items()
    for on in ("hooked", "bridge")
    if on == "bridge" or not (told.bridge_only or told.of_others)
]


@pytest.mark.parametrize(("name", "on"), ON_EACH_CLASS)
def test_a_device_finds_what_the_cpu_finds(there, on_cpu, tmp_path, name, on):
    assert_same(plain(CASES[name].run(there(on), tmp_path)), on_cpu(name, on), name)


@pytest.mark.parametrize("name", [name for name, told in CASES.items() if not told.of_others])
def test_two_devices_find_what_the_cpu_finds(spread, on_cpu, tmp_path, name):
    """A model in two parts, on the class that can be."""
    assert_same(plain(CASES[name].run(spread, tmp_path)), on_cpu(name, "bridge"), name)
