"""Entry point for Inspect: the provider `lofit-lens`, as in `--model lofit-lens/organism`."""

from typing import Any

from lofit_lens.checks import optional
from lofit_lens.sharing.for_inspect import PROVIDER, provider


@optional("inspect_ai.model", "inspect_ai", "inspect").modelapi(name=PROVIDER)
def lofit_lens() -> Any:
    """Return the provider's class, created on first use."""
    return provider()
