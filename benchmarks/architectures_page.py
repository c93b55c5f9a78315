"""Render docs/architectures.md: which architectures load right on which class, from benchmarks/results/architectures_*.json.

    python benchmarks/architectures_page.py

Every word of the tables comes from the files, which `architectures.py` writes, one for each major version of TransformerLens.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from shown import CLASSES, Record, table

from lofit_lens import io

KIND = "architectures"
WORDS = ("right", "in part", "no heads", "refused", "**wrong**")
CUT = re.compile(
    r"^(?:(?:HookedTransformer|TransformerBridge) cannot load the checkpoint(?: correctly)?|the checkpoint): "
    r"|\. Use backend=.*$"
)
INTRODUCTION = """# Architectures

Made from `benchmarks/results/architectures_*.json` by `python benchmarks/architectures_page.py` (`make architectures`).

A tiny random checkpoint of every decoder that transformers has and TransformerLens says it takes, and variants of their options
(`benchmarks/families.py`), is loaded by `load_model(folder, backend=...)` on each class and compared with plain Hugging Face:

- logits of single rows of {lengths} tokens, on both sides of the sliding windows (16) and of the lengths at which rotary
  scaling sets in (32), and of rows padded on the left and on the right; the same of a model handed over in memory, and in the
  pass that training takes;
- {new} greedy tokens from a key-value cache, and log-probs of several answers to prompts with a shared front;
- z against the input of Hugging Face's output projection, and logits under a random LoFiT edit of every head against the same
  edit made in Hugging Face; gradients of A against finite differences.

**right**: all of it agrees (logits within {exact:g} of their standard deviation). **refused**: `load_model` raises an error that
says why. **in part**: what works is right, and the rest raises such an error. **no heads**: it runs right, and no layer's heads
can be edited. **wrong**: a result that differs, or an error that is not meant for a user. "Heads" says in how many layers they
can be edited, "export" whether [`export_folded`](howto/share.md) has room for an edit with offsets; the last column says what is
behind a word and why some layers have no heads.
"""


def read(folder: Path) -> list[Record]:
    """The files, oldest TransformerLens first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("architectures_*.json"))]
    return sorted((r for r in found if r["benchmark"] == KIND), key=lambda r: r["versions"]["transformer-lens"])


def columns(records: Sequence[Record]) -> Iterator[tuple[str, Record, str]]:
    """Title, record and backend of every class that was tried."""
    for record in records:
        version = ".".join(record["versions"]["transformer-lens"].split(".")[:2])
        for backend, title in CLASSES.items():
            if any(backend in case for case in record["results"]["cases"].values()):
                yield f"{title} {version}", record, backend


def verdict(entry: Record | None) -> str:
    """One of `WORDS` on what a class makes of a checkpoint."""
    if entry is None:
        return ""
    checks = {name: found for name, found in entry.items() if isinstance(found, dict)}
    raw = entry.get("other layers", "").startswith("**")
    if raw or any(found.get("right") is False for found in checks.values()):
        return "**wrong**"
    if "refused" in entry["loads"]:
        return "refused"
    if entry["layers with heads"].startswith("0 "):
        return "no heads"
    return "in part" if any("refused" in found for name, found in checks.items() if name != "export") else "right"


def reasons(entry: Record | None) -> list[str]:
    """What stands behind a word that is not "right", and why some layers' heads cannot be edited."""
    found = []
    for name, check in (entry or {}).items():
        if name == "other layers":
            found.append(f"heads: {_short(check)}")
        elif isinstance(check, dict):
            why = check.get("reason") or ("" if name == "export" else check.get("refused"))
            if why:
                found.append(_short(why) if name == "loads" else f"{name}: {_short(why)}")
    return found


def _short(why: str) -> str:
    why = CUT.sub("", why)
    return why.replace("|", "\\|").replace("<", "&lt;")


def rows(records: Sequence[Record]) -> Iterator[list[str]]:
    """One line for each checkpoint."""
    listed = list(columns(records))
    names = list(dict.fromkeys(name for record in records for name in record["results"]["cases"]))
    for name in names:
        entries = [(title, record["results"]["cases"].get(name, {}), backend) for title, record, backend in listed]
        kind = next(case["architecture"] for _, case, _ in entries if case)
        why: dict[str, list[str]] = {}
        for title, case, backend in entries:
            for reason in [case["not compared"]] if "not compared" in case else reasons(case.get(backend)):
                why.setdefault(reason, []).append(title)
        loaded = [case[backend] for _, case, backend in entries if "layers with heads" in case.get(backend, {})]
        heads = Counter(entry["layers with heads"] for entry in loaded).most_common(1)
        exports = [entry["export"].get("right", False) for entry in loaded if "export" in entry]
        yield [
            name if name == kind.removesuffix("ForCausalLM") else f"{name} (`{kind}`)",
            *(verdict(case.get(backend)) for _, case, backend in entries),
            heads[0][0] if heads else "",
            ("yes" if any(exports) else "no") if exports else "",
            "; ".join(f"{' and '.join(titles)}: {reason}" for reason, titles in why.items()),
        ]  # fmt: skip


def page(folder: Path) -> str:
    """The whole page."""
    records = read(folder)
    settings = records[-1]["settings"]
    *first, last = settings["lengths"]
    lengths = f"{', '.join(map(str, first))} and {last}"
    titles = [title for title, _, _ in columns(records)]
    listed = list(rows(records))
    counted = [
        (title, *(sum(row[1 + i] == word for row in listed) for word in WORDS)) for i, title in enumerate(titles)
    ]
    left_out: dict[str, list[str]] = {}
    for name, reason in sorted(set().union(*(record["results"]["claimed"].items() for record in records))):
        if reason:
            left_out.setdefault(reason, []).append(f"`{name}`")
    return "\n".join([
        INTRODUCTION.format(lengths=lengths, new=settings["new"], exact=settings["exact"]),
        table(("class", *WORDS), counted),
        "## Checkpoints\n",
        table(("architecture", *titles, "heads", "export", "why"), listed),
        "## Left out\n\nTransformerLens takes these as well; no checkpoint of them is made here.\n",
        table(("classes", "why"), [(", ".join(sorted(set(names))), reason) for reason, names in left_out.items()]),
        "## Made by\n",
        *map(_made_by, records),
    ])  # fmt: skip


def _made_by(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    name = f"architectures_tl{versions['transformer-lens'].split('.')[0]}.json"
    changed = ", with changes not committed" if record.get("changed_files") else ""
    return (
        f"- `{record['settings']['command']}`, {record['date']}, commit {str(record.get('commit'))[:12]}{changed}. "
        f"{machine['processor']}, {machine['cores']} cores. "
        f"{', '.join(f'{k} {v}' for k, v in versions.items() if k != 'platform')}. "
        f"File: [{name}](../benchmarks/results/{name})."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Render and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/architectures.md"))
    args = parser.parse_args(argv)
    io.write_text(args.out, page(args.results))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
