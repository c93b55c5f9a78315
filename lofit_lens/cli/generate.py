"""lofit-lens generate: try an adapter on your own prompts."""

from functools import partial
from typing import Annotated

import typer

from lofit_lens.cli import common as c


def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    how: c.ModelOptions,
    adapter: c.AdapterName = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Length limit in tokens.")] = 32,
    chat: c.IsChat = False,
    system: c.System = None,
    other_model: c.OtherModel = False,
) -> None:
    """Continue prompts greedily; with an adapter, first without it and then with it.

    Example: lofit-lens generate "People say Q: what do ... ? A:" --adapter out/adapter
    """
    loaded, change = c.open_with(adapter, how, other_model=other_model)
    c.say_template(loaded, used=chat or system is not None)
    from rich.markup import escape

    from lofit_lens.evaluation import generate as run

    said = partial(run, loaded, prompts, max_new_tokens=max_new_tokens, chat=chat, system=system)
    answers = {"model": said()}
    if change is not None:
        with change.attached(loaded):
            answers["with adapter"] = said()
    for i, prompt in enumerate(prompts):
        c.console.print(f"\n[bold]{escape(prompt)}[/bold]")
        for name, texts in answers.items():
            c.console.print(f"  {name:>12}: {escape(texts[i].strip())}")
