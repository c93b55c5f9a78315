"""Recorded activations are the model's own; probes find planted truth; directions and spreads by hand."""

import contextlib
import logging
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from lofit_lens import HeadScores, HeadSet, Task
from lofit_lens.errors import DataError, InputError, ModelError
from lofit_lens.interventions import ITI
from lofit_lens.models import head_size, hook_z, hooked, load_model, logits_of, model_info, residual_point, tokenizer_of
from lofit_lens.probing import fit_probes, probe_heads, record, statement_ids
from lofit_lens.probing import probes as inner
from lofit_lens.probing.directions import mass_mean_direction, random_directions, spread, unit
from lofit_lens.probing.probes import DIRECTIONS, auc, fit_layer
from lofit_lens.probing.record import Activations
from lofit_lens.tasks.statements import Statement, statements
from tests import planted_truth, slow
from tests.adapters import random_adapter
from tests.conftest import PAIRS

LENGTHS = (3, 17, 5, 1, 9, 12, 12)
GENERATOR = torch.Generator().manual_seed(1)
SEQUENCES = [tuple(torch.randint(3, 400, (n,), generator=GENERATOR).tolist()) for n in LENGTHS]
POINTS = {"z": hook_z, "resid": lambda model, layer: residual_point(model, layer, "hook_resid_post")}


@torch.no_grad()
def one_by_one(model, what):
    """`[n_layers, n, ...]` from one full forward of each sequence alone, without padding."""
    found = []
    for ids in SEQUENCES:
        seen, tokens = {}, torch.tensor([ids])
        with contextlib.ExitStack() as stack:
            for n in range(3):
                keep = lambda x, hook, n=n, seen=seen: seen.__setitem__(n, x[0, -1].clone())
                stack.enter_context(hooked(POINTS[what](model, n), keep))
            logits_of(model, tokens, torch.ones_like(tokens))
        found.append(torch.stack([seen[n] for n in range(3)]))
    return torch.stack(found, dim=1).numpy()


def stacked(activations):
    return np.stack([activations.layer(n) for n in activations.layers])


def quiet(model, **changes):
    return record(model, SEQUENCES, **{"what": "z", "progress": False, **changes})


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The temporary folder, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("what", ["z", "resid"])
@pytest.mark.parametrize(("architecture", "on"), PAIRS)
def test_recorded_values_are_those_of_each_sequence_alone(loaded, architecture, on, what):
    """Ragged sequences in batches: last-token values, in the order given, within 1e-5 of one forward without padding each."""
    model = loaded(architecture, on)
    found, expected = quiet(model, what=what, token_budget=40), one_by_one(model, what)
    assert found.layer(1).dtype == np.float32
    assert found.layer(1).shape == (7, 32) if what == "resid" else (7, 4, head_size(model))
    assert np.abs(stacked(found) - expected).max() < 1e-5
    assert np.abs(expected - expected[:, ::-1]).max() > 0.01  # sequences differ


@pytest.mark.parametrize("budget", [1, 30, 10**9])
def test_token_budgets_give_the_same_values(llama, budget):
    """One sequence a pass, some, or all."""
    assert np.abs(stacked(quiet(llama, token_budget=budget)) - one_by_one(llama, "z")).max() < 1e-5


def test_chosen_layers_alone_are_kept(llama):
    """Layers 2 and 0, ascending and once each; another one is refused and named."""
    found = quiet(llama, layers=[2, 0, 2])
    assert (found.layers, len(found)) == ((0, 2), 7)
    assert np.abs(found.layer(2) - one_by_one(llama, "z")[2]).max() < 1e-5
    with pytest.raises(InputError, match="layer 1 was not recorded; recorded layers: 0, 2"):
        found.layer(1)


def test_what_is_attached_acts_and_the_model_is_left_as_it_was(checkpoint, backend):
    """Recorded z is the edited one; no hook, mode or trainable weight is left behind."""
    llama = load_model(checkpoint("llama"), backend=backend, device="cpu")
    before, lofit = one_by_one(llama, "z"), random_adapter(llama)
    llama.requires_grad_(True)
    with lofit.attached(llama):
        found, expected = stacked(quiet(llama)), one_by_one(llama, "z")
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - before).max() > 0.5
    assert all(p.requires_grad for p in llama.parameters())
    assert not any(p.fwd_hooks or p._forward_hooks for p in llama.hook_dict.values())
    assert not llama.unembed._forward_pre_hooks
    assert np.array_equal(one_by_one(llama, "z"), before)


def test_recording_is_in_eval_mode(llama):
    """A model that is being trained would drop numbers at random; its mode comes back."""
    seen = []
    llama.train()
    try:
        with hooked(hook_z(llama, 0), lambda z, hook: seen.append((llama.training, torch.is_grad_enabled()))):
            quiet(llama, layers=[1])
        assert seen[-1] == (False, False)
        assert llama.training
    finally:
        llama.eval()


def test_no_logits_of_other_places_and_no_cache(llama, backend):
    """The unembedding sees one place a row, and no keys are kept: at 8,192 tokens of a large model either takes gigabytes."""
    seen, kept = [], []
    handles = [llama.unembed.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))]
    if backend == "bridge":
        inside = llama.original_model
        handles.append(inside.register_forward_hook(lambda module, args, out: kept.append(out.past_key_values)))
    try:
        quiet(llama)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [(7, 1)]
    assert kept == ([None] if backend == "bridge" else [])


def test_half_precision_is_recorded_exactly(checkpoint, backend):
    """A bfloat16 z is kept as the same numbers in float32."""
    model = load_model(checkpoint("llama"), backend=backend, dtype="bfloat16", device="cpu")
    found = torch.from_numpy(stacked(quiet(model)))
    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16().float(), found)


def test_statements_are_tokenised_joined(llama):
    """BOS once, and the ids of the joined text, where `countr` + `y` is one token."""
    listed = [Statement("In what countr", "y was Ann", True, 0), Statement("Q: Ann?", " Bob", False, 1)]
    tokenizer = tokenizer_of(llama)
    expected = [tuple(slow.ids_of(tokenizer, s.prompt + s.answer)) for s in listed]
    assert statement_ids(llama, listed) == expected


@pytest.mark.parametrize("what", ["z", "resid"])
def test_large_activations_lie_in_a_file_that_goes_away(llama, temporary, what):
    """Above the limit the same numbers come from a file; it is gone after close(), `with`, and when the object is dropped."""
    inside = quiet(llama, what=what, memory_limit=3 * 7 * 32 * 4)
    assert inside.path is None
    for leave in (lambda a: a.close(), lambda a: a.__exit__(None, None, None)):
        found = quiet(llama, what=what, memory_limit=3 * 7 * 32 * 4 - 1)
        assert [p.parent for p in (found.path,)] == list(temporary.iterdir())
        assert isinstance(found.layer(0), np.memmap)
        assert np.array_equal(stacked(found), stacked(inside))
        kept = found.layer(1)
        leave(found)
        assert not list(temporary.iterdir())
        assert np.array_equal(kept, inside.layer(1))
        with pytest.raises(InputError, match="closed"):
            found.layer(1)
        found.close()
    found = quiet(llama, what=what, memory_limit=0)
    assert list(temporary.iterdir())
    del found
    assert not list(temporary.iterdir())


def test_an_interrupt_leaves_no_file(llama, temporary, monkeypatch):
    """Ctrl-C in the second of several passes: no file and no hook stay."""
    run, passes = sys.modules["lofit_lens.probing.record"].run_through, []

    def interrupted(*args):
        passes.append(len(list(temporary.iterdir())))
        if len(passes) == 2:
            raise KeyboardInterrupt
        run(*args)

    monkeypatch.setattr(sys.modules["lofit_lens.probing.record"], "run_through", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        quiet(llama, token_budget=20, memory_limit=0)
    assert passes == [1, 1]
    assert not list(temporary.iterdir()), caught  # while its traceback still holds everything
    assert not any(p.fwd_hooks for p in llama.hook_dict.values())


@pytest.mark.slow
def test_the_end_of_python_leaves_no_file(tmp_path):
    """Activations that are never closed go with the interpreter."""
    code = (
        "from lofit_lens.probing.record import Activations as A; import os; kept = A('z', [0], 2, (3,), memory_limit=0)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}; print(os.path.exists(kept.path))"], env={"TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=True, cwd=planted_truth.__file__.rsplit("/", 2)[0],
    )  # fmt: skip
    assert ran.stdout.strip() == "True"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("lofit-lens")]


def test_a_full_disk_is_told_before_it_is_full(temporary, monkeypatch):
    """Needed, allowed and free space are named, and what to change; nothing is written."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 10**9})())
    with pytest.raises(InputError, match=r"take 4.00 GB.*memory_limit \(1.00 GB\).*\(1.00 GB\).*TMPDIR"):
        Activations("z", [0, 1], 1000, (500, 1000), memory_limit=10**9)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("sequences", "changes", "error", "message"),
    [([], {}, InputError, r"sequences is \[\]; give one or more"), ([(1,), ()], {}, DataError, "sequence 1 is empty"),
     ([(1,), (5,) * 2049], {}, DataError, "sequence 1 has 2049 tokens.* is 2048"),
     ([(1,)], {"layers": []}, InputError, "no layer.*0 to 2"), ([(1,)], {"layers": [3]}, InputError, "layers 0 to 2"),
     ([(1,)], {"layers": [-1]}, InputError, "layer is -1; give 0 or more"),
     ([(1,)], {"token_budget": 0}, InputError, "token_budget is 0; give 1 or more"),
     ([(1,)], {"what": "logits"}, InputError, "allowed: z, resid")],
)  # fmt: skip
def test_a_bad_request_is_named(bridge_llama, unchecked, sequences, changes, error, message):
    """What was received, what is allowed."""
    with pytest.raises(error, match=message):
        record(bridge_llama, sequences, **{"what": "z", "progress": False, **changes})


def test_values_that_are_not_finite_are_refused(llama, temporary):
    """A NaN in one head's z is ModelError and names layer and model; the file goes."""

    def broken(z, hook):
        z = z.clone()
        z[0, -1, 2, 0] = float("nan")
        return z

    with hooked(hook_z(llama, 1), broken), pytest.raises(ModelError, match=r"layer 1 .*NaN"):
        quiet(llama, memory_limit=0)
    assert not list(temporary.iterdir())


# --------------------------------------------------------------------------------------------------- directions


def test_mass_mean_by_hand():
    """Right (1, 2), (3, 4), wrong (0, 1): mean (2, 3) minus (0, 1) = (2, 2)."""
    right, wrong = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 1.0]])
    assert mass_mean_direction(right, wrong).tolist() == [2.0, 2.0]


def test_unit_by_hand():
    """(3, 4) / 5 = (.6, .8); zero has no direction and stays zero."""
    assert unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[0.6, 0.8], [0.0, 0.0]]


def test_spread_by_hand():
    """Projections of (0, 9), (2, 9), (4, 9), (6, 9) on (1, 0): 0 2 4 6, variance (9 + 1 + 1 + 9) / 4 = 5; on (0, 1): none."""
    z = np.array([[0.0, 9.0], [2.0, 9.0], [4.0, 9.0], [6.0, 9.0]], dtype=np.float32)
    assert spread(z, np.eye(2)) == pytest.approx([5**0.5, 0.0], abs=1e-12)


def test_random_directions_are_unit_and_go_by_seed():
    """Norm 1, another one for each head and seed, the same one for the same seed, no side preferred."""
    found = random_directions((4, 50, 8), seed=1)
    assert np.allclose(np.linalg.norm(found, axis=-1), 1)
    assert np.array_equal(found, random_directions((4, 50, 8), seed=1))
    assert not np.isclose(found, random_directions((4, 50, 8), seed=2)).any()
    assert len(np.unique(found[..., 0])) == 200
    assert np.abs(found.mean(axis=(0, 1))).max() < 0.1  # of 200 draws of standard deviation 0.35: 0.025 is one sigma


def test_auc_by_hand():
    """Right 3, 1, wrong 2, 1: of four pairs 3 > 2, 3 > 1, 1 < 2, 1 = 1: 2.5 of 4. A margin that is all ties: one half."""
    margins = np.array([[3.0, 5.0], [1.0, 5.0], [2.0, 5.0], [1.0, 5.0]])
    assert auc(margins, np.array([True, True, False, False])).tolist() == [0.625, 0.5]


# ------------------------------------------------------------------------------------------------------- probes


@pytest.fixture(scope="module")
def made_up():
    """z of 90 statements, 3 heads of d_head 4, labels, and which are fitted on; head 1 tells them apart in part."""
    rng = np.random.default_rng(0)
    right, fitting = rng.random(90) < 0.4, np.arange(90) < 60
    z = rng.normal(size=(90, 3, 4)).astype(np.float32)
    z[right, 1] += np.array([0.5, 0, -1, 0], dtype=np.float32)
    return z, right, fitting, random_directions((1, 3, 4), seed=3)[0]


def test_a_layers_probes_are_scikit_learns(made_up):
    """Each head: fitted on the first 60 statements, scored on the other 30, directions and spreads over all 90."""
    z, right, fitting, drawn = made_up
    found = fit_layer(z, right, fitting, drawn, seed=0, max_iter=1000)
    for head in range(3):
        own = z[:, head].astype(np.float64)
        plain = LogisticRegression(max_iter=1000, random_state=0).fit(own[:60], right[:60])
        assert found.accuracy[head] == plain.score(own[60:], right[60:])
        assert found.balanced[head] == pytest.approx(balanced_accuracy_score(right[60:], plain.predict(own[60:])))
        assert found.auc[head] == pytest.approx(roc_auc_score(right[60:], plain.decision_function(own[60:])))
        mean = own[right].mean(0) - own[~right].mean(0)
        expected = [mean / np.linalg.norm(mean), plain.coef_[0] / np.linalg.norm(plain.coef_[0]), drawn[head]]
        assert np.allclose(found.directions[:, head], expected)
        assert np.allclose(found.sigma[:, head], [np.std(own @ d) for d in expected])
    assert found.unconverged == 0
    assert not np.allclose(found.accuracy, found.balanced, atol=0.01)  # nothing is mistaken for another
    assert not np.allclose(found.auc, found.balanced, atol=0.01)


def test_probes_that_do_not_converge_are_counted_and_silent(made_up):
    """One step is too few for every head: 3, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_layer(*made_up, seed=0, max_iter=1).unconverged == 3


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory):
    return planted_truth.save(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def planted_models(planted_folder):
    """Backend -> the model, and its probes."""
    made = {}

    def of(backend):
        if backend not in made:
            model = load_model(planted_folder, backend=backend, device="cpu")
            with planted_truth.planted(model):
                made[backend] = model, fit_probes(model, planted_truth.task(), progress=False)
        return made[backend]

    return of


@pytest.fixture
def planted(planted_models, backend):
    return planted_models(backend)


def test_planted_truth_is_found(planted):
    """The two heads come first with every statement right, the others at chance; mass mean and probe have the planted direction.

    z holds +1 or -1 times it, and little else: sigma is 1. Answers of the validation rows were never seen.
    """
    _, probes = planted
    assert set(probes.scores.top(2)) == set(planted_truth.HEADS)
    assert probes.scores.ranking().scores[1] == 1.0
    assert probes.scores.ranking().scores[2] < 0.7
    for head, direction in zip(planted_truth.HEADS, planted_truth.directions(), strict=True):
        assert torch.dot(probes.direction("mass_mean")[head], direction) > 0.999
        assert torch.dot(probes.direction("probe")[head], direction) > 0.99
        assert abs(torch.dot(probes.direction("random")[head], direction)) < 0.9
        assert probes.sigma()[head].item() == pytest.approx(planted_truth.STRENGTH, abs=0.02)


def test_the_record_of_the_probes(planted):
    """Counts, baseline, seed, data and versions stand beside the scores; the scores say what they are."""
    model, probes = planted
    meta = probes.scores.meta
    assert (meta["n_fitting"], meta["n_validation"], meta["n_train"], meta["held_out"]) == (66, 66, 33, 0)
    assert (meta["majority"], meta["unconverged"], meta["seed"]) == (0.5, 0, 42)
    assert meta["data_hash"] == planted_truth.task().data_hash
    assert meta["model"] == model_info(model).to_dict()
    assert meta["versions"].keys() >= {"torch", "scikit-learn"}
    assert [s.kind for s in (probes.scores, probes.balanced, probes.auc)] == [
        "probe accuracy", "probe balanced accuracy", "probe AUC",
    ]  # fmt: skip
    assert probes.scores.task == "planted"
    assert "best L1H2 1.000 of 66 statements, majority 0.500" in repr(probes)


def test_probe_heads_gives_the_same_scores_every_time(planted, tmp_path):
    """Bit for bit, also read back from a file; another seed changes the random directions alone of the three."""
    model, probes = planted
    with planted_truth.planted(model):
        again = probe_heads(model, planted_truth.task(), progress=False)
        other = fit_probes(model, planted_truth.task(), seed=7, progress=False)
    assert torch.equal(again.values, probes.scores.values)
    assert torch.equal(HeadScores.load(again.save(tmp_path / "scores.json")).values, again.values)
    assert not torch.isclose(other.direction("random"), probes.direction("random")).any()


@pytest.mark.slow
def test_processes_give_the_same_numbers(planted):
    """Two processes: every score, direction and sigma bit for bit, from memory and from a file."""
    model, probes = planted
    for limit in (0, 2**30):
        with planted_truth.planted(model):
            found = fit_probes(model, planted_truth.task(), n_jobs=2, memory_limit=limit, progress=False)
        assert torch.equal(found.scores.values, probes.scores.values)
        for kind in DIRECTIONS:
            assert torch.equal(found.direction(kind), probes.direction(kind))
            assert torch.equal(found.sigma(kind), probes.sigma(kind))


def test_heads_of_equal_accuracy_go_by_auc(llama, monkeypatch):
    """Head scores are accuracies to a millionth; among equal ones the larger AUC comes first; a better accuracy beats any AUC."""
    accuracy, areas = np.array([0.5, 0.75, 0.75, 0.5]), np.array([1.0, 0.25, 0.5, 0.0])
    like = inner.LayerProbes(accuracy, accuracy, areas, np.zeros((3, 4, 8)), np.zeros((3, 4)), 0)
    monkeypatch.setattr(inner, "fit_layer", lambda *args, **kwargs: like)
    probes = fit_probes(llama, planted_truth.task(), progress=False)
    assert [h.head for h in probes.scores.ranking() if h.layer == 1] == [2, 1, 0, 3]
    assert np.abs(probes.scores.values.numpy() - accuracy).max() <= 1.1e-6
    assert probes.auc.values[2].tolist() == areas.tolist()
    assert probes.scores.values.max() <= 1


# -------------------------------------------------------------------------------------- what is fitted on, what validates


def rows(n, first=0):
    return [{"prompt": f"Q: {i}?", "chosen": f" {i} a", "rejected": f" {i} b"} for i in range(first, first + n)]


def pairs_task(n, **splits):
    return Task.from_records("pairs", train=rows(n), test=rows(1, 50), **splits)


def test_without_validation_rows_whole_questions_are_held_out():
    """A fifth of 12 rows is 2: both statements of each, drawn by seed, and none of theirs is fitted on."""
    fit, val, held = inner._split(pairs_task(12), None, 1, None)
    assert held == 2
    assert sorted([*fit, *val], key=str) == sorted(statements(pairs_task(12), "train", seed=1), key=str)
    assert len(val) == 4
    assert not {s.row for s in fit} & {s.row for s in val}
    assert inner._split(pairs_task(12), None, 1, None)[1] == val
    assert len({frozenset(s.row for s in inner._split(pairs_task(12), None, seed, None)[1]) for seed in range(8)}) > 2
    assert inner._split(pairs_task(2), None, 1, None)[2] == 1


def test_validation_rows_validate():
    """The validation split's statements, all of them, however few rows are drawn to fit on."""
    task = pairs_task(12, val=rows(3, 80))
    fit, val, held = inner._split(task, 5, 1, None)
    assert fit == statements(task, "train", n=5, seed=1)
    assert val == statements(task, "val", seed=1)
    assert held == 0


def test_validation_rows_without_a_wrong_answer_are_replaced(caplog):
    """All validation rows have one answer, so that none is wrong: training rows are held out, and it is said."""
    answers = [{"prompt": f"Q: {i}?", "answer": f" {i}"} for i in range(10)]
    task = Task.from_records("said", train=answers, val=[{"prompt": "Q: x?", "answer": " x"}], test=answers[:1])
    with caplog.at_level(logging.WARNING):
        _, val, held = inner._split(task, None, 1, None)
    assert held == 2
    assert len(val) == 4
    assert "held-out training rows" in caplog.text


def test_the_fit_sees_no_validation_label(llama):
    """Validation answers turned around: every probe's accuracy and AUC turn to what they lack."""
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows(6, 80)]
    one = fit_probes(llama, pairs_task(10, val=rows(6, 80)), progress=False)
    other = fit_probes(llama, pairs_task(10, val=swapped), progress=False)
    assert torch.allclose(one.balanced.values, 1 - other.balanced.values)
    assert torch.allclose(one.auc.values, 1 - other.auc.values)
    assert not torch.allclose(one.balanced.values, torch.full((3, 4), 0.5).double())
    assert torch.allclose(one.direction("probe"), other.direction("probe"))
    assert not torch.allclose(one.direction("mass_mean"), other.direction("mass_mean"))


@pytest.mark.parametrize(
    ("task", "changes", "error", "message"),
    [(pairs_task(1), {}, DataError, "one training row"), (pairs_task(3), {"n_jobs": 0}, InputError, "n_jobs is 0"),
     (pairs_task(3), {"max_iter": 0}, InputError, "max_iter is 0"), (pairs_task(3), {"n_train": 4}, InputError, "give 1 to 3")],
)  # fmt: skip
def test_bad_requests_are_named(bridge_llama, task, changes, error, message):
    """Too few rows, numbers out of range."""
    with pytest.raises(error, match=message):
        fit_probes(bridge_llama, task, progress=False, **changes)


def test_how_statements_end_is_what_is_recorded(bridge_llama, monkeypatch):
    """z at the full stop, or at the answer's last word; provenance says which, if asked; unknown words are refused."""
    rows = [{"prompt": f"Q: {q}? A:", "chosen": " it is Rome.", "rejected": " it is Paris."} for q in "abcd"]
    task, seen = Task.from_records("ends", train=rows, test=rows), []
    monkeypatch.setattr(inner, "record", lambda model, ids, **how: seen.append(ids) or record(model, ids, **how))
    tokenizer = tokenizer_of(bridge_llama)
    for end in (None, True, False):
        probes = fit_probes(bridge_llama, task, full_stop=end, progress=False)
        assert {tokenizer.decode(i[-1:]) == "." for i in seen[-1]} == {end is not False}
        for config in (probes.scores.meta["config"], probes.iti(2).meta.config):
            assert config.get("full_stop", "none") == ("none" if end is None else end)
    assert seen[0] == seen[1] != seen[2]
    model = load_model("organism", device="cpu")
    with pytest.raises(
        DataError, match=r"answers, e\.g\. ' \w+\.', end with a token that this tokenizer does not know"
    ):
        fit_probes(model, "organism/truth", n_train=4, full_stop=True, progress=False)


def test_statements_of_one_label_are_refused(bridge_llama, monkeypatch):
    """Nothing can be learned from right statements alone, or validated on wrong ones alone."""
    right, wrong = statements(pairs_task(2), "train")[:2]
    for fit, val, what in (
        ((right,), (right, wrong), "all 1 training.*right"),
        ((right, wrong), (wrong,), "all 1 val.*wrong"),
    ):
        monkeypatch.setattr(inner, "_split", lambda *args, fit=fit, val=val: (fit, val, 0))
        with pytest.raises(DataError, match=what):
            fit_probes(bridge_llama, pairs_task(2), progress=False)


# ---------------------------------------------------------------------------------------------------- to the shift


def test_the_shift_has_the_heads_directions_and_spreads(planted):
    """By number, by set, by list: the heads in their order, each with its own row of the kind asked for, and the provenance."""
    model, probes = planted
    heads = HeadSet(["L2H3", "L0H1"])
    for kind in DIRECTIONS:
        iti = probes.iti(heads, alpha=2.0, direction=kind, positions="last")
        assert isinstance(iti, ITI)
        assert (iti.heads, iti.alpha, str(iti.positions), iti.shape) == (
            HeadSet(heads.heads, shape=(3, 4)),
            2.0,
            "last",
            (3, 4, 8),
        )
        assert torch.equal(iti.directions, torch.stack([probes.direction(kind)[2, 3], probes.direction(kind)[0, 1]]))
        assert torch.equal(iti.sigma, torch.stack([probes.sigma(kind)[2, 3], probes.sigma(kind)[0, 1]]))
        assert iti.meta.config["direction"] == kind
    assert probes.iti(["L2H3", (0, 1)]).heads == HeadSet(heads.heads, shape=(3, 4))
    top = probes.iti(2)
    assert top.heads == probes.scores.top(2)
    assert (top.alpha, str(top.positions), top.meta.config["direction"]) == (15.0, "answer", "mass_mean")
    assert (top.meta.model, top.meta.task, top.meta.seed, top.meta.n_train) == (model_info(model), "planted", 42, 33)
    assert top.meta.config["n_fitting"] == 66
    assert probes.meta.config.get("direction") is None


@pytest.mark.parametrize(
    ("heads", "changes", "message"),
    [(13, {}, "K = 13.* 12"), (0, {}, "K = 0"), ([], {}, "at least one head"), (["L3H0"], {}, "L3H0"),
     (2, {"direction": "best"}, "allowed: mass_mean, probe, random"), (2, {"positions": "first"}, "positions"),
     (2, {"alpha": float("nan")}, "alpha is nan")],
)  # fmt: skip
def test_a_shift_that_cannot_be_is_named(planted_models, unchecked, heads, changes, message):
    """Heads, directions, positions and strengths out of range."""
    _, probes = planted_models("bridge")
    with pytest.raises(InputError, match=message):
        probes.iti(heads, **changes)
    for ask in (probes.direction, probes.sigma):
        with pytest.raises(InputError, match="allowed: mass_mean, probe, random"):
            ask("best")
