"""The embedded model, end to end: runs, their folders, and the findings it was built to show."""

import pytest
import torch

import lofit_lens as ll
from lofit_lens.experiments.grid.run import run_grid
from lofit_lens.experiments.grid.specs import Grid, Run
from lofit_lens.experiments.organism import cue_patching, planted
from lofit_lens.experiments.tables.load import load_results
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
    tasks = [f"organism/{t}" for t in TASKS]
    runs = [Run(method="zero-shot"), Run(), Run(of="others"), Run(heads="random", draws=2)]
    grid = Grid(name="findings", model="organism", tasks=tasks, seeds=0, batch_size=64, runs=runs)
    assert len(run_grid(grid, tmp_path, progress=False).computed) == 3 * (1 + 1 + 1 + 2 + 2)
    found = load_results(tmp_path)
    own, others, ranks = [], [], []
    for short, task in zip(TASKS, tasks, strict=True):
        chosen = found.lofit(task)["value"].mean()
        assert chosen - found.zero_shot(task)["value"].mean() >= 0.50, task
        assert chosen - found.by_chance(task)["value"].mean() >= 0.15, task
        own.append(chosen)
        others += [found.lofit(task, source=o)["value"].mean() for o in tasks if o != task]
        ranks += [found.scores[task, "A-norm", 0].rank(head) for head in planted(ORGANISM)[short]]
    assert sum(own) / len(own) - sum(others) / len(others) >= 0.10
    assert sum(rank <= 6 for rank in ranks) / len(ranks) >= 0.60
