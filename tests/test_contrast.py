"""Contrast vectors equal the slow way, three plain forwards a sequence: scored, decoded, cached and padded as it may be."""

import copy
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file

from lofit_lens import Task, attached, evaluate, generate
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.evaluation.scoring import score_continuations
from lofit_lens.interventions.contrast import ContrastVectors, stream_behind
from lofit_lens.interventions.files import CONFIG_FILE, WEIGHTS_FILE
from lofit_lens.interventions.repe import RepE
from lofit_lens.models import (
    Borders,
    before_each_pass,
    extend,
    hooked,
    load_model,
    logits_of,
    positions_of,
    prefill,
    residual_point,
    step,
)
from tests import slow, tiny
from tests.adapters import random_adapter
from tests.blocks import adding, at_blocks, streams
from tests.conftest import PAIRS

LAYERS, COEFFICIENT = (0, 2), 1.5
PLUS, MINUS = "Give a truthful answer, Ann.\n", "Bob:"  # of different length
PRIMER = "Q: Who? A: Ann.\n\nInterpret each question literally, and carefully.\n\n"
PROMPTS = [f"{PRIMER}Q: Is Eve an aunt?\nA:", f"{PRIMER}Q: What is the capital of France?\nA:", "how?"]
ANSWERS = [
    [" no", " I have no comment", " Eve is the aunt of Bob."],
    [" Rome", " the book"],
    [" mother", " granddaughter and son"],
]
EARLIER = {"answer": 0, "predicting": 1, "all": 10_000}


def contrast(model, **options):
    """Between the two instructions above, at layers 0 and 2."""
    given = {"positive": PLUS, "negative": MINUS, "coefficient": COEFFICIENT, **options}
    return ContrastVectors.for_model(model, LAYERS, **given)


def front(text):
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def explicit(plain, ids, prompt, positions="answer", *, layers=LAYERS, others=None):
    """Edits of one sequence: two plain forwards behind the instructions, h+ - h- token by token, from a place on.

    `others(start)` gives edits that stand from the first answer token on, which lies further back behind an instruction.
    """
    bos = ids[0] == 1
    behind = []
    for text in (PLUS, MINUS):
        more = front(text)
        edits = others(prompt + len(more)) if others else ()
        found = streams(plain, [*ids[:bos], *more, *ids[bos:]], layers, *edits)
        behind.append({n: torch.cat([h[:bos], h[len(more) + bos :]]) for n, h in found.items()})
    start = max(prompt - EARLIER[positions], 0)
    own = [(n, adding(COEFFICIENT * (behind[0][n] - behind[1][n]), start)) for n in layers]
    return [*(others(prompt) if others else ()), *own]


@torch.no_grad()
def expected_logits(plain, ids, prompt, positions="answer", **options):
    with at_blocks(plain, *explicit(plain, ids, prompt, positions, **options)):
        return plain(torch.tensor([ids])).logits[0]


def expected_scores(plain, positions, **options):
    """One answer at a time."""
    found = []
    for prompt, listed in zip(PROMPTS, ANSWERS, strict=True):
        found.append([])
        for answer in listed:
            ids, start = slow.joined_ids(tiny.tokenizer(), prompt, answer)
            logs = expected_logits(plain, ids, start, positions, **options).log_softmax(-1)
            found[-1].append(sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return found


def close(found, expected, tolerance=1e-4):
    return all(a == pytest.approx(b, abs=tolerance) for a, b in zip(found, expected, strict=True))


def batch(rows, side="right"):
    """Tokens and mask; padding is an id like any other."""
    longest = max(map(len, rows))
    tokens, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[i, at], mask[i, at] = torch.tensor(row), 1
    return tokens, mask


ROWS = [[1, 30, 31, 32, 33, 34, 35, 36], [1, 50, 51, 52, 53], [40, 41, 42, 43, 44, 45]]  # the last without BOS
BORDERS = Borders(torch.tensor([5, 2, 3]), torch.tensor([8, 5, 6]))


# ------------------------------------------------------------------------------------------------------ one forward


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
@torch.no_grad()
def test_one_forward_equals_three_plain_ones(loaded, hf, architecture, on):
    """Ragged rows, padded on the right, one without BOS, on every architecture."""
    model, plain = loaded(architecture, on), hf(architecture)
    tokens, mask = batch(ROWS)
    with contrast(model).attached(model):
        got = logits_of(model, tokens, mask, BORDERS)
    for row, ids, prompt in zip(got, ROWS, BORDERS.prompt.tolist(), strict=True):
        expected = expected_logits(plain, ids, prompt)
        assert (row[: len(ids)] - expected).abs().max() < 1e-5
        assert (plain(torch.tensor([ids])).logits[0] - expected)[prompt:].abs().max() > 0.05


@pytest.mark.parametrize("positions", ["predicting", "all"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_other_positions_and_either_padding(llama, hf, positions, side):
    """BOS itself, which stands in front of both instructions, has no difference."""
    tokens, mask = batch(ROWS, side)
    with contrast(llama, positions=positions).attached(llama):
        got = logits_of(llama, tokens, mask, BORDERS)
    for row, kept, ids, prompt in zip(got, mask.bool(), ROWS, BORDERS.prompt.tolist(), strict=True):
        assert (row[kept] - expected_logits(hf("llama"), ids, prompt, positions)).abs().max() < 1e-5


def test_only_rows_with_an_answer_are_run_again(llama, hf, monkeypatch):
    """Of three rows one ends with its prompt; a pass of prompts alone costs nothing, and any other two passes more."""
    tokens, mask = batch(ROWS)
    borders, sizes = Borders(torch.tensor([5, 5, 3]), BORDERS.length), []
    with torch.no_grad(), contrast(llama).attached(llama):
        with hooked(residual_point(llama, 1, "hook_resid_post"), lambda h, hook: sizes.append(tuple(h.shape[:2]))):
            got = logits_of(llama, tokens, mask, borders)
            assert sizes == [(2, 8 + len(front(PLUS))), (2, 8 + len(front(MINUS))), (3, 8)]
            sizes.clear()
            prefill(llama, tokens[:1, :5], mask[:1, :5], Borders(torch.tensor([5]), torch.tensor([8])))
        assert sizes == [(1, 5)]
    for row, ids, prompt in zip(got, ROWS, borders.prompt.tolist(), strict=True):
        assert (row[: len(ids)] - expected_logits(hf("llama"), ids, prompt)).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------- scores and decoding


@pytest.mark.parametrize("positions", ["answer", "predicting", "all"])
def test_scores_of_ragged_questions_equal_the_slow_way(llama, hf, positions):
    """Through the shared front and prompts that run once."""
    with contrast(llama, positions=positions).attached(llama):
        found = score_continuations(llama, PROMPTS, ANSWERS)
    assert close(found, expected_scores(hf("llama"), positions))
    untouched = slow.scores(hf("llama"), tiny.tokenizer(), PROMPTS, ANSWERS)
    assert not close(found, untouched, 0.01)


def test_evaluate_grades_these_scores(bridge_llama):
    """A task with options has the scores above."""
    rows = [{"prompt": p, "options": a, "answer": a[-1]} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    with contrast(bridge_llama).attached(bridge_llama):
        found = evaluate(bridge_llama, Task.from_records("t", train=rows, test=rows), progress=False)
        assert close(list(found.items["scores"]), score_continuations(bridge_llama, PROMPTS, ANSWERS))


def test_generation_equals_the_slow_way(llama, hf):
    """Each step edits the newest token by two full forwards; from the prompt's last token on."""
    tokenizer, plain, n = tiny.tokenizer(), hf("llama"), 6
    with contrast(llama, coefficient=COEFFICIENT).attached(llama):
        found = generate(llama, PROMPTS, max_new_tokens=n)
    for prompt, text in zip(PROMPTS, found, strict=True):
        before, new = slow.ids_of(tokenizer, prompt), []
        for _ in range(n):
            new.append(int(expected_logits(plain, [*before, *new], len(before), "predicting")[-1].argmax()))
        assert tokenizer.eos_token_id not in new
        assert text == tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]
    assert found != generate(llama, PROMPTS, max_new_tokens=n)


@torch.no_grad()
def test_cached_passes_with_gaps_equal_the_full_pass(llama):
    """Prefill (padded left), an extension with a gap and a step: the layout tells which columns are which tokens."""
    rows = [[1, 30, 31, 32, 33, 34, 35, 36], [1, 50, 51, 52, 53, 54]]
    tokens, mask = batch([rows[0][:3], rows[1][:2]], "left")
    borders = Borders(torch.tensor([2, 2]), torch.tensor([8, 6]))
    with contrast(llama).attached(llama):
        whole = logits_of(llama, *batch(rows), borders)
        first, state = prefill(llama, tokens, mask, borders)
        middle, state = extend(llama, state, *batch([rows[0][3:7], rows[1][2:5]], "left"))
        last, state = step(llama, state, torch.tensor([36, 54]))
    for r, row in enumerate(rows):
        parts = torch.cat([first[r][mask[r].bool()], middle[r][(0, 1)[r] :], last[r][None]])
        assert torch.allclose(parts, whole[r, : len(row)], atol=1e-5)


# --------------------------------------------------------------------------------------------- coming and going


@torch.no_grad()
def test_coefficient_zero_and_detaching_are_bit_equal(llama):
    """Nothing is changed by a coefficient of 0; nothing is left behind, also after an exception, and no tensor is kept."""
    tokens, mask = batch(ROWS)
    before = logits_of(llama, tokens, mask, BORDERS)
    with contrast(llama, coefficient=0.0).attached(llama):
        assert torch.equal(logits_of(llama, tokens, mask, BORDERS), before)
    one, seen = contrast(llama), []

    def fails():
        with one.attached(llama), before_each_pass(llama, lambda layout: seen.append(weakref.ref(layout))):
            seen.append(logits_of(llama, tokens, mask, BORDERS))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    inside = seen.pop()
    assert (inside - before).abs().max() > 0.05
    assert torch.equal(logits_of(llama, tokens, mask, BORDERS), before)
    assert positions_of(llama) == ()
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())
    assert len(seen) == 3  # the pass and the two behind the instructions
    assert not any(layout() for layout in seen)
    assert one.n_parameters == len(one.state_dict()) == len(list(one.parameters())) == 0


@torch.no_grad()
def test_a_pass_that_fails_behind_an_instruction_leaves_it_usable(llama):
    """An error in one of the further passes is passed on; the next pass is edited again."""
    tokens, mask = batch(ROWS)
    with contrast(llama).attached(llama):
        expected = logits_of(llama, tokens, mask, BORDERS)

        def fails(h, hook):
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"), hooked(residual_point(llama, 1, "hook_resid_post"), fails):
            logits_of(llama, tokens, mask, BORDERS)
        assert torch.equal(logits_of(llama, tokens, mask, BORDERS), expected)


@torch.no_grad()
def test_a_call_that_says_nothing_of_its_prompts_is_refused(llama):
    """The model's own forward: silently unedited it would pass for edited."""
    tokens, _ = batch(ROWS[:1])
    for positions in ("answer", "all"):
        with contrast(llama, positions=positions).attached(llama):
            with pytest.raises(AdapterError, match="does not say where its prompts end"):
                llama(tokens)
            logits_of(llama, tokens, torch.ones_like(tokens))
    llama(tokens)


def test_a_sequence_that_does_not_fit_is_refused_before_it_runs(llama):
    """2,040 tokens and an instruction of more than 8 exceed the 2,048: both numbers are named, and no pass starts."""
    tokens, n = torch.full((1, 2040), 30), len(front(PLUS))
    assert n > 8 > len(front(MINUS))
    with contrast(llama).attached(llama):
        ran = []
        with (
            hooked(residual_point(llama, 0, "hook_resid_post"), lambda h, hook: ran.append(1)),
            pytest.raises(
                DataError, match=rf"2040 tokens after an instruction of {n} .*\(2048\).* than {2048 - n} tokens"
            ),
        ):
            logits_of(llama, tokens, torch.ones_like(tokens), Borders(torch.tensor([2039]), torch.tensor([2040])))
        assert not ran


@torch.no_grad()
def test_rows_without_an_answer_need_no_room(llama, monkeypatch):
    """A long prompt beside it whose answer is not in this pass is no matter; what fits exactly, fits."""
    tokens, mask = batch([[30] * 200, [1, 50, 51]])
    monkeypatch.setattr("lofit_lens.interventions.contrast.context_length", lambda model: limit)
    limit = 200 + len(front(MINUS))
    assert len(front(PLUS)) > len(front(MINUS))
    with contrast(llama).attached(llama):
        logits_of(llama, tokens, mask, Borders(torch.tensor([200, 2]), torch.tensor([200, 3])))
        with pytest.raises(DataError, match="200 tokens"):
            logits_of(llama, tokens, mask, Borders(torch.tensor([199, 2]), torch.tensor([200, 3])))
        limit = 3 + len(front(PLUS))
        logits_of(llama, tokens[1:, :3], mask[1:, :3], Borders(torch.tensor([2]), torch.tensor([3])))
        limit -= 1
        with pytest.raises(DataError, match="3 tokens"):
            logits_of(llama, tokens[1:, :3], mask[1:, :3], Borders(torch.tensor([2]), torch.tensor([3])))


@torch.no_grad()
def test_differences_are_float32_over_half_precision(checkpoint, backend):
    """Streams are subtracted in float32; the model's own type comes out, and a coefficient of 0 is bit-equal."""
    model = load_model(checkpoint("llama"), backend=backend, dtype="bfloat16", device="cpu")
    (tokens, mask), seen = batch(ROWS), []
    before, one = logits_of(model, tokens, mask, BORDERS), contrast(model)
    with one.attached(model), before_each_pass(model, seen.append):
        inside = logits_of(model, tokens, mask, BORDERS)
    plus, minus = (stream_behind(model, front(t), seen[-1], torch.arange(3), LAYERS) for t in (PLUS, MINUS))
    at = slice(5, 8)  # the first row's answer
    for layer in LAYERS:
        assert plus[layer].dtype == torch.float32
        assert torch.equal(seen[-1].found[one][layer][0, at], plus[layer][0, at] - minus[layer][0, at])
    assert inside.dtype == torch.bfloat16
    assert (inside - before).abs().max() > 0.05
    with contrast(model, coefficient=0.0).attached(model):
        assert torch.equal(logits_of(model, tokens, mask, BORDERS), before)


# -------------------------------------------------------------------------------------------- beside other edits


def test_what_else_is_attached_acts_behind_the_instructions_too(llama, hf):
    """Control on the answer's positions, which lie further back there; and a LoFiT adapter, which acts everywhere."""
    plain, d = (
        hf("llama"),
        torch.nn.functional.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(1))),
    )
    repe = RepE(d, (0, 1), n_layers=3, coefficient=2.0, positions="answer")
    others = lambda start: [(n, adding(2.0 * d[n], start)) for n in (0, 1)]
    with attached(llama, repe, contrast(llama)):
        found = score_continuations(llama, PROMPTS, ANSWERS)
    assert close(found, expected_scores(plain, "answer", others=others))


@torch.no_grad()
def test_two_of_them_may_be_attached(bridge_llama):
    """Each acts in the other's further passes; one of coefficient 0 changes nothing, whichever comes first."""
    (tokens, mask), borders = batch(ROWS[:2]), Borders(torch.tensor([5, 2]), torch.tensor([8, 5]))
    one, none = contrast(bridge_llama), contrast(bridge_llama, coefficient=0.0, positions="predicting")
    with one.attached(bridge_llama):
        expected = logits_of(bridge_llama, tokens, mask, borders)
        with pytest.raises(AdapterError, match="already attached"), one.attached(bridge_llama):
            pass
    for pair in ((one, none), (none, one)):
        with attached(bridge_llama, *pair):
            assert torch.allclose(logits_of(bridge_llama, tokens, mask, borders), expected, atol=1e-6)
    with attached(bridge_llama, one, copy.deepcopy(one)):
        twice = logits_of(bridge_llama, tokens, mask, borders)
    assert torch.isfinite(twice).all()
    assert not torch.allclose(twice, expected, atol=0.01)


def test_another_adapter_may_follow(checkpoint, backend):
    """Its look at the model (one forward of two tokens) is a pass like any other, and sees each site once."""
    model = load_model(checkpoint("llama"), backend=backend, device="cpu")
    tokens, mask = batch(ROWS)
    with torch.no_grad():
        with attached(
            model, contrast(model, positions="all"), RepE(torch.eye(32)[:1], (1,), n_layers=3, coefficient=1.0)
        ):
            logits_of(model, tokens, mask, BORDERS)
        with contrast(model).attached(model), random_adapter(model).train_only("v").attached(model) as lofit:
            graphs = []
            with torch.enable_grad(), before_each_pass(model, lambda layout: graphs.append(torch.is_grad_enabled())):
                logits_of(model, tokens, mask, BORDERS).logsumexp(-1).sum().backward()
            assert lofit.v.grad.abs().sum() > 0
    assert graphs == [False, False, True]  # none through the differences


# ------------------------------------------------------------------------------------------------- object and files


def test_the_defaults_are_the_papers_recipe(bridge_llama):
    """Layers 0, 2, ...; coefficient 0.25; the answer's tokens; truthful less untruthful."""
    one = ContrastVectors.for_model(bridge_llama)
    assert (one.layers, one.coefficient, str(one.positions)) == ((0, 2), 0.25, "answer")
    assert (one.positive, one.negative) == ("Give a truthful answer.\n", "Give an untruthful answer.\n")
    assert ContrastVectors(range(0, 32, 2), n_layers=32, d_model=4096).layers == tuple(range(0, 32, 2))
    for part in ("ContrastVectors(", "'Give a truthful answer.\\n' - ", "coefficient 0.25 at answer", "layers 0 2"):
        assert part in repr(one)
    strong, last = one.with_strength(2.0), one.with_positions("last")
    found = [(each.coefficient, str(each.positions)) for each in (one, strong, last)]
    assert found == [(0.25, "answer"), (2.0, "answer"), (0.25, "last")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layers": []}, "no layer"), ({"layers": [3]}, "0 to 2"), ({"positive": " \n"}, "neither empty"),
     ({"negative": ""}, "neither empty"), ({"negative": PLUS}, "two different ones"),
     ({"coefficient": float("inf")}, "coefficient is inf"), ({"positions": "x"}, "unknown positions")],
)  # fmt: skip
def test_what_is_refused(changes, message):
    """Each value is named."""
    given = {"layers": (0,), "n_layers": 3, "d_model": 32, "positive": PLUS, **changes}
    with pytest.raises(InputError, match=message):
        ContrastVectors(given.pop("layers"), **given)


def test_instructions_of_the_same_tokens_are_refused(llama):
    """Where a tokenizer drops or does not know what tells them apart, nothing would be added."""
    one = contrast(llama, positive="x", negative="y")
    one.negative = "x"
    with pytest.raises(AdapterError, match=r"reads 'x' and 'x' as the same tokens \(\[\d+\]\)"), one.attached(llama):
        pass


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return ContrastVectors((0, 2), n_layers=3, d_model=32).save_pretrained(tmp_path_factory.mktemp("contrast") / "good")


def test_damaged_files_are_refused(good, tmp_path):
    """A tensor that does not belong there, a truncated file, the same instruction twice, instructions that are no text."""
    folder = shutil.copytree(good, tmp_path / "x")
    whole, written = (folder / WEIGHTS_FILE).read_bytes(), json.loads((folder / CONFIG_FILE).read_text())
    save_file({"v": torch.ones(1)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"holds \['v'\]"):
        ContrastVectors.from_pretrained(folder)
    (folder / WEIGHTS_FILE).write_bytes(whole[:4])
    with pytest.raises(AdapterError, match="safetensors"):
        ContrastVectors.from_pretrained(folder)
    (folder / WEIGHTS_FILE).write_bytes(whole)
    for changes, message in (({"negative": written["positive"]}, "two different"), ({"positive": 3}, "positive is 3")):
        (folder / CONFIG_FILE).write_text(json.dumps(written | changes))
        with pytest.raises(AdapterError, match=message):
            ContrastVectors.from_pretrained(folder)
