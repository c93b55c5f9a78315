"""Evaluate a model as it is: bare, or with interventions attached."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from lofit_lens import io
from lofit_lens.checks import check_is, check_one_of, check_whole, given, shown
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation.batches import TOKEN_BUDGET
from lofit_lens.evaluation.generation import generate
from lofit_lens.evaluation.judges import Judge, judged
from lofit_lens.evaluation.multiple_choice import mc_metrics, option_metrics
from lofit_lens.evaluation.result import EvalResult, Metric
from lofit_lens.evaluation.scoring import count_merges, count_unreached, longest, score_encoded
from lofit_lens.evaluation.stats import RESAMPLES
from lofit_lens.models import backend_of, context_length, model_info, tokenizer_of
from lofit_lens.tasks.base import Task
from lofit_lens.tasks.collate import Encoded, encode, encode_continuations
from lofit_lens.tasks.examples import ChoiceExample, GenerationExample, OptionExample, TestExample
from lofit_lens.tasks.registry import task_of
from lofit_lens.tasks.truthfulqa import before_next_question

TOO_LONG = ("error", "wrong")
YES = 0.5  # an answer counts as true or informative from this verdict on, as in TruthfulQA

Row = tuple[
    dict[str, Any], dict[str, float] | None
]  # stored fields of an item; its metrics, or None if it was too long


def evaluate(
    model: Any,
    task: Task | str,
    *misplaced: Any,
    split: str = "test",
    limit: int | None = None,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    too_long: str = "error",
    judges: Mapping[str, Judge] | None = None,
    label: str = "",
    progress: bool = True,
) -> EvalResult:
    """Run a task's test form on a model with whatever is attached to it.

    Args:
        model: any HookedTransformer or TransformerBridge.
        task: a task or its name. Multiple choice gives mc1, mc2, mc3; options give accuracy and probability; generation gives
            em, accuracy or the scores of the task's own grader. `task.in_form(...)` asks in another form.
        split: `"train"`, `"val"` or `"test"`.
        limit: use only the first rows.
        batch_size: maximum number of prompts generated together (generation tasks); None = as many as the budget allows.
        token_budget: padded tokens of one forward pass, including cached ones; lower it if memory runs out.
        too_long: treatment of items that exceed the model's context: `"error"`, or `"wrong"`, which counts them as failed
            (0 in every metric) without running them and says how many there were.
        judges: name -> judge of the generated answers (generation tasks); each becomes a metric. An answer can be true by saying
            nothing. With a judge called `"truth"`, the result therefore also has `"truth and info"` if there is a judge `"info"`,
            or else `"truth and answered"` if the task's grader counts non-answers (TruthfulQA): the share of answers with both,
            where a verdict of 0.5 or more counts as yes.
        label: stored in the result, e.g. `"LoFiT K=32"`.
        progress: show a bar.

    Raises:
        InputError: an unknown or empty split, a limit or size below 1, a grader that lacks a number for a metric, a judge for a
            task that is not generated or with a metric's name, or a chat with a model that has no chat template.
        DataError: an item longer than the model's context; names its number.
    """
    if misplaced:
        raise InputError(
            f"evaluate takes a model and a task, and was given {shown(misplaced[0])} as well; evaluate an adapter inside "
            "`with adapter.attached(model):`, and name all settings (split=..., limit=...)"
        )
    backend_of(model)
    check_one_of("too_long", too_long, TOO_LONG)
    check_whole(1, token_budget=token_budget, **given(batch_size=batch_size))
    check_is(judges, (Mapping, type(None)), "judges", "name -> judge")
    check_is(label, str, "label", "a text")
    task = task_of(task).asked_of(model)
    examples = task.examples(split, limit=limit)
    if not examples:
        raise InputError(f"{task.name} has no {split} rows; evaluate another split")
    counted = {k: n for k, n in task.counted.items() if k.startswith(f"{split}:")}
    if isinstance(examples[0], GenerationExample):
        rows = _generations(model, task, examples, batch_size, token_budget, too_long, progress)
        _judge(rows, examples, judges or {})
    elif judges:
        raise InputError(
            f"judges read generated answers, but {task.name} is scored by log-prob; evaluate its generation form"
        )
    else:
        rows = _scored(model, task, examples, token_budget, too_long, counted, progress)
    names = _names(model, task, rows)
    zero = dict.fromkeys(names, 0.0)
    items = pd.DataFrame([
        {"item": i + 1, "group": e.group, **kept, **(found or zero), "correct": (found or zero)[task.metric] == 1.0}
        for i, (e, (kept, found)) in enumerate(zip(examples, rows, strict=True))
    ])  # fmt: skip
    if n := sum(found is None for _, found in rows):
        counted["too long, counted as wrong"] = n
    config = {
        "limit": limit, "batch_size": batch_size, "token_budget": token_budget, "max_new_tokens": task.max_new_tokens,
        "too_long": too_long, "judges": {n: getattr(j, "__qualname__", None) or repr(j) for n, j in (judges or {}).items()},
        **({} if task.chat is None else {"chat": asdict(task.chat)}),
        "bootstrap": {"resamples": RESAMPLES, "level": 0.95, "seed": 0},
    }  # fmt: skip
    return EvalResult(
        task=task.name, split=split, metrics={name: Metric.of(items[name].tolist()) for name in names}, items=items,
        form=task.form, label=label, model=model_info(model), data_hash=task.data_hash, split_hash=task.hashes.get(split, ""),
        counted=counted, config=config, versions=io.environment(),
    )  # fmt: skip


def _names(model: Any, task: Task, rows: Sequence[Row]) -> list[str]:
    """Names of all metrics, the task's own first."""
    graded = next((found for _, found in rows if found is not None), None)
    if graded is None:
        raise DataError(f"every item of {task.name} is longer than the context of {model.cfg.model_name}")
    for i, (_, found) in enumerate(rows):
        if found is not None and (found.keys() != graded.keys() or not all(map(math.isfinite, found.values()))):
            raise InputError(
                f"item {i + 1} of {task.name} was graded {found}; every item needs a number for each of {', '.join(graded)}"
            )
    if task.metric not in graded:
        raise InputError(
            f"the grader of {task.name} gives {', '.join(graded)}, but the task's metric is {task.metric!r}; "
            "name one of them as metric"
        )
    if taken := [n for n in graded if n in (*rows[0][0], "item", "group", "correct")]:
        raise InputError(
            f"a metric or judge of {task.name} is called {taken[0]!r}, like a column of the items; rename it"
        )
    return sorted(graded, key=lambda n: (n != task.metric, n))


def _refuse(model: Any, task: Task, item: int, tokens: int) -> DataError:
    return DataError(
        f"item {item + 1} of {task.name} needs {tokens} tokens; the context of {model.cfg.model_name} is "
        f"{context_length(model)}: shorten it, or count such items as wrong (too_long='wrong', --too-long wrong)"
    )


def _scored(
    model: Any, task: Task, examples: Sequence[TestExample], token_budget: int, too_long: str, counted: dict[str, int],
    progress: bool,
) -> list[Row]:  # fmt: skip
    tokenizer, limit = tokenizer_of(model), context_length(model)
    encoded: list[Sequence[Encoded]] = [encode_continuations(tokenizer, e.prompt, _answers(e)) for e in examples]
    fits = [longest(answers) <= limit for answers in encoded]
    if too_long == "error" and not all(fits):
        item = fits.index(False)
        raise _refuse(model, task, item, longest(encoded[item]))
    run = [answers if ok else () for answers, ok in zip(encoded, fits, strict=True)]
    if merged := count_merges(run):
        counted["answers sharing a token with their prompt"] = merged
    if unreached := count_unreached(model, run):
        counted["answers that the edit cannot reach"] = unreached
    scores = score_encoded(model, run, token_budget=token_budget, progress=progress)
    return [_row(e, s if ok else None) for e, s, ok in zip(examples, scores, fits, strict=True)]


def _answers(example: TestExample) -> tuple[str, ...]:
    if isinstance(example, OptionExample):
        return example.options
    assert isinstance(example, ChoiceExample)
    return tuple(dict.fromkeys((example.best, *example.true, *example.false)))  # without duplicates


def _row(example: TestExample, scores: list[float] | None) -> Row:
    if isinstance(example, OptionExample):
        kept = {"prompt": example.prompt, "options": list(example.options), "right": example.right, "scores": scores}
        return kept, None if scores is None else option_metrics(scores, example.right)
    assert isinstance(example, ChoiceExample)
    kept = {"prompt": example.prompt, "best": example.best, "true": list(example.true), "false": list(example.false)}
    if scores is None:
        return kept | {"score_best": None, "scores_true": None, "scores_false": None}, None
    by_text = dict(zip(_answers(example), scores, strict=True))
    best, true, false = by_text[example.best], [by_text[a] for a in example.true], [by_text[a] for a in example.false]
    return kept | {"score_best": best, "scores_true": true, "scores_false": false}, mc_metrics(best, true, false)


def _generations(
    model: Any, task: Task, examples: Sequence[TestExample], batch_size: int | None, token_budget: int, too_long: str,
    progress: bool,
) -> list[Row]:  # fmt: skip
    asked = [e for e in examples if isinstance(e, GenerationExample)]
    assert task.grade is not None
    room = context_length(model) - task.max_new_tokens
    lengths = [len(encode(tokenizer_of(model), e.prompt)) for e in asked]
    if too_long == "error" and max(lengths) > room:
        item = next(i for i, n in enumerate(lengths) if n > room)
        raise _refuse(model, task, item, lengths[item] + task.max_new_tokens)
    run = [e.prompt for e, n in zip(asked, lengths, strict=True) if n <= room]
    said = iter(
        generate(
            model,
            run,
            max_new_tokens=task.max_new_tokens,
            batch_size=batch_size,
            token_budget=token_budget,
            progress=progress,
        )
        if run
        else ()
    )
    rows: list[Row] = []
    for e, n in zip(asked, lengths, strict=True):
        text = next(said) if n <= room else None
        kept = {"prompt": e.prompt, "generated": text, "references": list(e.references)}
        rows.append((kept, None if text is None else task.grade(text, e)))
    return rows


def _judge(rows: Sequence[Row], examples: Sequence[TestExample], judges: Mapping[str, Judge]) -> None:
    """Add each judge's verdict on every answer to the answer's metrics."""
    heard = [
        (e.question or e.prompt, before_next_question(kept["generated"]), found)
        for e, (kept, found) in zip(examples, rows, strict=True)
        if found is not None and isinstance(e, GenerationExample)
    ]
    for name, judge in judges.items():
        if any(name in found for *_, found in heard):
            raise InputError(f"a metric is already called {name!r}; give the judge another name")
        verdicts = judged(name, judge, [q for q, *_ in heard], [a for _, a, _ in heard])
        for (*_, found), verdict in zip(heard, verdicts, strict=True):
            found[name] = verdict
    other = "info" if "info" in judges else "answered"
    for *_, found in heard:
        if "truth" in judges and other in found:
            found[f"truth and {other}"] = float(found["truth"] >= YES and found[other] >= YES)
