"""A store of runs: one folder per run, named by the hash of its spec; a run is done if its folder exists.

ROOT/store.json            what this folder is
ROOT/runs/NAME/            a finished run: run.json (spec, result, versions, checksum of every file), timing.json, its files
ROOT/drafts/NAME.RANDOM/   a run that is being written; one rename turns it into a finished run
ROOT/locks/NAME.lock       the process that computes it now
ROOT/states/, logs/        checkpoints of training inside a run, and its log (NAME+DIGEST.*: of runs that are computed together)
ROOT/failed/               why a run could not be computed
ROOT/inputs/, grids/       what specs refer to by hash, and which runs a grid names
ROOT/index.parquet         one row per run, as of the last call of `Store.index`

A kill at any moment leaves nothing or a finished run. If two processes write the same run, the later draft is dropped.
"""

import contextlib
import json
import logging
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
from lofit_lens.errors import DataError, InputError, NewerData
from lofit_lens.experiments.store.cells import Cell
from lofit_lens.experiments.store.index import table_of
from lofit_lens.experiments.store.locks import claimed, held
from lofit_lens.experiments.store.records import Records, checked

STORE, STORE_SCHEMA = "lofit_lens.store", 1
RUN, RUN_SCHEMA = "lofit_lens.run", 2
RUN_FIELDS = ("name", "label", "spec", "needs", "row", "versions", "files", "checksum")
OWN_FILES = ("run.json", "timing.json")


log = logging.getLogger(__name__)


@dataclass
class Draft:
    """A run that is being written.

    Attributes:
        path: folder for its files.
        record: content added to run.json; the same however often and wherever the run is computed.
        timing: content of timing.json: seconds, device, and whatever else differs between two computations.
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
            lease: see `Store.lease`; a holder refreshes its lock three times per lease.
            create: create the store if it does not exist.

        Raises:
            InputError: the folder holds other files, cannot be read or written to, or is not a store (without `create`).
            DataError: the store was written by a newer version, or its store.json is damaged.
        """
        if not (math.isfinite(lease) and lease > 0):
            raise InputError(f"lease is {lease}; it must be a number of seconds above 0")
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
                    f"{self.root} holds {others[0].name} and no store.json, so it is not a store; give a new folder, or a store"
                )
            if not create:
                raise InputError(f"no store at {self.root}; give the folder that a grid was run into")
            io.write_json(path, {"kind": STORE, "schema": STORE_SCHEMA})
        io.check_record(io.read_json(path), STORE, STORE_SCHEMA, (), str(path))

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r}: {len(self.names())} runs)"

    # ------------------------------------------------------------------------------------------------------ runs

    def folder(self, name: str) -> Path:
        """Folder of a run, whether or not it exists."""
        return self.root / "runs" / checked(name)

    def state_file(self, name: str) -> Path:
        """Checkpoint file of training inside a run; it is removed when the run is done."""
        return self.root / "states" / f"{checked(name)}.safetensors"

    def log_file(self, name: str) -> Path:
        """Log file of a run while it is computed."""
        return self.root / "logs" / f"{checked(name)}.log"

    def names(self) -> list[str]:
        """Names of finished runs, sorted."""
        runs = self.root / "runs"
        return sorted(p.name for p in runs.iterdir() if p.is_dir() and p.name[0] != ".") if runs.is_dir() else []

    def done(self, name: str) -> bool:
        """Whether a run is finished: its folder appears atomically when it is complete."""
        return self.folder(name).is_dir()

    def read(self, name: str) -> dict[str, Any]:
        """run.json of a finished run.

        Raises:
            DataError: it is missing, damaged, of another run, or of a newer version; names the file and what to do.
        """
        path = self.folder(name) / "run.json"
        if not self.done(name):
            raise DataError(f"no run {name} in {self.root}; run its grid again")
        again = f"run `lofit-lens store verify {self.root} --remove`, then the same grid again"
        try:
            record = io.read_json(path)
            io.check_record(record, RUN, RUN_SCHEMA, RUN_FIELDS, str(path))
        except NewerData:
            raise
        except DataError as e:
            raise DataError(f"{e}; {again}") from (e.__cause__ or e)  # the system's error, if it is one
        if record["checksum"] != io.digest({k: v for k, v in record.items() if k != "checksum"}):
            raise DataError(f"{path} is damaged (its checksum differs); {again}")
        if record["name"] != name or not name.endswith(io.digest(record["spec"])[:16]):
            raise DataError(f"{path} belongs to another run ({record['name']}) than its folder says; {again}")
        return record

    def timing(self, name: str) -> dict[str, Any]:
        """timing.json of a finished run (seconds, started, host, device, pid); {} if it is missing or damaged."""
        try:
            record = io.read_json(self.folder(name) / "timing.json")
        except DataError:
            return {}
        return record if isinstance(record, dict) else {}

    @contextlib.contextmanager
    def new(self, cell: Cell) -> Iterator[Draft]:
        """Write a run: files into the draft's folder, the rest into its record. The run appears atomically at the end.

        Hold the cell's lock (`claim`) meanwhile, or `collect_garbage` takes the draft for that of a dead process.

        Raises:
            InputError: it cannot be written (`DiskFull`: no space is left). Nothing is left of the run then.
            ValueError: `record` holds NaN or infinity, which JSON lacks.
        """
        name, clock, started = cell.name, time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        target = self.folder(name)
        try:
            draft = Draft(Path(tempfile.mkdtemp(dir=self._part("drafts"), prefix=f"{name}.")))
        except OSError as e:
            raise io.cannot_write(target, e) from e
        try:
            yield draft
            timing = {"started": started, "host": platform.node(), "device": None, "pid": os.getpid()}
            io.write_json(draft.path / "run.json", _run_record(cell, draft))
            io.write_json(
                draft.path / "timing.json", {"seconds": time.perf_counter() - clock, **timing, **draft.timing}
            )
            self._put(draft.path, target)
        except BaseException as e:
            if isinstance(e, OSError | InputError) and not draft.path.exists() and self.done(name):
                return  # this lock was taken over, and another process has finished the run and cleaned up
            shutil.rmtree(draft.path, ignore_errors=True)
            if isinstance(e, OSError) and e.errno in io.FULL:
                raise io.cannot_write(target, e) from e
            raise
        for left in (self.state_file(name), self._failure(name)):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)

    def _put(self, draft: Path, target: Path) -> None:
        """Turn a draft into a finished run, or drop it if the run already exists."""
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
        """Remove a finished run atomically; False if it does not exist or its lock is held."""
        if not self.done(name) or self.held(name):
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
        """Hold a run's lock; yields False at once if another process holds it. See `locks.claimed`.

        Raises:
            InputError: the lock cannot be written (`DiskFull`: no space is left).
        """
        with claimed(self._lock(name), self.lease) as mine:
            if mine:
                with contextlib.suppress(OSError), os.scandir(self.root / "runs"):
                    pass  # makes a network file system refresh its list of runs
            yield mine

    def held(self, name: str) -> bool:
        """Whether a run's lock is held by a process that may be alive; changes nothing."""
        return held(self._lock(name), self.lease)

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{checked(name)}.lock"

    def _part(self, name: str) -> Path:
        (folder := self.root / name).mkdir(parents=True, exist_ok=True)
        return folder

    # ------------------------------------------------------------------------------------------------------ index

    def index(self) -> pd.DataFrame:
        """One row per run, sorted by name, also kept as ROOT/index.parquet.

        Columns: `name`, `label`; those of the cells' `row` (task, method, k, seed, ...); `seconds`; `n_items`; each metric as
        `M`, `M_low`, `M_high` (mean and 95 % interval). Whole numbers are Int64, other numbers float64, all else string; a
        column with texts and numbers is text. What a run does not have is missing.

        Raises:
            DataError: a run is damaged, or of a newer version.
        """
        table = table_of([(self.read(name), self.timing(name).get("seconds")) for name in self.names()])
        try:
            io.write_bytes(self.root / "index.parquet", table.to_parquet(index=False))
        except InputError as e:  # a read-only store still has an index
            log.info("the index is not kept: %s", e)
        return table


def _run_record(cell: Cell, draft: Draft) -> dict[str, Any]:
    """run.json of a draft whose files are complete."""
    files = [p for p in sorted(draft.path.rglob("*")) if p.is_symlink() or p.is_file()]
    digests = {p.relative_to(draft.path).as_posix(): io.file_digest(p) for p in files}
    assert not any(p.is_symlink() for p in files), "the target of a link may change"
    assert not digests.keys() & set(OWN_FILES), "the store writes these itself"
    record = {
        "kind": RUN, "schema": RUN_SCHEMA, "name": cell.name, "label": cell.label, "spec": cell.spec, "needs": list(cell.needs),
        "row": cell.row, "versions": io.environment(),
    }  # fmt: skip
    assert not draft.record.keys() & {*record, "files", "checksum"}, "the store writes these itself"
    record |= {**draft.record, "files": digests}
    record = json.loads(json.dumps(record, allow_nan=False))  # as it will be read: lists for tuples, text for keys
    assert io.digest(record["spec"]) == cell.key, "keys of a spec must be texts, or it changes when it is read again"
    return {**record, "checksum": io.digest(record)}
