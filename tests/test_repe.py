"""RepE: what control adds, that planted directions are found with the right sign, and that they turn a model's answers."""

import contextlib
import itertools

import numpy as np
import pytest
import torch

from lofit_lens import Task, evaluate
from lofit_lens.errors import DataError, InputError
from lofit_lens.interventions.repe import RepE, shift_h
from lofit_lens.models import (
    Borders,
    hooked,
    layout_of,
    load_model,
    logits_of,
    model_info,
    residual_point,
    tokenizer_of,
)
from lofit_lens.probing.reading import ReadingVectors, reading_vector, reading_vectors
from lofit_lens.probing.record import record
from lofit_lens.tasks.collate import encode
from tests import tiny
from tests.blocks import adding, at_blocks
from tests.conftest import PAIRS

D = 32
TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
WORDS = [
    "brother", "country", "daughter", "author", "book", "capital", "uncle", "mother", "question", "story", "Ann", "Bob", "Eve",
    "aunt", "nephew", "wife",
]  # fmt: skip


def unit(*shape, seed=0):
    """Random unit vectors."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def control(layers=(2, 0), *, coefficient=3.0, n_layers=3, **options):
    """Random directions."""
    return RepE(unit(len(layers), D), layers, n_layers=n_layers, coefficient=coefficient, **options)


@torch.no_grad()
def run(model, tokens=TOKENS, borders=None):
    return logits_of(model, tokens, torch.ones_like(tokens), borders)


# ------------------------------------------------------------------------------------------------------ control


def test_the_shift_by_hand():
    """Coefficient -2: h + (-2) * d; relative with scale 0.5: h + (-2 * 0.5) * d. Rows go with their layers."""
    directions, scale = torch.tensor([[0.6, 0.8], [1.0, 0.0]]), torch.tensor([0.5, 3.0])
    plain = RepE(directions, (4, 1), n_layers=5, coefficient=-2.0, scale=scale)
    assert plain.layers == (1, 4)
    assert plain.shift(4).tolist() == pytest.approx([-1.2, -1.6])
    assert plain.shift(1).tolist() == [-2.0, 0.0]
    relative = RepE(directions, (4, 1), n_layers=5, coefficient=-2.0, scale=scale, relative=True)
    assert relative.shift(4).tolist() == pytest.approx([-0.6, -0.8])
    assert relative.shift(1).tolist() == [-6.0, 0.0]
    assert shift_h(torch.ones(1, 1, 2), relative.shift(1)).flatten().tolist() == [-5.0, 1.0]


@pytest.mark.parametrize(("architecture", "on"), PAIRS)
@torch.no_grad()
def test_control_is_plain_hugging_face_with_the_shift_at_block_outputs(loaded, hf, architecture, on):
    """Logits equal those of plain Hugging Face with coefficient * direction added behind the chosen blocks."""
    model, plain, repe = loaded(architecture, on), hf(architecture), control()
    with repe.attached(model):
        got = run(model)
    directions = unit(2, D)  # of layers 2 and 0
    with at_blocks(plain, (2, adding(3.0 * directions[0])), (0, adding(3.0 * directions[1]))):
        expected = plain(TOKENS).logits
    assert (got - expected).abs().max() < 1e-5
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05


def test_coefficient_zero_and_detaching_are_bit_equal(llama):
    """Nothing is changed by a coefficient of 0, nothing is left behind by any other."""
    before = run(llama)
    with control(coefficient=0.0).attached(llama):
        assert torch.equal(run(llama), before)
    with control().attached(llama):
        assert (run(llama) - before).abs().max() > 0.05
        assert len(residual_point(llama, 0, "hook_resid_post").fwd_hooks) == 1
    assert torch.equal(run(llama), before)
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())


def test_over_half_precision_the_sum_is_rounded_once():
    """h = 256 in bfloat16 (steps of 2): a shift of 1.5 goes to 258; its own type comes back, and a shift of 0 changes nothing."""
    h = torch.full((1, 1, 2), 256.0, dtype=torch.bfloat16)
    moved = shift_h(h, torch.tensor([1.5, 0.0]))
    assert moved.dtype == torch.bfloat16
    assert moved.flatten().tolist() == [258.0, 256.0]
    one = shift_h(torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16), torch.tensor([0.00391]))
    assert one.item() == 1.0078125  # 1.00391 is nearer to 1 + 1/128 than to 1; 0.00391 itself rounds to 1/256, a tie


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_control_of_a_half_precision_model(checkpoint, backend, dtype):
    """It is float32 there too, acts, and at coefficient 0 is bit-equal."""
    model = load_model(checkpoint("llama"), backend=backend, dtype=dtype, device="cpu")
    before, repe = run(model), control()
    assert repe.directions.dtype == torch.float32
    with repe.attached(model):
        assert (run(model) - before).abs().max() > 0.05
    with repe.with_strength(0.0).attached(model):
        assert torch.equal(run(model), before)


def test_copies_with_another_strength_or_other_positions(llama):
    """The original stays as it is; on the answer's positions, logits in front of them are those of the plain model."""
    repe, before, borders = control(), run(llama), Borders(torch.tensor([4, 6]), torch.tensor([10, 10]))
    strong, answer = repe.with_strength(-1.5), repe.with_positions("answer")
    assert (repe.coefficient, strong.coefficient, answer.coefficient) == (3.0, -1.5, 3.0)
    assert (str(repe.positions), str(strong.positions), str(answer.positions)) == ("all", "all", "answer")
    assert torch.equal(strong.shift(2), -0.5 * repe.shift(2))
    with answer.attached(llama):
        got = run(llama, borders=borders)
    for row, start in enumerate((4, 6)):
        assert torch.equal(got[row, :start], before[row, :start])
        assert ((got[row, start:] - before[row, start:]).abs().amax(-1) > 0.01).all()


def test_padding_does_not_matter(llama):
    """Rows padded on either side give each row's own logits."""
    ids, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    with torch.no_grad(), control().attached(llama):
        alone = logits_of(llama, ids[:1, 3:], mask[:1, 3:])
        for at, pads in ((slice(3, 10), slice(0, 3)), (slice(0, 7), slice(7, 10))):
            both, kept = ids.clone(), mask.clone()
            both[0, at], both[0, pads], kept[0, pads] = ids[0, 3:], 0, 0
            assert torch.allclose(logits_of(llama, both, kept)[0, at], alone[0], atol=1e-5)


def test_the_count_is_a_direction_a_layer():
    """Layers 0, 2, ..., 30 of Llama-2-7B: 16 * 4,096."""
    assert RepE(unit(16, 4096), range(0, 32, 2), n_layers=32, coefficient=0.25).n_parameters == 65_536


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layers": ()}, "no layer to edit"), ({"layers": (0, 3)}, r"layers \[0, 3\] cannot be edited; .* 0 to 2"),
     ({"layers": (1, 1)}, r"\[1, 1\]"), ({"coefficient": float("nan")}, "coefficient is nan"),
     ({"coefficient": float("inf")}, "coefficient is inf"),
     ({"relative": True}, "give scale"), ({"positions": "anser"}, "Did you mean 'answer'"),
     ({"directions": 1.01 * unit(2, D)}, "direction of layer 0 has norm 1.01"),
     ({"directions": torch.full((2, D), float("nan"))}, "has norm nan"),
     ({"directions": unit(3, D)}, "2 layers with 3 directions"), ({"scale": torch.ones(1)}, "2 directions and 1 scales"),
     ({"scale": torch.tensor([1.0, 0.0])}, "scale of layer 2 is 0"),
     ({"scale": torch.tensor([float("inf"), 1.0])}, "scale of layer 0 is inf")],
)  # fmt: skip
def test_what_control_refuses(changes, message):
    """Each value is named."""
    given = {"directions": unit(2, D), "layers": (0, 2), "coefficient": 1.0, "n_layers": 3} | changes
    with pytest.raises(InputError, match=message):
        RepE(given.pop("directions"), given.pop("layers"), **given)


# ------------------------------------------------------------------------------------------------------- files


# --------------------------------------------------------------------------------------------- reading, numbers


def test_differences_that_all_agree_survive_the_centring():
    """Four and five times (3, 4) is nothing but its mean: turned half around, the first component is (.6, .8)."""
    for n in (4, 5, 2):
        for method in ("pca", "mean_difference"):
            assert reading_vector(np.tile([3.0, 4.0], (n, 1)), method) == pytest.approx([0.6, 0.8])


def test_the_first_component_by_hand():
    """(2, 1) and (2, -1): one turned, (2, 1) and (-2, 1), centered (2, 0) and (-2, 0): whichever is turned, (1, 0)."""
    for seed in range(4):
        assert reading_vector(np.array([[2.0, 1.0], [2.0, -1.0]]), seed=seed) == pytest.approx([1.0, 0.0], abs=1e-12)


def test_the_sign_is_that_of_most_pairs_for_a_component_and_of_the_mean_for_the_mean():
    """5, -1, -1 on one axis: two of three pairs say minus, the mean says plus; on a tie of 3 and -1 the sum decides."""
    two_of_three = np.array([[5.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert reading_vector(two_of_three) == pytest.approx([-1.0, 0.0])
    assert reading_vector(two_of_three, "mean_difference") == pytest.approx([1.0, 0.0])
    assert reading_vector(np.array([[3.0, 0.0], [-1.0, 0.0]])) == pytest.approx([1.0, 0.0])
    assert reading_vector(np.array([[-3.0, 0.0], [1.0, 0.0]])) == pytest.approx([-1.0, 0.0])


def test_half_of_the_pairs_are_turned_by_seed():
    """Large common offsets on one axis, a small alternating one: an even half turned makes the offsets the first component."""
    values = np.random.default_rng(0).normal(size=(40, 6))
    values[:, 0] += 5
    for seed in range(3):
        assert reading_vector(values, seed=seed)[0] > 0.99
    assert np.array_equal(reading_vector(values, seed=1), reading_vector(values, seed=1))
    assert not np.array_equal(reading_vector(values, seed=1), reading_vector(values, seed=2))
    assert np.linalg.norm(reading_vector(values)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "method", "message"),
    [(np.zeros((4, 3)), "pca", "do not differ"), (np.zeros((4, 3)), "mean_difference", "do not differ"),
     (np.array([[1.0, 2.0], [-1.0, -2.0]]), "pca", "cancel out"), (np.ones((1, 3)), "pca", "1 pairs; pca needs at least two"),
     (np.array([[1.0, 2.0], [-1.0, -2.0]]), "mean_difference", "cancel out"), (np.ones((0, 3)), "mean_difference", "0 pairs")],
)  # fmt: skip
def test_differences_without_a_direction_are_refused(values, method, message):
    """Zero, cancelling, or too few."""
    with pytest.raises(DataError, match=message):
        reading_vector(values, method)


# ---------------------------------------------------------------------------------------------- planted truth


def texts(n, seed=0):
    """Pairs of texts of three random words each; nothing in them tells right from wrong."""
    draw = np.random.default_rng(seed)
    return [tuple(" ".join([str(2 * i + side), *draw.choice(WORDS, 3)]) for side in (0, 1)) for i in range(n)]


@contextlib.contextmanager
def planted(model, pairs, layer, direction, size=6.0):
    """While this holds, the right texts' last token carries +direction at one layer, the wrong ones' -direction."""
    tokenizer = tokenizer_of(model)
    right = {tuple(encode(tokenizer, text)) for text, _ in pairs}

    def plant(h, hook):
        layout, new = layout_of(model, h.shape[0], h.shape[1], h.device), h.clone()
        for row, (ids, mask) in enumerate(zip(layout.tokens, layout.mask.bool(), strict=True)):
            last = mask.nonzero()[-1]
            new[row, last] += (1 if tuple(ids[mask].tolist()) in right else -1) * size * direction
        return new

    with hooked(residual_point(model, layer, "hook_resid_post"), plant):
        yield


@pytest.mark.parametrize("method", ["pca", "mean_difference"])
def test_a_planted_direction_is_found(llama, method):
    """Planted at layer 1: cosine above .99 there with the right sign, all pairs told apart, and not in the layer before."""
    pairs, direction = texts(60), unit(D, seed=5)
    with planted(llama, pairs, 1, direction):
        found = reading_vectors(llama, pairs, method=method, progress=False)
        swapped = reading_vectors(llama, [(b, a) for a, b in pairs], method=method, progress=False)
    assert found.layers == (0, 1, 2)
    assert found.directions.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert found.directions[1] @ direction > 0.99
    assert found.accuracy[1] == 1.0
    assert found.accuracy[0] < 0.9
    assert found.top_layers(1) == (1,)
    assert swapped.directions[1] @ direction < -0.99
    assert torch.equal(swapped.accuracy[1:], found.accuracy[1:])
    assert found.meta.config == {"reading": method, "pairs": 60, "accuracy_on": "training"}


def test_sigma_and_accuracy_by_hand(bridge_llama):
    """sigma is the standard deviation of all statements' projections, accuracy the share of pairs in the right order."""
    pairs = texts(12)
    found = reading_vectors(bridge_llama, pairs, layers=[2, 0], progress=False)
    assert found.layers == (0, 2)
    ids = [encode(tokenizer_of(bridge_llama), t) for pair in pairs for t in pair]
    with record(bridge_llama, ids, what="resid", progress=False) as activations:
        for i, layer in enumerate(found.layers):
            along = activations.layer(layer) @ found.directions[i].numpy()
            assert found.sigma[i] == pytest.approx(along.std(), rel=1e-5)
            assert found.accuracy[i] == pytest.approx((along[::2] > along[1::2]).mean())
            assert reading_vector(activations.layer(layer)[::2] - activations.layer(layer)[1::2]) == pytest.approx(
                found.directions[i].numpy(), abs=1e-6
            )
    again = reading_vectors(bridge_llama, pairs, layers=[2, 0], progress=False)
    assert torch.equal(again.directions, found.directions)
    assert "ReadingVectors(pca, 12 pairs, 2 layers, best layer" in repr(found)


def vectors(accuracy, layers=(1, 2, 4, 7)):
    """Reading vectors with these accuracies."""
    n = len(layers)
    meta = control().meta
    return ReadingVectors(layers, unit(n, D), torch.tensor(accuracy), torch.arange(1.0, n + 1), meta)


def test_the_best_layers_come_first():
    """By accuracy; of equal ones the lower; a number out of range is refused."""
    found = vectors([0.5, 0.9, 0.9, 1.0])
    assert found.top_layers(3) == (7, 2, 4)
    for k in (0, 5):
        with pytest.raises(InputError, match=f"k is {k}; give 1 to 4"):
            found.top_layers(k)


def test_control_takes_its_layers_vectors(bridge_llama):
    """Directions and scales are those of the layers asked for, in whatever order; a layer without a vector is named."""
    found = vectors([0.5, 0.9, 0.9, 1.0])
    found.meta.model = model_info(bridge_llama)
    object.__setattr__(found.meta.model, "n_layers", 8)
    repe = found.repe((7, 2), coefficient=2.0, relative=True, positions="last")
    assert (repe.layers, repe.n_layers, str(repe.positions)) == ((2, 7), 8, "last")
    assert torch.allclose(repe.shift(7), 2 * 4.0 * found.directions[3])
    assert torch.allclose(repe.shift(2), 2 * 2.0 * found.directions[1])
    assert torch.allclose(found.repe((7,), coefficient=2.0).shift(7), 2 * found.directions[3])
    repe.meta.config["reading"] = "other"
    assert found.meta.config == {}
    with pytest.raises(InputError, match="no vector for layer 3; the layers are 1, 2, 4, 7"):
        found.repe((3,), coefficient=1.0)


RIGHT, WRONG = " of", " the"


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """A Llama that reads one direction u: every token lies at -u, the right answer at +u, and the unembedding of the two answers
    is +-u. Blocks do next to nothing. Untouched it answers wrongly. Backend -> model, u."""
    plain, u = tiny.hf_model("llama"), unit(D, seed=9)
    tokenizer = tiny.tokenizer()
    right, wrong = (tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (RIGHT, WRONG))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.mul_(0.2)
        table = plain.model.embed_tokens.weight
        table -= (table @ u)[:, None] * u
        table[wrong] = table[right]  # they differ along u alone
        table -= u
        table[right] += 2 * u
        plain.lm_head.weight.zero_()
        plain.lm_head.weight[right], plain.lm_head.weight[wrong] = 4 * u, -4 * u
    folder = tmp_path_factory.mktemp("readable") / "plain"
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    models = {}

    def model_of(backend):
        if backend not in models:
            models[backend] = load_model(folder, backend=backend, device="cpu")
        return models[backend], u

    return model_of


def answers(val=None):
    """Two options, the right one always the same; `val` tells what validation rows hold for right."""
    rows = [{"prompt": f"{a} {b}", "options": [WRONG, RIGHT], "answer": RIGHT} for a, b in itertools.pairwise(WORDS)]
    held = [{**r, "answer": val} for r in rows[10:13]] if val else ()
    return Task.from_records("plain", train=rows[:10], val=held, test=rows[10:])


@pytest.mark.parametrize("method", ["pca", "mean_difference"])
def test_a_direction_that_was_read_turns_the_answers(readable, backend, method):
    """Read from a task's statements; added, it turns every answer from wrong to right; subtracted, none."""
    model, u = readable(backend)
    task = answers()
    found = reading_vectors(model, task, method=method, progress=False)
    assert (found.directions @ u > 0.99).all()
    assert found.meta.task == "plain"
    assert evaluate(model, task, progress=False)["accuracy"] == 0.0
    for coefficient, accuracy in ((1.0, 1.0), (-1.0, 0.0)):
        with found.repe(found.top_layers(3), coefficient=coefficient).attached(model):
            assert evaluate(model, task, progress=False)["accuracy"] == accuracy
    one = found.repe([0], coefficient=1.5, relative=True)
    assert torch.allclose(one.shift(0), 1.5 * found.sigma[0] * found.directions[0])
    with one.attached(model):
        assert evaluate(model, task, progress=False)["accuracy"] == 1.0


def test_accuracy_is_that_on_validation_pairs(readable):
    """Validation rows that hold the other answer for right are all in the wrong order; without any, the training pairs count."""
    model, _ = readable("bridge")
    for val, accuracy, on in ((RIGHT, 1.0, "validation"), (WRONG, 0.0, "validation"), (None, 1.0, "training")):
        found = reading_vectors(model, answers(val), n_train=8, progress=False)
        assert found.accuracy.tolist() == [accuracy] * 3
        assert (found.meta.config["accuracy_on"], found.meta.n_train) == (on, 8)


def test_validation_rows_without_a_wrong_answer_are_told(readable, caplog):
    """Where all of them have one answer, the training pairs stand in."""
    model, _ = readable("bridge")
    rows = [{"prompt": w, "answer": a} for w, a in zip(WORDS, (RIGHT, WRONG) * 8, strict=True)]
    task = Task.from_records("free", train=rows, val=rows[:1], test=rows)
    assert reading_vectors(model, task, progress=False).meta.config["accuracy_on"] == "training"
    assert "no validation pairs" in caplog.text


def test_what_reading_refuses(bridge_llama):
    """Unknown methods, n_train with texts, one pair, texts that do not differ, a layer outside."""
    pairs = texts(3)
    for source, options, message in (
        (pairs, {"n_train": 2}, "n_train draws rows of a task"), (pairs[:1], {}, "the list has 1 pairs"),
        ([("Ann", "Ann")] * 3, {}, "layer 0: right and wrong statements do not differ"), (pairs, {"layers": [3]}, "layers"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            reading_vectors(bridge_llama, source, progress=False, **options)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_method_is_named(bridge_llama):
    """With the methods that there are."""
    with pytest.raises(InputError, match="unknown method 'pcr'; allowed: pca, mean_difference"):
        reading_vectors(bridge_llama, texts(3), method="pcr", progress=False)
    with pytest.raises(InputError, match="unknown method"):
        reading_vector(np.ones((3, 2)), "pcr")
