"""Patching from rows with the same and with another answer: plain Hugging Face's numbers, and heads that carry the answer."""

import json

import numpy as np
import pytest
import torch

from lofit_lens import HeadSet, Task
from lofit_lens.analysis import answer_patching
from lofit_lens.analysis.answers import CHOSEN, NOT_PATCHED, OTHER, RANDOM, SAME
from lofit_lens.analysis.stored import restored
from lofit_lens.errors import InputError
from lofit_lens.models import model_info
from lofit_lens.tasks.collate import encode
from tests.adapters import edited, output_projection, random_adapter
from tests.selecting import answer_log_prob, no_hooks, z_at_end

PLACES = ("France", "Rome", "Ann", "Bob", "Eve")
ANSWERS = (" Rome", " Rome", " a sister in law", " of", " a sister in law")
ROWS = [{"prompt": f"Q: where is {p}? A:", "answer": a} for p, a in zip(PLACES, ANSWERS, strict=True)]
TASK = Task.from_records("places", train=ROWS, test=ROWS)
HEADS = HeadSet(["L2H1", "L0H3", "L2H0"])


@pytest.mark.parametrize("architecture", ["llama-gqa", "gpt2"])
@torch.no_grad()
def test_preferences_are_those_of_plain_hugging_face(loaded, hf, backend, architecture):
    """Whole sequences one by one: z of the chosen heads at the prompt's last token comes from the donor, edits included.

    The same-answer donor of a row is unique here; of the other-answer donors, one has to give the number.
    """
    model, plain = loaded(architecture, backend), hf(architecture)
    adapter = random_adapter(model, HEADS, seed=3)
    found = answer_patching(model, TASK, HEADS, adapter=adapter, draws=1, progress=False)
    values = dict(
        zip(
            zip(found.frame["which"], found.frame["draw"], found.frame["donors"], strict=True), found.items, strict=True
        )
    )
    n_heads, tokenizer, kept = plain.config.num_attention_heads, model.tokenizer, [0, 1, 2, 4]
    prompts = [row["prompt"] for row in ROWS]
    drawn = HeadSet.matched(HeadSet(HEADS.heads, shape=model_info(model).grid), seed=0)
    with edited(plain, adapter):
        # A pre-hook is called before those added later, so this is z with the adapter's edit.
        z = [z_at_end(plain, encode(tokenizer, p)).unflatten(1, (n_heads, -1)) for p in prompts]

        def preference(i, other, donor=None, heads=HEADS):
            at, handles = len(encode(tokenizer, prompts[i])) - 1, []
            for layer in heads.layers if donor is not None else ():
                index = [h.head for h in heads if h.layer == layer]

                def swap(module, args, layer=layer, index=index):
                    new = args[0].unflatten(-1, (n_heads, -1)).clone()
                    new[0, at, index] = z[donor][layer, index]
                    return (new.flatten(-2),)

                handles.append(output_projection(plain, layer).register_forward_pre_hook(swap))
            own, rival = (
                answer_log_prob(plain, tokenizer, prompts[i], a, eos=False) for a in (ANSWERS[i], ANSWERS[other])
            )
            for handle in handles:
                handle.remove()
            return torch.sigmoid((own - rival).double()).item()

        same_as = {0: 1, 1: 0, 2: 4, 4: 2}
        for row, i in enumerate(kept):
            rivals = [j for j in range(5) if ANSWERS[j] != ANSWERS[i]]
            by_rival = {j: preference(i, j) for j in rivals}
            (other,) = [
                j for j in rivals if by_rival[j] == pytest.approx(values["none", 0, NOT_PATCHED][row], abs=1e-5)
            ][:1]
            for key, heads in (((CHOSEN, 0), HEADS), ((RANDOM, 0), drawn)):
                rivals_alike = [j for j in rivals if ANSWERS[j] == ANSWERS[other]]
                assert values[(*key, SAME)][row] == pytest.approx(preference(i, other, same_as[i], heads), abs=1e-5)
                given = [preference(i, j, j, heads) for j in rivals_alike]
                assert any(values[(*key, OTHER)][row] == pytest.approx(g, abs=1e-5) for g in given)
    assert no_hooks(model)
    spread = np.ptp([v for items in values.values() for v in items])
    assert spread > 0.01


def test_what_is_carried(bridge_llama):
    """The score of a set is the difference of its two rows; the record comes back as it was; the same again is the same."""
    found = answer_patching(bridge_llama, TASK, HEADS, draws=4, progress=False)
    assert found.frame["which"].tolist() == ["none", *["chosen"] * 2, *["random"] * 8]
    assert (found.carried() == np.array(found.items[1]) - np.array(found.items[2])).all()
    test = found.test()
    assert test.chosen == pytest.approx(found.carried().mean())
    assert test.random == pytest.approx(np.mean([found.carried("random", d).mean() for d in range(4)]))
    again = restored(json.loads(json.dumps(found.to_dict())), "here")
    assert again.test() == test
    assert answer_patching(bridge_llama, TASK, HEADS, draws=4, progress=False).items == found.items


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS[1:4], {}, "0 of 3 rows have another row with the same answer"),
        (ROWS[:2], {}, "0 of 2 rows have another row with the same answer and one with another"),
        (ROWS, {"draws": 0}, "draws is 0"),
        (ROWS, {"split": "val"}, "no answers in the training form of its val split"),
    ],
)
def test_what_cannot_be_patched_is_said(bridge_llama, rows, options, message):
    """Answers that do not repeat, all the same answer, bad numbers, a split that is not there."""
    task = Task.from_records("places", train=rows, test=rows)
    with pytest.raises(InputError, match=message):
        answer_patching(bridge_llama, task, HEADS, progress=False, **options)
