"""LoFiT adapters as objects and files: init, counts, algebra, save and load, damaged folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lofit_lens import HeadSet, Lofit, io
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.interventions.files import CONFIG_FILE, WEIGHTS_FILE
from lofit_lens.models import logits_of
from tests.adapters import CHOSEN, random_adapter

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(model, lofit=None):
    if lofit is None:
        return logits_of(model, TOKENS, torch.ones_like(TOKENS))
    with lofit.attached(model):
        return run(model)


# --------------------------------------------------------------------------------------------- init and counts


@pytest.mark.parametrize("component", ["A", "v"])
def test_the_init_is_the_official_draw(component):
    """One CPU generator, N(0, 1e-3) head by head, layer-major whatever the set's order; the other component is zero."""
    lofit = Lofit((3, 4, 8), HeadSet(["L2H1", "L0H3", "L2H0"])).init_(component, seed=42)
    generator = torch.Generator().manual_seed(42)
    expected = torch.zeros(3, 4, 8)
    for layer, head in ((0, 3), (2, 0), (2, 1)):
        torch.nn.init.normal_(expected[layer, head], 0, 1e-3, generator=generator)
    assert torch.equal(getattr(lofit, component), expected)
    assert not (lofit.v if component == "A" else lofit.A).any()


def test_init_replaces_what_was_there():
    """A second init forgets the first, in both components; another seed draws other numbers."""
    lofit = Lofit((3, 4, 8), CHOSEN)
    first = lofit.init_("A", seed=1).A.clone()
    assert not torch.equal(lofit.init_("A", seed=2).A, first)
    lofit.init_("v", seed=1)
    assert not lofit.A.any()
    assert torch.equal(lofit.v.detach(), first)


@pytest.mark.parametrize(("k", "count"), [(32, 4096), (96, 12288)])
def test_offsets_of_llama_2_7b_have_the_published_count(k, count):
    """K heads of d_head 128: 32 * 128 = 4,096 (3 %) and 96 * 128 = 12,288 (10 %)."""
    heads = HeadSet.random((32, 32), k, seed=0)
    assert Lofit((32, 32, 128), heads).train_only("v").n_parameters == count


def test_scalings_of_llama_2_7b_have_the_published_count():
    """Every head's A: 32 * 32 * 128 = 131,072."""
    assert Lofit((32, 32, 128)).train_only("A").n_parameters == 131_072


def test_the_count_is_of_what_is_used():
    """Nothing for the zero adapter, one component while trained or filled, both where both are."""
    lofit = Lofit((3, 4, 8), CHOSEN)
    assert lofit.n_parameters == 0
    assert lofit.train_only("v").n_parameters == 24  # 3 heads of 8
    lofit.init_("A", seed=0)
    assert lofit.n_parameters == 48
    assert lofit.train_only(None).n_parameters == 24


def test_norms_are_l2_norms_by_head():
    """A = (3, 4, 0, ...) on one head has norm 5; every other head 0. v has its own."""
    lofit = Lofit((3, 4, 8), CHOSEN)
    with torch.no_grad():
        lofit.A[2, 1, :2] = torch.tensor([3.0, 4.0])
        lofit.v[0, 3, 0] = -2.0
    assert lofit.norms("A")["L2H1"] == 5.0
    assert lofit.norms("A").values.sum() == 5.0
    assert lofit.norms("v").values[0, 3] == lofit.norms("v").values.sum() == 2.0
    assert lofit.norms("v").kind == "v-norm"


def test_printing_tells_model_task_heads_and_count(bridge_llama):
    """repr and the notebook view name model, K, heads and parameters; a path is escaped."""
    lofit = random_adapter(bridge_llama)
    lofit.meta.task = "<edits>"
    text = repr(lofit)
    for part in (lofit.meta.model.name, "<edits>", "K=3 of 3x4", "48 parameters", "L2H1 L0H3 L2H0"):
        assert part in text
    assert "&lt;edits&gt;" in lofit._repr_html_()
    assert "<edits>" not in lofit._repr_html_()


# ------------------------------------------------------------------------------------------------------ algebra


def test_algebra_by_hand():
    """0.5 l, a + b, a - b act on A and v entry by entry, on the union of heads; operands stay as they were."""
    a, b = Lofit((1, 2, 1), HeadSet(["L0H0"])), Lofit((1, 2, 1), HeadSet(["L0H1", "L0H0"]))
    with torch.no_grad():
        a.A[0, 0], a.v[0, 0] = 2.0, -4.0
        b.A[0], b.v[0] = torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [20.0]])
    half, total, less = 0.5 * a, a + b, a - b
    assert (half.A.flatten().tolist(), half.v.flatten().tolist()) == ([1.0, 0.0], [-2.0, 0.0])
    assert (total.A.flatten().tolist(), total.v.flatten().tolist()) == ([3.0, 3.0], [6.0, 20.0])
    assert (less.A.flatten().tolist(), less.v.flatten().tolist()) == ([1.0, -3.0], [-14.0, -20.0])
    assert (half.heads, total.heads.heads) == (a.heads, ((0, 0), (0, 1)))
    assert torch.equal((a * 0.5).v, half.v)
    assert a.A.flatten().tolist() == [2.0, 0.0]


def test_restrict_keeps_the_numbers_of_the_heads_that_stay():
    """restrict(heads) is the adapter on the intersection; heads it did not have are not added."""
    lofit = Lofit((3, 4, 8), CHOSEN).init_("v", seed=0)
    kept = lofit.restrict(HeadSet(["L2H0", "L0H3", "L1H1"]))
    assert set(kept.heads) == {(2, 0), (0, 3)}
    assert torch.equal(kept.v[2, 0], lofit.v[2, 0])
    assert not kept.v[2, 1].any()
    with pytest.raises(InputError, match="at least one head"):
        lofit.restrict(HeadSet(["L1H1"]))


def test_algebra_of_an_edit(llama):
    """l - l edits nothing; 1.0 * l and restrict to its own heads are l, bit by bit."""
    lofit = random_adapter(llama)
    assert torch.equal(run(llama, lofit - lofit), run(llama))
    assert torch.equal(run(llama, 1.0 * lofit), run(llama, lofit))
    assert torch.equal(run(llama, lofit.restrict(lofit.heads)), run(llama, lofit))


def test_adapters_of_different_shapes_do_not_add():
    """Both shapes are named."""
    with pytest.raises(AdapterError, match=r"\(3, 4, 8\) and \(3, 4, 12\)"):
        Lofit((3, 4, 8)) + Lofit((3, 4, 12))


# ------------------------------------------------------------------------------------------------ save and load


def test_a_saved_adapter_gives_the_same_logits(llama, tmp_path):
    """save -> load: numbers, heads with scores, provenance and logits are the same to the bit."""
    lofit = random_adapter(llama, HeadSet(["L2H1", "L0H3"], [0.7, 0.1], label="mine"))
    lofit.meta.task, lofit.meta.seed, lofit.meta.history = "edits", 42, [{"step": 1, "loss": 0.1}]
    read = Lofit.from_pretrained(lofit.save_pretrained(tmp_path / "adapter"), model=llama)
    assert torch.equal(run(llama, read), run(llama, lofit))
    assert torch.equal(read.A, lofit.A)
    assert torch.equal(read.v, lofit.v)
    assert read.heads == lofit.heads
    assert read.meta == lofit.meta


def test_the_folder_holds_what_the_adapter_is(llama, tmp_path):
    """JSON names base model, revision, loading mode, heads, seed and versions; only the chosen heads' numbers are stored."""
    lofit = random_adapter(llama)
    lofit.meta.seed = 7
    folder = lofit.save_pretrained(tmp_path / "adapter")
    record = json.loads((folder / CONFIG_FILE).read_text())
    assert record["base_model"] == lofit.meta.model.to_dict()
    assert record["base_model"]["processed"] is False
    assert record["base_model"]["revision"].startswith("sha256:")
    assert record["heads"]["heads"] == [[2, 1], [0, 3], [2, 0]]
    assert (record["method"], record["seed"], record["shape"]) == ("lofit", 7, [3, 4, 8])
    assert record["versions"]["torch"] == io.environment()["torch"]
    stored = io.load_tensors(folder / WEIGHTS_FILE)
    assert {n: tuple(t.shape) for n, t in stored.items()} == {"A": (3, 8), "v": (3, 8)}
    assert torch.equal(stored["v"][1], lofit.v[0, 3].detach())


def test_the_same_adapter_gives_the_same_bytes(bridge_llama, tmp_path):
    """Init from the same seed, saved eight times: both files are equal byte by byte."""
    for i in range(8):
        Lofit.for_model(bridge_llama, CHOSEN).init_("v", seed=5).save_pretrained(tmp_path / str(i))
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert len({(tmp_path / str(i) / file).read_bytes() for i in range(8)}) == 1


def test_an_existing_folder_is_kept_unless_asked(tmp_path):
    """Saving over an adapter needs overwrite=True."""
    first, second = (Lofit((3, 4, 8), CHOSEN).init_("v", seed=s) for s in (1, 2))
    first.save_pretrained(tmp_path / "x")
    with pytest.raises(InputError, match="exists"):
        second.save_pretrained(tmp_path / "x")
    assert torch.equal(Lofit.from_pretrained(tmp_path / "x").v, first.v)
    second.save_pretrained(tmp_path / "x", overwrite=True)
    assert torch.equal(Lofit.from_pretrained(tmp_path / "x").v, second.v)


def test_loading_for_a_model_of_another_shape_is_refused(bridge_llama, tmp_path):
    """from_pretrained(model=...) checks the shape at once."""
    Lofit((3, 5, 8), HeadSet(["L0H4"])).save_pretrained(tmp_path / "x")
    with pytest.raises(AdapterError, match="5 heads"):
        Lofit.from_pretrained(tmp_path / "x", model=bridge_llama)


# ---------------------------------------------------------------------------------------------- damaged folders


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "good"
    return Lofit((3, 4, 8), CHOSEN).init_("v", seed=1).save_pretrained(folder)


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "broken")


def _rewrite(folder, **changes):
    record = json.loads((folder / CONFIG_FILE).read_text())
    for name, value in changes.items():
        if value is None:
            del record[name]
        else:
            record[name] = value
    (folder / CONFIG_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "field",
    ["shape", "heads", "base_model", "task", "data_hash", "seed", "config", "versions", "history", "n_train", "method"],
)
def test_a_missing_field_is_named(folder, field):
    """Every field of the record is needed."""
    _rewrite(folder, **{field: None})
    with pytest.raises(AdapterError, match=f"{field}|does not describe"):
        Lofit.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lofit_lens_schema": 3}, "newer version"), ({"lofit_lens_schema": "new"}, CONFIG_FILE), ({"method": "lora"}, "LoFiT"),
     ({"shape": [3, 4]}, "shape"), ({"shape": [0, 4, 8]}, "shape|L2H1"), ({"shape": [3, 4, 9]}, r"expected .*\(3, 9\)"),
     ({"shape": "abc"}, CONFIG_FILE), ({"shape": [2, 4, 8]}, "this one has 2 x 4"), ({"base_model": {"name": "x"}}, CONFIG_FILE),
     ({"heads": {"kind": "lofit_lens.HeadSet", "schema": 1, "heads": []}}, "at least one|empty")],
)  # fmt: skip
def test_a_damaged_record_is_refused(folder, changes, message):
    """A newer schema, another method, a shape that does not fit the tensors or the heads: each says what is wrong."""
    _rewrite(folder, **changes)
    with pytest.raises(InputError, match=message):
        Lofit.from_pretrained(folder)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_empty_or_truncated_file_is_refused(folder, file):
    """Whichever of the two files is damaged, it is AdapterError and names the file."""
    whole = (folder / file).read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (folder / file).write_bytes(content)
        with pytest.raises(AdapterError, match=file):
            Lofit.from_pretrained(folder)
    (folder / file).unlink()
    with pytest.raises(AdapterError, match=file):
        Lofit.from_pretrained(folder)
    with pytest.raises(AdapterError, match="nowhere"):
        Lofit.from_pretrained(folder / "nowhere")


def _tensors(**changes):
    made = {"A": torch.zeros(3, 8), "v": torch.ones(3, 8), **changes}
    return {n: t for n, t in made.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [(_tensors(v=torch.full((3, 8), float("nan"))), "v holds NaN"), (_tensors(A=torch.full((3, 8), float("inf"))), "A holds"),
     (_tensors(v=torch.ones(2, 8)), r"v is .*\(2, 8\), expected .*\(3, 8\)"), (_tensors(v=torch.ones(3, 8).double()), "float64"),
     (_tensors(v=None, offsets=torch.ones(3, 8)), "offsets"), (_tensors(v=None), "expected A and v"),
     (_tensors(extra=torch.ones(3, 8)), "extra")],
)  # fmt: skip
def test_tensors_that_do_not_match_the_record_are_refused(folder, tensors, message):
    """NaN, infinity, another shape or type, a renamed, missing or additional tensor."""
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=message):
        Lofit.from_pretrained(folder)
