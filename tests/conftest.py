"""Fixtures of the unit tests. Shapes and types of the library are checked at run time while they run."""

import jaxtyping

import tests.typecheck  # noqa: F401 (found by name below)

# Before lofit_lens is imported: every annotated function and dataclass of it is checked on every call.
jaxtyping.install_import_hook("lofit_lens", "tests.typecheck.check")

import logging  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
# The same examples every time, and no time limit on a single one: a slow disk is no failure.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformer_lens").setLevel(logging.ERROR)

from lofit_lens.models import hooked_class, load_model  # noqa: E402
from lofit_lens.models.info import origin_of  # noqa: E402
from tests import fake_hub, studies, tiny  # noqa: E402

needs_hooked = pytest.mark.skipif(
    hooked_class() is None, reason="this TransformerLens has no HookedTransformer (removed in 4.0)"
)
HOOKED = pytest.param("hooked", marks=needs_hooked)
BACKENDS = (HOOKED, "bridge")
PAIRS = tuple(
    pytest.param(a, b, id=f"{a}-{b}", marks=needs_hooked if b == "hooked" else ())
    for a in tiny.ARCHITECTURES
    for b in ("hooked", "bridge")
    if b == "bridge" or a in tiny.ON_HOOKED
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Architecture -> folder of a tiny checkpoint, written once. The folder names are plain."""
    made = {}

    def folder_of(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tiny.save(tmp_path_factory.mktemp("checkpoint") / f"tiny-{len(made)}", architecture)
        return made[architecture]

    return folder_of


shared = {}  # models of the session's fixture `loaded`


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """(architecture, backend) -> a model that is loaded once. Tests put settings back; none writes to its weights."""

    def model_of(architecture: str, backend: str):
        if (architecture, backend) not in shared:
            shared[architecture, backend] = load_model(checkpoint(architecture), backend=backend, device="cpu")
        return shared[architecture, backend]

    return model_of


@pytest.fixture(autouse=True)
def weights_left_alone():
    """A shared model that was written to is another model to the tests that follow, even after the old values return."""
    yield
    written = [key for key, model in shared.items() if origin_of(model).source is None]
    for key in written:
        del shared[key]
    assert not written, f"shared models were written to: {written}; take `fresh`"


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Both TransformerLens classes, where they exist."""
    return request.param


@pytest.fixture
def llama(loaded, backend):
    """A tiny Llama (3 layers of 4 heads, d_head 8) on each class."""
    return loaded("llama", backend)


@pytest.fixture
def fresh(checkpoint, backend):
    """A tiny Llama of its own on each class, of which nothing was proven."""
    return load_model(checkpoint("llama"), backend=backend, device="cpu")


@pytest.fixture
def kernels(monkeypatch):
    """Calls of torch's fused attention kernel: the shape of each one's queries."""
    calls, inner = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *a, **k: (calls.append(q.shape), inner(q, *a, **k))[1],
    )
    return calls


@pytest.fixture(scope="session")
def bridge_llama(loaded):
    """The same tiny Llama on TransformerBridge, for tests that need one class only."""
    return loaded("llama", "bridge")


@pytest.fixture(scope="session")
def study_folder(loaded, tmp_path_factory):
    """A small study of all parts on the bridge, read; tests must not change it."""
    folder = tmp_path_factory.mktemp("study") / "small"
    studies.run(loaded("llama", "bridge"), folder)
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Whoever asks for the study waits for it."""
    for item in items:
        if "study_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def hf(checkpoint):
    """Architecture -> the plain Hugging Face model of that checkpoint."""
    models = {}

    def model_of(architecture: str):
        if architecture not in models:
            models[architecture] = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint(architecture), attn_implementation="eager"
            ).eval()
        return models[architecture]

    return model_of


@pytest.fixture(scope="session")
def data_dir():
    """Folder with the real data files."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("LOFIT_LENS_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data files: set LOFIT_LENS_DATA to the folder that holds them")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hugging Face cache without a network behind it; returns its folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A hub that is reached with its user's token, and an empty cache."""
    with fake_hub.running() as server:
        for name, value in {
            "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no token"),
        }.items():  # fmt: skip
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield server


@pytest.fixture
def unchecked():
    """Run without the type checks, as users do: for tests that give a value of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
