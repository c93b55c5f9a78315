"""`explore`: two head sets side by side in Jupyter, all of it readable and settable from code."""

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import get_colorscale

from lofit_lens.checks import check_one_of, check_whole, texts_of
from lofit_lens.errors import InputError
from lofit_lens.explorer import panel, static
from lofit_lens.explorer.running import PromptRun, adapters_for, edited_heads, head_tokens, run_prompt
from lofit_lens.explorer.source import Source, read_source
from lofit_lens.explorer.state import SIDES, State
from lofit_lens.heads import Head, HeadScores, HeadSet
from lofit_lens.models import tokenizer_of
from lofit_lens.plots.heads import head_grid
from lofit_lens.plots.style import HEAT
from lofit_lens.tasks.chat import as_conversation, has_template, turn_of

log = logging.getLogger(__name__)
MAX_NEW_TOKENS = 16


def explore(
    source: Any, model: Any = None, *, adapters: Mapping[str, Any] | None = None, k: int | Sequence[int] | None = None,
    tasks: Sequence[str] | None = None, prompts: Sequence[str] = (), max_new_tokens: int = MAX_NEW_TOKENS, chat: bool = False,
    system: str | None = None,
) -> "Explorer":  # fmt: skip
    """Compare head sets in Jupyter and open single heads; as the last line of a cell it shows itself.

    Args:
        source: a results folder, `ll.load_results(...)`, or a mapping of names, or of (task, method), to `HeadScores` or
            `HeadSet`. Of a `HeadSet` alone the places in it are shown, and K ends at its size.
        model: any HookedTransformer or TransformerBridge; needed for promoted tokens of an adapter, attention on a typed prompt,
            and answers. A results folder shows what was read of its adapters without one.
        adapters: name -> adapter; None = LoFiT's of a results folder, where there are some.
        k: heads of each set: one number, a pair, or None for the usual ones (the preset's; 3 % of all heads; a set's size).
        tasks: of a results folder, or of keys (task, method); None = all.
        prompts: examples to choose from, the first one stands in the field at first; on them the final norm's scale is measured
            that promoted tokens need to be in logits. None given: those kept in a results folder.
        max_new_tokens: limit of an answer, tokens.
        chat: put the typed prompt through the model's chat template; the switch beside it says so and may be moved.
        system: text of the system's turn of a chat; means `chat`.

    Raises:
        InputError: nothing to show, heads of several models, a model of another shape or other weights, an adapter that is none
            or does not fit, a K that a set does not have, or anywidget missing (`pip install "lofit-lens[notebook]"`).
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


class Explorer:
    """What `explore` gives.

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
        self.state = State(source, k)
        self.adapters = dict(adapters or {})
        self._model, self._max_new_tokens, self._system, self._chat = model, max_new_tokens, system, False
        stored = [p["prompt"] for listed in source.attention.values() for p in listed]
        self._prompts = list(dict.fromkeys(prompts or stored))
        self._prompt, self._adapter = next(iter(self._prompts), ""), next(iter(self.adapters), None)
        self._run: PromptRun | None = None
        self._tokens: dict[tuple[str, Head], dict[str, Any]] = {}
        self._error, self._busy, self._version = "", "", 0
        self._view: Any = None

    # ------------------------------------------------------------------------------------- read and set from code

    @property
    def left(self) -> str:
        """Name of the set on the left; may be set to another name, or to (task, method) or (task, method, seed)."""
        return self.state.shown[0].name

    @left.setter
    def left(self, name: str | Sequence[Any]) -> None:
        self.state.show("left", name)
        self._put()

    @property
    def right(self) -> str:
        """Name of the set on the right; may be set as `left`."""
        return self.state.shown[1].name

    @right.setter
    def right(self, name: str | Sequence[Any]) -> None:
        self.state.show("right", name)
        self._put()

    @property
    def names(self) -> tuple[str, ...]:
        """All sets that can be shown."""
        return tuple(self.state.source.entries)

    @property
    def k(self) -> tuple[int, int]:
        """Heads of the left and of the right set; may be set to one number or a pair."""
        return self.state.k

    @k.setter
    def k(self, k: int | Sequence[int]) -> None:
        self.state.set_k(k)
        self._put()

    @property
    def head(self) -> Head | None:
        """The head that is open; may be set to a head, `"L2H5"` or None."""
        return self.state.head

    @head.setter
    def head(self, head: Head | str | Sequence[int] | None) -> None:
        self.state.open(head)
        self._put()

    @property
    def selection(self) -> HeadSet:
        """The heads that the reader marked, in the order of clicking; may be set to any heads of the model."""
        return self.state.selection

    @selection.setter
    def selection(self, heads: HeadSet | Iterable[Any]) -> None:
        self.state.select(heads)
        self._put()

    @property
    def sets(self) -> dict[str, HeadSet]:
        """Name -> top K heads, as shown; one entry where both sides show the same."""
        return self.state.sets

    @property
    def shared(self) -> HeadSet:
        """Heads of both sets, in the left one's order."""
        return self.state.shared

    @property
    def overlap(self) -> pd.Series:
        """The numbers shown: the row of `analysis.overlap` with a = left and b = right."""
        return self.state.overlap

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
        if chat:
            if self._model is None:
                raise InputError("the chat template is the model's: ll.explore(source, model, chat=True)")
            turn_of(tokenizer_of(self._model), as_conversation(self._prompt or "?", self._system))
        self._chat = bool(chat)
        self._put()

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
        """What `run` found last: texts, and attention patterns for `ll.plots.attention_figure`."""
        return self._run

    def table(self, head: Head | str | Sequence[int] | None = None) -> pd.DataFrame:
        """A head (None = the open one) in every ranking: set, task, method, seed, kind, score, rank, of.

        Raises:
            InputError: no head open and none given, or not a head of this model.
        """
        wanted = self.head if head is None else HeadSet([head], shape=self.state.source.shape)[0]
        if wanted is None:
            raise InputError("no head is open; give one, e.g. ex.table('L2H5')")
        return self.state.table(wanted)

    def figure(self) -> go.Figure:
        """The two grids as a figure for a paper, top K and shared heads marked.

        Raises:
            InputError: a set without scores of all heads.
        """
        scores: dict[str, HeadScores] = {}
        for entry in self.state.shown:
            if entry.scores is None:
                raise InputError(
                    f"{entry.name} has no scores of all heads to draw; ll.plots.layer_distribution takes head sets"
                )
            scores[entry.name] = entry.scores
        tops = dict(zip((e.name for e in self.state.shown), self.state.tops, strict=True))
        shared = dict.fromkeys(scores, self.shared)
        return head_grid(scores, tops, marked=shared, marked_label="shared", title=f"{self.left} and {self.right}")

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
                self._model, asked, adapters=chosen, head=self.head, shape=self.state.source.shape,
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

            self._view = View()
            self._view.listen(self._heard)
            self._put(self._error)
        return self._view

    def to_html(self) -> str:
        """The same as static HTML without scripts: what is shown where no widget can be."""
        return static.page(self.state)

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        return f"Explorer({panel.summary(self.state)})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        data, meta = self.widget._repr_mimebundle_()
        return {**data, "text/plain": repr(self), "text/html": self.to_html()}, meta

    def _heard(self, message: Any) -> None:
        """Do what the reader did. What goes wrong is said in the widget, in one line, and logged if it is our fault."""
        try:
            self._do(message)
        except Exception as e:
            self._put(_said(e))
        else:
            self._put()

    def _do(self, message: Any) -> None:
        state = self.state
        match message:
            case {"do": "choose", "side": str(side), "part": str(part), "value": value}:
                state.choose(side, part, value)
            case {"do": "k", "side": str(side), "value": int(k)}:
                state.move_k(side, k)
            case {"do": "link", "value": bool(linked)}:
                state.link(linked)
            case {"do": "click", "head": str(head)}:
                state.click(head)
            case {"do": "close"}:
                state.open(None)
            case {"do": "clear"}:
                state.select([])
            case {"do": "adapter", "value": str(name)}:
                self.adapter = name
            case {"do": "chat", "value": bool(chat)}:
                self.chat = chat
            case {"do": "run", "prompt": str(prompt)}:
                self._prompt = prompt
                self.run()
            case _:
                raise InputError(
                    f"the explorer does not know {message!r}; reload the page, it may be of another version"
                )

    def _put(self, error: str = "") -> None:
        """Show the present state. Every change is shown by this, so that an error stands until the next one."""
        self._error = error
        if self._view is not None:
            self._version += 1
            self._view.put(self._data(), self._shown())

    def _data(self) -> dict[str, Any]:
        heat = [color for _, color in get_colorscale(HEAT)]
        return {"shape": list(self.state.source.shape), "sides": self.state.grids(), "heat": heat}

    def _shown(self) -> dict[str, Any]:
        state, head = self.state, self.head
        shared = {str(h) for h in self.shared}
        tops = [[str(h) for h in top] for top in state.tops]
        return {
            "version": self._version, "choosers": [state.choosers(side) for side in SIDES], "k": list(state.k),
            "linked": state.linked, "own": [[h for h in top if h not in shared] for top in tops], "shared": sorted(shared),
            "overlap": panel.overlap_items(self.overlap.to_dict()), "selection": [str(h) for h in state.selection],
            "head": None if head is None else str(head), "table": None if head is None else panel.head_table(state, head),
            "tokens": [] if head is None else self._readings(head),
            "attention": panel.maps(state, self._run, can_run=self._model is not None),
            "answers": panel.answers(self._run, head, self._adapter, self._chat),
            "prompt": self._prompt, "prompts": self._prompts, "adapters": list(self.adapters), "adapter": self._adapter,
            "chat": self._chat, "has_chat": self._model is not None and has_template(tokenizer_of(self._model)),
            "no_model": panel.NO_MODEL if self._model is None else "", "busy": self._busy, "error": self._error,
        }  # fmt: skip

    def _readings(self, head: Head) -> list[dict[str, Any]]:
        """What is known of this head's edits: as the results have it, else worked out with the model."""
        known = panel.readings(self.state.source, head)
        found = [] if self._model is None else [
            self._read(name, head) for name, adapter in self.adapters.items()
            if name not in known and head in (edited_heads(adapter) or ())
        ]  # fmt: skip
        return [*found, *known.values()]

    def _read(self, name: str, head: Head) -> dict[str, Any]:
        if (name, head) not in self._tokens:
            try:
                found = head_tokens(self._model, self.adapters[name], head, self._prompts)
                self._tokens[name, head] = panel.token_lists(name, found, head)
            except Exception as e:  # one reading that cannot be had must not take the others away
                self._tokens[name, head] = panel.no_tokens(name, _said(e))
        return self._tokens[name, head]


def _said(e: Exception) -> str:
    """An error as one line; one that is no user's is logged as well."""
    text = " ".join(str(e).split())
    if isinstance(e, InputError):
        return text
    log.error("the explorer failed", exc_info=e)
    return f"{type(e).__name__}: {text}"
