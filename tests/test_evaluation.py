"""Evaluation: multiple choice by hand, scoring and decoding against slow loops, results with every item."""

import json
import math
from dataclasses import replace

import pytest
import torch

from lofit_lens import Task, evaluate, generate
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation import mc_metrics, score_continuations
from lofit_lens.evaluation.generation import decode_ids
from lofit_lens.models import logits_of, tokenizer_of
from lofit_lens.tasks import ChoiceExample
from tests.adapters import random_adapter

PREFIXES = [
    "Q: Ann?\nA:",
    'Read the following story about a family. "Ann asked her son" A:',
    "",
    "the capital of France is Ro",
    "Q",
]
ANSWERS = [
    [" mother", " aunt and uncle of the family", " I have no comment."], [" son", " a"], ["Rome", "country of France"],
    ["me", "ad"], [": In what country was the person who the author worked under a citizen?"],
]  # fmt: skip


def ids_of(model, text):
    return [1, *tokenizer_of(model)(text, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def last_logits(model, ids):
    tokens = torch.tensor([ids])
    return logits_of(model, tokens, torch.ones_like(tokens))[0]


def slow_score(model, prefix, answer):
    """One plain full forward; the answer starts where the joined ids leave the prefix's own."""
    front, whole = ids_of(model, prefix), ids_of(model, prefix + answer)
    start = next(i for i, token in enumerate(whole) if i >= len(front) or token != front[i])
    scores = last_logits(model, whole).log_softmax(-1)
    return sum(scores[i - 1, whole[i]].item() for i in range(start, len(whole)))


# ------------------------------------------------------------------------------------------------ multiple choice


def test_multiple_choice_by_hand():
    """Probabilities .4 and .1 against .2 and .3, best .4."""
    found = mc_metrics(math.log(0.4), [math.log(0.4), math.log(0.1)], [math.log(0.2), math.log(0.3)])
    # .4 > .3: MC1 = 1. (.4 + .1) / (.4 + .1 + .2 + .3) = .5. Of .4 and .1 one is above .3: MC3 = 1/2.
    assert found == pytest.approx({"mc1": 1.0, "mc2": 0.5, "mc3": 0.5})


def test_the_best_answer_is_its_own_score():
    """MC1 asks for the best answer, not for any true one."""
    assert mc_metrics(-5.0, [-1.0, -5.0], [-2.0])["mc1"] == 0.0
    assert mc_metrics(-1.0, [-5.0], [-2.0])["mc1"] == 1.0


def test_ties_do_not_count():
    """Above is strict, in MC1 and MC3."""
    assert mc_metrics(-2.0, [-2.0, -1.0], [-2.0, -3.0]) == pytest.approx(
        # e^-2 + e^-1 over that + e^-2 + e^-3; of -2 and -1, only -1 is above -2.
        {
            "mc1": 0.0,
            "mc3": 0.5,
            "mc2": (math.exp(-2) + math.exp(-1)) / (2 * math.exp(-2) + math.exp(-1) + math.exp(-3)),
        }
    )


def test_scores_far_below_do_not_underflow():
    """At -2,000 nats e^s is 0 in any float; only differences count: 1 / (1 + e^-1)."""
    assert mc_metrics(-2000.0, [-2000.0], [-2001.0])["mc2"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert mc_metrics(-3000.0, [-3000.0], [-10.0])["mc2"] == 0.0


def test_multiple_choice_without_answers_or_with_nan_is_refused():
    """No true answer, no false one, a score that is NaN."""
    for true, false in (([], [-1.0]), ([-1.0], [])):
        with pytest.raises(InputError, match="at least one"):
            mc_metrics(-1.0, true, false)
    with pytest.raises(InputError, match="NaN"):
        mc_metrics(-1.0, [float("nan")], [-1.0])


# --------------------------------------------------------------------------------------------------------- scoring


def test_a_question_may_have_no_answers(bridge_llama):
    """Its list is empty, and the others stay in place."""
    found = score_continuations(bridge_llama, PREFIXES[:3], [ANSWERS[0], [], ANSWERS[2]])
    assert [len(s) for s in found] == [3, 0, 2]
    assert found[2] == pytest.approx([slow_score(bridge_llama, "", a) for a in ANSWERS[2]], abs=1e-4)


def test_what_cannot_be_scored_is_refused(bridge_llama):
    """Lists of different length, an empty answer, a text beyond the context."""
    with pytest.raises(InputError, match="2 prefixes and 1 lists"):
        score_continuations(bridge_llama, ["a", "b"], [[" c"]])
    with pytest.raises(DataError, match="answer has no token"):
        score_continuations(bridge_llama, ["a"], [[""]])
    with pytest.raises(DataError, match=r"context of .* 2048"):
        score_continuations(bridge_llama, ["?!" * 1100], [[" c"]])


# -------------------------------------------------------------------------------------------------------- decoding


def slow_generate(model, prompt, n, end=2):
    """Argmax of a full forward, token by token."""
    ids, new = ids_of(model, prompt), []
    for _ in range(n):
        token = int(last_logits(model, ids + new)[-1].argmax())
        if token == end:
            break
        new.append(token)
    return new


def test_decoding_stops_at_the_end_token_row_by_row(llama):
    """If the third token of the first row were the end token, that row has two and the others go on; nothing else changes."""
    prompts = [p for p in PREFIXES if p]
    free = [slow_generate(llama, p, 6) for p in prompts]
    end = free[0][2]
    expected = [new[: new.index(end)] if end in new else new for new in free]
    llama.tokenizer.eos_token = llama.tokenizer.convert_ids_to_tokens(end)
    try:
        assert decode_ids(llama, [ids_of(llama, p) for p in prompts], 6) == expected
    finally:
        llama.tokenizer.eos_token = "</s>"
    assert len(expected[0]) < 3
    assert any(len(new) == 6 for new in expected)


def test_what_cannot_be_generated_is_refused(bridge_llama):
    """No prompt, no new token, and no room in the context."""
    with pytest.raises(InputError, match="no prompt"):
        generate(bridge_llama, [])
    for name in ("max_new_tokens", "batch_size"):
        with pytest.raises(InputError, match=f"{name} is 0; give 1 or more"):
            generate(bridge_llama, "a", **{name: 0})
    with pytest.raises(DataError, match=r"2\d\d\d prompt tokens and 5 new ones exceed .*2048"):
        generate(bridge_llama, "?!" * 1100, max_new_tokens=5)


# --------------------------------------------------------------------------------------------------------- results

ROWS = [{"prompt": f"Q: {w} A:", "answer": "x"} for w in ("aunt", "son", "wife", "book")]


PAIR = [{"prompt": "p", "chosen": "a", "rejected": "b"}]


def words_task(**options):
    """Graded by the generated text's length being even, so that the numbers can be known without the model."""
    grade = lambda said, example: {"characters": float(len(said)), "em": float(len(said) % 2 == 0)}
    return Task.from_records("words", train=ROWS, test=ROWS, grade=grade, max_new_tokens=3, **options)


def test_a_generation_result_is_the_mean_of_its_items(llama):
    """Items hold prompt, text and metrics; the task's own metric comes first; means are the items' means."""
    result = evaluate(llama, words_task(), progress=False, label="bare")
    texts = generate(llama, [r["prompt"] for r in ROWS], max_new_tokens=3)
    assert list(result.items["generated"]) == texts
    assert list(result.items["prompt"]) == [r["prompt"] for r in ROWS]
    assert list(result.metrics) == ["em", "characters"]
    assert result["characters"] == sum(map(len, texts)) / 4
    assert result.main == result["em"] == sum(len(t) % 2 == 0 for t in texts) / 4
    assert result.metrics["em"].n == 4
    assert (result.label, result.task, result.split, result.model.n_heads) == ("bare", "words", "test", 4)
    with pytest.raises(InputError, match=r"no metric 'mc1'.*em, characters"):
        result["mc1"]


def test_a_multiple_choice_result_is_scored_and_graded_item_by_item(llama):
    """Scores are score_continuations', metrics mc_metrics', and an attached adapter is seen."""
    rows = [{"prompt": p, "chosen": a[0], "rejected": a[1]} for p, a in zip(PREFIXES[:2], ANSWERS, strict=False)]
    task = Task.from_records("pairs", train=rows, test=rows)
    bare = evaluate(llama, task, progress=False)
    for (_, item), row in zip(bare.items.iterrows(), rows, strict=True):
        right, wrong = (slow_score(llama, row["prompt"], row[key]) for key in ("chosen", "rejected"))
        assert [item.score_best, *item.scores_true, *item.scores_false] == pytest.approx(
            [right, right, wrong], abs=1e-4
        )
        assert (item.mc1, item.mc3) == (right > wrong, right > wrong)
        assert item.mc2 == pytest.approx(1 / (1 + math.exp(wrong - right)), abs=1e-4)
    assert list(bare.metrics) == ["mc1", "mc2", "mc3"]
    with random_adapter(llama).attached(llama):
        assert abs(evaluate(llama, task, progress=False)["mc2"] - bare["mc2"]) > 1e-3


def test_every_true_answer_counts_and_the_best_is_asked_for_alone(bridge_llama):
    """Three true answers, the best one in the middle, two false ones: each score stands where its answer stands."""
    prompt, true, false = PREFIXES[0], (" mother", " son", " aunt and uncle"), (" a", " country of France")
    asked = ChoiceExample(prompt, " son", true, false)
    task = replace(Task.from_records("q", train=PAIR, test=PAIR), test={"test": (asked,)})
    item = evaluate(bridge_llama, task, progress=False).items.iloc[0]
    scores = {a: slow_score(bridge_llama, prompt, a) for a in (*true, *false)}
    assert item.score_best == pytest.approx(scores[" son"], abs=1e-4)
    assert item.scores_true == pytest.approx([scores[a] for a in true], abs=1e-4)
    assert item.scores_false == pytest.approx([scores[a] for a in false], abs=1e-4)
    top = max(scores[a] for a in false)
    assert (item.mc1, item.mc3) == (scores[" son"] > top, pytest.approx(sum(scores[a] > top for a in true) / 3))


def test_a_saved_result_holds_every_item(bridge_llama, tmp_path):
    """result.json has metrics with interval and count, items.jsonl one line an item."""
    result = evaluate(bridge_llama, words_task(), limit=3, progress=False)
    folder = result.save(tmp_path / "run")
    record = json.loads((folder / "result.json").read_text())
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert record["metrics"]["em"] == {
        "mean": result["em"],
        "interval": list(result.metrics["em"].interval),
        "n": 3,
        "seeds": 1,
    }
    assert record["config"]["limit"] == 3
    assert record["data_hash"] == words_task().data_hash
    assert [i["generated"] for i in items] == list(result.items["generated"])
    assert items[0]["references"] == ["x"]
    with pytest.raises(InputError, match="exists"):
        result.save(tmp_path / "run")


def test_splits_without_rows_and_unknown_ones_are_refused(bridge_llama):
    """An empty validation split, a misspelt one, a limit of 0."""
    refused = {
        "no val rows": {"split": "val"},
        "Did you mean 'test'": {"split": "tset"},
        "limit is 0; give 1 or more": {"limit": 0},
    }
    for message, options in refused.items():
        with pytest.raises(InputError, match=message):
            evaluate(bridge_llama, words_task(), progress=False, **options)


def test_evaluation_is_in_eval_mode(loaded):
    """A model left in train mode scores without dropout, and stays in train mode."""
    model = loaded("gpt2", "bridge")
    once = score_continuations(model, ["Q: who?"], [[" Ann", " Bob"]])
    model.train()
    try:
        assert score_continuations(model, ["Q: who?"], [[" Ann", " Bob"]]) == once
        assert generate(model, "Q: who?", max_new_tokens=3) == generate(model, "Q: who?", max_new_tokens=3)
        assert model.training
    finally:
        model.eval()


def test_a_grader_without_the_metric_is_told(bridge_llama):
    """A grader of one's own names its metric."""
    rows = {"train": [{"prompt": "a", "answer": "b"}], "test": [{"prompt": "a", "answer": "b"}]}
    grade = lambda said, example: {"length": 1.0}
    assert (
        evaluate(bridge_llama, Task.from_records("t", **rows, grade=grade, metric="length"), progress=False).main == 1.0
    )
    with pytest.raises(InputError, match="gives length, but the task's metric is 'em'"):
        evaluate(bridge_llama, Task.from_records("t", **rows, grade=grade), progress=False)
