"""Records that a store keeps besides runs: values that specs refer to by hash, grids, and reasons of failures."""

import contextlib
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import DataError, InputError

GRID, GRID_SCHEMA = "lofit_lens.grid", 1
FAILURE, FAILURE_SCHEMA = "lofit_lens.failure", 1
JOINED = "+"  # separates a run's name from the digest that marks checkpoint and log of several runs


def checked(name: str) -> str:
    """Return the name if it is valid as a file's name."""
    if not name or not name.isprintable() or name[0] == "." or set(name) & set("/\\") or len(name.encode()) > 200:
        raise InputError(
            f"{name!r} is not a valid name for a run or a grid; allowed: up to 200 printable characters, no slash, no leading dot"
        )
    return name


class Records:
    """The records of a store, one JSON file each.

    Attributes:
        root: the store's folder.
    """

    root: Path

    def keep(self, value: Any) -> str:
        """Store a JSON-able value that a spec refers to; returns its SHA-256, by which `kept` finds it.

        Raises:
            InputError: it cannot be written.
        """
        digest = io.digest(value)
        try:
            self.kept(digest)
        except DataError:
            io.write_text(self.root / "inputs" / f"{digest}.json", io.canonical_json(value) + "\n")
        return digest

    def kept(self, digest: str) -> Any:
        """Return a value that `keep` stored.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self.root / "inputs" / f"{checked(digest)}.json"
        value = io.read_json(path)
        if io.digest(value) != digest:
            raise DataError(f"{path} is damaged (its checksum differs); run the same grid again, which rewrites it")
        return value

    def write_grid(self, name: str, record: dict[str, Any]) -> Path:
        """Store the record of a grid.

        Args:
            name: name of the grid, e.g. `paper/fig2`.
            record: JSON-able; its `cells` are the names of all its runs, including those that others need.

        Raises:
            InputError: `cells` is missing, the name is not a valid file name, or differs from another grid's only in / and -.
            DataError: the grid was written by a newer version.
        """
        path = self.root / "grids" / f"{checked(name.replace('/', '-'))}.json"
        if "cells" not in record:
            raise InputError(f"the record of grid {name!r} lacks 'cells', the names of its runs")
        there = None
        with contextlib.suppress(DataError):  # a damaged record is rewritten
            there = io.read_json(path)
        if there is not None:
            io.check_record(there, GRID, GRID_SCHEMA, ("name",), str(path))
            if (other := there["name"]) != name:
                raise InputError(f"grids {other!r} and {name!r} would share the file {path}; rename one")
        return io.write_json(path, {**record, "kind": GRID, "schema": GRID_SCHEMA, "name": name})

    def grids(self) -> dict[str, dict[str, Any]]:
        """Records of the grids of this store, by name.

        Raises:
            DataError: a record is damaged, or of a newer version.
        """
        found = {}
        for path in sorted((self.root / "grids").glob("[!.]*.json"), key=lambda path: path.stem):
            record = io.read_json(path)
            io.check_record(record, GRID, GRID_SCHEMA, ("name", "cells"), str(path))
            found[record["name"]] = record
        return found

    def _failure(self, name: str) -> Path:
        return self.root / "failed" / f"{checked(name)}.json"

    def fail(self, name: str, error: str) -> None:
        """Note why a run could not be computed; the note is removed when the run is done."""
        error = error.encode(errors="backslashreplace").decode()
        io.write_json(self._failure(name), {"kind": FAILURE, "schema": FAILURE_SCHEMA, "name": name, "error": error})

    def failures(self) -> dict[str, str]:
        """Name -> reason, for runs whose last attempt failed and that are not done."""
        found = {}
        for path in sorted((self.root / "failed").glob("[!.]*.json")):
            try:
                record = io.read_json(path)
                io.check_record(record, FAILURE, FAILURE_SCHEMA, ("name", "error"), str(path))
                found[path.stem] = str(record["error"])
            except DataError as e:
                found[path.stem] = f"failed; the note is lost: {e}"
        return {name: error for name, error in found.items() if not (self.root / "runs" / name).is_dir()}
