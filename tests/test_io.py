"""Files: whole or not at all, never unpickled, and a clear error where nothing can be written or read."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lofit_lens import io
from lofit_lens.errors import AdapterError, DataError, InputError

TENSORS = {"A": torch.arange(12.0).reshape(3, 4), "scalar": torch.tensor(7)}


class _Died(BaseException):
    """Stands for a process that is killed at this very place."""


def _dies(*_args, **_kwargs):
    raise _Died


def _refuses(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize(("fault", "error"), [(_dies, _Died), (_refuses, InputError)])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, place, fault, error):
    """Whatever happens before the rename is done, the old bytes stand and no temporary file is left."""
    target = io.write_text(tmp_path / "x.json", "old")
    monkeypatch.setattr(os, place, fault)
    with pytest.raises(error):
        io.write_text(target, "new and longer")
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_told_with_path_and_reason(tmp_path, monkeypatch):
    """The error names the file and what the system said."""
    monkeypatch.setattr(os, "replace", _refuses)
    with pytest.raises(InputError, match=r"cannot write .*x\.json: No space left"):
        io.write_text(tmp_path / "x.json", "new")


def test_files_get_the_usual_permissions(tmp_path):
    """A temporary file is private; the result has what the umask allows (0666 without 022)."""
    before = os.umask(0o022)
    try:
        assert io.write_text(tmp_path / "x", "a").stat().st_mode & 0o777 == 0o644
        with io.new_folder(tmp_path / "folder"):
            pass
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
        assert os.umask(0o022) == 0o022  # reading the umask has not changed it
    finally:
        os.umask(before)


def _unwritable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    return [tmp_path / "file" / "x.json", Path("/proc/lofit_lens/x.json"), Path("/proc/x.json")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc as a place where nobody may write")
def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    """A parent that is a file, and a read-only place, are InputError with the path, for files and folders."""
    for path in _unwritable(tmp_path):
        with pytest.raises(InputError, match=f"cannot write {path}"):
            io.write_json(path, {})
        with pytest.raises(InputError, match=f"cannot write {path}"), io.new_folder(path):
            pass
    assert (tmp_path / "file").read_text() == "not a folder"


# -------------------------------------------------------------------------------------------------- JSON


def test_nan_is_not_written(tmp_path):
    """NaN and infinity are no JSON; the file is not made."""
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            io.write_json(tmp_path / "x.json", {"loss": value})
        with pytest.raises(ValueError, match="JSON"):
            io.digest([value])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b'{"a": 1,\n"b"', "line 2"), (b'{"a": "\xff"}', "not UTF-8")],
)
def test_what_is_no_json_is_refused_with_file_and_line(tmp_path, content, message):
    """Empty, cut off, not UTF-8: the file is named, and the line or byte."""
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.json.*{message}"):
        io.read_json(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"nothing.json"):
        io.read_json(tmp_path / "nothing.json")


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
def test_a_digest_depends_on_values_not_on_order(record):
    """Equal records have equal digests, whatever the order of their keys; another record has another."""
    backwards = dict(reversed(record.items()))
    assert io.digest(record) == io.digest(backwards)
    assert io.digest(record) != io.digest({**record, "one more": 0})


def test_known_digests(tmp_path):
    """SHA-256 of `{"a":1}` and of a file with the same bytes, as sha256sum gives it."""
    known = "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    (tmp_path / "x").write_text('{"a":1}')
    assert io.digest({"a": 1}) == io.file_digest(tmp_path / "x") == known


# ----------------------------------------------------------------------------------------------- tensors


def test_tensors_are_read_back_with_every_bit(tmp_path):
    """Values, types and the text record survive; a strided view too."""
    made = {**TENSORS, "view": torch.arange(6.0).reshape(2, 3).T, "half": torch.randn(3).bfloat16()}
    path = io.save_tensors(tmp_path / "x.safetensors", made, {"who": "test"})
    read = io.load_tensors(path)
    assert set(read) == set(made)
    assert all(torch.equal(read[n], made[n]) and read[n].dtype == made[n].dtype for n in made)
    assert io.tensor_metadata(path) == {"who": "test"}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_tensor_file_is_refused(tmp_path, share):
    """Cut off anywhere, the file is refused by name."""
    path = io.save_tensors(tmp_path / "x.safetensors", TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(AdapterError, match=r"x\.safetensors"):
        io.load_tensors(path)


def test_a_flipped_bit_in_the_header_is_refused(tmp_path):
    """Header length, a tensor's type or its offsets damaged: refused, and not read as something else."""
    path = io.save_tensors(tmp_path / "x.safetensors", TENSORS)
    whole = path.read_bytes()
    for place in (0, 6, whole.index(b'"dtype"') + 2, whole.index(b"offsets") + 10, whole.index(b'{"')):
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        path.write_bytes(bytes(damaged))
        with pytest.raises(AdapterError, match=r"x\.safetensors"):
            io.load_tensors(path)


class _Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_in_disguise_is_refused_and_does_not_run(tmp_path):
    """A pickle, and a torch file, named .safetensors: refused, nothing executed."""
    trace = tmp_path / "executed"
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(_Executes(str(trace))))
    torch.save({"A": _Executes(str(trace))}, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        with pytest.raises(AdapterError, match="safetensors"):
            io.load_tensors(tmp_path / f"{name}.safetensors")
    assert not trace.exists()


def test_a_missing_tensor_file_is_refused(tmp_path):
    """No file, or a folder in its place."""
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(AdapterError, match=str(path)):
            io.load_tensors(path)


# ----------------------------------------------------------------------------------------------- folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    """Inside the block only a hidden temporary exists; after an exception nothing does."""
    with io.new_folder(tmp_path / "run") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "run").exists()
        assert temporary.name.startswith(".")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(_Died), io.new_folder(tmp_path / "other") as temporary:
        _dies((temporary / "x").write_text("1"))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_existing_folder_is_only_replaced_when_asked(tmp_path):
    """Without overwrite it is refused before the block runs; with it, old files are gone."""
    with io.new_folder(tmp_path / "run") as temporary:
        (temporary / "run.json").write_text("1")
    ran = []
    with pytest.raises(InputError, match="exists"), io.new_folder(tmp_path / "run"):
        ran.append(1)
    assert not ran
    with io.new_folder(tmp_path / "run", overwrite=True) as temporary:
        (temporary / "new").write_text("2")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch, fails_at):
    """Whichever of the two renames fails, the old folder stands and no temporary is left."""
    with io.new_folder(tmp_path / "run") as temporary:
        (temporary / "run.json").write_text("1")
    real, calls = os.rename, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) == fails_at:
            raise OSError(5, "Input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((OSError, InputError)), io.new_folder(tmp_path / "run", overwrite=True) as temporary:
        (temporary / "new").write_text("2")
    monkeypatch.undo()
    assert len(calls) >= fails_at
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.json"]


# ------------------------------------------------------------------------------------------------- names


def test_dtype_names():
    """Long and short names and torch's own; anything else lists what is allowed."""
    assert io.torch_dtype("bf16") is io.torch_dtype("bfloat16") is io.torch_dtype(torch.bfloat16) is torch.bfloat16
    assert io.torch_dtype("fp32") is torch.float32
    for wrong in ("int8", "", "float31", "torch.float32"):
        with pytest.raises(InputError, match="allowed: float32"):
            io.torch_dtype(wrong)


@pytest.mark.parametrize("at", [2, 3])
def test_ctrl_c_between_two_renames_loses_nothing(tmp_path, monkeypatch, at):
    """The old folder stands where it stood, and nothing else is left."""
    with io.new_folder(tmp_path / "x") as temporary:
        (temporary / "run.json").write_text("old")
    calls, rename = [], os.rename

    def stopped(*args):
        calls.append(args)
        if len(calls) + 1 == at:
            raise KeyboardInterrupt
        rename(*args)

    monkeypatch.setattr(os, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), io.new_folder(tmp_path / "x", overwrite=True) as temporary:
        (temporary / "run.json").write_text("new")
    assert (tmp_path / "x" / "run.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_others_is_never_replaced(tmp_path):
    """overwrite=True replaces what this package wrote, and an empty folder, and nothing else."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not written by this package"), io.new_folder(mine, overwrite=True):
        pass
    assert (mine / "thesis.txt").read_text() == "precious"
    (mine / "adapter_config.json").write_text('{"peft_type": "LORA"}')  # PEFT's own
    with pytest.raises(InputError, match="not written by this package"), io.new_folder(mine, overwrite=True):
        pass
    (mine / "adapter_config.json").write_text('{"lofit_lens_schema": 1}')
    with io.new_folder(mine, overwrite=True) as temporary:
        (temporary / "run.json").write_text("{}")
    assert [p.name for p in mine.iterdir()] == ["run.json"]
