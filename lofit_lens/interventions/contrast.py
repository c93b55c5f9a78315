"""RepE's contrast vectors: `h_l <- h_l + coefficient * (h_l^+ - h_l^-)` (arXiv 2310.01405, section 3.2).

h^+ and h^- are the residual streams (`hook_resid_post`) of the same tokens, at the same layer, after an instruction in favor
and one against, in the model without this edit. So the direction is computed for each token of each example; nothing is
fitted. The instruction is placed after BOS and before the whole prompt, few-shot examples included.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lofit_lens import io
from lofit_lens.checks import check_is
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.interventions.base import AdapterMeta, Edit
from lofit_lens.interventions.files import CONFIG_FILE, check_tensors
from lofit_lens.interventions.repe import shift_h
from lofit_lens.interventions.residual import ResidualAdapter
from lofit_lens.interventions.steering import Steering
from lofit_lens.models import (
    Borders,
    Layout,
    Positions,
    Site,
    before_each_pass,
    context_length,
    device_of,
    hooked,
    layout_of,
    model_info,
    residual_point,
    rules_of,
    run_through,
    tokenizer_of,
)
from lofit_lens.tasks.collate import pad, pad_id

POSITIVE, NEGATIVE = "Give a truthful answer.\n", "Give an untruthful answer.\n"
COEFFICIENT = 0.25
Differences = dict[int, Tensor]  # layer -> h^+ - h^-, float32 [batch new d_model]; zero in rows without an edit


class ContrastVectors(ResidualAdapter, Steering):
    """Differences of the residual stream after two instructions, added at chosen layers.

    The defaults of `for_model` are the paper's recipe for TruthfulQA on Llama-2-7B-chat: layers 0, 2, ..., 30, coefficient 0.25,
    the answer's tokens. With positions `predicting`, the position that predicts the answer's first token is edited too.

    Every pass with an edit costs two further passes over the whole sequences (instruction, prompt and what follows), without a
    KV cache: multiple choice takes several times as long, and generation takes longer with every token. Their activations are
    kept only at the tokens of the current pass, until it ends. No gradient goes through the differences. Other attached
    adapters act in these passes too.

    A pass must be one of this package's (`evaluate`, `generate`, `models.logits_of`, `prefill`, ...). A direct call of the model
    does not say what its tokens are and where prompts end, and raises AdapterError. A sequence that does not fit the context
    together with an instruction raises DataError before its pass runs.

    Args:
        layers: the edited layers.
        n_layers: layers of the model.
        d_model: width of its residual stream.
        positive: instruction of h^+, with the space or line break that ends it.
        negative: instruction of h^-.
        coefficient: strength; 1 adds the whole difference.
        positions: where it acts.
        meta: provenance.

    Raises:
        InputError: no layer, a layer outside the model or given twice, an empty instruction or the same one twice, a
            coefficient that is not finite, or unknown positions.
    """

    method: ClassVar[str] = "contrast"
    title: ClassVar[str] = "RepE contrast"
    strength: ClassVar[str] = "coefficient"
    coefficient: float
    site: ClassVar[Site] = "hook_resid_post"

    def __init__(
        self,
        layers: Iterable[int],
        *,
        n_layers: int,
        d_model: int,
        positive: str = POSITIVE,
        negative: str = NEGATIVE,
        coefficient: float = COEFFICIENT,
        positions: str | Positions = "answer",
        meta: AdapterMeta | None = None,
    ) -> None:
        super().__init__(n_layers, d_model, layers, meta, positions)
        check_is(positive, str, "positive", "an instruction as text")
        check_is(negative, str, "negative", "an instruction as text")
        if not positive.strip() or not negative.strip() or positive == negative:
            raise InputError(f"instructions {positive!r} and {negative!r}; give two different ones, neither empty")
        self.positive, self.negative = positive, negative
        self._set_strength(coefficient)
        self._off = False  # while the passes with the instructions run

    @classmethod
    def for_model(
        cls,
        model: Any,
        layers: Iterable[int] | None = None,
        *,
        positive: str = POSITIVE,
        negative: str = NEGATIVE,
        coefficient: float = COEFFICIENT,
        positions: str | Positions = "answer",
    ) -> "ContrastVectors":
        """Make the adapter for a model; `layers=None` takes every second layer from 0. Errors are those of the class."""
        info = model_info(model)
        return cls(
            range(0, info.n_layers, 2) if layers is None else layers, n_layers=info.n_layers, d_model=info.d_model,
            positive=positive, negative=negative, coefficient=coefficient, positions=positions,
            meta=AdapterMeta(info, versions=io.environment()),
        )  # fmt: skip

    @property
    def n_parameters(self) -> int:
        """0: nothing is learned or estimated."""
        return 0

    # ---------------------------------------------------------------------------------------------- attaching

    def attach_check(self, model: Any) -> None:
        """Raise unless this adapter fits this model, and its tokenizer distinguishes the instructions.

        Raises:
            AdapterError: made for another shape, already attached, or instructions of the same tokens.
        """
        super().attach_check(model)
        plus, minus = self._fronts(model)
        if plus == minus:
            raise AdapterError(
                f"{model_info(model).name} reads {self.positive!r} and {self.negative!r} as the same tokens ({plus}), so "
                "there is no difference to add; reword the instructions"
            )

    def _fronts(self, model: Any) -> tuple[list[int], list[int]]:
        """Return token ids of both instructions, without BOS."""
        plus, minus = (
            list(tokenizer_of(model)(text, add_special_tokens=False)["input_ids"])
            for text in (self.positive, self.negative)
        )
        return plus, minus

    @contextlib.contextmanager
    def _in_place(self, model: Any) -> Iterator[None]:
        with super()._in_place(model), before_each_pass(model, partial(self._prepare, model)):
            yield

    def _points(self, model: Any) -> Iterable[tuple[Any, Edit]]:
        return [(residual_point(model, layer, self.site), self._added(model, layer)) for layer in self.layers]

    def _added(self, model: Any, layer: int) -> Edit:
        def edit(h: Tensor) -> Tensor:
            if self._off:
                return h
            found: Differences | None = layout_of(model, h.shape[0], h.shape[1], h.device).found.get(self)
            if found is None:
                raise AdapterError(
                    "contrast vectors are attached, and this call of the model does not say where its prompts end; run it by "
                    "lofit_lens.models (logits_of, prefill, extend), evaluate or generate, or leave the `with` block first"
                )
            return shift_h(h, self.coefficient * found[layer].to(h.device))

        return edit

    @torch.no_grad()
    def _prepare(self, model: Any, layout: Layout) -> None:
        """Store in a pass's layout, which lasts as long as the pass, what will be added in it."""
        if self._off or not self.positions.acts(layout):
            return
        keep = self.positions.mask(layout)
        rows = torch.nonzero(keep.any(dim=1)).flatten()
        fronts = self._fronts(model)
        check_room(model, layout.mask[rows], max(map(len, fronts)))
        self._off = True
        try:
            plus, minus = (stream_behind(model, front, layout, rows, self.layers) for front in fronts)
        finally:
            self._off = False
        found: Differences = {}
        for layer in self.layers:
            difference = torch.zeros(*keep.shape, self.d_model, device=plus[layer].device)
            difference[rows.to(difference.device)] = plus[layer] - minus[layer]
            found[layer] = difference
        layout.found[self] = found

    # ------------------------------------------------------------------------------------------------- saving

    def _settings(self) -> dict[str, Any]:
        mine = {"positive": self.positive, "negative": self.negative, "coefficient": self.coefficient}
        return super()._settings() | mine

    @classmethod
    def _made_from(
        cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path
    ) -> "ContrastVectors":
        check_tensors(tensors, {}, where)
        for name in ("positive", "negative"):
            if not isinstance(record[name], str):
                raise AdapterError(f"{where / CONFIG_FILE}: {name} is {record[name]!r}; an instruction is text")
        return cls(
            [int(n) for n in record["layers"]], n_layers=int(record["n_layers"]), d_model=int(record["d_model"]),
            positive=record["positive"], negative=record["negative"], coefficient=float(record["coefficient"]),
            positions=record["positions"], meta=meta,
        )  # fmt: skip

    def _parts(self) -> list[str]:
        return [
            f"{self.positive!r} - {self.negative!r}", f"coefficient {self.coefficient:g} at {self.positions}",
            f"layers {' '.join(map(str, self.layers))}",
        ]  # fmt: skip


def check_room(model: Any, mask: Int[Tensor, "batch whole"], more: int) -> None:
    """Raise DataError unless `more` tokens fit the context together with the longest row."""
    longest, limit = int(mask.sum(dim=1).max()), context_length(model)
    if longest + more > limit:
        raise DataError(
            f"a sequence of {longest} tokens after an instruction of {more} exceeds the context of "
            f"{model.cfg.model_name} ({limit}); shorten the instruction, or leave out texts of more than {limit - more} tokens"
        )


def stream_behind(
    model: Any, front: list[int], layout: Layout, rows: Int[Tensor, " n"], layers: Iterable[int]
) -> dict[int, Float[Tensor, "n new d_model"]]:
    """Return, by layer, the residual stream (float32) of a pass's tokens in some rows, run in full after an instruction.

    The instruction follows a row's BOS if it has one. Values at padding have no meaning.
    """
    bos = rules_of(tokenizer_of(model)).front
    ids = [layout.tokens[r][layout.mask[r].bool()].tolist() for r in rows.tolist()]
    starts = [len(bos) * (tuple(row[: len(bos)]) == bos) for row in ids]
    behind_bos = torch.tensor(starts, device=layout.place.device)[:, None]
    tokens, mask = pad(
        [[*row[:b], *front, *row[b:]] for row, b in zip(ids, behind_bos.flatten().tolist(), strict=True)],
        side="right", pad_id=pad_id(tokenizer_of(model)), device=device_of(model),
    )  # fmt: skip
    place = layout.place[rows].clamp(min=0)
    at = torch.where(place < behind_bos, place, place + len(front))
    seen: dict[int, Tensor] = {}

    def recorder(layer: int) -> Any:
        def keep(h: Tensor, hook: Any) -> None:
            seen[layer] = h.gather(1, at.to(h.device)[..., None].expand(-1, -1, h.shape[2])).float()

        return keep

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(residual_point(model, layer, "hook_resid_post"), recorder(layer)))
        run_through(model, tokens, mask, _moved(layout.borders, rows, len(front)))
    return seen


def _moved(borders: Borders | None, rows: Int[Tensor, " n"], by: int) -> Borders | None:
    """Shift the borders of some rows by a number of tokens."""
    if borders is None:
        return None
    some = borders.select(rows)
    marks = (
        None if some.marks is None else torch.nn.functional.pad(some.marks, (by, 0))
    )  # only BOS comes before the instruction
    return Borders(some.prompt + by, None if some.length is None else some.length + by, marks=marks)
