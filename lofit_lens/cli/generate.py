"""lofit-lens generate: try an adapter by hand."""

from typing import Annotated

import typer

from lofit_lens.cli import common as c


def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: c.Model = "organism",
    adapter: c.AdapterName = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Length limit, tokens.")] = 32,
    backend: c.Backend = "auto",
    dtype: c.Dtype = "float32",
    device: c.Device = None,
    revision: c.Revision = None,
    other_model: c.OtherModel = False,
) -> None:
    """Continue prompts greedily; with an adapter, first without it and then with it.

    Example: lofit-lens generate "People say Q: what do ... ? A:" --adapter out/adapter
    """
    loaded, change = c.open_with(
        adapter, model, backend=backend, dtype=dtype, device=device, revision=revision, other_model=other_model
    )
    from rich.markup import escape

    from lofit_lens.evaluation import generate as run

    answers = {"model": run(loaded, prompts, max_new_tokens=max_new_tokens)}
    if change is not None:
        with change.attached(loaded):
            answers["with adapter"] = run(loaded, prompts, max_new_tokens=max_new_tokens)
    for i, prompt in enumerate(prompts):
        c.console.print(f"\n[bold]{escape(prompt)}[/bold]")
        for name, texts in answers.items():
            c.console.print(f"  {name:>12}: {escape(texts[i].strip())}")
