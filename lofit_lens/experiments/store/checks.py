"""What looks at a whole store: the check of every file, and the removal of what dead processes left."""

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
from lofit_lens.errors import DataError, DiskFull, InputError
from lofit_lens.experiments.store.records import FAILURE, FAILURE_SCHEMA, GRID, GRID_SCHEMA, JOINED
from lofit_lens.experiments.store.store import OWN_FILES, RUN_SCHEMA, Store

RUN_NAME = re.compile(r"[A-Za-z0-9._]*-[0-9a-f]{16}")  # as Cell.name makes them
OLD = 3600.0  # seconds after which a temporary file is nobody's


@dataclass(frozen=True)
class Problem:
    """Something in a store that is not as it should be.

    Attributes:
        path: file or folder, relative to the store.
        what: what is wrong, and what to do.
        kind: `damaged` (the run is lost, and can be computed again), `newer` (written by a later version), `unreadable` (may be
            well again later) or `foreign` (not of this store).
        run: name of the run that it belongs to, "" for none.
    """

    path: str
    what: str
    kind: str
    run: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


# ------------------------------------------------------------------------------------------------------- verify


def verify(store: Store) -> list[Problem]:
    """Everything in a store that is not as it was written; changes nothing.

    Of every run: run.json against its own checksum and the folder's name, every file against its checksum, and files too many.
    Of the rest: records that cannot be read.
    """
    found: list[Problem] = []
    for folder in _entries(store.root / "runs", odd=True):
        if folder.is_dir() and RUN_NAME.fullmatch(folder.name):
            check = partial(store.read, folder.name)
            wrong = _wrong(store, folder / "run.json", check, newest=RUN_SCHEMA, run=folder.name)
            found += wrong or _wrong_files(store, folder)
        else:
            found.append(_problem(store, folder, "is no run's folder; move it away", "foreign"))
    for part, kind, schema in (("grids", GRID, GRID_SCHEMA), ("failed", FAILURE, FAILURE_SCHEMA)):
        for path in _entries(store.root / part):
            found += _wrong(store, path, partial(_check_record, path, kind, schema), newest=schema)
    for path in _entries(store.root / "inputs"):
        found += _wrong(store, path, partial(store.kept, path.stem))
    return found


def _wrong_files(store: Store, folder: Path) -> list[Problem]:
    """Of a run whose record is well."""
    files, found = store.read(folder.name)["files"], []
    for file, digest in files.items():
        found += _wrong(store, folder / file, partial(_check_file, folder / file, digest), run=folder.name)
    if (folder / "timing.json").exists():
        found += _wrong(store, folder / "timing.json", partial(io.read_json, folder / "timing.json"), run=folder.name)
    for path in sorted(folder.rglob("*")):
        known = path.relative_to(folder).as_posix() in (*files, *OWN_FILES)
        if not known and (path.is_symlink() or not path.is_dir()):
            found.append(_problem(store, path, "is not a file of this run; move it away", "foreign", folder.name))
    return found


def _check_record(path: Path, kind: str, schema: int) -> None:
    io.check_record(io.read_json(path), kind, schema, ("name",), path.name)


def _check_file(path: Path, digest: str) -> None:
    if not path.is_file():
        raise DataError("is missing")
    if io.file_digest(path) != digest:
        raise DataError("has other bytes than were written (its checksum is another)")


def _wrong(store: Store, path: Path, check: Callable[[], Any], *, newest: int = 0, run: str = "") -> list[Problem]:
    """Note what a check raises: bytes that are not as written are damage, a file that the system does not give is not."""
    try:
        check()
    except (InputError, OSError) as e:
        cause = e if isinstance(e, OSError) else e.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            return [_problem(store, path, f"cannot be read: {cause.strerror}", "unreadable", run)]
        return [_problem(store, path, str(e), "newer" if newest and _schema(path) > newest else "damaged", run)]
    return []


def _schema(path: Path) -> int:
    try:
        record = io.read_json(path)
    except DataError:
        return 0
    found = record.get("schema") if isinstance(record, dict) else 0
    return found if isinstance(found, int) else 0


def _problem(store: Store, path: Path, what: str, kind: str, run: str = "") -> Problem:
    shown = str(path.relative_to(store.root)).encode(errors="backslashreplace").decode()
    return Problem(shown, what.encode(errors="backslashreplace").decode(), kind, run)


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
    return [path for name, path in candidates if _remove(store, name, path, dry_run)]


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
    before = time.time() - OLD
    for part in (".", "locks", "states", "grids", "inputs", "failed"):
        for path in _entries(store.root / part, hidden=True):
            if path.suffix == ".tmp" or (part == "locks" and path.suffix != ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    if path.lstat().st_mtime < before:
                        yield "", path


def _outlived(store: Store, wanted: set[str]) -> Iterator[tuple[str, Path]]:
    """Checkpoints of runs that are done, checkpoints and logs of runs that are nobody's."""
    known = wanted | store.failures().keys()
    for part in ("states", "logs"):
        for path in _entries(store.root / part):
            name = path.stem.partition(JOINED)[0]  # of several runs, which are all locked then, the last
            if part == "states" if store.done(name) else name not in known:
                yield name, path


def _remove(store: Store, name: str, path: Path, dry_run: bool) -> bool:
    """Remove one thing, unless its run's lock is held; whether it is gone, or would be."""
    if name and store.held(name):
        return False
    if dry_run:
        return True
    if path.parent == store.root / "runs":
        return store.remove(name)
    if path.suffix == ".lock":
        with contextlib.suppress(DiskFull), store.claim(name):  # it goes as it is given back
            pass
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return not path.exists()


def _entries(folder: Path, *, hidden: bool = False, odd: bool = False) -> list[Path]:
    """What lies in a folder, sorted; nothing where there is none. Names that no run can have only with `odd`."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(p for p in folder.iterdir() if (hidden or p.name[0] != ".") and (odd or p.name.isprintable()))
    return []
