"""Scoring with shared fronts equals a slow loop over answers; what is shared runs once; where sharing is wrong it is off."""

import logging

import pytest
import torch
import transformers as tf

from lofit_lens.evaluation import generate, score_continuations
from lofit_lens.evaluation.prefix import shared_front
from lofit_lens.evaluation.scoring import score_encoded
from lofit_lens.models import (
    attention_window,
    extend,
    gaps_are_exact,
    load_model,
    logits_of,
    peek,
    prefill,
    remember,
    running,
    tokenizer_of,
)
from lofit_lens.models.gathered import Kept
from lofit_lens.tasks import load_task
from lofit_lens.tasks.collate import encode_continuations
from tests import slow, tiny
from tests.adapters import edited, random_adapter
from tests.conftest import BACKENDS, PAIRS, needs_hooked

# 22 tokens with BOS (a test below holds that), then prompts of 0 to 17 tokens of their own; one is the front itself, two are
# the same, and the shortest has the longest answer.
FRONT = "Q: Imagine that the capital of France is Rome. What is "
PROMPTS = [FRONT + p for p in ("the capital of the country where Ann was born? A:", "it? A:", "", "who?", "it? A:")]
ANSWERS = [
    [" Rome", " I have"], [" mother aunt uncle nephew sister brother granddaughter", " a"], ["x"], [" Rome is", " b", " Ann"],
    [" cde"],
]  # fmt: skip


def same(found, expected):
    """Equal within 1e-4 nats a summed log-prob."""
    return [len(f) for f in found] == [len(e) for e in expected] and all(
        f == pytest.approx(e, abs=1e-4) for f, e in zip(found, expected, strict=True)
    )


@pytest.fixture
def passes(monkeypatch):
    """Every cached pass from here on, as (whether it starts from nothing, real tokens it runs)."""
    ran, inner = [], running._run

    def spy(model, state, tokens, mask, borders, **kwargs):
        ran.append((state is None, int(mask.sum())))
        return inner(model, state, tokens, mask, borders, **kwargs)

    monkeypatch.setattr(running, "_run", spy)
    return ran


# ------------------------------------------------------------------------------------------- equal to the slow loop


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_every_architecture_scores_as_the_slow_loop(loaded, hf, architecture, on):
    """A front of 22 tokens shared by ragged prompts, an adapter attached: the sums of plain Hugging Face with the same edit."""
    model, tokenizer = loaded(architecture, on), tiny.tokenizer()
    lofit = random_adapter(model)
    with lofit.attached(model):
        found = score_continuations(model, PROMPTS, ANSWERS)
    with edited(hf(architecture), lofit):
        assert same(found, slow.scores(hf(architecture), tokenizer, PROMPTS, ANSWERS))


@pytest.mark.parametrize("budget", [1, 30, 70, 10**9])
def test_token_budgets_give_the_same_scores(llama, hf, budget):
    """One sequence a pass, some, or all at once."""
    found = score_continuations(llama, PROMPTS, ANSWERS, token_budget=budget)
    assert same(found, slow.scores(hf("llama"), tiny.tokenizer(), PROMPTS, ANSWERS))


@pytest.mark.parametrize(
    "prompts",
    [[""], ["", "Q: Ann?\nA:"], ["", ""], [PROMPTS[0]], [PROMPTS[1]] * 4],
    ids=["bos", "bos+", "2bos", "one", "same"],
)
def test_prompts_with_nothing_to_share_or_everything(llama, hf, prompts):
    """Only BOS, alone or with others; one question; four times the same prompt, whose own part is then empty."""
    answers = [[" Rome is", " a"], [" mother"], ["x y z"], [" Ann"]][: len(prompts)]
    found = score_continuations(llama, prompts, answers)
    assert same(found, slow.scores(hf("llama"), tiny.tokenizer(), prompts, answers))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("adapted", [False, True])
def test_truthfulqa_scores_as_the_slow_loop(loaded, plain_truthfulqa, backend, adapted):
    """60 real questions behind the official prompt, 538 answers, on each class, bare and with an adapter on three heads."""
    examples, expected = plain_truthfulqa
    model = loaded("llama", backend)
    scale = 0.5 if adapted else 0.0
    with random_adapter(model, A=scale, v=scale).attached(model):
        found = score_continuations(
            model, [e.prompt for e in examples], [[e.best, *e.true, *e.false] for e in examples]
        )
    assert same(found, expected[adapted])


@pytest.fixture(scope="module")
def plain_truthfulqa(data_dir, checkpoint, bridge_llama):
    """The questions, and the slow loop's scores without and with the adapter."""
    examples = load_task("truthfulqa", data_dir=data_dir / "truthfulqa").examples("test", limit=60)
    plain = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="sdpa").eval()
    prompts, answers = [e.prompt for e in examples], [[e.best, *e.true, *e.false] for e in examples]
    assert (len(prompts), sum(map(len, answers))) == (60, 538)
    bare = slow.scores(plain, tiny.tokenizer(), prompts, answers)
    with edited(plain, random_adapter(bridge_llama)):
        adapted = slow.scores(plain, tiny.tokenizer(), prompts, answers)
    assert (
        max(abs(b - a) for one, other in zip(bare, adapted, strict=True) for b, a in zip(one, other, strict=True)) > 0.1
    )
    return examples, {False: bare, True: adapted}


# ------------------------------------------------------------------------------------------------- how often what runs


@pytest.mark.parametrize("budget", [1, 100, 10**9])
def test_the_front_runs_once_and_each_prompt_once(llama, passes, budget):
    """Real tokens run = the front + each prompt's rest + each answer without its last token, whatever the budget.

    The front leaves each prompt a token of its own: the shortest prompt, which is all front, has its last one there.
    """
    gaps_are_exact(llama)
    passes.clear()
    score_continuations(llama, PROMPTS, ANSWERS, token_budget=budget)
    tokenizer = tokenizer_of(llama)
    lengths = [len(slow.ids_of(tokenizer, p)) for p in PROMPTS]
    labels = [
        len(slow.ids_of(tokenizer, p + a)) - n for p, n, s in zip(PROMPTS, lengths, ANSWERS, strict=True) for a in s
    ]
    front = min(lengths) - 1
    assert passes[0] == (True, front)
    assert not any(anew for anew, _ in passes[1:])
    assert sum(n for _, n in passes) == front + sum(n - front for n in lengths) + sum(n - 1 for n in labels)


@pytest.mark.parametrize(("answer", "n"), [(" Rome is", 3), (" Rome", 2)])
def test_all_answers_of_all_questions_share_a_pass(llama, passes, answer, n):
    """Without a bound on tokens three passes do: the front, what prompts add, what answers add; one token adds nothing."""
    gaps_are_exact(llama)
    passes.clear()
    score_continuations(llama, PROMPTS[:2], [[answer, " a"], [answer]], token_budget=10**9)
    assert len(passes) == n


# ----------------------------------------------------------------------------------------------------------- merges


def test_a_continuation_that_merges_is_scored_from_the_merged_token_on(llama, hf, caplog):
    """`Ro` + `me` is one token, `Ro` + ` x` is not: the label starts at the merged token, and one warning counts them."""
    tokenizer, prompt = tokenizer_of(llama), "the capital of France is Ro"
    front = slow.ids_of(tokenizer, prompt)
    rome, other = encode_continuations(tokenizer, prompt, ["me", " x"])
    assert (rome.merged, other.merged) == (True, False)
    assert (rome.start, other.start) == (len(slow.ids_of(tokenizer, "the capital of France is")), len(front))
    assert tokenizer.convert_ids_to_tokens(rome.ids[rome.start]) == "ĠRome"
    with caplog.at_level(logging.WARNING, logger="lofit_lens"):
        found = score_continuations(llama, [prompt, "Q: Ann?"], [["me", " x", "me"], [" a"]])
    assert [r.message for r in caplog.records if "share a token" in r.message] == [
        "2 of 4 continuations share a token with the end of their prompt in this tokenizer; they are scored from that token on"
    ]
    merged = slow.log_probs(hf("llama"), list(rome.ids))[rome.start - 1, rome.ids[rome.start]].item()
    assert found[0][0] == found[0][2] == pytest.approx(merged, abs=1e-4)
    assert found[0][1] == pytest.approx(slow.score(hf("llama"), tokenizer, prompt, " x"), abs=1e-4)


def test_answers_of_one_prompt_may_merge_at_different_depths(llama, hf):
    """`countr` is three tokens and `country` one, so that one answer starts three tokens before the other's first label."""
    tokenizer, prompt, answers = tokenizer_of(llama), "In what countr", ["y was Ann", " x y", "y"]
    starts = [e.start for e in encode_continuations(tokenizer, prompt, answers)]
    n = len(slow.ids_of(tokenizer, prompt))
    assert starts == [n - 3, n, n - 3]
    found = score_continuations(llama, [prompt, "Q: Ann?"], [answers, [" a"]])
    assert same(found, slow.scores(hf("llama"), tokenizer, [prompt, "Q: Ann?"], [answers, [" a"]]))


def test_without_merges_there_is_no_warning(llama, caplog):
    """Answers that begin with their space leave prompts as they are."""
    with caplog.at_level(logging.WARNING, logger="lofit_lens"):
        score_continuations(llama, PROMPTS[:1], ANSWERS[:1])
    assert caplog.records == []


def test_a_budget_below_one_is_refused(bridge_llama):
    """The error says what to give."""
    with pytest.raises(ValueError, match="token_budget is 0; it must be at least 1"):
        score_encoded(bridge_llama, [], token_budget=0)


# ----------------------------------------------------------------------------- windows, and distances counted otherwise


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Kind and class -> the plain model and ours: Mistrals with a window, and Bloom, whose ALiBi has no position embedding."""
    made, plain = {}, {}
    wide = {**tiny.WIDE, "num_key_value_heads": 2, "head_dim": 12}
    small = {k: v for k, v in tiny.SHARED.items() if k.endswith("id") or k == "vocab_size"}

    def model_of(kind, on):
        if kind not in plain:
            config = tf.BloomConfig(**small, hidden_size=32, n_head=4, n_layer=3) if kind == "bloom" else tf.MistralConfig(
                **wide, sliding_window=kind
            )  # fmt: skip
            torch.manual_seed(0)
            plain[kind] = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            for p in plain[kind].parameters():
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=0.15)
            folder = tmp_path_factory.mktemp("odd") / f"tiny-{kind}"
            plain[kind].save_pretrained(folder)
            tiny.tokenizer().save_pretrained(folder)
            made[kind] = folder
        if (kind, on) not in made:
            made[kind, on] = load_model(made[kind], backend=on, device="cpu")
        return plain[kind], made[kind, on]

    return model_of


# 16 is shorter than every prompt. 39 prompt tokens and 15 of an answer are 54 places, though no sequence has more than 44.
@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kind", [16, 44, 48, 60, "bloom"])
def test_windows_and_alibi_score_as_the_slow_loop(odd, kind, on):
    """Padding between front and rest takes places of a window, or of ALiBi's distances: sharing is off there, or right."""
    plain, model = odd(kind, on)
    assert attention_window(model) == (None if kind == "bloom" else kind)
    found = score_continuations(model, PROMPTS, ANSWERS)
    assert same(found, slow.scores(plain, tiny.tokenizer(), PROMPTS, ANSWERS))


@pytest.mark.parametrize("on", BACKENDS)
@pytest.mark.parametrize("kind", [16, 48, "bloom"])
def test_windows_and_alibi_decode_as_the_slow_loop(odd, kind, on):
    """Generation shares fronts too."""
    plain, model = odd(kind, on)
    tokenizer = tiny.tokenizer()
    expected = [tokenizer.decode(slow.new_ids(plain, tokenizer, p, 8)) for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=8) == expected


def test_gaps_are_exact_where_positions_are_counted_over_tokens(llama, odd, passes):
    """So they are on a Llama and on the bridge's Bloom; the answer is remembered, so asking again runs nothing."""
    assert gaps_are_exact(llama)
    assert gaps_are_exact(odd("bloom", "bridge")[1])
    passes.clear()
    assert gaps_are_exact(llama)
    assert passes == []


@needs_hooked
def test_gaps_that_count_switch_sharing_off(odd):
    """HookedTransformer's ALiBi counts places of the cache, padding included."""
    model = odd("bloom", "hooked")[1]
    assert not gaps_are_exact(model)
    ids = list(range(3, 30))
    assert len(shared_front(model, [[*ids, 50], [*ids, 60]], longest=40)) == 0


def test_a_window_that_is_switched_off_is_none(loaded, monkeypatch):
    """Qwen 2 states a window and does not use it unless told to; of several windows the smallest counts."""
    config = loaded("qwen2", "bridge").original_model.config
    monkeypatch.setattr(config, "sliding_window", 8)
    monkeypatch.setattr(config, "use_sliding_window", False)
    assert attention_window(loaded("qwen2", "bridge")) is None
    monkeypatch.setattr(config, "use_sliding_window", True)
    monkeypatch.setattr(config, "attention_chunk_size", 5, raising=False)
    assert attention_window(loaded("qwen2", "bridge")) == 5


# ------------------------------------------------------------------------------------------ states, chosen and looked at

TOKENS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
NEW = torch.randint(3, 400, (3, 2), generator=torch.Generator().manual_seed(5))


def plain_logits(plain, row, new):
    """Logits at the new tokens behind one row of TOKENS."""
    return plain(torch.cat([TOKENS[row][MASK[row].bool()], new])[None]).logits[0, -len(new) :]


@torch.no_grad()
def test_a_look_leaves_the_state_usable(llama, hf):
    """remember, peek twice, extend: each time the full pass's logits, and the state has grown once."""
    last, state = remember(llama, None, TOKENS, MASK)
    rows = torch.tensor([1, 0, 1])
    looks = [peek(llama, state, rows, NEW, torch.ones_like(NEW)) for _ in range(2)]
    assert state.mask.shape == (2, 9)
    after, grown = extend(llama, state, NEW[:2])
    assert grown.mask.shape == (2, 11)
    for i, row in enumerate(rows.tolist()):
        for look in looks:
            assert torch.allclose(look[i], plain_logits(hf("llama"), row, NEW[i]), atol=1e-5)
    for row in (0, 1):
        assert torch.allclose(after[row], plain_logits(hf("llama"), row, NEW[row]), atol=1e-5)
        assert torch.allclose(last[row], hf("llama")(TOKENS[row][MASK[row].bool()][None]).logits[0, -1], atol=1e-5)


@torch.no_grad()
def test_a_selection_of_a_selection(llama, hf):
    """Rows [1, 0, 1] and of those [2, 1, 0] are rows 1, 0, 1; after growing, rows are those of the grown state."""
    state = remember(llama, None, TOKENS, MASK)[1].select(torch.tensor([1, 0, 1])).select(torch.tensor([2, 1, 0]))
    logits, grown = extend(llama, state, NEW)
    for i, row in enumerate((1, 0, 1)):
        assert torch.allclose(logits[i], plain_logits(hf("llama"), row, NEW[i]), atol=1e-5)
    more = torch.tensor([[7], [8]])
    again, _ = extend(llama, grown.select(torch.tensor([0, 2])).select(torch.tensor([1, 0])), more)
    for i, taken in enumerate((2, 0)):
        whole = plain_logits(hf("llama"), 1, torch.cat([NEW[taken], more[i]]))
        assert torch.allclose(again[i, 0], whole[-1], atol=1e-5)


def test_gradients_flow_through_a_selection(llama):
    """An adapter's gradients over prefill, select and extend are the full pass's: prompts count, once for each use."""
    lofit, rows = random_adapter(llama).requires_grad_(), torch.tensor([1, 0, 1])

    def gradients(loss):
        loss.backward()
        found = [p.grad.clone() for p in lofit.parameters()]
        lofit.zero_grad()
        return found

    with lofit.attached(llama):
        _, state = prefill(llama, TOKENS, MASK)
        found = gradients(extend(llama, state.select(rows), NEW)[0].logsumexp(-1).sum())
        tokens, mask = torch.cat([TOKENS[rows], NEW], 1), torch.cat([MASK[rows], torch.ones_like(NEW)], 1)
        full = gradients(logits_of(llama, tokens, mask)[:, 9:].logsumexp(-1).sum())
    for mine, whole in zip(found, full, strict=True):
        assert whole.abs().max() > 1e-3
        assert torch.allclose(mine, whole, atol=1e-4)


def test_rows_grow_in_place_and_leave_what_they_came_from():
    """Chosen rows are copied once, with room; later tokens are written there, and neither source nor a sister sees them."""
    parts = [torch.randn(2, 3, n, 5, generator=torch.Generator().manual_seed(n)) for n in (4, 1, 2, 100)]
    source = Kept.of(parts[0].clone())
    kept, sister, whole = source.select(torch.tensor([1, 0])), source.select(torch.tensor([0, 0])), parts[0][[1, 0]]
    places = []
    with torch.no_grad():
        for new in parts[1:]:
            whole = torch.cat([whole, new], dim=2)
            assert torch.equal(kept.join(new, keep=True), whole)
            assert torch.equal(kept.seen, whole)
            places.append(kept.held.data_ptr())
        branch = kept.select(torch.tensor([1]))
        branch.join(parts[1][:1], keep=True)
        kept.join(parts[2], keep=True)
        assert torch.equal(branch.seen, torch.cat([whole[1:], parts[1][:1]], dim=2))
        assert torch.equal(sister.join(parts[1], keep=False), torch.cat([parts[0][[0, 0]], parts[1]], dim=2))
    assert places[0] == places[1] != places[2]  # the last one had no room
    assert torch.equal(source.seen, parts[0])
