"""Judges: two kinds of local model against a direct computation; what a judge may say; where judges may speak."""

import sys
from dataclasses import replace

import pytest
import torch
import transformers as tf

from lofit_lens import Task, evaluate
from lofit_lens.errors import InputError
from lofit_lens.evaluation import ClassifierJudge, Judge, YesNoJudge
from lofit_lens.tasks import GenerationExample
from tests import tiny
from tests.adapters import random_adapter

QUESTIONS = ["who is Ann?", "What is the capital of the country where the author was born?", "Q"]
ANSWERS = ["a mother", "Rome", "I have no comment. I have no comment."]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Number of labels -> folder of a tiny sequence classifier."""

    def folder_of(n):
        names = {0: "myth", 1: "fact", 2: "other"} if n == 3 else {0: "fact"}
        config = tf.LlamaConfig(
            **tiny.WIDE, num_labels=n, id2label=dict(names), label2id={name: i for i, name in names.items()}
        )
        torch.manual_seed(n)
        model = tf.LlamaForSequenceClassification(config).eval()
        torch.nn.init.normal_(model.score.weight, std=0.5)
        folder = tmp_path_factory.mktemp("judge") / f"classifier-{n}"
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        return folder, model

    return {n: folder_of(n) for n in (1, 3)}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("n", [1, 3])
def test_a_classifier_gives_its_labels_probability(classifier, n, batch_size):
    """Softmax over three labels, sigmoid of a single one; ragged texts in one batch judged as alone."""
    folder, model = classifier[n]
    judge = ClassifierJudge(str(folder), "fact", batch_size=batch_size)
    expected = []
    for q, a in zip(QUESTIONS, ANSWERS, strict=True):
        ids = tiny.tokenizer()(f"Q: {q} A: {a}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        expected.append(float(logits.sigmoid()[0] if n == 1 else logits.softmax(0)[1]))
    assert judge(QUESTIONS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert judge([], []) == []
    assert isinstance(judge, Judge)


def test_a_template_and_a_label_of_ones_own(classifier):
    """The label is found by its name, the text is what the template says."""
    folder, model = classifier[3]
    judge = ClassifierJudge(str(folder), "other", template="{answer}!")
    with torch.no_grad():
        logits = model(torch.tensor([tiny.tokenizer()("Rome!")["input_ids"]])).logits[0]
    assert judge(["who?"], ["Rome"]) == pytest.approx([float(logits.softmax(0)[2])], abs=1e-5)


def test_an_unknown_label_is_refused(classifier):
    """The model's own labels are named."""
    with pytest.raises(InputError, match=r"unknown label 'facts'; allowed: fact, myth, other. Did you mean 'fact'"):
        ClassifierJudge(str(classifier[3][0]), "facts")(QUESTIONS, ANSWERS)


@pytest.mark.parametrize("words", [(" yes", " no"), (" mother", " aunt")])
def test_yes_against_no_as_the_next_word(checkpoint, hf, words):
    """Softmax over the two words' first tokens at the last position of `Q: ...\\nA: ...\\nTrue:`."""
    judge, tokenizer = YesNoJudge(str(checkpoint("llama")), words=words), tiny.tokenizer()
    yes, no = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words)
    expected = []
    for q, a in zip(QUESTIONS, ANSWERS, strict=True):
        ids = tokenizer(f"Q: {q}\nA: {a}\nTrue:")["input_ids"]
        with torch.no_grad():
            logits = hf("llama")(torch.tensor([ids])).logits[0, -1]
        expected.append(float(torch.sigmoid(logits[yes] - logits[no])))
    assert judge(QUESTIONS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert all(abs(p - 0.5) > 1e-3 for p in expected)
    assert isinstance(judge, Judge)


def test_words_that_begin_alike_are_refused(checkpoint):
    """`mother` and `mother-in-law` have the same first token: every answer would get .5."""
    with pytest.raises(InputError, match="begin with the same token"):
        YesNoJudge(str(checkpoint("llama")), words=(" mother", " mother-in-law"))(QUESTIONS, ANSWERS)


# ------------------------------------------------------------------------------------------------- judges in evaluate


def task(prompts=("aunt", "son", "wife"), **options):
    """Free answers, all right."""
    rows = [{"prompt": p, "answer": " x"} for p in prompts]
    return Task.from_records(
        "t", train=rows[:1], test=rows, grade=lambda said, e: {"em": 1.0}, max_new_tokens=4, **options
    )


def test_a_judge_becomes_a_metric(bridge_llama, monkeypatch):
    """It hears the question (or the prompt where there is none) and the answer up to the next question, and is recorded."""
    heard = []

    def judge(questions, answers):
        heard.extend(zip(questions, answers, strict=True))
        return [0.0, 0.5, 1.0]

    said = [" Rome \n\nQ: who?", "\nQ: who", " a Q: b\n c"]
    monkeypatch.setattr(sys.modules["lofit_lens.evaluation.evaluate"], "generate", lambda *args, **options: said)
    examples = (
        GenerationExample("primer aunt", ("x",), "", "who is she?"), GenerationExample("son", ("x",)),
        GenerationExample("wife", ("x",)),
    )  # fmt: skip
    found = evaluate(bridge_llama, replace(task(), test={"test": examples}), judges={"truth": judge}, progress=False)
    assert heard == [("who is she?", "Rome"), ("son", ""), ("wife", "a Q: b\n c")]
    assert list(found.items["truth"]) == [0.0, 0.5, 1.0]
    assert (list(found.metrics), found["truth"], found["em"]) == (["em", "truth"], 0.5, 1.0)
    assert list(found.items["generated"]) == said
    assert found.config["judges"] == {"truth": "test_a_judge_becomes_a_metric.<locals>.judge"}  # no address


def test_judges_do_not_hear_items_that_were_too_long(bridge_llama):
    """The long item is 0 for the judge as well, who is asked about the other two."""
    heard = []
    judge = lambda questions, answers: heard.extend(questions) or [1.0] * len(answers)
    found = evaluate(
        bridge_llama, task(("aunt", "?!" * 1100, "wife")), judges={"truth": judge}, too_long="wrong", progress=False
    )
    assert heard == ["aunt", "wife"]
    assert (list(found.items["truth"]), found.metrics["truth"].n) == ([1.0, 0.0, 1.0], 3)


def test_models_judge_what_another_one_says(bridge_llama, checkpoint, classifier):
    """Two judges side by side; an adapter that changes answers changes verdicts."""
    judges = {"fact": ClassifierJudge(str(classifier[3][0]), "fact"), "yes": YesNoJudge(str(checkpoint("llama")))}
    bare = evaluate(bridge_llama, task(), judges=judges, progress=False)
    answers = [text.strip() for text in bare.items["generated"]]
    for name, judge in judges.items():
        assert list(bare.items[name]) == pytest.approx(judge(["aunt", "son", "wife"], answers))
    assert bare.config["judges"]["fact"].startswith("ClassifierJudge(model=")
    with random_adapter(bridge_llama, v=2.0).attached(bridge_llama):
        assert evaluate(bridge_llama, task(), judges=judges, progress=False)["fact"] != bare["fact"]


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("truth", [0.5, 0.5], "judge 'truth' gave 2 numbers for 3 answers"),
        ("truth", [0.5, 0.5, 1.5], r"judge 'truth' gave 1.5; it must give probabilities from 0 to 1"),
        ("truth", [-0.1, 0.5, 0.5], "gave -0.1"),
        ("truth", [0.5, float("nan"), 0.5], "gave nan"),
        ("em", [0.5] * 3, "a metric is already called 'em'; give the judge another name"),
        ("generated", [0.5] * 3, "'generated', like a column of the items; rename it"),
        ("correct", [0.5] * 3, "'correct', like a column of the items; rename it"),
    ],
)
def test_what_a_judge_may_not_do(bridge_llama, name, said, message):
    """One probability an answer, under a name that is free: it would else replace what the items hold."""
    with pytest.raises(InputError, match=message):
        evaluate(bridge_llama, task(), judges={name: lambda q, a: said}, progress=False)


def test_a_judge_of_log_probs_is_refused(bridge_llama):
    """Nothing is said there that could be judged."""
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    pairs = Task.from_records("pairs", train=rows, test=rows)
    with pytest.raises(InputError, match="pairs is scored by log-prob; evaluate its generation form"):
        evaluate(bridge_llama, pairs, judges={"truth": lambda q, a: [1.0]}, progress=False)
