"""lofit-lens damage: the effect of an adapter on ordinary text."""

from pathlib import Path
from typing import Annotated

import typer

from lofit_lens.cli import common as c


def damage(
    how: c.ModelOptions,
    adapter: c.AdapterName,
    text: Annotated[
        str,
        typer.Option("--text", help="wikitext, organism, or a file: .txt (paragraphs), or rows with a field 'text'."),
    ] = "wikitext",
    limit: Annotated[int | None, typer.Option("--limit", help="Use only the first texts.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of each text that are read.")] = 128,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for the result.")] = None,
    overwrite: c.Overwrite = False,
    as_json: c.AsJson = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts run together.")] = 8,
    other_model: c.OtherModel = False,
    quiet: c.Quiet = False,
) -> None:
    """Measure cross-entropy and KL divergence (nats per token) of the edited model on text, against the unmodified one.

    Example: lofit-lens damage --model organism --adapter out/adapter --text organism
    """
    c.console.stderr = as_json
    if out is not None:
        c.check_new(out, overwrite=overwrite, folder=False)
    c.quiet_libraries()
    from rich.table import Table

    from lofit_lens.evaluation import damage as run
    from lofit_lens.evaluation.texts import load_texts

    texts = load_texts(text)
    loaded, change = c.open_with(adapter, how, other_model=other_model)
    found = run(
        loaded, change, texts, max_tokens=max_tokens, batch_size=batch_size, limit=limit, label=str(adapter),
        progress=not quiet,
    )  # fmt: skip
    if out is not None:
        found.save(out)
    table = Table(title=f"{adapter} on {len(found.texts)} texts ({text}), nats per token", title_justify="left")
    for column in ("quantity", "mean", "95 % interval over texts"):
        table.add_column(column)
    for row in found.rows():
        table.add_row(*row)
    c.console.print(table)
    for kind, n in found.counted.items():
        c.console.print(f"{kind}: {n}", style="dim")
    if out is not None:
        c.console.print(f"wrote {out}")
    if as_json:
        c.print_json(found.to_dict())
