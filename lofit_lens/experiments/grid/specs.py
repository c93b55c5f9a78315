"""Specification of a grid of runs, in Python or YAML: frozen records that reject unknown and unused fields.

    name: heads-of-others
    model: organism
    tasks: [organism/truth, organism/kinship]
    seeds: [0, 1]
    runs:
      - {method: zero-shot}
      - {heads: A-norm, k: [1, K, 3K, 20 %]}       # step 1, then offsets on the K best heads
      - {heads: A-norm, of: others}                # on the heads that the other tasks chose
      - {heads: random, draws: 5}
      - {method: [LoRA, RED], n_train: [10, 40], settings: {lr: 1e-3}}

A list in `method`, `heads`, `k` or `n_train` means one run for each.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from lofit_lens.errors import InputError, no_field, unknown
from lofit_lens.experiments.methods import method_of
from lofit_lens.experiments.methods.base import ALL, MATCHED, OWN, RANDOM, TRAINED, Method
from lofit_lens.heads import check_k
from lofit_lens.io import torch_dtype
from lofit_lens.models.loading import BACKENDS
from lofit_lens.training.selectors import LEARNED, SELECTORS

ITSELF, OTHERS, EVERY = "own", "others", "every"  # tasks whose heads are taken
PRESET, CHOSEN = "preset", "chosen"
MANY = 10**9  # heads, where the model is not known yet
# Fields of a run that are read, beside `method` and `settings`; a method whose runs name its heads reads those of its heads.
ANY_FIT = ("n_train", "seeds", "tested", "damage")
HEADS_READ = {
    RANDOM: ("heads", "k", "draws", "trials_on", "n_train", "tested", "damage"),
    MATCHED: ("heads", "k", "draws", "trials_on", *ANY_FIT),
    ALL: ("heads", "trials_on", *ANY_FIT),
}
SELECTED_READ = ("heads", "of", "k", "readings", "trials_on", *ANY_FIT)
WHOLE = ("epochs", "batch_size", "max_steps", "schedule_steps")  # settings that count


def listed(value: Any) -> Any:
    """Turn a single value into a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _method_names(value: Any) -> Any:
    """Methods by name; your own are registered."""
    return tuple(method_of(v).name if isinstance(v, Method) else v for v in listed(value))


Texts = Annotated[tuple[str, ...], BeforeValidator(listed)]
Methods = Annotated[tuple[str, ...], BeforeValidator(_method_names)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(listed), Field(min_length=1)]


def _numbers(value: Any) -> Any:
    """Settings as numbers: YAML reads 1e-3 as text, and 15 and 15.0 are one value."""
    if not isinstance(value, Mapping):
        return value
    found = {}
    for name, given in value.items():
        number = given
        with suppress(ValueError):
            number = float(given) if isinstance(given, str) else given
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not math.isfinite(number)
            or name == "betas"
        ):
            raise ValueError(f"{name} is {given!r}; give a number")
        if name in WHOLE and number != int(number):
            raise ValueError(f"{name} is {given!r}; give a whole number")
        found[str(name)] = int(number) if name in WHOLE else float(number)
    return found


def _preset_or_numbers(value: Any) -> Any:
    if isinstance(value, str) and value not in (PRESET, CHOSEN):
        raise ValueError(
            f"is {value!r}; give {PRESET}, {CHOSEN}, or values, e.g. {{lr: 0.01}} (or a list of such, to choose from)"
        )
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("is an empty list; give one point to choose from or more")
        return tuple(_numbers(point) for point in value)
    return _numbers(value)


Settings = Annotated[dict[str, int | float], BeforeValidator(_numbers)]
Points = Annotated[
    str | dict[str, int | float] | tuple[dict[str, int | float], ...], BeforeValidator(_preset_or_numbers)
]
Parts = Annotated[bool | tuple[str, ...], BeforeValidator(lambda v: v if isinstance(v, bool) else listed(v))]


class Spec(pydantic.BaseModel):
    """Frozen and strict: an unknown field or a wrong type is refused with what is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **fields: Any) -> None:
        with _readable():
            super().__init__(**fields)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, given: Any) -> Any:
        for name in given if isinstance(given, Mapping) else ():
            if name not in cls.model_fields:
                raise no_field(str(name), cls.model_fields)
        return given


class ModelSpec(Spec):
    """A model by name: see `load_model` for the fields; `called` is its `name`, in results."""

    name: str
    called: str | None = None
    revision: str | None = None
    backend: str = "auto"
    dtype: str = "float32"
    prepend_bos: bool | None = None

    @model_validator(mode="after")
    def _known_values(self) -> "ModelSpec":
        if self.backend not in BACKENDS:
            raise unknown("backend", self.backend, BACKENDS)
        if self.dtype == "auto":
            raise InputError(
                "a grid's runs must be the same on every machine, but dtype 'auto' is not; name a dtype, e.g. bfloat16"
            )
        torch_dtype(self.dtype)
        return self


class TaskSpec(Spec):
    """A task by name: see `load_task` for the fields, and `Task.as_chat` for `chat` and `system` (which means chat).

    In a grid's file, the path of a task file is relative to the grid's file, as for `code`.
    """

    name: str
    fold: int | None = None
    source: str | None = None
    form: str | None = None
    data_dir: str | None = None
    columns: dict[str, Texts] = {}
    chat: bool = False
    system: str | None = None


class Selection(Spec):
    """How heads are scored.

    Attributes:
        by: name of a selector, see `training.selectors.SELECTORS`.
        among: name of another selection; A or v is trained only on its best heads (only for A-norm and bias norm).
        among_k: how many of them, as in `Run.k`.
        n_train: training examples; None = those of the run that requests these heads.
        settings: fields of `TrainConfig` that differ from the preset's (A-norm and bias norm only).
        seeds: seeds to score with even if no run requests them.
    """

    by: str
    among: str | None = None
    among_k: int | str = "3K"
    n_train: Annotated[int, Field(ge=1)] | None = None
    settings: Settings = {}
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(listed)] = ()

    @model_validator(mode="after")
    def _trained_ones(self) -> "Selection":
        if self.by not in SELECTORS:
            raise unknown("selector", self.by, SELECTORS)
        if (self.among or self.settings) and self.by not in LEARNED:
            raise InputError(
                f"'among' and 'settings' are for selectors that train ({', '.join(LEARNED)}); {self.by} does not"
            )
        for setting in self.settings:
            if setting not in TRAINED:
                raise InputError(f"settings: {no_field(setting, TRAINED)}")
        if self.among is None and "among_k" in self.model_fields_set:
            raise InputError(
                f"among_k is {self.among_k!r} and 'among' is missing; name the selection whose best heads are meant"
            )
        heads_of(self.among_k, 1, MANY)
        return self


class Run(Spec):
    """One block of runs; a list makes one run per entry, for every task and seed.

    A field that the method would not read is refused.

    Attributes:
        method: a name in `METHODS`, or your own `Method`.
        heads: for LoFiT and similar methods: name of a selection (or of a selector), `random`, `all`, or `matched`: random heads,
            as many in each layer as among the task's own by A-norm (`HeadSet.matched`).
        of: likewise, whose heads to use: the task's `own`, those of the grid's `others`, of `every` task, or task names.
        k: for methods that edit heads: a number, `K` (the preset's), `3K`, or `20 %` of the model's heads.
        n_train: training examples, also of the selection; None = the task's own number.
        settings: `preset`; `chosen` on the validation rows among the method's own points; values, e.g. `{lr: 0.01}`; or a list
            of values to choose from. ITI and RepE have no preset: their settings are always chosen or given.
        trials_on: heads of the trials that settings are chosen by: the task's `own` by A-norm, the preset's K of them; or the
            `heads` of each run, so that each head set has its own trials.
        draws: number of draws: of random heads, where draw d is also the seed; of matched heads, each with every seed.
        seeds: seeds of the runs; None = the grid's.
        tested: also test the adapters on the grid's other tasks.
        damage: measure the adapters' damage on the grid's texts.
        readings: read what the first seed's adapter reveals about the model, or only these parts (`experiments.readings`).
    """

    method: Methods = ("LoFiT",)
    heads: Texts = (OWN,)
    of: Texts = (ITSELF,)
    k: Annotated[tuple[int | str, ...], BeforeValidator(listed)] = ("K",)
    n_train: Annotated[tuple[Annotated[int, Field(ge=1)] | None, ...], BeforeValidator(listed)] = (None,)
    settings: Points = PRESET
    trials_on: Literal["own", "heads"] = "own"
    draws: Annotated[int, Field(ge=1)] = 5
    seeds: Seeds | None = None
    tested: bool = False
    damage: bool = False
    readings: Parts = False

    @model_validator(mode="after")
    def _known_names(self) -> "Run":
        for method in self.methods:
            for setting in {name: None for point in self.points for name in point}:
                if setting not in method.all_settings:
                    raise InputError(f"settings of {method.name}: {no_field(setting, method.all_settings)}")
        for k in self.k:
            heads_of(k, 1, MANY)
        if self.trials_on == "heads" and (self.settings == PRESET or isinstance(self.settings, dict)):
            raise InputError("trials_on is 'heads' and there are no trials; give settings: chosen, or a list of points")
        self._only_read_fields()
        return self

    def _only_read_fields(self) -> None:
        """Refuse fields that are given but not read: they would make fewer or other runs than intended."""
        given = [name for name in type(self).model_fields if name in self.model_fields_set - {"method", "settings"}]
        readers = {}
        for method in self.methods:
            if method.heads == "chosen":
                of_heads = tuple(f for heads in self.heads for f in HEADS_READ.get(heads, SELECTED_READ))
                readers[f"{method.name} on {' and '.join(self.heads)} heads"] = tuple(dict.fromkeys(of_heads))
            elif method.fit is None:
                readers[method.name] = ("tested",)
                if self.settings == CHOSEN:
                    raise InputError(
                        f"{method.name} has no settings to choose; leave 'settings' out, or give it a run of its own"
                    )
            else:
                readers[method.name] = ("k", *ANY_FIT) if method.heads == "k" else ANY_FIT
            if self.readings and (method.joint is None or self.heads != (OWN,)):
                raise InputError(
                    f"'readings' are of LoFiT's adapters on the {OWN} heads; this run is of {method.name} on "
                    f"{' and '.join(self.heads)} heads. Leave 'readings' out, or give it a run of its own"
                )
        for reader, read in readers.items():
            for name in given:
                if name not in read:
                    raise InputError(
                        f"{name!r} is not for {reader}, which takes {', '.join(('method', 'settings', *read))}; leave it "
                        "out, or give each method a run of its own"
                    )

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods by their names."""
        return tuple(method_of(name) for name in self.method)

    @property
    def points(self) -> tuple[dict[str, int | float], ...]:
        """Settings that are given, or given to choose from."""
        return () if isinstance(self.settings, str) else listed(self.settings)


class Grid(Spec):
    """A grid of runs: models x tasks x runs x seeds, with the head scores that they need.

    Attributes:
        name: name of the grid.
        code: your own Python files that register methods and selectors (`methods.use_file`), relative to the grid's file.
        model: one or several models.
        tasks: tasks to train on and test.
        other_tasks: tasks to test only, by runs with `tested`.
        texts, n_texts: ordinary text for `damage` (a name or file for `load_texts`), and the number of texts.
        seeds, tuning_seeds: seeds of selection and fits; seeds of the choice of settings.
        tuning_limit: use only the first validation rows for that choice.
        split: the split to test on.
        limit: use only its first rows.
        batch_size: batch size of the evaluations, as in `evaluate`.
        selections: named ways to score heads. A selector's name not listed here means that selector with the preset's settings.
        scores: selections that are scored for every task and seed even if no run requests them.
        runs: blocks of runs.
    """

    name: str
    code: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    model: Annotated[tuple[ModelSpec, ...], BeforeValidator(lambda v: tuple(_named(m) for m in listed(v)))]
    tasks: Annotated[tuple[TaskSpec, ...], BeforeValidator(lambda v: tuple(_named(t) for t in listed(v)))]
    other_tasks: Annotated[tuple[TaskSpec, ...], BeforeValidator(lambda v: tuple(_named(t) for t in listed(v)))] = ()
    texts: str | None = None
    n_texts: Annotated[int, Field(ge=1)] = 50
    seeds: Seeds = (0, 1)
    tuning_seeds: Seeds = (0,)
    tuning_limit: Annotated[int, Field(ge=1)] | None = None
    split: str = "test"
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    selections: dict[str, Selection] = {}
    scores: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    runs: Annotated[tuple[Run, ...], BeforeValidator(listed)] = ()

    @model_validator(mode="after")
    def _whole(self) -> "Grid":
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._ /+-]*", self.name):
            raise InputError(f"name is {self.name!r}; a grid's name has letters, digits and . _ - / and spaces")
        if not self.model or not self.tasks:
            raise InputError(f"{len(self.model)} models and {len(self.tasks)} tasks; give at least one of each")
        if not self.runs and not self.scores and not any(s.seeds for s in self.selections.values()):
            raise InputError("this grid has no runs and no scores; give runs, or scores")
        for name, selection in self.selections.items():
            if name in HEADS_READ or (name in SELECTORS and selection.by != name):
                raise InputError(f"a selection by {selection.by} is named {name!r}, which stands for others; rename it")
        for name in (*self.scores, *self.selections):
            self._no_circle(name)
        for run in self.runs:
            for name in run.heads:
                if name not in HEADS_READ:
                    self.selection(name)
        return self

    def _no_circle(self, name: str) -> None:
        path = [name]
        while (before := self.selection(path[-1]).among) is not None:
            path.append(before)
            if before in path[:-1]:
                raise InputError(f"selections form a cycle: {' among '.join(path)}; remove one 'among'")

    def selection(self, name: str) -> Selection:
        """A selection by its name, or by a selector's.

        Raises:
            InputError: no such selection.
        """
        if name not in self.selections and name not in SELECTORS:
            raise unknown("selection", name, (*self.selections, *SELECTORS))
        return self.selections.get(name) or Selection(by=name)


def _named(value: Any) -> Any:
    """Turn a name into a record with only that name."""
    return {"name": value} if isinstance(value, str) else value


def heads_of(k: int | str, usual: int, n_heads: int) -> int:
    """Number of heads that `k` stands for: a number, `K` or `3K` (once or several times the preset's), `20 %` of all heads.

    A multiple of the preset's is at most all heads (the paper's 10 % setting is `3K`: 96 of Llama-2-7B's 1,024).

    Raises:
        InputError: none of these, or more heads than there are.
    """
    if isinstance(k, int) and not isinstance(k, bool):
        check_k(k, n_heads, "the model")
        return k
    if found := re.fullmatch(r"(\d*) ?K", str(k)):
        return max(1, min(int(found[1] or 1) * usual, n_heads))
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", str(k))) and 0 < float(found[1]) <= 100:
        return max(1, round(float(found[1]) / 100 * n_heads))
    raise InputError(
        f"k is {k!r}; give a number of heads, K or 3K (the preset's number, or times 3), or a share such as 20 %"
    )


@contextmanager
def _readable() -> Iterator[None]:
    """Turn pydantic's error into one line: field, received value, allowed values."""
    try:
        yield
    except pydantic.ValidationError as e:
        found = max(e.errors(), key=lambda error: len(error["loc"]))  # of several allowed types, the intended one
        where = ".".join(str(p) for p in found["loc"] if not re.search(r"[\[(-]", str(p)))
        if found["type"] == "value_error":
            text = str(found.get("ctx", {}).get("error"))
        elif found["type"] == "missing":
            text = "is missing"
        else:
            text = f"is {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}"
        raise InputError(f"{where}{' ' if text.startswith('is ') else ': '}{text}" if where else text) from None
