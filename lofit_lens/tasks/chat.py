"""Prompts as conversations, which the model's own chat template turns into text.

    <the template's text of the messages, generation prompt added> + <answer> + <the template's end of a turn>

A `Conversation` remains a list of messages until it is tokenized, since the template belongs to the tokenizer: a task is the
same for all models. The template itself tells where an answer begins and which token ends it, by rendering an assistant's turn:

- White space that the template puts before an answer (Llama-2: a space) replaces the answer's own leading white space.
- Anything else that it puts there (Qwen3: an empty thought) belongs to the prompt: the answer follows it.
- The turn ends with the first added token after the answer, e.g. `<|im_end|>`; if there is none, with the tokenizer's EOS.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lofit_lens import io
from lofit_lens.errors import DataError, InputError
from lofit_lens.models.tokens import ChatText, rules_of
from lofit_lens.tasks.marked import Spans, spans_of

ROLES = ("system", "user", "assistant")
ANSWER, ASKED = "ANSWER", "-ASKED-"  # placeholders for an answer and a question when a template is read


class Conversation(str):
    """A prompt made of messages; as text it is the user's message, or all turns if there are several.

    Text prepended or appended to it goes into the user's last turn.

    Attributes:
        messages: (role, text) of each message; the last one is the user's.
    """

    messages: tuple[tuple[str, str], ...]

    def __new__(cls, messages: Sequence[tuple[str, str]]) -> "Conversation":
        """Build from messages that `parsed` has checked."""
        text = messages[0][1] if len(messages) == 1 else "\n\n".join(f"{role}: {said}" for role, said in messages)
        made = super().__new__(cls, text)
        made.messages = tuple(messages)
        return made

    @property
    def asked(self) -> str:
        """The user's last turn."""
        return self.messages[-1][1]

    @property
    def system(self) -> str | None:
        """The system prompt, or None."""
        return next((said for role, said in self.messages if role == "system"), None)

    def with_asked(self, text: str) -> "Conversation":
        """The same conversation with another last turn."""
        return Conversation((*self.messages[:-1], ("user", text)))

    def with_system(self, system: str | None) -> "Conversation":
        """The same conversation with a system prompt prepended (None = unchanged)."""
        return self if system is None else Conversation((("system", system), *self.messages))

    def __add__(self, other: str) -> "Conversation":
        return self.with_asked(self.asked + other)

    def __radd__(self, other: str) -> "Conversation":
        return self.with_asked(other + self.asked)

    def __repr__(self) -> str:
        return f"Conversation({list(self.messages)})"

    def __getnewargs__(self) -> tuple[Any, ...]:  # for pickling, into worker processes
        return (self.messages,)


def parsed(messages: Any, where: str = "the conversation") -> Conversation:
    """Check messages of the form `[{"role": "user", "content": "..."}, ...]`.

    Raises:
        DataError: not a list, a message without role and text, an unknown role, a system prompt that is not first, or a last
            message that is not the user's; names `where` and the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(
            f'{where}: messages must be a list like [{{"role": "user", "content": "..."}}], got {messages!r}'
        )
    read = [_message(f"{where}, message {i + 1}", m) for i, m in enumerate(messages)]
    if "system" in (roles := [role for role, _ in read])[1:]:
        raise DataError(f"{where}: the roles are {', '.join(roles)}; only the first may be a system message")
    if roles[-1] != "user":
        raise DataError(f"{where}: the last message is the {roles[-1]}'s; the model answers a user's message")
    return Conversation(read)


def _message(where: str, message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise DataError(f"{where} is {message!r}; it must have a role and a content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where} has the content {content!r}; it must be non-empty text")
    return role, content


def as_conversation(prompt: str, system: str | None = None) -> Conversation:
    """A prompt as the user's only turn, or a conversation unchanged, with a system prompt prepended if one is given.

    Raises:
        InputError: an empty system prompt, or a conversation that has one already.
    """
    if system is not None and not system.strip():
        raise InputError("the system prompt is empty; omit system")
    if not isinstance(prompt, Conversation):
        return Conversation([("user", prompt)]).with_system(system)
    if system is not None and prompt.system is not None:
        raise InputError(f"this conversation already has a system prompt ({prompt.system[:60]!r}); omit system")
    return prompt.with_system(system)


def asked(prompt: str) -> str:
    """The user's message: the last turn of a conversation, or the prompt itself."""
    return prompt.asked if isinstance(prompt, Conversation) else prompt


@dataclass(frozen=True)
class Turn:
    """Where the model's own text goes.

    Attributes:
        prompt: all text before it.
        lead: in a chat, the white space before the answer, in place of the answer's own; None = the answer is unchanged.
        end: the token that ends it, or None if the tokenizer has none.
        spans: marked characters of `prompt`; see `Marked`.
    """

    prompt: str
    lead: str | None
    end: int | None
    spans: Spans = ()

    def answer(self, text: str) -> str:
        """An answer as it follows the prompt."""
        return text if self.lead is None else self.lead + text.strip()


def turn_of(tokenizer: Any, prompt: str) -> Turn:
    """Where the answer to a prompt goes: directly after a text, or into the assistant's turn of a conversation.

    Raises:
        InputError: a conversation for which the tokenizer has no chat template, or a template that does not accept it or changes
            its marked characters.
    """
    end = rules_of(tokenizer).eos
    if not isinstance(prompt, Conversation):
        return Turn(prompt, None, end, spans_of(prompt))
    text, front, behind = _rendered(tokenizer, prompt), "", ""
    with contextlib.suppress(TemplateError):  # if a template refuses an answer, only the prompt is known
        whole = _apply(tokenizer, [*prompt.messages, ("assistant", ANSWER)])
        if whole.count(ANSWER) > text.count(ANSWER):
            front, _, behind = whole.rpartition(ANSWER)
    between = front[len(text) :] if front.startswith(text) else ""
    thought, lead = (between, "") if between.strip() else ("", between)
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ends = (i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if i in added)
    return Turn(ChatText(text + thought), lead, next(ends, end), _spans_in(tokenizer, prompt, text))


def _spans_in(tokenizer: Any, prompt: Conversation, text: str) -> Spans:
    """Where the marked characters of the user's last turn are in the template's text."""
    said = prompt.asked
    if not spans_of(said):
        return ()
    front, _, behind = _apply(tokenizer, prompt.with_asked(ASKED).messages, generate=True).rpartition(ASKED)
    inner = text[len(front) : len(text) - len(behind)]
    if f"{front}{inner}{behind}" != text or inner not in (said, said.strip()):
        raise InputError(
            f"this model's chat template changes the user's text {said[:60]!r}, so that its marked characters (positions) "
            "cannot be found in it; ask without chat, or edit other positions"
        )
    dropped = said.index(inner)
    inside = [(max(start - dropped, 0), min(end - dropped, len(inner))) for start, end in spans_of(said)]
    return tuple((len(front) + start, len(front) + end) for start, end in inside)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's chat template.

    Raises:
        InputError: the tokenizer has none.
    """
    if not has_template(tokenizer):
        name = str(getattr(tokenizer, "name_or_path", "")).replace("\\", "/").rstrip("/").rsplit("/")[-1]
        raise InputError(
            f"the tokenizer{f' of {name}' if name else ''} has no chat template; ask without chat, as for base models, use "
            "the instruction-tuned model, or set tokenizer.chat_template"
        )
    return io.digest(tokenizer.chat_template)


def _rendered(tokenizer: Any, prompt: Conversation) -> str:
    """The template's text of a conversation with the generation prompt; raises InputError if it refuses or drops a turn."""
    template_digest(tokenizer)
    try:
        text = _apply(tokenizer, prompt.messages, generate=True)
    except TemplateError as e:
        if prompt.system is None:
            raise InputError(f"this model's chat template does not accept {prompt!r}: {e}") from e
        raise InputError(f"this model's chat template takes no system prompt ({e}); {NO_SYSTEM}") from e
    for role, said in prompt.messages:
        if (
            role != "assistant" and said.strip() not in text
        ):  # some templates drop the thoughts of the assistant's turns
            out = f"this model's chat template drops the {role}'s text {said[:60]!r}"
            raise InputError(f"{out}; {NO_SYSTEM if role == 'system' else 'it does not support such a conversation'}")
    return text


NO_SYSTEM = "omit system, or prepend its text to the prompt"


def _apply(tokenizer: Any, messages: Sequence[tuple[str, str]], *, generate: bool = False) -> str:
    said = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(said, add_generation_prompt=generate, tokenize=False)
