"""Maintenance of a whole store: check every file, and remove leftovers of dead processes."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import DataError, DiskFull, InputError, NewerData
from lofit_lens.experiments.store.records import FAILURE, FAILURE_SCHEMA, GRID, GRID_SCHEMA, JOINED
from lofit_lens.experiments.store.store import Store

RUN_NAME = re.compile(r"[A-Za-z0-9._]*-[0-9a-f]{16}")  # as made by Cell.name
OLD = 3600.0  # seconds after which a temporary file counts as abandoned


@dataclass(frozen=True)
class Problem:
    """A problem found in a store.

    Attributes:
        path: file or folder, relative to the store.
        what: what is wrong, and what to do.
        kind: `damaged` (the run is lost, and can be computed again), `newer` (written by a later version), `unreadable` (maybe
            only temporarily) or `foreign` (not part of the store).
        run: name of the run that it belongs to, or "".
    """

    path: str
    what: str
    kind: str
    run: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


# ------------------------------------------------------------------------------------------------------- verify


def verify(store: Store) -> list[Problem]:
    """Find everything in a store that is not as it was written; changes nothing.

    For every run, run.json is compared with its own checksum and the folder's name, and every file with its checksum. Other
    records are checked for readability.
    """
    found: list[Problem] = []
    for folder in _entries(store.root / "runs", odd=True):
        if folder.is_dir() and RUN_NAME.fullmatch(folder.name):
            found += _wrong_in_run(store, folder)
        else:
            found.append(_problem(store, folder, "is not a run's folder; move it away", "foreign"))
    for part, kind, schema in (("grids", GRID, GRID_SCHEMA), ("failed", FAILURE, FAILURE_SCHEMA)):
        for path in _entries(store.root / part):
            found += _wrong(store, path, partial(_check_record, path, kind, schema))
    for path in _entries(store.root / "inputs"):
        found += _wrong(store, path, partial(store.kept, path.stem))
    return found


def _wrong_in_run(store: Store, folder: Path) -> list[Problem]:
    name, timing = folder.name, folder / "timing.json"
    if found := _wrong(store, folder / "run.json", partial(store.read, name), name):
        return found
    for file, digest in store.read(name)["files"].items():
        found += _wrong(store, folder / file, partial(_check_file, folder / file, digest), name)
    if timing.exists():
        found += _wrong(store, timing, partial(io.read_json, timing), name)
    return found


def _check_record(path: Path, kind: str, schema: int) -> None:
    io.check_record(io.read_json(path), kind, schema, ("name",), path.name)


def _check_file(path: Path, digest: str) -> None:
    if not path.is_file():
        raise DataError("is missing")
    if io.file_digest(path) != digest:
        raise DataError("has been changed since it was written (its checksum differs)")


def _wrong(store: Store, path: Path, check: Callable[[], Any], run: str = "") -> list[Problem]:
    """Turn a check's error into problems: changed bytes are damage, a file that the system cannot read is not."""
    try:
        check()
    except NewerData as e:
        return [_problem(store, path, str(e), "newer", run)]
    except (InputError, OSError) as e:
        cause = e if isinstance(e, OSError) else e.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            return [_problem(store, path, f"cannot be read: {cause.strerror}", "unreadable", run)]
        return [_problem(store, path, str(e), "damaged", run)]
    return []


def _problem(store: Store, path: Path, what: str, kind: str, run: str = "") -> Problem:
    shown = str(path.relative_to(store.root)).encode(errors="backslashreplace").decode()
    return Problem(shown, what.encode(errors="backslashreplace").decode(), kind, run)


def remove_damaged(store: Store, problems: Iterable[Problem]) -> list[Path]:
    """Remove the runs and records that `verify` found damaged, so that they are computed again; everything else stays.

    Returns:
        The removed paths; a run whose lock is held is kept.
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
    """Remove leftovers of dead processes; finished runs only with `unused`, and nothing of a run whose lock is held.

    Args:
        store: the store.
        dry_run: only report what would be removed.
        unused: also remove runs that no grid names or needs, with their logs, checkpoints and notes.

    Returns:
        The paths that were removed, or would be.

    Raises:
        InputError: `unused` in a store without grids, where it would remove every run.
        DataError: a grid's or a run's record is damaged, so that it is not known which runs are unused.
    """
    candidates = {path: name for name, path in _leftovers(store)}
    if unused:
        wanted = _wanted(store)
        for part in ("runs", "states", "logs", "failed"):
            named = {path: _run_of(path) for path in _entries(store.root / part)}
            candidates |= {path: name for path, name in named.items() if name not in wanted}
    return [path for path, name in candidates.items() if _remove(store, name, path, dry_run)]


def _wanted(store: Store) -> set[str]:
    """Runs that a grid names, and those that they need."""
    grids = store.grids()
    if not grids:
        raise InputError(
            f"{store.root} has no grids, so every run in it is unused; remove the folder itself if you want that"
        )
    wanted: set[str] = set()
    left = [name for record in grids.values() for name in record["cells"]]
    while left:
        if (name := left.pop()) not in wanted:
            wanted.add(name)
            left += store.read(name)["needs"] if store.done(name) else ()
    return wanted


def _leftovers(store: Store) -> Iterator[tuple[str, Path]]:
    """(run or "", file or folder) of what no run needs any more, and of leftovers of killed processes."""
    for path in _entries(store.root / "drafts"):
        yield path.name.rpartition(".")[0], path
    for path in _entries(store.root / "locks"):
        if path.suffix == ".lock":
            yield path.stem, path
    for path in _entries(store.root / "states"):
        if store.done(_run_of(path)):
            yield _run_of(path), path
    before = time.time() - OLD
    for part in (".", "locks", "states", "grids", "inputs", "failed"):
        for path in _entries(store.root / part, hidden=True):
            if path.suffix == ".tmp" or (part == "locks" and path.suffix != ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    if path.lstat().st_mtime < before:
                        yield "", path


def _run_of(path: Path) -> str:
    """The run that a file belongs to; of several that are computed together the last, since all of them are locked."""
    return path.name if path.is_dir() else path.stem.partition(JOINED)[0]


def _remove(store: Store, name: str, path: Path, dry_run: bool) -> bool:
    """Remove one path, unless its run's lock is held; returns whether it was removed, or would be."""
    if name and store.held(name):
        return False
    if dry_run:
        return True
    if path.parent == store.root / "runs":
        return store.remove(name)
    if path.suffix == ".lock":
        with contextlib.suppress(DiskFull), store.claim(name):  # releasing the lock removes its file
            pass
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return not path.exists()


def _entries(folder: Path, *, hidden: bool = False, odd: bool = False) -> list[Path]:
    """Entries of a folder, sorted; empty if there is no folder. Names that no run can have are included only with `odd`."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(p for p in folder.iterdir() if (hidden or p.name[0] != ".") and (odd or p.name.isprintable()))
    return []
