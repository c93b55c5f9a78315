"""Inspect (inspect_ai) on an edited model: a provider whose answers are `ll.generate`'s with adapters attached.

TransformerLens 4 has its own provider, `tl_bridge`, which runs affine edits at `hook_z` in every position. This one runs on both
classes and both versions, supports any adapter, and knows where prompts end.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lofit_lens.checks import optional
from lofit_lens.errors import InputError
from lofit_lens.evaluation import generate
from lofit_lens.interventions import attached, load_adapter
from lofit_lens.interventions.base import Intervention, adapters_of
from lofit_lens.models import load_model, model_info, tokenizer_of
from lofit_lens.tasks.chat import has_template

PROVIDER = "lofit-lens"
MAX_NEW_TOKENS = 256  # if a task sets no limit
# Options of a configuration that greedy decoding does not support.
NOT_DONE = ("best_of", "frequency_penalty", "logit_bias", "logprobs", "num_choices", "presence_penalty", "top_logprobs")


def inspect_model(
    model: Any, adapter: Intervention | Sequence[Intervention] | None = None, *, chat: bool | None = None
) -> Any:
    """Make a model for `inspect_ai.eval(task, model=...)`: greedy answers of `model` with an adapter attached.

    Args:
        model: any HookedTransformer or TransformerBridge.
        adapter: one adapter, or several in order; None = whatever is attached meanwhile.
        chat: whether messages go through the model's chat template; None = if it has one. Without it, a sample must be one user
            message, which the model continues as plain text.

    Raises:
        InputError: inspect_ai is not installed, or `adapter` is not an adapter.
        AdapterError: an adapter that does not fit.
    """
    inspect = optional("inspect_ai.model", "inspect_ai", "inspect")
    held = model, () if adapter is None else adapters_of(adapter)
    made = inspect.modelapi(name=f"{PROVIDER}-in-memory")(
        lambda: provider(held)
    )  # its arguments are logged, so they must be texts
    return inspect.Model(made(model_name=model_info(model).name, chat=chat), inspect.GenerateConfig())


def provider(held: tuple[Any, tuple[Intervention, ...]] | None = None) -> Any:
    """Make Inspect's model class for `get_model("lofit-lens/NAME", adapter=FOLDER, ...)`.

    Besides the model's name, it takes `adapter` (a folder or a name on the hub), `chat` as in `inspect_model`, and the arguments
    of `load_model`. `held` is a model with adapters in memory, which is then used instead.

    Raises:
        InputError: inspect_ai is not installed.
    """
    inspect = optional("inspect_ai.model", "inspect_ai", "inspect")

    class EditedModel(inspect.ModelAPI):
        def __init__(
            self,
            model_name: str,
            base_url: str | None = None,
            api_key: str | None = None,
            config: Any = None,
            adapter: str | Path | None = None,
            chat: bool | None = None,
            **loading: Any,
        ) -> None:
            super().__init__(model_name, base_url, api_key, [], config or inspect.GenerateConfig())
            self.model, self.adapters = held or (load_model(model_name, **loading), ())
            if adapter is not None:
                self.adapters = (load_adapter(adapter, model=self.model),)
            self.chat = has_template(tokenizer_of(self.model)) if chat is None else chat
            with attached(self.model, *self.adapters):  # an adapter that does not fit is refused now
                pass

        async def generate(self, input: Sequence[Any], tools: Sequence[Any], tool_choice: Any, config: Any) -> Any:
            _check_config(config, tools)
            limit = MAX_NEW_TOKENS if config.max_tokens is None else config.max_tokens
            asked = prompt_of(input, chat=self.chat)
            with attached(self.model, *self.adapters):  # nothing is awaited in here: samples come one after the other
                said = generate(self.model, asked, max_new_tokens=limit)
            for stop in config.stop_seqs or ():
                said = said.split(stop)[0]
            return inspect.ModelOutput.from_content(self.model_name, said, "unknown")

        def max_tokens(self) -> int | None:
            return MAX_NEW_TOKENS

        def max_connections(self) -> int:
            return 1

    return EditedModel


def prompt_of(messages: Sequence[Any], *, chat: bool) -> Any:
    """Turn a sample's messages into a prompt for `generate`.

    Raises:
        InputError: a message that is not text by system, user or assistant; or, without chat, not exactly one user message.
    """
    said = [{"role": m.role, "content": m.text} for m in messages]
    if chat:
        return said
    if [m["role"] for m in said] != ["user"]:
        raise InputError(
            f"a sample has messages by {', '.join(m['role'] for m in said)}, and this model is asked in plain text, without a "
            "chat template; give one user message per sample (no system message), or a model with a template (chat=True)"
        )
    return said[0]["content"]


def _check_config(config: Any, tools: Sequence[Any]) -> None:
    """Raise InputError for options of a sample that greedy decoding does not support."""
    asked = [name for name in NOT_DONE if getattr(config, name, None) not in (None, False)]
    if config.temperature:
        asked.append(f"temperature {config.temperature}")
    if tools:
        asked.append("tools")
    if asked:
        raise InputError(
            f"this provider answers greedily, in text, and does not support {', '.join(asked)}; leave that out"
        )
