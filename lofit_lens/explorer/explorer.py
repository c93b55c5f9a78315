"""`explore`: two head sets side by side in Jupyter, all of it readable and settable from code."""

import html
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.checks import check_one_of, check_whole, texts_of
from lofit_lens.errors import InputError
from lofit_lens.explorer import page
from lofit_lens.explorer.readings import reading, stored_title, token_reading
from lofit_lens.explorer.running import PromptRun, adapters_for, edited_heads, head_tokens, run_prompt
from lofit_lens.explorer.source import Source, read_source
from lofit_lens.explorer.state import State
from lofit_lens.heads import Head
from lofit_lens.html import wrapped
from lofit_lens.models import tokenizer_of
from lofit_lens.tasks.chat import as_conversation, has_template, turn_of

log = logging.getLogger(__name__)
MAX_NEW_TOKENS = 16
NO_MODEL = (
    "No model was given. With one, ll.explore(..., model, adapters={'LoFiT': lofit}) shows which tokens an adapter's head "
    "promotes, where heads attend on your own prompt, and what the model answers with and without the adapter or the head."
)


def explore(
    source: Any, model: Any = None, *, adapters: Mapping[str, Any] | None = None, k: int | Sequence[int] | None = None,
    tasks: Sequence[str] | None = None, prompts: Sequence[str] = (), max_new_tokens: int = MAX_NEW_TOKENS, chat: bool = False,
    system: str | None = None,
) -> "Explorer":  # fmt: skip
    """Compare head sets in Jupyter and open single heads; as the last line of a cell it shows itself.

    Args:
        source: a results folder, `ll.load_results(...)`, or a mapping of names, or of (task, method), to `HeadScores` or
            `HeadSet`. For a `HeadSet`, ranks in it are shown, and K is at most its size.
        model: any HookedTransformer or TransformerBridge; needed for promoted tokens of an adapter, attention on a typed prompt,
            and answers. A results folder shows what was read of its adapters without one.
        adapters: name -> adapter; None = LoFiT's of a results folder, where there are some.
        k: heads of each set: one number, a pair, or None for the usual ones (the preset's; 3 % of all heads; a set's size).
        tasks: of a results folder, or of keys (task, method); None = all.
        prompts: examples to choose from; the field starts with the first. On them the final norm's scale is measured, which
            promoted tokens in logits need. Empty: those stored in a results folder.
        max_new_tokens: limit of an answer, tokens.
        chat: put the typed prompt through the model's chat template; a switch beside the prompt changes it.
        system: text of the system turn; implies `chat`.

    Raises:
        InputError: nothing to show, heads of several models, a model of another shape or other weights, an invalid
            adapter or one that does not fit, a K larger than its set, or no anywidget
            (`pip install "lofit-lens[notebook]"`).
        DataError: a folder that holds no results, or damaged ones.
    """
    if importlib.util.find_spec("anywidget") is None:
        raise InputError(
            'the explorer needs anywidget and ipywidgets: pip install "lofit-lens[notebook]"; figures without them: '
            "ll.plots.head_grid"
        )
    found = read_source(source, model, tasks=tasks)
    check_whole(1, max_new_tokens=max_new_tokens)
    prompts = texts_of("prompts", prompts)
    made = Explorer(
        found,
        model,
        adapters_for(found, model, adapters),
        k=k,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        system=system,
    )
    made.chat = chat or system is not None
    return made


class Explorer(State):
    """The explorer that `explore` returns.

    Args:
        source: what can be shown.
        model: a loaded model or None.
        adapters: name -> adapter.
        k: as in `explore`.
        prompts: as in `explore`.
        max_new_tokens: as in `explore`.
        system: as in `explore`.

    Raises:
        InputError: a K that a set does not have.
    """

    def __init__(
        self, source: Source, model: Any = None, adapters: Mapping[str, Any] | None = None, *,
        k: int | Sequence[int] | None = None, prompts: Sequence[str] = (), max_new_tokens: int = MAX_NEW_TOKENS,
        system: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(source, k)
        self.adapters = dict(adapters or {})
        self._model, self._max_new_tokens, self._system, self._chat = model, max_new_tokens, system, False
        self._prompts = list(dict.fromkeys(prompts or [p["prompt"] for p in source.attention]))
        self._prompt, self._adapter = next(iter(self._prompts), ""), next(iter(self.adapters), None)
        self._run: PromptRun | None = None
        self._tokens: dict[tuple[str, Head], dict[str, Any]] = {}
        self._error, self._busy, self._version = "", "", 0
        self._view: Any = None

    def _changed(self) -> None:
        self._put()

    # --------------------------------------------------------------------------------- the model, from code or a view

    @property
    def prompt(self) -> str:
        """The prompt that was run last, or set; what is typed in the field arrives with Run."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {prompt!r}; give a text")
        self._prompt = prompt
        self._put()

    @property
    def chat(self) -> bool:
        """Whether `run` puts the prompt through the model's chat template; may be set.

        Raises:
            InputError: on setting it to True: there is no model, or it has no chat template or one that takes no system's text.
        """
        return self._chat

    @chat.setter
    def chat(self, chat: bool) -> None:
        self._check_chat(chat)
        self._chat = bool(chat)
        self._put()

    def _check_chat(self, chat: bool) -> None:
        if chat and self._model is None:
            raise InputError("the chat template is the model's: ll.explore(source, model, chat=True)")
        if chat:
            turn_of(tokenizer_of(self._model), as_conversation(self._prompt or "?", self._system))

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that `run` attaches; may be set; None = there is none."""
        return self._adapter

    @adapter.setter
    def adapter(self, name: str) -> None:
        check_one_of("adapter", name, self.adapters)
        self._adapter = name
        self._put()

    @property
    def last_run(self) -> PromptRun | None:
        """The result of the last `run`: texts, and attention patterns for `ll.plots.attention_figure`."""
        return self._run

    def run(self) -> PromptRun:
        """Run the prompt, as the button does: attention, and answers with and without the adapter and the open head.

        Raises:
            InputError: no model, an empty prompt, something attached already, or an adapter that cannot be attached.
            DataError: a prompt that the context does not hold.
        """
        if self._model is None:
            raise InputError("running a prompt needs the model: ll.explore(source, model)")
        self._busy = "Running the prompt ..."
        try:
            self._put()
            chosen = {} if self._adapter is None else {self._adapter: self.adapters[self._adapter]}
            asked = as_conversation(self._prompt, self._system) if self._chat and self._prompt.strip() else self._prompt
            self._run = run_prompt(
                self._model, asked, adapters=chosen, head=self.head, shape=self.source.shape,
                max_new_tokens=self._max_new_tokens,
            )  # fmt: skip
        finally:
            self._busy = ""
            self._put()
        return self._run

    # --------------------------------------------------------------------------------------------------- the view

    @property
    def widget(self) -> Any:
        """The widget itself, e.g. for a box of ipywidgets; made when it is first asked for."""
        if self._view is None:
            from lofit_lens.explorer.widget import View

            self._view = View(data=page.view_data(self.source, self._edited()))
            self._put(self._error)
            self._view.listen(self._chosen, self._asked)
        return self._view

    def to_html(self) -> str:
        """Return the explorer as HTML with its data, for views without a kernel; a still picture where scripts may not run."""
        return self._html(page.IN_NOTEBOOK)

    def _html(self, work: int) -> str:
        # Saying it reads the open head's tokens, which then are among those kept.
        said = {**self._said(), "readings": [], "note": "", "ask": None, "busy": "", "error": ""}
        data = page.view_data(self.source, self._edited(), work=work)
        for (_, head), found in self._tokens.items():
            data["readings"] = {**data["readings"], str(head): [found, *data["readings"].get(str(head), [])]}
        return page.fragment({"data": data, "state": self._choices(), "said": said}, self)

    def save(self, path: str | Path, *, title: str = "") -> Path:
        """Write it as a page that opens in any browser without Python and without a network, and return the file's path.

        What needs the live model, such as typing a prompt, is left out; answers and tokens already shown are kept.

        Args:
            path: the file; one of that name is replaced.
            title: of the page; empty = the names of the two sets.

        Raises:
            InputError: a page of 10 MB or more, or a file that cannot be written.
        """
        heading = title or f"Attention heads: {self.label}"
        return io.write_text(path, self.document(heading, before=f"<h1>{html.escape(heading)}</h1>"))

    def document(self, title: str, *, before: str = "", after: str = "") -> str:
        """Return the page as text.

        Args:
            title: of the window.
            before: HTML before the explorer.
            after: HTML after it.

        Raises:
            InputError: it would be 10 MB or more.
        """
        return page.document(title, before, self._html(page.IN_PAGE), after)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return wrapped(f"Explorer({self.summary()})")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        data, meta = self.widget._repr_mimebundle_()
        return {**data, "text/plain": repr(self), "text/html": self.to_html()}, meta

    def _chosen(self, choices: Any) -> None:
        """Follow the view: choose what the reader chose."""
        if choices != self._choices():
            self._try(lambda: self._take(choices))

    def _asked(self, message: Any) -> None:
        """Do what the view asks for."""
        self._try(lambda: self._do(message))

    def _try(self, act: Callable[[], Any]) -> None:
        """What goes wrong is said in the view, in one line, and logged if it is our fault."""
        try:
            act()
        except Exception as e:
            self._put(_one_line(e))
        else:
            self._put()

    def _do(self, message: Any) -> None:
        match message:
            case {"do": "run", "prompt": str(prompt), "state": dict(choices)}:
                self._take(choices)  # the view's latest choices may still be on their way
                self._prompt = prompt
                self.run()
            case _:
                raise _unknown(message)

    def _take(self, choices: Any) -> None:
        """Choose all of it or nothing."""
        try:
            adapter, chat = choices["adapter"], choices["chat"]
            if adapter != self._adapter:
                check_one_of("adapter", adapter, self.adapters)
            self._check_chat(chat)
            self.take(choices)
        except (KeyError, TypeError) as e:
            raise _unknown(choices) from e
        self._adapter, self._chat = adapter, bool(chat)

    def _put(self, error: str = "") -> None:
        """Show the present state. Every change is shown by this, so that an error stands until the next one."""
        self._error = error
        if self._view is not None:
            self._version += 1
            self._view.put(self._choices(), self._said())

    def _choices(self) -> dict[str, Any]:
        return {**self.choices(), "adapter": self._adapter, "chat": self._chat}

    def _said(self) -> dict[str, Any]:
        """Return what is known about the present choices, as texts and numbers that the view only places."""
        head, run = self.head, self._run
        row, tokenizer = self.overlap.to_dict(), None if self._model is None else tokenizer_of(self._model)
        maps, note = ([], "") if run is None or head is None else run.maps(head)
        if run is None and tokenizer is not None:
            note = "Type a prompt and press Run to see where it attends."
        return {
            "version": self._version, "head": None if head is None else str(head),
            "overlap": {
                "left": self.left, "right": self.right, "k": list(self.k), "expected": round(row["expected"], 2),
                "p": page.thousandths(row["p_hypergeometric"]), "p_layer": page.thousandths(row["p_layer"]),
            },
            "readings": [] if head is None else self._readings(head), "maps": maps, "note": note,
            "answers": run.answers(head, self._adapter, chat=self._chat) if run else {"prompt": "", "rows": [], "note": ""},
            "prompt": self._prompt, "prompts": self._prompts, "adapters": list(self.adapters),
            "has_chat": tokenizer is not None and has_template(tokenizer),
            "ask": NO_MODEL if tokenizer is None else "", "busy": self._busy, "error": self._error,
        }  # fmt: skip

    def _edited(self) -> dict[str, list[str] | None]:
        return {
            name: None if (heads := edited_heads(adapter)) is None else [str(h) for h in heads]
            for name, adapter in self.adapters.items()
        }

    def _readings(self, head: Head) -> list[dict[str, Any]]:
        """Read this head's edits with the model, for adapters without a stored reading."""
        known = {r["title"] for r in self.source.readings.get(str(head), [])}
        return [] if self._model is None else [
            self._read(name, head) for name, adapter in self.adapters.items()
            if stored_title(name) not in known and head in (edited_heads(adapter) or ())
        ]  # fmt: skip

    def _read(self, name: str, head: Head) -> dict[str, Any]:
        if (name, head) not in self._tokens:
            try:
                found = head_tokens(self._model, self.adapters[name], head, self._prompts)
                self._tokens[name, head] = token_reading(name, found, head)
            except Exception as e:  # one reading that cannot be had must not take the others away
                self._tokens[name, head] = reading(name, note=_one_line(e))
        return self._tokens[name, head]


def _unknown(message: Any) -> InputError:
    return InputError(f"the explorer does not know {message!r}; reload the page, it may be of another version")


def _one_line(e: Exception) -> str:
    """An error as one line; one that is no user's is logged as well."""
    text = " ".join(str(e).split())
    if isinstance(e, InputError):
        return text
    log.error("the explorer failed", exc_info=e)
    return f"{type(e).__name__}: {text}"
