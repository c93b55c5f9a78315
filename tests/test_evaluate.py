"""`evaluate`: options and forms, groups and counts, items too long for the model, judges, and results that read back."""

import html
import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import transformers

from lofit_lens import EvalResult, Task, evaluate, generate
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation import Metric, mc_metrics, option_metrics
from lofit_lens.evaluation.generation import decode_ids
from lofit_lens.evaluation.scoring import score_encoded
from lofit_lens.evaluation.stats import bootstrap_interval
from lofit_lens.models import load_model, logits_of, tokenizer_of
from lofit_lens.tasks import ChoiceExample, GenerationExample, OptionExample
from lofit_lens.tasks.base import Form
from lofit_lens.tasks.collate import Encoded
from tests import slow, tiny
from tests.adapters import edited, random_adapter

TRAIN = [{"prompt": "a", "answer": " b"}]
OPTIONS = [
    {"prompt": "Q: Ann?\nA:", "options": [" mother", " aunt and uncle", " no"], "answer": " aunt and uncle"},
    {"prompt": "the capital of France is Ro", "options": ["me", " son"], "answer": "me"},
    {"prompt": "how is Eve related to Ann?", "options": [" wife", " book"], "answer": " wife"},
]
REPEATED = "test: rows that repeat a training row's prompt"
LONG = "story " * 10_000  # far beyond the 2,048 tokens of these models


def options_task(rows=OPTIONS):
    """Three options, two, two."""
    return Task.from_records("chosen", train=[{**OPTIONS[0]}], test=rows)


def words_task(prompts=("aunt", "son", "wife"), grade=None, **options):
    """Generation with numbers that do not depend on the model, unless a grader says so."""
    rows = [{"prompt": p, "answer": " x"} for p in prompts]
    return Task.from_records(
        "words", train=TRAIN, test=rows, grade=grade or (lambda said, e: {"em": 1.0}), max_new_tokens=3, **options
    )


def run(model, task, **options):
    """Without a bar."""
    return evaluate(model, task, progress=False, **options)


# ---------------------------------------------------------------------------------------------------------- options


def test_option_metrics_by_hand():
    """Probabilities .4, .1 and .3, the first right: accuracy 1, share .4 / .8 = .5; a tie is no win."""
    scores = [math.log(0.4), math.log(0.1), math.log(0.3)]
    assert option_metrics(scores, 0) == pytest.approx({"accuracy": 1.0, "probability": 0.5})
    assert option_metrics(scores, 2) == pytest.approx({"accuracy": 0.0, "probability": 0.375})
    assert option_metrics([-2.0, -2.0], 1) == pytest.approx({"accuracy": 0.0, "probability": 0.5})
    far = option_metrics([-2000.0, -2001.0], 0)["probability"]
    assert far == pytest.approx(1 / (1 + math.exp(-1)))
    with pytest.raises(InputError, match="at least one"):
        option_metrics([-1.0], 0)
    with pytest.raises(InputError, match="NaN"):
        option_metrics([-1.0, float("nan")], 0)


@pytest.mark.parametrize("adapted", [False, True])
def test_options_are_scored_and_graded_item_by_item(llama, hf, adapted):
    """Scores are the slow loop's, metrics those of the scores; `correct` is the task's own metric; merges are counted."""
    scale = 0.5 if adapted else 0.0
    lofit = random_adapter(llama, A=scale, v=scale)
    with lofit.attached(llama):
        found = run(llama, options_task())
    with edited(hf("llama"), lofit):
        expected = slow.scores(
            hf("llama"), tiny.tokenizer(), [r["prompt"] for r in OPTIONS], [r["options"] for r in OPTIONS]
        )
    assert list(found.metrics) == ["accuracy", "probability"]
    for (_, item), row, scores in zip(found.items.iterrows(), OPTIONS, expected, strict=True):
        right = row["options"].index(row["answer"])
        assert item.scores == pytest.approx(scores, abs=1e-4)
        assert (item.options, item.right, item.prompt) == (row["options"], right, row["prompt"])
        assert item.accuracy == (scores[right] > max(s for i, s in enumerate(scores) if i != right))
        assert item.probability == pytest.approx(math.exp(scores[right]) / sum(map(math.exp, scores)), abs=1e-4)
        assert item.correct == (item.accuracy == 1.0)
    assert found["accuracy"] == sum(found.items["accuracy"]) / 3
    assert found.counted == {REPEATED: 1, "answers sharing a token with their prompt": 1}
    assert list(found.items["item"]) == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------- forms, groups


def test_a_task_is_evaluated_in_the_form_asked_for(bridge_llama):
    """One question as options, as free text with a grader of its own, or as choices: each with its own metrics."""
    chosen = (
        OptionExample("Q: Ann?\nA:", (" aunt", " son"), 1, "one"),
        OptionExample("Q: Bob?\nA:", (" a", " b"), 0, "two"),
    )
    free = tuple(GenerationExample(e.prompt, e.options[e.right : e.right + 1], e.group) for e in chosen)
    mc = tuple(
        ChoiceExample(e.prompt, e.options[e.right], (e.options[e.right],), (e.options[1 - e.right],)) for e in chosen
    )
    grade = lambda said, e: {"answered": float(bool(said))}
    task = Task(
        "kin", "sft", {}, {"test": chosen}, "accuracy", form="options", hashes={"train": "aa", "test": "bb"},
        forms={"free": Form({"test": free}, "answered", grade, 2), "choices": Form({"test": mc}, "mc1")},
        counted={"test: odd": 2, "train: odd": 9},
    )  # fmt: skip
    first = run(bridge_llama, task)
    assert (first.form, list(first.metrics), first.split_hash) == ("options", ["accuracy", "probability"], "bb")
    assert (first.counted, list(first.items["group"])) == ({"test: odd": 2}, ["one", "two"])
    assert "kin test (options), n=2" in repr(first)
    said = run(bridge_llama, task.in_form("free"))
    assert (said.form, list(said.metrics), said.config["max_new_tokens"]) == ("free", ["answered"], 2)
    assert list(said.items["generated"]) == generate(bridge_llama, [e.prompt for e in free], max_new_tokens=2)
    other = run(bridge_llama, task.in_form("choices"))
    assert (other.form, list(other.metrics)) == ("choices", ["mc1", "mc2", "mc3"])
    # The best of two answers is the right one of two options.
    assert list(other.items["mc1"]) == list(first.items["accuracy"])
    assert list(other.items["mc2"]) == pytest.approx(list(first.items["probability"]))


def test_groups_by_hand(bridge_llama):
    """Group x has 1 and 0, group a has 1: means .5 and 1, in the order of their names, with the interval over their items."""
    grade = lambda said, e: {"em": float(e.prompt != "son")}
    task = words_task(("aunt", "son", "wife"), grade)
    groups = tuple(replace(e, group=g) for e, g in zip(task.test["test"], ("x", "x", "a"), strict=True))
    found = run(bridge_llama, replace(task, test={"test": groups}))
    rows = found.by_group().to_dict("records")
    low, high = bootstrap_interval([1.0, 0.0])
    assert rows[0] | {"em_low": None, "em_high": None} == {
        "group": "a", "n": 1, "em": 1.0, "em_low": None, "em_high": None
    }  # fmt: skip
    assert pd.isna(rows[0]["em_low"])
    assert rows[1] == {"group": "x", "n": 2, "em": 0.5, "em_low": low, "em_high": high}
    assert list(found.items["correct"]) == [True, False, True]


def test_correct_is_exactly_one(bridge_llama):
    """A score of .9 is not correct, whatever other metrics say."""
    grade = lambda said, e: {"f1": 0.9 if e.prompt == "son" else 1.0, "em": 1.0}
    found = run(bridge_llama, words_task(grade=grade, metric="f1"))
    assert list(found.items["correct"]) == [True, False, True]


# --------------------------------------------------------------------------------------------------- items too long


@pytest.mark.parametrize("where", [0, 1])
def test_a_story_of_ten_thousand_words_is_named(bridge_llama, where):
    """Generated from or scored: the error names the item, its tokens and the context, and nothing is run."""
    prompts = ["aunt", "son"]
    prompts[where] = LONG
    n = len(slow.ids_of(tiny.tokenizer(), LONG))
    with pytest.raises(
        DataError, match=rf"item {where + 1} of words needs {n + 3} tokens; .* is 2048: .*--too-long wrong"
    ):
        run(bridge_llama, words_task(prompts))
    rows = [dict(OPTIONS[0]), dict(OPTIONS[2])]
    rows[where] = rows[where] | {"prompt": LONG}
    with pytest.raises(DataError, match=rf"item {where + 1} of chosen needs \d+ tokens; the context of .* is 2048"):
        run(bridge_llama, options_task(rows))


def test_a_prompt_needs_room_for_what_is_generated(bridge_llama):
    """2,045 tokens leave room for 3 new ones; one more does not."""
    tokenizer = tiny.tokenizer()
    fits = "a" + " ?" * 1021 + "?"
    assert len(slow.ids_of(tokenizer, fits)) == 2045
    assert run(bridge_llama, words_task([fits])).counted == {}
    with pytest.raises(DataError, match="needs 2049 tokens"):
        run(bridge_llama, words_task([fits + "?"]))


def test_too_long_counts_as_wrong_in_generation(bridge_llama):
    """Of three items one is too long: 0 in every metric, kept in the denominator, counted; the others as without it."""
    seen = []
    grade = lambda said, e: seen.append(e.prompt) or {"em": 1.0, "characters": float(len(said))}
    found = run(bridge_llama, words_task(["aunt", LONG, "wife"], grade), too_long="wrong")
    texts = generate(bridge_llama, ["aunt", "wife"], max_new_tokens=3)
    assert found.metrics["em"] == Metric(2 / 3, bootstrap_interval([1.0, 0.0, 1.0]), 3)
    assert list(found.items["characters"]) == [len(texts[0]), 0, len(texts[1])]
    assert list(found.items["generated"].fillna("-")) == [texts[0], "-", texts[1]]
    assert (list(found.items["correct"]), seen) == ([True, False, True], ["aunt", "wife"])
    assert found.counted == {"too long, counted as wrong": 1}
    assert found.config["too_long"] == "wrong"


@pytest.mark.parametrize("kind", ["options", "pairs"])
def test_too_long_counts_as_wrong_in_choices(bridge_llama, kind):
    """Scored items keep their scores, the long one has none and is 0 in every metric; n stays 3."""
    long = "aunt" + " ?" * 2100
    if kind == "options":
        task, short = (options_task([OPTIONS[0], OPTIONS[2] | {"prompt": p}, OPTIONS[2]]) for p in (long, "son"))
    else:
        task, short = (
            Task.from_records("pairs", train=rows[:1], test=rows)
            for p in (long, "son")
            for rows in [[{"prompt": q, "chosen": " wife", "rejected": " book"} for q in ("aunt", p, "who?")]]
        )
    found, whole = run(bridge_llama, task, too_long="wrong"), run(bridge_llama, short)
    assert found.counted == {REPEATED: 1, "too long, counted as wrong": 1}
    for name, metric in found.metrics.items():
        values = whole.items[name].tolist()
        assert found.items[name].tolist() == pytest.approx([values[0], 0.0, values[2]], abs=1e-5)
        assert (metric.n, metric.mean) == (3, pytest.approx((values[0] + values[2]) / 3, abs=1e-5))
    assert not found.items["correct"][1]
    score = "scores" if kind == "options" else "score_best"
    assert [pd.isna(found.items[score][1])] == [True]


def test_nothing_but_long_items_is_refused(bridge_llama):
    """Then there is no metric at all; a choice of a third way is refused too."""
    with pytest.raises(DataError, match="every item of words is longer than the context"):
        run(bridge_llama, words_task([LONG]), too_long="wrong")
    with pytest.raises(InputError, match="unknown too_long 'skip'; allowed: error, wrong"):
        run(bridge_llama, words_task(), too_long="skip")


# ----------------------------------------------------------------------------------------------- results read back


def test_a_result_with_everything_reads_back(bridge_llama, tmp_path):
    """Forms, counts, hashes, an item without a score, and a text with U+2028, which is a line break to some but not to JSON."""
    rows = [OPTIONS[0] | {"prompt": "a\u2028b\r\x85c"}, OPTIONS[1], OPTIONS[2] | {"prompt": "aunt" + " ?" * 2100}]
    task = replace(options_task(rows), form="options", counted={"test: odd": 3})
    made = run(bridge_llama, task, too_long="wrong", label="Ärger \u2028")
    folder = made.save(tmp_path / "e")
    read = EvalResult.load(folder)
    for name in ("task", "split", "metrics", "form", "label", "model", "data_hash", "split_hash", "counted", "config"):
        assert getattr(read, name) == getattr(made, name), name
    assert read.split_hash == task.hashes["test"] != ""
    assert made.counted.keys() == {
        "test: odd",
        "too long, counted as wrong",
        "answers sharing a token with their prompt",
    }
    pd.testing.assert_frame_equal(read.items, made.items)
    assert read.by_group().equals(made.by_group())


def test_saved_items_are_json_of_any_reader(bridge_llama, tmp_path):
    """An item without a score has null there: NaN is not JSON."""
    rows = [{"prompt": p, "chosen": " wife", "rejected": " book"} for p in ("aunt", "aunt" + " ?" * 2100)]
    found = run(bridge_llama, Task.from_records("pairs", train=rows[:1], test=rows), too_long="wrong")
    lines = (found.save(tmp_path / "e") / "items.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(name)

    items = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [i["score_best"] is None for i in items] == [False, True]
    assert EvalResult.load(tmp_path / "e").metrics == found.metrics


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("result.json", lambda t: t[:-20], "is not JSON"),
        ("result.json", lambda t: t.replace('"counted"', '"count"'), "lacks the field 'counted'"),
        ("result.json", lambda t: t.replace("EvalResult", "HeadSet"), "is not a lofit_lens.EvalResult record"),
        ("result.json", lambda t: t.replace('"mean"', '"average"'), "complete evaluation"),
        ("result.json", lambda t: json.dumps(json.loads(t) | {"metrics": []}), "complete evaluation"),
        ("items.jsonl", lambda t: t[:-9], "complete evaluation"),
        ("items.jsonl", lambda t: "".join(t.splitlines(keepends=True)[:2]), "2 items in items.jsonl, 3 in result.json"),
        ("items.jsonl", lambda t: t.replace('"em"', '"me"'), "complete evaluation"),
        ("items.jsonl", lambda t: "", "complete evaluation"),
    ],
)
def test_a_damaged_folder_is_refused(bridge_llama, tmp_path, file, change, message):
    """Cut, a field or an item missing, another kind: named, never half read."""
    path = run(bridge_llama, words_task()).save(tmp_path / "e") / file
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        EvalResult.load(tmp_path / "e")
    with pytest.raises(DataError, match="cannot read"):
        EvalResult.load(tmp_path / "nowhere")


def test_a_result_escapes_what_it_shows(bridge_llama):
    """Label, counts and metric names are text, not HTML."""
    grade = lambda said, e: {"<i>": 1.0}
    task = replace(words_task(grade=grade, metric="<i>"), counted={"test: <u>": 1}, form="<s>")
    page = run(bridge_llama, task, label="<b>")._repr_html_()
    for bad in ("<b>", "<i>", "<u>", "<s>"):
        assert bad not in page
        assert html.escape(bad) in page


# ------------------------------------------------------------------------------------------------------- generation


def test_generation_behind_a_shared_front_equals_one_prompt_at_a_time(llama, hf):
    """Prompts that share 22 tokens, one being the front itself: the slow argmax loop's ids, adapter attached."""
    tokenizer, front = tokenizer_of(llama), "Q: Imagine that the capital of France is Rome. What is "
    prompts = [front + p for p in ("", "it? A:", "the capital of the country where Ann was born? A:", "it? A:")]
    lofit = random_adapter(llama, v=1.0)
    with edited(hf("llama"), lofit):
        expected = [slow.new_ids(hf("llama"), tiny.tokenizer(), p, 8) for p in prompts]
    with lofit.attached(llama):
        assert generate(llama, prompts, max_new_tokens=8, batch_size=3) == [tokenizer.decode(new) for new in expected]
        assert [generate(llama, p, max_new_tokens=8) for p in prompts] == [tokenizer.decode(new) for new in expected]
        assert decode_ids(llama, [slow.ids_of(tokenizer, p) for p in prompts], 8) == expected
    assert len({tuple(new) for new in expected}) == 3


def test_answers_have_room_behind_the_longest_prompt(tmp_path):
    """A context of 64: 60 + 3 and 50 + 14 fit each alone, but padded together 60 + 14 places would not (absolute positions)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, vocab_size=400)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m", backend="bridge", device="cpu")
    ids = torch.randint(3, 400, (200,)).tolist()
    long, short = ids[:60], ids[60:110]
    questions = [(Encoded((*long, *ids[110:113]), 60),), tuple(Encoded((*short, *ids[113:n]), 50) for n in (127, 115))]
    for answers, scores in zip(questions, score_encoded(model, questions), strict=True):
        for answer, score in zip(answers, scores, strict=True):
            tokens = torch.tensor([answer.ids])
            with torch.no_grad():
                all_ = logits_of(model, tokens, torch.ones_like(tokens)).log_softmax(-1)
            slow = sum(all_[0, t - 1, answer.ids[t]].item() for t in range(answer.start, len(answer.ids)))
            assert score == pytest.approx(slow, abs=1e-4)


@pytest.mark.parametrize("second", [{"em": math.nan}, {"em": 1.0, "more": 1.0}])
def test_a_grader_gives_every_item_the_same_numbers(bridge_llama, second):
    """Otherwise the item is named, with what it was graded."""
    rows = [{"prompt": p, "answer": "x"} for p in "ab"]
    grade = lambda said, example: {"em": 1.0} if example.prompt == "a" else second
    task = Task.from_records("t", train=rows, test=rows, grade=grade)
    with pytest.raises(InputError, match=r"item 2 of t was graded .* every item needs a number for each of em"):
        evaluate(bridge_llama, task, progress=False)


def test_half_a_character_in_the_data_is_named():
    """JSON may hold a lone surrogate, which no tokenizer takes."""
    with pytest.raises(DataError, match=r"t test row 1: field 'prompt' has half a character \('\\ud83d' at 2\)"):
        Task.from_records("t", train=[{"prompt": "a", "answer": "b"}], test=[{"prompt": "a \ud83d", "answer": "b"}])


def test_nothing_but_minus_infinity_is_no_score():
    """As half precision can give: no answer is better than another, and MC2 would be 0 / 0."""
    with pytest.raises(InputError, match="-infinity"):
        mc_metrics(-math.inf, [-math.inf], [-math.inf])
    assert mc_metrics(-3.0, [-3.0], [-math.inf]) == {"mc1": 1.0, "mc2": 1.0, "mc3": 1.0}
