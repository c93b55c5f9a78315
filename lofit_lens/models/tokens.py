"""The tokens that a tokenizer prepends to a text, and the tokens at which generation stops.

Both are the checkpoint's own. TransformerLens reloads tokenizers with `add_bos_token=True`, and makes the end token BOS if
there is no BOS. So the rules are read from the tokenizer before that, and are kept on it.
"""

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lofit_lens.errors import DataError, InputError
from lofit_lens.models.token_texts import token_texts

logger = logging.getLogger(__name__)

_KEPT = "_lofit_lens_rules"  # on a tokenizer


class ChatText(str):
    """Text that a chat template made, its special tokens included: nothing is prepended to it."""

    def __add__(self, other: str) -> "ChatText":
        """Append text; the result is still a chat's."""
        return ChatText(str(self) + other)


@dataclass(frozen=True)
class TokenRules:
    """How a tokenizer's ids become a model's input.

    Attributes:
        own: ids that the tokenizer itself prepends to a text; usually BOS or nothing.
        front: ids that `encode` prepends.
        eos: the tokenizer's end token; None if it has none.
        n_vocab: rows of the model's embedding; None = unknown.
    """

    own: tuple[int, ...]
    front: tuple[int, ...]
    eos: int | None
    n_vocab: int | None = None

    @property
    def prepend_bos(self) -> bool:
        """Whether anything is prepended to a text."""
        return bool(self.front)


def rules_of(tokenizer: Any) -> TokenRules:
    """Return the rules kept on a tokenizer, or what it does by itself. An end token that was set later counts."""
    if has_rules(tokenizer):
        rules, eos_then = getattr(tokenizer, _KEPT)
        return rules if tokenizer.eos_token_id == eos_then else replace(rules, eos=tokenizer.eos_token_id)
    own = _own_front(tokenizer)
    return TokenRules(own, own, tokenizer.eos_token_id)


def keep_rules(tokenizer: Any, rules: TokenRules) -> None:
    """Keep rules on a tokenizer, for everything that encodes with it."""
    setattr(tokenizer, _KEPT, (rules, tokenizer.eos_token_id))


def has_rules(tokenizer: Any) -> bool:
    """Return whether rules are kept on a tokenizer."""
    return getattr(tokenizer, _KEPT, None) is not None


def chosen_rules(tokenizer: Any, prepend_bos: bool | None, n_vocab: int | None = None) -> TokenRules:
    """Return the rules of a tokenizer that TransformerLens has not touched, with BOS as requested; None = as the tokenizer does.

    Raises:
        InputError: BOS is requested, and the tokenizer has none.
    """
    rules = replace(rules_of(tokenizer), n_vocab=n_vocab)
    if prepend_bos is None:
        return replace(rules, front=rules.own)
    if not prepend_bos:
        return replace(rules, front=())
    if rules.own:
        return replace(rules, front=rules.own)
    if tokenizer.bos_token_id is None:
        raise InputError(
            "prepend_bos=True, but this tokenizer has no BOS token; set tokenizer.bos_token, or leave it out"
        )
    return replace(rules, front=(int(tokenizer.bos_token_id),))


def rules_before_lens(tokenizer: Any, n_vocab: int) -> TokenRules:
    """Return the rules of a tokenizer that TransformerLens has prepared, from the files it was read from."""
    from transformers import AutoTokenizer

    name, original = str(getattr(tokenizer, "name_or_path", "") or ""), None
    if name:
        with contextlib.suppress(Exception):  # of many classes: no such folder, nothing in the cache
            original = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    if original is None and tokenizer.init_kwargs.get("add_bos_token"):
        logger.warning(
            "the files of this model's tokenizer cannot be read again, so it is unknown whether it prepends BOS by "
            "itself; BOS is prepended, as TransformerLens does. load_model(hf_model, tokenizer=...) knows"
        )
    rules = replace(rules_of(tokenizer if original is None else original), n_vocab=n_vocab)
    # TransformerLens sets a missing end token; one that differs from the files' was set by the user.
    return rules if rules.eos is None else replace(rules, eos=tokenizer.eos_token_id)


def _own_front(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that the tokenizer prepends to a text by itself."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for n in range(len(whole) - len(plain) + 1):
        if whole[n : n + len(plain)] == plain:
            return tuple(whole[:n])
    return ()


def check_ids(tokenizer: Any, ids: Iterable[int], rules: TokenRules) -> None:
    """Raise DataError if an id has no row in the model's embedding."""
    if rules.n_vocab is not None and (high := max(ids, default=0)) >= rules.n_vocab:
        raise DataError(
            f"token {token_texts(tokenizer, [high])[0]!r} has id {high}, and the model's embedding has {rules.n_vocab} rows: "
            "it was added only to the tokenizer. Call hf_model.resize_token_embeddings(len(tokenizer)) before load_model, or "
            "use the model's own tokenizer"
        )


def ends_in(*configs: Any) -> frozenset[int]:
    """Return all end tokens that configurations and generation configurations name: none, one, or a list each."""
    found: set[int] = set()
    for config in configs:
        named = getattr(config, "eos_token_id", None)
        found.update(named if isinstance(named, list | tuple) else [] if named is None else [named])
    return frozenset(int(i) for i in found)
