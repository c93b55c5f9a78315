"""A store of runs: one folder a run, named by the hash of its spec; done means that the folder is there.

ROOT/store.json            what this folder is
ROOT/runs/NAME/            a finished run: run.json (spec, result, versions, checksum of every file), timing.json, its files
ROOT/drafts/NAME.RANDOM/   a run that is being written; one rename makes it a finished one
ROOT/locks/NAME.lock       who computes it now
ROOT/states/, logs/        checkpoints of training inside a run, and its log (NAME+DIGEST.*: of runs that are computed together)
ROOT/failed/               why a run could not be computed
ROOT/inputs/, grids/       what specs refer to by hash, and which runs a grid names
ROOT/index.parquet         one row a run; made anew from the folders whenever it does not match them

A kill at any moment leaves nothing or a finished run. Two that write the same run leave one: the later one's draft is dropped.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from lofit_lens import io
from lofit_lens.errors import DataError, DiskFull, InputError
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.locks import claimed, held
from lofit_lens.experiments.store.records import Records, checked

STORE, STORE_SCHEMA = "lofit_lens.store", 1
RUN, RUN_SCHEMA = "lofit_lens.run", 2
RUN_FIELDS = ("name", "label", "spec", "needs", "row", "versions", "files", "checksum")
OWN_FILES = ("run.json", "timing.json")


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it should be.

    Attributes:
        path: file or folder, relative to the store.
        what: what is wrong, and what to do.
        kind: `damaged` (the run is lost, and can be computed again), `newer` (written by a later version), `unreadable` (may be
            well again later), `foreign` (not of this store) or `leftover` (of a killed process, for `collect_garbage`).
        run: name of the run that it belongs to, "" for none.
    """

    path: str
    what: str
    kind: str
    run: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass
class Draft:
    """A run that is being written.

    Attributes:
        path: folder for its files.
        record: what joins run.json; the same however often and wherever the run is computed.
        timing: what goes to timing.json: seconds, device, and whatever else differs between two times.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)


class Store(Records):
    """A folder of runs.

    Attributes:
        root: the folder, absolute.
        lease: seconds after which a lock that its holder does not refresh may be taken over.
    """

    def __init__(self, root: str | Path, *, lease: float = 30.0, create: bool = True) -> None:
        """Open a store.

        Args:
            root: its folder.
            lease: see `Store.lease`; a holder refreshes its lock three times in it.
            create: make the store where there is none.

        Raises:
            InputError: the folder holds other files, cannot be read or written to, or is no store (and not `create`).
            DataError: the store was written by a newer version, or its store.json is damaged.
        """
        if not (math.isfinite(lease) and lease > 0):
            raise InputError(f"lease is {lease}; it is a number of seconds above 0")
        self.root, self.lease = Path(root).expanduser().absolute(), lease
        path = self.root / "store.json"
        try:
            others = [p for p in self.root.iterdir() if not p.name.startswith(".")] if self.root.exists() else []
            there = path.is_file()
        except OSError as e:
            raise InputError(f"cannot open the store {self.root}: {e.strerror or e}; give another folder") from e
        if not there:
            if others:
                raise InputError(
                    f"{self.root} holds {others[0].name} and no store.json, so it is no store; give a new folder, or a store"
                )
            if not create:
                raise InputError(f"no store at {self.root}; give the folder that a grid was run into")
            io.write_json(path, {"kind": STORE, "schema": STORE_SCHEMA})
        io.check_record(io.read_json(path), STORE, STORE_SCHEMA, (), str(path))

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r}: {len(self.names())} runs)"

    # ------------------------------------------------------------------------------------------------------ runs

    def folder(self, name: str) -> Path:
        """Folder of a run, there or not."""
        return self.root / "runs" / checked(name)

    def state_file(self, name: str) -> Path:
        """Where training inside a run keeps its checkpoint; removed when the run is done."""
        return self.root / "states" / f"{checked(name)}.safetensors"

    def log_file(self, name: str) -> Path:
        """Where what a run says while it is computed is written."""
        return self.root / "logs" / f"{checked(name)}.log"

    def names(self) -> list[str]:
        """Finished runs, sorted."""
        runs = self.root / "runs"
        return sorted(p.name for p in runs.iterdir() if p.is_dir() and p.name[0] != ".") if runs.is_dir() else []

    def done(self, name: str) -> bool:
        """Whether a run is finished: its folder appears by one rename when all is in it."""
        return self.folder(name).is_dir()

    def read(self, name: str) -> dict[str, Any]:
        """run.json of a finished run.

        Raises:
            DataError: it is missing, damaged, another run's, or of a newer version; names the file and what to do.
        """
        path = self.folder(name) / "run.json"
        if not self.done(name):
            raise DataError(f"no run {name} in {self.root}; run its grid again")
        again = f"run `lofit-lens store verify {self.root} --remove`, then the same grid again"
        try:
            record = io.read_json(path)
        except DataError as e:
            raise DataError(f"{e}; {again}") from e
        if isinstance(record, dict) and record.get("kind") == RUN and record.get("schema") == RUN_SCHEMA:
            found = io.digest({k: v for k, v in record.items() if k != "checksum"})
            if record.get("checksum") != found:
                raise DataError(f"{path} is damaged (its checksum is another); {again}")
        io.check_record(record, RUN, RUN_SCHEMA, RUN_FIELDS, str(path))
        if record["name"] != name:
            raise DataError(f"{path} is of the run {record['name']}; {again}")
        return record

    def timing(self, name: str) -> dict[str, Any]:
        """timing.json of a finished run (seconds, started, host, device, pid); {} where it is missing or damaged."""
        try:
            record = io.read_json(self.folder(name) / "timing.json")
        except DataError:
            return {}
        return record if isinstance(record, dict) else {}

    @contextlib.contextmanager
    def new(self, cell: Cell) -> Iterator[Draft]:
        """Write a run: files into the draft's folder, the rest into its record; it appears whole at the end, or not at all.

        Hold the cell's lock (`claim`) meanwhile, or `collect_garbage` takes the draft for a dead process's.

        Raises:
            InputError: a field of `record` or a file has a name that the store itself writes, or a file is a link; `DiskFull`
                where no space is left. Nothing is left of the run then.
        """
        name, clock, started = cell.name, time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        target = self.folder(name)
        try:
            path = Path(tempfile.mkdtemp(dir=self._part("drafts"), prefix=f"{name}."))
        except OSError as e:
            raise io.cannot_write(target, e) from e
        draft = Draft(path)
        try:
            yield draft
            timing = {
                "seconds": time.perf_counter() - clock,
                "started": started,
                "host": platform.node(),
                "device": None,
            }
            io.write_json(path / "run.json", _run_record(cell, draft))
            io.write_json(path / "timing.json", {**timing, "pid": os.getpid(), **draft.timing})
            self._put(path, target)
        except BaseException as e:
            if isinstance(e, OSError | InputError) and not path.exists() and self.done(name):
                return  # this lock was taken over, and another has finished the run and tidied up
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(e, OSError) and e.errno in io.FULL:
                raise io.cannot_write(target, e) from e
            raise
        for left in (self.state_file(name), self._failure(name)):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)

    def _put(self, draft: Path, target: Path) -> None:
        """Make a draft a finished run, or drop it where the run is there already."""
        try:
            draft.chmod(io.new_mode(folder=True))
            io.sync(draft)
            runs = self._part("runs")
            os.rename(draft, target)  # a folder with files in it is never replaced
            io.sync_folder(runs)
        except OSError as e:
            if not target.is_dir():
                raise io.cannot_write(target, e) from e
            shutil.rmtree(draft, ignore_errors=True)

    def remove(self, name: str) -> bool:
        """Remove a finished run, whole in one step; False where it is not there, or its lock is held by another."""
        with self.claim_to_remove(name) as mine:
            if not mine or not self.done(name):
                return False
            aside = self._part("drafts") / f"{name}.{uuid.uuid4().hex[:8]}"
            try:
                os.rename(self.folder(name), aside)
            except OSError as e:
                raise io.cannot_write(self.folder(name), e) from e
            shutil.rmtree(aside, ignore_errors=True)
        return True

    # ----------------------------------------------------------------------------------------------------- locks

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Hold a run's lock; yields False at once where another holds it. See `locks.claimed`.

        Raises:
            InputError: the lock cannot be written (`DiskFull`: no space is left).
        """
        with claimed(self._lock(name), self.lease) as mine:
            if mine:
                with contextlib.suppress(OSError), os.scandir(self.root / "runs"):
                    pass  # makes a network file system look afresh at which runs are there
            yield mine

    @contextlib.contextmanager
    def claim_to_remove(self, name: str) -> Iterator[bool]:
        """As `claim`; on a full disk, where no lock can be written, whether nobody holds it: else nothing could be freed."""
        with contextlib.ExitStack() as stack:
            try:
                mine = stack.enter_context(self.claim(name))
            except DiskFull:
                mine = not self.held(name)
            yield mine

    def held(self, name: str) -> bool:
        """Whether a run's lock is held by a process that may be alive; changes nothing."""
        return held(self._lock(name), self.lease)

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{checked(name)}.lock"

    def _part(self, name: str) -> Path:
        (folder := self.root / name).mkdir(parents=True, exist_ok=True)
        return folder

    # ---------------------------------------------------------------------------------------------- all at once

    def index(self, *, rebuild: bool = False) -> pd.DataFrame:
        """One row a run: name, label, what its cell's `row` says, seconds, n_items, and each metric with its 95 % interval.

        See `checks.read_index`. Kept as ROOT/index.parquet, and made anew where it does not name the runs that are there.

        Raises:
            DataError: a run is damaged.
        """
        from lofit_lens.experiments.store.checks import read_index

        return read_index(self, rebuild=rebuild)

    def verify(self) -> list[Problem]:
        """Check every file of every run, and all else in the store; see `checks.verify`. Changes nothing."""
        from lofit_lens.experiments.store.checks import verify

        return verify(self)

    def collect_garbage(self, *, dry_run: bool, unused: bool = False) -> list[Path]:
        """Remove what dead processes left, and (`unused`) runs that no grid names; see `checks.collect_garbage`.

        Raises:
            InputError: `unused` in a store without grids.
            DataError: a grid's record is damaged.
        """
        from lofit_lens.experiments.store.checks import collect_garbage

        return collect_garbage(self, dry_run=dry_run, unused=unused)


def _run_record(cell: Cell, draft: Draft) -> dict[str, Any]:
    """run.json of a draft whose files are all there."""
    files = {
        p.relative_to(draft.path).as_posix(): p for p in sorted(draft.path.rglob("*")) if p.is_symlink() or p.is_file()
    }
    for name, path in files.items():
        if name in OWN_FILES or path.is_symlink():
            what = (
                "a link; copy what it leads to"
                if path.is_symlink()
                else "what the store itself writes; name it otherwise"
            )
            raise InputError(f"the run {cell.name} holds {name}, which is {what}")
    record = {
        "kind": RUN, "schema": RUN_SCHEMA, "name": cell.name, "label": cell.label, "spec": cell.spec, "needs": list(cell.needs),
        "row": cell.row, "versions": io.environment(),
    }  # fmt: skip
    if taken := [k for k in draft.record if k in (*record, "files", "checksum")]:
        raise InputError(
            f"the record of run {cell.name} has the field {taken[0]!r}, which the store itself writes; rename it"
        )
    record |= {**draft.record, "files": {name: io.file_digest(path) for name, path in files.items()}}
    try:
        record = json.loads(json.dumps(record, allow_nan=False))  # as it will be read: lists for tuples, text for keys
    except (TypeError, ValueError) as e:
        raise InputError(f"the record of run {cell.name} is not JSON: {e}") from e
    if io.digest(record["spec"]) != cell.key:
        raise InputError(f"the spec of run {cell.name} is another when it is read again; use texts as its keys")
    return {**record, "checksum": io.digest(record)}
