"""What needs the model: where heads attend on a typed prompt, what the model answers with and without an adapter or one of
its heads, and which tokens a head's edit promotes."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lofit_lens.analysis.attention import AttentionPatterns, attention_patterns
from lofit_lens.analysis.logit_lens import HeadTokens, promoted_by, promoted_tokens
from lofit_lens.checks import shown
from lofit_lens.errors import InputError
from lofit_lens.evaluation.generation import generate
from lofit_lens.explorer.readings import TOKENS, adapter_name, attention_map
from lofit_lens.explorer.source import Source
from lofit_lens.heads import Grid, Head, HeadSet
from lofit_lens.interventions import ITI, Adapter, HeadAblation, Lofit
from lofit_lens.interventions.base import attachable
from lofit_lens.models import positions_of, tokenizer_of
from lofit_lens.plots.attention import MOST_TOKENS
from lofit_lens.tasks.chat import Conversation
from lofit_lens.tasks.collate import encode

MOST_WEIGHTS = 8_000_000  # attention weights of a prompt: if all heads have more, only the open head's are kept
UNEDITED = "unmodified model"


class PromptRun(NamedTuple):
    """The result of running a prompt.

    Attributes:
        prompt: the text.
        head: the head that was open, or None.
        adapter: name of the adapter, or None.
        texts: condition, e.g. `"with LoFiT"` -> the generated text, greedy.
        attention: condition -> patterns of the kept heads; empty if the prompt is too long for them to be read.
        n_tokens: length of the prompt, with BOS and chat template.
    """

    prompt: str
    head: Head | None
    adapter: str | None
    texts: dict[str, str]
    attention: dict[str, AttentionPatterns]
    n_tokens: int

    def maps(self, head: Head) -> tuple[list[dict[str, Any]], str]:
        """Return a head's patterns, one per condition, and a note if there is none."""
        if self.n_tokens > MOST_TOKENS:
            return [], (
                f"This prompt has {self.n_tokens} tokens; a pattern of more than {MOST_TOKENS} cannot be read here. Use "
                "ll.plots.attention_html."
            )
        kept = {said: p for said, p in self.attention.items() if head in p.heads}
        found = [attention_map(said, p.tokens[0], p.of(head).tolist()) for said, p in kept.items()]
        return found, "" if found else f"Press Run to see where {head} attends."

    def answers(self, head: Head | None, adapter: str | None, *, chat: bool) -> dict[str, Any]:
        """Return the answers: `prompt`, `rows` of (condition, text), and a `note` if the choices have changed since."""
        note = ""
        if head not in (None, self.head) or adapter != self.adapter:
            note = (
                f"This was run with {self.head or 'no head'} open and {self.adapter or 'no adapter'}; press Run again."
            )
        if (was := isinstance(self.prompt, Conversation)) != chat:
            note = f"This was run {'as a chat' if was else 'as plain text'}; press Run again."
        rows = [[said, text or "(nothing: the end token came first)"] for said, text in self.texts.items()]
        return {"prompt": self.prompt, "rows": rows, "note": note}


def run_prompt(
    model: Any, prompt: str, *, adapters: Mapping[str, Any], head: Head | None, shape: Grid, max_new_tokens: int
) -> PromptRun:  # fmt: skip
    """Run a prompt through the model as it is, with the adapter, and with the open head left out.

    Args:
        model: any HookedTransformer or TransformerBridge.
        prompt: the text, or a conversation.
        adapters: one name -> adapter, or empty.
        head: the open head, or None.
        shape: `(n_layers, n_heads)`.
        max_new_tokens: limit of the answers, tokens.

    Raises:
        InputError: an empty prompt, something attached to the model already, or an adapter that cannot be attached.
        DataError: a prompt longer than the context.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; type a text for the model to continue")
    if positions_of(model):
        raise InputError(
            "something is attached to this model already; leave its `with` block or detach() it, so that it can run unmodified"
        )
    n_tokens = len(encode(tokenizer_of(model), prompt))
    heads = HeadSet.all(shape) if shape.n_total * n_tokens**2 <= MOST_WEIGHTS else HeadSet([head] if head else [])
    acting: dict[str, Any] = {UNEDITED: None}
    name = next(iter(adapters), None)
    if name is not None:
        acting[f"with {name}"] = adapters[name]
        if head is not None and (rest := without_head(adapters[name], head)) is not None:
            acting[f"with {name}, {head} left out"] = rest
    if head is not None:
        acting[f"{UNEDITED}, {head} silenced (z = 0)"] = HeadAblation.of(model, HeadSet([head], shape=shape))
    texts, attention = {}, {}
    looked = list(acting)[: 1 + len(adapters)] if n_tokens <= MOST_TOKENS and len(heads) else []
    for said, edit in acting.items():
        with contextlib.nullcontext() if edit is None else edit.attached(model):
            texts[said] = generate(model, prompt, max_new_tokens=max_new_tokens)
            if said in looked:
                attention[said] = attention_patterns(model, [prompt], heads)
    return PromptRun(prompt, head, name, texts, attention, n_tokens)


def edited_heads(adapter: Any) -> HeadSet | None:
    """Return the heads that an adapter edits; None for one that does not edit single heads (RepE, LoRA, RED, LoReFT, ...)."""
    found = getattr(adapter, "heads", None)
    return found if isinstance(found, HeadSet) else None


def without_head(adapter: Any, head: Head) -> Lofit | ITI | None:
    """Return an adapter without its edit of one head; None if it does not edit that head, or no single heads."""
    heads = edited_heads(adapter)
    if heads is None or head not in heads:
        return None
    rest = heads - HeadSet([head])
    if isinstance(adapter, Lofit):
        return adapter.restrict(rest) if len(rest) else 0.0 * adapter
    if isinstance(adapter, ITI):
        return _iti_on(adapter, rest) if len(rest) else adapter.with_strength(0.0)
    return None


def _iti_on(adapter: ITI, heads: HeadSet) -> ITI:
    kept = [adapter.heads.heads.index(h) for h in heads]
    return ITI(
        adapter.shape, heads, directions=adapter.directions[kept], sigma=adapter.sigma[kept], alpha=adapter.alpha,
        positions=adapter.positions, meta=adapter.meta,
    )  # fmt: skip


def head_tokens(model: Any, adapter: Any, head: Head, prompts: Sequence[str] = ()) -> HeadTokens:
    """Find the tokens that an adapter's edit of one head promotes and suppresses; in logits if there are prompts.

    Raises:
        InputError: an adapter whose edit of that head adds no constant vector.
    """
    if isinstance(adapter, Lofit):
        return promoted_tokens(
            model, adapter, heads=HeadSet([head], shape=adapter.shape[:2]), top=TOKENS, prompts=list(prompts) or None
        )
    if isinstance(adapter, ITI):
        shift = adapter.shift(head.layer)[head.head][None]
        return promoted_by(model, shift, HeadSet([head]), top=TOKENS, prompts=list(prompts) or None)
    raise InputError(
        f"a {type(adapter).__name__} adapter adds no vector at single heads, so no tokens can be read from it"
    )


def adapters_for(source: Source, model: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the adapters to show, checked against the model."""
    if given is None:
        if model is None or source.results is None:
            return {}
        given, results = {}, source.results
        for task in dict.fromkeys(e.task for e in source.entries.values()):
            if len(results.lofit(task, seed=results.seeds[0], k=results.k(task))):
                given[adapter_name(task)] = results.adapter(task, model=model)
    if not isinstance(given, Mapping):
        raise InputError(f"adapters is a {type(given).__name__}; give a mapping of names, e.g. {{'LoFiT': lofit}}")
    for name, adapter in given.items():
        if not attachable(adapter):
            raise InputError(
                f"adapter {name!r} is {shown(adapter)}; give what ll.tune_offsets or ll.load_adapter returns"
            )
        if (heads := edited_heads(adapter)) is not None:
            heads.check(source.shape)
        if model is not None and isinstance(adapter, Adapter):
            adapter.attach_check(model)
    return dict(given)
