"""Prompts through the chat template: the ids are Hugging Face's, in every use that is made of a prompt."""

from dataclasses import replace

import pytest

import lofit_lens as ll
from lofit_lens.errors import DataError, InputError
from lofit_lens.evaluation import generate
from lofit_lens.models import tokenizer_of
from lofit_lens.tasks import Task
from lofit_lens.tasks.chat import Conversation, as_conversation, parsed, template_digest, turn_of
from lofit_lens.tasks.collate import encode, encode_continuations, encode_training
from lofit_lens.tasks.examples import PairExample, SFTExample
from lofit_lens.tasks.statements import statements
from tests import chats

SAID = "Q: Where was Ann born? A:"
styles = pytest.mark.parametrize("style", chats.STYLES)
TRAIN = [{"prompt": f"word {i}:", "answer": " yes" if i % 2 else " no"} for i in range(6)]
TEST = [{"prompt": f"thing {i}:", "answer": " yes", "aliases": ["yeah"]} for i in range(3)]
SYSTEM = "Answer with one word."


def own(**more):
    return Task.from_records("caps", train=TRAIN, test=TEST, val=TEST, max_new_tokens=3, **more)


@pytest.fixture(scope="module")
def model():
    return chats.model("chatml")


def theirs(tok, messages, **more):
    """Hugging Face's ids of messages."""
    return list(tok.apply_chat_template(messages, tokenize=True, return_dict=False, **more))


def user(text, system=None):
    return ([] if system is None else [{"role": "system", "content": system}]) + [{"role": "user", "content": text}]


# ---------------------------------------------------------------------------------------------------------------- ids


@styles
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_ids_are_those_of_the_template(style, system):
    """No second BOS, and none where the template has none."""
    tok = chats.tokenizer(style)
    if style == "gemma" and system:
        return
    expected = theirs(tok, user(SAID, system), add_generation_prompt=True)
    if style == "qwen-3":  # as with enable_thinking=False: the thought is empty
        expected += tok("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    assert encode(tok, as_conversation(SAID, system)) == expected
    assert (expected.count(1), expected[0] == 1) == ((1, True) if style in ("llama-2", "gemma") else (0, False))


@styles
def test_an_answer_is_the_assistants_turn(style):
    """Prompt, answer and end token are what the template makes of the whole, however white space stood around the answer."""
    tok = chats.tokenizer(style)
    whole = theirs(tok, [*user(SAID), {"role": "assistant", "content": "Rome"}])
    end = tok.convert_tokens_to_ids(chats.ENDS.get(style, "</s>"))
    for answer in (" Rome", "Rome", "Rome\n"):
        (row,) = encode_training(tok, SFTExample(as_conversation(SAID), answer))
        assert row.ids[-1] == end
        said = list(row.ids[:-1])
        assert said == whole[: len(said)]
        assert tok.decode(said[row.start :]).strip() == "Rome"
        assert tok.decode(whole[len(said) :], skip_special_tokens=True).strip() == ""
        (scored,) = encode_continuations(tok, as_conversation(SAID), [answer])
        assert list(scored.ids) == said


def test_of_a_pair_both_are_the_assistants():
    """Chosen and rejected share the prompt's ids."""
    tok = chats.tokenizer("chatml")
    good, bad = encode_training(tok, PairExample(as_conversation(SAID), " Rome", " Ann"))
    prompt = theirs(tok, user(SAID), add_generation_prompt=True)
    assert list(good.ids[: good.start]) == list(bad.ids[: bad.start]) == prompt
    assert tok.decode(bad.ids[bad.start :]) == "Ann<|im_end|>"


def test_plain_text_is_as_before():
    """A template alone changes nothing; the learned end is the tokenizer's."""
    tok = chats.tokenizer("chatml")
    (row,) = encode_training(tok, SFTExample(SAID, " Rome"))
    assert row.ids[-1] == 2
    assert tok.decode(row.ids).endswith("A: Rome</s>")
    assert turn_of(tok, SAID) == (turn_of(tok, SAID).__class__)(SAID, None, 2)


def test_text_in_front_goes_into_the_users_turn():
    """A primer or a document, and what follows the prompt."""
    tok = chats.tokenizer("llama-2")
    made = "Ann is Bob.\n\n" + as_conversation(SAID, SYSTEM)
    assert encode(tok, made) == theirs(tok, user("Ann is Bob.\n\n" + SAID, SYSTEM), add_generation_prompt=True)
    assert encode(tok, made + " so") == theirs(
        tok, user(f"Ann is Bob.\n\n{SAID} so", SYSTEM), add_generation_prompt=True
    )


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_system_that_the_template_refuses_is_an_error():
    """Gemma's says so itself; one that leaves it out in silence is found."""
    conversation = as_conversation(SAID, SYSTEM)
    with pytest.raises(InputError, match=r"takes no system prompt \(System role not supported\); omit system"):
        encode(chats.tokenizer("gemma"), conversation)
    silent = chats.tokenizer(
        "chatml", template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"drops the system's text 'Answer with one word\.'; omit system"):
        encode(silent, conversation)


def test_no_template_is_an_error_that_names_the_tokenizer(llama):
    """And the way out."""
    tok = chats.tokenizer("chatml")
    tok.chat_template, tok.name_or_path = None, "/a/folder/of/base-model"
    with pytest.raises(InputError, match="the tokenizer of base-model has no chat template; ask without chat"):
        encode(tok, as_conversation(SAID))
    for call in (own().as_chat, lambda m: ll.evaluate(m, own().as_chat()), lambda m: generate(m, "Ann", chat=True)):
        with pytest.raises(InputError, match="has no chat template"):
            call(llama)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list like"),
        ("Ann", "must be a list like"),
        ([{"role": "user"}], r"the conversation, message 1 is .*; it must have a role and a content"),
        ([{"role": "bot", "content": "a"}], "message 1 has the role 'bot'; allowed: system, user, assistant"),
        ([{"role": "user", "content": " "}], "message 1 has the content ' '; it must be non-empty text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "it must be non-empty text"),
        ([*user("a"), *user("b", "c")], "the roles are user, system, user; only the first may be a system message"),
        ([*user("a"), {"role": "assistant", "content": "b"}], "the last message is the assistant's"),
    ],
)
def test_messages_that_are_no_conversation(messages, message):
    """Named with what is allowed."""
    with pytest.raises(DataError, match=message):
        parsed(messages)


def test_one_systems_text(model):
    """An empty one, and a second one."""
    with pytest.raises(InputError, match="the system prompt is empty"):
        own().as_chat(system=" ")
    with pytest.raises(InputError, match="already has a system prompt"):
        own().as_chat(system=SYSTEM).as_chat(system="Be brief.")
    with pytest.raises(
        InputError, match=r"'Be brief\.' is not a model; give a loaded model or its tokenizer, and a system prompt as"
    ):
        own().as_chat("Be brief.")


# -------------------------------------------------------------------------------------------------------------- tasks


def test_the_task_says_what_was_used(model):
    """Name and hash: other with a chat, another system or another template; rows and metrics as they were."""
    plain, tok = own(), tokenizer_of(model)
    tasks = [
        plain,
        plain.as_chat(),
        plain.as_chat(model),
        plain.as_chat(model, system=SYSTEM),
        plain.as_chat(system="Hi."),
    ]
    assert len({t.data_hash for t in tasks}) == len(tasks)
    assert [t.name for t in tasks[:3]] == ["caps", "caps:chat", "caps:chat"]
    assert len({t.name for t in tasks}) == 4
    assert {t.family for t in tasks} == {"caps"}
    assert tasks[3].chat.template == template_digest(tok)
    assert tasks[2].as_chat().data_hash == tasks[1].as_chat(tok).data_hash == tasks[1].asked_of(model).data_hash
    other = chats.tokenizer("chatml", template=chats.TEMPLATES["zephyr"])
    assert plain.as_chat(other).data_hash != tasks[2].data_hash
    assert tasks[3].hashes == plain.hashes
    assert [e.references for e in tasks[3].examples("test")] == [e.references for e in plain.examples("test")]
    assert tasks[3].examples("test")[0].prompt.messages == (("system", SYSTEM), ("user", "thing 0:"))


def test_forms_are_asked_in_the_chat_too(data_dir):
    """TruthfulQA: the primer stands in the user's turn of both forms."""
    task = ll.load_task("truthfulqa", data_dir=data_dir).as_chat()
    assert (task.name, task.family) == ("truthfulqa:0:chat", "truthfulqa")
    for asked in (task, task.in_form("generation")):
        ((_, said),) = asked.examples("test")[0].prompt.messages
        assert said.startswith("Interpret each question literally")
        assert said.endswith("A:")


def test_results_and_adapters_say_it(model):
    """The template's digest is in the hash of what was learned and measured, also where the task was opened without a model."""
    task, tok = own().as_chat(system=SYSTEM), tokenizer_of(model)
    result = ll.evaluate(model, task, progress=False)
    assert result.config["chat"] == {"system": SYSTEM, "template": template_digest(tok)}
    assert result.data_hash == task.as_chat(model).data_hash != task.data_hash
    scores = ll.select_heads(model, task, config=ll.TrainConfig(lr=1e-2, epochs=1, batch_size=3), progress=False)
    probes = ll.probe_heads(model, task, progress=False)
    assert scores.meta["data_hash"] == probes.meta["data_hash"] == result.data_hash
    assert scores.task == task.name
    assert "chat" not in ll.evaluate(model, own(), progress=False).config


def test_training_sees_the_assistants_turn(model, monkeypatch):
    """The rows that go through the model are the template's."""
    from lofit_lens.training import objective

    seen, inner = [], objective.encode_training
    monkeypatch.setattr(objective, "encode_training", lambda t, e: (seen.append(inner(t, e)), seen[-1])[1])
    config = ll.TrainConfig(lr=1e-2, epochs=1, batch_size=3)
    lofit = ll.tune_offsets(model, own().as_chat(), ["L1H2"], config=config, progress=False)
    tok = tokenizer_of(model)
    for (row,) in seen:
        answer = tok.decode(row.ids[row.start :])
        assert answer in ("yes<|im_end|>", "no<|im_end|>")
        assert tok.decode(row.ids[: row.start]).startswith("<|im_start|>user\nword ")
        assert tok.decode(row.ids[: row.start]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert lofit.meta.task == "caps:chat"


def test_statements_are_asked_in_the_chat():
    """What probes are fitted on."""
    assert {type(s.prompt) for s in statements(own().as_chat())} == {Conversation}


def test_every_selector_takes_a_chat(model):
    """Attribution, patching (its solved examples stand in the user's turn), probes."""
    from lofit_lens.training.selectors import SELECTORS

    for name, selector in SELECTORS.items():
        if name not in ("A-norm", "bias norm"):
            assert selector(model, own().as_chat(system=SYSTEM), progress=False).task.startswith("caps:chat"), name


def test_few_shot_puts_solved_rows_in_front(model):
    """The same for every test prompt; of a chat in the user's turn. The training form stays."""
    task = own().few_shot(2, seed=0)
    shots = own().training_examples("train", n=2, seed=0)
    front = "".join(f"{s.prompt}{s.answer}\n\n" for s in shots)
    assert [e.prompt for e in task.examples("test")] == [f"{front}thing {i}:" for i in range(3)]
    assert (task.name, task.family, task.training) == ("caps:2-shot", "caps", own().training)
    assert task.data_hash != own().data_hash != own().few_shot(2, seed=1).data_hash
    for chat in (task.as_chat(), own().as_chat().few_shot(2, seed=0)):
        assert chat.examples("test")[0].prompt.messages == (("user", f"{front}thing 0:"),)
    with pytest.raises(InputError, match="7 training examples asked for"):
        own().few_shot(7)


# --------------------------------------------------------------------------------------------------------- generation


def test_generate_takes_chats_and_conversations(model):
    """A text with chat=True, messages and a list of conversations are the same prompt; text alone is another."""
    by_text = generate(model, SAID, chat=True, max_new_tokens=6)
    assert by_text == generate(model, user(SAID), max_new_tokens=6)
    assert [by_text] * 2 == generate(model, [user(SAID), user(SAID)], max_new_tokens=6)
    assert by_text != generate(model, SAID, max_new_tokens=6)
    with_system = generate(model, SAID, system=SYSTEM, max_new_tokens=6)
    assert with_system == generate(model, user(SAID, SYSTEM), max_new_tokens=6) != by_text
    with pytest.raises(InputError, match="give a text, a list of texts, or messages of a conversation"):
        generate(model, user(SAID)[0])


def test_generation_stops_at_the_end_of_the_turn(model, monkeypatch):
    """The template's end token ends an answer, and only that of a chat."""
    from lofit_lens.evaluation import generation

    tok = tokenizer_of(model)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    seen, inner = [], generation.decode_ids
    monkeypatch.setattr(generation, "decode_ids", lambda *a, **k: (seen.append(k["turn_ends"]), inner(*a, **k))[1])
    generate(model, ["Ann", as_conversation("Ann")], max_new_tokens=2)
    assert seen == [[2, end]]
    free = inner(model, [encode(tok, "Ann")], 8)[0]
    stopped = inner(model, [encode(tok, "Ann")] * 2, 8, turn_ends=[free[3], None])
    assert stopped == [free[: free.index(free[3])], free]


# ---------------------------------------------------------------------------------------------------- rows of messages

CHATS = [{"messages": [*user("Italy?", SYSTEM), {"role": "assistant", "content": "Rome"}]}]


def test_rows_of_messages_are_a_task(model):
    """With the answer as the assistant's last message, or beside the messages."""
    task = Task.from_records(
        "m", train=CHATS * 3, test=[{"messages": user("Ann?"), "answer": "Bob", "aliases": ["Bo"]}]
    )
    (first, *_), (asked,) = task.training["train"], task.test["test"]
    assert (first.prompt.messages, first.answer) == ((("system", SYSTEM), ("user", "Italy?")), "Rome")
    assert asked.references == ("Bob", "Bo")
    result = ll.evaluate(model, task, progress=False)
    assert result.config["chat"]["template"] == template_digest(tokenizer_of(model))
    (row,) = encode_training(tokenizer_of(model), first)
    assert list(row.ids) == theirs(tokenizer_of(model), CHATS[0]["messages"])[: len(row.ids)]
    assert task.as_chat() is task
    assert task.name == "m"
    with pytest.raises(InputError, match="already has a system prompt"):
        task.as_chat(system="Be brief.")


def test_messages_with_options_and_pairs():
    """The other forms of own tasks."""
    options = Task.from_records("o", train=[{"messages": user("Ann?"), "answer": "a", "options": ["a", "b"]}], test=[])
    assert options.training["train"][0].prompt == "Ann?"
    pairs = Task.from_records("p", train=[{"messages": user("Ann?"), "chosen": "a", "rejected": "b"}], test=[])
    assert pairs.objective == "dpo"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "m train row 2: messages must be a list like"),
        ({"messages": user("a")}, "m train row 2: no field 'answer'"),
        (
            {"prompt": "a", "answer": "b"},
            "m train row 2 has prompt, answer; either all rows of a task have a prompt, or all have messages",
        ),
        ({"messages": user("a"), "prompt": "a", "answer": "b"}, "m train row 2 has messages, prompt, answer"),
        ({**CHATS[0], "answer": "Rome"}, "m train row 2: the assistant's last message and 'answer' are both an answer"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "m train row 2: messages must be a list like"),
        ({"messages": [*user("a"), {"role": "assistant", "content": ""}]}, "m train row 2: field 'answer' is ''"),
        ({"messages": [{"role": "bot", "content": "b"}], "answer": "a"}, "m train row 2, message 1 has the role 'bot'"),
    ],
)
def test_wrong_rows_of_messages(row, message):
    """Each names the row."""
    with pytest.raises(DataError, match=message):
        Task.from_records("m", train=[*CHATS, row], test=[])


def test_a_folder_of_messages(tmp_path):
    """As from records."""
    import json

    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CHATS))
    task = ll.load_task(tmp_path)
    assert task.training["train"][0].answer == "Rome"
    assert replace(task, chat=None).data_hash != task.data_hash
