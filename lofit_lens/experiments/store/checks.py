"""What looks at a whole store: the index of its runs, the check of every file, and the removal of what dead processes left."""

import contextlib
import io as memory
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lofit_lens import io
from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments.store.records import FAILURE, FAILURE_SCHEMA, GRID, GRID_SCHEMA, JOINED
from lofit_lens.experiments.store.store import OWN_FILES, RUN, RUN_SCHEMA, Problem, Store

RUN_NAME = re.compile(r"[A-Za-z0-9._]*-[0-9a-f]{16}")  # as Cell.name makes them
OLD = 3600.0  # seconds after which a temporary file that no lock speaks for is nobody's

log = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------------- index


def read_index(store: Store, *, rebuild: bool = False) -> pd.DataFrame:
    """One row a run, sorted by name.

    Columns: `name`, `label`; what the cells' `row` says (task, method, k, seed, ...); `seconds`; `n_items`; each metric as `M`,
    `M_low`, `M_high` (mean and 95 % interval). Whole numbers are Int64, other numbers float64, all else string; a column
    with texts and numbers is text. What a run does not have is missing.

    Args:
        store: the store.
        rebuild: read the folders even where index.parquet names the same runs.

    Raises:
        DataError: a run is damaged, or of a newer version.
    """
    path, names = store.root / "index.parquet", store.names()
    if not rebuild and path.is_file():
        try:
            found = pd.read_parquet(path, page_checksum_verification=True)
            if found["name"].tolist() == names:
                return found
        except Exception as e:  # whatever a damaged file makes its reader raise
            log.info("%s cannot be read (%s); it is made anew", path, e)
    rows = [_index_row(store, name) for name in names]
    columns = dict.fromkeys(("name", "label", *(k for row in rows for k in row)))
    table = pd.DataFrame({k: _column([row.get(k) for row in rows]) for k in columns})
    buffer = memory.BytesIO()
    table.to_parquet(buffer, index=False, write_page_checksum=True)
    try:
        io.write_bytes(path, buffer.getvalue())
    except InputError as e:
        log.info("the index is not kept: %s", e)  # a store that may only be read has an index all the same
    return pd.read_parquet(memory.BytesIO(buffer.getvalue()))  # the same types as when it is read the next time


def _index_row(store: Store, name: str) -> dict[str, Any]:
    record = store.read(name)
    result = record.get("result")
    metrics = result.get("metrics", {}) if isinstance(result, dict) else {}
    row = {**record["row"], "name": name, "label": record["label"], "seconds": store.timing(name).get("seconds")}
    for metric, found in metrics.items():
        low, high = found["interval"] or (None, None)
        row |= {metric: found["mean"], f"{metric}_low": low, f"{metric}_high": high}
        row.setdefault("n_items", found["n"])
    return row


def _column(values: Sequence[Any]) -> pd.Series:
    """Values of one column, None = missing, in the narrowest type that holds them all unchanged."""
    kinds = {type(v) for v in values if v is not None}
    if kinds == {int}:
        return pd.Series(values, dtype="Int64")
    if kinds and kinds <= {int, float}:
        return pd.Series(values, dtype="float64")
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean")
    texts = [v if v is None or isinstance(v, str) else io.canonical_json(v) for v in values]
    return pd.Series(texts, dtype="string")


# ------------------------------------------------------------------------------------------------------- verify


def verify(store: Store) -> list[Problem]:
    """Everything in a store that is not as it should be; changes nothing.

    Of every run: run.json against its own checksum and the folder's name, every file against its checksum, and files too many.
    Of the rest: records that cannot be read, and what dead processes left (kind `leftover`, which harms nothing).
    """
    found: list[Problem] = []
    for path in _entries(store.root / "runs", odd=True):
        found += _check_run(store, path)
    for part, kind, schema in (("grids", GRID, GRID_SCHEMA), ("failed", FAILURE, FAILURE_SCHEMA), ("inputs", "", 0)):
        for path in _entries(store.root / part):
            with _noting(found, store, path):
                if part == "inputs":
                    store.kept(path.stem)
                else:
                    record = io.read_json(path)
                    if _newer(record, kind, schema):
                        found.append(_problem(store, path, "written by a newer version; update lofit-lens", "newer"))
                    else:
                        io.check_record(record, kind, schema, ("name",), path.name)
    left = "left by a process that is gone; `lofit-lens store gc` removes it"
    found += [_problem(store, path, left, "leftover") for name, path in _leftovers(store) if not _held(store, name)]
    return found


def _check_run(store: Store, folder: Path) -> list[Problem]:
    name, found = folder.name, []
    if not folder.is_dir() or not RUN_NAME.fullmatch(name):
        return [_problem(store, folder, "is no run's folder; move it away", "foreign")]
    with _noting(found, store, folder / "run.json", run=name):
        record = io.read_json(folder / "run.json")
        if _newer(record, RUN, RUN_SCHEMA):
            return [
                _problem(store, folder / "run.json", "written by a newer version; update lofit-lens", "newer", name)
            ]
        record = store.read(name)
        if not name.endswith(f"-{io.digest(record['spec'])[:16]}"):
            raise DataError("its spec is not that of the folder's name")
        for file, digest in record["files"].items():
            with _noting(found, store, folder / file, run=name):
                if not (folder / file).is_file():
                    raise DataError("is missing")
                if io.file_digest(folder / file) != digest:
                    raise DataError("has other bytes than were written (its checksum is another)")
        known = {*record["files"], *OWN_FILES}
        for path in sorted(folder.rglob("*")):
            if path.relative_to(folder).as_posix() not in known and (path.is_symlink() or not path.is_dir()):
                found.append(_problem(store, path, "is not a file of this run; move it away", "foreign", name))
        if (timing := folder / "timing.json").exists():
            with _noting(found, store, timing, run=name):
                io.read_json(timing)
    return found


@contextlib.contextmanager
def _noting(found: list[Problem], store: Store, path: Path, *, run: str = "") -> Iterator[None]:
    """Note what is raised: bytes that are not as written are damage, a file that the system does not give is not."""
    try:
        yield
    except (InputError, OSError) as e:
        cause = e if isinstance(e, OSError) else e.__cause__
        lost = not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)
        what = f"cannot be read: {cause.strerror}" if isinstance(cause, OSError) and not lost else str(e)
        found.append(_problem(store, path, what, "damaged" if lost else "unreadable", run))


def _problem(store: Store, path: Path, what: str, kind: str, run: str = "") -> Problem:
    shown = str(path.relative_to(store.root)).encode(errors="backslashreplace").decode()
    return Problem(shown, what.encode(errors="backslashreplace").decode(), kind, run)


def _newer(record: Any, kind: str, schema: int) -> bool:
    found = record.get("schema") if isinstance(record, dict) and record.get("kind") == kind else None
    return isinstance(found, int) and found > schema


def remove_damaged(store: Store, problems: Iterable[Problem]) -> list[Path]:
    """Remove the runs and records that `verify` found damaged, so that they are made again; all else stays.

    Returns:
        What was removed; a run whose lock is held is left.
    """
    damaged = [p for p in problems if p.kind == "damaged"]
    runs = dict.fromkeys(p.run for p in damaged if p.run)
    removed = [store.folder(name) for name in runs if store.remove(name)]
    for path in (store.root / p.path for p in damaged if not p.run):
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(path)
    return removed


# ------------------------------------------------------------------------------------------------------ garbage


def collect_garbage(store: Store, *, dry_run: bool, unused: bool = False) -> list[Path]:
    """Remove what dead processes left; a finished run goes only with `unused`, and nothing of a run whose lock is held.

    Args:
        store: the store.
        dry_run: only say what would be removed.
        unused: also runs that no grid names and that no such run needs, logs and checkpoints of such.

    Returns:
        What was removed, or would be.

    Raises:
        InputError: `unused` in a store without grids, where it would take every run.
        DataError: a grid's or a run's record is damaged, so that what is unused is not known.
    """
    wanted = _wanted(store, unused)
    candidates = [*_leftovers(store), *_outlived(store, wanted)]
    if unused:
        candidates += [(name, store.folder(name)) for name in store.names() if name not in wanted]
    removed = []
    for name, path in candidates:
        if not _held(store, name) if dry_run else _remove(store, name, path):
            removed.append(path)
    return removed


def _wanted(store: Store, unused: bool) -> set[str]:
    """Runs that a grid names, and those that they need."""
    grids = store.grids()
    if unused and not grids:
        raise InputError(
            f"{store.root} has no grids, so every run in it is unused; remove the folder itself if you want that"
        )
    wanted: set[str] = set()
    left = [name for record in grids.values() for name in record["cells"]]
    while left:
        if (name := left.pop()) not in wanted:
            wanted.add(name)
            left += store.read(name)["needs"] if unused and store.done(name) else ()
    return wanted


def _leftovers(store: Store) -> Iterator[tuple[str, Path]]:
    """(run or "", file or folder) of what a process that was killed leaves behind."""
    for path in _entries(store.root / "drafts"):
        yield path.name.rpartition(".")[0], path
    for path in _entries(store.root / "locks"):
        if path.suffix == ".lock":
            yield path.stem, path
    for path in _entries(store.root / "states", hidden=True):
        if path.name[0] == ".":  # .NAME.safetensors.RANDOM.tmp
            yield _run_of(path.name[1:].partition(".safetensors.")[0]), path
    before = time.time() - OLD
    for part in (".", "locks", "grids", "inputs", "failed"):
        for path in _entries(store.root / part, hidden=True):
            if path.suffix == ".tmp" or (part == "locks" and path.suffix != ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    if path.lstat().st_mtime < before:
                        yield "", path


def _outlived(store: Store, wanted: set[str]) -> Iterator[tuple[str, Path]]:
    """Checkpoints of runs that are done or nobody's, logs of nothing, notes of failures that were overcome."""
    failed = store.failures()
    for path in _entries(store.root / "states"):
        if store.done(name := _run_of(path.stem)) or name not in wanted:
            yield name, path
    for path in _entries(store.root / "logs"):
        if not store.done(name := _run_of(path.stem)) and name not in wanted and name not in failed:
            yield name, path
    for path in _entries(store.root / "failed"):
        if store.done(path.stem):
            yield path.stem, path


def _run_of(stem: str) -> str:
    """The run that a checkpoint or a log belongs to: the last of several that are computed together; all are locked then."""
    return stem.partition(JOINED)[0]


def _remove(store: Store, name: str, path: Path) -> bool:
    """Remove one thing, unless its run's lock is held."""
    if path.parent == store.root / "runs":
        return store.remove(name)
    with store.claim_to_remove(name) if name else contextlib.nullcontext(True) as mine:
        if not mine:
            return False
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix != ".lock":  # a lock goes as it is given back
            with contextlib.suppress(OSError):
                os.unlink(path)
    return not path.exists()


def _held(store: Store, name: str) -> bool:
    return bool(name) and store.held(name)


def _entries(folder: Path, *, hidden: bool = False, odd: bool = False) -> list[Path]:
    """What lies in a folder, sorted; nothing where there is none. Names that no run can have only with `odd`."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(p for p in folder.iterdir() if (hidden or p.name[0] != ".") and (odd or p.name.isprintable()))
    return []
