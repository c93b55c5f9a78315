"""Data sets of the Hugging Face hub, each at a pinned commit, or the same files from a local folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lofit_lens import io
from lofit_lens.errors import DataError
from lofit_lens.tasks.fields import Row, file_hashes
from lofit_lens.tasks.sources import FORMATS, read_rows


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub.

    Attributes:
        repo: id on the hub.
        config: name of the subset; None = the only one.
        revision: commit, forty digits.
        splits: our split -> the hub's.
    """

    repo: str
    config: str | None
    revision: str
    splits: Mapping[str, str]

    def __str__(self) -> str:
        """Id, subset and commit."""
        return f"{self.repo}{f'/{self.config}' if self.config else ''}@{self.revision}"


def hub_rows(source: HubSource, data_dir: str | Path | None) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows of each split, and its hash (of the rows as read from the hub, or of the local file).

    Args:
        source: what to read.
        data_dir: a folder with one file per split, named as on the hub (`validation.parquet`, or .jsonl, .json, .csv), or one
            that holds such a folder with the data set's name; None = fetch through `datasets`.

    Raises:
        DataError: unreachable, a file missing, or empty.
    """
    if data_dir is not None:
        paths = {split: _local(source, theirs, Path(data_dir)) for split, theirs in source.splits.items()}
        return {s: read_rows(p) for s, p in paths.items()}, file_hashes(paths)
    from datasets import load_dataset

    rows, hashes = {}, {}
    for split, theirs in source.splits.items():
        try:
            listed = load_dataset(source.repo, source.config, split=theirs, revision=source.revision).to_list()  # pyright: ignore
        except Exception as e:
            raise DataError(
                f"cannot fetch {source}, split {theirs} ({type(e).__name__}: {e}); check the network, or give data_dir"
            ) from e
        if not listed:
            raise DataError(f"{source}, split {theirs}, is empty; it needs at least one row")
        rows[split] = [(f"{source} {theirs} row {i + 1}", row) for i, row in enumerate(listed)]
        hashes[split] = io.digest(listed)
    return rows, hashes


def _local(source: HubSource, split: str, root: Path) -> Path:
    places = (root, root / source.repo.rsplit("/")[-1], root / (source.config or "."))
    for place in places:
        for ending in FORMATS:
            if (place / f"{split}{ending}").is_file():
                return place / f"{split}{ending}"
    raise DataError(
        f"no file {split}{'|'.join(FORMATS)} in {root} or {places[1]}; "
        f"https://huggingface.co/datasets/{source.repo} is its source"
    )
