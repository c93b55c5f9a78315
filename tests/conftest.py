"""Fixtures of the tests. Shapes and types of the library are checked at run time while they run.

With `-n 2` three processes read this file and one of them runs no test: what takes long to import is imported in fixtures.
"""

import os
from importlib.metadata import version
from pathlib import Path

import filelock
import hypothesis
import jaxtyping
import pytest

import tests.typecheck  # noqa: F401 (found by name below)

# Before lofit_lens is imported: every annotated function and dataclass of it is checked on every call.
jaxtyping.install_import_hook("lofit_lens", "tests.typecheck.check")

# The same examples every time, and no time limit on a single one: a slow disk is no failure.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

ARCHITECTURES = ("llama", "llama-gqa", "gemma", "gpt2", "pythia", "mistral", "qwen2", "qwen3", "opt")
ON_HOOKED = ("llama", "llama-gqa", "gpt2", "pythia", "mistral", "qwen2", "qwen3", "opt")  # from a local folder
HAS_HOOKED = int(version("transformer-lens").split(".")[0]) < 4
needs_hooked = pytest.mark.skipif(
    not HAS_HOOKED, reason="this TransformerLens has no HookedTransformer (removed in 4.0)"
)
HOOKED = pytest.param("hooked", marks=needs_hooked)
BACKENDS = (HOOKED, "bridge")
EVERY_PAIR = [(a, b) for a in ARCHITECTURES for b in ("hooked", "bridge") if b == "bridge" or a in ON_HOOKED]
# Each architecture on one class, and grouped queries on both; the other pairs are for `make test-all`.
SAMPLED = {(a, "bridge") for a in ARCHITECTURES} if not HAS_HOOKED else {
    ("llama-gqa", "hooked"), ("llama-gqa", "bridge"), ("gemma", "bridge"), ("gpt2", "bridge"), ("pythia", "hooked"),
    ("mistral", "bridge"), ("qwen2", "hooked"), ("qwen3", "bridge"), ("opt", "hooked"),
}  # fmt: skip


def pairs(*, sampled: bool):
    """Parameters (architecture, class); of a sample, those outside it are marked as slow."""
    for pair in EVERY_PAIR:
        marks = [needs_hooked] if pair[1] == "hooked" else []
        if sampled and pair not in SAMPLED:
            marks.append(pytest.mark.slow)
        yield pytest.param(*pair, id="-".join(pair), marks=marks)


PAIRS = tuple(pairs(sampled=True))
ALL_PAIRS = tuple(pairs(sampled=False))


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """One thread a process, and no messages of libraries."""
    import logging

    import torch
    import transformers
    from huggingface_hub.utils import _http

    torch.set_num_threads(1)
    # Where there is no network, no test waits between attempts to reach a hub.
    for asking in (_http._http_backoff_base, _http.http_backoff, _http.http_stream_backoff):
        getattr(asking, "__wrapped__", asking).__kwdefaults__ |= {"base_wait_time": 0.0, "max_wait_time": 0.0}
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """(name, make) -> a folder that `make` writes once, in the process that asks first; the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name: str, make) -> Path:
        done = root / f"{name}.done"
        with filelock.FileLock(root / f"{name}.lock"):
            if not done.exists():
                make(root / name)
                done.touch()
        return root / name

    return folder_of


@pytest.fixture(scope="session")
def checkpoint(once):
    """Architecture -> folder of a tiny checkpoint, written once. The folder names are plain."""
    from tests import tiny

    names = {architecture: f"tiny-{i}" for i, architecture in enumerate(tiny.configs())}

    def folder_of(architecture: str) -> Path:
        return once(names[architecture], lambda folder: tiny.save(folder, architecture))

    return folder_of


shared = {}  # models of the session's fixture `loaded`


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """(architecture, backend) -> a model that is loaded once. Tests put settings back; none writes to its weights."""
    from lofit_lens.models import load_model

    def model_of(architecture: str, backend: str):
        if (architecture, backend) not in shared:
            shared[architecture, backend] = load_model(checkpoint(architecture), backend=backend, device="cpu")
        return shared[architecture, backend]

    return model_of


@pytest.fixture(autouse=True)
def weights_left_alone():
    """A shared model that was written to is another model to the tests that follow, even after the old values return."""
    yield
    if not shared:
        return
    from lofit_lens.models.info import origin_of

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
    from lofit_lens.models import load_model

    return load_model(checkpoint("llama"), backend=backend, device="cpu")


@pytest.fixture
def kernels(monkeypatch):
    """Calls of torch's fused attention kernel: the shape of each one's queries."""
    import torch

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
def study_folder(loaded, once):
    """A small study of all parts on the bridge, read; tests must not change it."""
    from tests import studies

    def make(folder: Path):
        studies.run(loaded("llama", "bridge"), folder)

    return once("small", make)


@pytest.fixture(scope="session")
def hf(checkpoint):
    """Architecture -> the plain Hugging Face model of that checkpoint."""
    import transformers

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
    from tests import fake_hub

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
