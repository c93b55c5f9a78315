"""What every method has from the base of adapters: attaching, places in the model, files; on an adapter that adds a vector."""

import json
import logging
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import lofit_lens as ll
from lofit_lens.errors import AdapterError, InputError, ModelError
from lofit_lens.evaluation.result import EvalResult, Metric
from lofit_lens.interventions.base import Intervention
from lofit_lens.interventions.files import CONFIG_FILE, WEIGHTS_FILE, check_tensors, read_config
from lofit_lens.models import Borders, check_residual, hooks, logits_of, residual_point
from tests import every_method
from tests.conftest import PAIRS
from tests.shift import MLPShift, Shift, shift_of

TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
BORDERS = Borders(torch.tensor([4, 6]), torch.tensor([10, 10]))


@torch.no_grad()
def run(model, adapter=None):
    if adapter is None:
        return logits_of(model, TOKENS, torch.ones_like(TOKENS), BORDERS)
    with adapter.attached(model):
        return run(model)


# ------------------------------------------------------------------------------------------------------- attaching


@pytest.mark.parametrize("kind", [Shift, MLPShift])
def test_an_edit_comes_and_goes(llama, kind):
    """It shows while attached, at its positions alone, and leaves the model bit-equal; zeros change nothing, wherever."""
    before, adapter = run(llama), shift_of(llama, "answer", kind=kind)
    after = run(llama, adapter)
    for row, start in enumerate((4, 6)):
        assert torch.equal(after[row, :start], before[row, :start])
        assert (after[row, start:] - before[row, start:]).abs().amax(dim=-1).min() > 0.01
    assert torch.equal(run(llama), before)
    for positions in ("all", "answer", "f3+l2"):
        assert torch.equal(run(llama, shift_of(llama, positions, kind=kind, scale=0.0)), before)
    assert isinstance(adapter, Intervention)


def test_the_edit_runs_only_where_it_acts(llama, monkeypatch):
    """A pass without a position to edit does not even compute it; each edited layer computes it once a pass."""
    adapter, calls, inner = shift_of(llama, "answer"), [], Shift._edit
    monkeypatch.setattr(
        adapter, "_edit", lambda layer: lambda x: (calls.append(layer), inner(adapter, layer)(x))[1], raising=False
    )
    ones = torch.ones_like(TOKENS)
    with adapter.attached(llama), torch.no_grad():
        logits_of(llama, TOKENS, ones, Borders(torch.tensor([10, 10]), torch.tensor([11, 11])))
        assert calls == []
        logits_of(llama, TOKENS, ones, BORDERS)
    assert calls == [0, 2]


def test_attaching_twice_is_refused(llama):
    """The first stays, and goes with its own block."""
    adapter, before = shift_of(llama), run(llama)
    with adapter.attached(llama):
        inside = run(llama)
        with pytest.raises(AdapterError, match="already attached"), adapter.attached(llama):
            pass
        assert torch.equal(run(llama), inside)
    assert torch.equal(run(llama), before)
    with adapter.attached(llama):
        assert torch.equal(run(llama), inside)


def test_an_adapter_of_another_shape_is_refused(llama):
    """Layers or width: both shapes and the model it was made for are named; nothing stays attached."""
    name = shift_of(llama).meta.model.name
    for made, shape in (
        (Shift(torch.zeros(1, 32), [0], 4), "4 layers of width 32"),
        (Shift(torch.zeros(1, 31), [0], 3), "width 31"),
    ):
        made.meta.model = shift_of(llama).meta.model
        with (
            pytest.raises(AdapterError, match=rf"{shape} \(made for {name}\); {name} has 3 of 32"),
            made.attached(llama),
        ):
            pass
        with pytest.raises(AdapterError, match=shape):  # it was not left behind as attached
            made.attach_check(llama)
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())


def test_another_base_model_is_told(llama, caplog):
    """Its name and this one's, in a warning; the same model brings none."""
    with caplog.at_level(logging.WARNING, logger="lofit_lens"):
        adapter = shift_of(llama)
        run(llama, adapter)
        assert not caplog.records
        adapter.meta.model = type(adapter.meta.model)(
            **{**adapter.meta.model.to_dict(), "name": "other", "revision": "x"}
        )
        run(llama, adapter)
    assert "made for other; it is now attached to" in caplog.text


def test_an_edit_of_its_own_keeps_the_type(checkpoint, backend):
    """Over bfloat16, everywhere and at certain positions: logits stay bfloat16 and the edit shows; gradients are float32."""
    model = ll.load_model(checkpoint("llama"), backend=backend, dtype="bfloat16", device="cpu")
    before = run(model)
    for positions in ("all", "predicting"):
        adapter = shift_of(model, positions)
        assert run(model, adapter).dtype == torch.bfloat16
        assert not torch.equal(run(model, adapter), before)
        adapter.requires_grad_(True)
        with adapter.attached(model):
            logits_of(model, TOKENS, torch.ones_like(TOKENS), BORDERS).float().logsumexp(-1).sum().backward()
        assert adapter.c.grad.dtype == torch.float32
        assert (adapter.c.grad.abs().sum(dim=1) > 0).all()


# ------------------------------------------------------------------------------------------- the residual stream's places


@pytest.mark.parametrize("site", ["hook_resid_post", "hook_mlp_out"])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_every_architecture_has_both_places(loaded, architecture, on, site, monkeypatch):
    """Both fire once a layer with `[batch, pos, d_model]`; what was seen once is not tried again."""
    model = loaded(architecture, on)
    check_residual(model, range(3), site)
    monkeypatch.setattr(hooks, "_fired", lambda *args: pytest.fail("tried again"))
    check_residual(model, (2, 0), site)
    check_residual(model, (), site)


def test_a_layer_that_is_not_there_is_refused(bridge_llama):
    """By layer and place."""
    with pytest.raises(ModelError, match=r"block 3 of .* has no blocks\.3\.hook_mlp_out"):
        residual_point(bridge_llama, 3, "hook_mlp_out")


@pytest.mark.parametrize(
    ("seen", "message"),
    [([], "fired 0 times in one forward; it must"), ([(1, 2, 32)] * 2, "fired 2 times"),
     ([(2, 32)], r"1 times .* shape \(2, 32\)"),
     ([(1, 2, 31)], r"shape \(1, 2, 31\); it must fire once with \[batch, pos, 32\]")],
)  # fmt: skip
def test_a_place_that_is_no_residual_stream_is_refused(bridge_llama, monkeypatch, seen, message):
    """Never, twice, flattened, of another width: nothing is remembered of it."""
    monkeypatch.setattr(hooks, "_probed_sites", type(hooks._probed_sites)())
    monkeypatch.setattr(hooks, "_fired", lambda model, points: dict.fromkeys(points, seen))
    for _ in range(2):
        with pytest.raises(ModelError, match=f"hook_mlp_out of layer 1 of .*{message}"):
            check_residual(bridge_llama, [1], "hook_mlp_out")


# ----------------------------------------------------------------------------------------------------------- files


SAID = {
    "lofit": "K=3 of 3x4 heads, 48 parameters: L2H1 L0H3 L2H0", "iti": "alpha 3 at answer, 24 parameters: L2H1 L0H3 L2H0",
    "repe": "coefficient 2 at all, layers 0 2, 64 parameters", "red": "2 of 3 layers, 128 parameters",
    "loreft": "rank 2, positions f7+l7, 2 of 3 layers, 260 parameters",
    "post-block": "rank 2, linear, 2 of 3 layers, 256 parameters",
    "lora": "rank 2, alpha 16, q v of 3 layers, 768 parameters",
    "contrast": "coefficient 0.25 at answer, layers 0 2", "ablation": "to mean, K=3: L2H1 L0H3 L2H0",
}  # fmt: skip


@pytest.mark.parametrize("method", every_method.METHODS)
def test_every_method_is_saved_whole_and_says_what_it_is(bridge_llama, tmp_path, method):
    """Numbers, settings, provenance and logits, to the bit, as its own class; its text names model, task and settings."""
    adapter = every_method.made(method, bridge_llama).requires_grad_(False)
    read = ll.load_adapter(adapter.save_pretrained(tmp_path / "x"), model=bridge_llama)
    assert type(read) is type(adapter)
    for name, t in adapter._tensors().items():
        assert torch.equal(read._tensors()[name], t)
    adapter.meta.versions = read.meta.versions
    assert (read.meta, read.positions, read._settings()) == (adapter.meta, adapter.positions, adapter._settings())
    assert torch.equal(run(bridge_llama, read), run(bridge_llama, adapter))
    assert not torch.equal(run(bridge_llama, read), run(bridge_llama))
    assert repr(read) == repr(adapter)
    assert f"{type(read).__name__}({read.meta.model.name}, organism/facts, " in repr(read)
    assert SAID[method] in repr(read)


@pytest.fixture
def folder(bridge_llama, tmp_path):
    adapter = shift_of(bridge_llama, "f3+l2")
    adapter.meta.task, adapter.meta.seed, adapter.meta.history = "edits", 42, [{"step": 1, "loss": 0.1}]
    return adapter.save_pretrained(tmp_path / "adapter")


def test_a_saved_adapter_is_the_same(llama, tmp_path):
    """Numbers, settings, positions, provenance and logits, to the bit; again saved it gives the same bytes."""
    adapter = shift_of(llama, "f3+l2")
    adapter.meta.task, adapter.meta.n_train, adapter.meta.versions = "edits", 7, {"torch": "2"}
    read = Shift.from_pretrained(adapter.save_pretrained(tmp_path / "a"), model=llama)
    assert torch.equal(read.c, adapter.c)
    assert (read.layers, read.n_layers, read.positions, read.meta) == (
        adapter.layers, adapter.n_layers, adapter.positions, adapter.meta,
    )  # fmt: skip
    assert torch.equal(run(llama, read), run(llama, adapter))
    read.save_pretrained(tmp_path / "b")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_record_says_what_it_is(folder, bridge_llama):
    """Schema, method, base model, the method's own settings, positions, provenance."""
    record = read_config(folder)
    assert record == json.loads((folder / CONFIG_FILE).read_text())
    said = {
        "lofit_lens_schema": 2, "method": "shift", "positions": "f3+l2", "layers": [0, 2], "n_layers": 3, "task": "edits",
        "seed": 42,
    }  # fmt: skip
    assert {k: record[k] for k in said} == said
    assert record["base_model"] == shift_of(bridge_llama).meta.model.to_dict()
    assert record["history"] == [{"step": 1, "loss": 0.1}]
    assert "torch" in record["versions"]


def rewritten(folder, **changes):
    record = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in record.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lofit"}, "does not describe a Shift adapter: its method is 'lofit'"), ({"method": "gone"}, "an adapter"),
        ({"lofit_lens_schema": 3}, r"newer version \(schema 3\); update"),
        ({"lofit_lens_schema": 0}, "schema 0; .* reads 2"),
        ({"lofit_lens_schema": "2"}, "schema '2'"), ({"lofit_lens_schema": "gone"}, "schema None"),
        ({"layers": "gone"}, "incomplete: 'layers'"), ({"positions": "gone"}, "incomplete: 'positions'"),
        ({"positions": "end"}, "incomplete: unknown positions 'end'"), ({"base_model": {"name": "x"}}, "incomplete"),
        ({"base_model": "gone"}, "incomplete: 'base_model'"), ({"history": "gone"}, "incomplete: 'history'"),
        ({"layers": [0, 1, 2]}, r"c is torch.float32 \(2, 32\), expected torch.float32 \(3, 32\)"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(folder, changes, message):
    """Another method, a schema that is newer or none, a field that is missing or does not fit: AdapterError says which."""
    rewritten(folder, **changes)
    with pytest.raises(AdapterError, match=message):
        Shift.from_pretrained(folder)


def test_an_adapter_may_know_no_base_model(tmp_path):
    """Made by shape alone, saved and read."""
    Shift(torch.ones(1, 32), [1], 3).save_pretrained(tmp_path / "x")
    assert Shift.from_pretrained(tmp_path / "x").meta.model is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(folder, value):
    """NaN and infinity, by the tensor's name."""
    save_file({"c": torch.full((2, 32), value)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="c holds NaN or infinity"):
        Shift.from_pretrained(folder)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_or_broken_file_is_refused(folder, tmp_path, file):
    """Half of it, nothing in it, no file, no folder; a list where a record belongs."""
    whole = (folder / file).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"[1, 2]"):
        (folder / file).write_bytes(content)
        with pytest.raises(AdapterError, match=file):
            Shift.from_pretrained(folder)
    (folder / file).unlink()
    with pytest.raises(AdapterError, match=file):
        Shift.from_pretrained(folder)
    with pytest.raises(AdapterError, match=f"nowhere is not an adapter folder: it has no {CONFIG_FILE}"):
        read_config(tmp_path / "nowhere")


def test_a_folder_is_replaced_only_if_asked(folder, bridge_llama):
    """And what was in it stays until the new one is whole."""
    other = shift_of(bridge_llama, seed=1)
    with pytest.raises(InputError, match="exists"):
        other.save_pretrained(folder)
    kept = shutil.copytree(folder, folder.with_name("kept"))
    assert not torch.equal(Shift.from_pretrained(kept).c, other.c)
    other.save_pretrained(folder, overwrite=True)
    assert torch.equal(Shift.from_pretrained(folder).c, other.c)


def test_loading_for_a_model_that_does_not_fit_is_refused(bridge_llama, tmp_path):
    """At once, not first when it is attached."""
    Shift(torch.zeros(1, 32), [0], 4).save_pretrained(tmp_path / "x")
    with pytest.raises(AdapterError, match="4 layers"):
        Shift.from_pretrained(tmp_path / "x", model=bridge_llama)


def test_tensors_are_checked_by_name_shape_and_type(tmp_path):
    """Float32 alone; the file, what it holds and what was expected are named."""
    shapes = {"a": (2, 3), "b": (1,)}
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    check_tensors(good, shapes, tmp_path)
    for changed, message in (
        ({"a": torch.zeros(3, 2)}, r"a is torch.float32 \(3, 2\), expected torch.float32 \(2, 3\)"),
        ({"b": torch.zeros(1).double()}, r"b is torch.float64 \(1,\), expected"),
        ({"c": torch.zeros(1)}, r"holds \['a', 'b', 'c'\]; expected a and b"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE}.*{message}"):
            check_tensors({**good, **changed}, shapes, tmp_path)
    with pytest.raises(AdapterError, match=r"holds \['a'\]; expected a and b"):
        check_tensors({"a": good["a"]}, shapes, tmp_path)


def test_metrics_are_kept_once_and_of_the_same_weights(bridge_llama, tmp_path):
    """A later result of the same task, split and form replaces an earlier one; files keep them; other weights are refused."""
    adapter = shift_of(bridge_llama)

    def result(split, mean, model=adapter.meta.model):
        metrics = {"em": Metric(mean, (0.1, 0.9), 5), "f1": Metric(mean, None, 1)}
        return EvalResult("caps", split, metrics, pd.DataFrame(), model=model, data_hash="d")

    for found in (result("val", 0.25), result("test", 0.5), result("test", 0.75)):
        adapter.add_metrics(found)
    said = [(m["split"], m["metric"], m["mean"], m["interval"], m["n"], m["seeds"]) for m in adapter.meta.metrics]
    assert said == [
        ("val", "em", 0.25, [0.1, 0.9], 5, 1), ("val", "f1", 0.25, None, 1, 1),
        ("test", "em", 0.75, [0.1, 0.9], 5, 1), ("test", "f1", 0.75, None, 1, 1),
    ]  # fmt: skip
    read = Shift.from_pretrained(adapter.save_pretrained(tmp_path / "a"))
    assert read.meta.metrics == adapter.meta.metrics
    with pytest.raises(InputError, match=r"measured on .* \(sha256:other\), and the adapter was made for"):
        adapter.add_metrics(result("test", 1.0, replace(adapter.meta.model, revision="sha256:other")))
    assert read.meta.metrics == adapter.meta.metrics
