"""Ordinary text for `damage`: WikiText-2's test split, the embedded model's own documents, or a file."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from lofit_lens.errors import DataError, unknown
from lofit_lens.io import decoded
from lofit_lens.organism.documents import draw_document
from lofit_lens.organism.words import TASKS
from lofit_lens.organism.world import build_world
from lofit_lens.tasks.fields import fields
from lofit_lens.tasks.hub import HubSource, hub_rows
from lofit_lens.tasks.sources import FORMATS, read_rows

WIKITEXT = HubSource(
    "Salesforce/wikitext", "wikitext-2-raw-v1", "b08601e04326c79dfdd32d625aee71d232d685c3", {"test": "test"}
)
N_DOCUMENTS = 500


def load_texts(name: str | Path) -> Iterator[str]:
    """Texts one by one.

    Args:
        name: `"wikitext"` (paragraphs of the pinned WikiText-2, without headings), `"organism"` (500 documents of the embedded
            model's pretraining distribution, drawn with a seed that training did not use), a .txt file (paragraphs, separated
            by blank lines), or a .jsonl, .json, .csv or .parquet file whose rows have a field `text`.

    Raises:
        InputError: neither a known name nor such a file.
        DataError: a file that cannot be read, or a row without its text; names file and row.
    """
    if str(name) == "wikitext":
        rows, _ = hub_rows(WIKITEXT, None)
        found = (row["text"].strip() for _, row in rows["test"])
        return (text for text in found if text and not text.startswith("="))
    if str(name) == "organism":
        return _documents()
    path = Path(name)
    if path.suffix == ".txt" and path.is_file():
        paragraphs = [p.strip() for p in re.split(r"\r?\n\s*\n", decoded(path)) if p.strip()]
        if not paragraphs:
            raise DataError(f"{path} is empty; it needs at least one paragraph")
        return iter(paragraphs)
    if path.suffix in FORMATS and path.is_file():
        return iter([fields(where, row, "text")[0] for where, row in read_rows(path)])
    raise unknown("text", name, ("wikitext", "organism"), hint=f"Or give a file: .txt, {', '.join(FORMATS)}.")


def _documents() -> Iterator[str]:
    world, draw = build_world(), random.Random("damage")
    for i in range(N_DOCUMENTS):
        words = draw_document(world, TASKS[i % len(TASKS)], draw).words
        yield " ".join(words[1:])  # without <s>, which the tokenizer prepends
