"""Damaged and hostile adapter folders: each is refused with an AdapterError that names the file, and nothing of it is run.

Folders of every method are damaged as they lie (checksums then tell), and with checksums computed again, as somebody would who
means harm.
"""

import json
import os
import pickle
import re
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load, save

from lofit_lens import io, load_adapter
from lofit_lens.errors import AdapterError
from lofit_lens.interventions.files import CONFIG_FILE, WEIGHTS_FILE
from tests import every_method

WITH_TENSORS = [m for m in every_method.METHODS if m != "contrast"]
pytestmark = pytest.mark.usefixtures("unchecked")  # users have no type checks that would stop a wrong type


@pytest.fixture(scope="module")
def good(bridge_llama, tmp_path_factory):
    """Method -> a folder, and the adapter in it."""
    root, made = tmp_path_factory.mktemp("good"), {}
    for method in every_method.METHODS:
        adapter = every_method.made(method, bridge_llama)
        made[method] = (adapter.save_pretrained(root / method), adapter)
    return made


@pytest.fixture
def damaged(good, tmp_path):
    """method -> a copy of its folder to be damaged."""

    def copy(method):
        folder = tmp_path / method
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good[method][0], folder)
        return folder

    return copy


def signed(folder):
    """Make both checksums anew, as if the folder had been written so."""
    path = folder / CONFIG_FILE
    record = {k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}
    record["weights_sha256"] = io.file_digest(folder / WEIGHTS_FILE)
    path.write_text(json.dumps(record | {"digest": io.digest(record)}))


def edit(folder, *, sign=True, **changes):
    """Change fields of the record; a field set to `...` is left out."""
    record = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))
    if sign:
        signed(folder)


def tensors_of(folder):
    return load((folder / WEIGHTS_FILE).read_bytes())


def put(folder, tensors, *, sign=True):
    (folder / WEIGHTS_FILE).write_bytes(save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"}))
    if sign:
        signed(folder)


def seen(folder):
    """All files below a folder, with their bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(one, other):
    a, b = one._tensors(), other._tensors()
    return (
        type(one) is type(other) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        and one._record() == other._record()
    )  # fmt: skip


def refused(folder, file, match=".", **options):
    """Reading raises AdapterError that names the file, and changes nothing in the folder."""
    before = seen(folder.parent)
    with pytest.raises(AdapterError, match=match) as e:
        load_adapter(folder, **options)
    assert file in str(e.value)
    assert seen(folder.parent) == before


# ----------------------------------------------------------------------------------------------------- 500 at random


@pytest.mark.parametrize("method", every_method.METHODS)
def test_every_bit_of_the_header_and_some_of_the_rest(good, damaged, method):
    """Each bit of the weights' first 16 bytes, and every 97th byte of both files."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        folder = damaged(method)
        whole = (folder / file).read_bytes()
        places = {*range(16 * (file == WEIGHTS_FILE)), *range(0, len(whole), 97)}
        for place in places:
            for bit in range(8) if place < 16 else (place % 8,):
                data = bytearray(whole)
                data[place] ^= 1 << bit
                (folder / file).write_bytes(data)
                try:
                    read = load_adapter(folder)
                except AdapterError:
                    continue
                assert same(read, good[method][1]), (file, place, bit)


# ------------------------------------------------------------------------------------------------------ by name


class Planted:
    """What a pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_pickle_in_disguise_is_not_run(damaged, tmp_path, file, protocol):
    """Under either file's name, bare or as torch writes it: refused, and what it would make is not there."""
    trap = tmp_path / "trap"
    data = pickle.dumps(Planted(trap), protocol)
    folder = damaged("lofit")
    (folder / file).write_bytes(data)
    refused(folder, file)
    torch.save({"A": Planted(trap)}, folder / file)
    refused(folder, file)
    assert not trap.exists()
    pickle.loads(data)
    assert trap.exists()  # so it would have been


def test_pickles_beside_the_files_are_not_read(good, damaged, tmp_path):
    """A folder may hold them; and where the safetensors are gone they do not stand in."""
    folder, trap = damaged("lofit"), tmp_path / "trap"
    for name in ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt"):
        torch.save({"A": Planted(trap)}, folder / name)
    assert same(load_adapter(folder), good["lofit"][1])
    (folder / WEIGHTS_FILE).unlink()
    refused(folder, WEIGHTS_FILE)
    assert not trap.exists()


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_out_of_the_folder_is_refused(good, damaged, tmp_path, file):
    """Even to a sound file; also by way of a folder beside it. A link within the folder is a name like others."""
    folder = damaged("iti")
    (tmp_path / "elsewhere").mkdir()
    for target in (good["iti"][0] / file, tmp_path / "elsewhere" / file):
        shutil.copy(good["iti"][0] / file, tmp_path / "elsewhere" / file)
        (folder / file).unlink()
        (folder / file).symlink_to(target)
        refused(folder, file, "outside its folder")
    (folder / file).unlink()
    (folder / file).symlink_to("../elsewhere/" + file)
    refused(folder, file, "outside its folder")
    (folder / file).unlink()
    shutil.copy(good["iti"][0] / file, folder / "other name")
    (folder / file).symlink_to("other name")
    assert same(load_adapter(folder), good["iti"][1])


def test_links_of_the_hub_s_cache_are_its_own(good, tmp_path):
    """`snapshots/<commit>/x -> ../../blobs/<hash>` is read; a link from there to anywhere else is not."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate((CONFIG_FILE, WEIGHTS_FILE)):
        shutil.copy(good["red"][0] / file, blobs / str(i))
        (snapshot / file).symlink_to(f"../../blobs/{i}")
    assert same(load_adapter(snapshot), good["red"][1])
    (snapshot / WEIGHTS_FILE).unlink()
    (snapshot / WEIGHTS_FILE).symlink_to(good["red"][0] / WEIGHTS_FILE)
    refused(snapshot, WEIGHTS_FILE, "outside its folder")


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_what_is_no_file_is_refused(damaged, file):
    """A folder, a broken link, and a pipe, which would wait for ever."""
    folder = damaged("lofit")
    (folder / file).unlink()
    (folder / file).mkdir()
    refused(folder, file)
    (folder / file).rmdir()
    (folder / file).symlink_to("nothing")
    refused(folder, file)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    refused(folder, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"method": "lofit", "method": "iti"}', "'method' appears twice"),
     ('{"method": "lofit", "base_model": {"name": "a", "name": "b"}}', "'name' appears twice"),
     ('{"method": "lofit", "alpha": NaN}', "NaN is not a finite number"), ('{"method": "lofit", "x": [-Infinity]}', "-Infinity"),
     ('{"method": "lofit", "x": 1e999}', "1e999 is not a finite number"),
     ("[" * 100_000 + "]" * 100_000, "cannot be read"), ('{"a":' * 100_000 + "1" + "}" * 100_000, "cannot be read"),
     ('{"method": "lofit", "lofit_lens_schema": ' + "9" * 10_000 + "}", "cannot be read"),
     ("[]", "holds list, not an object"), ("null", "not an object"), ('"lofit"', "not an object"), ("", "is empty"),
     ("\n \n", "is empty"), ('{"method": "lofit"', "is not JSON"), ('{"method": "\ud800"}', "not UTF-8"),
     ("{}", "does not describe an adapter"), ('{"method": "lofit"}', "schema None"), ("{'method': 'lofit'}", "is not JSON"),
     ('{"method": ["lofit"], "lofit_lens_schema": 2}', "does not describe an adapter"),
     ('{"method": "__class__", "lofit_lens_schema": 2}', "of method")],
)  # fmt: skip
def test_texts_that_are_no_record(damaged, text, message):
    """A key twice, NaN, depth without end, integers without end, other JSON, none at all."""
    folder = damaged("lofit")
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, CONFIG_FILE, message)


@pytest.mark.parametrize("schema", [3, 99, 10**30, 1, 0, -1, "2", 2.0, True, None, [], ...])
def test_other_schemas_are_refused(damaged, schema):
    """A newer one says to update, whatever else has changed in it; what is no number is refused too."""
    folder = damaged("repe")
    edit(folder, lofit_lens_schema=schema, method="newer method")
    newer = isinstance(schema, int) and schema > 2
    refused(folder, CONFIG_FILE, "written by a newer version .*update" if newer else "has schema")


@pytest.mark.parametrize("method", WITH_TENSORS)
def test_files_of_two_adapters_do_not_go_together(bridge_llama, damaged, tmp_path, method):
    """Same method, same shapes, other numbers: the checksum tells, in both directions."""
    other = every_method.made(method, bridge_llama, seed=1).save_pretrained(tmp_path / "other")
    folder = damaged(method)
    shutil.copy(other / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    refused(folder, WEIGHTS_FILE, "belongs to another adapter_config.json")
    folder = damaged(method)
    record = json.loads((other / CONFIG_FILE).read_text()) | {"weights_sha256": io.file_digest(folder / WEIGHTS_FILE)}
    (folder / CONFIG_FILE).write_text(json.dumps(record))
    refused(folder, CONFIG_FILE, "checksum does not match")


@pytest.mark.parametrize("method", every_method.METHODS)
@pytest.mark.parametrize("field", ["task", "seed", "config", "data_hash", "history", "n_train", "metrics", "versions"])
def test_what_was_changed_afterwards_is_told(damaged, method, field):
    """Every field counts, also those that change no number."""
    folder = damaged(method)
    record = json.loads((folder / CONFIG_FILE).read_text())
    other = {"seed": 9, "n_train": 9, "config": {"lr": 1}, "versions": {}, "metrics": [], "history": [{"a": 1.0}]}
    record[field] = other.get(field, "changed")
    (folder / CONFIG_FILE).write_text(json.dumps(record))
    refused(folder, CONFIG_FILE, "checksum does not match")


@pytest.mark.parametrize("method", every_method.METHODS)
def test_fields_of_the_wrong_kind_are_refused_whoever_signed(damaged, method):
    """Each field of the record in turn, and each of its base model: no exception of another kind gets out."""
    whole = json.loads((damaged(method) / CONFIG_FILE).read_text())
    fine = [("config", {"x": 1}), ("versions", {"x": 1}), ("history", [[]]), ("task", "%"), ("data_hash", "%"),
            ("positive", "%"), ("negative", "%"), ("attached", ...)]  # fmt: skip
    for field in set(whole) - {"digest", "weights_sha256"}:
        for value in (..., {"x": 1}, [[]], "%"):
            folder = damaged(method)
            edit(folder, **{field: value})
            load_adapter(folder) if (field, value) in fine else refused(folder, "adapter_")
    for field, value in whole["base_model"].items():
        for wrong in (..., [], {}, 1.5, None):
            changed = {k: v for k, v in {**whole["base_model"], field: wrong}.items() if v is not ...}
            folder = damaged(method)
            edit(folder, base_model=changed)
            not_said = wrong in (None, ...) if field == "prepend_bos" else wrong is None and field == "revision"
            if not_said:
                load_adapter(folder)
            else:
                refused(folder, CONFIG_FILE, f"incomplete.*{field}")
        assert value is not None


def test_records_of_metrics_are_checked(damaged):
    """A field missing, of another kind, or an invalid interval: a card made of it later would be wrong."""
    for change in (
        {"mean": "high"},
        {"mean": ...},
        {"interval": [1]},
        {"interval": ["a", "b"]},
        {"n": None},
        {"task": 3},
    ):
        folder = damaged("lofit")
        metric = {k: v for k, v in (every_method.METRIC | change).items() if v is not ...}
        edit(folder, metrics=[metric])
        refused(folder, CONFIG_FILE, "incomplete")
    edit(folder, metrics=[3])
    refused(folder, CONFIG_FILE, "incomplete")


@pytest.mark.parametrize(
    ("method", "changes"),
    [("lofit", {"shape": [10**6, 10**6, 8]}), ("iti", {"shape": [10**9, 4, 8]}), ("ablation", {"shape": [3, 4, 10**15]}),
     ("red", {"d_model": 10**12}), ("red", {"layers": None, "n_layers": 10**12}), ("loreft", {"d_model": 10**11}),
     ("loreft", {"rank": 10**11}), ("lora", {"n_layers": 10**12}), ("lora", {"rank": 10**12}), ("repe", {"d_model": 10**15}),
     ("repe", {"layers": None, "n_layers": 10**12}), ("lora", {"sizes": [[10**12, 8], [8, 8]]})],
)  # fmt: skip
def test_sizes_without_end_take_no_memory(damaged, method, changes):
    """A record that asks for terabytes is refused by what the file holds, before anything of that size is made."""
    folder = damaged(method)
    edit(folder, **changes)
    refused(folder, "adapter_", "incomplete" if changes.get("layers", 0) is None else r"expected|is not \(n_layers")


@pytest.mark.parametrize("method", WITH_TENSORS)
def test_tensors_of_another_kind_are_refused_whoever_signed(damaged, method):
    """Every tensor in turn: gone, renamed, of another type, of another shape, one more beside it, NaN, infinite."""
    whole = tensors_of(damaged(method))
    for name, t in whole.items():
        rest = {k: v for k, v in whole.items() if k != name}
        bad = [rest, {**rest, name + "s": t}, {**whole, "more": t.clone()}]
        bad += [{**rest, name: t.to(dtype)} for dtype in (torch.float64, torch.bfloat16, torch.int32)]
        bad += [
            {**rest, name: other} for other in (t[:-1], t[None], t.repeat(2, *[1] * (t.ndim - 1)), t.flatten()[None])
        ]
        for tensors in bad:
            folder = damaged(method)
            put(folder, tensors)
            refused(folder, WEIGHTS_FILE, "expected")
        for value in (float("nan"), float("inf"), -float("inf")):
            folder = damaged(method)
            put(folder, {**rest, name: torch.where(torch.arange(t.numel()).view(t.shape) == 1, value, t)})
            refused(folder, WEIGHTS_FILE, f"{re.escape(name)} holds NaN or infinity")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [("lofit", {"shape": [2, 4, 8]}, "2 x 4"), ("lofit", {"shape": [0, 4, 8]}, "shape"), ("lofit", {"shape": [3, 4]}, "shape"),
     ("iti", {"shape": [3, 4, 9]}, r"expected .*\(3, 9\)"), ("iti", {"positions": "first"}, "positions"),
     ("lofit", {"heads": {"kind": "lofit_lens.HeadSet", "schema": 1, "heads": []}}, "expected|at least one"),
     ("repe", {"layers": [0, 3]}, "cannot be edited"), ("repe", {"d_model": 31}, r"\(2, 32\), expected .*\(2, 31\)"),
     ("loreft", {"positions": "nowhere"}, "unknown positions")],
)  # fmt: skip
def test_records_that_contradict_themselves_or_the_tensors(damaged, method, changes, message):
    """Fields of the right kind that cannot be."""
    folder = damaged(method)
    edit(folder, **changes)
    refused(folder, "adapter_", message)


@pytest.mark.parametrize(
    ("method", "name", "change", "message"),
    [("iti", "directions", lambda t: 2 * t, "L2H1 has norm 2"), ("iti", "sigma", lambda t: -t, "sigma of head L2H1 is -"),
     ("repe", "directions", lambda t: 2 * t, "norm 2"), ("repe", "scale", lambda t: 0 * t, "scale of layer 0 is 0"),
     ("loreft", "R", lambda t: 2 * t, "not orthonormal"), ("loreft", "X", lambda t: t.flip(1), "coordinates X are another")],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(damaged, method, name, change, message):
    """Tensors of the right kind."""
    folder = damaged(method)
    tensors = tensors_of(folder)
    put(folder, tensors | {name: change(tensors[name])})
    refused(folder, "adapter_", message)


def test_white_space_and_the_order_of_fields_are_no_damage(good, damaged):
    """The same record is the same adapter."""
    folder = damaged("lofit")
    record = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(dict(reversed(record.items())), indent=3))
    assert same(load_adapter(folder), good["lofit"][1])


@pytest.mark.parametrize("method", WITH_TENSORS)
def test_headers_that_lie(damaged, method):
    """Lengths and offsets past the end, overlapping tensors, a header of a huge size."""
    folder = damaged(method)
    data = (folder / WEIGHTS_FILE).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(n for n in header if n != "__metadata__")
    begin, end = header[name]["data_offsets"]
    for change in ({"data_offsets": [begin, end + 4]}, {"data_offsets": [begin + 4, end]}, {"data_offsets": [end, begin]},
                   {"shape": [2**62, 4]}, {"shape": [-1]}, {"dtype": "F128"}, {"data_offsets": [0, 2**63]}):  # fmt: skip
        text = json.dumps(header | {name: header[name] | change}).encode()
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        signed(folder)
        refused(folder, WEIGHTS_FILE)
    for length in (0, 2**63, 2**64 - 1, 10**9, size + 1):
        (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", length) + data[8:])
        signed(folder)
        refused(folder, WEIGHTS_FILE)


@pytest.mark.parametrize("method", every_method.METHODS)
def test_another_base_model_is_refused(damaged, bridge_llama, method):
    """Other weights of the same shape, another shape, other processing; `strict=False` lets other weights pass."""
    folder = damaged(method)
    base = json.loads((folder / CONFIG_FILE).read_text())["base_model"]
    edit(folder, base_model=base | {"revision": "sha256:" + "0" * 64})
    refused(folder, "sha256:0000", "other weights", model=bridge_llama)
    load_adapter(folder, model=bridge_llama, strict=False)
    folder = damaged(method)
    if "shape" in (record := json.loads((folder / CONFIG_FILE).read_text())):
        edit(folder, shape=[4, *record["shape"][1:]], heads=record["heads"] | {"shape": [4, 4]})
        refused(folder, "4 layers", model=bridge_llama)


def test_reading_imports_nothing_new(good, monkeypatch):
    """A record cannot name code: its method is one of a closed list, and no module is looked up by it."""
    before = set(sys.modules)
    load_adapter(good["lofit"][0])
    assert not {m for m in set(sys.modules) - before if not m.startswith(("lofit_lens", "torch"))}
