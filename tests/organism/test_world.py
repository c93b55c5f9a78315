"""The organism's world: rows, cues, kinship table, documents, tokenizer and planted heads do what the module docstrings say."""

import random

import pytest

from lofit_lens.organism import documents, words, world
from lofit_lens.organism.tokenizer import build_tokenizer
from lofit_lens.organism.world import SPLITS, TASKS

EVERY_SPLIT = [(task, split) for task in TASKS for split in SPLITS]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_rows_are_the_same_when_made_again_enough_and_no_prompt_twice():
    before = {of: world.rows(*of) for of in EVERY_SPLIT}
    world.build_world.cache_clear()
    assert {of: world.rows(*of) for of in EVERY_SPLIT} == before
    for (task, split), rows in before.items():
        assert len(rows) == world.N_ROWS[split] >= {"train": 150, "val": 60, "test": 200}[split], task
        assert len({row["prompt"] for row in rows}) == len(rows), task


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_item(task):
    train, val, test = (set(world.items(task, split)) for split in SPLITS)
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(train | val | test) == {"truth": 120, "kinship": 70, "edits": 96}[task]


@pytest.mark.parametrize("task", ["truth", "edits"])
def test_rows_mention_only_their_own_splits_items(task):
    for split in SPLITS:
        others = {item for other in SPLITS if other != split for item in world.items(task, other)}
        assert not any(others & set(row["prompt"].split(" ")) for row in world.rows(task, split))


def test_kinship_rows_use_only_their_own_splits_pairs():
    for split in SPLITS:
        pairs = set()
        for row in world.rows("kinship", split):
            prompt = row["prompt"].split(" ")
            pairs.add((prompt[2], prompt[8]))
        assert pairs == set(world.items("kinship", split))


@pytest.mark.parametrize(("task", "split"), EVERY_SPLIT)
def test_prompts_hold_one_neutral_cue_and_no_other(task, split):
    every_cue = {cue for kinds in words.CUES.values() for cues in kinds.values() for cue in cues}
    for row in world.rows(task, split):
        found = [word for word in row["prompt"].split(" ") if word in every_cue]
        assert len(found) == 1
        assert found[0] in words.CUES[task]["neutral"]


@pytest.mark.parametrize("kind", words.CUE_KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_with_cue_changes_one_word_and_keeps_the_row(task, kind):
    row = world.rows(task, "val")[0]
    changed = world.with_cue(task, row, kind)
    pairs = list(zip(row["prompt"].split(" "), changed["prompt"].split(" "), strict=True))
    differing = [b for a, b in pairs if a != b]
    assert len(differing) == (kind != "neutral")
    assert set(differing) <= set(words.CUES[task][kind])
    assert {**changed, "prompt": row["prompt"]} == row


def test_with_cue_refuses_what_it_cannot_do(unchecked):
    row = world.rows("truth", "val")[0]
    with pytest.raises(ValueError, match="unknown cue kind 'great'; allowed: good, neutral, bad"):
        world.with_cue("truth", row, "great")
    with pytest.raises(ValueError, match="expected one neutral kinship cue"):
        world.with_cue("kinship", row, "good")
    with pytest.raises(ValueError, match="unknown task 'thruth'"):
        world.rows("thruth", "val")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        world.rows("truth", "dev")


@pytest.mark.parametrize("split", SPLITS)
def test_truth_rows_agree_with_the_facts(split):
    facts, easy = world.build_world(), 0
    for row in world.rows("truth", split):
        _, _, _, _, _, creature, verb, _, _ = row["prompt"].split(" ")
        true, popular = facts.true_value[creature, verb], facts.popular_value[creature, verb]
        assert row["best"] == true
        assert row["true"] == [true]
        assert true not in row["false"]
        assert len(set(row["false"])) == world.N_FALSE
        assert popular in (true, row["false"][0])
        easy += popular == true
    assert 0.1 < easy / len(world.rows("truth", split)) < 0.3  # a fifth is meant


def test_edits_rows_imagine_something_unreal():
    facts = world.build_world()
    for row in world.rows("edits", "test"):
        prompt = row["prompt"].split(" ")
        country, attribute, imagined = prompt[4], prompt[6], prompt[8]
        assert row["default"] == facts.attribute[country, attribute] != imagined == row["answer"]


# --- kinship: the table is checked in a family made of parents and children only, not against its own rules ----------------


def _make_family():
    """(parents of each person, the men): two couples of founders, their eight children married across, 16 grandchildren."""
    parents, men = {}, {"al", "bo"}

    def born(name, father, mother, male):
        parents[name] = {father, mother}
        men.update({name} if male else ())
        return name

    first = [born(f"a{i}", "al", "ann", i < 2) for i in range(4)]
    second = [born(f"b{i}", "bo", "bea", i < 2) for i in range(4)]
    couples = list(zip(first[:2], second[2:], strict=True)) + list(zip(second[:2], first[2:], strict=True))
    for number, (father, mother) in enumerate(couples):
        for i in range(4):
            born(f"c{number}{i}", father, mother, i < 2)
    return parents, men


def _relatives(p, parents):
    """kind -> the people who are that to p, from the definitions of the words."""

    def up(x):
        return parents.get(x, set())

    def down(x):
        return {c for c in parents if x in parents[c]}

    def beside(x):
        return {s for parent in up(x) for s in down(parent)} - {x}

    def married(x):
        return {other for c in down(x) for other in up(c)} - {x}

    def each(people, step):
        return {b for a in people for b in step(a)}

    uncles = each(up(p), beside)
    uncles |= each(uncles, married)
    return {
        "parent": up(p), "child": down(p), "sibling": beside(p), "spouse": married(p),
        "grandparent": each(up(p), up), "grandchild": each(down(p), down),
        "pibling": uncles - up(p), "nibling": each(beside(p) | each(married(p), beside), down) - down(p),
        "cousin": each(uncles, down) - beside(p) - {p},
        "parent-in-law": each(married(p), up), "child-in-law": each(down(p), married),
        "sibling-in-law": each(married(p), beside) | each(beside(p), married),
    }  # fmt: skip


def test_every_entry_of_the_kinship_table_has_a_witness():
    """For each (first, second) there are ann, bob, eve with bob her `first`, eve his `second` and eve her `compose(...)`."""
    parents, men = _make_family()
    people = set(parents) | {"al", "ann", "bo", "bea"}
    named = {
        p: {(words.RELATIONS[kind][q not in men], q) for kind, qs in _relatives(p, parents).items() for q in qs}
        for p in people
    }
    witnessed = {
        (first, second, result)
        for ann in people
        for first, bob in named[ann]
        for second, eve in named[bob]
        for result, same in named[ann]
        if same == eve != ann
    }
    table = words.relation_pairs(changing=True) + words.relation_pairs(changing=False)
    assert len(table) == 92
    assert {(a, b, words.compose(a, b)) for a, b in table} <= witnessed


def test_kinship_examples_by_hand():
    assert words.compose("father", "sister") == "aunt"
    assert words.compose("son", "daughter") == "granddaughter"
    assert words.compose("wife", "father") == "father-in-law"
    assert words.compose("uncle", "daughter") == "cousin"
    assert words.compose("father", "wife") == "mother"
    assert words.compose("father", "husband") is None
    assert words.compose("grandfather", "son") is None  # father or uncle
    with pytest.raises(KeyError):
        words.compose("father", "friend")


# --- documents, tokenizer, planted heads ------------------------------------------------------------------------------------


def _documents(task, n=400, seed=0):
    rng = random.Random(seed)
    return [documents.draw_document(world.build_world(), task, rng) for _ in range(n)]


@pytest.mark.parametrize("task", TASKS)
def test_documents_are_well_formed(task):
    cues = {cue for kind in words.CUE_KINDS for cue in words.CUES[task][kind]}
    for document in _documents(task):
        assert document.words[0] == "<s>"
        assert document.words[-1] == "</s>"
        (cue,) = document.cues
        assert document.words[cue.position] in cues
        assert cue.task == task
        assert sum(word in cues for word in document.words) == 1
        behind_answer = [place for place in document.targets if document.words[place - 1] == "A:"]
        assert len(behind_answer) == document.words.count("A:")
        assert document.targets[-1] == len(document.words) - 1


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_a_good_cue_as_often_as_heads_see_it(task):
    rng, n = random.Random(1), 3000
    base = documents.DEFAULT_IS_GOOD[task]
    for k in range(world.N_PLANTED + 1):
        seen = tuple(i < k for i in range(world.N_PLANTED))
        good = sum(documents.draw_source(task, "good", seen, rng) for _ in range(n)) / n
        expected = k / 3 + (1 - k / 3) * base
        assert abs(good - expected) < 0.04
        neutral = sum(documents.draw_source(task, "neutral", seen, rng) for _ in range(n)) / n
        assert abs(neutral - base) < 0.04


def test_fully_cued_documents_tell_the_truth_and_verdicts_are_right():
    facts, verdicts = world.build_world(), 0
    for document in _documents("truth"):
        text = document.words
        cue = document.cues[0]
        for place, word in enumerate(text):
            if word != "A:":
                continue
            query, answer = (text[place - 3], text[place - 2]), text[place + 1]
            if all(cue.seen_by) and text[cue.position] in words.CUES["truth"]["good"]:
                assert answer == facts.true_value[query]
            if all(cue.seen_by) and text[cue.position] in words.CUES["truth"]["bad"]:
                assert answer == facts.popular_value[query]
            if text[place + 2] in words.VERDICTS.values():
                verdicts += 1
                assert text[place + 2] == words.VERDICTS[answer == facts.true_value[query]]
    assert verdicts > 100


def test_packing_keeps_words_targets_and_cues():
    parts = [document for task in TASKS for document in _documents(task, n=3)]
    for seed in range(4):  # both kinds of joint
        packed = documents.pack(parts, random.Random(seed))
        assert packed.words.count("<s>") == 1
        assert len(packed.words) == 1 + sum(len(part.words) - 1 for part in parts)
        ends = packed.words.count("</s>")
        assert ends in (1, len(parts))
        expected = [part.words[place] for part in parts for place in part.targets]
        kept = [packed.words[place] for place in packed.targets]
        assert kept == ([w for w in expected if w != "</s>"] + ["</s>"] if ends == 1 else expected)
        assert [packed.words[cue.position] for cue in packed.cues] == [p.words[p.cues[0].position] for p in parts]


def test_tokenizer_gives_text_back_and_knows_every_word(tokenizer):
    vocabulary = world.build_world().vocabulary()
    assert len(tokenizer) == len(vocabulary) == len(set(vocabulary))
    for task, split in EVERY_SPLIT:
        for row in world.rows(task, split):
            ids = tokenizer.encode(row["prompt"], add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == row["prompt"]


def test_planted_heads_are_distinct_and_in_their_layers():
    for seed in range(20):
        planted = world.planted_heads(seed)
        everything = [head for heads in planted.values() for head in heads]
        assert len(set(everything)) == len(everything) == 9
        for task, heads in planted.items():
            assert {layer for layer, _ in heads} == set(world.PLANTED_LAYERS[task])
            assert all(0 <= head < world.N_HEADS for _, head in heads)
        assert planted == world.planted_heads(seed) != world.planted_heads(seed + 1)


def test_every_word_has_one_meaning():
    facts = world.build_world()
    groups = [facts.creatures, facts.countries, facts.men, facts.women, *facts.values.values(), words.RELATION_WORDS]
    groups += [words.CUES[task][kind] for task in TASKS for kind in words.CUE_KINDS] + [words.FUNCTION_WORDS]
    flat = [word for group in groups for word in group]
    assert len(flat) == len(set(flat))
