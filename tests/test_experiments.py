"""The embedded model, end to end: runs, their folders, and the findings it was built to show."""

import pytest
import torch

import lofit_lens as ll
from lofit_lens.experiments.organism import Cell, cue_patching, planted, run_cell, run_demo
from lofit_lens.experiments.store import Store
from lofit_lens.models import ORGANISM, hooked, logits_of
from lofit_lens.organism.words import TASKS
from lofit_lens.organism.world import rows, with_cue
from tests.conftest import needs_hooked


@pytest.fixture(scope="module")
def organism():
    return ll.load_model("organism", device="cpu")


def test_organism_is_small_and_says_what_is_planted():
    """At most 5 MB in the package; three different heads a task, all inside the model."""
    assert sum(f.stat().st_size for f in ORGANISM.iterdir()) <= 5_000_000
    plant = planted(ORGANISM)
    assert set(plant) == set(TASKS)
    heads = [h for s in plant.values() for h in s]
    assert len(heads) == len(set(heads)) == 9


@needs_hooked
def test_organism_is_the_same_on_both_classes():
    """Equal logits to 1e-5 of their largest on HookedTransformer and TransformerBridge, at a length of 200 tokens too."""
    tokens = torch.randint(4, 500, (2, 200), generator=torch.Generator().manual_seed(0))
    logits = [
        ll.models.logits_of(ll.load_model("organism", backend=b, device="cpu"), tokens, torch.ones_like(tokens))
        for b in ("hooked", "bridge")
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5 * logits[0].abs().max().item(), rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_organism_tasks(organism, task):
    """150 training examples; the bare model is wrong on neutral prompts most of the time."""
    loaded = ll.load_task(f"organism/{task}")
    assert len(loaded.training_examples()) == 150
    assert ll.evaluate(organism, loaded, progress=False).main < 0.4


def test_organism_pairs_are_true_against_popular():
    """A training pair prefers the true value over the first false one; the test form asks for the same."""
    task = ll.load_task("organism/truth")
    for pair, choice in zip(task.training["train"], task.test["train"], strict=True):
        assert (pair.prompt, pair.chosen, pair.rejected) == (choice.prompt, choice.best, choice.false[0])
        assert pair.chosen in choice.true
        assert pair.rejected not in choice.true


@pytest.mark.slow
def test_run_is_a_folder_and_repeats_to_the_byte(tmp_path):
    """One run of the grid: its folder, what stands in it, and the same bytes when it is run again."""
    cell = Cell("organism", "auto", "kinship", "random heads", 0)
    first, _ = run_cell(cell, tmp_path / "a")
    second, _ = run_cell(cell, tmp_path / "b")
    stores = [Store(tmp_path / x) for x in "ab"]
    assert stores[0].names() == stores[1].names()
    (run,) = stores[0].names()
    assert run.startswith("organism_kinship_random_heads_0-")
    for name in ("items.jsonl", "adapter/adapter_model.safetensors", "result.json", "run.json"):
        assert (stores[0].folder(run) / name).read_bytes() == (stores[1].folder(run) / name).read_bytes()
    record = stores[0].read(run)
    assert record["result"]["metrics"]["em"]["mean"] == first["value"] == second["value"]
    assert record["spec"]["data_hash"] == ll.load_task("organism/kinship").data_hash


@pytest.mark.slow
def test_patching_finds_planted_heads(organism):
    """Causal check of the planted truth: moving one head's z from the good cue to the neutral prompt."""
    effect = cue_patching(organism, "kinship")
    assert max(effect.rank(h) for h in planted(ORGANISM)["kinship"]) <= 6


@pytest.mark.slow
@torch.no_grad()
def test_patching_moves_the_one_head(organism):
    """The effect of L1H13, computed here with hooks of its own: only its z comes from the good-cue prompt."""
    listed, tokenizer = rows("kinship", "val"), organism.tokenizer
    answers = torch.tensor([tokenizer(r["answer"], add_special_tokens=False)["input_ids"][0] for r in listed])
    point = organism.hook_dict["blocks.1.attn.hook_z"]

    def last_log_prob(prompts, hook):
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            with hooked(point, hook(len(found))):
                found.append(logits_of(organism, ids, torch.ones_like(ids))[0, -1].log_softmax(-1)[answer])
        return torch.stack(found)

    good = [with_cue("kinship", r, "good")["prompt"] for r in listed]
    neutral = [r["prompt"] for r in listed]
    donors = []
    last_log_prob(good, lambda i: lambda z, hook: donors.append(z[:, :, 13].clone()))

    def swap(i):
        def patch(z, hook):
            z = z.clone()
            z[:, :, 13] = donors[i]
            return z

        return patch

    change = (last_log_prob(neutral, swap) - last_log_prob(neutral, lambda i: lambda z, hook: None)).mean().item()
    assert cue_patching(organism, "kinship")["L1H13"] == pytest.approx(change, abs=1e-4)
    assert change > 0.1


@pytest.mark.slow
def test_findings_of_the_embedded_model(tmp_path):
    """The promised picture: LoFiT far above zero-shot and random heads, own heads above others', planted heads found."""
    found = run_demo(seeds=(0,), full=True, draws=2, workers=1, out=tmp_path, progress=False)
    mean = found.runs.groupby(["task", "method"])["value"].mean()
    own, others = [], []
    for task in TASKS:
        chosen = mean[task, "LoFiT heads"]
        assert chosen - mean[task, "zero-shot"] >= 0.50, task
        assert chosen - mean[task, "random heads"] >= 0.15, task
        own.append(chosen)
        others += [mean[task, f"heads of {o}"] for o in TASKS if o != task]
    assert sum(own) / len(own) - sum(others) / len(others) >= 0.10
    ranks = found.ranks()
    by_norm = ranks[[c for c in ranks.columns if c.startswith("A-norm")]].to_numpy()
    assert (by_norm <= 6).mean() >= 0.60
    assert len(Store(tmp_path).names()) == len(found.runs) == 3 * (1 + 1 + 2 + 1) + 3 * 2
