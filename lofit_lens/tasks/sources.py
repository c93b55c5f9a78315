"""Where task files come from: a local folder, or pinned public URLs with checksums.

The files are not part of this package (CLUTRR, for one, is CC-BY-NC-4.0). They are fetched once through
`datasets`, kept in its cache, and used only if their SHA-256 matches.
"""

import csv
import io as text_io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import DataError
from lofit_lens.tasks.fields import Row

FORMATS = (".csv", ".json", ".jsonl", ".parquet")
MAX_CELL = 2**31 - 1  # characters of one csv cell; Python's own limit is 131,072
OFFICIAL = "https://raw.githubusercontent.com/fc2869/lo-fit/ec2c0f4a20d1173be491643a05c56c149a6aeaac/dataset"


@dataclass(frozen=True)
class Source:
    """Files of one task: names relative to `folder`, each with the SHA-256 that a fetched file must have.

    A local folder may also have one of the names in `also`.
    """

    folder: str
    files: Mapping[str, str]
    base: str = OFFICIAL
    also: tuple[str, ...] = ()

    def url(self, name: str) -> str:
        """Public URL of one file."""
        return f"{self.base}/{self.folder}/{name}"


def locate(
    source: Source, names: Mapping[str, str], data_dir: str | Path | None, *, optional: Collection[str] = ()
) -> dict[str, Path]:
    """Paths of files, by split.

    Args:
        source: where to fetch from if there is no `data_dir`.
        names: split -> file name.
        data_dir: a folder that holds the files or the task's folder; None = fetch.
        optional: splits that may be missing; when fetching, they are skipped if no checksum is known.

    Raises:
        DataError: a folder or file is missing, cannot be fetched, or has another checksum.
    """
    if data_dir is None:
        known = {split: name for split, name in names.items() if split not in optional or name in source.files}
        return {split: fetch(source.url(name), source.files[name]) for split, name in known.items()}
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(
            f"no data folder {root}; give the folder with {', '.join(names.values())}, or omit it to fetch them"
        )
    places = (root, *(root / name for name in (source.folder, source.folder.lower(), *source.also)))
    needed = [name for split, name in names.items() if split not in optional]
    for place in places:
        if all((place / name).is_file() for name in needed):
            return {split: place / name for split, name in names.items() if (place / name).is_file()}
    missing = next(name for name in needed if not any((p / name).is_file() for p in places))
    raise DataError(
        f"no file {missing} in {root} or {root / (source.also or (source.folder.lower(),))[0]}; "
        f"{source.url(missing)} is its source"
    )


def fetch(url: str, sha256: str) -> Path:
    """Download a file through `datasets` (cached) and check its SHA-256.

    Raises:
        DataError: an unreachable URL, or an unexpected SHA-256.
    """
    from datasets import DownloadConfig, DownloadManager

    try:
        path = Path(str(DownloadManager(download_config=DownloadConfig(max_retries=2)).download(url)))
    except Exception as e:
        raise DataError(f"cannot fetch {url} ({type(e).__name__}: {e}); check the network, or give data_dir") from e
    found = io.file_digest(path)
    if found != sha256:
        raise DataError(
            f"{url} has SHA-256 {found}, expected {sha256}: the file changed or was cut off; delete {path} and retry"
        )
    return path


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a .csv, .json (one list), .jsonl or .parquet file, each with its place for error messages.

    Raises:
        DataError: a file that is unreadable, not UTF-8, empty, or not in the format of its name; names the line.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: unknown format {path.suffix!r}; give {', '.join(FORMATS)}")
    if path.suffix in (".json", ".parquet"):
        listed = io.read_json(path) if path.suffix == ".json" else _parquet(path)
        if not isinstance(listed, list):
            raise DataError(f"{path}: expected a list of records, got {type(listed).__name__}")
        rows: list[Row] = [(f"{path}: row {i + 1}", row) for i, row in enumerate(listed)]
    else:
        text = io.decoded(path)
        rows = _csv_rows(path, text) if path.suffix == ".csv" else _jsonl_rows(path, text)
    if not rows:
        raise DataError(f"{path} is empty; it needs at least one row")
    return rows


def _parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as e:
        raise DataError(f"{path} is not a complete parquet file ({e}); fetch it again") from e


def _csv_rows(path: Path, text: str) -> list[Row]:
    csv.field_size_limit(MAX_CELL)
    reader = csv.DictReader(text_io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        columns = list(reader.fieldnames or ())
        if twice := [name for i, name in enumerate(columns) if name in columns[:i]]:
            raise DataError(f"{path}:1: two columns are called {twice[0]!r}; rename or remove one")
        for row in reader:
            if None in row or None in row.values():
                n = len(columns) + len(row[None]) if None in row else sum(cell is not None for cell in row.values())
                raise DataError(
                    f"{path}:{reader.line_num}: {n} cells under {len(columns)} columns; put a cell that holds a comma in "
                    '"quotes", and leave one without text empty, between its commas'
                )
            rows.append((f"{path}:{reader.line_num}", row))
    except csv.Error as e:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({e})") from e
    return rows


def _jsonl_rows(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as e:  # too deeply nested lists, integers of thousands of digits
            raise DataError(f"{path}:{i}: not JSON ({getattr(e, 'msg', e)})") from e
        rows.append((f"{path}:{i}", value))
    return rows
